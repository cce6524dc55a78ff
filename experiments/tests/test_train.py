"""train.py on the small Stable Diffusion 3 pipeline of experiments/shapes_data."""

import ast
import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import time
import traceback
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from experiments import sd3, trainable
from experiments.pairs import Pairs, read_image
from experiments.shapes import DATA
from experiments.tests.common import MODEL, ROOT, finish, launch, start
from soar import SoarConfig, Term

TRAIN = MODEL | {"dataset": str(DATA / "train"), "resolution": 64, "dataloader_num_workers": 0}
SHORT = {"learning_rate": 1e-4, "num_rollout_paths": 2, "num_aux_points": 1, "logging_steps": 1}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TIMES = {"images_per_second", "tflops_per_second", "peak_memory_gb"}


@pytest.fixture(autouse=True)
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(output_dir: Path, **flags) -> None:
    """train.py in this process."""
    try:
        train.main(train.Args(output_dir=output_dir, **(TRAIN | SHORT | flags)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def lines(folder: Path) -> list[dict]:
    """Its metrics but for times."""
    written = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in written]


def write_pairs(folder: Path, count: int = 8, size: tuple[int, int] = (40, 72)) -> Path:
    """An imagefolder of noise images that are not square."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "score": i / 2} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- Exactness ---


def test_twelve_steps_equal_five_and_four_and_three_bit_by_bit(tmp_path):
    flags = {"dataset": str(write_pairs(tmp_path / "pairs")), "crop": "random", "random_flip": True}
    flags |= {"cond_dropout_rate": 0.3, "train_batch_size": 3, "logging_steps": 2, "checkpointing_steps": 100}
    run(tmp_path / "whole", max_train_steps=12, **flags)
    for steps in (5, 9, 12):
        run(tmp_path / "parts", max_train_steps=steps, **flags)
    assert len(lines(tmp_path / "whole")) == 6 and lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for name in (WEIGHTS, "optimizer.safetensors"):
        whole, parts = (load_file(tmp_path / x / "final" / name) for x in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(*(load_file(tmp_path / "parts" / f"checkpoint-0000{n}" / WEIGHTS)["proj_out.bias"]
                             for n in ("05", "09")))  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same five steps at global batch 4: 1 x 4; 1 x 2 x 2 accumulated; 3 steps of 2 x 2, gone on with 1 x 4."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "p.txt").write_text("a photo of a red circle\na photo of a blue square\na photo of two stars\n")
    flags = {"max_train_steps": 5, "checkpointing_steps": 3}
    drawn = {"validation_prompts": folder / "p.txt", "validation_steps": 3}
    run(folder / "1x4", train_batch_size=4, **flags, **drawn)
    run(folder / "1x2x2", train_batch_size=2, gradient_accumulation_steps=2, **flags)
    two = TRAIN | SHORT | drawn | {"max_train_steps": 3, "checkpointing_steps": 2, "train_batch_size": 2}
    done = launch(2, "train.py", output_dir=folder / "2x2", **two)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(folder / "2x2", folder / "2x2, 1x4", symlinks=True)
    run(folder / "2x2, 1x4", train_batch_size=4, **flags)
    return folder


def test_losses_and_weights_do_not_depend_on_the_number_of_processes_or_the_accumulation(runs):
    base = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer").state_dict()
    reference = load_file(runs / "1x4/final" / WEIGHTS)
    assert max((reference[key] - base[key]).abs().max() for key in reference) > 1e-5  # it was trained
    assert [line["step"] for line in lines(runs / "1x4")] == [1, 2, 3, 4, 5]
    for name in ("2x2", "1x2x2", "2x2, 1x4"):
        for a, b in zip(lines(runs / "1x4"), lines(runs / name)):
            assert b == pytest.approx(a, rel=1e-5), name
    assert [len(lines(runs / name)) for name in ("2x2", "1x2x2", "2x2, 1x4")] == [3, 5, 5]
    for name in ("1x2x2", "2x2, 1x4"):
        weights = load_file(runs / name / "final" / WEIGHTS)
        # Adam's first steps turn rounding of a gradient near 0 into a part of a whole step of 1e-4.
        assert max((weights[key] - reference[key]).abs().max() for key in weights) < 4e-5


def test_validation_images_do_not_depend_on_the_number_of_processes(runs):
    for name in ("validation-000000.png", "validation-000003.png"):
        one, two = (np.asarray(Image.open(runs / split / name)).astype(int) for split in ("1x4", "2x2"))
        assert one.shape == (64, 192, 3) and np.abs(one - two).max() <= 1
        assert all(tile.std() > 5 for tile in np.split(one, 3, axis=1))  # each rank's tiles are there


def test_checkpoints_are_whole_and_final_is_the_last(runs):
    names = sorted(path.name for path in (runs / "1x4").iterdir() if not path.name.startswith("validation"))
    checkpoints = ["checkpoint-000003", "checkpoint-000005"]
    assert names == [*checkpoints, "final", "metrics.jsonl", "settings.json", "tensorboard"]
    assert (runs / "1x4" / "final").resolve() == (runs / "1x4" / "checkpoint-000005").resolve()
    for name in checkpoints:
        checkpoint = runs / "1x4" / name
        assert sorted(x.name for x in checkpoint.iterdir()) == [
            "optimizer.safetensors", "trainer_state.json", "transformer",
        ]  # fmt: skip
        model = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
        assert next(model.parameters()).dtype == torch.float32
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["step"] == int(name[-6:]) and state["settings"]["max_sequence_length"] == 12
        moments = load_file(checkpoint / "optimizer.safetensors")
        assert moments.keys() == {
            f"{p}.{key}" for p, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
        }
        assert all(moments[key] == state["step"] for key in moments if key.endswith(".step"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickle_is_never_read(tmp_path, part):
    shutil.copytree(DATA / "model", tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        run(tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "model"), max_train_steps=1)
    assert not (tmp_path / "run").exists()


def test_checkpoint_is_on_the_disk_before_it_gets_its_name_and_its_state_comes_last(tmp_path, monkeypatch):
    events, sync, save_whole = [], train.sync, train.save_whole
    monkeypatch.setattr(train, "sync", lambda path: events.append(path) or sync(path))
    monkeypatch.setattr(train, "save_whole", lambda x, path: events.append(path) or save_whole(x, path))
    run(tmp_path / "run", max_train_steps=1)
    staging = tmp_path / "run" / ".checkpoint-000001"
    *synced, last, parent = events[-8:]
    names = ("", "transformer", "transformer/config.json", WEIGHTS, "optimizer.safetensors")
    assert set(synced[-5:]) == {staging / name for name in names} and synced[-1] == staging
    assert last == staging / "trainer_state.json" and parent == tmp_path / "run"


def equal(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_sharded_moments_change_no_bit_and_no_checkpoint(runs, tmp_path):
    two = TRAIN | SHORT | {"max_train_steps": 3, "checkpointing_steps": 2, "train_batch_size": 2}
    two |= {"resume_from_checkpoint": runs / "2x2/checkpoint-000002"}  # whole moments into shares
    done = launch(2, "train.py", "--shard_optimizer", output_dir=tmp_path / "run", **two)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (WEIGHTS, "optimizer.safetensors"):
        assert equal(tmp_path / "run/final" / name, runs / "2x2/checkpoint-000003" / name)
    run(tmp_path / "run", train_batch_size=4, max_train_steps=5)  # shares into whole ones
    for name in (WEIGHTS, "optimizer.safetensors"):
        assert equal(tmp_path / "run/final" / name, runs / "2x2, 1x4/final" / name)


@pytest.mark.parametrize("flags", [{}, {"lambda_aux": 0.0, "gradient_checkpointing": True, "mixed_precision": "bf16"}])
def test_lora_run_goes_on_bit_by_bit_and_writes_what_sample_reads(tmp_path, flags):
    flags = {"lora_rank": 4, "learning_rate": 1e-2, "logging_steps": 1} | flags
    run(tmp_path / "whole", max_train_steps=2, **flags)
    for steps in (1, 2):
        run(tmp_path / "parts", max_train_steps=steps, **(flags | {"gradient_checkpointing": False}))
    files = ["optimizer.safetensors", "pytorch_lora_weights.safetensors", "trainer_state.json"]
    assert sorted(path.name for path in (tmp_path / "whole/final").iterdir()) == files
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for name in files[:2]:
        assert equal(tmp_path / "parts/final" / name, tmp_path / "whole/final" / name)
    found, moments = (load_file(tmp_path / "whole/final" / name) for name in files[1::-1])
    assert len(found) == 2 * (5 * 8 + 4 - 1) and all(4 in x.shape for x in found.values())  # 5 blocks, 1 of them dual
    assert len(moments) == 3 * len(found) and all(".lora_" in key for key in moments)
    assert min(x.abs().max() for key, x in found.items() if "lora_B" in key and ".4.attn.add_q" not in key) > 1e-3
    weights, state = sample.find_weights(str(tmp_path / "whole/final"))
    assert weights.name == files[1] and state["settings"]["lora_rank"] == 4
    model = sd3.load_transformer(str(DATA / "model"), weights, torch.float32, torch.device("cpu"))
    base = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer").state_dict()
    key = "transformer_blocks.0.attn.to_q.weight"
    b, a = (found[f"transformer.{key[:-7]}.lora_{x}.weight"] for x in "BA")
    torch.testing.assert_close(model.state_dict()[key], base[key] + b @ a, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lora_rank was 4, is 8"):
        run(tmp_path / "whole", max_train_steps=2, **(flags | {"lora_rank": 8}))


def test_checkpointed_activations_change_no_bit(runs, tmp_path):
    run(tmp_path / "run", train_batch_size=4, max_train_steps=2, gradient_checkpointing=True)
    assert lines(tmp_path / "run") == lines(runs / "1x4")[:2]


def test_compiled_blocks_give_the_same_steps_from_one_graph_for_each_kind_of_block(runs, tmp_path, monkeypatch):
    graphs, original = [], torch.nn.Module.compile

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend=eager, **options))
    torch.compiler.reset()
    (tmp_path / "p.txt").write_text("a photo of a red circle\n")
    flags = {"validation_prompts": tmp_path / "p.txt", "validation_steps": 1, "num_sampling_steps": 40}
    run(tmp_path / "run", compile=True, train_batch_size=4, max_train_steps=2, **flags)
    assert len(graphs) == 6  # dual attention, plain, the last; with gradients and without
    for a, b in zip(lines(tmp_path / "run"), lines(runs / "1x4")[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    torch.compiler.reset()


def test_text_encoders_may_stay_elsewhere(monkeypatch):
    cpu, meta = torch.device("cpu"), torch.device("meta")
    pipe = sd3.load_pipeline(str(DATA / "model"), torch.float32, meta, cpu)
    assert pipe.vae.device == meta and pipe.text_encoder.device == pipe.text_encoder_3.device == cpu
    assert {x.device for x in sd3.encode_prompts(pipe, ["a circle"], 12).values()} == {meta}


def test_only_the_newest_checkpoints_are_kept_where_a_limit_is_given(tmp_path, monkeypatch):
    seen, original = [], train.save_checkpoint

    def save(path, *rest):
        original(path, *rest)
        seen.append([x.name[-1] for x in train.checkpoints(path.parent)])  # the new one, before anything is deleted

    monkeypatch.setattr(train, "save_checkpoint", save)
    run(tmp_path / "run", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert seen == [["1"], ["1", "2"], ["1", "2", "3"], ["2", "3", "4"]]
    assert [x.name[-1] for x in train.checkpoints(tmp_path / "run")] == ["3", "4"]
    assert list((tmp_path / "run").glob(".checkpoint*")) == []


def test_run_with_other_settings_is_refused_by_their_names(runs, tmp_path):
    shutil.copytree(runs / "1x4", tmp_path / "run", symlinks=True)
    bad = {"seed": 7, "lambda_aux": 0.5, "train_batch_size": 8, "sigma_upper_ratio": 2.0, "min": ("aesthetic=6",)}
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "run", **({"train_batch_size": 4, "max_train_steps": 6} | bad))
    said = ("seed was 42, is 7", "lambda_aux was 1.0, is 0.5", "global_batch was 4, is 8", "data was ")
    for part in (*said, "sigma_upper_ratio was inf, is 2.0"):
        assert part in str(caught.value)
    assert "learning_rate" not in str(caught.value)
    with pytest.raises(ValueError, match="max_train_steps was 5, is 6|lr_scheduler was constant, is cosine"):
        run(tmp_path / "run", train_batch_size=4, max_train_steps=6, lr_scheduler="cosine")
    (tmp_path / "run2").mkdir()
    shutil.copy(tmp_path / "run" / "settings.json", tmp_path / "run2")  # a run that was killed before its first save
    with pytest.raises(ValueError, match="seed was 42, is 7"):
        run(tmp_path / "run2", train_batch_size=4, seed=7)


def test_a_path_to_go_on_from_is_taken_or_refused_but_never_a_fresh_start(runs, tmp_path):
    flags = {"train_batch_size": 4, "max_train_steps": 5}
    run(tmp_path / "on", resume_from_checkpoint=str(runs / "1x4" / "checkpoint-000003"), **flags)
    assert lines(tmp_path / "on") == lines(runs / "1x4")[3:]
    with pytest.raises(FileNotFoundError, match="nowhere is missing or incomplete: it has no trainer_state.json"):
        run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "nowhere"), **flags)
    shutil.copytree(runs / "1x4" / "checkpoint-000003", tmp_path / "part")
    (tmp_path / "part" / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part is missing or incomplete: it has no optimizer.safetensors"):
        run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "part"), **flags)
    with pytest.raises(ValueError, match="seed was 42, is 1"):
        run(tmp_path / "a", resume_from_checkpoint=str(runs / "1x4" / "checkpoint-000003"), seed=1, **flags)
    with pytest.raises(ValueError, match="holds checkpoint-000005, later than"):
        run(runs / "1x4", resume_from_checkpoint=str(runs / "1x4" / "checkpoint-000003"), **flags)
    with pytest.raises(ValueError, match="is not empty, and --resume_from_checkpoint is none"):
        run(runs / "1x4", resume_from_checkpoint="none", **flags)
    with pytest.raises(ValueError, match="--max_train_steps is 4, but .*checkpoint-000005 is at step 5"):
        run(runs / "1x4", train_batch_size=4, max_train_steps=4)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(tmp_path / "b", **flags)
    assert [x.name for x in (tmp_path / "b").iterdir()] == ["notes.txt"]


def test_metrics_of_steps_after_the_checkpoint_and_half_saved_checkpoints_are_cleared_away(tmp_path):
    flags = {"train_batch_size": 4, "checkpointing_steps": 2, "max_train_steps": 2}
    run(tmp_path / "run", **flags)
    line = json.dumps({"step": 3, "loss": 0.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n{line[:9]}")
    (tmp_path / "run" / ".checkpoint-000004" / "transformer").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-000003" / "transformer").mkdir(parents=True)  # copied in part
    with pytest.raises(FileNotFoundError, match="checkpoint-000003 is incomplete: it has no trainer_state.json"):
        run(tmp_path / "run", **(flags | {"max_train_steps": 4}))
    shutil.rmtree(tmp_path / "run" / "checkpoint-000003")
    run(tmp_path / "run", **(flags | {"max_train_steps": 4}))
    assert [x["step"] for x in lines(tmp_path / "run")] == [1, 2, 3, 4] and lines(tmp_path / "run")[2]["loss"] > 0
    assert [x.name for x in train.checkpoints(tmp_path / "run")] == ["checkpoint-000002", "checkpoint-000004"]


def test_learning_rate_is_a_function_of_the_step_that_resume_does_not_change(tmp_path):
    flags = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "learning_rate": 1.0, "max_grad_norm": 1e-9}
    for steps in (3, 6):
        run(tmp_path / "run", max_train_steps=steps, num_aux_points=0, **(flags))
    assert [line["lr"] for line in lines(tmp_path / "run")] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("settings, forwards", [({}, [True, False] + [True] * 6), ({"lambda_aux": 0.0}, [True])])
def test_training_step_runs_one_plus_one_plus_six_forwards_and_sft_one(tmp_path, monkeypatch, settings, forwards):
    calls, original = [], SD3Transformer2DModel.forward

    def counting(self, hidden_states, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        assert len(hidden_states) == 2 and hidden_states.dtype == torch.float32
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    train.main(
        train.Args(
            output_dir=tmp_path / "run", train_batch_size=2, max_train_steps=1, logging_steps=1, **TRAIN, **settings
        )
    )
    assert calls == [True, True, *forwards]  # the first two settle DDP's buckets
    (line,) = lines(tmp_path / "run")
    if settings:
        assert line["loss"] == pytest.approx(line["base"]) and "aux" not in line
    else:
        assert line["loss"] == pytest.approx((line["base"] + 6 * line["aux"]) / 7)


def test_sft_step_is_that_of_a_plain_loop_of_diffusers_and_torch(tmp_path):
    # Gradients are clipped to less than Adam's epsilon, so that an update is in proportion to them.
    flags = {"lambda_aux": 0.0, "train_batch_size": 2, "adam_weight_decay": 0.5, "max_grad_norm": 1e-6}
    run(tmp_path / "run", max_train_steps=1, **(flags | {"learning_rate": 1e-3}))
    pipe = StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    rows, vae, model = datasets.load_dataset(str(DATA / "train"), split="train"), pipe.vae, pipe.transformer
    rows = [rows[i] for i in train.step_rows(2000, 2, 42, 1)]
    pixels = torch.stack([torch.from_numpy(np.array(row["image"].convert("RGB"))) for row in rows]).permute(0, 3, 1, 2)
    generator = sd3.seeded(42, "step", 1)
    draws = train.draw((2, 16, 8, 8), SoarConfig(num_rollout_paths=2, num_aux_points=1), generator)
    noise, sigma = torch.randn(2, 16, 8, 8, generator=generator), 3 * draws.t / (1 + 2 * draws.t)
    with torch.no_grad():
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
        z0 = (posterior.mean + posterior.std * noise - vae.config.shift_factor) * vae.config.scaling_factor
        embeds, _, pooled, _ = pipe.encode_prompt([row["text"] for row in rows], None, None, max_sequence_length=12)
    s = sigma[:, None, None, None]
    v = model((1 - s) * z0 + s * draws.z1, embeds, pooled, timestep=1000 * sigma).sample
    loss = ((v - (draws.z1 - z0)) ** 2).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.5).step()
    (line,) = lines(tmp_path / "run")
    expected = (loss.item(), loss.item(), norm.item())
    assert (line["loss"], line["base"], line["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert line["lr"] == 1e-3
    base = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer").state_dict()
    weights, moved = load_file(tmp_path / "run/final" / WEIGHTS), 0.0
    for name, x in model.state_dict().items():
        assert (weights[name] - x).abs().max() <= 2e-7 * max(1, x.abs().max()), name
        moved = max(moved, (weights[name] - (1 - 5e-4 * name.endswith(("weight", "bias"))) * base[name]).abs().max())
    assert moved > 1e-4  # by more than the decay


def test_gradients_are_summed_over_ranks_once_a_step_in_its_last_backward(tmp_path, monkeypatch):
    syncs, forward = [], DistributedDataParallel.forward

    def recording(self, *args, **kwargs):
        syncs.append(self.require_backward_grad_sync)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DistributedDataParallel, "forward", recording)
    run(tmp_path / "run", max_train_steps=2, train_batch_size=1, gradient_accumulation_steps=2)
    step = [False] * 7 + [True]  # twice one base term, an unconditional forward and two auxiliary terms
    assert syncs == [True, True] + 2 * step  # the first two settle DDP's buckets


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_forwards_run_in_bf16_over_float32_weights_and_checkpointing_changes_no_bit(
    tmp_path, monkeypatch, mixed_precision
):
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


class Waits(TorchDispatchMode):
    """Lines of this repository that read the value of a tensor, for which a host waits if it is on a GPU."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.on, self.lines = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if self.on and (name in self.names or by_mask):
            frame = next(x for x in reversed(traceback.extract_stack()[:-1]) if str(ROOT) + "/.venv" not in x.filename)
            self.lines += [frame.line] * (not frame.filename.endswith("pairs.py"))  # of DataLoader's workers
        return function(*args, **(kwargs or {}))


def test_host_reads_nothing_from_the_device_between_a_steps_prompts_and_the_next_ones(tmp_path, monkeypatch):
    waits, steps, original = Waits(), [], train.draw

    def draw(*args):
        steps.append(1)
        waits.on = len(steps) < 3  # from the first step's draws to the third's
        return original(*args)

    monkeypatch.setattr(train, "draw", draw)
    with waits:
        run(tmp_path / "run", max_train_steps=3, logging_steps=10, train_batch_size=2)
    host = ["normalizer = loss_normalizer(draws.t, args).item() / world_size"]  # of tensors made on the CPU
    host += ["stop, log = bool(host[0]), step % args.logging_steps == 0"]
    library = "pipe.encode_prompt("  # may compare tokens, on the CPU
    assert [line for line in waits.lines if library not in line] == 2 * host


class Graph(torch.autograd.Function):
    """The identity, whose saved tensor lives as long as the graph that it is in."""

    alive: list[weakref.ref] = []

    @staticmethod
    def forward(ctx, v):
        kept = torch.zeros(1)
        ctx.save_for_backward(kept)
        Graph.alive.append(weakref.ref(kept))
        return v.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_one_graph_is_alive_at_a_time_in_a_step(tmp_path, monkeypatch):
    original, alive = SD3Transformer2DModel.forward, []

    def forward(*args, **kwargs):
        alive.append(sum(kept() is not None for kept in Graph.alive))
        (v,) = original(*args, **kwargs)
        return (Graph.apply(v) if torch.is_grad_enabled() else v,)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    run(tmp_path / "run", max_train_steps=2, train_batch_size=2, gradient_accumulation_steps=2)
    assert len(Graph.alive) == 2 + 2 * 2 * 3 and set(alive) == {0}


def test_gradients_are_views_of_ddps_buckets_from_the_first_step_on(tmp_path, monkeypatch):
    original, places = train.add_gradients, []

    def add_gradients(terms, num_terms, ddp, *rest, **options):
        pointers = lambda: [x.grad.data_ptr() for x in ddp.parameters()]  # noqa: E731
        assert all(not x.grad.any() for x in ddp.parameters())
        places.append(pointers())
        original(terms, num_terms, ddp, *rest, **options)
        places.append(pointers())

    monkeypatch.setattr(train, "add_gradients", add_gradients)
    run(tmp_path / "run", max_train_steps=2, train_batch_size=2)
    assert len(places) == 4 and all(x == places[0] for x in places)


def test_every_pair_is_seen_once_an_epoch_and_ranks_share_none():
    flags = TRAIN | {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 7}
    args, rows, world_size = train.Args(output_dir=Path("x"), **flags), 45, 2
    per_rank = [list(train.batch_keys(rows, args, rank, world_size, 0)) for rank in range(world_size)]
    assert [len(batches) for batches in per_rank] == [21, 21]
    epochs = []
    for epoch in (0, 1):  # 3 global batches of 12 an epoch, 9 rows left over
        keys = [key for batches in per_rank for batch in batches[9 * epoch : 9 * epoch + 9] for key in batch]
        seen = [row for row, _, _ in keys]
        assert len(seen) == len(set(seen)) == 36 and set(seen) <= set(range(rows))
        assert {key[1:] for key in keys} == {(3 * epoch + s, i) for s in (1, 2, 3) for i in range(12)}
        epochs.append(seen)
    assert set(epochs[0]) != set(epochs[1])
    whole = dataclasses.replace(args, train_batch_size=12, gradient_accumulation_steps=1)
    (first, *_) = train.batch_keys(rows, whole, 0, 1, 0)
    assert sorted(first) == sorted(key for batches in per_rank for batch in batches[:3] for key in batch)
    late = [list(train.batch_keys(rows, args, rank, world_size, 5)) for rank in range(world_size)]
    assert late == [batches[15:] for batches in per_rank]


def test_noise_of_latents_and_of_the_vae_is_a_function_of_seed_and_step(tmp_path, monkeypatch):
    seen, draw, encode = [], train.draw, train.encode_images
    monkeypatch.setattr(train, "draw", lambda *args: seen.append(draw(*args)) or seen[-1])
    monkeypatch.setattr(train, "encode_images", lambda *args: seen.append(args[2]) or encode(*args))
    run(tmp_path / "run", train_batch_size=2, max_train_steps=2)
    run(tmp_path / "run", train_batch_size=2, max_train_steps=3)
    assert len(seen) == 6
    for step in (1, 2, 3):
        generator = sd3.seeded(42, "step", step)
        expected = draw((2, 16, 8, 8), SoarConfig(num_rollout_paths=2, num_aux_points=1), generator)
        assert all(torch.equal(a, b) for a, b in zip(seen[2 * step - 2][:4], expected[:4], strict=True))
        assert torch.equal(seen[2 * step - 1], torch.randn(2, 16, 8, 8, generator=generator))
    assert len({x.numpy().tobytes() for draws, noise in zip(seen[::2], seen[1::2]) for x in (*draws[:4], noise)}) == 15


def test_ranks_draw_different_noise_and_together_the_global_batchs():
    config = SoarConfig(num_rollout_paths=2, shared_noise=False)
    draws = train.draw((4, 3, 2, 2), config, sd3.seeded(1, "step", 1))
    cpu = torch.device("cpu")
    first, second = (train.take(draws, slice(i, i + 2), cpu) for i in (0, 2))
    for axis, whole, a, b in zip((0, 0, 2, 1, 1), draws, first, second, strict=True):
        assert torch.equal(torch.cat([a, b], axis), whole) and not torch.equal(a, b)


def test_every_flag_is_read():
    trees = (ast.parse(inspect.getsource(code)) for code in (train, trainable, Pairs))
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value) in ("args", "self", "self.args")}
    names = {field.name for field in dataclasses.fields(train.Args)} - {f.name for f in dataclasses.fields(SoarConfig)}
    assert names - read == set()


