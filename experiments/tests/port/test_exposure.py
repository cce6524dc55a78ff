"""exposure: the errors at the points of a rollout, and the verdict."""

import pytest
import torch

from experiments.port.exposure import errors_of, exposure
from soar import SoarConfig, draw, interpolate, sigma_from_t


def batch(config, size=6):
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(size, 2, 3, generator=generator)
    return z0, draw(z0.shape, config, generator)


@pytest.mark.parametrize("steps", [40, 4])
def test_errors_are_those_of_a_model_that_is_off_by_a_constant_on_the_path(steps):
    """z_hat is off by (sigma_next - sigma) bias; at sigma_aux (1 - sigma_aux) / (1 - sigma_next) of
    it is left, which the model sees and adds; the target is off by it over sigma_aux."""
    config, bias = SoarConfig(num_sampling_steps=steps, guidance_scale=1.0), 0.5
    z0, draws = batch(config)

    def velocity(z, sigma, cond):
        return draws.z1 - z0 + bias + z - interpolate(z0, draws.z1, sigma)

    found = errors_of(velocity, z0, draws, torch.zeros(6), None, config)
    sigma = sigma_from_t(draws.t)
    sigma_next = sigma_from_t((draws.t - 1 / steps).clamp(min=1e-3))
    sigma_aux = sigma_next + draws.u[0] * (1 - sigma_next)
    left = (1 - sigma_aux) / (1 - sigma_next)
    shift = bias * (sigma_next - sigma) * left / sigma_aux
    expected = {
        "sigma": sigma_aux,
        "on": torch.full((6, 6), bias**2),
        "off": (bias + sigma_aux * shift - shift) ** 2,
        "blind": (bias - shift) ** 2,
        "shift": shift**2,
    }
    assert set(found) == set(expected)
    for name, x in expected.items():  # to float32's error of (z - z0) / sigma
        torch.testing.assert_close(found[name], x.flatten(), rtol=2e-3, atol=1e-5)


def test_the_shift_grows_as_the_guidance_squared_and_gives_the_verdict():
    """Of a model that is exact but for its condition c, the error of v_cfg is w c."""
    z0, shifts = batch(SoarConfig(), 64)[0], {}

    def velocity(z, sigma, c):
        return (z - z0) / sigma.view(-1, 1, 1) + c.view(-1, 1, 1)

    for steps, w, verdict in ((1000, 1, "is SFT"), (10, 2, "is more"), (10, 6, "is more")):
        config = SoarConfig(num_sampling_steps=steps, guidance_scale=w)
        generator = torch.Generator().manual_seed(1)
        found = exposure(velocity, z0, torch.ones(64), torch.zeros(64), config, generator=generator)
        assert len(found.errors["sigma"].unique()) > 4 * 6 * 60  # every draw counts
        on, shift = (float(found.errors[name].mean()) for name in ("on", "shift"))
        assert found.share == pytest.approx(shift / on)
        assert (found.share > 0.01) == (verdict == "is more")
        assert f"A short run of SOAR {verdict}" in str(found)
        shifts[w] = shift
    assert shifts[6] == pytest.approx(9 * shifts[2], rel=1e-2)
