"""sample.py on the small Stable Diffusion 3 pipeline of experiments/shapes_data."""

import ast
import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from experiments import sd3
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH
from experiments.tests.common import MODEL, ROOT, finish, launch, start

SAMPLE = MODEL | {"height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 6, "seed": 3}
QUICK = SAMPLE | {"prompt": "a photo of a red circle", "num_images_per_prompt": 1, "num_inference_steps": 2}
LINES = (DATA / "prompts.jsonl").read_text().splitlines()


@pytest.fixture(autouse=True)
def alone():
    """One thread, as the launched processes have; and no process group is left over where a run raised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(output_dir: Path, **flags) -> Path:
    sample.main(sample.Args(output_dir=output_dir, **flags))
    return output_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def read(folder: Path) -> dict:
    return json.loads((folder / "protocol.json").read_text())


def base_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer")


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
    """A checkpoint as train.py writes it, with other weights than the base's, and a link to it; a LoRA of the base."""
    folder = tmp_path_factory.mktemp("trained")
    model = base_transformer()
    with torch.no_grad():
        model.proj_out.weight.mul_(1.1)
    model.save_pretrained(folder / "checkpoint-000007" / "transformer")
    state = {"step": 7, "settings": {"max_sequence_length": MAX_SEQUENCE_LENGTH}}
    (folder / "checkpoint-000007" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "final").symlink_to("checkpoint-000007")
    model = base_transformer()
    targets = ["to_q", "proj_out"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets))
    layers = get_peft_model_state_dict(model)
    metadata = model.peft_config["default"].to_dict()
    options = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": metadata}
    StableDiffusion3Pipeline.save_lora_weights(folder / "lora", **options)
    return folder


# --- Determinism ------------------------------------------------------------------------------------------------------


def test_files_do_not_depend_on_the_number_of_processes_and_by_a_grey_level_on_the_batch_size(images):
    assert contents(images / "2x4") == contents(images / "1x4")
    names = {name for name in contents(images / "1x4") if name.endswith(".png")}
    assert len(names) == 9 and names == {name for name in contents(images / "1x1") if name.endswith(".png")}
    for name in names:
        assert np.abs(pixels(images / "1x4" / name) - pixels(images / "1x1" / name)).max() <= 1


def test_noise_is_a_function_of_seed_prompt_index_and_image_index_alone(tmp_path, monkeypatch):
    seen = []
    original = sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda *args: seen.append(args[2]) or original(*args))
    (tmp_path / "p.txt").write_text("a photo of a circle\na photo of a circle\na photo of a square\n")
    flags = QUICK | {"prompt": None, "prompts": tmp_path / "p.txt", "num_images_per_prompt": 3}
    run(tmp_path / "a", batch_size=5, **flags)
    run(tmp_path / "b", batch_size=2, **flags)
    noise = torch.cat(seen[:2])
    assert [len(z1) for z1 in seen] == [5, 4, 2, 2, 2, 2, 1] and torch.equal(noise, torch.cat(seen[2:]))
    expected = [torch.randn(16, 8, 8, generator=sample.seeded(3, i, j)) for i in range(3) for j in range(3)]
    assert torch.equal(noise, torch.stack(expected))
    assert len({x.numpy().tobytes() for x in noise}) == 9
    other = run(tmp_path / "c", **QUICK | {"seed": 4}) / "00000" / "samples" / "00000.png"
    assert (pixels(other) != pixels(run(tmp_path / "d", **QUICK) / "00000" / "samples" / "00000.png")).any()