def config(args: train.Args) -> SoarConfig:
    return SoarConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SoarConfig)})


def test_published_flags_are_aliases():
    words = "--dataset d --output_dir o --trajectory_length 3 --cfg_scale_sampling 2.5 --sde_rollout_type cps"
    args = tyro.cli(train.Args, args=words.split(), use_underscores=True)
    assert config(args) == SoarConfig(num_aux_points=3, guidance_scale=2.5, sde_type="cps")
    defaults = tyro.cli(train.Args, args=["--dataset", "d", "--output_dir", "o"], use_underscores=True)
    assert config(defaults) == SoarConfig()
    published = {"train_batch_size": 4, "max_train_steps": 5000, "learning_rate": 2e-5, "adam_weight_decay": 1e-2}
    published |= {"max_grad_norm": 1.0, "mixed_precision": "bf16", "max_sequence_length": 77, "seed": 42}
    assert {name: getattr(defaults, name) for name in published} == published


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"lambda_aux": -1.0}, "lambda_aux is -1.0"),
        ({"lora_rank": 0}, "--lora_rank is 0, expected more than 0"),
        ({"max_train_steps": 0}, "--max_train_steps is 0, expected more than 0"),
        ({"lr_warmup_steps": 5}, "--lr_warmup_steps is not read by --lr_scheduler constant"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16: small gradients would vanish in it; use bf16, or no"),
        ({"mixed_precision": "fp32"}, "--mixed_precision is fp32, expected bf16 or no"),
        ({"cond_dropout_rate": 1.5}, "--cond_dropout_rate is 1.5, expected 0 to 1"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        train.Args(dataset="d", output_dir=Path("o"), **bad)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            {"caption_column": "caption"},
            r"--caption_column caption: .* has the columns \['image', 'text', 'aesthetic'\]",
        ),
        ({"image_column": "aesthetic"}, "--image_column aesthetic of .* holds no images"),
        ({"image_column": "text"}, "--image_column and --caption_column are both text"),
        ({"resolution": 60}, "--resolution is 60, expected a multiple of 8 pixels"),
        ({"shift": 1.0}, "--shift is 1.0, but the pipeline samples with shift 3.0"),
        ({"train_batch_size": 4000}, "has 2000 pairs, a global batch takes 4000"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train.main(train.Args(output_dir=tmp_path / "run", **(TRAIN | bad)))
    assert not (tmp_path / "run").exists()


# --- Faults ---


def at_step(monkeypatch, step: int, action, and_later: bool = False) -> None:
    """action(latents) -> latents when this step's images are encoded, one forward a step."""
    original, calls = train.encode_images, []

    def encode_images(*args):
        calls.append(1)
        z0 = original(*args)
        return action(z0) if len(calls) == step or (and_later and len(calls) > step) else z0

    monkeypatch.setattr(train, "encode_images", encode_images)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_ends_the_run_after_the_step_with_a_checkpoint_to_go_on_from(
    tmp_path, monkeypatch, capsys, number, runs
):
    before = signal.getsignal(number)
    original = train.save_checkpoint

    def save(*args):
        os.kill(os.getpid(), number)  # a second one, while it saves
        original(*args)

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda z0: os.kill(os.getpid(), number) or z0)
        patch.setattr(train, "save_checkpoint", save)
        run(tmp_path / "run", train_batch_size=4, max_train_steps=5)
    assert signal.getsignal(number) == before
    said = f"stopped by {number.name} after step 2; the same command goes on from {tmp_path}/run/checkpoint-000002"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "run" / "final").exists()
    run(tmp_path / "run", train_batch_size=4, max_train_steps=5)
    assert lines(tmp_path / "run") == lines(runs / "1x4")
    weights, reference = (load_file(folder / "final" / WEIGHTS) for folder in (tmp_path / "run", runs / "1x4"))
    assert all(torch.equal(weights[key], reference[key]) for key in reference)


