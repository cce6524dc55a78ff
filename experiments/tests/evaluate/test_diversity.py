"""Whether images differ: the measures, worked by hand, and folders in any features."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from experiments.evaluate import diversity
from experiments.shapes.draw import COLORS, Scene, Thing, render


def test_vendi_score_equals_cases_worked_by_hand():
    assert diversity.vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert diversity.vendi_score(np.diag([1.0, 2, 3, 4])) == pytest.approx(4)
    assert diversity.vendi_score(np.eye(2).repeat(2, axis=0)) == pytest.approx(2)
    # Two vectors at 60 degrees: K / 2 has the eigenvalues (1 +- 0.5) / 2.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert diversity.vendi_score(np.array([[1, 0], [0.5, math.sqrt(0.75)]])) == pytest.approx(expected)


def test_mean_distance_equals_a_right_triangles():
    assert diversity.mean_distance(np.array([[0.0, 0], [3, 0], [0, 4]])) == pytest.approx(4)


def make_folder(folder, images_of_prompts):
    for i, images in enumerate(images_of_prompts):
        (folder / f"{i:05d}/samples").mkdir(parents=True)
        (folder / f"{i:05d}/metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {i}"}))
        for j, image in enumerate(images):
            image.save(folder / f"{i:05d}/samples/{j:05d}.png")
    return folder


def drawn(x, color="red"):
    return render(Scene((Thing("circle", color, x, 32, 10),), (230, 230, 230)))


@pytest.fixture
def folders(tmp_path):
    same = [[drawn(20)] * 4, [drawn(44)] * 4]
    other = [[drawn(x, color) for x, color in zip((12, 20, 44, 50), COLORS)] for _ in range(2)]
    return make_folder(tmp_path / "same", same), make_folder(tmp_path / "other", other)


@pytest.mark.parametrize("features", ["vae", "dino", "clip"])
def test_diversity_is_least_for_equal_images_in_any_features(folders, tmp_path, features):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    scale = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if features == "dino":
        Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / features)
        BitImageProcessorPil(**scale).save_pretrained(tmp_path / features)
    elif features == "clip":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
        config = CLIPConfig(text_config=text, vision_config=size, projection_dim=8)
        CLIPModel(config).save_pretrained(tmp_path / features)
        CLIPImageProcessorPil(**scale).save_pretrained(tmp_path / features)
    name = features if features == "vae" else str(tmp_path / features)
    same, other = diversity.measure(diversity.Args(folders, name, layouts=True, batch_size=3)).values()
    assert same.vendi == pytest.approx(1, abs=1e-3) and same.distance == pytest.approx(0, abs=1e-3)
    assert 1.1 < other.vendi <= 4 and other.distance > 10 * same.distance
    assert (same.layouts, other.layouts, same.prompts, same.images) == (1, 4, 2, 4)


def test_diversity_refuses_folders_that_do_not_compare(folders, tmp_path):
    one = make_folder(tmp_path / "one", [[drawn(20)]])
    three = make_folder(tmp_path / "three", [[drawn(20)] * 3])
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (folders[:1], "1 folders"), ((folders[0], one), "fewer than 2"), ((folders[0], three), "3 to 4 images"),
        ((folders[0], tmp_path / "empty"), "no NNNNN/samples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            diversity.measure(diversity.Args(tuple(wrong)))
    (three / "00000/metadata.jsonl").write_text('{"prompt": "another"}')
    with pytest.raises(ValueError, match="no prompt in common"):
        diversity.measure(diversity.Args((folders[0], three)))
