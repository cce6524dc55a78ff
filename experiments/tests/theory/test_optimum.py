"""experiments.theory.optimum: its argument and its fixed points, through soar.py's own loss."""

import json
from pathlib import Path

import pytest
import torch

from experiments.theory import geometry, optimum
from experiments.theory.optimum import Args, exact_flow, sampled, solve, table
from sample import seeded
from soar import SoarConfig, draw, sigma_from_t, soar_terms

RESULTS = Path(__file__).parents[2] / "theory/results"
BINS = 6


def batch(config: SoarConfig, data_std: float, size: int, generator: torch.Generator):
    """z0, draws, the prompt and the empty one: of the Gaussian world."""
    c, n = torch.randn(2, size, 1, generator=generator, dtype=torch.float64)
    draws = draw((size, 1), config, generator)
    t = draws.t.double().clamp(min=config.t_min)  # float32's t_min is not float64's
    return c + data_std * n, draws._replace(t=t), {"c": c}, {}


def callable_of(linear, tilt=None):
    """As soar_terms takes it, the empty prompt being the marginal over prompts; tilt (2, BINS) is
    added to a and b, by the level's bin."""

    def velocity(z, sigma, prompt):
        if not prompt:  # E[z1 - z0 | z] where z0 ~ N(0, variance)
            variance = 1 + linear.data_std**2
            slope = (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)
            return slope[:, None] * z
        a, b = linear(sigma)
        if tilt is not None:
            bins = (torch.logit(sigma) / 1.5 + BINS / 2).clamp(0, BINS - 1).long()
            a, b = a + tilt[0, bins], b + tilt[1, bins]
        return a[:, None] * z + b[:, None] * prompt["c"]

    return velocity


def score(linear, config, data_std):
    """The greatest, of any bin's a or b, of the loss's mean gradient over its standard error."""
    gradients = []
    for repeat in range(60):
        tilt = torch.zeros(2, BINS, dtype=torch.float64, requires_grad=True)
        inputs = batch(config, data_std, 4000, seeded("optimum", repeat))
        terms = soar_terms(callable_of(linear, tilt), *inputs, config)
        value = sum(term.loss for term in terms)
        gradients.append(torch.autograd.grad(value, tilt)[0].flatten())
    gradients = torch.stack(gradients)
    errors = gradients.std(0) / 60**0.5 + 1e-30
    return (gradients.mean(0) / errors).abs().max()


@pytest.mark.parametrize("t, steps, data_std", [(0.7, 10, 0.5), (0.3, 5, 1.0), (0.1, 20, 0.3)])
def test_average_target_at_the_exact_flow_is_the_velocity_of_the_level_before(t, steps, data_std):
    """E[(z_hat - z0) / sigma_next | z_hat, c] = v*(z, sigma, c), not v*(z_hat, sigma_next, c)."""
    config = SoarConfig(num_aux_points=1, num_sampling_steps=steps, guidance_scale=1.0)
    z0, draws, cond, _ = batch(config, data_std, 100_000, seeded("before"))
    draws = draws._replace(t=torch.full_like(draws.t, t), u=torch.zeros_like(draws.u))
    flow = exact_flow(data_std)
    calls = []

    def recorded(z, sigma, cond):
        calls.append((z, sigma, callable_of(flow)(z, sigma, cond).requires_grad_(True)))
        return calls[-1][2]

    *_, auxiliary = soar_terms(recorded, z0, draws, cond, None, config, normalizer=1.0)
    auxiliary.loss.backward()
    (z, sigma, before), (z_hat, sigma_next, now) = calls
    target = (now - now.grad / 2).detach()  # the loss is (now - target)^2
    torch.testing.assert_close(target, (z_hat - z0) / sigma_next[:, None])
    found = []
    for velocity in (before, now):  # the error's correlation with z_hat and c, in standard errors
        products = torch.cat([z_hat, cond["c"]], 1) * (target - velocity.detach())
        found.append((products.mean(0) / products.std(0)).abs().max() * len(z0) ** 0.5)
    assert found[0] < 4 and found[1] > 10