def test_signal_to_one_rank_stops_all_with_exit_code_0(tmp_path):
    flags = TRAIN | SHORT | {"max_train_steps": 500, "train_batch_size": 2, "checkpointing_steps": 500}
    process, metrics = start(2, "train.py", output_dir=tmp_path / "run", **flags), tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(found) == 2
    os.kill(int(found[1]), signal.SIGUSR1)
    done = finish(process)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = train.checkpoints(tmp_path / "run")
    assert f"stopped by SIGUSR1 after step {int(checkpoint.name[-6:])}; the same command" in done.stdout
    assert len(lines(tmp_path / "run")) == int(checkpoint.name[-6:]) < 500


def test_rank_that_raises_ends_all_with_its_message_and_torchrun_restarts_from_the_last_checkpoint(tmp_path, runs):
    flags = TRAIN | SHORT | {"max_train_steps": 3, "checkpointing_steps": 2, "train_batch_size": 2}
    words, flags = [], flags | {"output_dir": tmp_path / "run"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    script = str(ROOT / "experiments" / "tests" / "crash_once.py")
    launcher = ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    done = launch(1, "-m", "torch.distributed.run", *launcher, script, str(tmp_path / "mark"), "1", "3", *words)
    assert done.returncode == 0 and (tmp_path / "mark").exists(), done.stderr[-3000:]
    assert "RuntimeError: rank 1 cannot go on" in done.stderr
    assert "3, 2 done" in done.stdout  # of the second start
    assert lines(tmp_path / "run") == lines(runs / "2x2")


def test_two_nodes_train_as_one(tmp_path, runs):
    flags = TRAIN | SHORT | {"max_train_steps": 3, "checkpointing_steps": 2, "train_batch_size": 2}
    words = [str(word) for name, value in (flags | {"output_dir": tmp_path}).items() for word in (f"--{name}", value)]
    nodes = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint localhost:29512 --rdzv_id two".split()
    both = [start(1, "-m", "torch.distributed.run", *nodes, "train.py", *words) for _ in range(2)]
    for done in [finish(process) for process in both]:
        assert done.returncode == 0, done.stderr[-3000:]
    assert lines(tmp_path) == lines(runs / "2x2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), train.SafetensorError("I/O error")])
def test_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_whole(tmp_path, monkeypatch, error):
    original, calls = train.save_file, []

    def save_file(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        original(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="checkpoint-000002 could not be written: .*make room"),
    ):
        patch.setattr(train, "save_file", save_file)
        run(tmp_path / "run", max_train_steps=3, checkpointing_steps=1)
    assert [x.name for x in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-000001"]
    run(tmp_path / "run", max_train_steps=3, checkpointing_steps=1)
    assert len(train.checkpoints(tmp_path / "run")) == 3


def test_output_dir_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1e6))
    with pytest.raises(OSError, match="0.00 GB are free, fewer than a checkpoint takes"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, "gradient"])
