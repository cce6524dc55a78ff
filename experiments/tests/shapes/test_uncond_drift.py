"""experiments.shapes.uncond_drift."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from experiments.shapes.sft_vs_soar import held_out
from experiments.shapes.uncond_drift import LEVELS, flags_of, measures, velocities
from experiments.tests.common import small_world
from sample import seeded
from soar import interpolate


def test_measures_are_root_mean_squares_of_each_level():
    target = torch.randn(3, 5, 2, 4)
    base = (target + 1, target - 1, target)
    scale = torch.tensor([0.0, 0.5, 2.0]).view(3, 1, 1, 1)
    model = (base[0] + scale, base[1] - 2 * scale, target)
    found = measures(model, base)
    assert found["uncond"] == pytest.approx([0.0, 0.5, 2.0], abs=1e-5)
    assert found["cond"] == pytest.approx([0.0, 1.0, 4.0], abs=1e-5)
    assert found["guidance"] == pytest.approx([2.0, 3.5, 8.0], abs=1e-5)
    assert found["error"] == pytest.approx([1.0, 1.5, 3.0], abs=1e-5)


def test_velocities_are_those_of_the_empty_prompt_and_of_the_pairs_own(tmp_path):
    world, pairs = small_world(tmp_path / "few"), 3
    z0, cond = held_out(world, pairs)
    z1 = torch.randn(z0.shape, generator=seeded("uncond_drift"))
    mark = lambda x: x["pooled_projections"].sum(1).view(-1, 1, 1, 1)  # noqa: E731

    def transformer(z, timestep, return_dict, **text):
        return (z * timestep.view(-1, 1, 1, 1) + mark(text),)

    v_uncond, v_cond, target = velocities(world, transformer, pairs)
    for i, sigma in enumerate(LEVELS):
        z = interpolate(z0, z1, torch.full((pairs,), sigma))
        torch.testing.assert_close(v_uncond[i], 1000 * sigma * z + mark(world.cond([""] * pairs)))
        torch.testing.assert_close(v_cond[i], 1000 * sigma * z + mark(cond))
        torch.testing.assert_close(target[i], z1 - z0)
    assert not torch.equal(v_uncond, v_cond)


@pytest.mark.parametrize("objective, lambda_aux", [("SFT", 0.0), ("SOAR", 1.0)])
def test_runs_differ_in_lambda_and_the_rate_alone(objective, lambda_aux):
    args = train.parse(flags_of(Path("run"), 300, objective, 0.1, 1))
    assert args.soar == train.SoarConfig(lambda_aux=lambda_aux)
    assert (args.training.cond_dropout_rate, args.training.seed) == (0.1, 1)
    other = train.parse(flags_of(Path("run"), 300, "SFT", 0.0, 1)).training
    assert other == replace(args.training, cond_dropout_rate=0.0)
