"""sample.py on the small Stable Diffusion 3 pipeline of experiments/shapes/data.

A process that starts up imports diffusers for 7 s. So most runs are calls in this process, and
ranks are forked from it; two commands are started as a user starts them.
"""

import ast
import copy
import csv
import dataclasses
import errno
import fcntl
import inspect
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
import weakref
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sample
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH
from experiments.tests.common import MODEL, finish, launch, start
from soar import sigma_from_t

CPU = torch.device("cpu")
BASE = DATA / "model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE = MODEL | {
    "height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 6, "seed": 3,
}  # fmt: skip
ONE = SAMPLE | {"prompt": "a photo of a red circle", "num_images_per_prompt": 1}
QUICK = ONE | {"num_inference_steps": 2}
LINES = (DATA / "prompts.jsonl").read_text().splitlines()
FIRST = "00000/samples/00000.png"


@pytest.fixture(autouse=True)
def alone():
    """One thread, as in a launched process; no process group stays where a run raised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    leave_group()


def leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(output_dir: Path, **flags) -> Path:
    sample.main(sample.Args(output_dir=output_dir, **flags))
    return output_dir


def refused(kind: type[Exception], output_dir: Path, **flags) -> str:
    """The message with which a run is refused."""
    with pytest.raises(kind) as caught:
        run(output_dir, **flags)
    leave_group()
    return str(caught.value)


def fork(count: int, log: Path, seeds: dict | None = None, **flags) -> list:
    """The ranks of a run with torchrun's variables, whose output goes to log.0, log.1, ...
    seeds: of ranks that are given another one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

    def rank_main(rank: int) -> None:
        os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(count)}
        sys.stdout = sys.stderr = log.with_suffix(f".{rank}").open("w")
        run(**flags | {"seed": (seeds or {}).get(rank, flags["seed"])})

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    return ranks


def contents(folder: Path) -> dict[str, bytes]:
    """What a run writes, by relative path. Hidden files, such as its lock, are no part of it."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in shown}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def read(folder: Path) -> dict:
    return json.loads((folder / "protocol.json").read_text())


def write_prompts(path: Path, texts: list[str]) -> dict:
    """QUICK's flags for a file of these prompts."""
    path.write_text("".join(f"{text}\n" for text in texts))
    return QUICK | {"prompt": None, "prompts": path}


def base_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(BASE, subfolder="transformer")


def write(tensors: dict[str, Tensor], path: Path, settings: str | None = None) -> Path:
    """A safetensors file; settings are peft's, where diffusers puts them."""
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": settings} if settings else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, path, metadata=metadata)
    return path


def edited_base(folder: Path, part: str, edit) -> Path:
    """The base pipeline with edit(tensors) applied to one part's weights."""
    folder.mkdir(parents=True)
    for path in BASE.iterdir():
        if path.name != part:
            (folder / path.name).symlink_to(path)
    shutil.copytree(BASE / part, folder / part)
    edit_weights(folder / part, edit)
    return folder


def edit_weights(folder: Path, edit) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    write(tensors, file)


def noise_drawn(monkeypatch) -> list[Tensor]:
    """A list to which each batch drawn from now on adds its noise."""
    seen, original = [], sample.sample_images

    def spy(*args):
        seen.append(args[2])
        return original(*args)

    monkeypatch.setattr(sample, "sample_images", spy)
    return seen


