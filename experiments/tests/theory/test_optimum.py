"""experiments.theory.optimum: its argument and its fixed points, through soar.py's own loss."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.theory import optimum
from experiments.theory.optimum import (
    DATA_STDS,
    EDGES,
    PUBLISHED,
    SWEEP,
    Args,
    exact_flow,
    rows_of,
    sampled,
    shift_table,
    solve,
    swept,
    table,
    target_shift,
)
from sample import seeded
from soar import SoarConfig, draw, interpolate, rollout_step, sigma_from_t, soar_terms

RESULTS = Path(__file__).parents[2] / "theory/results"
BINS = 6


def batch(config: SoarConfig, data_std: float, size: int, generator: torch.Generator):
    """z0, draws, the prompt and the empty one: of the Gaussian world."""
    c, n = torch.randn(2, size, 1, generator=generator, dtype=torch.float64)
    draws = draw((size, 1), config, generator)
    t = draws.t.double().clamp(min=config.t_min)  # float32's t_min is not float64's
    return c + data_std * n, draws._replace(t=t), {"c": c}, {}


def slope_of(sigma, variance):
    """E[z1 - z0 | z] is this times z where z0 ~ N(0, variance)."""
    return (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)


def callable_of(linear, tilt=None):
    """As soar_terms takes it, the empty prompt being the marginal over prompts; tilt (2, BINS) is
    added to a and b, by the level's bin."""

    def velocity(z, sigma, prompt):
        if not prompt:
            return slope_of(sigma, 1 + linear.data_std**2)[:, None] * z
        a, b = linear(sigma)
        if tilt is not None:
            bins = (torch.logit(sigma) / 1.5 + BINS / 2).clamp(0, BINS - 1).long()
            a, b = a + tilt[0, bins], b + tilt[1, bins]
        return a[:, None] * z + b[:, None] * prompt["c"]

    return velocity


def soar_sum(velocity, config, *inputs):
    return sum(term.loss for term in soar_terms(velocity, *inputs, config))


