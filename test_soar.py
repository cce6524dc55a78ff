"""Proofs of soar.py, each over random shapes, ranks, noise levels and differentiable models.

    pytest test_soar.py                                # 50 examples a property, derandomized
    HYPOTHESIS_PROFILE=deep pytest test_soar.py        # 2,000 examples

Hypothesis draws seeds, shapes and settings; every tensor comes from torch.Generator().manual_seed(seed). Computations
are in float64 unless a test is about precision. Tolerances follow from the arithmetic: CLOSE below is for values of
order 1 to 1e4 reached by some hundred float64 operations, one of them a division by sigma' >= 1e-3.
"""

import copy
import dataclasses
import math
import os
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import soar
from soar import SDE_TYPES, Draws, SoarConfig, Term, draw, interpolate, rollout_step, sft_loss, soar_loss, soar_terms

settings.register_profile("dev", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
seeds = st.integers(0, 2**32 - 1)
shapes = st.integers(1, 4).flatmap(
    lambda rank: st.tuples(st.integers(1, 4), *[st.integers(1, 3)] * rank)
)  # (B, C) to (B, C, T, H, W)
levels = st.floats(0.0, 1.0)
configs = st.builds(
    SoarConfig,
    lambda_aux=st.sampled_from([0.1, 1.0, 2.5]),
    num_aux_points=st.integers(1, 3),
    num_rollout_paths=st.integers(1, 3),
    num_sampling_steps=st.sampled_from([1, 2, 4, 40]),
    guidance_scale=st.sampled_from([0.0, 1.0, 4.5, -2.0]),
    shift=st.sampled_from([0.5, 1.0, 3.0, 6.0]),
    t_min=st.sampled_from([1e-3, 0.25]),
    logit_mean=st.sampled_from([-1.0, 0.0, 1.0]),
    logit_std=st.sampled_from([0.5, 1.0, 3.0]),
    sde_type=st.sampled_from(SDE_TYPES),
    sde_noise_scale=st.sampled_from([0.0, 0.5, 1.0]),
    shared_noise=st.booleans(),
    sigma_upper_ratio=st.sampled_from([1.0, 1.5, math.inf]),
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


class Model(torch.nn.Module):
    """A smooth random velocity, sample by sample; `null` serves the unconditional branch alone."""

    def __init__(self, shape, seed, dtype=torch.float64):
        super().__init__()
        self.D = math.prod(shape[1:])
        new = lambda i, *size: torch.nn.Parameter(randn(seed + i, *size).to(dtype))  # noqa: E731
        self.weight, self.time, self.scale, self.null = (
            new(1, self.D, self.D),
            new(2, self.D),
            new(3, self.D),
            new(4, self.D),
        )

    def forward(self, z, sigma, cond):
        x = torch.tanh(z.flatten(1) @ self.weight + torch.sin(3 * sigma.to(z.dtype))[:, None] * self.time)
        return (self.scale * x + (self.null if cond["null"] else cond["embeds"])).reshape(z.shape)


class Case:
    """A model, z0, conditioning and draws, all functions of (shape, config, seed)."""

    def __init__(self, shape, config, seed, dtype=torch.float64):
        self.shape, self.config, self.model = shape, config, Model(shape, seed, dtype)
        self.z0 = randn(seed + 10, *shape).to(dtype)
        self.cond = {"embeds": randn(seed + 11, shape[0], self.model.D).to(dtype), "null": False}
        self.uncond = {"null": True}
        self.draws = draw(shape, config, rng(seed + 12))

    def terms(self, velocity=None, config=None, **kwargs):
        config = config or self.config
        return soar_terms(velocity or self.model, self.z0, self.draws, self.cond, self.uncond, config, **kwargs)

    def part(self, index):
        """The same case, for some samples of the batch only."""
        part, d = copy.copy(self), self.draws
        part.z0, part.cond = self.z0[index], {"embeds": self.cond["embeds"][index], "null": False}
        stacked = (x if x is None else x[:, index] for x in (d.path_noise, d.path_z1))
        part.draws = Draws(d.z1[index], d.t[index], d.u[:, :, index], *stacked)
        return part

    def grads(self, loss):
        return torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True, retain_graph=True)

    def sigma0(self):
        return soar.sigma_from_t(self.draws.t.double(), self.config.shift)


def per_sample(sigma, like):
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def assert_all_close(left, right, **tolerance):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance or CLOSE))


# --- A second implementation, from the paper's formulas, one sample and one point at a time ---


def reference_points(case, states=None):
    """Yields (state, target, sigma, weight) of each point of each sample, per term: the base term's, then M N lists."""
    c, d = case.config, case.draws
    terms = [[] for _ in range(1 + c.num_rollout_paths * c.num_aux_points)]
    for b in range(len(case.z0)):
        z0, z1, t0 = case.z0[b].double(), d.z1[b].double(), d.t[b].item()
        sigma_of = lambda t: c.shift * t / (1 + (c.shift - 1) * t)  # noqa: E731
        t1 = max(t0 - 1 / c.num_sampling_steps, c.t_min)
        s0, s1 = sigma_of(t0), sigma_of(t1)
        z = (1 - s0) * z0 + s0 * z1
        terms[0].append((z, z1 - z0, s0, 1.0))
        with torch.no_grad():
            sigma = torch.tensor([s0], dtype=torch.float64)
            v_cond = case.model(z[None], sigma, {"embeds": case.cond["embeds"][b : b + 1], "null": False})[0]
            v_uncond = case.model(z[None], sigma, {"null": True})[0]
            v = v_uncond + c.guidance_scale * (v_cond - v_uncond)
            clean, noisy, step, eta = z - s0 * v, z + (1 - s0) * v, s1 - s0, c.sde_noise_scale
            for m in range(c.num_rollout_paths):
                n = d.path_noise[m - 1, b].double() if m > 0 else None
                if m == 0:
                    z_hat = z + step * v
                elif c.sde_type == "simple":
                    z_hat = z + step * v + eta * math.sqrt(-step) * n
                elif c.sde_type == "sde":
                    z_hat = (1 - s1) * clean + s1 * n
                elif c.sde_type == "flow_sde":
                    S = eta * math.sqrt(s0 / (1 - min(s0, sigma_of(0.999))))
                    z_hat = z * (1 + S * S * step / (2 * s0)) + v * step * (1 + S * S * (1 - s0) / (2 * s0))
                    z_hat = z_hat + S * math.sqrt(-step) * n
                elif c.sde_type == "cps":
                    q = s1 * math.sin(eta * math.pi / 2)
                    z_hat = (1 - s1) * clean + math.sqrt(max(s1**2 - q**2, 0)) * noisy + q * n
                endpoint = z1 if c.shared_noise else d.path_z1[m, b].double()
                for k in range(c.num_aux_points):
                    s = s1 + d.u[m, k, b].item() * (min(c.sigma_upper_ratio * s0, 1) - s1)
                    alpha = (s - s1) / (1 - s1)
                    state = (1 - alpha) * z_hat + alpha * endpoint
                    counts = 1.0 if m == 0 or t0 - 1 / c.num_sampling_steps > c.t_min else 0.0
                    point = (state, (state - z0) / s, s, counts)
                    terms[1 + m * c.num_aux_points + k].append(point)
    return terms


