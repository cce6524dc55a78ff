"""What eight GPUs run, as far as a CPU can show it: the rehearsal in little, and one of eight ranks
under torch's fake process group."""

import contextlib
import os
import re
import runpy
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from experiments.cost import bf16_products, rehearsal
from experiments.tests.common import copy_pairs, fork, train_args


def test_rehearsal_in_little_keeps_its_promises_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def start(words: list[str], env: dict[str, str]) -> int:  # as a fork, which spares the imports
        def action() -> None:
            os.environ |= env
            sys.argv = words
            with bf16_products.Bf16Products():
                runpy.run_path(str(rehearsal.ROOT / words[0]), run_name="__main__")

        (process,) = fork(1, action, tmp_path / "log")
        return process.pid

    monkeypatch.setattr(rehearsal, "start", start)
    args = rehearsal.Args(output_dir=tmp_path / "run", blocks=2)
    rehearsal.main(args)
    assert not args.output_dir.exists()
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    assert [x.split(" | ")[1] for x in rows[2:]] == ["killed", "exit 0", "exit 0"]


class Seen(TorchDispatchMode):
    """Lists (function, [(dtype, bytes) of each tensor])."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.calls.append((function, [(x.dtype, x.nbytes) for x in tensors]))
        return function(*args, **(kwargs or {}))


def attend(x, weight, kernel):
    """A product of each kind: a linear layer, attention, a matrix product, a convolution."""
    x = torch.nn.functional.linear(x, weight, weight[0])
    heads = x.view(2, 8, 2, 16).transpose(1, 2)
    x = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    x = x @ x.mT
    return torch.nn.functional.conv2d(x, kernel)


def factors(dtype: torch.dtype) -> list[torch.Tensor]:
    """What attend takes."""
    shapes = ((2, 8, 32), (32, 32), (3, 2, 3, 3))
    return [torch.randn(x, generator=sample.seeded(*x)).to(dtype).requires_grad_() for x in shapes]


def products_and_gradients() -> list[torch.Tensor]:
    given = factors(torch.bfloat16)
    y = attend(*given)
    y.float().square().mean().backward()
    return [y.detach(), *(x.grad for x in given)]


def test_bf16_products_are_made_in_float32_and_are_torchs_own_to_their_rounding():
    expected = products_and_gradients()
    with Seen() as seen, bf16_products.Bf16Products():
        found = products_and_gradients()
        with torch.inference_mode():
            attend(*factors(torch.bfloat16))
        with torch.autocast("cpu"):
            assert attend(*factors(torch.float32)).dtype == torch.bfloat16
    products = [x for f, x in seen.calls if re.search("linear|mm|conv|attention", f._opname)]
    assert {second for _, (second, _), *_ in products} == {torch.float32}
    for x, y in zip(found, expected):
        assert x.dtype == torch.bfloat16
        error = (x.float() - y.float()).abs().max()
        assert error <= 0.03 * y.float().abs().max(), error


def send(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook: the fake group's own answer to a bucket is none that DDP takes."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_each_gradient_is_sent_once_a_step(tmp_path, monkeypatch):
    """By one of eight ranks of a fake group, in the second of two accumulated backwards."""
    sent = {"backward": [], "training_step": [], "greatest": []}
    sizes, make_ddp = [], train.make_ddp

    def hooked(transformer: torch.nn.Module):
        ddp = make_ddp(transformer)
        ddp.register_comm_hook(None, send)
        sizes.append(sum(x.nbytes for x in train.trained(transformer).values()))
        return ddp

    def check(pairs: train.Pairs, hosts, least: int) -> str:  # no other rank brings its share
        pairs.digests = [pairs.inspect(row)[0] for row in pairs.rows]
        return ""

    def noted(name: str, original, *args, **options) -> int:
        with Seen() as seen:
            original(*args, **options)
        calls = [(f._opname, x[0][1]) for f, x in seen.calls if f.namespace == "c10d"]
        sent[name].append(calls)
        if len(sent["greatest"]) == 2:  # of the newest checkpoint's step, then of signals
            raise InterruptedError  # enough
        return 0

    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(train, "init_distributed", lambda: (0, 8, torch.device("cpu")))
    monkeypatch.setattr(train, "make_ddp", hooked)
    monkeypatch.setattr(train.Pairs, "check", check)
    for name in sent:
        monkeypatch.setattr(train, name, partial(noted, name, getattr(train, name)))
    flags = {"gradient_accumulation_steps": 2, "num_aux_points": 1, "train_batch_size": 1}
    pairs = copy_pairs(range(20), tmp_path / "pairs.parquet")
    args = train_args(dataset=pairs, output_dir=tmp_path / "run", **flags)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with pytest.raises(InterruptedError), contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        train.train(args, stack)
    first, last = sent["backward"]
    assert first == [] and {name for name, _ in last} == {"allreduce_"}
    assert [sum(size for _, size in last)] == sizes
    normalizer, sums = ("allreduce_", 4), ("allreduce_", len(train.METRICS) * 2 * 8)
    assert sent["training_step"] == [[normalizer, *last, sums]]
    assert sent["greatest"] == 2 * [[("allreduce_", 8)]]


def test_each_rank_takes_the_gpu_of_its_local_rank_and_nccl(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(sample, "rendezvous", lambda _: iter([(dist.HashStore(), 11, 16)]))
    monkeypatch.setattr(dist, "init_process_group", lambda x, **group: calls.append((x, group)))
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert sample.init_distributed() == (11, 16, torch.device("cuda", 3))
    assert calls[0] == torch.device("cuda", 3)  # before nccl starts, which takes the current one
    backend, group = calls[1]
    assert (backend, group["rank"], group["world_size"]) == ("nccl", 11, 16)


def test_table_of_cuda_lines_names_tests_that_exist():
    tests = rehearsal.ROOT / "experiments/tests"
    table = (rehearsal.ROOT / "experiments/cost/cuda_lines.md").read_text()
    named = re.findall(r"`(test_\w+\.py) -k (\"[^\"]+\"|\w+)`", table)
    assert len(named) >= 17
    for file, words in named:
        (path,) = [*rehearsal.ROOT.glob(file), *tests.rglob(file)]
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        for word in words.strip('"').split(" or "):
            assert any(word in name for name in names), f"{file} has no test -k {word}"
