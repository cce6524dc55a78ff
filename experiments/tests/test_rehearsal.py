"""What eight GPUs run, as far as a CPU can show it: the shrunk rehearsal; a step under torch's fake
process group of eight ranks; a step on fake tensors, where reading a value raises."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from experiments import memory, rehearsal
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH
from soar import SoarConfig

WORLD = 8


def test_rehearsal_in_little_keeps_its_promises_and_leaves_nothing(tmp_path, capfd):
    args = rehearsal.Args(output_dir=tmp_path / "run", blocks=2, table=tmp_path / "table.md")
    rehearsal.main(args)
    assert not args.output_dir.exists()
    rows = [x for x in args.table.read_text().splitlines() if x.startswith("| ")]
    assert len(rows) == 2 + 5 and sum("exit 0" in x for x in rows) == 4, rows


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


@dataclasses.dataclass
class Seen:
    """What a rank did in its first step."""

    captions: list
    sigmas: list
    gradients: dict
    sums: torch.Tensor
    sent: dict  # collectives by function of train.py, one list per call


def first_step(rank: int, world: int, output_dir: Path, data: Path, monkeypatch, **flags) -> Seen:
    """train.train up to the end of its first step, as one rank of a fake process group."""
    seen = Seen([], [], {}, torch.zeros(5, 4), {"backward": [], "clip_gradients": [], "any_signal": []})

    def init_distributed():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return rank, world, torch.device("cpu")

    def make_ddp(transformer):
        """DDP sends a bucket by this hook: the fake group's answer, None, is not what it expects."""
        def send(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            dist.all_reduce(bucket.buffer())
            done = torch.futures.Future()
            done.set_result(bucket.buffer().div_(world))
            return done

        ddp = original_ddp(transformer)
        ddp.register_comm_hook(None, send)
        return ddp

    original_ddp = train.make_ddp

    def noted(name: str, before=None, after=None) -> None:
        original = getattr(train, name)

        def changed(*args, **kwargs):
            if before is not None:
                before(*args, **kwargs)
            with Sent() as sent:
                result = original(*args, **kwargs)
            seen.sent.setdefault(name, []).append(sent.calls)
            if after is not None:
                after(*args, **kwargs)
            return result

        monkeypatch.setattr(train, name, changed)

    def stop(*args) -> None:
        raise Stop

    def keep(parameters, max_norm, sums) -> None:
        seen.gradients = {i: x.grad.clone() for i, x in enumerate(parameters)}
        seen.sums = sums.clone()

    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(train, "init_distributed", init_distributed)
        monkeypatch.setattr(dist, "new_group", lambda **_: None)
        noted("backward")
        noted("clip_gradients", before=keep)
        noted("any_signal", after=stop)
        noted("encode_prompts", before=lambda pipe, texts, length: seen.captions.append(texts))
        monkeypatch.setattr(train, "make_ddp", make_ddp)
        terms = train.soar_terms

        def soar_terms(velocity, z0, draws, *args, **kwargs):
            seen.sigmas += draws.t.tolist()
            return terms(velocity, z0, draws, *args, **kwargs)

        monkeypatch.setattr(train, "soar_terms", soar_terms)
        args = train.Args(
            dataset=str(data), output_dir=output_dir, resolution=64,
            pretrained_model_name_or_path=str(DATA / "model"),
            training=train.TrainingConfig(
                mixed_precision="no", max_sequence_length=MAX_SEQUENCE_LENGTH, **flags
            ),
            soar=SoarConfig(num_aux_points=1),
            rest=train.RestConfig(dataloader_num_workers=0),
        )  # fmt: skip
        with pytest.raises(Stop), contextlib.ExitStack() as stack:
            try:
                train.train(args, stack)
            finally:
                dist.destroy_process_group()
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(one process, eight ranks) on the same global batch of 16, in two accumulated halves."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "pairs").mkdir()
    lines = (DATA / "train/metadata.jsonl").read_text().splitlines(keepends=True)[:20]
    (folder / "pairs/metadata.jsonl").write_text("".join(lines))
    for line in lines:
        shutil.copy(DATA / "train" / json.loads(line)["file_name"], folder / "pairs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        two = {"gradient_accumulation_steps": 2}
        common = (folder / "pairs", monkeypatch)
        one = first_step(0, 1, folder / "one", *common, train_batch_size=WORLD, **two)
        eight = []
        for rank in range(WORLD):
            made = first_step(rank, WORLD, folder / "eight", *common, train_batch_size=1, **two)
            eight.append(made)
    return one, eight


def test_eight_ranks_share_out_the_pairs_and_draws_of_one_process(ranks):
    one, eight = ranks
    # A rank's first call encodes the empty prompt.
    texts = [text for micro in (1, 2) for seen in eight for text in seen.captions[micro]]
    assert texts == [text for micro in (1, 2) for text in one.captions[micro]]
    assert len(set(texts)) > WORLD
    t = [seen.sigmas[micro] for micro in (0, 1) for seen in eight]
    assert t == one.sigmas and len(set(t)) == 2 * WORLD


def test_gradients_of_eight_ranks_add_up_to_those_of_one_process(ranks):
    one, eight = ranks
    for i, expected in one.gradients.items():
        found = sum(seen.gradients[i] for seen in eight)  # DDP has divided each by 8
        # Two orders of a float32 sum over 16 samples and their tokens.
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    loss = sum(seen.sums[4, 0] for seen in eight) / WORLD
    assert loss == pytest.approx(float(one.sums[4, 0]), rel=1e-5)


def test_each_gradient_is_sent_once_a_step(ranks):
    _, eight = ranks
    for seen in eight:
        first, last = seen.sent["backward"]
        assert first == []  # accumulated only
        size = sum(x.nbytes for x in seen.gradients.values())
        assert {name for name, _ in last} == {"allreduce_"}
        assert sum(sent for _, sent in last) == size
        assert seen.sent["clip_gradients"] == [[("allreduce_", 5 * 4 * 8)]]
        assert seen.sent["any_signal"] == [[("allreduce_", 8)]]


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


# --- Fake tensors ---


def test_a_step_reads_no_value_and_casts_each_weight_once():
    way = memory.Way(gradient_checkpointing=True)
    row = memory.measure(memory.Args(blocks=1), way, memory.CudaAutocast())  # a value read raises
    assert row["casts_per_step"] == pytest.approx(row["bf16_copies"], rel=0.01)
    assert row["moments"] == pytest.approx(2 * 4 * row["trained"], rel=0.01)
    assert row["gradients"] == 4 * row["trained"]
    parts = ("weights", "bf16_copies", "gradients", "moments", "activations", "rest")
    assert sum(row[name] for name in parts) == row["total"]