def test_step_that_is_not_finite_updates_nothing_and_is_named_with_its_sigma_and_rows(tmp_path, monkeypatch, value):
    flags = {"train_batch_size": 4, "checkpointing_steps": 2, "logging_steps": 5, "max_train_steps": 20}
    if value == "gradient":
        clip, calls = torch.nn.utils.clip_grad_norm_, []

        def overflow(parameters, norm):
            parameters = list(parameters)
            calls.append(1)
            parameters[7].grad.flatten()[0] *= math.inf if len(calls) == 4 else 1
            return clip(parameters, norm)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    else:
        one_of_four = torch.arange(4)[:, None, None, None] == 2
        at_step(monkeypatch, 4, lambda z0: torch.where(one_of_four, value, z0), and_later=True)
    updates, original = [], torch.optim.AdamW.step

    def counting(optimizer):
        weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        original(optimizer)
        after = [p for group in optimizer.param_groups for p in group["params"]]
        updates.append(not all(torch.equal(a, b) for a, b in zip(weights, after)))

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path / "run", **flags)
    assert updates == [True, True, True, False]
    rows = train.step_rows(2000, 4, 42, 4)
    t = train.draw((4, 16, 8, 8), SoarConfig(num_rollout_paths=2, num_aux_points=1), sd3.seeded(42, "step", 4)).t
    sigma = train.sigma_from_t(t, 3.0)
    assert "of step 4 is not finite" in str(caught.value) and str(rows) in str(caught.value)
    assert f"sigma: {sigma.min():.4f} to {sigma.max():.4f}" in str(caught.value)
    assert [x.name for x in train.checkpoints(tmp_path / "run")] == ["checkpoint-000002"]


