"""sample.py on the small Stable Diffusion 3 pipeline of experiments/shapes_data."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

import sample
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH
from experiments.tests.common import MODEL, launch

SAMPLE = MODEL | {"height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    prompts = (DATA / "prompts.jsonl").read_text().splitlines()[::200][:3]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    for name, processes, batch_size in (("1x1", 1, 1), ("1x4", 1, 4), ("2x4", 2, 4)):
        flags = SAMPLE | {"prompts": folder / "prompts.jsonl", "batch_size": batch_size}
        done = launch(processes, "sample.py", output_dir=folder / name, **flags)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_images_do_not_depend_on_the_number_of_processes_and_by_a_grey_level_on_the_batch_size(images):
    reference = images / "1x4"
    paths = sorted(path.relative_to(reference) for path in reference.rglob("*") if path.is_file())
    for other in ("1x1", "2x4"):
        assert sorted(p.relative_to(images / other) for p in (images / other).rglob("*") if p.is_file()) == paths
    assert [p for p in paths if (images / "2x4" / p).read_bytes() != (reference / p).read_bytes()] == []
    for path in (p for p in paths if p.suffix == ".png"):
        a, b = (np.asarray(Image.open(images / name / path)).astype(int) for name in ("1x4", "1x1"))
        assert np.abs(a - b).max() <= 1


def test_layout_is_genevals(images):
    for index, line in enumerate((images / "prompts.jsonl").read_text().splitlines()):
        folder = images / "1x1" / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["00000.png", "00001.png"]
        assert Image.open(folder / "grid.png").size == (128, 64)
    first = [
        (images / "1x1" / f"{i:05d}" / "samples" / f"{j:05d}.png").read_bytes() for i in range(3) for j in range(2)
    ]
    assert len(set(first)) == 6


def test_image_is_the_diffusers_pipelines_image_from_the_same_noise(images):
    pipe = StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    prompts = [json.loads(line)["prompt"] for line in (images / "prompts.jsonl").read_text().splitlines()]
    for i, prompt in enumerate(prompts):
        z1 = torch.randn(1, 16, 8, 8, generator=sample.seeded(3, i, 1))
        options = {"latents": z1, "num_inference_steps": 6, "guidance_scale": 4.5}
        image = pipe(prompt, height=64, width=64, max_sequence_length=MAX_SEQUENCE_LENGTH, **options).images[0]
        ours = Image.open(images / "1x1" / f"{i:05d}" / "samples" / "00001.png")
        assert np.abs(np.asarray(image).astype(int) - np.asarray(ours).astype(int)).max() <= 1


def test_transformer_of_a_checkpoint_changes_the_image_and_unguided_sampling_runs(tmp_path):
    model = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer")
    with torch.no_grad():
        model.proj_out.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "checkpoint" / "transformer")
    flags = SAMPLE | {"prompt": "a photo of a red circle", "guidance_scale": 1.0}
    flags = {name: Path(v) if name == "output_dir" else v for name, v in flags.items()}
    for name, transformer in (
        ("a", None),
        ("b", tmp_path / "checkpoint"),
        ("c", tmp_path / "checkpoint" / "transformer"),
    ):
        sample.main(sample.Args(output_dir=tmp_path / name, transformer=transformer, **flags))
    a, b, c = (np.asarray(Image.open(tmp_path / name / "00000" / "samples" / "00000.png")) for name in "abc")
    assert (a != b).any() and (b == c).all()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p.jsonl, line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r'p.jsonl, line 2: no "prompt"'),
        ("p.jsonl", '{"prompt": 3}\n', r'p.jsonl, line 1: no "prompt"'),
        ("p.jsonl", "[]\n", r'p.jsonl, line 1: no "prompt"'),
        ("p.txt", "a\n\nb\n", r'p.txt, line 2: no "prompt"'),
        ("p.txt", "", r"p.txt is empty"),
        ("p.csv", "a\n", r"p.csv: expected a .jsonl or a .txt file"),
    ],
)
def test_prompt_file_errors_name_the_file_and_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sample.read_prompts(tmp_path / name)


def test_either_a_prompt_or_a_file_is_wanted():
    for given in ({}, {"prompt": "a", "prompts": Path("b.txt")}):
        with pytest.raises(ValueError, match="give either --prompts FILE or --prompt TEXT"):
            sample.Args(output_dir=Path("o"), **given)
    with pytest.raises(ValueError, match="--batch_size is 0, expected at least 1"):
        sample.Args(output_dir=Path("o"), prompt="a", batch_size=0)


def test_every_flag_is_read():
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(sample))) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value) == "args"}
    assert {field.name for field in dataclasses.fields(sample.Args)} - read == set()


def test_output_dir_of_another_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is not empty"):
        sample.main(sample.Args(output_dir=tmp_path, prompt="a photo of a circle", **MODEL))
