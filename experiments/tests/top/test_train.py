"""train.py on the small Stable Diffusion 3 pipeline of experiments/shapes/data: runs are exact, a
step is what it is said to be, flags, and what the user sees.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import os
import traceback
import weakref
from collections.abc import Iterable
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.parallel import DistributedDataParallel

import sample
import train
from experiments.shapes.draw import DATA, PAIRS, read_pairs
from experiments.tests.common import ROOT, Watch, copy_pairs, launch, raises, train_args
from experiments.tests.top.sampling import base_transformer, pixels
from experiments.tests.top.training import (
    SHORT,
    SOAR,
    THREE,
    WEIGHTS,
    all_lines,
    ends,
    held_out_lines,
    last,
    lines,
    refused,
    run,
    same_weights,
)
from sample import visible
from soar import SoarConfig, Term

# --- Exactness ---


def test_twelve_steps_equal_five_and_three_and_four_bit_by_bit(tmp_path, held_out):
    flags = {"cond_dropout_rate": 0.3, "train_batch_size": 3, "logging_steps": 2}
    flags |= {"checkpointing_steps": 100, "held_out": held_out, "validation_steps": 4}
    flags |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}
    run(tmp_path / "whole", max_train_steps=12, **flags)
    for steps in (5, 8, 12):
        run(tmp_path / "parts", max_train_steps=steps, **flags)
    rates = [line["lr"] for line in lines(tmp_path / "whole")]
    assert rates == pytest.approx([5e-5] + 5 * [1e-4])
    assert [line["step"] for line in held_out_lines(tmp_path / "whole")] == [0, 4, 8, 12]
    # 5 was a last step, which was measured for that alone; 8 is measured again, and is there once.
    parts = all_lines(tmp_path / "parts")
    assert [x["step"] for x in held_out_lines(tmp_path / "parts")] == [0, 4, 5, 8, 12]
    parts.remove(next(x for x in parts if x["step"] == 5))
    assert parts == all_lines(tmp_path / "whole")
    assert same_weights(last(tmp_path / "whole"), last(tmp_path / "parts"))
    early, late = (tmp_path / f"parts/checkpoint-00000{n}" for n in (5, 8))
    assert not same_weights(early, late)


def test_losses_weights_and_images_depend_neither_on_processes_nor_on_accumulation(runs):
    base, reference = base_transformer().state_dict(), load_file(last(runs / "1x4") / WEIGHTS)
    assert max((reference[key] - base[key]).abs().max() for key in reference) > 1e-5
    assert [line["step"] for line in lines(runs / "1x4")] == [1, 2, 3, 4, 5]
    for name, count in (("2x2", 3), ("1x2x2", 5), ("2x2, 1x4", 5)):
        assert len(lines(runs / name)) == count
        for a, b in zip(lines(runs / "1x4"), lines(runs / name)):
            assert b == pytest.approx(a, rel=1e-5), name
    for name in ("1x2x2", "2x2, 1x4"):
        weights = load_file(last(runs / name) / WEIGHTS)
        # Adam's first steps turn rounding of a gradient near 0 into a part of a step of 1e-4.
        assert max((weights[key] - reference[key]).abs().max() for key in weights) < 4e-5
    held_out = (held_out_lines(runs / "1x4")[:2], held_out_lines(runs / "2x2"), (1e-6, 1e-5))
    for one, two, tolerance in zip(*held_out, strict=True):
        assert two == pytest.approx(one, rel=tolerance)
    for step, image in itertools.product((0, 3), range(3)):
        name = f"validation-00000{step}/0000{image}.png"
        one, two = (pixels(runs / split / name) for split in ("1x4", "2x2"))
        assert one.shape == (64, 64, 3) and one.std() > 5 and np.abs(one - two).max() <= 1


def noise(name: str, keys: list[tuple]) -> torch.Tensor:
    generators = [sample.seeded(42, name, *key) for key in keys]
    return torch.stack([torch.randn((16, 8, 8), generator=x) for x in generators])


def encoded(rows: Iterable[dict], keys: list[tuple]) -> tuple[torch.Tensor, ...]:
    """z0, embeddings and pooled embeddings of pairs, by diffusers and torch alone."""
    pipe = StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    images = [torch.from_numpy(np.array(row["image"].convert("RGB"))) for row in rows]
    texts, config = [row["text"] for row in rows], pipe.vae.config
    with torch.no_grad():
        x = torch.stack(images).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
        posterior = pipe.vae.encode(x).latent_dist
        z0 = posterior.mean + posterior.std * noise("vae", keys)
        embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, max_sequence_length=12)
    return (z0 - config.shift_factor) * config.scaling_factor, embeds, pooled


def test_held_out_errors_are_those_of_diffusers_and_torch_alone(runs, held_out):
    first, middle, end = held_out_lines(runs / "1x4")
    assert (first["step"], middle["step"], end["step"]) == (0, 3, 5)
    levels = (0.1, 0.25, 0.5, 0.75, 0.9)
    names = [f"held_out_{sigma}" for sigma in levels]
    assert set(first) == {"step", "held_out", *names}
    keys = [("held out", row) for row in range(7)]
    z0, embeds, pooled = encoded(datasets.Dataset.from_parquet(str(held_out)), keys)
    z1 = noise("draws", keys)
    for line, weights in ((first, DATA / "model"), (end, last(runs / "1x4"))):
        model, expected = SD3Transformer2DModel.from_pretrained(weights / "transformer"), []
        for sigma in levels:
            z, times = (1 - sigma) * z0 + sigma * z1, torch.full((7,), 1000 * sigma)
            with torch.no_grad():
                v = model(z, embeds, pooled, timestep=times).sample
            expected.append(((v - (z1 - z0)) ** 2).mean().item())
        assert [line[name] for name in names] == pytest.approx(expected, rel=1e-5)
        assert line["held_out"] == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert abs(end["held_out"] - first["held_out"]) > 1e-4 * first["held_out"]
    events = EventAccumulator(str(runs / "1x4/tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("held_out_0.5")}
    assert found == pytest.approx({x["step"]: x["held_out_0.5"] for x in (first, middle, end)})


def test_bad_held_out_data_is_refused_by_its_flag_before_training(tmp_path, held_out):
    rows, path = read_pairs().select(range(2)), tmp_path / "bad.parquet"
    (tmp_path / "x.txt").write_text("a")
    refused(tmp_path / "run", f"--held_out {tmp_path}/x.txt", held_out=tmp_path / "x.txt")
    rows.remove_columns("text").add_column("text", ["a", ""]).to_parquet(path)
    refused(tmp_path / "run", f"--held_out {path}", "row 1", "--on_bad_row skip", held_out=path)
    rows.remove_columns("text").add_column("text", ["", ""]).to_parquet(path)
    refused(tmp_path / "run", f"--held_out {path}", "0 pairs", held_out=path, on_bad_row="skip")
    assert not visible(tmp_path / "run")


@pytest.mark.parametrize("count, word", [(4, "has other data"), (5, "rows of --held_out")])
def test_ranks_with_other_held_out_data_are_refused(tmp_path, count, word):
    for rank, rows in enumerate((range(4), range(10, 10 + count))):
        (tmp_path / str(rank)).mkdir()
        copy_pairs(rows, tmp_path / str(rank) / "pairs.parquet")

    def main() -> None:
        os.chdir(tmp_path / os.environ["RANK"])
        flags = {"held_out": "pairs.parquet", "on_bad_row": "skip"}
        train.main(train_args(output_dir=tmp_path / "run", **SHORT | THREE | flags))

    ended, said = ends(2, main, tmp_path / "log")
    assert ended == [1, 1]
    assert any(word in text for text in said), said
    assert not train.checkpoints(tmp_path / "run")


def test_checkpoints_are_whole(runs):
    checkpoints = ("checkpoint-000003", "checkpoint-000005")
    images = (f"validation-00000{step}" for step in (0, 3, 5))
    names = [*checkpoints, "metrics.jsonl", "tensorboard", *images]
    assert [path.name for path in sample.visible(runs / "1x4")] == names
    for name in checkpoints:
        checkpoint = runs / "1x4" / name
        files = ["optimizer.safetensors", "trainer_state.json", "transformer"]
        assert sorted(x.name for x in checkpoint.iterdir()) == files
        model = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
        assert next(model.parameters()).dtype == torch.float32
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["step"] == int(name[-6:]) and state["settings"]["max_sequence_length"] == 12
        moments = load_file(checkpoint / "optimizer.safetensors")
        expected = {f"{p}.{key}" for p, _ in model.named_parameters() for key in train.MOMENTS}
        assert moments.keys() == expected
        assert all(moments[key] == state["step"] for key in moments if key.endswith(".step"))


def test_sft_step_is_that_of_a_plain_loop_of_diffusers_and_torch(tmp_path):
    # Gradients are clipped to less than Adam's epsilon, so updates are in proportion to them.
    flags = {"lambda_aux": 0.0, "train_batch_size": 2, "adam_weight_decay": 0.5}
    flags |= {"max_grad_norm": 1e-6, "learning_rate": 1e-3}
    run(tmp_path / "run", max_train_steps=1, **flags)
    table = datasets.load_dataset("parquet", data_files=str(PAIRS), split="train")
    rows = [table[i] for i in train.step_indices(2000, 2, 42, 1)]
    draws = [train.draw((1, 16, 8, 8), SOAR, sample.seeded(42, "draws", 1, i)) for i in range(2)]
    z1, t = torch.cat([x.z1 for x in draws]), torch.cat([x.t for x in draws])
    z0, embeds, pooled = encoded(rows, [(1, 0), (1, 1)])
    model, sigma = base_transformer(), 3 * t / (1 + 2 * t)
    s = sigma[:, None, None, None]
    v = model((1 - s) * z0 + s * z1, embeds, pooled, timestep=1000 * sigma).sample
    loss = ((v - (z1 - z0)) ** 2).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.5).step()
    (line,) = lines(tmp_path / "run")
    expected = (loss.item(), loss.item(), norm.item())
    assert (line["loss"], line["base"], line["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert line["lr"] == 1e-3
    weights, base = load_file(last(tmp_path / "run") / WEIGHTS), base_transformer().state_dict()
    moved = 0.0
    for name, x in model.state_dict().items():
        assert (weights[name] - x).abs().max() <= 2e-7 * max(1, x.abs().max()), name
        decay = 5e-4 if name.endswith(("weight", "bias")) else 0
        moved = max(moved, (weights[name] - (1 - decay) * base[name]).abs().max())
    assert moved > 1e-4  # by more than the decay


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_no_step_of_a_schedule_has_learning_rate_0(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    for warmup in (0, 3):
        flags = {"lr_scheduler": name, "lr_warmup_steps": warmup, "max_train_steps": 9}
        training = train_args(output_dir="o", **flags).training
        rates = list(map(train.make_lr_factor(training, optimizer), range(1, 10)))
        assert rates[:warmup] == pytest.approx([1 / 3, 2 / 3, 1][:warmup])
        assert 0.9 <= max(rates) <= 1 and min(rates) > 0 and rates[-1] < 0.2


# --- The step ---


class Graph(torch.autograd.Function):
    """The identity, which keeps a tensor for as long as the graph that it is in."""

    alive: list[weakref.ref] = []

    @staticmethod
    def forward(ctx, v):
        ctx.kept = torch.zeros(1)
        Graph.alive.append(weakref.ref(ctx.kept))
        return v.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    "settings, graphs", [({}, [True, False] + [True] * 6), ({"lambda_aux": 0.0}, [True])]
)
def test_step_runs_eight_forwards_one_graph_at_a_time(tmp_path, monkeypatch, settings, graphs):
    """One with a graph, one without a caption, six with a graph; gradients, views of DDP's buckets,
    are averaged over the ranks in the last."""
    calls, places, forward = [], set(), DistributedDataParallel.forward

    def watched(self, z, **cond):
        assert len(z) == 2 and z.dtype == torch.float32 and not self.broadcast_buffers
        gradients = [x.grad for x in self.parameters() if x.grad is not None]
        fresh = not any(x.any() for x in gradients)
        calls.append((torch.is_grad_enabled(), self.require_backward_grad_sync, fresh))
        assert not any(kept() is not None for kept in Graph.alive)
        if len(calls) > 2:
            places.add(tuple(x.data_ptr() for x in gradients))
        (v,) = forward(self, z, **cond)
        return (Graph.apply(v) if torch.is_grad_enabled() else v,)

    monkeypatch.setattr(DistributedDataParallel, "forward", watched)
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    train.main(train_args(output_dir=tmp_path / "run", max_train_steps=2, **flags, **settings))
    step = [(graph, False, False) for graph in 2 * graphs]
    step[0], step[-1] = (True, False, True), (True, True, False)
    assert calls == [(True, True, True)] * 2 + 2 * step  # the first two settle DDP's buckets
    assert len(places) == 1  # gradients are views of the buckets from the first step on
    (line,) = lines(tmp_path / "run")
    if settings:
        assert line["loss"] == pytest.approx(line["base"]) and "aux" not in line
    else:
        assert line["loss"] == pytest.approx((line["base"] + 6 * line["aux"]) / 7)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_forwards_are_bf16_and_checkpointing_changes_no_bit(tmp_path, monkeypatch, mixed_precision):
    seen, forward = set(), SD3Transformer2DModel.forward

    def recording(self, *args, **kwargs):
        (made,) = forward(self, *args, **kwargs)
        weights = {x.dtype for x in self.parameters()}
        seen.add((self.gradient_checkpointing, made.dtype, *weights))
        return (made,)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", recording)
    for checkpointing in (False, True):
        flags = {"gradient_checkpointing": checkpointing, "mixed_precision": mixed_precision}
        run(tmp_path / str(checkpointing), max_train_steps=2, train_batch_size=2, **flags)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    assert seen == {(checkpointing, dtype, torch.float32) for checkpointing in (False, True)}
    assert lines(tmp_path / "False") == lines(tmp_path / "True")


def test_bf16_weights_are_cast_once_a_micro_batch(tmp_path, monkeypatch):
    casts, original = [], train.backward

    def see(function, args):
        weight = isinstance(args[0], torch.nn.Parameter) if args else False
        if weight and function is torch.ops.aten._to_copy.default:
            casts.append(args[0].shape)

    def watched(*args, **last):
        with Watch(see):
            original(*args, **last)

    monkeypatch.setattr(train, "backward", watched)
    flags = {"mixed_precision": "bf16", "max_train_steps": 1, "train_batch_size": 1}
    run(tmp_path / "one", **flags | {"lambda_aux": 0.0})
    once = len(casts)
    casts.clear()
    run(tmp_path / "two", **flags)
    assert once > 0 and len(casts) == once


READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


def test_host_waits_for_the_device_only_where_it_must(tmp_path, monkeypatch):
    """Of lines that read the value of a tensor: on a GPU the host would wait there."""
    started, waits, original = [], [], train.training_step
    files = {str(ROOT / name) for name in ("train.py", "soar.py", "sample.py")}

    def see(function, args):
        name = function.__name__.split(".")[0]
        masks = [x for x in args[1] if x is not None] if name == "index" else []
        if started and (name in READING or any(x.dtype == torch.bool for x in masks)):
            own = [frame for frame in traceback.extract_stack() if frame.filename in files]
            waits.append(own[-1].line if own else "elsewhere")

    monkeypatch.setattr(train, "training_step", lambda *x: started.append(1) or original(*x))
    with Watch(see):
        run(tmp_path / "run", max_train_steps=3, logging_steps=10, train_batch_size=2)
    known = (
        "normalizer = total.item() / run.world_size",  # on the CPU
        "if not sums.isfinite().all():",  # once a step
        "return int(number)",  # on the CPU
        "if t.device.type",  # soar.py, on a CPU only
        "pipe.encode_prompt(",  # compares tokens, on the CPU
        '"sums": run.totals.tolist()',  # once a checkpoint
    )
    assert [line for line in waits if not any(x in line for x in known)] == []
    for line in known[:3]:
        assert sum(line in x for x in waits) == 3, line


def test_compiled_blocks_give_the_same_steps(tmp_path, runs, prompts, held_out, monkeypatch):
    graphs, original = [], torch.nn.Module.compile

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_eager(self, **options):
        original(self, backend=eager, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eager)
    torch.compiler.reset()
    flags = {"validation_prompts": prompts, "validation_steps": 1, "train_batch_size": 4}
    run(tmp_path / "run", compile=True, max_train_steps=2, held_out=held_out, **flags)
    torch.compiler.reset()
    assert len(graphs) == 6  # dual attention, plain, the last; with gradients and without
    for a, b in zip(lines(tmp_path / "run"), lines(runs / "1x4")[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


# --- Flags ---


SETTINGS = (train.Args, train.DataConfig, train.TrainingConfig, train.JobConfig, sample.Args)


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_flag_is_read(kind):
    nodes = ast.walk(ast.parse(inspect.getsource(inspect.getmodule(kind))))
    attributes = [x for x in nodes if isinstance(x, ast.Attribute)]
    holders = ("args", "data", "training", "job")  # not self: the settings' own checks
    read = {x.attr for x in attributes if ast.unparse(x.value).split(".")[-1] in holders}
    read |= {"mixed_precision"} if "bf16" in read else set()
    assert {field.name for field in dataclasses.fields(kind)} <= read


def test_defaults_are_the_published_ones():
    args = train.parse(["--dataset", "d", "--output_dir", "o"])
    assert args.soar == SoarConfig() and args.data.resolution == 512
    published = {"train_batch_size": 4, "max_train_steps": 5000, "learning_rate": 2e-5}
    published |= {"adam_weight_decay": 1e-2, "max_grad_norm": 1.0, "mixed_precision": "bf16"}
    published |= {"max_sequence_length": 77, "seed": 42, "lr_scheduler": "constant"}
    assert {name: getattr(args.training, name) for name in published} == published


BAD_FLAGS = [
    ({"lambda_aux": -1.0}, ("lambda_aux", "-1.0")),
    ({"lora_rank": 0}, ("--lora_rank", "0")),
    ({"learning_rate": "nan"}, ("--learning_rate", "nan")),
    ({"logging_steps": 0}, ("--logging_steps", "0")),
    ({"reader_threads": 0}, ("--reader_threads", "0")),
    ({"seed": -1}, ("--seed", "-1")),
    ({"lr_warmup_steps": 5}, ("--lr_warmup_steps", "constant_with_warmup")),
    ({"mixed_precision": "fp16"}, ("--mixed_precision", "fp16", "bf16")),
    ({"cond_dropout_rate": 1.5}, ("--cond_dropout_rate", "1.5")),
    ({"min": {"score": "high"}}, ("--min", "FLOAT")),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 5001}, ("--lr_warmup_steps", "5001", "5000")),
    ({"crop": "random"}, ("crop",)),
]


@pytest.mark.parametrize("bad, words", BAD_FLAGS)
def test_bad_flags_are_refused_by_name(bad, words):
    with raises(ValueError, *words):
        train_args(output_dir="o", **bad)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"resolution": 60}, ("--resolution is 60", "multiple of 8")),
        ({"shift": 1.0}, ("--shift is 1.0", "shift 3.0")),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, bad, words):
    refused(tmp_path / "run", *words, **bad)
    assert not visible(tmp_path / "run")


def test_global_batch_may_be_all_pairs_and_no_more(tmp_path, capsys):
    flags = {"dataset": copy_pairs(range(3), tmp_path / "three.parquet"), "max_train_steps": 2}
    refused(tmp_path / "run", "3 pairs", "4", train_batch_size=4, **flags)
    flags["held_out"] = copy_pairs(range(2, 5), tmp_path / "others.parquet")
    run(tmp_path / "run", train_batch_size=3, **flags)
    assert "3 of 3, 3 different, 0 unusable; 1 also in --dataset" in capsys.readouterr().out


# --- What the user sees ---


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path, monkeypatch, capsys, held_out):
    updates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda x: updates.append(1) or step(x))
    rows = read_pairs().select(range(100))
    texts = 6 * ["a photo of " + "many " * 100 + "circles"] + list(rows["text"])[6:]
    rows.remove_columns("text").add_column("text", texts).to_parquet(tmp_path / "x.parquet")
    flags = {"train_batch_size": 4, "num_aux_points": 6, "max_train_steps": 9, "dry_run": True}
    flags |= {"dataset": tmp_path / "x.parquet", "held_out": held_out, "min": {"aesthetic": 6}}
    run(tmp_path / "run", **flags)
    assert len(updates) == 2  # the second has the moments in memory from its start
    said = capsys.readouterr().out
    for part in (
        "3.0 M parameters", "23 of 100, 23 different, 0 unusable\n",
        "held out     1 of 7, 1 different, 0 unusable; 0 also in --dataset\n",
        "captions     2 of 23 are cut at 12 tokens; 21 are different\n",
        "global batch 4 = 1 processes x 1 x 4",
        "9, 0 done; 5 an epoch", f"{tmp_path}/run: 0.04 GB a checkpoint, 0.04 GB to come",
        "rank 0       0.00 GB of memory; 0.0",
    ):  # fmt: skip
        assert part in said, part
    assert not (tmp_path / "run").exists()


def test_validation_draws_before_the_first_step_and_later_from_the_same_noise(runs):
    pipe = sample.load_pipeline(str(DATA / "model"), torch.float32, torch.device("cpu"))
    texts = ("a photo of a blue square", "")
    cond, uncond = (sample.encode_prompts(pipe, [x], 12) for x in texts)
    z1 = torch.randn(1, 16, 8, 8, generator=sample.seeded(42, texts[0], 0))
    drawn = []
    for step, weights in ((0, DATA / "model"), (5, last(runs / "1x4"))):
        folder = runs / f"1x4/validation-00000{step}"
        assert len(list(folder.iterdir())) == 3
        drawn.append(pixels(folder / "00001.png"))
        transformer = SD3Transformer2DModel.from_pretrained(weights / "transformer")
        (image,) = sample.sample_images(pipe, transformer, z1, cond, uncond, 44, 4.5)
        assert np.abs(np.asarray(image).astype(int) - drawn[-1]).max() <= 1
    assert (drawn[0] != drawn[1]).any()


def test_metrics_are_means_over_steps_terms_and_quarters_of_sigma(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000_000)
    sums, one = train.zero_sums(torch.device("cpu")), torch.ones(())
    errors, sigma = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.3, 1.0])
    everyone = torch.ones(3, dtype=torch.bool)
    train.add_term(sums, Term(one, errors, sigma, everyone), auxiliary=False)
    errors, sigma = torch.tensor([8.0, 5.0, 4.0]), torch.tensor([0.8, 0.3, 0.75])
    counts = torch.tensor([True, False, True])
    train.add_term(sums, Term(2 * one, errors, sigma, counts), auxiliary=True)
    sums[train.METRICS.index("loss"), 1] = 2
    sums[train.METRICS.index("grad_norm")] = torch.tensor([5.0, 2.0])
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    run = SimpleNamespace(totals=sums, step=9, seconds=[1.0, 2.0], optimizer=optimizer)
    assert train.metrics_line(run) == {
        "step": 9, "loss": 1.5, "base": pytest.approx(7 / 3), "base_sigma_1": 1,
        "base_sigma_2": 2, "base_sigma_4": 4, "aux": 6, "aux_sigma_4": 6, "grad_norm": 2.5,
        "lr": 0.5, "step_seconds": 1.5, "peak_memory_gb": 5.0,
    }  # fmt: skip
    assert run.seconds == [] and not sums.any()


def test_lines_are_means_over_the_steps_since_the_last_and_validation_changes_nothing(runs):
    every, found = lines(runs / "1x4"), lines(runs / "1x4, plain")
    assert [line["step"] for line in found] == [2, 4]
    for line, pair in zip(found, (every[0:2], every[2:4]), strict=True):
        for key in ("loss", "base", "aux", "grad_norm"):
            mean = (pair[0][key] + pair[1][key]) / 2
            assert line[key] == pytest.approx(mean), key
    assert list((runs / "1x4, plain").glob("validation*")) == []
    assert same_weights(last(runs / "1x4"), last(runs / "1x4, plain"))


def test_end_of_a_run_says_what_is_saved(tmp_path, capsys):
    run(tmp_path / "run", max_train_steps=1)
    run(tmp_path / "run", max_train_steps=1)  # it is finished, and says so again
    captured = capsys.readouterr()
    assert "1/1" in captured.err and "loss=" in captured.err
    assert captured.out.count(f"{tmp_path}/run: step 1 of 1 is saved; complete") == 2


def test_help_starts_with_what_is_set_first_and_without_warnings():
    done = launch("train.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = ("--dataset", "--learning_rate", "--lambda_aux", "--dry_run")
    places = [done.stdout.index(f"\u2502 {flag}") for flag in flags]
    assert places == sorted(places)
