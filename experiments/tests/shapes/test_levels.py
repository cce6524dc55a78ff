"""experiments.shapes.levels."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments.shapes import levels, levels_table
from experiments.shapes.levels import LEVELS, Job
from experiments.tests.common import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("data") / "few")


@pytest.fixture
def few(world, monkeypatch):
    """Two steps, two levels, a few pairs."""
    for name in ("PAIRS", "QUARTER_PAIRS", "WALKED_PAIRS", "SAMPLED"):
        monkeypatch.setattr(levels, name, 3)
    setting = dataclasses.replace(levels.SETTING, curve=(0.5,), steps=2, batch=2, lr_warmup_steps=1)
    monkeypatch.setattr(levels, "SETTING", setting)
    few = {"LEVELS": (0.1, 0.9), "STARTS": (0.2,), "FIRST": "12-vae"}
    for module in (levels, levels_table):
        for name, value in (few | {"QUARTER_PAIRS": 3}).items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(levels, "WHOLE", 12)
    monkeypatch.setattr(levels, "STAGES", ((12, None, ("sft",), (0, 1)), (8, 0.0, ("sft",), (0,))))
    pairs = levels.held_out(world, 3)
    for module in (levels, levels_table):
        monkeypatch.setattr(module, "shared", lambda folder: (world, pairs))
    return world, pairs


def test_the_error_of_a_velocity_that_is_off_by_a_constant_is_its_square(world):
    pairs = levels.held_out(world, 4)
    assert not torch.equal(pairs.z0["drawn"], pairs.z0["mean"])

    def off(z, sigma, cond):
        return pairs.z1 - pairs.z0["drawn"] + 0.5

    found = levels.by_level(off, pairs)
    assert np.array(found["drawn"]) == pytest.approx(0.25, abs=1e-5)
    apart = (pairs.z0["mean"] - pairs.z0["drawn"] + 0.5).square().flatten(1).mean(1)
    assert np.array(found["mean"]) == pytest.approx(np.tile(apart, (len(LEVELS), 1)), abs=1e-5)


def test_a_trajectory_ends_where_the_guided_velocity_leads(world):
    """A velocity that leads to z0 + shift, without a prompt to z0: guided to z0 + w shift."""
    pairs, shift = levels.held_out(world, 3), 0.1
    empty = world.cond([""])["pooled_projections"]

    def velocity(z, sigma, cond):
        prompted = float(not torch.equal(cond["pooled_projections"][:1], empty))
        target = pairs.z0["drawn"] + prompted * shift
        return (z - target) / sigma.view(-1, 1, 1, 1)

    found = levels.trajectories(world, velocity, pairs)
    assert len(found) == len(levels.STARTS) * len(levels.GUIDANCES)
    for label, errors in found.items():
        w = float(label.split()[0])
        assert errors["drawn"] == pytest.approx([(w * shift) ** 2] * 3, rel=1e-3)
        apart = pairs.z0["drawn"] + w * shift - pairs.z0["mean"]
        expected = apart.square().flatten(1).mean(1).tolist()
        assert errors["mean"] == pytest.approx(expected, rel=1e-3)


def test_by_heart_is_the_share_nearer_than_the_nearest_neighbour():
    everything = torch.tensor([[0.0], [10.0], [13.0], [30.0]])
    samples = torch.tensor([[4.0], [6.9], [13.5], [29.0]])  # 4, 3.1, 3.5, 1 from 0 and 10, 10, 30
    training = everything[[0, 1, 3]]
    assert levels.by_heart(samples, training, everything) == 0.5  # the first and the last


def test_a_part_of_the_world_has_the_first_pairs_and_the_noise_asked_for(world):
    made = levels.part(world, 8, 0.05)
    assert torch.equal(made.mean, world.mean[:8]) and torch.equal(made.caption, world.caption[:8])
    assert torch.equal(levels.part(world, 12, None).std, world.std)
    assert not levels.part(world, 8, 0.0).std.any()
    assert levels.own_noise(levels.part(world, 12, 0.05)) == pytest.approx(0.05)


def test_relative_is_paired_and_clear_only_where_all_seeds_agree():
    theirs = np.random.default_rng(0).uniform(1, 2, (2, 40))
    found = levels_table.relative(1.1 * theirs, theirs)
    assert found == {"change": 10, "half": pytest.approx(0), "clear": True, "by_seed": [10, 10]}
    ours = theirs * np.array([[1.3], [0.9]])
    found = levels_table.relative(ours, theirs)
    assert found["change"] > found["half"] and not found["clear"] and found["by_seed"] == [30, -10]
    ours = theirs + np.array([0.3, -0.2] * 20)
    found = levels_table.relative(ours, theirs)
    assert 0 < found["change"] < found["half"] and not found["clear"]
    r = ours.mean(0) - (1 + found["change"] / 100) * theirs.mean(0)
    half = 1.96 * r.std(ddof=1) / 40**0.5 / theirs.mean()
    assert found["half"] == pytest.approx(100 * half, abs=1e-2)


def test_runs_are_kept_and_a_part_of_them_is_said_to_be_one(few, tmp_path):
    with pytest.raises(ValueError, match="no base run is finished"):
        levels_table.collect(tmp_path)
    jobs = [Job("base", 0, 12, None), Job("sft", 0, 12, None), Job("sft", 0, 8, 0.0)]
    assert set(jobs) < set(levels.plan(levels.Args()))
    for job in jobs:
        assert levels.run(tmp_path, job) > 0
        assert levels.run(tmp_path, job) == 0  # it is there
    result = levels_table.collect(tmp_path)
    result["theory"] = {}
    assert result["runs"] == [3, 4] and list(result["groups"]) == ["12-vae", "8-0"]
    assert levels_table.tables(result).startswith("3 of 4 runs are finished")
    sft = result["groups"]["12-vae"]["sft"]
    assert sft["seeds"] == [0] and len(sft["quarters"]["drawn"]) == 2
    assert result["groups"]["8-0"]["sft"]["by_heart"] is not None and sft["by_heart"] is None
    base = result["groups"]["12-vae"]["base"]["minus_sft"]["mean 0.1"]["change"]
    assert base and base * sft["minus_base"]["mean 0.1"]["change"] < 0
    levels_table.figure(result["groups"]["12-vae"], tmp_path / "figure.png")


def test_a_run_of_other_settings_is_refused(few, tmp_path, monkeypatch):
    job = Job("base", 0, 12, None)
    levels.run(tmp_path, job)
    monkeypatch.setattr(levels, "PAIRS", 2)
    with pytest.raises(ValueError, match="base-12-vae-0.json was made with other settings"):
        levels.run(tmp_path, job)


def test_the_prediction_is_a_contraction_and_goes_with_the_rollout():
    """Less error to the mean, more on the law itself, a steeper slope toward the mean."""
    found = levels_table.predicted([0.3], 1.0)
    assert found["drawn"][0] > 0.01 and found["mean"][0] < -0.05 and found["slope"][0] > 0.05
    still = levels_table.predicted([0.3], 1.0, num_sampling_steps=10**6)
    assert max(abs(x) for values in still.values() for x in values) < 1e-3


@pytest.mark.parametrize("more", [0.0, 0.2])
def test_slopes_are_those_of_a_linear_velocity(world, more):
    """v = a (z - (1 - sigma) mean) - mean: the exact flow's if the mean is known."""
    pairs = levels.held_out(world, 3)
    flow = levels_table.exact_flow(0.3)

    def velocity(z, sigma, cond):
        a = flow(sigma.double())[0].float().view(-1, 1, 1, 1) + more
        return a * (z - (1 - sigma.view(-1, 1, 1, 1)) * pairs.z0["mean"]) - pairs.z0["mean"]

    expected = flow(torch.tensor(LEVELS, dtype=torch.float64))[0] + more
    assert levels_table.slopes(velocity, pairs) == pytest.approx(expected.tolist(), abs=1e-4)


