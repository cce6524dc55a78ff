"""What GPUs run, as far as a CPU can show it; products in bf16 where a processor has none."""

import os
import re
import runpy
import sys

import torch
import torch.distributed as dist

import sample
from experiments.cost import bf16_products, rehearsal
from experiments.tests.common import Watch, fork


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
    factor_types = set()

    def see(function, args):
        if re.search("linear|mm|conv|attention", function._opname):
            factor_types.add(args[1].dtype)

    with Watch(see), bf16_products.Bf16Products():
        found = products_and_gradients()
        with torch.inference_mode():
            attend(*factors(torch.bfloat16))
        with torch.autocast("cpu"):
            assert attend(*factors(torch.float32)).dtype == torch.bfloat16
    assert factor_types == {torch.float32}
    for x, y in zip(found, expected):
        assert x.dtype == torch.bfloat16
        error = (x.float() - y.float()).abs().max()
        assert error <= 0.03 * y.float().abs().max(), error


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