def reference_terms(case, weighting=lambda sigma: 1.0):
    """The errors, levels and losses of all terms, from reference_points taken as constants."""
    points = reference_points(case)
    normalizer = len(case.z0) + case.config.lambda_aux * sum(p[3] for term in points[1:] for p in term)
    for i, term in enumerate(points):
        z, target, sigma, counts = (
            torch.stack([x if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64) for x in column])
            for column in zip(*term)
        )
        error = (case.model(z, sigma, case.cond) - target).square().flatten(1).mean(1)
        weight = torch.tensor([weighting(s) for s in sigma.tolist()], dtype=torch.float64)
        loss = (counts * weight * error).sum() * (1.0 if i == 0 else case.config.lambda_aux) / normalizer
        yield Term(loss, (counts * error).detach(), sigma)


@given(shapes, configs, seeds)
@example((2, 3), SoarConfig(num_rollout_paths=2, shift=6.0, logit_mean=50.0), 0)  # t = 1: flow_sde's sigma is bounded
def test_terms_equal_the_papers_formulas_for_any_settings(shape, config, seed):
    case = Case(shape, config, seed)
    weighting = lambda s: 0.5 + s**2  # noqa: E731
    terms = list(case.terms(weighting=weighting))
    expected = list(reference_terms(case, weighting))
    assert len(terms) == 1 + config.num_rollout_paths * config.num_aux_points
    for term, ref in zip(terms, expected):
        assert_all_close(term, ref)
    loss, ref_loss = sum(t.loss for t in terms), sum(t.loss for t in expected)
    assert_all_close(case.grads(loss), case.grads(ref_loss), rtol=1e-8, atol=1e-8)


@given(shapes, configs, seeds)
def test_soar_loss_is_the_sum_of_the_terms_on_the_generators_draws(shape, config, seed):
    case = Case(shape, config, seed)
    loss = soar_loss(case.model, case.z0, case.cond, case.uncond, config, generator=rng(seed + 12), weighting=torch.exp)
    torch.testing.assert_close(loss, sum(t.loss for t in case.terms(weighting=torch.exp)), rtol=0, atol=0)
    default = soar_loss(case.model, case.z0, case.cond, case.uncond, generator=rng(seed))
    same = soar_loss(case.model, case.z0, case.cond, case.uncond, SoarConfig(), generator=rng(seed), weighting=None)
    assert torch.equal(default, same)


# --- 1. SOAR without auxiliary points is SFT ---


@given(shapes, configs, seeds, st.sampled_from(["lambda", "N"]), st.sampled_from([torch.float32, torch.float64]))
def test_loss_and_gradients_equal_sft_bit_for_bit_when_lambda_or_n_is_zero(shape, config, seed, which, dtype):
    config = dataclasses.replace(config, **{"lambda": {"lambda_aux": 0.0}, "N": {"num_aux_points": 0}}[which])
    case = Case(shape, config, seed, dtype)
    z0, z1, t = case.z0, case.draws.z1.to(dtype), case.draws.t.to(dtype)
    sigma = config.shift * t / (config.shift * t + (1 - t))
    s = per_sample(sigma, z0)
    v = case.model((1 - s) * z0 + s * z1, sigma, case.cond)
    reference = ((v - (z1 - z0)) ** 2).flatten(1).mean(1).sum() / len(z0)
    calls = []
    counted = lambda *args: calls.append(args) or case.model(*args)  # noqa: E731
    terms = list(case.terms(counted))
    loss = soar_loss(counted, z0, case.cond, case.uncond, config, generator=rng(seed + 12))
    assert len(terms) == 1 and len(calls) == 2  # no rollout either
    assert torch.equal(terms[0].loss, reference) and torch.equal(loss, reference)
    unreduced = sft_loss(case.model, z0, z1, sigma, case.cond)
    assert unreduced.shape == (len(z0),) and torch.equal(unreduced.sum() / len(z0), reference)
    for ours in (terms[0].loss, loss):
        for a, b in zip(case.grads(ours), case.grads(reference)):
            assert (a is None and b is None) or torch.equal(a, b)


@given(shapes, seeds)
def test_sft_loss_weights_each_sample_by_its_noise_level(shape, seed):
    case = Case(shape, SoarConfig(), seed)
    args = case.model, case.z0, case.draws.z1.double(), case.sigma0(), case.cond
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # a weighting may be learned
    weighted = sft_loss(*args, weighting=lambda s: scale / s)
    torch.testing.assert_close(weighted, sft_loss(*args) / case.sigma0(), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(weighted.sum(), scale)[0], weighted.sum().detach(), **CLOSE)


# --- 2, 3. An exact model, and a rollout that goes nowhere, give SFT terms ---


@given(shapes, configs, seeds)
def test_aux_terms_are_sft_terms_on_the_ideal_path_when_the_velocity_is_exact(shape, config, seed):
    config = dataclasses.replace(config, num_rollout_paths=1, shared_noise=True)
    case = Case(shape, config, seed)
    z1, calls = case.draws.z1.double(), []
    rollout_calls = 1 if config.guidance_scale == 1 else 2  # the base term's forward and the unconditional one

    def exact_in_the_rollout(z, sigma, cond):
        calls.append(sigma)
        torch.testing.assert_close(z, interpolate(case.z0, z1, sigma), rtol=1e-12, atol=1e-12)
        return z1 - case.z0 if len(calls) <= rollout_calls else case.model(z, sigma, cond)

    base, *aux = case.terms(exact_in_the_rollout)
    assert base.error.max() == 0
    for term in aux:
        sft = sft_loss(case.model, case.z0, z1, term.sigma, case.cond)
        torch.testing.assert_close(term.error, sft.detach(), **CLOSE)
    for term in case.terms(lambda z, sigma, cond: z1 - case.z0):
        assert term.error.max() <= 1e-18


@given(shapes, seeds, st.sampled_from([1.0, 4.5]), st.integers(1, 4))
def test_aux_terms_are_sft_terms_at_sigma_prime_when_the_rollout_stays_at_sigma0(shape, seed, guidance_scale, points):
    case = Case(shape, SoarConfig(guidance_scale=guidance_scale, num_aux_points=points, t_min=0.5), seed)
    case.draws = case.draws._replace(t=torch.full((shape[0],), 0.5))  # at the clean boundary: t1 = t0
    for term in list(case.terms())[1:]:
        sft = sft_loss(case.model, case.z0, case.draws.z1.double(), term.sigma, case.cond)
        torch.testing.assert_close(term.error, sft.detach(), **CLOSE)


