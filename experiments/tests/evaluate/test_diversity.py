"""Whether images differ: the measures, worked by hand, and folders in any features."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from experiments.evaluate import diversity
from experiments.tests.common import MODEL


def test_vendi_score_equals_cases_worked_by_hand():
    assert diversity.vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert diversity.vendi_score(np.diag([1.0, 2, 3, 4])) == pytest.approx(4)
    assert diversity.vendi_score(np.eye(2).repeat(2, axis=0)) == pytest.approx(2)
    # Two vectors at 60 degrees: K / 2 has the eigenvalues (1 +- 0.5) / 2.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    pair = np.array([[1, 0], [0.5, math.sqrt(0.75)]])
    assert diversity.vendi_score(pair) == pytest.approx(expected)


def test_mean_distance_equals_a_right_triangles():
    assert diversity.mean_distance(np.array([[0.0, 0], [3, 0], [0, 4]])) == pytest.approx(4)


VAE = MODEL["pretrained_model_name_or_path"] + "/vae"


def make_folder(folder: Path, images_of_prompts: list[list[Image.Image]]) -> Path:
    for i, images in enumerate(images_of_prompts):
        (folder / f"{i:05d}/samples").mkdir(parents=True)
        line = json.dumps({"prompt": f"prompt {i}"})
        (folder / f"{i:05d}/metadata.jsonl").write_text(line)
        for j, image in enumerate(images):
            image.save(folder / f"{i:05d}/samples/{j:05d}.png")
    return folder


def drawn(x: int, color: str = "red") -> Image.Image:
    image = Image.new("RGB", (64, 64), (230, 230, 230))
    ImageDraw.Draw(image).ellipse((x - 10, 22, x + 10, 42), color)
    return image


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    places = zip((12, 20, 44, 50), ("red", "green", "blue", "yellow"))
    different = [drawn(x, color) for x, color in places]
    same = make_folder(tmp_path / "same", [[drawn(20)] * 4, [drawn(44)] * 4])
    return same, make_folder(tmp_path / "other", [different, different])


def save_vision_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = size | {"image_size": 28, "patch_size": 14}
    scale = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if kind == "dino":
        Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder)
        BitImageProcessorPil(**scale).save_pretrained(folder)
    else:
        text = size | {"vocab_size": 20}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
        CLIPImageProcessorPil(**scale).save_pretrained(folder)


@pytest.mark.parametrize("features", ["vae", "dino", "clip"])
def test_diversity_is_least_for_equal_images_in_any_features(
    folders, tmp_path, features, monkeypatch
):
    """Also in batches that end within a prompt."""
    monkeypatch.setattr(diversity, "BATCH", 3)
    if features == "vae":
        name = VAE
    else:
        name = str(tmp_path / features)
        save_vision_model(tmp_path / features, features)
    same, other = diversity.measure(folders, name).values()
    assert same.vendi == pytest.approx(1, abs=1e-3)
    assert same.distance == pytest.approx(0, abs=1e-3)
    assert 1.1 < other.vendi <= 4 and other.distance > 10 * same.distance
    assert (same.prompts, same.images) == (2, 4)


def test_features_are_centred_on_the_mean_of_all_folders(tmp_path, monkeypatch):
    """One prompt, two images of one pixel; red and green are the features."""
    colors = {"a": [(0, 0, 0), (0, 10, 0)], "b": [(20, 0, 0), (20, 10, 0)]}
    folders = []
    for name, pair in colors.items():
        images = [[Image.new("RGB", (1, 1), color) for color in pair]]
        folders.append(make_folder(tmp_path / name, images))
    def extract(images):
        return np.array([image.getpixel((0, 0))[:2] for image in images])
    monkeypatch.setattr(diversity, "Extractor", lambda features: extract)
    # Less their mean, (10, 5), a folder's images have the cosine 0.6: eigenvalues 0.8 and 0.2
    expected = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    made = diversity.measure(tuple(folders), "").values()
    assert [x.vendi for x in made] == pytest.approx([expected, expected])
    assert [x.distance for x in made] == [10, 10]


def test_diversity_refuses_folders_that_do_not_compare(folders, tmp_path):
    one = make_folder(tmp_path / "one", [[drawn(20)]])
    three = make_folder(tmp_path / "three", [[drawn(20)] * 3])
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (folders[:1], "2 or more folders"),
        ((one, make_folder(tmp_path / "two", [[drawn(20)]])), "1 to 1 images"),
        ((folders[0], three), "3 to 4 images"),
        ((folders[0], tmp_path / "empty"), "common prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            diversity.measure(wrong, VAE)
    (three / "00000/metadata.jsonl").write_text('{"prompt": "another"}')
    with pytest.raises(ValueError, match="common prompt"):
        diversity.measure((folders[0], three), VAE)
