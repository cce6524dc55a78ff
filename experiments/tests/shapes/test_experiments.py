"""The pieces of experiments.shapes.sft_vs_soar, and the tables of the pages."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

import sample
import train
from experiments.shapes import figures
from experiments.shapes import sft_vs_soar as experiment
from experiments.shapes.detect import count_layouts, layout
from experiments.shapes.draw import DATA, PAIRS, Scene, Thing, render
from experiments.tests.common import MODEL, ROOT, small_world, train_args
from sample import seeded
from soar import SoarConfig

TINY = experiment.Setting(
    ("sft", "soar"), steps=2, prompts=6, images=1, seeds=2, batch=2, curve=(0.5,), curve_prompts=3, unguided=1,
    drift_pairs=2, diverse_prompts=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> experiment.World:
    return small_world(tmp_path_factory.mktemp("data"))


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(experiment, "SAMPLING_STEPS", 3)
    monkeypatch.setattr(experiment, "STARTS", (0, 1))
    monkeypatch.setattr(experiment, "IMAGE_SEEDS", 2)


# --- Measures ---------------------------------------------------------------------------------------------------------


def test_layout_depends_on_shape_colour_and_cell_only(tmp_path):
    scene = lambda *things: render(Scene(tuple(Thing(*t, 9) for t in things), (230, 230, 230)))  # noqa: E731
    first = layout(scene(("circle", "red", 14, 14), ("cross", "blue", 48, 50)))
    assert first == (("circle", "red", 0, 0), ("cross", "blue", 2, 2))
    assert first == layout(scene(("cross", "blue", 50, 48), ("circle", "red", 13, 15)))
    moved = scene(("circle", "red", 14, 30), ("cross", "blue", 48, 50))
    assert first != layout(moved)
    for place, images in {"0/samples": [moved, moved], "1/samples": [moved, scene(("circle", "red", 14, 14))]}.items():
        (tmp_path / place).mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(tmp_path / place / f"{i}.png")
    assert count_layouts(tmp_path) == 1.5


def test_sharpness_equals_an_impulses_and_falls_with_blur():
    pixels = np.zeros((8, 8), np.uint8)
    pixels[4, 4] = 255
    impulse = Image.fromarray(pixels)
    assert experiment.sharpness(impulse) == pytest.approx(20 / 64)  # Laplacian -4 and four times 1, of mean 0
    assert experiment.sharpness(impulse.filter(ImageFilter.GaussianBlur(1))) < 0.2 * 20 / 64


def test_paired_test_agrees_with_all_sign_flips():
    a, b = np.array([1, 0.5, 1, 1, 0, 1, 1, 0.5]), np.array([0, 0.5, 0, 1, 0.5, 0, 0, 0])
    flips = np.array(list(itertools.product([-1, 1], repeat=8))) @ (a - b)
    exact = (np.abs(flips) >= abs((a - b).sum()) - 1e-9).mean()
    test, back = experiment.paired_test(a, b), experiment.paired_test(b, a)
    assert test["p"] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert test["difference"] == (a - b).mean() == -back["difference"]
    assert test["low"] == pytest.approx(-back["high"], abs=0.05) and test["low"] < test["difference"] < test["high"]
    assert experiment.paired_test(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_chosen_prompts_are_even_over_the_tasks():
    world = experiment.World(*[None] * 7, [json.loads(x) for x in (DATA / "prompts.jsonl").read_text().splitlines()])
    for setting in experiment.SETTINGS.values():
        tags = [world.prompts[i]["tag"] for i in experiment.chosen(world, setting.prompts)]
        assert [tags.count(tag) * 6 for tag in experiment.TAGS] == [setting.prompts] * 6


# --- Arms and training ------------------------------------------------------------------------------------------------


def test_arms_differ_from_the_published_settings_in_what_they_say():
    default, extra = SoarConfig(), {}
    for name, arm in experiment.ARMS.items():
        changed = {k: v for k, v in vars(arm.config).items() if v != getattr(default, k)}
        extra[name] = changed | {k: getattr(arm, k) for k in ("steps", "batch") if getattr(arm, k) != 1}
        assert (arm.weighting is not None) == name.endswith("_weighted")
    sft = {"lambda_aux": 0}
    assert extra == {
        "sft": sft, "sft_steps": sft | {"steps": 22 / 3}, "sft_batch": sft | {"batch": 22 / 3}, "sft_weighted": sft,
        "soar": {}, "soar_weighted": {}, "soar_w1": {"guidance_scale": 1}, "soar_sde": {"num_rollout_paths": 2},
        "soar_fresh": {"num_rollout_paths": 2, "shared_noise": False}, "soar_n1": {"num_aux_points": 1},
        "soar_n1_l6": {"num_aux_points": 1, "lambda_aux": 6},
        "soar_n1_l6_steps": {"num_aux_points": 1, "lambda_aux": 6, "steps": 22 / 7},
        "soar_n3": {"num_aux_points": 3}, "soar_l0.1": {"lambda_aux": 0.1}, "soar_l0.3": {"lambda_aux": 0.3},
        "soar_steps": {"steps": 22 / 3}, "soar_k1e6": {"num_sampling_steps": 10**6},
        "soar_l2": {"lambda_aux": 2}, "soar_u1": {"sigma_upper_ratio": 1}, "soar_u1.5": {"sigma_upper_ratio": 1.5},
    }  # fmt: skip
    expected = {"sft": 1, "soar_w1": 7, "soar_sde": 40 / 3, "soar_n1_l6": 7 / 3}
    expected |= dict.fromkeys(["soar", "sft_steps", "sft_batch", "soar_n1_l6_steps"], 22 / 3)
    assert {name: experiment.ARMS[name].compute() for name in expected} == pytest.approx(expected)


def test_arms_multiply_steps_and_batch(world, monkeypatch):
    seen, rates, original, adamw = [], [], experiment.step_inputs, torch.optim.AdamW
    monkeypatch.setattr(experiment, "step_inputs", lambda *args: seen.append(args[3:]) or original(*args))
    monkeypatch.setattr(torch.optim, "AdamW", lambda x, lr, **options: rates.append(lr) or adamw(x, lr, **options))
    arm = experiment.Arm("any", experiment.SFT, steps=1.5, batch=2)
    assert max(experiment.train(world, arm, TINY, 0)) == 3
    assert seen == [(1, 4), (2, 4), (3, 4)] and rates == [TINY.learning_rate]


def test_loss_of_each_step_equals_that_of_train_py(world, tmp_path):
    flags = {"train_batch_size": 4, "max_train_steps": 2, "logging_steps": 1, "seed": 5, "learning_rate": 1e-3}
    train.main(train_args(output_dir=tmp_path / "run", dataset=world.data / PAIRS.name, **flags))
    theirs = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = []
    original = experiment.soar_terms

    def recorded(*args, **options):
        losses.append(0.0)
        for term in original(*args, **options):
            losses[-1] += term.loss.item()
            yield term

    same = {"batch": 4, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    setting = dataclasses.replace(TINY, **same)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "soar_terms", recorded)
        kept = experiment.train(world, experiment.ARMS["soar"], setting, seed=5)
    assert losses == pytest.approx(theirs, rel=1e-5)  # the second step's loss is that of updated weights
    weights = load_file(tmp_path / "run/checkpoint-000002/transformer/diffusion_pytorch_model.safetensors")
    assert sorted(kept) == [1, 2]
    base = experiment.load_base(world).state_dict()
    # Adam's first updates are signs of gradients: where one is nearly 0 a last bit decides.
    gap, change = (sum((x - y[name]).square().sum() for name, x in weights.items()) for y in (kept[2], base))
    assert gap < 1e-4 * change
    assert not all(torch.equal(kept[1][name], x) for name, x in kept[2].items())  # the first is not the last's alias


def test_images_equal_those_of_sample_py(world, few_steps, tmp_path):
    transformer = experiment.load_base(world)
    ours = experiment.sample(world, transformer, [1, 4], 2, seed=7, batch=3)
    flags = {"height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 3, "seed": 7}
    sample.main(sample.Args(output_dir=tmp_path / "out", prompts=world.data / "prompts.jsonl", **flags, **MODEL))
    for i, images in zip((1, 4), ours):
        for j, image in enumerate(images):
            theirs = np.asarray(Image.open(tmp_path / f"out/{i:05d}/samples/{j:05d}.png"), int)
            assert np.abs(np.asarray(image, int) - theirs).max() <= 1


def test_drift_of_a_model_that_stands_still_equals_the_ideal_error_at_its_start(world, few_steps):
    still = lambda z, **_: (torch.zeros_like(z),)  # noqa: E731
    found = experiment.drift(world, still, 2)
    assert len(found["sigma"]) == len(found["ideal"]) == 3 and found["sigma"][0] == 1
    for start in (0, 1):
        assert found[f"from_{start}"] == pytest.approx([found["ideal"][start]] * (3 - start))
    # With v = 0 the endpoint is z itself, off by sigma (z1 - z0).
    ratio = [math.sqrt(error / found["ideal"][0]) for error in found["ideal"]]
    assert ratio == pytest.approx(found["sigma"], rel=1e-5)


def test_runs_go_on_from_what_is_finished(world, few_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "shared_world", lambda folder: world)
    trained, original = [], experiment.train
    monkeypatch.setattr(experiment, "train", lambda *args: trained.append(args[1].label) or original(*args))
    jobs = [(name, seed) for seed in (0, 1) for name in ("base", "sft", "soar")]
    for name, seed in jobs[:-1]:
        assert experiment.run(tmp_path, name, TINY, seed) > 0
    assert trained == ["SFT", "SOAR", "SFT"]
    assert experiment.run(tmp_path, "sft", TINY, 0) == 0 and len(trained) == 3
    before = json.loads((tmp_path / "sft-0.json").read_text())
    (tmp_path / "sft-0.json").unlink()
    experiment.run(tmp_path, "sft", TINY, 0)  # its weights are there
    assert len(trained) == 3
    (tmp_path / "sft-0.json").unlink()
    (tmp_path / "sft-0.safetensors").unlink()
    experiment.run(tmp_path, "sft", TINY, 0)
    other = dataclasses.replace(TINY, learning_rate=1.0)
    with pytest.raises(ValueError, match="sft-1.json was made with other settings"):
        experiment.run(tmp_path, "sft", other, 1)
    kept = (tmp_path / "sft-1.json").read_text()
    (tmp_path / "sft-1.json").unlink()
    with pytest.raises(ValueError, match="sft-1.curve.json was made with other settings"):  # and so are its weights
        experiment.run(tmp_path, "sft", other, 1)
    (tmp_path / "sft-1.json").write_text(kept)
    after = json.loads((tmp_path / "sft-0.json").read_text())
    assert len(trained) == 4 and before.pop("seconds") and after.pop("seconds") and before == after

    result = experiment.collect(tmp_path, TINY)
    assert json.loads(json.dumps(result["curves"])) == result["curves"]  # figures are drawn from it, and from the file
    rows = figures.table(result).splitlines()
    assert [row.split(" | ")[:3] for row in rows[2:]] == [
        ["| base", "0.0", "2"], ["| SFT", "1.0", "2"], ["| SOAR", "7.3", "1"]]  # fmt: skip
    assert set(result["drift"]) == set(result["diversity"]) == {"base", "sft", "soar"}
    assert {name: list(found) for name, found in result["curves"].items()} == {"sft": ["0"], "soar": ["0"]}
    points, base = result["curves"]["sft"]["0"], json.loads((tmp_path / "base-0.json").read_text())
    scores = {"0": base["correct"][::2], "1": after["curve"]["1"]["correct"], "2": after["correct"][::2]}
    assert {step: x["score"] for step, x in points.items()} == {
        step: np.mean([int(x) for x in correct]) for step, correct in scores.items()}  # fmt: skip
    assert len(scores["1"]) == 3 and points["2"]["sharpness"] == after["sharpness"]
    figures.draw_all(result, tmp_path, tmp_path / "figures")
    for name in ("score", "drift", "sheet"):
        with Image.open(tmp_path / f"figures/{name}.png") as image:
            assert 700 <= image.width <= 900 and len(np.unique(np.asarray(image.convert("L")))) > 50
    plain = (tmp_path / "figures/score.png").read_bytes()
    for more in ("sft_steps", "soar_l0.3"):  # a column of its own, and a further line
        result["curves"][more], result["arms"][more] = result["curves"]["soar"], result["arms"]["soar"]
        figures.score(result, tmp_path / "score.png")
        assert plain != (plain := (tmp_path / "score.png").read_bytes())


def test_unknown_arms_are_refused_by_name():
    with pytest.raises(ValueError, match="soar_x is unknown.*soar_n1"):
        experiment.Args(arms=("soar_x",))


def test_seeds_of_images_and_training_are_apart():
    keys = ((0, "a circle", 0), (0, "draws", 1, 0), (0, "vae", 1, 0), (1, "a circle", 0))
    draws = {tuple(torch.randn(2, generator=seeded(*key)).tolist()) for key in keys}
    assert len(draws) == 4


# --- Pages ------------------------------------------------------------------------------------------------------------


def test_the_pages_tables_are_those_of_the_results_files():
    results = DATA.parent / "results"
    files = results.glob("sft_vs_soar_*.json")
    tables = {path.stem: figures.table(json.loads(path.read_text())).splitlines() for path in files}
    head, *full = tables["sft_vs_soar_full"]
    known = set().union(*tables.values())
    blocks = [block.splitlines() for block in (DATA.parent / "README.md").read_text().split("\n\n") if head in block]
    assert len(blocks) == 3 and all(len(block) > 3 and set(block) <= known for block in blocks)

    # The README's columns are steps and the paper's numbers, and the same five of the full setting.
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]  # noqa: E731
    full = [[label, compute, *rest] for label, compute, _, *rest, _ in map(cells, full[1:])]
    page = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 4 and all([row[0], *row[2:6]] in full for row in rows)