@given(shapes, seeds)
def test_aux_terms_tend_to_sft_terms_at_sigma_prime_as_the_number_of_steps_grows(shape, seed):
    case = Case(shape, SoarConfig(), seed)
    case.draws = Draws(*(x if x is None else x.double() for x in case.draws))
    gaps = []
    for K in (10**4, 10**5, 10**6):
        terms = list(case.terms(config=SoarConfig(num_sampling_steps=K)))[1:]
        sft = [sft_loss(case.model, case.z0, case.draws.z1, term.sigma, case.cond) for term in terms]
        gaps.append(max((term.error - s.detach()).abs().max().item() for term, s in zip(terms, sft)))
    assert gaps[1] < 0.2 * gaps[0] + 1e-7 and gaps[2] < 0.2 * gaps[1] + 1e-7  # first order in 1 / K


# --- 4. The correction's identities ---


@given(shapes, seeds, st.floats(1e-6, 1.0))
@example((2, 3), 0, 1e-6)
def test_correction_target_leads_to_the_clean_latent_from_any_state(shape, seed, sigma):
    z, z0 = randn(seed, *shape), randn(seed + 1, *shape)
    s = torch.full((shape[0],), sigma, dtype=torch.float64)
    torch.testing.assert_close(z - sigma * soar.correction_target(z, z0, s), z0, rtol=1e-12, atol=1e-12)
    z1 = randn(seed + 2, *shape)
    ideal = soar.correction_target(interpolate(z0, z1, s), z0, s)
    torch.testing.assert_close(ideal, z1 - z0, rtol=1e-12, atol=1e-15 * 30 / sigma)