@pytest.mark.parametrize("data_std, settings", [
    (0.5, {}),
    (0.2, {"guidance_scale": 1.0, "num_sampling_steps": 20}),
    (1.0, {"guidance_scale": 7.0, "lambda_aux": 0.3, "sigma_upper_ratio": 1.5, "shift": 2}),
    (1.0, {"num_rollout_paths": 2, "sde_type": "cps", "shared_noise": False, "num_aux_points": 2}),
    (0.5, {"num_rollout_paths": 3, "num_sampling_steps": 8, "guidance_scale": 1.5, "t_min": 0.02,
           "num_aux_points": 2, "logit_mean": -3.0}),
])  # fmt: skip
def test_gradient_vanishes_at_the_fixed_point_and_not_at_the_exact_flow(data_std, settings):
    config, flow = SoarConfig(**settings), exact_flow(data_std)
    assert score(solve(config, flow), config, data_std) < 4.5
    assert score(flow, config, data_std) > 6


def test_guided_samples_start_from_the_marginal_over_prompts():
    """Gain and std of 200 guided Euler steps, from the two exact velocities."""
    flow, w = exact_flow(0.5), 3.0
    sigma = sigma_from_t(1 - torch.arange(201, dtype=torch.float64) / 200)[:, None]
    z = torch.tensor([[0.0], [1.0]]).double()  # of prompt 1 and no noise, and the other way round
    cond = {"c": 1 - z}
    for now, then in zip(sigma, sigma[1:]):
        v, v_uncond = (callable_of(flow)(z, now.expand(2), prompt) for prompt in (cond, {}))
        z = z + (then - now) * (v_uncond + w * (v - v_uncond))
    assert sampled(flow, 200, w) == pytest.approx((float(z[0]), float(z[1]) / 0.5))


def test_any_caption_dropout_trains_the_empty_prompt_as_an_unguided_world_without_prompts():
    """Of dropped samples cond = uncond, so that the rollout's guidance cancels: z0 ~ N(0, 1.25)."""
    config = SoarConfig()
    found = optimum.optimum(config, 0.5, caption_dropout=True)
    alone = solve(SoarConfig(guidance_scale=1.0), exact_flow(1.25**0.5, conditional=False))
    sigma = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(found.uncond(sigma)[0], alone(sigma)[0])
    without = optimum.optimum(config, 0.5)
    assert sampled(found, 200, 4.5) != sampled(without, 200, 4.5)


@pytest.mark.parametrize("conditional", [True, False])
def test_fixed_point_is_the_exact_flow_at_the_limits(conditional):
    flow = exact_flow(0.5, conditional)
    expected = pytest.approx(sampled(flow, 200, 4.5), abs=1e-3)
    short = {"num_sampling_steps": 10**6}
    several = short | {"num_rollout_paths": 2, "sigma_upper_ratio": 1.5}
    for settings in ({"lambda_aux": 0.0}, {"num_aux_points": 0}, short, several):
        assert sampled(solve(SoarConfig(**settings), flow), 200, 4.5) == expected


@pytest.mark.parametrize("data_std, settings", [
    (0.2, {"num_sampling_steps": 20}), (0.2, {"sigma_upper_ratio": 1.0}),
    (0.5, {"num_rollout_paths": 2}),
])  # fmt: skip
def test_samples_are_the_same_on_a_grid_twice_as_fine(data_std, settings):
    config, flow = SoarConfig(**settings), exact_flow(data_std)
    coarse = solve(config, flow)
    fine = solve(config, flow, levels=500, nodes=48)
    for guidance in (1.0, 4.5):
        expected = sampled(fine, 200, guidance)
        assert sampled(coarse, 200, guidance) == pytest.approx(expected, abs=0.001)


def test_the_page_has_the_table_of_the_results_file_and_this_code_makes_it(capsys):
    made = json.loads((RESULTS / "optimum.json").read_text())
    assert table(made) in (RESULTS.parent / "optimum.md").read_text()
    assert list(made) == ["exact flow", *optimum.SWEEP]
    for label in (next(iter(optimum.SWEEP)), "caption dropout"):
        found = optimum.swept(label, optimum.DATA_STDS[2])
        assert found == pytest.approx(made[label][2], abs=1e-5)
    optimum.main(Args(SoarConfig(num_sampling_steps=100)))
    expected = table({"exact flow": made["exact flow"], "SOAR": made["K = 100"]})
    assert capsys.readouterr().out == expected


def test_geometry_is_drawn(tmp_path):
    geometry.main(tmp_path / "geometry.png")
    assert (tmp_path / "geometry.png").read_bytes() == (RESULTS / "geometry.png").read_bytes()