@pytest.mark.parametrize("sharded", [False, True])
def test_step_that_is_not_finite_is_found_at_the_next_line_and_changes_nothing_until_then(
    tmp_path, monkeypatch, sharded
):
    at_step(monkeypatch, 2, lambda z0: z0 * math.nan, and_later=True)
    updates, original = [], torch.optim.AdamW.step

    def counting(optimizer):
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        original(optimizer)
        updates.append(not torch.equal(before, optimizer.param_groups[0]["params"][0]))

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)
    with pytest.raises(FloatingPointError, match="of step 2 is not finite"):
        run(tmp_path / "run", logging_steps=4, max_train_steps=20, shard_optimizer=sharded)
    assert updates == [True, False, False, False] and train.checkpoints(tmp_path / "run") == []


# --- Data ---


def check(folder: Path, message: str | None = None, **flags) -> Pairs:
    args = train.Args(output_dir=Path("o"), **(TRAIN | {"dataset": str(folder)} | flags))
    if message is None:
        return Pairs(args)
    with pytest.raises(ValueError, match=message):
        Pairs(args)
    return Pairs(dataclasses.replace(args, on_bad_row="skip"))


def damage(folder: Path, i: int, fault: str) -> None:
    path = folder / f"{i}.png"
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "zero bytes":
        path.write_bytes(b"")
    elif fault == "directory":
        path.mkdir()
    elif fault == "bomb":
        Image.new("1", (14000, 7000)).save(path)
    elif fault == "outside":
        (folder.parent / "elsewhere.png").write_bytes(data)
        path.symlink_to(folder.parent / "elsewhere.png")
    elif fault == "32 bits":
        Image.fromarray(np.zeros((8, 8), np.int32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("truncated", "row 2 .2.png.: .*truncated|row 2 .2.png.: .*Truncated|row 2 .2.png.: SyntaxError"),
        ("zero bytes", "row 2 .2.png.: UnidentifiedImageError"),
        ("directory", "row 2 .2.png.: IsADirectoryError"),
        ("bomb", "row 2 .2.png.: DecompressionBombWarning: Image size .98000000 pixels"),
        ("outside", "row 2 .2.png.: ValueError: the file is .*elsewhere.png, outside .*pairs"),
        ("32 bits", "row 2 .2.png.: ValueError: its pixels have 32 bits"),
        ("missing", "row 2 .2.png.: FileNotFoundError"),
    ],
)
def test_image_that_cannot_be_used_is_listed_and_left_out_only_when_told_so(tmp_path, fault, message):
    folder = write_pairs(tmp_path / "pairs")
    rows = "".join(f'{{"image": "{i}.png", "text": "picture {i}"}}\n' for i in range(8))
    (folder / "rows.jsonl").write_text(rows)
    damage(folder, 2, fault)
    pairs = check(folder / "rows.jsonl", f"1 of 8 rows of .*pairs/rows.jsonl cannot be used:\n  {message}")
    assert len(pairs) == 7 and pairs.numbers == [0, 1, 3, 4, 5, 6, 7]
    assert "1 that cannot be used" in pairs.report and "row 2 (2.png)" in pairs.report