def test_unknown_arms_and_sizes_are_refused():
    for wrong in ({"arms": ("sfft",)}, {"sizes": (65,)}, {"num_processes": 0}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            levels.Args(**wrong)


def test_a_run_from_the_base_of_means_is_scored(few, tmp_path, monkeypatch):
    for name, value in {"REFIT_SCENES": 8, "REFIT_STEPS": 2, "SCORED_PROMPTS": 2}.items():
        monkeypatch.setattr(levels, name, value)
    job, base = Job("sft", 0, 12, "refit"), tmp_path / "refit.safetensors"
    world, _ = few
    levels.refit(world, base)
    old, new = levels.load_base(world).state_dict(), levels.load_base(world, base).state_dict()
    assert all(x.isfinite().all() for x in new.values()) and any(not torch.equal(old[k], new[k]) for k in old)
    levels.run(tmp_path, job)
    plain = Job("sft", 0, 12, 0.0)
    levels.run(tmp_path, plain)
    found = [levels.json.loads((tmp_path / f"{x.name}.json").read_text())["levels"] for x in (job, plain)]
    assert found[0] != found[1]  # the same means and steps from another base
    assert levels.score(tmp_path, job) > 0 and levels.score(tmp_path, job) == 0
    correct = levels.json.loads((tmp_path / f"{job.name}-score.json").read_text())["correct"]
    assert len(correct) == 2 and set(correct) <= {True, False}
