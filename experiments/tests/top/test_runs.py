"""What runs of train.py save, where they start, and what faults and signals do to them."""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import sample
import train
from experiments.shapes.draw import DATA
from experiments.tests.common import DATASET, MODEL, fork, free_port, launch, train_args
from experiments.tests.top.sampling import CPU, edit_json, edit_weights, scale_first, write
from experiments.tests.top.training import (
    SHORT,
    SOAR,
    THREE,
    WEIGHTS,
    all_lines,
    copy_base,
    ends,
    equal,
    held_out_lines,
    last,
    lines,
    refused,
    run,
    same_weights,
)
from sample import visible

# --- What is saved ---


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickle_is_never_read(tmp_path, part):
    (file,) = (copy_base(tmp_path / "model") / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    flags = {"pretrained_model_name_or_path": tmp_path / "model", "max_train_steps": 1}
    refused(tmp_path / "run", "safetensors", kind=OSError, **flags)
    assert not visible(tmp_path / "run")


def test_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync = [], train.sync
    path, staging = (tmp_path / "run" / f"{x}checkpoint-000001" for x in ("", "."))

    def syncing(written):
        events.append((written, path.exists()))
        sync(written)

    monkeypatch.setattr(train, "sync", syncing)
    run(tmp_path / "run", max_train_steps=1)
    *content, whole, parent = events
    names = ("transformer", "transformer/config.json", WEIGHTS)
    names += ("optimizer.safetensors", "trainer_state.json")
    assert set(content) == {(staging / name, False) for name in names}
    assert whole == (staging, False) and parent == (tmp_path / "run", True)


def test_only_the_newest_checkpoints_are_kept_where_a_limit_is_given(tmp_path, monkeypatch):
    seen, original = [], train.save_checkpoint

    def save(path, *rest):
        original(path, *rest)
        seen.append([x.name[-1] for x in train.checkpoints(path.parent)])  # before any deletion

    monkeypatch.setattr(train, "save_checkpoint", save)
    run(tmp_path / "run", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert seen == [["1"], ["1", "2"], ["1", "2", "3"], ["2", "3", "4"]]
    assert [x.name[-1] for x in train.checkpoints(tmp_path / "run")] == ["3", "4"]
    assert list((tmp_path / "run").glob(".checkpoint*")) == []


def test_run_with_other_settings_is_refused_by_their_names(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "1x4", tmp_path / "run", symlinks=True)
    bad = {"seed": 7, "lambda_aux": 0.5, "train_batch_size": 8, "sigma_upper_ratio": 2.0}
    said = ("seed was 42, is 7", "lambda_aux was 1.0, is 0.5", "global_batch was 4, is 8")
    said += ("sigma_upper_ratio was inf, is 2.0",)
    with monkeypatch.context() as patch:
        patch.setattr(train.Pairs, "check", lambda *_: pytest.fail("rows were read"))
        refused(tmp_path / "run", *said, **bad, max_train_steps=6)
    refused(tmp_path / "run", "data was ", min={"aesthetic": 6}, train_batch_size=4)
    same = {"train_batch_size": 4, "max_train_steps": 6}
    words = ("max_train_steps was None, is 6", "lr_scheduler was constant, is cosine")
    refused(tmp_path / "run", *words, lr_scheduler="cosine", **same)
    refused(tmp_path / "run", "beyond --max_train_steps 4", train_batch_size=4, max_train_steps=4)
    other = {"pretrained_model_name_or_path": copy_base(tmp_path / "model")}
    run(tmp_path / "run", **same | other)  # an equal copy elsewhere
    edit_weights(tmp_path / "model/vae", scale_first)
    refused(tmp_path / "run", "pipeline was ", **same | other)


def test_output_dir_in_other_use_is_refused(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.txt").write_text("mine")
    refused(tmp_path / "b", "not empty", "metrics.jsonl", max_train_steps=1)
    assert [x.name for x in (tmp_path / "b").iterdir()] == ["notes.txt"]


def test_what_is_no_checkpoint_by_name_and_torn_metrics_do_no_harm(tmp_path):
    flags = {"train_batch_size": 4, "checkpointing_steps": 2, "max_train_steps": 2}
    folder = tmp_path / "run"
    (folder / "lost+found").mkdir(parents=True)  # of a fresh disk
    (folder / ".DS_Store").write_text("x")
    run(folder, **flags)
    line = json.dumps({"step": 3, "loss": 0.0})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n" + "\0" * 40 + f"\n{line[:9]}")
    (folder / ".checkpoint-000004/transformer").mkdir(parents=True)
    shutil.copytree(folder / "checkpoint-000002", folder / "checkpoint-000002-good")
    run(folder, checkpoints_total_limit=1, **(flags | {"max_train_steps": 4}))
    assert [x["step"] for x in lines(folder)] == [1, 2, 3, 4] and lines(folder)[2]["loss"] > 0
    assert [x.name for x in train.checkpoints(folder)] == ["checkpoint-000004"]
    assert (folder / "checkpoint-000002-good/optimizer.safetensors").is_file()


def test_ranks_that_do_not_see_output_dir_end_the_run(tmp_path):
    def main() -> None:
        exists = Path.exists
        wait_for = train.wait_for
        train.wait_for = lambda path: wait_for(path, seconds=1)
        if os.environ["RANK"] == "1":
            Path.exists = lambda path: path.name != "metrics.jsonl" and exists(path)
        train.main(train_args(output_dir=tmp_path / "run", **SHORT | THREE))

    ended, said = ends(2, main, tmp_path / "log")
    assert ended == [1, 1]
    assert f"rank 1 has not seen {tmp_path}/run/metrics.jsonl within 1 s" in said[1]
    assert "all nodes see" in said[1]


def test_newest_checkpoint_that_any_rank_sees_holds_for_all_and_is_waited_for(tmp_path):
    flags = SHORT | THREE | {"checkpointing_steps": 1}
    run(tmp_path / "run", **flags | {"max_train_steps": 2, "train_batch_size": 4})

    def main() -> None:
        found, exists, looks = train.checkpoints, Path.exists, []

        def shows(path: Path) -> bool:
            if path.name == "checkpoint-000002":
                looks.append(path)
            return exists(path) and len(looks) != 1

        if os.environ["RANK"] == "0":  # sees the newest at the second look
            train.checkpoints = lambda path: found(path)[: len(looks)]
            Path.exists = shows
        train.main(train_args(output_dir=tmp_path / "run", **flags))
        print(f"looked {len(looks)} times")

    ended, said = ends(2, main, tmp_path / "log")
    assert ended == [0, 0] and "looked 0 times" not in said[0], said
    assert "3, 2 done" in said[0] and [x["step"] for x in lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    "other, name",
    [({"seed": 7}, "seed"), ({"max_train_steps": 9}, "max_train_steps"),
     ({"min": {"aesthetic": 6}}, "minima"), ({"pretrained_model_name_or_path": "x"}, "pipeline")],
)  # fmt: skip
def test_ranks_with_other_flags_weights_or_rows_are_refused_by_name(tmp_path, other, name):
    if "pretrained_model_name_or_path" in other:
        other = {"pretrained_model_name_or_path": copy_base(tmp_path / "model")}
        edit_weights(tmp_path / "model/vae", scale_first)

    def main() -> None:
        flags = other if os.environ["RANK"] == "1" else {}
        train.main(train_args(output_dir=tmp_path / "run", **SHORT | THREE | flags))

    ended, said = ends(2, main, tmp_path / "log")
    assert ended == [1, 1]
    for text in said:
        assert "ranks do not have the same" in text and f"{name} (here " in text, text
    assert not visible(tmp_path / "run")


def test_ranks_wait_for_one_another_before_ddp_is_made(tmp_path, monkeypatch):
    events, barrier, make_ddp = [], train.dist.barrier, train.make_ddp
    monkeypatch.setattr(train.dist, "barrier", lambda x: events.append("barrier") or barrier(x))
    monkeypatch.setattr(train, "make_ddp", lambda model: events.append("DDP") or make_ddp(model))
    run(tmp_path / "run", dry_run=True)
    assert events == ["barrier", "DDP"]


@pytest.mark.parametrize("place", ["/proc/soar", "notes.txt/run"])
def test_dry_run_refuses_an_output_dir_that_cannot_be_written(tmp_path, place):
    (tmp_path / "notes.txt").write_text("a file")
    refused(tmp_path / place, place.split("/")[-2], kind=OSError, dry_run=True)


def test_room_is_counted_by_the_checkpoints_to_come(runs, capsys):
    flags = {"train_batch_size": 4, "max_train_steps": 9, "checkpointing_steps": 2}
    run(runs / "1x4", dry_run=True, **flags)  # 5 is done: 6, 8 and 9
    assert "0.04 GB a checkpoint, 0.11 GB to come" in capsys.readouterr().out


def test_output_dir_is_locked_and_tidy_before_its_newest_checkpoint_is_chosen(
    tmp_path, monkeypatch
):
    found, newest = [], train.newest_checkpoint

    def choose(folder, cpu_group):
        found.append([path.name for path in folder.iterdir()])
        return newest(folder, cpu_group)

    monkeypatch.setattr(train, "newest_checkpoint", choose)
    (tmp_path / "run/.checkpoint-000001").mkdir(parents=True)  # takes room that is counted later
    run(tmp_path / "run", max_train_steps=1)
    assert found == [[".lock"]]


def test_dry_run_of_a_finished_run_says_so_and_changes_nothing(runs, capsys):
    before = {path: path.stat().st_mtime_ns for path in (runs / "1x4").rglob("*")}
    run(runs / "1x4", train_batch_size=4, max_train_steps=5, dry_run=True)
    said = capsys.readouterr().out
    assert "5, 5 done" in said and "0.00 GB to come" in said
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "1x4").rglob("*")}


def test_output_dir_without_room_for_all_checkpoints_is_refused(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10, 9, 80e6)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
    flags = {"max_train_steps": 3, "checkpointing_steps": 1, "dry_run": True}
    words = ("no room for 0.11 GB", "--checkpoints_total_limit")
    refused(tmp_path / "run", *words, kind=OSError, **flags)
    run(tmp_path / "run", checkpoints_total_limit=1, **flags)  # two, as the new one comes first
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), train.SafetensorError("I/O")])
def test_checkpoint_that_cannot_be_written_leaves_earlier_ones_whole(tmp_path, monkeypatch, error):
    original, calls = train.save_file, []

    def save_file(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        original(*args)

    flags = {"max_train_steps": 3, "checkpointing_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", save_file)
        refused(tmp_path / "run", "checkpoint-000002", "make room", kind=OSError, **flags)
    assert [x.name for x in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-000001"]
    run(tmp_path / "run", **flags)
    assert len(train.checkpoints(tmp_path / "run")) == 3
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]  # the first 2 is gone


# --- Where a run starts ---


def started(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The trained weights of each run to come, as it starts."""
    seen, original = [], train.make_ddp

    def make_ddp(model):
        seen.append({name: x.detach().clone() for name, x in train.trained(model).items()})
        return original(model)

    monkeypatch.setattr(train, "make_ddp", make_ddp)
    return seen


def test_soar_starts_from_the_weights_of_sft(runs, tmp_path, monkeypatch):
    seen = started(monkeypatch)
    for given in (runs / "1x4/checkpoint-000003", runs / "1x4/checkpoint-000003/transformer"):
        run(tmp_path / given.name, transformer=given, dry_run=True)
        expected = load_file(runs / "1x4/checkpoint-000003" / WEIGHTS)
        found = seen.pop()
        assert found and all(torch.equal(x, expected[key]) for key, x in found.items())
    run(tmp_path / "on", transformer=runs / "1x4/checkpoint-000003", max_train_steps=1)
    other = {"transformer": last(runs / "1x4"), "max_train_steps": 2}
    refused(tmp_path / "on", "transformer was ", **other)
    shutil.copytree(runs / "1x4/checkpoint-000003/transformer", tmp_path / "copy")
    run(tmp_path / "on", transformer=tmp_path / "copy", max_train_steps=2)
    refused(tmp_path / "x", "--transformer nowhere", "none", transformer="nowhere")
    refused(tmp_path / "x", "LoRA", transformer=last(runs / "1x4"), lora_rank=4)
    edit_json(tmp_path / "copy/config.json", in_channels=4)
    refused(tmp_path / "x", "in_channels is 4, that of", transformer=tmp_path / "copy")


def test_lora_file_that_says_inference_mode_is_trained(lora, tmp_path):
    settings = {"r": 4, "lora_alpha": 4, "target_modules": train.LORA_MODULES}
    settings = {f"transformer.{x}": y for x, y in (settings | {"inference_mode": True}).items()}
    tensors = load_file(last(lora / "whole") / sample.LORA)
    file = write(tensors, tmp_path / "lora.safetensors", json.dumps(settings))
    flags = {"transformer": file, "lora_rank": 4, "learning_rate": 1e-2}
    run(tmp_path / "run", max_train_steps=1, **flags)
    after = load_file(last(tmp_path / "run") / sample.LORA)
    assert any(not torch.equal(x, tensors[name]) for name, x in after.items())


def test_lora_goes_on_over_the_base_that_it_began_with(lora, tmp_path):
    copy_base(tmp_path / "model")
    flags = {"pretrained_model_name_or_path": tmp_path / "model", "lora_rank": 4}
    flags |= {"transformer": last(lora / "whole")}
    run(tmp_path / "on", max_train_steps=1, **flags)
    edit_weights(tmp_path / "model/transformer", scale_first)
    refused(tmp_path / "on", "base_transformer was ", max_train_steps=2, **flags)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Two steps of LoRA over bf16 weights, in one run and in two."""
    folder = tmp_path_factory.mktemp("lora")
    flags = {"lora_rank": 4, "learning_rate": 1e-2, "mixed_precision": "bf16"}
    run(folder / "whole", max_train_steps=2, gradient_checkpointing=True, **flags)
    for steps in (1, 2):
        run(folder / "parts", max_train_steps=steps, **flags)
    return folder


def test_lora_run_goes_on_bit_by_bit_and_writes_what_sample_reads(lora):
    names = ["optimizer.safetensors", sample.LORA, "trainer_state.json"]
    assert sorted(path.name for path in last(lora / "whole").iterdir()) == names
    assert lines(lora / "parts") == lines(lora / "whole")
    for name in names[:2]:
        assert equal(last(lora / "parts") / name, last(lora / "whole") / name)
    found = load_file(last(lora / "whole") / sample.LORA)
    moments = load_file(last(lora / "whole") / "optimizer.safetensors")
    assert len(found) == 2 * (5 * 8 + 4 - 1)  # 5 blocks, 1 of them dual, the last has no add_out
    assert all(4 in x.shape for x in found.values())
    assert len(moments) == 3 * len(found) and all(".lora_" in key for key in moments)
    unused = ".4.attn.add_q"  # the last block drops what its text queries give
    grown = [x.abs().max() for key, x in found.items() if "lora_B" in key and unused not in key]
    assert min(grown) > 1e-3
    weights, state = sample.find_weights(str(last(lora / "whole")))
    assert weights.name == sample.LORA and state["settings"]["lora_rank"] == 4


def test_lora_file_goes_on_with_its_matrices_and_others_are_refused(lora, tmp_path, monkeypatch):
    file = last(lora / "whole") / sample.LORA
    seen = started(monkeypatch)
    run(tmp_path / "a", lora_rank=4, transformer=file, dry_run=True)
    found, trained = load_file(file), seen.pop()
    assert len(trained) == len(found)
    for name, x in trained.items():
        key = "transformer." + name.replace(".default", "")
        assert torch.equal(x, found[key]) and x.dtype == torch.float32
    refused(tmp_path / "a", "not --lora_rank 8", lora_rank=8, transformer=file)
    settings = {"r": 4, "lora_alpha": 2, "target_modules": train.LORA_MODULES}
    settings = json.dumps({f"transformer.{key}": x for key, x in settings.items()})
    other = write(found, tmp_path / "alpha.safetensors", settings)
    refused(tmp_path / "a", "alpha", lora_rank=4, transformer=other)
    run(tmp_path / "b", transformer=file, dry_run=True)  # all weights, the matrices merged
    merged = sample.load_transformer(str(DATA / "model"), file, torch.float32, CPU).state_dict()
    assert all(torch.equal(x, merged[key]) for key, x in seen.pop().items())


def test_lora_of_bf16_weights_trains_float32_matrices(lora):
    training = train_args(output_dir="o", lora_rank=4, mixed_precision="bf16").training
    for weights in (None, last(lora / "whole") / sample.LORA):
        model = train.load_trainable(str(DATA / "model"), weights, training, CPU)
        kinds = {(x.requires_grad, x.dtype) for x in model.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    other = {"lora_rank": 8, "learning_rate": 1e-2, "mixed_precision": "bf16"}
    refused(lora / "parts", "lora_rank was 4, is 8", max_train_steps=2, **other)


def test_text_encoders_stay_on_their_device_and_embeddings_move():
    meta = torch.device("meta")
    pipe = sample.load_pipeline(str(DATA / "model"), torch.float32, meta, CPU)
    assert pipe.vae.device == meta
    assert pipe.text_encoder.device == pipe.text_encoder_3.device == CPU
    made = sample.encode_prompts(pipe, ["a circle"], 12)
    assert {x.device for x in made.values()} == {meta}


# --- Faults ---


def at_step(monkeypatch, step: int, action) -> None:
    """action(latents) -> latents when this step's images are encoded, one forward a step."""
    original, calls = train.encode_images, []

    def encode_images(*args):
        calls.append(1)
        z0 = original(*args)
        return action(z0) if len(calls) == step else z0

    monkeypatch.setattr(train, "encode_images", encode_images)


@pytest.mark.parametrize("number", train.SIGNALS)
def test_signal_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch, capsys, number, runs, held_out):
    original = train.save_checkpoint

    def save(*args):
        os.kill(os.getpid(), number)  # a second one, while it saves
        original(*args)

    flags = {"train_batch_size": 4, "max_train_steps": 5, "validation_steps": 3}
    flags["held_out"] = held_out
    with monkeypatch.context() as patch:
        # Step 3, as two batches are held out before; then the run stops before it measures again.
        at_step(patch, 2 + 3, lambda z0: os.kill(os.getpid(), number) or z0)
        patch.setattr(train, "save_checkpoint", save)
        run(tmp_path / "run", **flags)
    assert f"step 3 of 5 is saved; stopped by {number.name}" in capsys.readouterr().out
    assert last(tmp_path / "run").name == "checkpoint-000003"
    assert [line["step"] for line in held_out_lines(tmp_path / "run")] == [0]
    run(tmp_path / "run", **flags)
    assert all_lines(tmp_path / "run") == all_lines(runs / "1x4")
    assert same_weights(last(tmp_path / "run"), last(runs / "1x4"))


@contextlib.contextmanager
def long_run(folder: Path, count: int, **flags) -> Iterator[list[Process]]:
    """The ranks of a run that has made two steps and would make many more; log.r beside folder has
    what rank r prints. None of them outlives this."""
    flags = SHORT | {"train_batch_size": 2, "max_train_steps": 5000} | flags
    args = train_args(output_dir=folder, **flags)
    log, metrics = folder.with_name("log"), folder / "metrics.jsonl"
    ranks = fork(count, lambda: train.main(args), log)
    try:
        while not (metrics.is_file() and metrics.read_text().count("\n") > 1):
            assert all(rank.is_alive() for rank in ranks), log.with_suffix(".0").read_text()
            time.sleep(0.02)
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def children(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_signal_to_one_rank_stops_all_and_a_second_run_is_refused_meanwhile(tmp_path):
    with long_run(tmp_path / "run", 2) as ranks:
        other = {"train_batch_size": 4, "max_train_steps": 5000}
        words = ("in use", f"process {ranks[0].pid} ")
        refused(tmp_path / "run", *words, kind=RuntimeError, **other)
        os.kill(ranks[1].pid, signal.SIGUSR1)
        for rank in ranks:
            rank.join(60)
        said = (tmp_path / "log.0").read_text()
        assert [rank.exitcode for rank in ranks] == [0, 0], said
    (checkpoint,) = train.checkpoints(tmp_path / "run")
    step = int(checkpoint.name[-6:])
    assert f"step {step} of 5000 is saved; stopped by SIGUSR1" in said
    assert len(lines(tmp_path / "run")) == step < 5000
    assert "stopped" not in (tmp_path / "log.1").read_text()


def test_kill_9_costs_at_most_an_interval_and_the_run_is_one_process(tmp_path):
    folder = tmp_path / "run"
    with long_run(folder, 1, checkpointing_steps=1, checkpoints_total_limit=1) as (rank,):
        assert children(rank) == []
        rank.kill()
        rank.join()
        with train.locked(folder):  # is free at once
            pass
    (whole,) = train.checkpoints(folder)
    step = int(whole.name[-6:])
    assert step >= len(lines(folder)) - 1
    load_file(whole / WEIGHTS), load_file(whole / "optimizer.safetensors")
    run(folder, max_train_steps=step + 1, train_batch_size=2)
    assert [line["step"] for line in lines(folder)] == list(range(1, step + 2))
    assert not list(folder.glob(".checkpoint*"))


def test_rank_whose_peer_is_killed_ends(tmp_path):
    with long_run(tmp_path / "run", 2) as (first, second):
        second.kill()
        first.join(60)
        assert first.exitcode == 1


def test_error_in_the_loop_ends_the_process(tmp_path):
    flags = MODEL | DATASET | {"output_dir": tmp_path / "run", "learning_rate": 1e30}
    done = launch("train.py", **flags)
    assert done.returncode == 1 and "step 2 is not finite" in done.stderr


def launchers(count: int, action: Callable[[], None], folder: Path, **settings) -> list[Process]:
    """torchrun's launchers, one for each node, forked from this process, which fork ranks that call
    action. What they print goes to 0.0, 1.0, ... in folder."""
    name = f"localhost:{free_port()}"
    config = LaunchConfig(
        count, count, run_id=name, rdzv_backend="c10d", rdzv_endpoint=name, start_method="fork",
        **settings,
    )  # fmt: skip
    found = []
    for i in range(count):
        found += fork(1, lambda: elastic_launch(config, record(action))(), folder / str(i))
    for launcher in found:
        launcher.join(100)
        if launcher.is_alive():
            for process in (*children(launcher), launcher):
                process.kill()
            launcher.join()
    return found


def test_two_nodes_train_as_one(tmp_path, runs):
    args = train_args(output_dir=tmp_path / "run", **SHORT | THREE)
    both = launchers(2, lambda: train.main(args), tmp_path, nproc_per_node=1)
    assert [launcher.exitcode for launcher in both] == [0, 0], (tmp_path / "0.0").read_text()
    assert lines(tmp_path / "run") == lines(runs / "2x2")


def test_rank_that_raises_ends_all_and_torchrun_restarts_from_the_last_checkpoint(tmp_path, runs):
    args = train_args(output_dir=tmp_path / "run", **SHORT | THREE)
    original, calls, mark = train.encode_images, [], tmp_path / "mark"

    def encode_images(*images):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            raise RuntimeError("rank 1 cannot go on")
        return original(*images)

    def train_main() -> None:
        train.encode_images = encode_images  # in a fork
        train.main(args)

    (launcher,) = launchers(1, train_main, tmp_path, nproc_per_node=2, max_restarts=0)
    said = (tmp_path / "0.0").read_text()
    assert launcher.exitcode == 1 and "RuntimeError: rank 1 cannot go on" in said
    assert [x.name[-1] for x in train.checkpoints(tmp_path / "run")] == ["2"]
    shutil.rmtree(tmp_path / "run")
    mark.unlink()
    (launcher,) = launchers(1, train_main, tmp_path, nproc_per_node=2, max_restarts=1)
    said = (tmp_path / "0.0").read_text()
    assert launcher.exitcode == 0 and mark.exists(), said
    assert "3, 0 done" in said and "3, 2 done" in said  # of the first start and the second
    assert lines(tmp_path / "run") == lines(runs / "2x2")


@pytest.mark.parametrize("place", ["state", "gradient", "loss"])
def test_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path, monkeypatch, place):
    flags = {"train_batch_size": 4, "checkpointing_steps": 2, "max_train_steps": 20}
    updates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda x: updates.append(1) or step(x))
    now, clip, add_term = [], torch.nn.utils.clip_grad_norm_, train.add_term

    def clip_overflowing(parameters, norm):
        parameters[7].grad.flatten()[0] *= math.inf if now == ["gradient"] else 1
        return clip(parameters, norm)

    def add_overflowing(sums, term, auxiliary):
        more = math.inf if now == ["loss"] else 0
        add_term(sums, term._replace(loss=term.loss + more), auxiliary)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_overflowing)
    monkeypatch.setattr(train, "add_term", add_overflowing)
    factor = math.nan if place == "state" else 1
    at_step(monkeypatch, 4, lambda z0: now.append(place) or z0 * factor)
    rows = train.step_indices(2000, 4, 42, 4)
    draws = [train.draw((1, 16, 8, 8), SOAR, sample.seeded(42, "draws", 4, i)) for i in range(4)]
    sigma = train.sigma_from_t(torch.cat([x.t for x in draws]), 3.0)
    words = ("step 4 is not finite", str(rows), f"{sigma.min():.4f} to {sigma.max():.4f}")
    refused(tmp_path / "run", *words, kind=FloatingPointError, **flags)
    assert len(updates) == 3
    assert [x.name[-1] for x in train.checkpoints(tmp_path / "run")] == ["2"]
