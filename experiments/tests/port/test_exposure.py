"""experiments.port.exposure."""

from dataclasses import replace

import pytest
import torch

from experiments.port.exposure import STEPS, errors_at, exposure, points_of
from experiments.theory.optimum import exact_flow
from soar import SoarConfig, draw, interpolate, sigma_from_t


def batch(config, size=6):
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(size, 2, 3, generator=generator)
    return z0, draw(z0.shape, config, generator)


@pytest.mark.parametrize("steps, paths", [(40, 1), (4, 1), (10, 3)])
def test_errors_are_those_of_a_model_that_is_off_by_a_constant(steps, paths):
    """z_hat is off by (sigma_next - sigma) bias; at sigma_aux (1 - sigma_aux) / (1 - sigma_next) of
    it is left, and the target is off by that over sigma_aux."""
    config, bias = SoarConfig(1.0, 6, paths, steps, guidance_scale=1.0), 0.5
    z0, draws = batch(config)

    def velocity(z, sigma, cond):
        return draws.z1 - z0 + bias

    points = list(points_of(velocity, z0, draws, torch.zeros(6), None, config))
    assert len(points) == 6
    sigma = sigma_from_t(draws.t)
    sigma_next = sigma_from_t((draws.t - 1 / steps).clamp(min=1e-3))
    for n, point in enumerate(points):
        sigma_aux = sigma_next + draws.u[0, n] * (1 - sigma_next)
        torch.testing.assert_close(point.sigma, sigma_aux)
        torch.testing.assert_close(point.z_ideal, interpolate(z0, draws.z1, sigma_aux))
        shift = bias * (sigma_next - sigma) * (1 - sigma_aux) / (1 - sigma_next) / sigma_aux
        found = errors_at(velocity, point, None)
        close = {"rtol": 2e-3, "atol": 1e-5}  # of float32's (z - z0) / sigma
        torch.testing.assert_close(found["on"], torch.full((6,), bias**2), **close)
        torch.testing.assert_close(found["shift"], shift**2, **close)
        torch.testing.assert_close(found["off"], (bias - shift) ** 2, **close)
        torch.testing.assert_close(found["blind"], found["off"], **close)  # it sees nothing


def test_the_meter_counts_shifts_of_its_own_config_as_those_by_steps():
    """For its own K the shift is measured twice: in recorded rollouts and in replayed ones."""
    config = SoarConfig(num_sampling_steps=10, guidance_scale=3.0)
    z0, _ = batch(config, 32)
    cond, uncond = torch.ones(32), torch.zeros(32)

    def velocity(z, sigma, c):
        return 0.3 * z + c.view(-1, 1, 1) * sigma.view(-1, 1, 1)

    generator = torch.Generator().manual_seed(1)
    found = exposure(velocity, z0, cond, uncond, config, generator=generator)
    assert len(found.sigma) == 4 * 6 * 32 and set(found.shift_by_steps) == set(STEPS)
    shift = float(found.errors["shift"].mean())
    assert found.shift_by_steps[10] == pytest.approx(shift, rel=1e-4)
    values = [found.shift_by_steps[k] for k in STEPS]
    assert values == sorted(values, reverse=True)
    config = replace(config, guidance_scale=1.0)
    unguided = exposure(velocity, z0, cond, None, config, generator=generator.manual_seed(1))
    assert unguided.shift_by_steps[10] != pytest.approx(shift, rel=1e-2)


@pytest.mark.parametrize("steps, verdict", [(1000, "is SFT"), (4, "is more than SFT")])
def test_the_verdict_follows_the_shift_over_the_error_on_the_ideal_path(steps, verdict):
    config = SoarConfig(num_sampling_steps=steps, guidance_scale=1.0)
    z0, _ = batch(config, 64)

    def velocity(z, sigma, c):  # exact, but for a constant
        return (z - z0) / sigma.view(-1, 1, 1) + 0.5

    found = exposure(velocity, z0, None, None, config, generator=torch.Generator().manual_seed(1))
    share = float(found.errors["shift"].mean() / found.errors["on"].mean())
    assert found.share == pytest.approx(share)
    assert (share > 0.01) == (verdict == "is more than SFT")
    assert found.unlike_sft == (share > 0.01)
    on = float(found.errors["on"].mean())
    below = [k for k in STEPS if found.shift_by_steps[k] > 0.01 * on]
    assert found.steps_that_matter == max(below)
    text = str(found)
    assert f"A short run of SOAR {verdict}" in text and f"K = {max(below)} and below" in text


@pytest.mark.parametrize("data_std, share", [(0.2, 0.24), (1.0, 0.005)])
def test_the_exact_flow_has_a_share_as_well(data_std, share):
    """So that it is no fault of the model."""
    generator = torch.Generator().manual_seed(0)
    c, n = torch.randn(2, 100_000, 1, generator=generator)
    flow = exact_flow(data_std)

    def velocity(z, sigma, prompt):
        here = flow if prompt else flow.uncond
        a, b = here(sigma.double())
        return (a[:, None] * z + b[:, None] * c).float()

    z0 = c + data_std * n
    found = exposure(velocity, z0, {"c": c}, {}, generator=generator, repeats=1)
    assert found.share == pytest.approx(share, rel=0.1)
    assert found.errors["off"].mean() > found.errors["on"].mean()


def test_a_config_without_auxiliary_points_is_refused():
    z0, _ = batch(SoarConfig())
    with pytest.raises(ValueError, match="lambda_aux"):
        exposure(lambda z, *_: z, z0, None, None, SoarConfig(lambda_aux=0.0),
                 generator=torch.Generator())  # fmt: skip
