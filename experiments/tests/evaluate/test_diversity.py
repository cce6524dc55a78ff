"""Whether images differ: the measures, worked by hand, and folders in any features."""

import math

import numpy as np
import pytest
import transformers
from PIL import Image

from experiments.evaluate import diversity
from experiments.evaluate.scorers import PICKSCORE
from experiments.tests.common import MODEL
from experiments.tests.evaluate.folders import make_folder, picture

VAE = MODEL["pretrained_model_name_or_path"] + "/vae"


def vendi(*eigenvalues: float) -> float:
    return math.exp(-sum(x * math.log(x) for x in eigenvalues))


def test_measures_equal_cases_worked_by_hand():
    assert diversity.vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert diversity.vendi_score(np.diag([1.0, 2, 3, 4])) == pytest.approx(4)
    assert diversity.vendi_score(np.eye(2).repeat(2, axis=0)) == pytest.approx(2)
    # Two vectors at 60 degrees: K / 2 has the eigenvalues (1 +- 0.5) / 2.
    pair = np.array([[1, 0], [0.5, math.sqrt(0.75)]])
    assert diversity.vendi_score(pair) == pytest.approx(vendi(0.75, 0.25))
    # A right triangle
    assert diversity.mean_distance(np.array([[0.0, 0], [3, 0], [0, 4]])) == pytest.approx(4)


@pytest.fixture
def folders(tmp_path):
    """Of four images of each of two prompts; in the first folder a prompt's are alike."""
    same, other = (make_folder(tmp_path / x, ["a", "b"], 4) for x in ("same", "other"))
    for path in same.glob("*/samples/*.png"):
        picture(int(path.parts[-3]), 32, 32).save(path)
    return same, other


@pytest.mark.parametrize("features", ["vae", "dino", "clip"])
def test_diversity_is_least_for_equal_images_in_any_features(
    folders, tmp_path, hub, features, monkeypatch
):
    """Also in batches that end within a prompt."""
    monkeypatch.setattr(diversity, "BATCH", 3)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**size, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    crop = {"height": 28, "width": 28}
    processor = transformers.BitImageProcessorPil(size=crop, crop_size=crop)
    processor.save_pretrained(tmp_path / "dino")
    names = {"vae": VAE, "dino": tmp_path / "dino", "clip": hub[PICKSCORE]}
    same, other = diversity.measure(folders, str(names[features])).values()
    assert same.vendi == pytest.approx(1, abs=1e-3)
    assert same.distance == pytest.approx(0, abs=1e-3)
    assert 1.1 < other.vendi <= 4 and other.distance > 10 * same.distance
    assert (same.prompts, same.images) == (2, 4)


def test_features_are_centred_on_the_mean_of_all_folders(tmp_path, monkeypatch):
    """One prompt, two images of one colour; red and green are the features."""
    folders = [make_folder(tmp_path / x, ["a"], 2) for x in "ab"]
    for folder, red in zip(folders, (0, 20)):
        for file, green in (("00000.png", 0), ("00001.png", 10)):
            Image.new("RGB", (1, 1), (red, green, 0)).save(folder / "00000/samples" / file)

    def extract(images):
        return np.array([image.getpixel((0, 0))[:2] for image in images])

    monkeypatch.setattr(diversity, "Extractor", lambda features: extract)
    made = diversity.measure(tuple(folders), "").values()
    # Less their mean, (10, 5), a folder's images have the cosine 0.6
    assert [x.vendi for x in made] == pytest.approx(2 * [vendi(0.8, 0.2)])
    assert [x.distance for x in made] == [10, 10]


def test_diversity_refuses_folders_that_do_not_compare(folders, tmp_path):
    one, alike = (make_folder(tmp_path / x, ["a"], 1) for x in ("one", "alike"))
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (folders[:1], "2 or more folders"),
        ((one, alike), "1 to 1 images"),
        ((folders[0], make_folder(tmp_path / "three", ["a"], 3)), "3 to 4 images"),
        ((folders[0], tmp_path / "empty"), "common prompt"),
        ((folders[0], make_folder(tmp_path / "another", ["c"], 4)), "common prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            diversity.measure(wrong, VAE)