@pytest.mark.parametrize(
    "caption, message",
    [
        ("null", "row 2 .2.png.: ValueError: its text is None, expected a text"),
        ('""', "row 2 .2.png.: ValueError: its text is '', expected a text"),
        ('" \\\\t"', "row 2 .2.png.: ValueError: its text is ' .*', expected a text"),
        (
            json.dumps("long " * 20000),
            "row 2 .2.png.: ValueError: its text has 100000 characters, expected at most 10000",
        ),
    ],
)
def test_caption_that_cannot_be_used_is_listed_with_its_row(tmp_path, caption, message):
    folder = write_pairs(tmp_path / "pairs")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace('"picture 2"', caption.replace("\\\\t", "\\t")))
    assert len(check(folder, f"1 of 8 rows of .*pairs cannot be used:\n  {message}")) == 7


def test_captions_that_are_numbers_are_all_listed_up_to_twenty(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 30)
    args = train.Args(output_dir=Path("o"), **(TRAIN | {"dataset": str(folder), "caption_column": "score"}))
    with pytest.raises(ValueError, match="30 of 30 rows of .* cannot be used") as caught:
        Pairs(args)
    assert str(caught.value).count("\n  row ") == 20 and "its score is 9.5, expected a text\n  ...\nMend them" in str(
        caught.value
    )