def port_sum(velocity, config, z0, draws, cond, uncond):
    """The loss of a port that interpolates by u to z1, but says that this is level sigma_aux."""
    z1, t, u = (x.double() for x in draws[:3])
    t_next = (t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    sigma, sigma_next = sigma_from_t(t), sigma_from_t(t_next)
    z = interpolate(z0, z1, sigma)
    total = ((velocity(z, sigma, cond) - (z1 - z0)) ** 2).sum()
    v, v_uncond = (velocity(z, sigma, x).detach() for x in (cond, uncond))
    v = v_uncond + config.guidance_scale * (v - v_uncond)
    z_hat = rollout_step(z, v, sigma, sigma_next)
    for weight in u[0]:
        label = sigma_next + weight * ((config.sigma_upper_ratio * sigma).clamp(max=1) - sigma_next)
        z_aux = torch.lerp(z_hat, z1, weight[:, None])
        error = velocity(z_aux, label, cond) - (z_aux - z0) / label[:, None]
        total = total + config.lambda_aux * (error**2).sum()
    return total / len(z0)


def scores(linear, config, data_std, loss=soar_sum, repeats=60, size=4000):
    """Of every bin's a and b: the loss's mean gradient over its standard error."""
    gradients = []
    for repeat in range(repeats):
        tilt = torch.zeros(2, BINS, dtype=torch.float64, requires_grad=True)
        inputs = batch(config, data_std, size, seeded("optimum", repeat))
        value = loss(callable_of(linear, tilt), config, *inputs)
        gradients.append(torch.autograd.grad(value, tilt)[0].flatten())
    gradients = torch.stack(gradients)
    return gradients.mean(0) / (gradients.std(0) / repeats**0.5 + 1e-30)


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
    inputs = torch.cat([z_hat, cond["c"]], 1)

    def scores_of(velocity):
        """Correlation of z_hat and of c with target - velocity, in standard errors."""
        products = inputs * (target - velocity.detach())
        return (products.mean(0) / (products.std(0) / len(z0) ** 0.5)).abs()

    assert scores_of(before).max() < 4 and scores_of(now).max() > 10


SETTINGS = [
    (0.5, {}),
    (0.2, {"num_sampling_steps": 30}),
    (0.2, {"guidance_scale": 1.0, "num_sampling_steps": 20}),
    (1.0, {"guidance_scale": 7.0, "lambda_aux": 0.3, "sigma_upper_ratio": 1.5, "shift": 2.0}),
    (1.0, {"num_rollout_paths": 2, "sde_type": "cps", "shared_noise": False, "num_aux_points": 2}),
    (0.5, {"num_rollout_paths": 3, "num_sampling_steps": 8, "guidance_scale": 1.5, "t_min": 0.02,
           "num_aux_points": 2, "logit_mean": -1.5}),
]  # fmt: skip


@pytest.mark.parametrize("data_std, settings", SETTINGS)
def test_gradient_vanishes_at_the_fixed_point_and_not_at_the_exact_flow(data_std, settings):
    config, flow = SoarConfig(**settings), exact_flow(data_std)
    assert scores(solve(config, flow), config, data_std).abs().max() < 4.5
    assert scores(flow, config, data_std).abs().max() > 6
    if config.guidance_scale > 4:  # then it tells how the empty prompt is answered
        point = solve(config, exact_flow(data_std, uncond="point"))
        assert scores(point, config, data_std, repeats=20).abs().max() > 6


def simulated(data_std, w, steps, size=30_000, rounds=45):
    """Gain and std at guidance 1, of least squares in bins of the level on simulated points,
    repeated until they come to rest. Rare levels are drawn more often and count less."""
    rng = np.random.default_rng(0)
    centres = np.linspace(-5.7, 6.0, 40)
    more, kept = np.zeros((2, 40)), []

    def velocity(p, more):
        x = np.log(p / (1 - p))
        a = slope_of(p, data_std**2)
        b = -1 - a * (1 - p)
        return a + np.interp(x, centres, more[0]), b + np.interp(x, centres, more[1])

    for _ in range(rounds):
        c, n, z1, x = rng.standard_normal((4, size))
        weight = np.exp(x**2 / 2 - (2 * x - 1.5) ** 2 / 2)
        x = 2 * x - 1.5
        z0 = c + data_std * n
        t = np.maximum(1 / (1 + np.exp(-x)), 1e-3)
        sigma = shifted(t)
        end = shifted(np.maximum(t - 1 / steps, 1e-3))
        z = (1 - sigma) * z0 + sigma * z1
        a, b = velocity(sigma, more)
        v = a * z + b * c
        v_uncond = slope_of(sigma, 1 + data_std**2) * z
        z_hat = z + (end - sigma) * (v_uncond + w * (v - v_uncond))
        points = [(sigma, z, z1 - z0)]
        for u in rng.random((6, size)):
            p = end + u * (1 - end)
            z = z_hat + u * (z1 - z_hat)
            points.append((p, z, (z - z0) / p))
        sums = np.zeros((5, 40))
        for p, z, target in points:
            a, b = velocity(p, 0 * more)
            sums += binned(p, z, c, target - a * z - b * c, weight, centres)
        zz, zc, cc, zv, cv = sums
        determinant = zz * cc - zc**2
        best = np.stack([cc * zv - zc * cv, zz * cv - zc * zv]) / determinant
        more = more + 0.3 * (best - more)
        kept.append(more)

    sigmas = shifted(1 - np.arange(201) / 200)
    levels = np.minimum(sigmas[:-1], 1 - 1e-9)
    a, b = velocity(levels, np.mean(kept[15:], 0))
    gain, std = 0.0, 1.0
    for d, slope, pull in zip(np.diff(sigmas), a, b):
        gain += d * (slope * gain + pull)
        std += d * slope * std
    return gain, std / data_std


def shifted(t):
    return 3 * t / (1 + 2 * t)


def binned(p, z, c, left, weight, centres):
    """Sums of z z, z c, c c, z left, c left over the points of each bin."""
    x = np.log(p / (1 - p)) - centres[0]
    step = centres[1] - centres[0]
    nearest = np.rint(x / step).clip(0, len(centres) - 1).astype(int)
    pairs = (z * z, z * c, c * c, z * left, c * left)
    return np.stack([np.bincount(nearest, weight * x, len(centres)) for x in pairs])


@pytest.mark.parametrize("data_std, w, steps", [(0.5, 4.5, 40), (1.0, 7.0, 20)])
def test_fixed_point_is_that_of_a_simulation_by_least_squares(data_std, w, steps):
    config = SoarConfig(guidance_scale=w, num_sampling_steps=steps)
    flow, expected = exact_flow(data_std), simulated(data_std, w, steps)
    assert sampled(solve(config, flow), 200, 1.0) == pytest.approx(expected, abs=0.02)
    assert sampled(flow, 200, 1.0) != pytest.approx(expected, abs=0.025)
    point = solve(config, exact_flow(data_std, uncond="point"))
    assert sampled(point, 200, 1.0) != pytest.approx(expected, abs=0.05)


def test_guided_samples_start_from_the_marginal_over_prompts():
    """Gain and std of 200 guided Euler steps, from the two exact velocities."""
    flow, w = exact_flow(0.5), 3.0
    velocity = callable_of(flow)
    sigma = sigma_from_t(1 - torch.arange(201, dtype=torch.float64) / 200)[:, None]
    z = torch.tensor([[0.0], [1.0]]).double()  # of prompt 1 and no noise, and the other way round
    cond = {"c": 1 - z}
    for now, then in zip(sigma, sigma[1:]):
        v, v_uncond = (velocity(z, now.expand(2), prompt) for prompt in (cond, {}))
        z = z + (then - now) * (v_uncond + w * (v - v_uncond))
    assert sampled(flow, 200, w) == pytest.approx((float(z[0]), float(z[1]) / 0.5))


def test_any_caption_dropout_trains_the_empty_prompt_as_an_unguided_world_without_prompts():
    """Of dropped samples cond = uncond, so that the rollout's guidance cancels: z0 ~ N(0, 1.25)."""
    config, flow = SoarConfig(), exact_flow(0.5)
    rows = rows_of(config, 0.5, uncond="trained")
    *_, alone = rows_of(replace(config, guidance_scale=1.0), 1.25**0.5)
    trained = solve(config, flow.uncond)
    assert sampled(trained, 200, 1.0)[1] == pytest.approx(alone["std"], abs=1e-6)
    both = solve(config, replace(flow, uncond=trained))
    guided = [row for row in rows if row["conditional"] and row["sampling_guidance"] == 4.5]
    last = guided[-1]
    assert (last["objective"], last["sampling_steps"]) == ("soar", 200)
    assert (last["mean_gain"], last["std"]) == pytest.approx(sampled(both, 200, 4.5))


def test_gradient_of_the_mislabelled_loss_vanishes_at_its_own_fixed_point():
    config = SoarConfig(sigma_upper_ratio=1.5, guidance_scale=1.5, num_aux_points=2)
    optima = [solve(config, exact_flow(0.5), mislabelled=which) for which in (True, False)]
    assert scores(optima[0], config, 0.5, port_sum).abs().max() < 4.5
    assert scores(optima[1], config, 0.5, port_sum).abs().max() > 10


@pytest.mark.parametrize("settings", [
    {"lambda_aux": 0.0}, {"num_aux_points": 0}, {"num_sampling_steps": 10**6},
    {"num_sampling_steps": 10**6, "num_rollout_paths": 2, "sigma_upper_ratio": 1.5},
])  # fmt: skip
@pytest.mark.parametrize("conditional", [True, False])
def test_fixed_point_is_the_exact_flow_at_the_limits(settings, conditional):
    flow = exact_flow(0.5, conditional)
    optimum = solve(SoarConfig(**settings), flow)
    expected = sampled(flow, 200, 4.5)
    assert sampled(optimum, 200, 4.5) == pytest.approx(expected, abs=1e-3)


def test_fixed_point_depends_on_lambda_times_n_alone():
    pairs = [{"num_aux_points": n, "lambda_aux": 6 / n} for n in (1, 2, 3, 6)]
    optima = [solve(SoarConfig(**pair), exact_flow(0.5)).differences for pair in pairs]
    for other in optima[1:]:
        torch.testing.assert_close(other, optima[0])


GRIDS = [
    (0.5, {}, False),
    (0.2, {"num_sampling_steps": 20}, False),
    (0.2, {"guidance_scale": 1.0}, False),
    (0.2, {"sigma_upper_ratio": 1.0}, False),
    (1.0, {"guidance_scale": 7.0, "lambda_aux": 2.0}, False),
    (0.5, {"num_rollout_paths": 2}, False),
    (0.5, {"sigma_upper_ratio": 1.5}, True),
]


@pytest.mark.parametrize("data_std, settings, mislabelled", GRIDS)
def test_samples_are_the_same_on_a_grid_twice_as_fine(data_std, settings, mislabelled):
    config = SoarConfig(**settings)
    tolerance = 0.003 if mislabelled else 0.001
    coarse, fine = (
        solve(config, exact_flow(data_std), mislabelled, levels=250 * k, nodes=24 * k)
        for k in (1, 2)
    )
    for steps in (40, 200):
        for guidance in (1.0, config.guidance_scale):
            expected = sampled(fine, steps, guidance)
            assert sampled(coarse, steps, guidance) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("settings", [
    {"num_sampling_steps": 10, "logit_mean": -2.5, "logit_std": 0.5},
    {"num_sampling_steps": 5, "guidance_scale": 1.0, "sigma_upper_ratio": 1.5},
])  # fmt: skip
def test_shift_of_the_target_is_that_of_soar_terms(settings):
    config = SoarConfig(**settings)
    states = []

    def recorded(z, sigma, c):
        states.append((z, sigma))
        return callable_of(exact_flow(0.5))(z, sigma, c)

    z0, draws, cond, uncond = batch(config, 0.5, 200_000, seeded("shift"))
    list(soar_terms(recorded, z0, draws, cond, uncond, config))
    found = target_shift(config, 0.5)
    ideal = draws.z1 - z0
    points = states[-config.num_aux_points :]
    squares = torch.cat([((z - z0) / sigma[:, None] - ideal).square() for z, sigma in points])[:, 0]
    sigma = torch.cat([sigma for _, sigma in points])
    for low, high, expected in zip(EDGES, EDGES[1:], found["levels"]):
        square = squares[(sigma >= low) & (sigma < high)]
        if len(square) > 10_000:
            error = float(square.std()) / len(square) ** 0.5
            assert error < 0.05 * expected
            # six points share a sample, so the error is up to sqrt(6) times as large
            assert float(square.mean()) == pytest.approx(expected, abs=4 * 6**0.5 * error)
    t = draws.t
    early = float((t < 1 / config.num_sampling_steps).double().mean())
    assert found["samples"] == pytest.approx(early, abs=0.005)


def test_exact_flow_samples_the_data_in_the_limit_of_small_steps():
    assert sampled(exact_flow(0.3), 20_000, 1.0) == pytest.approx((1.0, 1.0), abs=1e-3)


def test_json_has_a_row_per_sampled_guidance(capsys):
    optimum.main(Args(SoarConfig(guidance_scale=2.0), data_std=1.0, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = {"objective", "conditional", "data_std", "sampling_steps", "sampling_guidance"}
    assert all(set(row) == names | {"mean_gain", "std"} for row in rows)
    keys = ("objective", "conditional", "sampling_steps", "sampling_guidance")
    found = [tuple(row[key] for key in keys) for row in rows]
    both = ("flow", "soar")
    expected = [(name, True, steps, w) for name in both for steps in (40, 200) for w in (1, 2)]
    expected += [(name, False, steps, 1) for name in both for steps in (40, 200)]
    assert sorted(found) == sorted(expected)
    assert all((row["mean_gain"] is None) != row["conditional"] for row in rows)


def test_the_page_has_the_tables_of_the_results_file_and_this_code_makes_them():
    made = json.loads((RESULTS / "optimum.json").read_text())
    page = (RESULTS.parent / "optimum.md").read_text()
    assert table(made) in page and shift_table() in page
    assert list(made) == ["exact flow", *SWEEP]
    for label in (PUBLISHED, "caption dropout", "mislabelled, ratio 1.5"):
        assert swept(label, DATA_STDS[2]) == pytest.approx(made[label][2], abs=1e-5)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_data_std_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="--data_std"):
        Args(data_std=bad)
