"""What sample.py draws: from which noise, in which files, by how many processes, killed or not."""

import json
import os
import re
import shutil
import signal
import socket
import time
import weakref

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

import sample
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH
from experiments.tests.common import finish, fork, start
from experiments.tests.top.sampling import (
    BASE,
    FIRST,
    ONE,
    SAMPLE,
    contents,
    pixels,
    refused,
    run,
    write_prompts,
)
from experiments.tests.top.training import ends

LINES = (DATA / "prompts.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three prompts, two images each, with batches of 1 and of 4, by one process and by two."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "prompts.jsonl").write_text("\n".join(LINES[::200][:3]))
    flags = SAMPLE | {"prompts": folder / "prompts.jsonl"}
    run(folder / "1x1", batch_size=1, **flags)
    run(folder / "1x4", batch_size=4, **flags)
    ended, said = ends(2, lambda: run(folder / "2x4", batch_size=4, **flags), folder / "log")
    assert ended == [0, 0], said
    return folder


@pytest.fixture
def noise_drawn(monkeypatch) -> list[torch.Tensor]:
    """The noise of each batch that this test draws."""
    seen, original = [], sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda *x: seen.append(x[2]) or original(*x))
    return seen


# --- Determinism ----------------------------------------------------------------------------------


def test_files_are_those_of_any_number_of_processes_and_nearly_of_any_batch_size(images):
    assert contents(images / "2x4") == contents(images / "1x4")
    names = {name for name in contents(images / "1x4") if name.endswith(".png")}
    others = {name for name in contents(images / "1x1") if name.endswith(".png")}
    assert len(names) == 9 and names == others
    for name in names:
        difference = pixels(images / "1x4" / name) - pixels(images / "1x1" / name)
        assert np.abs(difference).max() <= 1


def test_noise_is_a_function_of_seed_prompt_and_earlier_images_of_it(tmp_path, noise_drawn):
    texts = ["a circle", "a square", "a circle"]
    flags = write_prompts(tmp_path / "p.txt", texts) | {"num_images_per_prompt": 3}
    run(tmp_path / "a", batch_size=5, **flags)
    run(tmp_path / "b", batch_size=2, **flags)
    assert [len(z1) for z1 in noise_drawn] == [5, 4, 2, 2, 2, 2, 1]
    keys = [(3, "a circle", n) for n in range(3)] + [(3, "a square", n) for n in range(3)]
    keys += [(3, "a circle", n) for n in range(3, 6)]
    expected = torch.stack([torch.randn(16, 8, 8, generator=sample.seeded(*x)) for x in keys])
    for z1 in (noise_drawn[:2], noise_drawn[2:]):
        assert torch.equal(torch.cat(z1), expected)
    assert len({x.numpy().tobytes() for x in expected}) == 9


def test_rank_of_other_settings_than_rank_0_ends(tmp_path):
    def act() -> None:
        run(tmp_path / "out", **ONE | {"seed": 3 + int(os.environ["RANK"])})

    ended, said = ends(2, act, tmp_path / "log")
    assert ended == [1, 1] and "seed: was 3, now 4" in said[1]


def test_three_processes_killed_end_with_the_files_of_one(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(LINES[::40][:14]) + "\n")
    flags = SAMPLE | {"prompts": tmp_path / "prompts.jsonl", "num_images_per_prompt": 1}
    flags |= {"batch_size": 2, "num_inference_steps": 4}
    reference, killed = run(tmp_path / "reference", **flags), tmp_path / "killed"
    ranks = fork(3, lambda: run(killed, **flags), tmp_path / "log")
    while not list(killed.glob("*/samples/*.png")):
        assert all(rank.is_alive() for rank in ranks), (tmp_path / "log.0").read_text()
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert 1 <= len(list(killed.glob("*/samples/*.png"))) < 14
    assert not (killed / "samples.jsonl").exists()
    ended, said = ends(3, lambda: run(killed, **flags), tmp_path / "log")
    assert ended == [0, 0, 0], said
    assert len(contents(killed)) == 14 * 3 + 2 and contents(killed) == contents(reference)
    assert not list(killed.rglob("*.tmp"))