def save_exif(path):
    image = Image.fromarray(np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[:, None], 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.convert("RGB").save(path, format="PNG", exif=exif)


WHITE, HALF = (255, 255, 255), (255, 127, 127)


@pytest.mark.parametrize(
    "name, image, expected",
    [
        ("RGBA", Image.new("RGBA", (8, 8), (255, 0, 0, 128)), HALF),
        ("LA", Image.new("LA", (8, 8), (0, 0)), WHITE),
        ("L", Image.new("L", (8, 8), 77), (77, 77, 77)),
        ("P", Image.new("P", (8, 8), 0), (0, 0, 0)),
        ("CMYK", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
        ("1", Image.new("1", (8, 8), 1), WHITE),
        ("I;16", Image.fromarray(np.full((8, 8), 40000, np.uint16)), (156, 156, 156)),
    ],
)
def test_image_of_any_mode_becomes_rgb_on_white(tmp_path, name, image, expected):
    if name == "P":
        image.info["transparency"] = 0
        expected = WHITE
    image.save(tmp_path / "x", format="TIFF" if name in ("CMYK", "I;16") else "PNG", **(
        {"transparency": 0} if name == "P" else {}))  # fmt: skip
    rgb = read_image({"bytes": None, "path": str(tmp_path / "x")}, None)
    assert rgb.mode == "RGB" and rgb.size == (8, 8)
    assert np.abs(np.asarray(rgb).astype(int) - expected).max() <= 1


def test_image_is_turned_as_its_exif_says(tmp_path):
    save_exif(tmp_path / "x")
    rgb = np.asarray(read_image({"bytes": (tmp_path / "x").read_bytes(), "path": None}, None))
    assert rgb.shape == (16, 8, 3) and (rgb[0, :, 0] == np.arange(210, -1, -30)).all()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "webdataset"])
def test_other_kinds_of_data_give_the_pairs_of_the_imagefolder(tmp_path, kind):
    folder = write_pairs(tmp_path / "pairs")
    reference, flags = check(folder), {}
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        datasets.load_dataset(str(folder), split="train").to_parquet(path)
    elif kind == "webdataset":
        path, flags = tmp_path / "rows.tar", {"image_column": "png", "caption_column": "txt"}
        with tarfile.open(path, "w") as tar:
            for i in range(8):
                (tmp_path / f"{i}.txt").write_text(f"picture {i}")
                tar.add(folder / f"{i}.png", f"{i}.png")
                tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    else:
        path = folder / f"rows.{kind}"
        rows = [{"image": f"{i}.png", "text": f"picture {i}"} for i in range(8)]
        csv = "image,text\n" + "".join(f"{row['image']},{row['text']}\n" for row in rows)
        path.write_text(csv if kind == "csv" else "".join(json.dumps(row) + "\n" for row in rows))
    pairs = check(path, **flags)
    assert len(pairs) == 8 and pairs.digest == reference.digest
    for i in range(8):
        (a, text_a), (b, text_b) = pairs[i, 1, 0], reference[i, 1, 0]
        assert torch.equal(a, b) and text_a == text_b == f"picture {i}"


def test_rows_are_kept_by_numbers_of_their_columns(tmp_path):
    folder = write_pairs(tmp_path / "pairs")
    pairs = check(folder, min=("score=1.5",))
    assert pairs.numbers == [3, 4, 5, 6, 7] and "5 of 8: 3 left out by --min" in pairs.report
    assert pairs[0, 1, 0][1] == "picture 3" and pairs.digest != check(folder).digest
    for bad, message in (("size=3", "--min size: .* has the columns"), ("text=3", "--min text: .* holds no numbers")):
        with pytest.raises(ValueError, match=message):
            check(folder, min=(bad,))
    for bad in ("score", "score=high", "a=b=c"):
        with pytest.raises(ValueError, match=f"--min is {bad}, expected COLUMN=NUMBER"):
            train.Args(dataset="d", output_dir=Path("o"), min=(bad,))
    words = "--dataset d --output_dir o --min aesthetic=6.8 --min clipscore=0.40".split()
    assert tyro.cli(train.Args, args=words, use_underscores=True).minima() == {"aesthetic": 6.8, "clipscore": 0.4}