def test_three_processes_killed_twice_end_with_the_files_of_one_uninterrupted_process(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(LINES[::30][:20]) + "\n")
    flags = SAMPLE | {"prompts": tmp_path / "prompts.jsonl", "num_images_per_prompt": 1}
    flags |= {"batch_size": 2, "num_inference_steps": 50}
    reference, output_dir = run(tmp_path / "reference", **flags), tmp_path / "killed"
    for at_least in (1, 9):
        process = start(3, "sample.py", output_dir=output_dir, **flags)
        while len(list(output_dir.glob("*/samples/*.png"))) < at_least:
            assert process.poll() is None, finish(process).stderr[-3000:]
            time.sleep(0.01)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            each.kill()
        psutil.wait_procs(tree)
        process.communicate()
        assert len(tree) >= 4 and at_least <= len(list(output_dir.glob("*/samples/*.png"))) < 20
        assert not (output_dir / "samples.jsonl").exists()
    done = launch(3, "sample.py", output_dir=output_dir, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(contents(output_dir)) == 20 * 3 + 2 and contents(output_dir) == contents(reference)
    assert re.search(r" 20/20 ", done.stderr) and not re.search(r" 0/20 ", done.stderr)  # the bar starts where it was


def test_batch_that_is_partly_there_is_computed_whole_and_only_what_is_missing_is_written(
    images, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(images / "1x4", folder)
    for name in ("00002/samples/00000.png", "00002/grid.png", "samples.jsonl"):
        (folder / name).unlink()
    (folder / "00000" / "samples" / ".00001.png.17.tmp").write_bytes(b"half an im")
    kept = folder / "00002" / "samples" / "00001.png"
    before, sizes, original = kept.stat().st_mtime_ns, [], sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda *args: sizes.append(len(args[2])) or original(*args))
    run(folder, batch_size=4, prompts=images / "prompts.jsonl", **SAMPLE)
    assert sizes == [2]  # of six images the last two are a batch
    assert contents(folder) == contents(images / "1x4") and kept.stat().st_mtime_ns == before
    sizes.clear()
    run(folder, batch_size=4, prompts=images / "prompts.jsonl", **SAMPLE)
    assert sizes == [] and contents(folder) == contents(images / "1x4")


def test_interrupt_leaves_whole_files_and_ends_with_130_and_one_line(tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a circle\n" * 40)
    flags = SAMPLE | {"prompts": tmp_path / "p.txt", "num_inference_steps": 20}
    process = start(1, "sample.py", output_dir=tmp_path / "out", **flags)
    while not list(tmp_path.glob("out/*/samples/*.png")):
        assert process.poll() is None, finish(process).stderr[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr + done.stdout
    assert done.stdout.strip().splitlines()[-1].endswith("the same command goes on from here")
    found = list(tmp_path.glob("out/*/samples/*"))
    assert 0 < len(found) < 80 and all(Image.open(path).convert("RGB").size == (64, 64) for path in found)
    assert not list(tmp_path.rglob("*.tmp"))


# --- Output -----------------------------------------------------------------------------------------------------------


def test_genevals_folder_walk_finds_every_image_and_its_metadata(images):
    lines, found = [json.loads(line) for line in (images / "prompts.jsonl").read_text().splitlines()], []
    for name in os.listdir(images / "2x4"):
        if os.path.isdir(images / "2x4" / name) and name.isdigit():
            with open(images / "2x4" / name / "metadata.jsonl") as file:
                metadata = json.load(file)
            assert metadata == lines[int(name)]
            for image in os.listdir(images / "2x4" / name / "samples"):
                assert re.match(r"\d+\.png", image)
                found.append((int(name), image, pixels(images / "2x4" / name / "samples" / image).tobytes()))
            assert Image.open(images / "2x4" / name / "grid.png").size == (128, 64)
    assert sorted(x[:2] for x in found) == [(i, f"0000{j}.png") for i in range(3) for j in range(2)]
    assert len({x[2] for x in found}) == 6


def test_samples_list_names_every_image_with_its_prompt_indices_and_seed(images):
    prompts = [json.loads(line)["prompt"] for line in (images / "prompts.jsonl").read_text().splitlines()]
    expected = [
        {
            "file": f"0000{i}/samples/0000{j}.png",
            "prompt": prompts[i],
            "prompt_index": i,
            "image_index": j,
            "seed": 3,
        }
        for i in range(3)
        for j in range(2)
    ]
    assert [json.loads(line) for line in (images / "2x4" / "samples.jsonl").read_text().splitlines()] == expected


def test_protocol_holds_what_images_depend_on(images, trained, tmp_path):
    import diffusers
    import transformers

    protocol = read(run(tmp_path / "a", transformer=(str(trained / "final"),), **QUICK))
    assert len(protocol.pop("prompts_sha256")) == 64
    assert protocol == {
        "pretrained_model_name_or_path": str(DATA / "model"), "revision": None, "step": 7,
        "transformer": str((trained / "checkpoint-000007" / "transformer").resolve()),
        "scheduler": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_images_per_prompt": 1,
        "num_inference_steps": 2, "guidance_scale": 4.5, "height": 64, "width": 64, "seed": 3, "batch_size": 4,
        "mixed_precision": "no", "compile": False, "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    base = read(images / "1x1")
    assert (base["transformer"], base["step"], base["batch_size"]) == ("base", None, 1)


def test_revision_is_the_commit_of_the_hubs_snapshot(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(DATA / "model")
    flags = QUICK | {"pretrained_model_name_or_path": str(snapshot), "max_sequence_length": None}
    (job,) = sample.plan(sample.Args(output_dir=tmp_path / "a", **flags), [{"prompt": "a"}]).values()
    assert job[2]["revision"] == "0123456789" * 4 and job[2]["max_sequence_length"] == 77


@pytest.mark.parametrize("change", ["missing", "superfluous"])
def test_count_of_images_is_checked_at_the_end(tmp_path, monkeypatch, change):
    original = sample.save_whole

    def save(content, path):
        original(content, path)
        if path.name == "00001.png" and change == "superfluous":
            original(content, path.with_name("00002.png"))
        if path.name == "00000.png" and change == "missing":
            path.unlink()

    monkeypatch.setattr(sample, "save_whole", save)
    with pytest.raises(RuntimeError, match="1 images of .* missing or were not asked for, such as .*/0000[02].png"):
        run(tmp_path / "a", **QUICK | {"num_images_per_prompt": 2})
    assert not (tmp_path / "a" / "samples.jsonl").exists()


def test_bar_counts_all_processes_images_and_the_rate_is_printed(images, tmp_path):
    assert "6/6" in (images / "stderr").read_text()
    assert re.search(r"6 images of 3 prompts in .*2x4; \d+\.\d\d images/s", (images / "stdout").read_text())


def test_save_whole_leaves_the_old_file_where_writing_fails(tmp_path):
    class Broken(Image.Image):
        def save(self, file, format):
            file.write(b"half")
            raise KeyboardInterrupt

    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        sample.save_whole(Broken(), tmp_path / "a.png")
    assert contents(tmp_path) == {"a.png": b"old"}


# --- Another protocol -------------------------------------------------------------------------------------------------


def test_output_dir_of_another_protocol_is_refused_with_the_differences(images, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    flags = SAMPLE | {"prompts": images / "prompts.jsonl"}
    before = contents(images / "1x4")
    with pytest.raises(ValueError, match="protocol; guidance_scale: was 4.5, now 3.0; seed: was 3, now 4. Give"):
        run(images / "1x4", batch_size=4, **flags | {"guidance_scale": 3.0, "seed": 4})
    (tmp_path / "other.jsonl").write_text("\n".join(LINES[:3]))
    with pytest.raises(ValueError, match="protocol; prompts_sha256: was "):
        run(images / "1x4", batch_size=4, **flags | {"prompts": tmp_path / "other.jsonl"})
    assert contents(images / "1x4") == before


def test_output_dir_of_other_files_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is not empty and holds no run that could go on: no protocol.json"):
        run(tmp_path, **QUICK)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "protocol.json")
    with pytest.raises(ValueError, match="holds other files than a comparison's"):
        run(tmp_path, transformer=("base", str(DATA / "model" / "transformer")), **QUICK)


# --- Transformers -----------------------------------------------------------------------------------------------------


def test_several_transformers_each_get_a_folder_and_are_compared_from_the_same_noise(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    (tmp_path / "p.txt").write_text("".join(f"a photo of {n} circles\n" for n in range(18)))
    flags = QUICK | {"prompt": None, "prompts": tmp_path / "p.txt", "batch_size": 18}
    given = ("base", "final", "./checkpoint-000007/transformer", "lora", "lora/pytorch_lora_weights.safetensors")
    run(tmp_path / "out", transformer=given, **flags)
    names = ["base", "final", "checkpoint-000007-transformer", "lora", "lora-pytorch_lora_weights.safetensors"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "compare.png"}
    base, final, directory, lora, lora_file = (
        {name: x for name, x in contents(tmp_path / "out" / name).items() if name.endswith(".png")} for name in names
    )
    assert final == directory and lora == lora_file
    for a, b in ((base, final), (base, lora), (final, lora)):
        assert len(a) == 36 and not set(a.values()) & set(b.values())
    sheet = Image.open(tmp_path / "out" / "compare.png")
    assert sheet.size == (5 * 64, 9 * 64)  # 18 prompts are more than 16, so every second one
    for row, column in ((0, 0), (8, 1), (3, 3)):
        tile = sheet.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        path = tmp_path / "out" / names[column] / f"{2 * row:05d}" / "samples" / "00000.png"
        assert (np.asarray(tile) == pixels(path)).all()
    alone = run(tmp_path / "alone", transformer=("final",), **flags)
    assert contents(alone) == contents(tmp_path / "out" / "final")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(sample, "sample_images", lambda *_: pytest.fail("nothing was left to sample"))
    run(tmp_path / "out", transformer=given, **flags)
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="final was made under another protocol; seed: was 3, now 5"):
        run(tmp_path / "out", transformer=("final", "lora"), **flags | {"seed": 5})
    with pytest.raises(ValueError, match="two of these would write to one folder"):
        run(tmp_path / "twice", transformer=("base", "base"), **flags)


def test_diffusers_pipeline_with_a_saved_transformer_or_lora_draws_the_same_image(trained, tmp_path):
    prompt = "a photo of a blue square above a red circle"
    options = {"height": 64, "width": 64, "max_sequence_length": MAX_SEQUENCE_LENGTH, "num_inference_steps": 6}
    z1 = torch.randn(1, 16, 8, 8, generator=sample.seeded(3, 0, 0))
    model = SD3Transformer2DModel.from_pretrained(trained / "final" / "transformer", use_safetensors=True)
    checkpoint = StableDiffusion3Pipeline.from_pretrained(DATA / "model", transformer=model)
    lora = StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    lora.load_lora_weights(trained / "lora")
    base = StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    shown = []
    for pipe, given in ((base, "base"), (checkpoint, str(trained / "final")), (lora, str(trained / "lora"))):
        theirs = pipe(prompt, latents=z1, guidance_scale=4.5, **options).images[0]
        folder = tmp_path / str(len(shown))
        run(folder, transformer=(given,), **SAMPLE | {"prompt": prompt, "num_images_per_prompt": 1})
        shown.append(pixels(folder / "00000" / "samples" / "00000.png"))
        assert np.abs(np.asarray(theirs).astype(int) - shown[-1]).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 8 and np.abs(shown[0] - shown[2]).max() > 8


@pytest.mark.parametrize(
    "field, value",
    [
        ("in_channels", 4),
        ("joint_attention_dim", 32),
        ("pooled_projection_dim", 32),
        ("patch_size", 2),
        ("pos_embed_max_size", 8),
        ("_class_name", "FluxTransformer2DModel"),
    ],
)
def test_transformer_that_does_not_fit_is_refused_by_the_field(tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    config = json.loads((DATA / "model" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"{tmp_path} does not fit .*: {field} is {value}, not {config[field]}$"):
        run(tmp_path / "out", transformer=(str(tmp_path),), **QUICK)


def test_transformer_whose_weights_do_not_fit_is_refused_by_the_tensor(trained, tmp_path):
    weights = load_file(trained / "final" / "transformer" / "diffusion_pytorch_model.safetensors")
    lora = load_file(trained / "lora" / "pytorch_lora_weights.safetensors")
    del lora["transformer.proj_out.lora_A.weight"], lora["transformer.proj_out.lora_B.weight"]
    key, name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion_pytorch_model.safetensors"
    other, text = key.replace("blocks.0", "blocks.9"), "text_encoder.q_proj.lora_A.weight"
    for number, (tensors, named) in enumerate([
        ({k: x for k, x in weights.items() if k != "proj_out.bias"}, "proj_out.bias"),
        (weights | {"proj_out.scale": torch.ones(2)}, "proj_out.scale"),
        (lora | {text: torch.ones(2, 2)}, text),
        (lora | {other: lora[key].clone()}, other),
        ({k.removeprefix("transformer."): x for k, x in lora.items()}, ", transformer_blocks.0.attn"),
        (lora | {key: torch.cat([lora[key], lora[key]], 1)}, "size mismatch for transformer_blocks.0.attn.to_q"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(DATA / "model" / "transformer", folder)
        name = name if number < 2 else "pytorch_lora_weights.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"(?s){folder}.* does not fit .*{re.escape(named)}"):
            run(folder / "out", transformer=(str(folder),), **QUICK)
        torch.distributed.destroy_process_group()


def test_transformer_that_is_not_there_or_not_in_safetensors_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="--transformer nowhere is none of base, a checkpoint of train.py, a diff"
    ):
        run(tmp_path / "a", transformer=("nowhere",), **QUICK)
    shutil.copy(DATA / "model" / "transformer" / "config.json", tmp_path)
    torch.save(base_transformer().state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        run(tmp_path / "b", transformer=(str(tmp_path),), **QUICK)


def test_max_sequence_length_is_the_checkpoints_and_a_difference_is_said_aloud(trained, tmp_path, capsys):
    flags = QUICK | {"max_sequence_length": None}
    assert read(run(tmp_path / "a", transformer=(str(trained / "final"),), **flags))["max_sequence_length"] == 12
    assert "warning" not in capsys.readouterr().out
    run(tmp_path / "b", transformer=(str(trained / "final"),), **flags | {"max_sequence_length": 16})
    warning = f"warning: --max_sequence_length is 16, but {trained / 'final'} was trained with 12\n"
    assert warning in capsys.readouterr().out
    a, b = (pixels(tmp_path / name / "00000" / "samples" / "00000.png") for name in "ab")
    assert (a != b).any()
    shutil.copytree(trained / "checkpoint-000007", tmp_path / "other")
    state = {"step": 7, "settings": {"max_sequence_length": 9}}
    (tmp_path / "other" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"give --max_sequence_length: the checkpoints were trained with {.*12.*9}"):
        run(tmp_path / "c", transformer=(str(trained / "final"), str(tmp_path / "other")), **flags)


# --- Speed ------------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_in_batches_and_the_branches_share_a_forward(tmp_path, monkeypatch):
    encoded, forwards = [], []
    encode, forward = sample.encode_prompts, SD3Transformer2DModel.forward

    def counting(self, hidden_states, *args, **kwargs):
        forwards.append((len(hidden_states), hidden_states.dtype))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(sample, "encode_prompts", lambda pipe, x, length: encoded.append(x) or encode(pipe, x, length))
    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    texts = [f"a photo of {n} circles" for n in range(18)]
    (tmp_path / "p.txt").write_text("\n".join(texts + texts[:2]))
    flags = QUICK | {"prompt": None, "prompts": tmp_path / "p.txt", "batch_size": 10}
    run(tmp_path / "a", **flags)
    assert [len(chunk) for chunk in encoded] == [16, 3] and sorted(sum(encoded, [])) == sorted(["", *texts])
    assert forwards == [(20, torch.float32)] * 4
    forwards.clear()
    run(tmp_path / "b", **flags | {"mixed_precision": "bf16", "guidance_scale": 1.0})
    assert forwards == [(10, torch.bfloat16)] * 4


def test_bf16_draws_nearly_the_image_of_float32_and_no_guidance_another(tmp_path):
    flags = QUICK | {"num_inference_steps": 6}
    runs = {"a": flags, "b": flags | {"mixed_precision": "bf16"}, "c": flags | {"guidance_scale": 1.0}}
    a, b, c = (pixels(run(tmp_path / k, **x) / "00000" / "samples" / "00000.png") for k, x in runs.items())
    assert np.abs(a - b).mean() < 4 < np.abs(a - c).mean()


def test_vae_keeps_its_float32_weights_in_bf16():
    pipe = sd3.load_pipeline(str(DATA / "model"), torch.bfloat16, torch.device("cpu"))
    weights = load_file(DATA / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, weights[name].float()) for name, x in pipe.vae.state_dict().items())
    assert pipe.text_encoder_3.dtype == torch.bfloat16


def test_text_encoders_are_freed_before_the_transformer_is_loaded(tmp_path, monkeypatch):
    import weakref

    encoders, original, load = [], sample.load_pipeline, sample.load_transformer

    def loading(*args):
        pipe = original(*args)
        encoders.extend(weakref.ref(x) for x in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3))
        return pipe

    freed = []
    monkeypatch.setattr(sample, "load_pipeline", loading)
    monkeypatch.setattr(
        sample, "load_transformer", lambda *x: freed.append([e() is None for e in encoders]) or load(*x)
    )
    run(tmp_path / "a", offload_text_encoders=True, **QUICK)
    encoders.clear()
    run(tmp_path / "b", **QUICK)
    assert freed == [[True] * 3, [False] * 3] and contents(tmp_path / "a") == contents(tmp_path / "b")


def test_compiled_transformer_draws_the_image_of_the_eager_one(tmp_path, monkeypatch):
    calls, compile = [], SD3Transformer2DModel.compile

    def spy(self, **kwargs):
        calls.append(kwargs)
        compile(self, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "compile", spy)
    config = SD3Transformer2DModel.load_config(DATA / "model" / "transformer")
    torch.manual_seed(0)
    SD3Transformer2DModel.from_config(config | {"num_layers": 1}).save_pretrained(tmp_path / "one-layer")
    flags = QUICK | {"transformer": (str(tmp_path / "one-layer"),)}
    eager = run(tmp_path / "a", **flags)
    assert not calls
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "b", compile=True, **flags)
    # One size at a time: a kernel for any size would depend on the sizes that came before, so on what was left to do.
    assert calls == [{"dynamic": False}] and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    path = "00000/samples/00000.png"
    assert np.abs(pixels(eager / path) - pixels(compiled / path)).max() <= 1


# --- Prompts and flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'p.jsonl, line 2: no "prompt"'),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', "p.jsonl, line 2: not JSON"),
        ("p.jsonl", '{"prompt": 3}\n', 'p.jsonl, line 1: no "prompt"'),
        ("p.jsonl", "[]\n", 'p.jsonl, line 1: no "prompt"'),
        ("p.jsonl", "", "p.jsonl is empty"),
        ("p.txt", "a\n\nb\n", 'p.txt, line 2: no "prompt"'),
        ("p.txt", "a\nb\n  \n", 'p.txt, line 3: no "prompt"'),
        ("p.txt", "", "p.txt is empty"),
        ("p.txt", b"a\nb\n\xff\n", "p.txt, line 3: 'utf-8' codec can't decode"),
        ("p.csv", "", "p.csv is empty"),
        ("p.csv", "Prompts,Category\n", "p.csv holds a header and no prompt"),
        ("p.csv", "Text,Category\na,b\n", 'p.csv, line 2: no "prompt"'),
        ("p.csv", "Prompts,Category\na,b\n,b\n", 'p.csv, line 3: no "prompt"'),
        ("p.csv", "Prompts,Category\na,b\n\nc,d\n", "p.csv, line 3: "),
        ("p.csv", "Prompts,Category\na,b\na cat, a dog,b\n", "p.csv, line 3: "),
        ("p.csv", 'Prompts,Category\n"a\nb",c\n"d"e,f\n', "p.csv, line 4: "),
        ("p.json", "a\n", "p.json: expected a .jsonl, .txt or .csv file"),
    ],
)
def test_prompt_file_errors_name_the_file_and_the_line_before_the_model_loads(
    tmp_path, monkeypatch, name, text, message
):
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **QUICK | {"prompt": None, "prompts": tmp_path / name})
    assert not (tmp_path / "out").exists()


def test_prompt_files_of_the_benchmarks_are_read(tmp_path):
    geneval = [{"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}]
    geneval += [{"tag": "x", "include": [], "prompt": "zwei B\u00e4nke\u2028und eine", "exclude": None}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in geneval))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\r\n" for x in geneval))
    ocr = ['A sign that says "Hello, World"', 'Neon letters \u2028 "OPEN" at night; it\'s late']
    (tmp_path / "test.txt").write_text("\ufeff" + "\n".join(ocr))
    bench = [("A red car.", "Colors"), ('A sign that says "Hi",\nin two lines', "Text")]
    with (tmp_path / "drawbench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *bench])
    assert sample.read_prompts(tmp_path / "evaluation_metadata.jsonl") == geneval
    assert sample.read_prompts(tmp_path / "plain.jsonl") == geneval
    assert sample.read_prompts(tmp_path / "test.txt") == [{"prompt": text} for text in ocr]
    assert sample.read_prompts(tmp_path / "drawbench.csv") == [{"prompt": a, "Category": b} for a, b in bench]
    (tmp_path / "lower.csv").write_text("id, PROMPT\r\n1,a\r\n2,b\r\n")
    assert [row["prompt"] for row in sample.read_prompts(tmp_path / "lower.csv")] == ["a", "b"]


def test_flags_out_of_range_are_errors_that_name_them(tmp_path):
    for given in ({}, {"prompt": "a", "prompts": Path("b.txt")}):
        with pytest.raises(ValueError, match="give either --prompts FILE or --prompt TEXT"):
            sample.Args(output_dir=Path("o"), **given)
    for name in ("batch_size", "max_sequence_length", "num_inference_steps"):
        with pytest.raises(ValueError, match=f"--{name} is 0, expected at least 1"):
            sample.Args(output_dir=Path("o"), prompt="a", **{name: 0})
    with pytest.raises(ValueError, match="--width is 68, expected a multiple of 8 pixels, at most 128"):
        run(tmp_path / "a", **QUICK | {"width": 68})
    assert not (tmp_path / "a").exists()  # or the mended command would be refused


def test_every_flag_is_read_and_has_one_line_that_explains_it():
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(sample))) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value) == "args"}
    flags = {field.name for field in dataclasses.fields(sample.Args)}
    body = next(x for x in ast.parse(inspect.getsource(sample)).body if getattr(x, "name", "") == "Args").body
    explained = {
        a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }
    assert flags - read == set() and explained == flags


def test_published_protocol_is_the_default():
    args = sample.Args(output_dir=Path("o"), prompt="a")
    assert (args.num_images_per_prompt, args.num_inference_steps, args.guidance_scale) == (4, 40, 4.5)
    assert (args.height, args.width, args.transformer, args.mixed_precision) == (512, 512, ("base",), "bf16")


def test_code_is_within_its_bounds():
    lines = (ROOT / "sample.py").read_text().splitlines()
    assert len(lines) <= 280 and max(map(len, lines)) <= 120