def test_batch_partly_there_is_drawn_whole_and_files_are_kept(images, tmp_path, noise_drawn):
    folder = tmp_path / "run"
    shutil.copytree(images / "1x4", folder)
    for name in ("00002/samples/00000.png", "00002/grid.png", "samples.jsonl"):
        (folder / name).unlink()
    beside = ("Thumbs.db", "._0.png", ".ipynb_checkpoints/00000-checkpoint.png", ".00000.png.tmp")
    others = [folder / "00002/samples" / name for name in beside]  # of file browsers, of a run
    others[2].parent.mkdir()
    for path in others:
        path.write_bytes(b"half an im")
    kept = folder / "00002/samples/00001.png"
    before = kept.stat().st_mtime_ns
    for _ in range(2):  # the second run finds all
        run(folder, **SAMPLE, batch_size=4, prompts=images / "prompts.jsonl")
        assert [len(x) for x in noise_drawn] == [2]  # of six images the last two are a batch
        assert kept.stat().st_mtime_ns == before
        assert [path.exists() for path in others] == [True, True, True, False]
    others[0].unlink()
    assert contents(folder) == contents(images / "1x4")


def test_second_run_in_a_folder_is_refused_and_an_interrupt_leaves_whole_files(tmp_path):
    flags = write_prompts(tmp_path / "p.txt", ["a photo of a circle"] * 40)
    flags |= {"num_images_per_prompt": 2, "num_inference_steps": 20}
    out, words = tmp_path / "out", {key: x for key, x in flags.items() if x is not None}
    with sample.locked(out):
        pass  # a holder before, who is not named
    process = start("sample.py", output_dir=out, **words)
    while not list(out.glob("*/samples/*.png")):
        assert process.poll() is None, finish(process).stderr[-3000:]
        time.sleep(0.01)
    message = refused(out, str(out), socket.gethostname(), kind=RuntimeError, **flags)
    assert re.findall(r"process (\d+)", message) == [str(process.pid)]
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr + done.stdout
    assert "the same command" in done.stdout.strip().splitlines()[-1]
    found = list(out.glob("*/samples/*"))
    assert 0 < len(found) < 80 and not list(tmp_path.rglob("*.tmp"))
    assert all(Image.open(path).convert("RGB").size == (64, 64) for path in found)
    bars = re.split(r"[\r\n]+", done.stderr.strip())
    assert all(re.match(r"out: +\d+%", bar) for bar in bars)  # no library's warning among them
    with sample.locked(out):
        pass  # the lock has ended with its process


# --- Output ---------------------------------------------------------------------------------------


