"""What eight GPUs run, as far as a CPU can show it: the shrunk rehearsal; a step under torch's fake
process group of eight ranks; a step on fake tensors, where reading a value raises."""

import contextlib
import json
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from experiments.cost import bf16_products, memory, rehearsal
from experiments.tests.common import copy_pairs, train_args
from soar import loss_normalizer

WORLD = 8


def test_rehearsal_in_little_keeps_its_promises_and_leaves_nothing(tmp_path, capfd):
    args = rehearsal.Args(output_dir=tmp_path / "run", blocks=2, table=tmp_path / "table.md")
    rehearsal.main(args)
    assert not args.output_dir.exists()
    rows = [x for x in args.table.read_text().splitlines() if x.startswith("| ")]
    assert len(rows) == 2 + 5 and sum("exit 0" in x for x in rows) == 4, rows


class SeenProducts(TorchDispatchMode):
    """The dtypes that products are made in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in bf16_products.PRODUCTS:
            self.dtypes.add(args[1].dtype)
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
    made = [torch.randn(x, generator=sample.seeded(*x)).to(dtype) for x in shapes]
    return [x.requires_grad_() for x in made]


def products_and_gradients() -> list[torch.Tensor]:
    given = factors(torch.bfloat16)
    y = attend(*given)
    y.float().square().mean().backward()
    return [y.detach(), *(x.grad for x in given)]


def test_bf16_products_in_float32_are_torchs_own_to_their_rounding():
    expected = products_and_gradients()
    with SeenProducts() as seen, bf16_products.Bf16Products():
        found = products_and_gradients()
    assert seen.dtypes == {torch.float32}
    for x, y in zip(found, expected):
        assert x.dtype == torch.bfloat16
        error = (x.float() - y.float()).abs().max()
        assert error <= 0.03 * y.float().abs().max(), error


def test_bf16_products_are_in_float32_in_inference_mode_and_under_autocast_too():
    with SeenProducts() as seen, bf16_products.Bf16Products(), torch.inference_mode():
        assert attend(*factors(torch.bfloat16)).dtype == torch.bfloat16
    assert seen.dtypes == {torch.float32}
    with SeenProducts() as seen, bf16_products.Bf16Products(), torch.autocast("cpu"):
        assert attend(*factors(torch.float32)).dtype == torch.bfloat16
    assert seen.dtypes == {torch.float32}


def test_real_size_is_that_of_sd35_medium():
    sizes = {}
    for name, model in memory.empty_models(None).items():
        sizes[name] = sum(x.numel() for x in model.parameters())
    # The hub's files in 16 bits: 0.25, 1.39 and 9.52 GB of text encoders, 0.17 GB of VAE, 4.94 GB
    # of transformer, 0.45 of which are its table of positions.
    gigabytes = {name: round(2 * size / 1e9, 2) for name, size in sizes.items()}
    assert gigabytes == {
        "transformer": 4.49, "vae": 0.17, "text_encoder": 0.25, "text_encoder_2": 1.39,
        "text_encoder_3": 9.52,
    }  # fmt: skip


# --- Eight ranks ---


class Stop(Exception):
    pass


class Sent(TorchDispatchMode):
    """Lists (collective, bytes)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            self.calls.append((function._opname, sum(x.nbytes for x in tensors)))
        return function(*args, **(kwargs or {}))