def test_rows_are_checked_once_and_again_when_a_file_changes(tmp_path, capfd):
    folder = write_pairs(tmp_path / "pairs")
    check(folder)
    assert "checking rows" in capfd.readouterr().err
    check(folder)
    assert "checking rows" not in capfd.readouterr().err
    time.sleep(0.01)
    (folder / "3.png").write_bytes(b"")
    check(folder, "1 of 8 rows .*\n  row 3 .3.png.: UnidentifiedImageError")


def test_crops_flips_and_dropped_captions_are_functions_of_seed_step_and_sample(tmp_path):
    folder = write_pairs(tmp_path / "pairs")
    plain, moved = check(folder), check(folder, crop="random", random_flip=True, cond_dropout_rate=0.5)
    keys = [(0, step, i) for step in range(1, 9) for i in range(8)]
    images = [moved[key][0] for key in keys]
    assert all(torch.equal(image, moved[key][0]) for image, key in zip(images, keys))
    assert len({image.numpy().tobytes() for image in images}) > 40
    assert all(torch.equal(plain[key][0], plain[0, 1, 0][0]) for key in keys)
    dropped = sum(moved[key][1] == "" for key in keys)
    assert 16 <= dropped <= 48 and {moved[key][1] for key in keys} == {"", "picture 0"}
    upright = check(folder, crop="random")
    flipped = [not torch.equal(upright[key][0], moved[key][0]) for key in keys]
    assert 16 <= sum(flipped) <= 48
    assert len({(flip, moved[key][1]) for flip, key in zip(flipped, keys)}) == 4  # one does not tell the other
    assert all(any(torch.equal(upright[key][0].flip(d), moved[key][0]) for d in (-1, ())) for key in keys)
    middle = Image.open(folder / "0.png").resize((64, 64), Image.Resampling.LANCZOS, box=(0, 16, 40, 56))
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
    assert (plain[0, 1, 0][0] - expected).abs().max() < 1e-5
    assert "8 are smaller than 64 pixels and enlarged" in plain.report


# --- What the user sees ---


def test_dry_run_checks_everything_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    run(tmp_path / "run", train_batch_size=4, num_aux_points=6, max_train_steps=9, dry_run=True, min=("aesthetic=6",))
    said = capsys.readouterr().out
    for part in (
        "3.0 M parameters", "forwards in float32", "445 of 2000: 1555 left out by --min", "13 forwards with backwards",
        "global batch 4 = 1 processes x 1 x 4", "9, 0 done; an epoch is 111", f"{tmp_path}/run", "GB a device",
    ):  # fmt: skip
        assert part in said, part
    assert not (tmp_path / "run").exists()


def test_validation_draws_before_the_first_step_with_noise_that_stays_the_same(tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a red circle\na photo of a blue square\na photo of two stars\n")
    flags = {"validation_prompts": tmp_path / "p.txt", "validation_steps": 2, "num_sampling_steps": 4}
    flags |= {"train_batch_size": 2, "learning_rate": 1e-3}
    run(tmp_path / "run", max_train_steps=3, **flags)
    grids = sorted((tmp_path / "run").glob("validation-*.png"))
    assert [path.name[-5] for path in grids] == ["0", "2", "3"]
    first, second, _ = (np.asarray(Image.open(path)).astype(int) for path in grids)
    assert first.shape == (64, 192, 3) and (first != second).any()
    sampled = {"num_images_per_prompt": 1, "height": 64, "width": 64, "num_inference_steps": 4} | MODEL
    pipe = sd3.load_pipeline(str(DATA / "model"), torch.float32, torch.device("cpu"))
    transformer = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer")
    z1 = torch.randn(1, 16, 8, 8, generator=sd3.seeded(42, "validation", 1))
    cond, uncond = (sd3.encode_prompts(pipe, [x], 12) for x in ("a photo of a blue square", ""))
    (image,) = sd3.sample_images(pipe, transformer, z1, cond, uncond, sampled["num_inference_steps"], 4.5)
    assert np.abs(np.asarray(image).astype(int) - first[:, 64:128]).max() <= 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("validation")] == [0, 2, 3]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_validation_changes_nothing_in_training(tmp_path, runs):
    (tmp_path / "p.txt").write_text("a photo of a red circle\n")
    flags = {"validation_prompts": tmp_path / "p.txt", "validation_steps": 1, "num_sampling_steps": 40}
    run(tmp_path / "run", train_batch_size=4, max_train_steps=2, **flags)
    assert lines(tmp_path / "run") == lines(runs / "1x4")[:2]


def test_metrics_are_means_over_steps_terms_and_quarters_of_sigma():
    sums, ones = torch.zeros(5, 4, dtype=torch.float64), torch.ones(())
    train.add_term(sums, Term(ones, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.3, 1.0])), auxiliary=False)
    train.add_term(sums, Term(2 * ones, torch.tensor([8.0, 0.0, 4.0]), torch.tensor([0.8, 0.3, 0.75])), auxiliary=True)
    sums[4, 1], sums[4, 2] = 5, 2
    assert train.means(sums.tolist()) == {
        "loss": 1.5, "base": pytest.approx(7 / 3), "base_sigma_1": 1, "base_sigma_2": 2, "base_sigma_4": 4,
        "aux": 6, "aux_sigma_4": 6, "grad_norm": 2.5,
    }  # fmt: skip


def test_lines_are_means_over_the_steps_since_the_last(tmp_path, runs):
    run(tmp_path / "run", train_batch_size=4, max_train_steps=5, logging_steps=2)
    every = lines(runs / "1x4")
    for line, pair in zip(lines(tmp_path / "run"), (every[0:2], every[2:4]), strict=True):
        for key in ("loss", "base", "aux", "grad_norm"):
            assert line[key] == pytest.approx((pair[0][key] + pair[1][key]) / 2), key


def test_end_of_a_run_names_the_checkpoint_and_the_command_that_shows_it(tmp_path, capsys):
    run(tmp_path / "run", max_train_steps=1)
    captured = capsys.readouterr()
    for name in ("1/1", "loss=", "base=", "aux=", "grad_norm=", "images_per_second="):
        assert name in captured.err, name
    said = captured.out.splitlines()[-2:]
    assert said[0] == f"{tmp_path}/run/checkpoint-000001 is complete; to see it:"
    assert said[1].startswith(f"python sample.py --transformer {tmp_path}/run/final --prompts FILE --output_dir")