def test_genevals_folder_walk_and_the_list_of_samples_find_every_image_and_rank_0_says_so(images):
    lines = [json.loads(line) for line in (images / "prompts.jsonl").read_text().splitlines()]
    found, listed = [], []
    for i, name in enumerate(sorted(filter(str.isdigit, os.listdir(images / "2x4")))):
        folder = images / "2x4" / name
        assert json.loads((folder / "metadata.jsonl").read_text()) == lines[i]
        for j, image in enumerate(sorted(os.listdir(folder / "samples"))):
            found.append(pixels(folder / "samples" / image))
            row = {"file": f"{i:05d}/samples/{j:05d}.png", "prompt": lines[i]["prompt"]}
            row |= {"prompt_index": i, "image_index": j, "seed": 3, "noise_index": j}
            listed.append(row)
        assert (pixels(folder / "grid.png") == np.concatenate(found[-2:], axis=1)).all()
    text = (images / "2x4/samples.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == listed
    assert len(lines) == 3 and len({x.tobytes() for x in found}) == len(listed) == 6
    assert all((images / "2x4" / row["file"]).is_file() for row in listed)
    said = (images / "log.0").read_text()
    assert "0 of 3 prompts are cut at 12 tokens\n" in said and " 1/1 " in said  # of two batches
    assert re.search(r"^6 images in .*2x4$", said, re.M)
    assert "/" not in (images / "log.1").read_text()


def test_image_that_is_missing_at_the_end_is_an_error_and_no_list_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw_images", lambda *_: None)
    refused(tmp_path / "a", FIRST, kind=FileNotFoundError, **ONE)
    assert not (tmp_path / "a/samples.jsonl").exists()


# --- What an image is -----------------------------------------------------------------------------


def test_several_transformers_are_compared_from_the_same_noise(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    flags = write_prompts(tmp_path / "p.txt", [f"a photo of {n} circles" for n in range(18)])
    flags |= {"batch_size": 18, "num_inference_steps": 1}
    given = ("base", "./run", f"lora/{sample.LORA}")
    run(tmp_path / "out", transformer=given, **flags)
    names = ["base", "run", f"lora-{sample.LORA}"]
    assert {path.name for path in sample.visible(tmp_path / "out")} == {*names, "compare.png"}
    drawn = [path.read_bytes() for path in (tmp_path / "out").glob("*/*/samples/*.png")]
    assert len(drawn) == len(set(drawn)) == 3 * 18
    sheet = Image.open(tmp_path / "out/compare.png")
    assert sheet.size == (3 * 64, 9 * 64)  # 18 prompts are more than 16, so every second one
    for row, column in ((0, 0), (8, 1), (3, 2)):
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        path = tmp_path / "out" / names[column] / f"{2 * row:05d}/samples/00000.png"
        assert (np.asarray(tile) == pixels(path)).all()
    flags |= {"transformer": ("run", "lora"), "seed": 5}
    refused(tmp_path / "out", str(tmp_path / "out/run"), "seed: was 3, now 5", **flags)


def test_diffusers_with_a_saved_transformer_or_lora_draws_the_same_image(trained, tmp_path):
    options = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 4.5}
    options |= {"max_sequence_length": MAX_SEQUENCE_LENGTH, "prompt": "a blue square"}
    flags = ONE | options
    options["latents"] = torch.randn(1, 16, 8, 8, generator=sample.seeded(3, "a blue square", 0))
    model = SD3Transformer2DModel.from_pretrained(trained / "run/checkpoint-000007/transformer")
    checkpoint = StableDiffusion3Pipeline.from_pretrained(BASE, transformer=model)
    lora = StableDiffusion3Pipeline.from_pretrained(BASE)
    lora.load_lora_weights(trained / "lora")
    base = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipes = {"base": base, str(trained / "run"): checkpoint, str(trained / "lora"): lora}
    shown = []
    for number, (given, pipe) in enumerate(pipes.items()):
        theirs = np.asarray(pipe(**options).images[0]).astype(int)
        shown.append(pixels(run(tmp_path / str(number), transformer=(given,), **flags) / FIRST))
        assert np.abs(theirs - shown[-1]).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 8 and np.abs(shown[0] - shown[2]).max() > 8


# --- Speed ----------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_encoders_freed_branches_share_a_forward(tmp_path, monkeypatch):
    encoded, encoders, freed, forwards = [], [], [], []
    encode, load = sample.encode_prompts, sample.load_transformer
    forward = SD3Transformer2DModel.forward

    def encoding(pipe, texts, length):
        encoded.append(texts)
        encoders[:] = [weakref.ref(getattr(pipe, name)) for name in sample.ENCODERS]
        return encode(pipe, texts, length)

    def loading(*args):
        freed.extend(part() is None for part in encoders)
        return load(*args)

    def counting(self, hidden_states, *args, **kwargs):
        forwards.append((len(hidden_states), hidden_states.dtype))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(sample, "encode_prompts", encoding)
    monkeypatch.setattr(sample, "load_transformer", loading)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    texts = [f"a photo of {n} circles" for n in range(18)]
    flags = write_prompts(tmp_path / "p.txt", texts + texts[:2])
    flags |= {"batch_size": 10, "num_inference_steps": 1}
    run(tmp_path / "a", **flags)
    assert [len(part) for part in encoded] == [16, 3] and freed == [True] * 3
    assert sorted(sum(encoded, [])) == sorted(["", *texts])
    run(tmp_path / "b", **flags | {"mixed_precision": "bf16", "guidance_scale": 1.0})
    assert forwards == [(20, torch.float32)] * 2 + [(10, torch.bfloat16)] * 2


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
    flags = ONE | {"transformer": (str(tmp_path / "one-layer"),)}
    eager = run(tmp_path / "a", **flags)
    assert not calls
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "b", compile=True, **flags)
    # No graphs of another transformer, and one size at a time: a kernel for any size would depend
    # on the batches that came before.
    assert calls == ["reset", {"dynamic": False}]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert np.abs(pixels(eager / FIRST) - pixels(compiled / FIRST)).max() <= 1