class Rank:
    """train.train up to the end of its first step, as one rank of a fake process group: what it was
    given, its gradients, and what its collectives sent in each call of train.py's functions."""

    def __init__(self, rank: int, world: int, args: train.Args):
        self.rank, self.world = rank, world
        self.captions, self.t, self.gradients, self.sums = [], [], [], None
        self.sent = {"backward": [], "training_step": [], "greatest": []}
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(dist, "new_group", lambda **_: None)
            monkeypatch.setattr(train, "init_distributed", self.init_distributed)
            monkeypatch.setattr(train, "make_ddp", partial(self.make_ddp, train.make_ddp))
            monkeypatch.setattr(train.Pairs, "check", self.check)
            monkeypatch.setattr(train, "loss_normalizer", self.loss_normalizer)
            for name in (*self.sent, "update", "encode_prompts", "soar_terms"):
                note = partial(getattr(self, name), getattr(train, name))
                monkeypatch.setattr(train, name, note)
            with pytest.raises(Stop), contextlib.ExitStack() as stack:
                stack.callback(dist.destroy_process_group)
                train.train(args, stack)

    def init_distributed(self) -> tuple[int, int, torch.device]:
        group = {"store": FakeStore(), "rank": self.rank, "world_size": self.world}
        dist.init_process_group("fake", **group)
        return self.rank, self.world, torch.device("cpu")

    def make_ddp(self, original, transformer):
        """DDP sends its buckets by a hook: the fake group's own answer is none that it takes."""
        ddp = original(transformer)

        def send(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            dist.all_reduce(bucket.buffer())
            done = torch.futures.Future()
            done.set_result(bucket.buffer().div_(self.world))
            return done

        ddp.register_comm_hook(None, send)
        return ddp

    @staticmethod
    def check(pairs: train.Pairs, hosts, least: int) -> str:
        """Of all rows, as the fake group brings no other rank's share."""
        pairs.digests = [pairs.inspect(row)[0] for row in pairs.rows]
        return ""

    def loss_normalizer(self, t: torch.Tensor, config) -> torch.Tensor:
        """That of all ranks, as the fake group does not add them up."""
        return self.world * loss_normalizer(t, config)

    def noted(self, name: str, original, *args, **options):
        with Sent() as sent:
            result = original(*args, **options)
        self.sent[name].append(sent.calls)
        return result

    def backward(self, original, *args, **last) -> None:
        self.noted("backward", original, *args, **last)

    def training_step(self, original, *args) -> None:
        self.noted("training_step", original, *args)

    def update(self, original, args, run, batches, sums) -> None:
        self.gradients = [x.grad.clone() for x in train.trained(run.transformer).values()]
        self.sums = sums.clone()
        original(args, run, batches, sums)

    def greatest(self, original, *args) -> int:
        """The first is the newest checkpoint's step, the second a signal's number."""
        self.noted("greatest", original, *args)
        if len(self.sent["greatest"]) == 2:
            raise Stop
        return 0

    def encode_prompts(self, original, pipe, texts, length):
        self.captions.append(texts)
        return original(pipe, texts, length)

    def soar_terms(self, original, velocity, z0, draws, *args, **kwargs):
        self.t += draws.t.tolist()
        return original(velocity, z0, draws, *args, **kwargs)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(one process, eight ranks) on the same global batch of 16, in two accumulated halves."""
    folder = tmp_path_factory.mktemp("ranks")
    pairs = copy_pairs(range(20), folder / "pairs.parquet")
    flags = {"dataset": pairs, "gradient_accumulation_steps": 2, "num_aux_points": 1}
    one = train_args(output_dir=folder / "one", train_batch_size=WORLD, **flags)
    eight = train_args(output_dir=folder / "eight", train_batch_size=1, **flags)
    return Rank(0, 1, one), [Rank(rank, WORLD, eight) for rank in range(WORLD)]


def test_eight_ranks_share_out_the_pairs_and_draws_of_one_process(ranks):
    one, eight = ranks
    # A rank's first call encodes the empty prompt.
    texts = [text for micro in (1, 2) for seen in eight for text in seen.captions[micro]]
    assert texts == [text for micro in (1, 2) for text in one.captions[micro]]
    assert len(set(texts)) > WORLD
    t = [seen.t[micro] for micro in (0, 1) for seen in eight]
    assert t == one.t and len(set(t)) == 2 * WORLD


def test_gradients_of_eight_ranks_add_up_to_those_of_one_process(ranks):
    one, eight = ranks
    for i, expected in enumerate(one.gradients):
        found = sum(seen.gradients[i] for seen in eight)  # DDP has divided each by 8
        # Two orders of a float32 sum over 16 samples and their tokens.
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    row = train.METRICS.index("loss")
    loss = sum(seen.sums[row, 0] for seen in eight) / WORLD
    assert loss == pytest.approx(float(one.sums[row, 0]), rel=1e-5)


def test_each_gradient_is_sent_once_a_step(ranks):
    _, eight = ranks
    for seen in eight:
        first, last = seen.sent["backward"]
        assert first == []  # accumulated only
        size = sum(x.nbytes for x in seen.gradients)
        assert {name for name, _ in last} == {"allreduce_"}
        assert sum(sent for _, sent in last) == size
        normalizer, sums = ("allreduce_", 4), ("allreduce_", len(train.METRICS) * 2 * 8)
        assert seen.sent["training_step"] == [[normalizer, *last, sums]]
        assert seen.sent["greatest"] == 2 * [[("allreduce_", 8)]]


def test_each_rank_takes_the_gpu_of_its_local_rank_and_nccl(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(sample, "rendezvous", lambda _: iter([(dist.HashStore(), 11, 16)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **group: calls.append((backend, group))
    )
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert sample.init_distributed() == (11, 16, torch.device("cuda", 3))
    assert calls[0] == torch.device("cuda", 3)  # before nccl starts, which takes the current one
    backend, group = calls[1]
    assert (backend, group["rank"], group["world_size"]) == ("nccl", 11, 16)


def test_table_of_cuda_lines_names_tests_that_exist():
    table = (memory.RESULTS.parent / "cuda_lines.md").read_text()
    named = re.findall(r"`(test_\w+\.py) -k (\"[^\"]+\"|\w+)`", table)
    assert len(named) >= 19
    for file, words in named:
        (path,) = [*rehearsal.ROOT.glob(file), *rehearsal.ROOT.glob(f"experiments/tests/*/{file}")]
        tests = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        for word in words.strip('"').split(" or "):
            assert any(word in name for name in tests), f"{file} has no test -k {word}"


# --- Fake tensors ---


def test_a_step_reads_no_value_and_casts_each_weight_once():
    way = memory.Way(gradient_checkpointing=True)
    row = memory.measure(memory.Args(blocks=1), way, memory.cuda_autocast())  # a value read raises
    assert row["casts_per_step"] == pytest.approx(row["bf16_copies"], rel=0.01)
    assert row["moments"] == pytest.approx(2 * 4 * row["trained"], rel=0.01)
    assert row["gradients"] == 4 * row["trained"]
    parts = ("weights", "bf16_copies", "gradients", "moments", "activations", "rest")
    assert sum(row[name] for name in parts) == row["total"]


def test_the_pages_memory_is_what_was_computed():
    page = (memory.RESULTS.parent / "README.md").read_text().split("## Small cards")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\d.]+) \| (.*) \|$", page, re.M))
    found = json.loads((memory.RESULTS / "memory.json").read_text())["rows"]
    flags = ["none" if x["flags"] == "as is" else f"`{x['flags']}`" for x in found]
    assert rows == {f"{x['total'] / 1e9:.1f}": f for x, f in zip(found, flags)}
    assert all(0.96 < x["computed"] / x["total"] <= 1 for x in found if "computed" in x)
