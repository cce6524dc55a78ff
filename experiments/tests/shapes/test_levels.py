"""experiments.shapes.levels and levels_table."""

import json

import numpy as np
import pytest
import torch

from experiments.shapes import levels, levels_table, sft_vs_soar
from experiments.shapes.levels import LEVELS
from experiments.tests.common import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("data") / "few")


@pytest.fixture
def few(world, monkeypatch):
    """Two steps, two levels, a few pairs."""
    small = {
        "LEVELS": (0.1, 0.9), "STARTS": (0.2,), "FIRST": "12-vae", "SEEDS": (0, 1),
        "COLORS": {"sft": "C0"}, "COMPARED": [("sft", "base")], "WHOLE": 12, "SLOPE_PAIRS": 2,
        "SETTING": sft_vs_soar.Setting((), 2, 0, 0, batch=2, lr_warmup_steps=1),
        "WALKED_PAIRS": 2, "REFIT_SCENES": 8, "REFIT_STEPS": 2, "SCORED_PROMPTS": 2,
        "GROUPS": [(12, noise, ("sft",)) for noise in (None, "refit", 0.0)],
        "SCORED": ("12-refit",),
    }  # fmt: skip
    for name, value in small.items():
        for module in (levels, levels_table):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(sft_vs_soar, "SAMPLING_STEPS", 6)
    pairs = levels.held_out(world, 3)
    monkeypatch.setattr(levels, "shared", lambda folder: (world, pairs))
    return world


def test_the_error_of_a_velocity_that_is_off_by_a_constant_is_its_square(world):
    pairs = levels.held_out(world, 4)
    assert not torch.equal(pairs.z0["drawn"], pairs.z0["mean"])

    def off(z, sigma, cond):
        return pairs.z1 - pairs.z0["drawn"] + 0.5

    found = levels.by_level(off, pairs)
    assert np.array(found["drawn"]) == pytest.approx(0.25, abs=1e-5)
    apart = pairs.z0["mean"] - pairs.z0["drawn"] + 0.5
    expected = apart.square().flatten(1).mean(1)
    for errors in found["mean"]:
        assert errors == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_trajectory_ends_where_the_guided_velocity_leads(world):
    """A velocity that leads to z0 + shift, without a prompt to z0: guided to z0 + w shift."""
    pairs, shift = levels.held_out(world, 3), 0.1
    seen = set()
    empty = world.cond([""])["pooled_projections"]

    def velocity(z, sigma, cond):
        seen.add(float(sigma[0]))
        prompted = float(not torch.equal(cond["pooled_projections"][:1], empty))
        target = pairs.z0["drawn"] + prompted * shift
        return (z - target) / sigma.view(-1, 1, 1, 1)

    found = levels.trajectories(world, velocity, pairs)
    assert max(seen) == pytest.approx(0.7414, abs=1e-3)  # the sampler's level nearest to 0.75
    for label, errors in found.items():
        beyond = float(label.split()[0]) * shift
        assert errors["drawn"] == pytest.approx([beyond**2] * 3, rel=1e-3)
        apart = pairs.z0["drawn"] + beyond - pairs.z0["mean"]
        expected = apart.square().flatten(1).mean(1).tolist()
        assert errors["mean"] == pytest.approx(expected, rel=1e-3)


def test_a_part_of_the_world_has_the_first_pairs_and_the_noise_asked_for(world):
    made = levels.part(world, 8, 0.0)
    assert torch.equal(made.mean, world.mean[:8]) and not made.std.any()
    assert torch.equal(made.caption, world.caption[:8])
    assert torch.equal(levels.part(world, 12, None).std, world.std)
    made = levels.part(world, 12, 0.05).std.square().mean().sqrt()
    assert float(made) * world.pipe.vae.config.scaling_factor == pytest.approx(0.05)
    assert not levels.part(world, 12, "refit").std.any()


def test_relative_is_paired_and_clear_only_where_all_seeds_agree():
    theirs = np.random.default_rng(0).uniform(1, 2, (2, 1, 40))
    assert levels_table.relative(1.1 * theirs, theirs) == [(10, pytest.approx(0), True)]
    ours = theirs * [[[1.3]], [[0.9]]]
    change, half, clear = levels_table.relative(ours, theirs)[0]
    assert change > half and not clear
    ours = theirs + np.array([0.3, -0.2] * 20)
    change, half, clear = levels_table.relative(ours, theirs)[0]
    assert 0 < change < half and not clear
    b = theirs.mean((0, 1))
    apart = ours.mean((0, 1)) - b * (1 + change / 100)
    expected = 196 * apart.std(ddof=1) / 40**0.5 / b.mean()
    assert half == pytest.approx(expected, abs=0.01)


def test_runs_are_kept_scored_and_collected(few, tmp_path, monkeypatch):
    def at_once(work, folder, jobs, processes):
        for name, job in jobs.items():
            assert work(folder, *job) > 0, name
            assert work(folder, *job) == 0  # it is there

    monkeypatch.setattr(levels, "share_out", at_once)
    levels.main(tmp_path)
    result = json.loads((tmp_path / "levels.json").read_text())
    text = (tmp_path / "levels.md").read_text()
    assert text.startswith("The runs' commits: ") and (tmp_path / "levels.png").is_file()
    first, refit, means = result["groups"].values()
    change, half, _ = first["base"]["minus_sft"]["mean"][0]
    back, _, _ = first["sft"]["minus_base"]["mean"][0]
    assert change * back < 0
    assert f"| base | 0.0 | 2 | {change:+.1f} ± {half:.1f}" in text
    sft, base = (result["slopes"][arm][0] for arm in ("sft", "base"))
    assert f"| SFT, minus base | slope | {sft - base:+.4f} |" in text
    assert len(refit["sft"]["score"]["by_seed"]) == 2
    assert refit["sft"]["errors"] != means["sft"]["errors"]  # the same steps, another base


def test_slopes_are_those_of_a_linear_velocity(world):
    """v = a (z - (1 - sigma) mean) - mean, here with a = sigma."""
    pairs = levels.held_out(world, 3)
    mean = pairs.z0["mean"]

    def velocity(z, sigma, cond):
        s = sigma.view(-1, 1, 1, 1)
        return s * (z - (1 - s) * mean) - mean

    found = levels_table.slopes(velocity, pairs)
    assert found == pytest.approx(LEVELS, abs=1e-4)


def test_scores_have_their_own_base_and_are_paired_over_prompts():
    ones, half = np.ones(4), np.array([1.0, 0, 1, 0])
    scores = {"sft": {0: half, 1: half}, "soar_n1_l6": {0: ones, 1: half}, "base": {0: 1 - half}}
    rows = levels_table.scored(scores)
    assert rows["base"]["minus_sft"]["difference"] == 0
    text = levels_table.scores_of({arm: {"score": row} for arm, row in rows.items()})
    assert "| SOAR, N = 1, lambda = 6 | 2 | 75.0 (35.4) | +25.0 (+0.0 to +50.0) |" in text
