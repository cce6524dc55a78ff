"""experiments.shapes.guidance: its measures by hand, and a small sweep from two runs."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.shapes import guidance, sft_vs_soar
from experiments.tests.common import small_world
from experiments.tests.shapes.test_experiments import TINY


def test_saturation_is_the_range_of_the_channels():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = (255, 0, 0)
    pixels[0, 1] = (255, 255, 255)
    pixels[1, 0] = (0, 51, 51)
    assert guidance.saturation(Image.fromarray(pixels)) == pytest.approx((1 + 0.2) / 4)


def test_spread_is_none_for_equal_images_and_grows():
    rng = np.random.default_rng(0)
    noisy = [Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    soft = [Image.blend(noisy[0], image, 0.5) for image in noisy]
    none, some, more = guidance.spread([noisy[:1] * 3, soft, noisy])
    assert none == pytest.approx(0, abs=1e-5) and 0 < some < more


def test_a_sweep_keeps_what_is_finished_and_tells_arms_apart(tmp_path, monkeypatch):
    world = small_world(tmp_path / "data")
    for module in (guidance, sft_vs_soar):
        monkeypatch.setattr(module, "shared_world", lambda folder: world)
    monkeypatch.setattr(sft_vs_soar, "SAMPLING_STEPS", 2)
    kept = sft_vs_soar.train(world, sft_vs_soar.ARMS["sft"], TINY, 0)
    sft_vs_soar.save_tensors(kept[2], tmp_path / "sft-0.safetensors")
    far = {name: 1.5 * x for name, x in kept[2].items()}
    sft_vs_soar.save_tensors(far, tmp_path / "soar-0.safetensors")
    few = {"guidances": (1.0, 4.5), "seeds": 1, "prompts": 6}
    few |= {"spread_prompts": 2, "spread_images": 2}
    with pytest.raises(ValueError, match="--arms soar_n1: .*soar_n1-0.safetensors is not there"):
        guidance.Args(tmp_path, ("soar_n1",), **few)
    args = guidance.Args(tmp_path, ("base", "sft", "soar"), **few)
    runs = {arm: [guidance.run(args, arm, 0)] for arm in args.arms}
    monkeypatch.setattr(guidance, "sample", None)  # what is finished is not sampled again
    assert guidance.run(args, "soar", 0) == runs["soar"][0]

    result = json.loads(json.dumps(guidance.collect(args, runs)))
    arms = result["arms"]
    assert set(arms) == {"base", "sft", "soar"} and set(result["at_best"]) == {"soar - sft"}
    assert arms["sft"]["spread"]["1.0"]["over_sft"] == 1
    assert arms["soar"]["spread"]["1.0"]["over_sft"] != 1
    first = runs["sft"][0]["guidance"]["4.5"]
    assert first["saturation"] != runs["sft"][0]["guidance"]["1.0"]["saturation"]
    assert arms["sft"]["guidance"]["4.5"]["score"] == np.mean(first["score"])
    real = guidance.training_images(world)["saturation"]
    found = arms["sft"]["guidance"]["4.5"]["saturation"]
    assert found == pytest.approx(first["saturation"] / real)
    rows = guidance.table(result).splitlines()
    assert rows[2].startswith("| base |") and rows[4].startswith("| SOAR |")
    guidance.figure(result, tmp_path / "guidance.png")
    with Image.open(tmp_path / "guidance.png") as image:
        assert image.width > 700


def test_the_pages_tables_are_those_of_the_results():
    results = guidance.Path(guidance.__file__).parent / "results"
    scores, spreads, *_ = guidance.table(json.loads((results / "guidance.json").read_text())).split("\n\n")
    page = (results.parent / "README.md").read_text()
    assert scores in page and spreads in page
