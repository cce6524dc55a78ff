"""experiments.shapes.sft_vs_soar, and the tables of the pages that are made of its results."""

import dataclasses
import itertools
import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import sample
import train
from experiments.shapes import sft_vs_soar
from experiments.shapes.draw import DATA, PAIRS, TAGS
from experiments.tests.common import MODEL, ROOT, small_world, train_args
from soar import SoarConfig

TINY = sft_vs_soar.Setting(("sft", "soar"), steps=2, prompts=6, images=1, seeds=2, batch=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def world(data):
    return small_world(data)


def test_paired_test_agrees_with_all_sign_flips_and_its_interval_is_that_of_a_mean():
    a, b = np.array([1, 0.5, 1, 1, 0, 1, 1, 0.5]), np.array([0, 0.5, 0, 1, 0.5, 0, 0, 0])
    flips = np.array(list(itertools.product([-1, 1], repeat=8))) @ (a - b)
    exact = (np.abs(flips) >= abs((a - b).sum()) - 1e-9).mean()
    test = sft_vs_soar.paired_test(a, b)
    assert test["p"] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert sft_vs_soar.paired_test(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1}
    a = np.random.default_rng(0).normal(0.1, 1, 400)
    test = sft_vs_soar.paired_test(a, np.zeros(400))
    mean, half = a.mean(), 1.96 * a.std() / 20
    found = [test[key] for key in ("difference", "low", "high")]
    assert found == pytest.approx([mean, mean - half, mean + half], abs=0.1 * half)


def test_prompts_are_even_over_the_tasks(monkeypatch):
    prompts = sample.read_prompts(DATA / "prompts.jsonl")
    world = sft_vs_soar.World(*[None] * 6, prompts)
    monkeypatch.setattr(sft_vs_soar, "sample", draws := Mock(return_value=[]))
    for setting in sft_vs_soar.SETTINGS.values():
        sft_vs_soar.correct(world, None, setting.prompts, 1, 0)
        tags = [prompts[i]["tag"] for i in draws.call_args.args[2]]
        assert [tags.count(tag) * 6 for tag in TAGS] == [setting.prompts] * 6


def test_arms_differ_from_the_published_settings_in_what_they_say():
    sft, one_point = {"lambda_aux": 0}, {"num_aux_points": 1, "lambda_aux": 6}
    arms = {  # what differs, steps, batch, compute
        "sft": (sft, 1, 1, 3),
        "soar": ({}, 1, 1, 22),
        "sft_steps": (sft, 22 / 3, 1, 22),
        "sft_batch": (sft, 1, 22 / 3, 22),
        "soar_k1e6": ({"num_sampling_steps": 10**6}, 1, 1, 22),
        "soar_n1_l6": (one_point, 1, 1, 7),
        "soar_n1_l6_steps": (one_point, 22 / 7, 1, 22),
    }
    assert list(sft_vs_soar.ARMS) == list(arms)
    for arm, (changed, *times, units) in zip(sft_vs_soar.ARMS.values(), arms.values()):
        assert arm.config == SoarConfig(**changed)
        assert [arm.steps, arm.batch] == times
        assert 3 * arm.compute() == pytest.approx(units)
    more = sft_vs_soar.Arm("", SoarConfig(guidance_scale=1.0, num_rollout_paths=2))
    assert more.compute() == pytest.approx(13)


def test_arms_multiply_steps_and_batch(world, monkeypatch):
    inputs = Mock(wraps=sft_vs_soar.step_inputs)
    monkeypatch.setattr(sft_vs_soar, "step_inputs", inputs)
    arm = sft_vs_soar.Arm("any", sft_vs_soar.SFT, steps=1.5, batch=2)
    sft_vs_soar.train(world, arm, TINY, 0)
    assert [call.args[3:] for call in inputs.call_args_list] == [(1, 4), (2, 4), (3, 4)]


def test_loss_of_each_step_equals_that_of_train_py(world, data, tmp_path, monkeypatch):
    """From the second on they are of updated weights."""
    flags = {"train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-3}
    flags |= {"logging_steps": 1, "seed": 5, "dataset": data / PAIRS.name}
    train.main(train_args(output_dir=tmp_path / "run", **flags))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").open())
    losses, original = [], sft_vs_soar.soar_terms

    def recorded(*args, **options):
        losses.append(0.0)
        for term in original(*args, **options):
            losses[-1] += term.loss.item()
            yield term

    monkeypatch.setattr(sft_vs_soar, "soar_terms", recorded)
    same = {"steps": 4, "batch": 4, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    setting = dataclasses.replace(TINY, **same)
    sft_vs_soar.train(world, sft_vs_soar.ARMS["soar"], setting, seed=5)
    assert losses == pytest.approx([line["loss"] for line in lines], rel=1e-5)


def test_images_equal_those_of_sample_py(world, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vs_soar, "SAMPLING_STEPS", 3)
    ours = sft_vs_soar.sample(world, sft_vs_soar.load_base(), [1, 4], 2, seed=7)
    flags = {"height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 3}
    flags |= {"seed": 7, "prompts": data / "prompts.jsonl", **MODEL}
    sample.main(sample.Args(output_dir=tmp_path / "out", **flags))
    for i, images in zip((1, 4), ours):
        for j, image in enumerate(images):
            path = tmp_path / f"out/{i:05d}/samples/{j:05d}.png"
            gap = np.asarray(image, int) - np.asarray(Image.open(path), int)
            assert np.abs(gap).max() <= 1


def test_runs_go_on_from_what_is_finished(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vs_soar, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(sft_vs_soar, "load_world", lambda cached: world)
    for name in ("base", "sft"):
        assert sft_vs_soar.run(tmp_path, name, TINY, 0) > 0
        assert sft_vs_soar.run(tmp_path, name, TINY, 0) == 0
    assert (tmp_path / "sft-0.safetensors").is_file()
    found = json.loads((tmp_path / "sft-0.json").read_text())["correct"]
    assert np.shape(found) == (6, 1) and set(np.ravel(found)) <= {0, 1}
    other = dataclasses.replace(TINY, learning_rate=1.0)
    with pytest.raises(ValueError, match="sft-0.json was made with other settings"):
        sft_vs_soar.run(tmp_path, "sft", other, 0)


def test_collect_compares_arms_seed_by_seed(tmp_path):
    correct = {
        "base-0": "01", "base-1": "01", "sft-0": "11", "sft-1": "00", "soar-0": "01", "soar-1": "10"
    }  # fmt: skip
    for name, word in correct.items():
        arm, seed = name.split("-")
        settings = sft_vs_soar.run_settings(arm, TINY, int(seed))
        kept = {"settings": settings, "correct": [[int(x)] for x in word]}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    rows = sft_vs_soar.collect(tmp_path, TINY)["arms"]
    assert [row["by_seed"] for row in rows.values()] == [[0.5, 0.5], [1, 0], [0.5, 0.5]]
    assert rows["base"]["minus_sft"]["difference"] == 0
    assert "minus_sft" not in rows["sft"]
    lines = sft_vs_soar.table({"arms": rows}).splitlines()
    assert lines[0] == "| arm | compute | seeds | score (std) | minus SFT (95 %) | minus SOAR |"
    assert lines[2].startswith("| base | 0.0 | 2 | 50.0 (0.0) | +0.0 (-50.0 to +50.0) |")


def test_the_pages_tables_are_those_of_the_results_files():
    room, tables = (DATA.parent / "README.md").read_text(), {}
    for path in (DATA.parent / "results").glob("sft_vs_soar_*.json"):
        tables[path.stem] = sft_vs_soar.table(json.loads(path.read_text()))
        assert tables[path.stem] in room

    # The README's columns are steps and the paper's numbers, and five of the full setting's.
    known = []
    for line in tables["sft_vs_soar_full"].splitlines():
        label, compute, _, *rest = line[2:-2].split(" | ")
        known.append([label, compute, *rest])
    page = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert len(rows) >= 6 and all([row[0], *row[2:6]] in known for row in rows[2:])
