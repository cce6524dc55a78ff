"""experiments.off_path."""

import json

import pytest
import torch

from experiments import off_path
from experiments.sft_vs_soar import held_out
from experiments.tests.common import small_world
from sample import seeded
from soar import SoarConfig, draw, sigma_from_t


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("data") / "few")


@pytest.mark.parametrize("bias, steps", [(0.0, 40), (0.5, 40), (0.5, 4)])
def test_errors_are_those_of_a_model_that_is_off_by_a_constant(world, tmp_path, monkeypatch, bias, steps):
    pairs, config = 3, SoarConfig()
    z0, _ = held_out(world, pairs)
    draws = draw(z0.shape, config, seeded("off_path"))
    exact = draws.z1 - z0
    monkeypatch.setattr(off_path, "load_base", lambda world, weights: lambda z, **_: (exact + bias,))
    monkeypatch.setattr(off_path, "load_world", lambda path: world)
    off_path.main(off_path.Args(tmp_path, arms=("base",), num_sampling_steps=(10, steps), pairs=pairs))
    row = json.loads((tmp_path / "off_path.json").read_text())["num_sampling_steps"][str(steps)]["base"]
    sigma0 = sigma_from_t(draws.t)
    sigma1 = sigma_from_t((draws.t - 1 / steps).clamp(min=config.t_min))
    sigma = sigma1 + draws.u[0] * (1 - sigma1)
    # z_hat is off by (sigma1 - sigma0) bias, of which (1 - sigma') / (1 - sigma1) is left at sigma'.
    shift = (sigma1 - sigma0) * bias * (1 - sigma) / (1 - sigma1) / sigma
    assert row["sft"] == pytest.approx(bias**2, abs=1e-9) and row["on"] == pytest.approx(bias**2, abs=1e-9)
    assert row["target"] == pytest.approx((shift**2).mean().item(), rel=1e-3, abs=1e-7)
    assert row["off"] == pytest.approx(((bias - shift) ** 2).mean().item(), rel=1e-3, abs=1e-7)
    assert row["blind"] == pytest.approx(row["off"], rel=1e-6, abs=1e-9)


def test_a_model_that_mends_all_errs_only_where_it_is_blind(world, tmp_path, monkeypatch):
    pairs, bias = 3, 0.5
    z0, _ = held_out(world, pairs)
    empty = world.cond([""] * pairs)["pooled_projections"]

    def model(z, timestep, pooled_projections, **_):
        wrong = bias * torch.equal(pooled_projections, empty)  # so that the guided step leaves the path
        return ((z - z0) / (timestep / 1000).view(-1, 1, 1, 1) + wrong,)

    monkeypatch.setattr(off_path, "load_base", lambda world, weights: model)
    (row,) = off_path.measure(world, off_path.Args(tmp_path, arms=("base",), pairs=pairs), 10).values()
    assert row["off"] < 1e-6 and row["on"] < 1e-6 and row["target"] > 0.01
    assert row["blind"] == pytest.approx(row["target"], rel=1e-3)


def test_arms_without_weights_and_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--arms soar: .*soar-0.safetensors is not there"):
        off_path.Args(tmp_path, arms=("base", "soar"))
    for wrong in ((), (40, 0)):
        with pytest.raises(ValueError, match="--num_sampling_steps is"):
            off_path.Args(tmp_path, arms=("base",), num_sampling_steps=wrong)
    with pytest.raises(ValueError, match="--pairs is 0"):
        off_path.Args(tmp_path, arms=("base",), pairs=0)