@given(shapes, seeds, st.floats(0.05, 0.95), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_correction_differs_from_the_ideal_velocity_by_its_closed_form(shape, seed, sigma0, fraction, u):
    z0, z1, v = (randn(seed + i, *shape) for i in range(3))
    sigma1 = sigma0 * (0.05 + 0.95 * fraction)
    sigma = sigma1 + u * (1 - sigma1)
    full = lambda x: torch.full((shape[0],), x, dtype=torch.float64)  # noqa: E731
    z_hat = rollout_step(interpolate(z0, z1, full(sigma0)), v, full(sigma0), full(sigma1))
    z = soar.renoise(z_hat, z1, full(sigma1), full(sigma))
    difference = soar.correction_target(z, z0, full(sigma)) - (z1 - z0)
    alpha = (sigma - sigma1) / (1 - sigma1)
    closed = (1 - alpha) * (sigma1 - sigma0) * (v - (z1 - z0)) / sigma
    torch.testing.assert_close(difference, closed, **CLOSE)
    torch.testing.assert_close(difference, (z - interpolate(z0, z1, full(sigma))) / sigma, **CLOSE)


@given(shapes, seeds, st.floats(0.0, 1.0, exclude_max=True))
@example((2, 3), 0, 0.9999)
def test_renoised_state_is_z1_at_one_and_z_hat_at_its_own_level(shape, seed, sigma_hat):
    z_hat, z1 = randn(seed, *shape), randn(seed + 1, *shape)
    low = torch.full((shape[0],), sigma_hat, dtype=torch.float64)
    assert torch.equal(soar.renoise(z_hat, z1, low, torch.ones_like(low)), z1)
    assert torch.equal(soar.renoise(z_hat, z1, low, low), z_hat)


@given(st.floats(0.0, 1.0, allow_subnormal=False), st.floats(0.1, 10.0))
@example(1.0, 3.3)
def test_sigma_from_t_is_the_shift_formula_and_t_from_sigma_its_inverse(t, shift):
    sigma = soar.sigma_from_t(t, shift)
    assert math.isclose(sigma, shift * t / (1 + (shift - 1) * t), rel_tol=1e-12) and 0 <= sigma <= 1
    assert math.isclose(soar.t_from_sigma(sigma, shift), t, rel_tol=1e-12)
    assert soar.sigma_from_t(1.0, shift) == 1 and soar.sigma_from_t(0.0, shift) == 0
    assert soar.sigma_from_t(t) == soar.sigma_from_t(t, 3.0) and soar.t_from_sigma(t) == soar.t_from_sigma(t, 3.0)
    tensor = torch.tensor([t, 1.0], dtype=torch.float32)
    assert (soar.sigma_from_t(tensor, shift) <= 1).all() and soar.sigma_from_t(tensor, shift)[1] == 1


@given(shapes, seeds, st.floats(-5, 10))
def test_guided_velocity_extrapolates_from_unconditional_to_conditional(shape, seed, w):
    u, c = randn(seed, *shape), randn(seed + 1, *shape)
    torch.testing.assert_close(soar.guided_velocity(u, c, w), (1 - w) * u + w * c, **CLOSE)
    assert torch.equal(soar.guided_velocity(u, c, 0.0), u)


# --- 5, 6, 7. Gradients and normalisation ---


@given(shapes, configs, seeds)
def test_no_gradient_passes_through_the_rollout(shape, config, seed):
    case = Case(shape, config, seed)

    def recording(z, sigma, cond):
        assert not z.requires_grad and not sigma.requires_grad
        return case.model(z, sigma, cond)

    grads = case.grads(sum(term.loss for term in case.terms(recording)))
    assert grads[3] is None  # the parameter of the unconditional branch
    case.z0.requires_grad_()
    aux = list(case.terms())[1:]
    assert torch.autograd.grad(sum(term.loss for term in aux), case.z0, allow_unused=True)[0] is None


@given(shapes, configs, seeds)
def test_backward_term_by_term_equals_backward_of_the_sum(shape, config, seed):
    case = Case(shape, config, seed)
    whole = case.grads(sum(term.loss for term in case.terms()))
    for term in case.terms():
        term.loss.backward()
    assert_all_close([p.grad for p in case.model.parameters()], whole)


@given(shapes, configs, seeds, st.integers(0, 4))
def test_split_batch_with_the_shared_normalizer_equals_the_whole(shape, config, seed, cut):
    case = Case(shape, config, seed)
    cut = min(cut, shape[0] - 1)
    total = soar.loss_normalizer(case.draws.t.double(), config)
    whole, parts = sum(term.loss for term in case.terms()), 0
    for part in (case.part(slice(0, cut)), case.part(slice(cut, None))):
        if len(part.z0):
            parts = parts + sum(term.loss for term in part.terms(normalizer=total))
    torch.testing.assert_close(parts, whole, **CLOSE)
    assert_all_close(case.grads(parts), case.grads(whole))
    halved = sum(term.loss for term in case.terms(normalizer=2 * float(total)))
    torch.testing.assert_close(2 * halved, whole, **CLOSE)


@given(shapes, configs, seeds)
def test_permuting_the_batch_permutes_the_errors(shape, config, seed):
    case = Case(shape, config, seed)
    p = torch.randperm(shape[0], generator=rng(seed))
    for a, b in zip(case.terms(), case.part(p).terms(), strict=True):
        assert_all_close((a.error[p], a.sigma[p], a.loss), (b.error, b.sigma, b.loss))


@given(shapes, configs, seeds, st.floats(0.01, 100))
def test_equal_errors_give_that_loss_for_every_lambda_n_and_m(shape, config, seed, e):
    case = Case(shape, config, seed)

    def off_by_root_e(z, sigma, cond):  # every term's target is (z - z0) / sigma: the base term's equals z1 - z0
        return (z - case.z0) / per_sample(sigma, z) + math.sqrt(e)

    loss = sum(term.loss for term in case.terms(off_by_root_e))
    torch.testing.assert_close(loss, torch.tensor(e, dtype=torch.float64), rtol=1e-8, atol=0)


def test_normalizer_counts_stochastic_points_only_above_the_clean_boundary():
    config = SoarConfig(lambda_aux=0.5, num_aux_points=3, num_rollout_paths=3, num_sampling_steps=4, t_min=0.25)
    t = torch.tensor([0.25, 0.5, 0.5 + 2**-20, 1.0], dtype=torch.float64)  # 0.5 - 1/4 is the boundary itself
    assert soar.loss_normalizer(t, config).item() == 4 + 0.5 * (4 * 3 + 2 * 3 * 2)
    assert soar.loss_normalizer(t, SoarConfig()).item() == 4 + 24
    assert soar.loss_normalizer(t, dataclasses.replace(config, lambda_aux=0.0)).item() == 4
    assert soar.loss_normalizer(t.float(), config).dtype == torch.float32 and soar.loss_normalizer(t, config).ndim == 0
    case = Case((4, 3), config, 0)
    case.draws = case.draws._replace(t=t.float())
    for i, term in enumerate(case.terms()):
        assert (term.error == 0).tolist() == [i > 3, i > 3, False, False]


# --- 8. Forwards ---


@given(shapes, configs, seeds, st.booleans(), st.booleans())
def test_forwards_are_one_plus_one_plus_mn_of_b_samples_in_the_right_grad_mode(shape, config, seed, unguided, enabled):
    case = Case(shape, config, seed)
    calls = []

    def counting(z, sigma, cond):
        calls.append(("uncond" if cond is case.uncond else "cond", torch.is_grad_enabled()))
        assert cond is case.uncond or cond is case.cond
        assert z.shape == shape and sigma.shape == shape[:1]
        return case.model(z, sigma, cond)

    uncond = None if unguided else case.uncond
    with torch.set_grad_enabled(enabled):
        for term in soar_terms(counting, case.z0, case.draws, case.cond, uncond, config):
            assert torch.is_grad_enabled() == enabled
            assert term.loss.requires_grad == enabled and not term.error.requires_grad
    guided = [("uncond", False)] * (not unguided and config.guidance_scale != 1)
    aux = config.num_rollout_paths * config.num_aux_points
    assert calls == [("cond", enabled), *guided, *[("cond", enabled)] * aux]


def test_unguided_rollout_follows_the_conditional_velocity():
    case = Case((2, 3), SoarConfig(guidance_scale=1.0), 0)
    config = SoarConfig(guidance_scale=4.5)
    alone = soar_terms(case.model, case.z0, case.draws, case.cond, None, config)
    for a, b in zip(alone, case.terms(), strict=True):
        assert torch.equal(a.error, b.error)
    assert soar_terms.__defaults__ == (None, SoarConfig()) and soar_loss.__defaults__ == (None, SoarConfig())


@given(configs, seeds, st.booleans())
@example(SoarConfig(guidance_scale=1.0), 0, False)  # the rollout keeps the base term's velocity itself
def test_one_graph_is_alive_at_a_time_whether_backward_ran_or_the_term_was_dropped(config, seed, backward):
    case = Case((2, 3), config, seed)
    graphs = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            kept = v.clone()
            ctx.save_for_backward(kept)
            graphs.append(weakref.ref(kept))
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def saving(z, sigma, cond):
        assert sum(graph() is not None for graph in graphs) == 0
        return Save.apply(case.model(z, sigma, cond))

    terms, losses = case.terms(saving), []
    while (term := next(terms, None)) is not None:
        if backward:
            term.loss.backward()
        losses.append(weakref.ref(term.loss))
        del term
        assert all(loss() is None for loss in losses[:-1])


# --- 9. Steps of the rollout ---


@given(shapes, seeds, levels, levels, st.sampled_from(["simple", "flow_sde", "cps"]), st.sampled_from([1.0, 3.0, 5.0]))
def test_stochastic_step_without_noise_is_the_ode_step(shape, seed, a, b, kind, shift):
    z, v, noise = (randn(seed + i, *shape) for i in range(3))
    sigma, sigma_next = (torch.full((shape[0],), x, dtype=torch.float64) for x in (max(a, b), min(a, b)))
    step = rollout_step(z, v, sigma, sigma_next, kind=kind, noise_scale=0.0, noise=noise, shift=shift)
    torch.testing.assert_close(step, rollout_step(z, v, sigma, sigma_next), **CLOSE)
    torch.testing.assert_close(step, z + per_sample(sigma_next - sigma, z) * v, **CLOSE)


def coefficients(kind, sigma, sigma_next, eta, shift=3.0):
    """a, b, c of z_to = a z0 + b z1 + c n for the per-sample exact velocity: from orthogonal z0, z1, n."""
    z0, z1, n = torch.eye(3, dtype=torch.float64).unsqueeze(1)
    s, s_next = (torch.tensor([x], dtype=torch.float64) for x in (sigma, sigma_next))
    noise = {} if kind == "ode" else {"noise": n}
    step = rollout_step(interpolate(z0, z1, s), z1 - z0, s, s_next, kind=kind, noise_scale=eta, shift=shift, **noise)
    return step[0].tolist()


@given(st.floats(0.01, 0.99), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_stochastic_steps_keep_the_marginal_of_the_path(sigma, fraction, eta):
    """With x0 = z0 and x1 = z1 the marginal of the path is (1 - sigma) z0 + sigma N(0, I)."""
    sigma_next = sigma * fraction
    for kind in ("sde", "cps"):
        a, b, c = coefficients(kind, sigma, sigma_next, eta)
        assert math.isclose(a, 1 - sigma_next, rel_tol=1e-12)
        assert math.isclose(b * b + c * c, sigma_next**2, rel_tol=1e-9, abs_tol=1e-15)
    a, b, c = coefficients("sde", sigma, sigma_next, eta)
    assert abs(b) < 1e-15 and math.isclose(c, sigma_next, rel_tol=1e-12)  # x1 is forgotten
    a, b, c = coefficients("cps", sigma, sigma_next, eta)
    assert math.isclose(c, sigma_next * math.sin(eta * math.pi / 2), rel_tol=1e-12, abs_tol=1e-15) and b > -1e-15
    a, b, c = coefficients("flow_sde", sigma, sigma_next, eta)
    r, d = eta**2 / (1 - sigma), sigma_next - sigma
    assert math.isclose(a, 1 - sigma_next, rel_tol=1e-9)
    assert math.isclose(c * c, -r * sigma * d, rel_tol=1e-9, abs_tol=1e-15)
    second_order = (r + r * r / 4) * d * d
    assert math.isclose(b * b + c * c, sigma_next**2 + second_order, rel_tol=1e-9, abs_tol=1e-12)
    a, b, c = coefficients("simple", sigma, sigma_next, eta)
    assert math.isclose(a, 1 - sigma_next, rel_tol=1e-12) and math.isclose(b, sigma_next, rel_tol=1e-9, abs_tol=1e-15)
    assert math.isclose(c, eta * math.sqrt(-d), rel_tol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_sde_step_from_pure_noise_divides_by_the_level_of_t_0_999(shift):
    s = soar.sigma_from_t(0.999, shift)
    for sigma in (1.0, (1 + s) / 2):
        a, b, c = coefficients("flow_sde", sigma, 0.9, 0.5, shift)
        S = 0.5 * math.sqrt(sigma / (1 - s))
        assert math.isclose(c, S * math.sqrt(sigma - 0.9), rel_tol=1e-9)
    below = coefficients("flow_sde", 0.99, 0.9, 0.5, shift)[2]
    assert math.isclose(below, 0.5 * math.sqrt(0.99 / 0.01 * 0.09), rel_tol=1e-9)


@given(shapes, seeds)
def test_rollout_step_takes_half_the_noise_and_shift_three_by_default(shape, seed):
    z, v, noise = (randn(seed + i, *shape) for i in range(3))
    sigma, sigma_next = torch.ones(shape[0]), torch.full((shape[0],), 0.9)
    for kind in SDE_TYPES:
        default = rollout_step(z, v, sigma, sigma_next, kind=kind, noise=noise)
        assert torch.equal(
            default, rollout_step(z, v, sigma, sigma_next, kind=kind, noise_scale=0.5, noise=noise, shift=3.0)
        )


# --- 10. Precision ---


@given(shapes, seeds, st.floats(0.003, 1.0), st.sampled_from([torch.bfloat16, torch.float16]))
def test_targets_from_half_precision_inputs_are_exact_to_1e5(shape, seed, sigma, dtype):
    z0, z1 = randn(seed, *shape).to(dtype), randn(seed + 1, *shape).to(dtype)
    s = torch.full((shape[0],), sigma, dtype=torch.float32)
    z, exact = interpolate(z0, z1, s), interpolate(z0.double(), z1.double(), s.double())
    target, wide = soar.correction_target(z, z0.float(), s), soar.correction_target(exact, z0.double(), s.double())
    assert z.dtype == target.dtype == torch.float32 and wide.dtype == torch.float64
    # eps of float32 is 1.2e-7 and z - z0 cancels: the error relative to the largest operand over sigma is what counts
    scale = (z0.double().abs() + z1.double().abs()).max() / sigma
    assert (target - wide).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale
    assert soar.correction_target(z1, z0, s).dtype == torch.float32
    assert soar.guided_velocity(z0, z1, 4.5).dtype == rollout_step(z0, z1, s, s).dtype == torch.float32
    assert soar.renoise(z0, z1, s / 2, s).dtype == torch.float32


@pytest.mark.parametrize("seed", range(3))
def test_target_from_bf16_latents_is_within_1e5_of_its_norm_from_sigma_0_003_up(seed):
    z0, z1 = (randn(10 * seed + i, 64, 16, 8, 8).to(torch.bfloat16) for i in range(2))
    sigma = torch.logspace(math.log10(0.003), 0, 64)
    target = soar.correction_target(interpolate(z0, z1, sigma), z0.float(), sigma).double()
    off = (target - (z1.double() - z0.double())).flatten(1).norm(dim=1) / (z1.double() - z0.double()).flatten(1).norm(
        dim=1
    )
    # z is rounded at float32's eps and the target divides that by sigma: 1.03e-5 at 0.003 itself, less above
    assert (off <= 1.05e-5).all() and (off[sigma >= 0.004] <= 1e-5).all()


@pytest.mark.parametrize("shared", [True, False])
def test_training_step_on_bf16_latents_agrees_with_float64_to_1e5(shared):
    """Where bf16 holds z0, z1 and the model's outputs exactly, only the rounding of states, targets, weights is left.

    A float32 target is off by some 4 eps (|z0| + |z1| + |v|) / sigma' <= 6e-6, as sigma' >= sigma(0.25) = 0.5 and the
    sum is about 6; an error of order 1, by twice that. A target rounded to bf16 is off by 2e-3.
    """
    config = SoarConfig(num_rollout_paths=2, num_sampling_steps=4, t_min=0.25, shared_noise=shared)
    shape = (64, 16, 8, 8)
    z0, z1, cond, uncond = (randn(i, *shape).to(torch.bfloat16) for i in range(4))
    draws, sigma = draw(shape, config, rng(4)), torch.linspace(0.5, 1, 64)
    velocity = lambda z, s, c: c.to(z.dtype)  # noqa: E731
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x0, x1, s = z0.to(dtype), z1.to(dtype), sigma.to(torch.promote_types(dtype, torch.float32))
        columns = zip(*soar_terms(velocity, x0, draws, cond, uncond, config, weighting=torch.exp))
        results.append((*map(torch.stack, columns), sft_loss(velocity, x0, x1, s, cond, weighting=torch.exp)))
    for a, b in zip(*results):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float64])
def test_model_sees_latents_in_z0s_dtype_and_levels_in_float32_or_better(dtype, output):
    wide = torch.promote_types(dtype, torch.float32)
    z0, config = randn(1, 2, 3, 4).to(dtype), SoarConfig(num_rollout_paths=2)

    def velocity(z, sigma, cond):
        assert z.dtype == dtype and sigma.dtype == wide
        return (z * scale).to(output)

    scale = torch.ones((), dtype=dtype, requires_grad=True)
    weighting = lambda s: s.double()  # noqa: E731
    for term in soar_terms(velocity, z0, draw(z0.shape, config, rng(0)), "a", "b", config, weighting=weighting):
        assert term.loss.dtype == term.error.dtype == term.sigma.dtype == wide
    z1, sigma = randn(2, 2, 3, 4).to(dtype), torch.tensor([0.3, 0.7], dtype=torch.bfloat16)
    assert sft_loss(velocity, z0, z1, sigma, None, weighting=weighting).dtype == wide


@pytest.mark.parametrize("outside", [False, True])
def test_bf16_autocast_gives_every_parameter_the_float32_gradient(outside):
    """Autocast caches the cast weights; a cast made under no_grad must not cut the later terms' gradients."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    z0, config = randn(1, 32, 16, dtype=torch.float32), SoarConfig(guidance_scale=2.0)
    grads = []
    for enabled in (False, True):
        cast = lambda on: torch.autocast("cpu", torch.bfloat16, enabled=on)  # noqa: E731

        def velocity(z, sigma, cond, enabled=enabled, cast=cast):
            with cast(enabled):
                return net(z + sigma[:, None] * cond)

        net.zero_grad()
        with cast(enabled and outside):
            terms = soar_terms(velocity, z0, draw(z0.shape, config, rng(2)), 1.0, 0.5, config)
            for term in terms:
                term.loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for exact, rough in zip(*grads):
        assert (exact - rough).norm() <= 4 * torch.finfo(torch.bfloat16).eps * exact.norm()


# --- 11, 12. Draws ---


@given(shapes, configs, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_loss_and_gradients_are_finite_at_both_ends_of_time(shape, config, seed, dtype):
    case = Case(shape, config, seed, dtype)
    ends = torch.tensor([config.t_min, 1.0, config.t_min + 1 / config.num_sampling_steps, config.t_min * (1 + 1e-6)])
    case.draws = case.draws._replace(t=ends[torch.arange(shape[0]) % 4].clamp(max=1))
    for u in (torch.zeros_like(case.draws.u), torch.full_like(case.draws.u, 1 - 2**-24)):
        case.draws = case.draws._replace(u=u)
        terms = list(case.terms())
        loss = sum(term.loss for term in terms)
        grads = [g for g in case.grads(loss) if g is not None]
        assert len(grads) == 3
        for x in (loss, *grads, *(t.error for t in terms), *(t.sigma for t in terms)):
            assert x.isfinite().all()
        assert all((0 < t.sigma).all() and (t.sigma <= 1).all() for t in terms)
        t1 = (case.draws.t.double() - 1 / config.num_sampling_steps).clamp(min=config.t_min)
        upper = (config.sigma_upper_ratio * case.sigma0()).clamp(max=1)
        end = upper if u.any() else soar.sigma_from_t(t1, config.shift)
        for term in terms[1:]:  # t rounds to 6e-8 in float32, and d sigma / d t is at most the shift, 6
            torch.testing.assert_close(term.sigma.double(), end, rtol=0, atol=1e-6)


@given(shapes, configs, seeds)
def test_draws_are_a_function_of_the_generators_state_alone(shape, config, seed):
    global_state, default = torch.get_rng_state(), torch.get_default_dtype()
    generator = rng(seed)
    first, second = draw(shape, config, generator), draw(shape, config, generator)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # a default device that is not the generator's
            again = draw(shape, config, generator.manual_seed(seed))
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), global_state)
    M, N = config.num_rollout_paths, config.num_aux_points
    wanted = [shape, shape[:1], (M, N, shape[0]), (M - 1, *shape), None if config.shared_noise else (M, *shape)]
    for a, b, size in zip(first, again, wanted, strict=True):
        assert (a is None) == (b is None) == (size is None)
        assert a is None or (torch.equal(a, b) and a.shape == size and a.dtype == torch.float32)
    assert not torch.equal(first.z1, second.z1) and not torch.equal(first.u, second.u)
    assert (config.t_min <= first.t.double() + 1e-9).all() and (first.t <= 1).all()
    assert (first.u >= 0).all() and (first.u < 1).all()
    generator = rng(seed)  # the draws again, in their order
    z1, n = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    t = torch.sigmoid(config.logit_mean + config.logit_std * n).clamp(min=config.t_min)
    u = torch.rand(M, N, shape[0], generator=generator)
    assert torch.equal(first.z1, z1) and torch.equal(first.t, t) and torch.equal(first.u, u)
    for other in (SoarConfig(lambda_aux=0.0), SoarConfig(num_aux_points=0), SoarConfig(num_rollout_paths=4)):
        other = dataclasses.replace(other, logit_mean=config.logit_mean, logit_std=config.logit_std, t_min=config.t_min)
        other = draw(shape, other, rng(seed))
        assert torch.equal(first.z1, other.z1) and torch.equal(first.t, other.t)


def test_draws_have_their_stated_distributions():
    config = SoarConfig(num_rollout_paths=3, logit_mean=0.5, logit_std=0.7, shared_noise=False)
    n = 40_000
    draws = draw((n, 2), config, rng(0))
    se = 5 / math.sqrt(n)  # five standard errors of a mean of unit variance
    logit = torch.logit(draws.t.double())
    assert abs(logit.mean() - 0.5) < 0.7 * se and abs(logit.std() - 0.7) < 0.7 * se
    u = draws.u.double()
    assert (u.mean(2) - 0.5).abs().max() < se and (u.var(2) - 1 / 12).abs().max() < se
    normals = torch.cat(
        [draws.z1.T, draws.path_noise.transpose(1, 2).flatten(0, 1), draws.path_z1.transpose(1, 2).flatten(0, 1)]
    )
    both = torch.cat([normals.double(), logit[None], u.flatten(0, 1)])
    assert (normals.mean(1)).abs().max() < se and (normals.var(1) - 1).abs().max() < 2 * se
    assert (torch.corrcoef(both) - torch.eye(len(both))).abs().max() < se  # every row independent of every other
    assert draw((1000,), SoarConfig(logit_mean=-50.0), rng(0)).t.unique().tolist() == pytest.approx([1e-3])
    assert draw((1000,), SoarConfig(logit_mean=50.0), rng(0)).t.unique().tolist() == [1.0]


# --- 13. Bad arguments ---


def test_config_defaults_are_the_published_ones():
    assert dataclasses.asdict(SoarConfig()) == {
        "lambda_aux": 1.0, "num_aux_points": 6, "num_rollout_paths": 1, "num_sampling_steps": 40, "guidance_scale": 4.5,
        "shift": 3.0, "t_min": 1e-3, "logit_mean": 0.0, "logit_std": 1.0, "sde_type": "flow_sde",
        "sde_noise_scale": 0.5, "shared_noise": True, "sigma_upper_ratio": math.inf,
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        SoarConfig().shift = 1.0
    assert set(BOUNDS) == {field.name for field in dataclasses.fields(SoarConfig)}


BOUNDS = {  # field: (what is expected, values that must pass, values that must not)
    "lambda_aux": ("float in [0, inf)", [0, 0.1, 5.0], [-1e-9, math.inf, math.nan, "1", None, True]),
    "num_aux_points": ("int in [0, inf)", [0, 1, 100], [-1, 1.0, 6.0, True, "6", None]),
    "num_rollout_paths": ("int in [1, inf)", [1, 5], [0, -1, 1.0, True, None]),
    "num_sampling_steps": ("int in [1, inf)", [1, 10**9], [0, -40, 40.0, True, None]),
    "guidance_scale": ("float in (-inf, inf)", [0, 1.0, -3.5], [math.inf, -math.inf, math.nan, "4.5", False, None]),
    "shift": ("float in (0, inf)", [1e-3, 1, 3.0], [0, -1.0, math.inf, math.nan, "3", True]),
    "t_min": ("float in (0, 1)", [1e-9, 0.5, 0.999], [0, 0.0, 1, 1.0, -0.1, math.nan, "0", True]),
    "logit_mean": ("float in (-inf, inf)", [-3, 0, 3.5], [math.inf, -math.inf, math.nan, None, True]),
    "logit_std": ("float in (0, inf)", [1e-3, 1, 5.0], [0, -1.0, math.inf, math.nan, None, True]),
    "sde_type": ("str in ('simple', 'sde', 'flow_sde', 'cps')", list(SDE_TYPES), ["ode", "", "SDE", None, 1]),
    "sde_noise_scale": ("float in [0, inf)", [0, 0.5, 1, 7.0], [-1e-9, math.inf, math.nan, None, True]),
    "shared_noise": ("bool in (True, False)", [True, False], [0, 1, None, "yes"]),
    "sigma_upper_ratio": ("float in [1, inf]", [1, 1.0, 1.5, math.inf], [0.999, 0, -math.inf, math.nan, None, True]),
}


@pytest.mark.parametrize("field", BOUNDS)
def test_config_names_the_field_the_value_and_the_range_when_out_of_range(field):
    expected, good, bad = BOUNDS[field]
    for value in good:
        assert getattr(SoarConfig(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError) as error:
            SoarConfig(**{field: value})
        assert str(error.value) == f"SoarConfig.{field} is {value!r}, expected {expected}"


def test_cps_noise_scale_is_at_most_one():
    assert SoarConfig(sde_type="cps", sde_noise_scale=1).sde_noise_scale == 1
    with pytest.raises(ValueError, match=r"^SoarConfig\.sde_noise_scale is 1.01, expected float in \[0, 1\]$"):
        SoarConfig(sde_type="cps", sde_noise_scale=1.01)


X, S = randn(0, 2, 3, dtype=torch.float32), torch.tensor([0.3, 0.7])
STATE_FUNCTIONS = {
    "interpolate": (soar.interpolate, {"z0": X, "z1": X}, {"sigma": S}),
    "guided_velocity": (lambda **k: soar.guided_velocity(guidance_scale=2.0, **k), {"v_uncond": X, "v_cond": X}, {}),
    "rollout_step": (soar.rollout_step, {"z": X, "v": X}, {"sigma": S, "sigma_next": S}),
    "rollout_step_sde": (
        lambda **k: rollout_step(kind="sde", **k), {"z": X, "v": X, "noise": X}, {"sigma": S, "sigma_next": S}
    ),
    "renoise": (soar.renoise, {"z_hat": X, "z1": X}, {"sigma_hat": S, "sigma": S}),
    "correction_target": (soar.correction_target, {"z": X, "z0": X}, {"sigma": S}),
    "sft_loss": (
        lambda **k: sft_loss(lambda z, s, c: pytest.fail("called"), cond=None, **k), {"z0": X, "z1": X}, {"sigma": S}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_FUNCTIONS)
def test_state_functions_name_what_came_and_what_was_expected(name):
    function, states, levels = STATE_FUNCTIONS[name]
    if name != "sft_loss":  # a level's dtype is its rounding, never that of the arithmetic
        assert function(**states, **levels).shape == X.shape
        half = {key: x.bfloat16() for key, x in levels.items()}
        for dtype in (torch.float32, torch.float64):
            same = function(**states, **{key: x.to(dtype) for key, x in half.items()})
            assert same.dtype == torch.float32 and torch.equal(same, function(**states, **half))
        assert function(**{key: x.clone().requires_grad_() for key, x in states.items()}, **levels).requires_grad
    first, *others = states
    for other in others:
        for bad, message in (
            (torch.zeros(2, 4), rf"{other} is \(2, 4\) torch.float32 on cpu, expected \(2, 3\) torch.float32 on cpu"),
            (X.double(), rf"{other} is \(2, 3\) torch.float64 on cpu, expected \(2, 3\) torch.float32 on cpu"),
            (X.to("meta"), rf"{other} is \(2, 3\) torch.float32 on meta, expected \(2, 3\) torch.float32 on cpu"),
            ([0.0], rf"{other} is a list, expected \(2, 3\) torch.float32 on cpu"),
        ):
            with pytest.raises(ValueError, match=f"^{message}$"):
                function(**(states | {other: bad}), **levels)
    for level in levels:
        for bad, message in (
            (torch.zeros(3), rf"{level} is \(3,\) torch.float32 on cpu, expected \(2,\) floating on cpu"),
            (torch.zeros(2, 1), rf"{level} is \(2, 1\) torch.float32 on cpu, expected \(2,\) floating on cpu"),
            (torch.zeros(2).long(), rf"{level} is \(2,\) torch.int64 on cpu, expected \(2,\) floating on cpu"),
            (S.to("meta"), rf"{level} is \(2,\) torch.float32 on meta, expected \(2,\) floating on cpu"),
            (0.5, rf"{level} is a float, expected \(2,\) floating on cpu"),
        ):
            with pytest.raises(ValueError, match=f"^{message}$"):
                function(**states, **(levels | {level: bad}))
    for bad, came in (
        (torch.zeros(3), "torch.Size([3])"),
        (torch.zeros(0, 3), "torch.Size([0, 3])"),
        (torch.zeros(2, 0), "torch.Size([2, 0])"),
        ("1.0", "'1.0'"),
    ):
        with pytest.raises(ValueError) as error:
            function(**{key: bad for key in states}, **levels)
        assert str(error.value) == f"{first} is {came}, expected a Tensor (B, ...), no dimension 0"
    with pytest.raises(ValueError, match=rf"^{first} is \(2, 3\) torch.int64 on cpu"):
        function(**{key: X.long() for key in states}, **levels)


def test_rollout_step_refuses_an_unknown_kind_and_noise_that_does_not_fit_it():
    for kind, noise in (("euler", None), ("euler", X), ("ode", X), *((kind, None) for kind in SDE_TYPES)):
        with pytest.raises(ValueError) as error:
            rollout_step(X, X, S, S, kind=kind, noise=noise)
        came = f"kind is '{kind}' and noise a {type(noise).__name__}"
        assert str(error.value) == f"{came}, expected 'ode' and None or {SDE_TYPES}"


def test_soar_terms_refuses_bad_arguments_before_the_model_is_called():
    def velocity(z, sigma, cond):
        pytest.fail("the model was called")

    config = SoarConfig(num_rollout_paths=2)
    z0, draws = torch.zeros(2, 3, 4), draw((2, 3, 4), config, rng(0))
    fresh = draw((2, 3, 4), dataclasses.replace(config, shared_noise=False), rng(0))
    for bad, message in (
        ({"z0": torch.zeros(2)}, r"z0 is torch.Size\(\[2\]\), expected a Tensor"),
        ({"z0": z0.long()}, r"z0 is \(2, 3, 4\) torch.int64"),
        ({"z0": torch.zeros(3, 3, 4)}, r"draws.z1 is \(2, 3, 4\) torch.float32 on cpu, expected \(3, 3, 4\)"),
        ({"z0": z0.to("meta")}, r"draws.z1 is .* on cpu, expected \(2, 3, 4\) floating on meta"),
        ({"draws": draws._replace(t=draws.t[:1])}, r"draws.t is \(1,\) torch.float32 on cpu, expected \(2,\)"),
        ({"draws": draws._replace(t=None)}, r"draws.t is a NoneType, expected \(2,\)"),
        ({"draws": draws._replace(u=draws.u[:1])}, r"draws.u is \(1, 6, 2\) .* expected \(2, 6, 2\)"),
        ({"draws": draws._replace(path_noise=draws.z1)}, r"draws.path_noise is \(2, 3, 4\) .* expected \(1, 2, 3, 4\)"),
        ({"draws": draws._replace(z1=draws.z1.long())}, r"draws.z1 is \(2, 3, 4\) torch.int64"),
        ({"draws": fresh}, r"draws.path_z1 is \(2, 2, 3, 4\) .* expected None"),
        (
            {"config": dataclasses.replace(config, shared_noise=False)},
            r"draws.path_z1 is a NoneType, expected \(2, 2, 3",
        ),
        ({"config": SoarConfig()}, r"draws.u is \(2, 6, 2\) torch.float32 on cpu, expected \(1, 6, 2\)"),
        ({"uncond": config}, "uncond is a SoarConfig, expected a Tensor like cond, or None$"),
        ({"uncond": ["a cat"]}, "uncond is a list, expected a Tensor like cond, or None$"),
        ({"weighting": lambda s: s[:1]}, r"weighting\(sigma\) is \(1,\) torch.float32 on cpu, expected \(2,\)"),
        ({"weighting": lambda s: 1.0}, r"weighting\(sigma\) is a float, expected \(2,\)"),
    ):
        arguments = {"z0": z0, "draws": draws, "cond": z0, "uncond": z0, "config": config} | bad
        with pytest.raises(ValueError, match=f"^{message}"):
            terms = soar_terms(velocity, **arguments)
            assert "weighting" in bad, "all but the weighting is checked before the first term is asked for"
            next(terms)


@pytest.mark.parametrize(
    "cond, uncond", [(X, torch.nn.Parameter(X)), (torch.nn.Parameter(X), X), ("a", ""), ("a", None)]
)
def test_conditioning_of_any_one_type_is_passed_on_untouched(cond, uncond):
    seen = []
    velocity = lambda z, s, c: seen.append(c) or z  # noqa: E731
    config = SoarConfig(num_aux_points=1)
    list(soar_terms(velocity, X, draw(X.shape, config, rng(0)), cond, uncond, config))
    expected = [cond, uncond, cond] if uncond is not None else [cond, cond]
    assert len(seen) == len(expected) and all(a is b for a, b in zip(seen, expected))


@pytest.mark.parametrize(
    "output, came",
    [
        (lambda z: z[:, :1], r"\(2, 1\) torch.float32 on cpu"),
        (lambda z: (z,), "a tuple"),
        (lambda z: z.long(), r"\(2, 3\) torch.int64 on cpu"),
        (lambda z: z.to("meta"), r"\(2, 3\) torch.float32 on meta"),
    ],
)
def test_velocity_of_another_shape_or_type_is_refused(output, came):
    draws = draw(X.shape, SoarConfig(), rng(0))
    with pytest.raises(ValueError, match=rf"^velocity\(z, sigma, cond\) is {came}, expected \(2, 3\) floating on cpu$"):
        next(soar_terms(lambda z, s, c: output(z), X, draws, None))


def test_terms_equal_the_papers_formulas_at_the_ends_of_u():
    for u in (0.0, 1 - 2**-24):
        case = Case((3, 2), SoarConfig(), 5)
        case.draws.u.fill_(u)
        for term, ref in zip(case.terms(), reference_terms(case), strict=True):
            assert_all_close(term, ref)


@pytest.mark.parametrize("name", [name for name in STATE_FUNCTIONS if name != "sft_loss"])
def test_state_functions_pass_gradients_to_every_state(name):
    function, states, levels = STATE_FUNCTIONS[name]
    states = {key: randn(i, 2, 3).requires_grad_() for i, key in enumerate(states)}
    levels = {key: torch.full((2,), 0.6 - 0.1 * i, dtype=torch.float64) for i, key in enumerate(levels)}
    if name == "renoise":
        levels = {"sigma_hat": levels["sigma"], "sigma": levels["sigma_hat"]}
    assert torch.autograd.gradcheck(lambda *x: function(**dict(zip(states, x)), **levels), tuple(states.values()))


def test_options_are_given_by_keyword():
    for call in (
        lambda: rollout_step(X, X, S, S, "ode"),
        lambda: sft_loss(lambda z, s, c: z, X, X, S, None, torch.exp),
        lambda: soar_terms(lambda z, s, c: z, X, None, None, None, SoarConfig(), torch.exp),
        lambda: soar_loss(lambda z, s, c: z, X, None, None, SoarConfig(), rng(0)),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()


# --- 14. Two ranks ---


def _rank(rank, shape, config, seed, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = Case(shape, config, seed)
    part = case.part(slice(rank * shape[0] // 2, (rank + 1) * shape[0] // 2))
    case.model.null.requires_grad_(False)
    ddp = torch.nn.parallel.DistributedDataParallel(case.model)
    total = soar.loss_normalizer(case.draws.t.double(), config) / 2  # DDP averages over the two ranks
    terms = part.terms(ddp, normalizer=total)
    last = config.num_rollout_paths * config.num_aux_points
    for _ in range(last):
        with ddp.no_sync():
            next(terms).loss.backward()
    local = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    next(terms).loss.backward()
    grads = [p.grad for p in case.model.parameters() if p.grad is not None]
    assert not any(torch.equal(a, b) for a, b in zip(local, grads))
    from safetensors.torch import save_file

    save_file({str(i): g for i, g in enumerate(grads)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_ranks_under_one_no_sync_schedule_get_the_single_process_gradients(tmp_path):
    from safetensors.torch import load_file

    shape, seed = (4, 3, 2), 7
    config = SoarConfig(num_rollout_paths=2, num_aux_points=2, num_sampling_steps=2)
    torch.multiprocessing.spawn(_rank, (shape, config, seed, str(tmp_path)), nprocs=2)
    case = Case(shape, config, seed)
    expected = [g for g in case.grads(sum(term.loss for term in case.terms())) if g is not None]
    for rank in range(2):
        got = load_file(tmp_path / f"{rank}.safetensors")
        assert_all_close([got[str(i)] for i in range(len(got))], expected)