@pytest.fixture
def no_model(monkeypatch):
    """What is refused here is refused before a model is loaded."""
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three prompts, two images each, with batches of 1 and of 4, by one process and by two."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "prompts.jsonl").write_text("\n".join(LINES[::200][:3]) + "\n")
    flags = SAMPLE | {"prompts": folder / "prompts.jsonl"}
    torch.set_num_threads(1)
    run(folder / "1x1", batch_size=1, **flags)
    run(folder / "1x4", batch_size=4, **flags)
    done = launch(2, "sample.py", output_dir=folder / "2x4", batch_size=4, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as train.py writes it, whose newest checkpoint has other weights than the base's; a
    LoRA of the base."""
    folder = tmp_path_factory.mktemp("trained")
    model = base_transformer()
    for step in (5, 7):
        with torch.no_grad():
            model.proj_out.weight.mul_(1.1)
        checkpoint = folder / f"run/checkpoint-{step:06d}"
        model.save_pretrained(checkpoint / "transformer")
        state = {"step": step, "settings": {"max_sequence_length": MAX_SEQUENCE_LENGTH}}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    model = base_transformer()
    targets = ["to_q", "proj_out"]
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    model.add_adapter(config)
    StableDiffusion3Pipeline.save_lora_weights(
        folder / "lora",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder


# --- Determinism ----------------------------------------------------------------------------------


def test_files_are_those_of_any_number_of_processes_and_nearly_of_any_batch_size(images):
    assert contents(images / "2x4") == contents(images / "1x4")
    names = {name for name in contents(images / "1x4") if name.endswith(".png")}
    others = {name for name in contents(images / "1x1") if name.endswith(".png")}
    assert len(names) == 9 and names == others
    for name in names:
        difference = pixels(images / "1x4" / name) - pixels(images / "1x1" / name)
        assert np.abs(difference).max() <= 1


def by_prompt(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    """The images by prompt and noise_index."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {(x["prompt"], x["noise_index"]): pixels(folder / x["file"]) for x in lines}


def test_noise_is_a_function_of_seed_prompt_and_the_images_of_that_prompt_before(
    tmp_path, monkeypatch
):
    seen = noise_drawn(monkeypatch)
    texts = ["a circle", "a square", "a circle"]
    flags = write_prompts(tmp_path / "p.txt", texts) | {"num_images_per_prompt": 3}
    run(tmp_path / "a", batch_size=5, **flags)
    run(tmp_path / "b", batch_size=2, **flags)
    assert [len(z1) for z1 in seen] == [5, 4, 2, 2, 2, 2, 1]
    keys = [(3, "a circle", n) for n in range(3)] + [(3, "a square", n) for n in range(3)]
    keys += [(3, "a circle", n) for n in range(3, 6)]
    expected = [torch.randn(16, 8, 8, generator=sample.seeded(*key)) for key in keys]
    noise = torch.cat(seen[:2])
    assert torch.equal(noise, torch.stack(expected)) and torch.equal(noise, torch.cat(seen[2:]))
    assert len({x.numpy().tobytes() for x in noise}) == 9


A, B, C = "a photo of a red circle", "a photo of two blue squares", "a photo of a green triangle"


def test_prompts_in_another_file_have_the_same_images_but_for_rounding(tmp_path):
    """A part, another order, a line added; a line that is repeated for each of its images."""
    flags = write_prompts(tmp_path / "p.txt", [A, B, C]) | {"num_images_per_prompt": 2}
    expected = by_prompt(run(tmp_path / "whole", batch_size=3, **flags))
    assert len(expected) == 6
    cases = [([B], 2), ([C, "a photo of a bench", A, B], 2), ([A, A, B, C, C, B], 1)]
    for number, (texts, count) in enumerate(cases):
        flags = write_prompts(tmp_path / "p.txt", texts) | {"num_images_per_prompt": count}
        found = by_prompt(run(tmp_path / str(number), batch_size=3, **flags))
        assert found.keys() & expected.keys() == {key for key in expected if key[0] in texts}
        for key in found.keys() & expected.keys():
            assert np.abs(found[key] - expected[key]).max() <= 1


def test_rank_of_other_settings_than_rank_0_ends(tmp_path):
    flags = write_prompts(tmp_path / "p.txt", [A, B, C])
    ranks = fork(2, tmp_path / "log", seeds={1: 4}, output_dir=tmp_path / "out", **flags)
    ranks[1].join(60)
    ranks[0].kill()  # as torchrun does
    ranks[0].join()
    assert ranks[1].exitcode == 1
    assert "seed: was 3, now 4" in (tmp_path / "log.1").read_text()


def test_three_processes_killed_twice_end_with_the_files_of_one(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(LINES[::40][:14]) + "\n")
    flags = SAMPLE | {"prompts": tmp_path / "prompts.jsonl", "num_images_per_prompt": 1}
    flags |= {"batch_size": 2, "num_inference_steps": 8}
    reference, killed = run(tmp_path / "reference", **flags), tmp_path / "killed"
    flags["output_dir"] = killed
    for at_least in (1, 6):
        ranks = fork(3, tmp_path / "log", **flags)
        while len(list(killed.glob("*/samples/*.png"))) < at_least:
            assert all(rank.is_alive() for rank in ranks), (tmp_path / "log.0").read_text()
            time.sleep(0.005)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        assert at_least <= len(list(killed.glob("*/samples/*.png"))) < 14
        assert not (killed / "samples.jsonl").exists()
    paths = [killed / f"{i:05d}/samples/00000.png" for i in range(14)]
    left = [not (a.is_file() and b.is_file()) for a, b in zip(paths[0::2], paths[1::2])]
    ranks = fork(3, tmp_path / "log", **flags)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(contents(killed)) == 14 * 3 + 2 and contents(killed) == contents(reference)
    assert not list(killed.rglob("*.tmp"))
    own = sum(left[0::3])  # rank 0's bar counts those of its own batches that were left
    assert 0 < own < 4 and f" {own}/{own} " in (tmp_path / "log.0").read_text()
    assert "/" not in (tmp_path / "log.1").read_text() + (tmp_path / "log.2").read_text()


def test_batch_that_is_partly_there_is_drawn_whole_and_only_what_is_missing_is_written(
    images, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(images / "1x4", folder)
    for name in ("00002/samples/00000.png", "00002/grid.png", "samples.jsonl"):
        (folder / name).unlink()
    half = folder / "00002/samples/.00000.png.tmp"
    half.write_bytes(b"half an im")
    kept = folder / "00002/samples/00001.png"
    before, batches = kept.stat().st_mtime_ns, noise_drawn(monkeypatch)
    flags = SAMPLE | {"batch_size": 4, "prompts": images / "prompts.jsonl"}
    run(folder, **flags)
    assert [len(x) for x in batches] == [2]  # of six images the last two are a batch
    assert contents(folder) == contents(images / "1x4") and not half.exists()
    assert kept.stat().st_mtime_ns == before
    batches.clear()
    run(folder, **flags)
    assert batches == [] and contents(folder) == contents(images / "1x4")


def test_second_run_in_a_folder_is_refused_and_an_interrupt_leaves_whole_files(tmp_path):
    flags = write_prompts(tmp_path / "p.txt", ["a photo of a circle"] * 40)
    flags |= {"num_images_per_prompt": 2, "num_inference_steps": 20}
    out, words = tmp_path / "out", {key: x for key, x in flags.items() if x is not None}
    process = start(1, "sample.py", output_dir=out, **words)
    while not list(out.glob("*/samples/*.png")):
        assert process.poll() is None, finish(process).stderr[-3000:]
        time.sleep(0.01)
    message = refused(RuntimeError, out, **flags)
    assert str(out) in message and str(process.pid) in message
    assert socket.gethostname() in message
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr + done.stdout
    assert "the same command" in done.stdout.strip().splitlines()[-1]
    found = list(out.glob("*/samples/*"))
    assert 0 < len(found) < 80 and not list(tmp_path.rglob("*.tmp"))
    assert all(Image.open(path).convert("RGB").size == (64, 64) for path in found)
    bars = re.split(r"[\r\n]+", done.stderr.strip())
    assert all(re.match(r"out: +\d+%", bar) for bar in bars)  # no library's warning among them


# --- Output ---------------------------------------------------------------------------------------


def test_genevals_folder_walk_finds_every_image_and_its_metadata(images):
    lines = [json.loads(line) for line in (images / "prompts.jsonl").read_text().splitlines()]
    found = {}
    for name in os.listdir(images / "2x4"):
        folder = images / "2x4" / name
        if folder.is_dir() and name.isdigit():
            assert json.loads((folder / "metadata.jsonl").read_text()) == lines[int(name)]
            for image in sorted(os.listdir(folder / "samples")):
                assert re.match(r"\d+\.png", image)
                found[int(name), image] = pixels(folder / "samples" / image)
            tiles = [x for (i, _), x in found.items() if i == int(name)]
            assert (pixels(folder / "grid.png") == np.concatenate(tiles, axis=1)).all()
    assert sorted(found) == [(i, f"0000{j}.png") for i in range(3) for j in range(2)]
    assert len({x.tobytes() for x in found.values()}) == 6


def test_samples_list_names_every_image_with_its_prompt_indices_and_seed(images):
    expected = []
    for i, line in enumerate((images / "prompts.jsonl").read_text().splitlines()):
        for j in range(2):
            row = {"file": f"0000{i}/samples/0000{j}.png", "prompt": json.loads(line)["prompt"]}
            row |= {"prompt_index": i, "image_index": j, "seed": 3, "noise_index": j}
            expected.append(row)
    lines = (images / "2x4/samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_protocol_holds_what_images_depend_on(images, trained, tmp_path):
    protocol = read(run(tmp_path / "a", transformer=(str(trained / "run"),), **QUICK))
    digests = [protocol.pop(key) for key in ("prompts", "pipeline", "transformer")]
    assert all(re.fullmatch("[0-9a-f]{64}", x) for x in digests) and len(set(digests)) == 3
    place = (trained / "run/checkpoint-000007/transformer").resolve()
    assert protocol == {
        "from": {"pipeline": str(BASE), "transformer": str(place)}, "lora": None,
        "sigmas": [1.0, pytest.approx(0.0089286, abs=1e-6), 0.0], "num_images_per_prompt": 1,
        "num_inference_steps": 2, "guidance_scale": 4.5, "height": 64, "width": 64, "seed": 3,
        "batch_size": 4, "mixed_precision": "no", "compile": False,
        "max_sequence_length": MAX_SEQUENCE_LENGTH, "torch": version("torch"),
        "diffusers": version("diffusers"), "transformers": version("transformers"),
    }  # fmt: skip
    base = read(images / "1x1")
    lora = read(run(tmp_path / "b", transformer=(str(trained / "lora"),), **QUICK))
    assert base["from"] == {"pipeline": str(BASE), "transformer": "base"}
    assert (base["batch_size"], base["pipeline"], base["lora"]) == (1, digests[1], None)
    assert base["transformer"] == lora["transformer"] != digests[2] and len(lora["lora"]) == 64
    assert len({x["prompts"] for x in (base, lora)}) == 2 and lora["prompts"] == digests[0]


def test_pipeline_of_the_hub_is_told_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(BASE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    flags = QUICK | {"pretrained_model_name_or_path": "a/b", "max_sequence_length": None}
    args = sample.Args(output_dir=tmp_path / "out", **flags)
    (job,) = sample.plan(args, [{"prompt": "a"}])
    assert job.protocol["pipeline"] == job.protocol["transformer"] == commit
    assert job.protocol["max_sequence_length"] == 77


def test_sigmas_are_part_of_the_protocol_and_those_of_sd3(tmp_path):
    """sigma(t) = 3 t / (1 + 2 t) at 40 even steps from t = 1 to t = sigma(1 / 1000), then 0."""
    args = sample.Args(output_dir=tmp_path, **QUICK | {"num_inference_steps": 40})
    (job,) = sample.plan(args, [{"prompt": "a"}])
    sigmas = job.protocol["sigmas"]
    first = sigma_from_t(torch.tensor(0.001, dtype=torch.float64), 3.0)
    t = torch.linspace(1, first.item(), 40, dtype=torch.float64)
    assert sigmas == pytest.approx([*sigma_from_t(t, 3.0).tolist(), 0.0], abs=2e-7)
    written = {0: 1.0, 1: 0.991331, 10: 0.897279, 20: 0.741440, 30: 0.476909, 39: 0.008929, 40: 0}
    assert {k: round(sigmas[k], 6) for k in written} == written


def test_image_that_is_missing_at_the_end_is_an_error_and_no_list_is_written(
    tmp_path, monkeypatch
):
    original = sample.save_whole

    def save(content, path):
        original(content, path)
        if path.name == "00001.png":
            path.with_name("00000.png").unlink()

    monkeypatch.setattr(sample, "save_whole", save)
    flags = QUICK | {"num_images_per_prompt": 2}
    assert "00000/samples/00000.png" in refused(FileNotFoundError, tmp_path / "a", **flags)
    assert not (tmp_path / "a/samples.jsonl").exists()


def test_bar_is_rank_0s_and_the_end_says_what_was_drawn(images):
    assert " 1/1 " in (images / "stderr").read_text()  # of two batches, the first
    cut, done = (images / "stdout").read_text().splitlines()
    assert cut == "0 of 3 prompts are cut at 12 tokens"
    assert re.fullmatch(r"6 images in .*2x4", done)


def test_hidden_and_foreign_files_beside_images_do_not_matter(tmp_path, monkeypatch):
    """As macOS, Jupyter, Windows and a fresh disk have them, before a run and in its midst."""
    junk = (".DS_Store", ".ipynb_checkpoints/00000-checkpoint.png", "._00000.png", "Thumbs.db")
    flags = QUICK | {"num_images_per_prompt": 2}
    reference, folder = run(tmp_path / "reference", **flags), tmp_path / "a"
    for place in (folder, folder / "00000/samples"):
        (folder / "lost+found").mkdir(parents=True, exist_ok=True)
        for name in junk[: 3 if place == folder else 4]:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"junk")
        if place == folder:  # a new output_dir, opened in a file browser
            assert contents(run(folder, **flags)) == contents(reference)
    (folder / "00000/samples/00001.png").unlink()
    batches = noise_drawn(monkeypatch)
    run(folder, **flags)
    (folder / "00000/samples/Thumbs.db").unlink()
    assert [len(x) for x in batches] == [2] and contents(folder) == contents(reference)
    assert len(list(folder.rglob("*-checkpoint.png"))) == 2  # nothing of the user's is deleted


@pytest.mark.parametrize("kind", [Image.Image, str])
def test_save_whole_leaves_the_old_file_where_writing_fails(tmp_path, monkeypatch, kind):
    def fail(*_, **__):
        raise KeyboardInterrupt

    class Broken(Image.Image):
        def save(self, file, format):
            file.write(b"half")
            fail()

    (tmp_path / "a.png").write_bytes(b"old")
    content = Broken()
    if kind is str:
        content = "new"
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        sample.save_whole(content, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_lock_names_its_holder_alone_and_ends_with_it(tmp_path):
    with sample.locked(tmp_path):
        pass  # a holder before
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with sample.locked(tmp_path):
            held.set()
            time.sleep(100)

    child = context.Process(target=hold)
    child.start()
    assert held.wait(60)
    with pytest.raises(RuntimeError) as caught, sample.locked(tmp_path):
        pass
    assert re.findall(r"process (\d+)", str(caught.value)) == [str(child.pid)]
    child.kill()
    child.join()
    with sample.locked(tmp_path):
        pass


def test_folder_on_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run(tmp_path / "a", **QUICK)
    printed = capsys.readouterr().out
    assert "warning" in printed and str(tmp_path / "a") in printed
    assert (tmp_path / "a" / FIRST).is_file()


# --- Another protocol -----------------------------------------------------------------------------


def test_output_dir_of_another_protocol_is_refused_with_the_differences(images, tmp_path, no_model):
    flags = SAMPLE | {"batch_size": 4, "prompts": images / "prompts.jsonl"}
    before = contents(images / "1x4")
    other = {"guidance_scale": 3.0, "seed": 4}
    message = refused(ValueError, images / "1x4", **flags | other)
    assert "guidance_scale: was 4.5, now 3.0" in message and "seed: was 3, now 4" in message
    assert str(images / "1x4") in message and "height" not in message
    (tmp_path / "other.jsonl").write_text("\n".join(LINES[:3]))
    message = refused(ValueError, images / "1x4", **flags | {"prompts": tmp_path / "other.jsonl"})
    assert "prompts: was" in message and "seed" not in message
    assert contents(images / "1x4") == before


def test_output_dir_of_other_files_is_refused(tmp_path, no_model):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    message = refused(ValueError, tmp_path, **QUICK)
    assert str(tmp_path) in message and "protocol.json" in message
    (tmp_path / "metrics.jsonl").rename(tmp_path / "protocol.json")
    message = refused(ValueError, tmp_path, **QUICK)  # as of a version with fewer settings
    assert str(tmp_path) in message and "seed: was None, now 3" in message


def scale_first(tensors: dict[str, Tensor]) -> None:
    """Other weights, of the same names and shapes."""
    name = min(name for name in tensors if name.endswith("weight"))
    tensors[name] = 0.5 * tensors[name]


@pytest.mark.parametrize("kind", ["run", "folder", "LoRA"])
def test_other_weights_in_the_same_path_are_refused_and_equal_ones_elsewhere_accepted(
    trained, tmp_path, monkeypatch, kind
):
    newest = "run/checkpoint-000007"
    paths = {"run": "run", "folder": f"{newest}/transformer", "LoRA": f"lora/{sample.LORA}"}
    shutil.copytree(trained, tmp_path / "a")
    shutil.copytree(trained / newest, tmp_path / "b/elsewhere")
    shutil.copytree(trained / "lora", tmp_path / "b/lora")
    given = tmp_path / "a" / paths[kind]
    # The folder of weights alone, without the state beside it, is an equal copy too.
    copies = {"run": "b/elsewhere", "folder": "b/elsewhere/transformer", "LoRA": "b/lora"}
    equal = [tmp_path / copies[kind]]
    equal += [tmp_path / "b/elsewhere/transformer"] if kind == "run" else []
    out = run(tmp_path / "out", transformer=(str(given),), **QUICK)
    before = contents(out)
    batches = noise_drawn(monkeypatch)
    for place in equal:
        run(out, transformer=(str(place),), **QUICK)
        assert read(out)["from"]["transformer"].startswith(str(place))
    before.pop("protocol.json")
    assert batches == [] and before.items() < contents(out).items()
    folders = {"run": tmp_path / "a" / paths["folder"], "folder": given, "LoRA": given.parent}
    edit_weights(folders[kind], scale_first)
    before = contents(out)
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    message = refused(ValueError, out, transformer=(str(given),), **QUICK)
    assert f"{'lora' if kind == 'LoRA' else 'transformer'}: was" in message
    assert str(out) in message and contents(out) == before


def test_settings_of_the_transformer_are_part_of_what_images_depend_on(trained, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(trained / "run/checkpoint-000007/transformer", folder)
    was = sample.digest(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/config-checkpoint.json").write_text("{}")
    (folder / "README.md").write_text("Notes.\n")
    assert sample.digest(folder) == was
    shutil.copytree(folder, tmp_path / ".cache/transformer")
    assert sample.digest(tmp_path / ".cache/transformer") == was
    (folder / "config.json").write_text(json.dumps(config | {"qk_norm": None}))
    assert sample.digest(folder) != was
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert sample.digest(folder) != was


@pytest.mark.parametrize(
    "path, key",
    [
        ("transformer", "transformer"), ("vae", "pipeline"), ("text_encoder", "pipeline"),
        ("text_encoder_3", "pipeline"), ("tokenizer_2/tokenizer.json", "pipeline"),
        ("vae/config.json", "pipeline"), ("scheduler/scheduler_config.json", "pipeline"),
        ("model_index.json", "pipeline"),
    ],
)  # fmt: skip
def test_parts_of_a_local_base_that_are_overwritten_are_refused(tmp_path, no_model, path, key):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    flags = QUICK | {"pretrained_model_name_or_path": str(base)}
    args = sample.Args(output_dir=tmp_path / "out", **flags)
    rows = [{"prompt": args.prompt}]
    sample.prepare(*sample.plan(args, rows), rows)
    edits = {
        "tokenizer_2/tokenizer.json": {"normalizer": None},
        "vae/config.json": {"scaling_factor": 2.0},
        "scheduler/scheduler_config.json": {"shift": 2.0},
        "model_index.json": {"text_encoder_3": [None, None]},
    }
    if path in edits:
        content = json.loads((base / path).read_text())
        (base / path).write_text(json.dumps(content | edits[path]))
    else:
        edit_weights(base / path, scale_first)
    message = refused(ValueError, args.output_dir, **flags)
    assert f"{key}: was" in message and ("pipeline: was" in message) == (key == "pipeline")


def test_equal_copy_of_the_base_is_accepted_with_other_folders_in_it(images, tmp_path, monkeypatch):
    base = tmp_path / "copy"
    shutil.copytree(BASE, base)
    shutil.copytree(images / "1x4", base / "samples")  # of this very run
    (base / "text_encoders").mkdir()
    shutil.copy(BASE / "text_encoder/model.safetensors", base / "text_encoders/clip.safetensors")
    flags = SAMPLE | {"batch_size": 4, "prompts": images / "prompts.jsonl"}
    batches = noise_drawn(monkeypatch)
    run(base / "samples", **flags | {"pretrained_model_name_or_path": str(base)})
    assert batches == []


# --- Transformers ---------------------------------------------------------------------------------


def test_several_transformers_get_a_folder_each_and_are_compared_from_the_same_noise(
    trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(trained)
    flags = write_prompts(tmp_path / "p.txt", [f"a photo of {n} circles" for n in range(18)])
    flags |= {"batch_size": 18, "num_inference_steps": 1}
    file = f"lora/{sample.LORA}"
    newest = "run/checkpoint-000007"
    given = ("base", "run", f"./{newest}/transformer", "lora", file)
    run(tmp_path / "out", transformer=given, **flags)
    names = ["base", "run", "run-checkpoint-000007-transformer", "lora", f"lora-{sample.LORA}"]
    assert {path.name for path in sample.visible(tmp_path / "out")} == {*names, "compare.png"}
    drawn = {}
    for name in names:
        files = contents(tmp_path / "out" / name)
        drawn[name] = {name: x for name, x in files.items() if name.endswith(".png")}
    base, newest, folder, lora, lora_file = drawn.values()
    assert newest == folder and lora == lora_file
    for a, b in ((base, newest), (base, lora), (newest, lora)):
        assert len(a) == 36 and not set(a.values()) & set(b.values())
    sheet = Image.open(tmp_path / "out/compare.png")
    assert sheet.size == (5 * 64, 9 * 64)  # 18 prompts are more than 16, so every second one
    for row, column in ((0, 0), (8, 1), (3, 3)):
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        path = tmp_path / "out" / names[column] / f"{2 * row:05d}/samples/00000.png"
        assert (np.asarray(tile) == pixels(path)).all()
    resumed = contents(tmp_path / "out")
    assert contents(run(tmp_path / "out", transformer=given, **flags)) == resumed
    message = refused(
        ValueError, tmp_path / "out", transformer=("run", "lora"), **flags | {"seed": 5}
    )
    assert str(tmp_path / "out/run") in message and "seed: was 3, now 5" in message
    message = refused(ValueError, tmp_path / "twice", transformer=("base", "base"), **flags)
    assert "one folder" in message and "base" in message


def test_transformers_folder_has_a_name_wherever_the_run_starts(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained / "run/checkpoint-000007/transformer")
    names = {}
    for given in ("..", ".", "../transformer", str(trained / "run")):
        args = sample.Args(output_dir=tmp_path / "out", transformer=("base", given), **QUICK)
        jobs = sample.plan(args, [{"prompt": "a"}])
        assert jobs[0].folder == tmp_path / "out/base" and jobs[1].folder.parent == tmp_path / "out"
        names[given] = jobs[1].folder.name
    assert names["../transformer"] == names["."] == "transformer"
    assert names[".."] == "checkpoint-000007"
    assert names[str(trained / "run")] == "-".join((trained / "run").parts[1:])


def test_run_stands_for_its_newest_checkpoint_by_exact_name(tmp_path):
    names = ["checkpoint-000005", "checkpoint-000010", "checkpoint-999999", "checkpoint-1000000"]
    other = ["checkpoint-5", "checkpoint-000011-good", "checkpoint-0000012", ".checkpoint-2000000"]
    other += ["checkpoint-٢000000", "checkpoint-3000000 copy", "checkpoint-", "my-checkpoint-000020"]
    for name in names + other:
        shutil.copytree(BASE / "transformer", tmp_path / "run" / name / "transformer")
    (tmp_path / "run/checkpoint-4000000").write_text("no folder")
    assert [path.name for path in sample.checkpoints(tmp_path / "run")] == names
    assert sample.checkpoints(tmp_path / "nowhere") == []
    found = {name: sample.find_weights(str(tmp_path / "run" / name))[0] for name in ("", names[0])}
    assert found[""] == tmp_path / "run" / names[-1] / "transformer"
    assert found[names[0]] == tmp_path / "run" / names[0] / "transformer"


@pytest.mark.parametrize("beside", ["transformer/config.json", sample.LORA, "config.json"])
def test_folder_that_may_mean_two_is_refused_by_both_names(trained, tmp_path, no_model, beside):
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run" / beside
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    message = refused(ValueError, tmp_path / "o", transformer=(str(tmp_path / "run"),), **QUICK)
    newest = tmp_path / "run/checkpoint-000007/transformer"
    other = file if beside == sample.LORA else file.parent
    assert str(newest) in message and f"{other} " in message


def test_diffusers_with_a_saved_transformer_or_lora_draws_the_same_image(trained, tmp_path):
    flags = ONE | {"prompt": "a photo of a blue square above a red circle"}
    z1 = torch.randn(1, 16, 8, 8, generator=sample.seeded(3, flags["prompt"], 0))
    options = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 4.5}
    options |= {"max_sequence_length": MAX_SEQUENCE_LENGTH, "latents": z1}
    model = SD3Transformer2DModel.from_pretrained(trained / "run/checkpoint-000007/transformer")
    checkpoint = StableDiffusion3Pipeline.from_pretrained(BASE, transformer=model)
    lora = StableDiffusion3Pipeline.from_pretrained(BASE)
    lora.load_lora_weights(trained / "lora")
    base = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipes = {"base": base, str(trained / "run"): checkpoint, str(trained / "lora"): lora}
    shown = []
    for number, (given, pipe) in enumerate(pipes.items()):
        theirs = np.asarray(pipe(flags["prompt"], **options).images[0]).astype(int)
        shown.append(pixels(run(tmp_path / str(number), transformer=(given,), **flags) / FIRST))
        assert np.abs(theirs - shown[-1]).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 8 and np.abs(shown[0] - shown[2]).max() > 8


@pytest.mark.parametrize(
    "field, value",
    [
        ("in_channels", 4), ("out_channels", 8), ("joint_attention_dim", 32), ("patch_size", 2),
        ("pooled_projection_dim", 32), ("pos_embed_max_size", 8), ("_class_name", "FluxModel"),
    ],
)  # fmt: skip
def test_transformer_that_does_not_fit_is_refused_by_the_field(tmp_path, no_model, field, value):
    config = json.loads((BASE / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    message = refused(ValueError, tmp_path / "out", transformer=(str(tmp_path),), **QUICK)
    words = (str(tmp_path), str(BASE), field, str(value), str(config[field]))
    assert all(word in message for word in words) and "qk_norm" not in message


def test_transformer_whose_weights_do_not_fit_is_refused_by_the_tensor(trained, tmp_path):
    weights = load_file(trained / "run/checkpoint-000007/transformer" / WEIGHTS)
    missing = {key: x for key, x in weights.items() if key != "proj_out.bias"}
    cases = {
        "proj_out.bias": missing,
        "proj_out.scale": weights | {"proj_out.scale": torch.ones(2)},
        "proj_out.weight": weights | {"proj_out.weight": torch.ones(2, 2)},
    }
    for name, tensors in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(BASE / "transformer/config.json", folder)
        write(tensors, folder / WEIGHTS)
        message = refused(ValueError, folder / "out", transformer=(str(folder),), **QUICK)
        assert str(folder) in message and name in message
        assert contents(folder / "out") == {}


def test_transformer_that_is_not_there_or_not_in_safetensors_is_an_error(tmp_path):
    message = refused(ValueError, tmp_path / "a", transformer=("nowhere",), **QUICK)
    assert "--transformer nowhere" in message and "none" in message
    shutil.copy(BASE / "transformer/config.json", tmp_path)
    torch.save(base_transformer().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    message = refused(OSError, tmp_path / "b", transformer=(str(tmp_path),), **QUICK)
    assert "safetensors" in message and str(tmp_path) in message


def test_max_sequence_length_is_the_checkpoints_and_a_difference_is_said_aloud(
    trained, tmp_path, capsys, monkeypatch
):
    newest = str(trained / "run")
    flags = QUICK | {"max_sequence_length": None}
    run(tmp_path / "a", transformer=("base", newest), **flags)
    for name in ("base", "-".join(Path(newest).parts[1:])):  # all are drawn with the same
        assert read(tmp_path / "a" / name)["max_sequence_length"] == MAX_SEQUENCE_LENGTH
    assert "warning" not in capsys.readouterr().out
    run(tmp_path / "b", transformer=("base", newest), **flags | {"max_sequence_length": 16})
    (warning,) = re.findall("warning.*", capsys.readouterr().out)
    assert "16" in warning and "12" in warning
    a, b = (pixels(tmp_path / name / "base" / FIRST) for name in "ab")
    assert (a != b).any()
    monkeypatch.setenv("RANK", "1")
    args = sample.Args(output_dir=tmp_path, transformer=(newest,), **QUICK)
    sample.plan(dataclasses.replace(args, max_sequence_length=16), [])
    assert capsys.readouterr().out == ""  # one rank's word is enough
    monkeypatch.delenv("RANK")
    shutil.copytree(trained / "run/checkpoint-000007", tmp_path / "other")
    state = {"step": 7, "settings": {"max_sequence_length": 9}}
    (tmp_path / "other/trainer_state.json").write_text(json.dumps(state))
    both = (newest, str(tmp_path / "other"))
    message = refused(ValueError, tmp_path / "c", transformer=both, **flags)
    assert re.search("--max_sequence_length.*9, 12", message)
    sample.plan(sample.Args(output_dir=tmp_path / "c", transformer=both, **QUICK), [])


# --- LoRA files -----------------------------------------------------------------------------------

RANKS = {
    "transformer_blocks.0.attn.to_q": 2,
    "transformer_blocks.1.attn.to_out.0": 3,
    "transformer_blocks.3.ff.net.0.proj": 4,
    "time_text_embed.text_embedder.linear_1": 1,
    "proj_out": 2,
}
ALPHA = 5
BLOCK, OUT = "transformer_blocks.0.attn.to_q", "proj_out"


@pytest.fixture(scope="module")
def matrices():
    """{module: (A, B)} for RANKS."""
    made, modules = {}, dict(base_transformer().named_modules())
    generator = torch.Generator().manual_seed(0)
    for name, rank in RANKS.items():
        a = torch.randn(rank, modules[name].in_features, generator=generator)
        b = torch.randn(modules[name].out_features, rank, generator=generator)
        made[name] = (a, b)
    return made


def named(matrices: dict, prefix: str = "", down: str = "lora_A", up: str = "lora_B") -> dict:
    """The tensors of a LoRA file: prefix, module, then down or up."""
    tensors = {}
    for name, (a, b) in matrices.items():
        tensors[f"{prefix}{name}.{down}.weight"] = a
        tensors[f"{prefix}{name}.{up}.weight"] = b
    return tensors


def settings(prefix: str = "", **values) -> str:
    """peft's settings of a LoRA, as text."""
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=list(RANKS), rank_pattern=RANKS)
    values = config.to_dict() | {"target_modules": list(RANKS)} | values
    return json.dumps({f"{prefix}{key}": value for key, value in values.items()})


def over_rank(name: str) -> float:
    return ALPHA / RANKS[name]


def over_root(name: str) -> float:
    return ALPHA / math.sqrt(RANKS[name])


def by_pattern(name: str) -> float:
    return 3 / 2 if name == BLOCK else over_rank(name)


def unit(name: str) -> float:
    return 1.0


# Prefix of the keys, settings, and the scale as a function of the module.
FORMS = {
    "train.py's": ("transformer.", None, unit),
    "of a transformer": ("", None, unit),
    "settings": ("transformer.", settings("transformer."), over_rank),
    "settings of a transformer": ("", settings(), over_rank),
    "rslora": ("", settings(use_rslora=True), over_root),
    "alpha pattern": ("", settings(alpha_pattern={BLOCK: 3}), by_pattern),
    "one rank": ("", None, unit),
    "half precision": ("", None, unit),
}


def lora_file(matrices: dict, form: str, path: Path) -> tuple[Path, dict]:
    """A file of this form, and the matrices that it holds."""
    prefix, inside, _ = FORMS[form]
    if form == "one rank":
        matrices = {name: x for name, x in matrices.items() if RANKS[name] == 2}
    if form == "half precision":
        matrices = {name: (a.half(), b.half()) for name, (a, b) in matrices.items()}
    return write(named(matrices, prefix), path, inside), matrices


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_of_a_lora_file_lands_with_its_scale(matrices, tmp_path, form):
    """Merged weight = W + (B A) scale, formed in float32, scale = alpha / r, or alpha / sqrt(r) for
    rslora; all other weights stay as they are. The model in bf16 is that, cast."""
    file, held = lora_file(matrices, form, tmp_path / "lora.safetensors")
    expected = base_transformer().state_dict()
    for name, (a, b) in held.items():
        expected[f"{name}.weight"] += (b.float() @ a.float()) * FORMS[form][2](name)
    merged = sample.load_transformer(str(BASE), file, torch.float32, CPU).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], x) for name, x in expected.items())
    merged = sample.load_transformer(str(BASE), file, torch.bfloat16, CPU).state_dict()
    assert all(torch.equal(merged[name], x.bfloat16()) for name, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_an_adapter_of_the_files_exact_matrices_beside_frozen_weights(
    matrices, tmp_path, dtype
):
    file, held = lora_file(matrices, "one rank", tmp_path / "lora.safetensors")
    model = base_transformer().to(dtype)
    sample.load_lora(model, file)
    found = {name: x for name, x in model.named_parameters() if x.requires_grad}
    expected = named(held, "", "lora_A.default", "lora_B.default")
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == torch.float32 and torch.equal(x, expected[name])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_lora_of_another_format_is_refused_with_the_way_to_convert_it_which_works(
    matrices, tmp_path, kind
):
    """The merged weights are then those of the other format's own arithmetic."""
    if kind == "peft":
        config = LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, target_modules=["to_k"])
        model = get_peft_model(base_transformer(), config)
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        expected = model.merge_and_unload().state_dict()
        transformer = base_transformer()
        PeftModel.from_pretrained(transformer, tmp_path)
        transformer.save_lora_adapter(tmp_path / "converted")
        converted = tmp_path / "converted"
        words = ["PeftModel.from_pretrained(transformer, ", "transformer.save_lora_adapter("]
    else:
        expected, tensors = base_transformer().state_dict(), {}
        for name, (a, b) in matrices.items():
            expected[f"{name}.weight"] += ALPHA / len(a) * b @ a
            name = f"lora_transformer_{name.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors[f"{name}.alpha"] = torch.tensor(float(ALPHA))
        file = write(tensors, tmp_path / "kohya.safetensors")
        theirs = {name: (a, ALPHA / len(a) * b) for name, (a, b) in matrices.items()}
        converted = write(named(theirs, "transformer."), tmp_path / "converted.safetensors")
        words = ["transformer.MODULE.lora_A.weight", "lora_up times alpha / rank"]
    message = refused(ValueError, tmp_path / "out", transformer=(str(file),), **QUICK)
    assert all(word in message for word in [str(file), f"{kind}'s", *words])
    weights, _ = sample.find_weights(str(converted))
    ours = sample.load_transformer(str(BASE), weights, torch.float32, CPU).state_dict()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    was = base_transformer().state_dict()
    assert sum(not torch.equal(ours[name], x) for name, x in was.items()) >= len(RANKS)


ROW = torch.ones(2, 128)
TE = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
# Changed tensors, settings, and what the message names.
REFUSED = {
    "empty": (None, None, ["no LoRA"]),
    "B missing": ({f"{BLOCK}.lora_B.weight": None}, None, [f"{BLOCK}.lora_B.weight is missing"]),
    "A missing": ({f"{OUT}.lora_A.weight": None}, None, [f"{OUT}.lora_A.weight is missing"]),
    "no such block": ({"transformer_blocks.9.attn.to_q.lora_A.weight": ROW}, None, ["blocks.9"]),
    "no such ending": ({f"{BLOCK}.lora_C.weight": ROW}, None, ["lora_C"]),
    "text encoder": ({TE: ROW}, None, [TE]),
    "kohya's text encoder": ({"lora_te1_q_proj.lora_down.weight": ROW}, None, ["kohya's"]),
    "kohya's alpha": ({f"{BLOCK}.alpha": ROW[0, 0]}, None, [f"{BLOCK}.alpha"]),
    "old diffusers": ({f"{BLOCK}.lora.down.weight": ROW}, None, ["lora.down"]),
    "adapter's name": ({f"{BLOCK}.lora_A.other.weight": ROW}, None, [f"{BLOCK}.lora_A.other"]),
    "convolution": (
        {"pos_embed.proj.lora_A.weight": ROW, "pos_embed.proj.lora_B.weight": ROW.T}, None,
        ["pos_embed.proj"],
    ),
    "whole weights": ({"proj_out.weight": ROW}, None, ["proj_out.weight"]),
    "bias": ({f"{BLOCK}.lora_B.bias": ROW[0]}, None, ["lora_B.bias"]),
    "DoRA": ({f"{BLOCK}.lora_magnitude_vector": ROW[0]}, None, ["lora_magnitude_vector"]),
    "DoRA by settings": ({}, settings(use_dora=True), ["use_dora"]),
    "settings of a later peft": ({}, settings(use_other=True), ["use_other"]),
    "another start": ({}, settings(init_lora_weights="pissa"), ["init_lora_weights=pissa"]),
    "trained biases": ({}, settings(bias="all"), ["bias=all"]),
    "settings of a text encoder": ({}, settings("text_encoder."), ["text_encoder."]),
    "settings of another rank": ({}, settings(rank_pattern={}), ["1.attn.to_out.0", "size"]),
    "alpha that is a text": ({}, settings(lora_alpha="5"), []),
    "both prefixes": ({f"transformer.{BLOCK}.lora_A.weight": ROW}, None, []),
    "A too wide": ({f"{BLOCK}.lora_A.weight": torch.ones(2, 256)}, None, [BLOCK, "256"]),
    "B too long": ({f"{BLOCK}.lora_B.weight": torch.ones(64, 2)}, None, [BLOCK, "64"]),
    "other ranks": ({f"{BLOCK}.lora_A.weight": torch.ones(3, 128)}, None, [BLOCK, "3", "2"]),
    "rank 0": (
        {f"{OUT}.lora_A.weight": ROW[:0], f"{OUT}.lora_B.weight": torch.ones(16, 0)}, None,
        ["positive"],
    ),
    "no matrix": ({f"{BLOCK}.lora_A.weight": torch.tensor(1.0)}, None, [BLOCK]),
    "settings that are not JSON": ({}, "{", []),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_transformer():
    return base_transformer()


@pytest.mark.parametrize("case", REFUSED)
def test_lora_file_of_which_a_tensor_has_no_place_is_refused_by_name(
    matrices, plain_transformer, tmp_path, case
):
    edit, inside, words = REFUSED[case]
    tensors = {} if edit is None else named(matrices) | edit
    tensors = {key: x for key, x in tensors.items() if x is not None}
    file = write(tensors, tmp_path / "lora.safetensors", inside)
    with pytest.raises(ValueError) as caught:
        sample.load_lora(copy.deepcopy(plain_transformer), file)
    assert all(word in str(caught.value) for word in [str(file), *words])


def test_lora_file_that_is_torn_is_refused_and_nothing_is_drawn(matrices, tmp_path):
    file = write(named(matrices), tmp_path / "lora.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    message = refused(ValueError, tmp_path / "out", transformer=(str(file),), **QUICK)
    assert str(file) in message and contents(tmp_path / "out") == {}


# --- Text encoders and VAE ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, name, value, named",
    [
        ("text_encoder", "text_projection.weight", None, "text_projection.weight"),
        ("text_encoder_2", "text_model.final_layer_norm.bias", None, "final_layer_norm.bias"),
        ("text_encoder_2", "text_projection.weight", torch.ones(2, 2), "text_projection.weight"),
        ("text_encoder_2", "lm_head.weight", torch.ones(2), "lm_head.weight"),
        ("text_encoder_3", "shared.weight", None, "embed_tokens.weight"),
        ("text_encoder_3", "encoder.final_layer_norm.weight", None, "final_layer_norm.weight"),
        ("text_encoder_3", "encoder.block.2.layer.0.weight", torch.ones(64), "encoder.block.2"),
        ("vae", "decoder.conv_in.bias", None, "decoder.conv_in.bias"),
        ("vae", "quant_conv.weight", torch.ones(2), "quant_conv.weight"),
        ("vae", "decoder.conv_in.bias", torch.ones(2), "decoder.conv_in.bias"),
    ],
)
def test_weights_of_the_pipeline_that_are_missing_or_left_over_are_refused_by_name(
    tmp_path, part, name, value, named
):
    def edit(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    base = edited_base(tmp_path / "base", part, edit)
    flags = QUICK | {"pretrained_model_name_or_path": str(base)}
    message = refused(ValueError, tmp_path / "out", **flags)
    assert f"{base}/{part}" in message and named in message
    assert contents(tmp_path / "out") == {}


def test_text_encoder_files_of_other_sound_forms_are_read(tmp_path):
    """position_ids as in old CLIP files; T5's embedding by its other name, beside a decoder."""
    ids = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    clip = edited_base(tmp_path / "clip", "text_encoder", lambda tensors: tensors.update(ids))
    sample.load_pipeline(str(clip), torch.float32, CPU)

    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        tensors["decoder.final_layer_norm.weight"] = torch.ones(64)

    t5 = edited_base(tmp_path / "t5", "text_encoder_3", rename)
    encoder = sample.load_pipeline(str(t5), torch.float32, CPU).text_encoder_3
    stored = load_file(BASE / "text_encoder_3/model.safetensors")["shared.weight"]
    assert torch.equal(encoder.shared.weight, stored)


def test_pipeline_without_t5_is_refused_by_name(tmp_path):
    shutil.copytree(BASE, tmp_path / "without")
    shutil.rmtree(tmp_path / "without/text_encoder_3")
    flags = QUICK | {"pretrained_model_name_or_path": str(tmp_path / "without")}
    message = refused(OSError, tmp_path / "out", **flags)
    assert str(tmp_path / "without") in message and "text_encoder_3" in message


def test_vae_keeps_its_float32_weights_in_bf16():
    pipe = sample.load_pipeline(str(BASE), torch.bfloat16, CPU)
    weights = load_file(BASE / "vae" / WEIGHTS)
    for name, x in pipe.vae.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, weights[name].float())
    assert pipe.text_encoder_3.dtype == torch.bfloat16


# --- Prompts that are cut -------------------------------------------------------------------------


def test_texts_are_cut_beyond_the_tokens_of_clip_or_of_t5(tmp_path, capsys):
    """n words are n tokens, and two more for CLIP, which reads 12, or one more for T5."""
    pipe = sample.load_pipeline(str(BASE), torch.float32, CPU)
    texts = [" ".join(["red"] * n) for n in range(14)]
    assert sample.count_cut(pipe, texts, 12) == 3  # 11, 12 and 13 words, by CLIP
    assert sample.count_cut(pipe, texts, 100) == 3
    assert sample.count_cut(pipe, texts, 5) == 9  # 5 to 13 words, by T5
    assert sample.count_cut(pipe, texts * 150, 5) == 9 * 150
    flags = write_prompts(tmp_path / "p.txt", [texts[3], texts[11]])
    run(tmp_path / "out", **flags)
    assert capsys.readouterr().out.splitlines()[0] == "1 of 2 prompts are cut at 12 tokens"


def test_pipelines_warning_of_cut_texts_is_silent_and_no_other(monkeypatch):
    log, records = logging.getLogger(StableDiffusion3Pipeline.__module__), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    pipe = sample.load_pipeline(str(BASE), torch.float32, CPU)
    tokens = pipe.tokenizer(["red " * 20]).input_ids
    sample.encode_prompts(pipe, ["red " * 20], 5)
    log.warning("another")
    log.removeHandler(handler)
    assert len(tokens[0]) > 12 and [x.getMessage() for x in records] == ["another"]


# --- Speed ----------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_in_batches_and_the_branches_share_a_forward(
    tmp_path, monkeypatch
):
    encoded, forwards = [], []
    encode, forward = sample.encode_prompts, SD3Transformer2DModel.forward

    def encoding(pipe, texts, length):
        encoded.append(texts)
        return encode(pipe, texts, length)

    def counting(self, hidden_states, *args, **kwargs):
        forwards.append((len(hidden_states), hidden_states.dtype))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(sample, "encode_prompts", encoding)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    texts = [f"a photo of {n} circles" for n in range(18)]
    flags = write_prompts(tmp_path / "p.txt", texts + texts[:2]) | {"batch_size": 10}
    run(tmp_path / "a", **flags)
    assert [len(part) for part in encoded] == [16, 3]
    assert sorted(sum(encoded, [])) == sorted(["", *texts])
    assert forwards == [(20, torch.float32)] * 4
    forwards.clear()
    run(tmp_path / "b", **flags | {"mixed_precision": "bf16", "guidance_scale": 1.0})
    assert forwards == [(10, torch.bfloat16)] * 4


def test_bf16_draws_nearly_the_image_of_float32_and_no_guidance_another(tmp_path):
    a = pixels(run(tmp_path / "a", **ONE) / FIRST)
    b = pixels(run(tmp_path / "b", **ONE | {"mixed_precision": "bf16"}) / FIRST)
    c = pixels(run(tmp_path / "c", **ONE | {"guidance_scale": 1.0}) / FIRST)
    assert np.abs(a - b).mean() < 4 < np.abs(a - c).mean()


def test_text_encoders_are_freed_before_the_transformer_is_loaded(tmp_path, monkeypatch):
    encoders, freed = [], []
    load_pipeline, load_transformer = sample.load_pipeline, sample.load_transformer

    def loading(*args):
        pipe = load_pipeline(*args)
        parts = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        encoders.extend(weakref.ref(part) for part in parts)
        return pipe

    def loading_transformer(*args):
        freed.append([part() is None for part in encoders])
        return load_transformer(*args)

    monkeypatch.setattr(sample, "load_pipeline", loading)
    monkeypatch.setattr(sample, "load_transformer", loading_transformer)
    run(tmp_path / "a", **QUICK)
    assert freed == [[True] * 3]


def test_compiled_transformer_draws_the_image_of_the_eager_one(tmp_path, monkeypatch):
    calls, original = [], SD3Transformer2DModel.compile

    def spy(self, **kwargs):
        calls.append(kwargs)
        original(self, backend="aot_eager", **kwargs)  # the default builds kernels for 40 s

    monkeypatch.setattr(SD3Transformer2DModel, "compile", spy)
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    config = SD3Transformer2DModel.load_config(BASE / "transformer")
    torch.manual_seed(0)
    model = SD3Transformer2DModel.from_config(config | {"num_layers": 1})
    model.save_pretrained(tmp_path / "one-layer")
    flags = QUICK | {"transformer": (str(tmp_path / "one-layer"),)}
    eager = run(tmp_path / "a", **flags)
    assert not calls
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "b", compile=True, **flags)
    # No graphs of another transformer, and one size at a time: a kernel for any size would depend
    # on the batches that came before.
    assert calls == ["reset", {"dynamic": False}]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert np.abs(pixels(eager / FIRST) - pixels(compiled / FIRST)).max() <= 1


# --- Prompts and flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["line 2", "Expecting value"]),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', ["line 2", '"prompt"']),
        ("p.jsonl", '{"prompt": 3}\n', ["line 1", '"prompt"']),
        ("p.jsonl", "[]\n", ["line 1", '"prompt"']),
        ("p.jsonl", "", ["ends"]),
        ("p.txt", "a\nb\n  \n", ["line 3", '"prompt"']),
        ("p.txt", "", ["ends"]),
        ("p.txt", b"a\nb\n\xff\n", ["line 3", "utf-8"]),
        ("p.csv", "", ["header"]),
        ("p.csv", b"Prompts,Category\na,b\n\xff,b\n", ["line 3", "utf-8"]),
        ("p.csv", "Prompts,Category\n", ["ends"]),
        ("p.csv", "Text,Category\na,b\n", ["line 1", "header", "Text", "Category"]),
        ("p.csv", "Prompt,prompts\na,b\n", ["line 1", "header", "Prompt", "prompts"]),
        ("p.csv", "Prompt\tCategory\na\tb\n", ["line 1", "header", "Prompt\\tCategory"]),
        ("p.csv", "Prompts,Category\na,b\n,b\n", ["line 3", '"prompt"']),
        ("p.csv", "Prompts,Category\na,b\na cat, a dog,b\n", ["line 3", "cells"]),
        ("p.csv", 'Prompts,Category\n"a\nb",c\n"d"e,f\n', ["line 4"]),
        ("p.tsv", "Prompt,Category\na,b\n", ["line 1", "header", "Prompt,Category"]),
        ("p.tsv", "Prompt\tCategory\na\tb\nc\n", ["line 3", "cells"]),
        ("p.json", "a\n", [".jsonl", ".txt", ".csv", ".tsv"]),
    ],
)
def test_prompt_file_errors_name_the_file_and_the_line_before_the_model_loads(
    tmp_path, no_model, name, text, words
):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = QUICK | {"prompt": None, "prompts": tmp_path / name}
    message = refused(ValueError, tmp_path / "out", **flags)
    assert all(word in message for word in [str(tmp_path / name), *words])
    assert message.count(str(tmp_path / name)) == 1 and not (tmp_path / "out").exists()


def test_prompt_files_of_the_benchmarks_are_read(tmp_path):
    bench = {"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
    other = {"tag": "x", "include": [], "prompt": "zwei Bänke\u2028und eine", "exclude": None}
    geneval = [bench, other]
    lines = "".join(json.dumps(row) + "\n" for row in geneval)
    (tmp_path / "evaluation_metadata.jsonl").write_text(lines)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in geneval)
    (tmp_path / "plain.jsonl").write_text(lines)
    for name in ("evaluation_metadata", "plain"):
        assert sample.read_prompts(tmp_path / f"{name}.jsonl") == geneval
    ocr = ['A sign that says "Hello, World"', 'Neon letters \u2028 "OPEN" at night; it\'s late']
    (tmp_path / "test.txt").write_text("\ufeff" + "\n".join(ocr))
    assert sample.read_prompts(tmp_path / "test.txt") == [{"prompt": text} for text in ocr]
    rows = [("A red car.", "Colors"), ('A sign that says "Hi",\nin two lines', "Text")]
    with (tmp_path / "drawbench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *rows])
    expected = [{"prompt": text, "Category": kind} for text, kind in rows]
    assert sample.read_prompts(tmp_path / "drawbench.csv") == expected
    (tmp_path / "lower.csv").write_text("id, PROMPT\r\n1,a\r\n2,b\r\n")
    assert [row["prompt"] for row in sample.read_prompts(tmp_path / "lower.csv")] == ["a", "b"]


def test_partiprompts_are_read_with_their_quotes(tmp_path):
    """Tabs between columns, a quote that opens a prompt, no doubled quotes, empty notes."""
    prompts = ['"O P E N" in neon over a door', 'a sign with "Yes" on it', 'a 6" nail, rusty', "42"]
    text = "Prompt\tCategory\tChallenge\tNote\n"
    text += "".join(f"{prompt}\tArts\tBasic\t\n" for prompt in prompts)
    (tmp_path / "PartiPrompts.tsv").write_text(text)
    rest = {"Category": "Arts", "Challenge": "Basic", "Note": ""}
    expected = [{"prompt": prompt} | rest for prompt in prompts]
    assert sample.read_prompts(tmp_path / "PartiPrompts.tsv") == expected


def test_flags_out_of_range_are_errors_that_name_them(tmp_path):
    for given in ({}, {"prompt": "a", "prompts": Path("b.txt")}):
        with pytest.raises(ValueError, match="(?s)--prompts.*--prompt"):
            sample.Args(output_dir=Path("o"), **given)
    counts = (
        "num_images_per_prompt", "num_inference_steps", "height", "width", "batch_size",
        "max_sequence_length",
    )  # fmt: skip
    for name in counts:
        with pytest.raises(ValueError, match=f"--{name} is 0.*more than 0"):
            sample.Args(output_dir=Path("o"), prompt="a", **{name: 0})
    with pytest.raises(ValueError, match="--guidance_scale is nan"):
        sample.Args(output_dir=Path("o"), prompt="a", guidance_scale=math.nan)
    for name, size in (("width", 68), ("height", 136)):
        message = refused(ValueError, tmp_path / "a", **QUICK | {name: size})
        assert all(word in message for word in (f"--{name}", str(size), "8", "128"))
    run(tmp_path / "a", **QUICK | {"width": 72})  # the same folder is free for what fits
    assert Image.open(tmp_path / "a" / FIRST).size == (72, 64)


def test_every_flag_is_read_and_has_a_text_that_explains_it():
    tree = ast.parse(inspect.getsource(sample))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in nodes if ast.unparse(node.value) == "args"}
    flags = {field.name for field in dataclasses.fields(sample.Args)}
    body = next(node for node in tree.body if getattr(node, "name", "") == "Args").body
    explained = set()
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            explained.add(field.target.id)
    assert flags - used == set() and explained == flags


def test_published_protocol_is_the_default():
    args = sample.Args(output_dir=Path("o"), prompt="a")
    assert (args.num_images_per_prompt, args.num_inference_steps) == (4, 40)
    assert (args.guidance_scale, args.height, args.width) == (4.5, 512, 512)
    assert (args.transformer, args.mixed_precision) == (("base",), "bf16")
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3.5-medium"
