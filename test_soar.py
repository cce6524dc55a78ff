"""Proofs of soar.py, over random shapes, settings, noise levels and differentiable models.

    pytest test_soar.py                  # 30 examples of each property
    EXAMPLES=2000 pytest test_soar.py    # more of them

Sections 1 to 6 are theorems, each stated as a formula. A second implementation follows, then the
stochastic steps, precision, draws, and what is refused. Hypothesis chooses shapes, settings and
seeds; tensors come from torch.Generator().manual_seed(seed), in float64 unless a test is about
precision. CLOSE fits values up to 1e4 after some hundred float64 operations, 1e-16 off in each.
"""

import copy
import math
import os
import weakref
from dataclasses import FrozenInstanceError, asdict, replace
from functools import partial
from math import inf, nan

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.testing import assert_close

import soar
from soar import SDE_TYPES, Draws, SoarConfig, draw, interpolate, rollout_step, soar_terms

examples = int(os.environ.get("EXAMPLES", 30))
settings.register_profile("soar", max_examples=examples, derandomize=True, deadline=None)
settings.load_profile("soar")

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def full(shape, sigma):
    """One level for all samples of a batch of this shape."""
    return torch.full(shape[:1], sigma, dtype=torch.float64)


class Model(torch.nn.Module):
    """A smooth random velocity. cond is (B, elements); without a prompt it is `null`, (elements,),
    a parameter like the others, which broadcasts over the samples."""

    def __init__(self, shape, seed, dtype):
        super().__init__()
        size = math.prod(shape[1:])
        self.weight = Parameter(randn(seed + 1, size, size))
        self.time = Parameter(randn(seed + 2, size))
        self.scale = Parameter(randn(seed + 3, size))
        self.null = Parameter(randn(seed + 4, size))
        self.to(dtype)

    def forward(self, z, sigma, cond):
        time = torch.sin(3 * sigma.to(z.dtype))[:, None] * self.time
        x = torch.tanh(z.flatten(1) @ self.weight + time)
        return (self.scale * x + cond).reshape(z.shape)


class Case:
    """A model, latents, prompts and draws: functions of shape, config and seed alone."""

    def __init__(self, shape, config, seed, dtype=torch.float64):
        self.shape, self.config = shape, config
        self.model = Model(shape, seed, dtype)
        self.z0 = randn(seed + 10, *shape).to(dtype)
        elements = math.prod(shape[1:])
        self.cond = randn(seed + 11, shape[0], elements).to(dtype)
        self.draws = draw(shape, config, rng(seed + 12))

    def arguments(self, velocity=None):
        velocity = velocity or self.model
        return velocity, self.z0, self.draws, self.cond, self.model.null, self.config

    def terms(self, velocity=None, **options):
        return soar_terms(*self.arguments(velocity), **options)

    def loss(self, velocity=None, **options):
        return sum(term.loss for term in self.terms(velocity, **options))

    def sft(self, sigma, **options):
        """SFT of each sample, at these levels."""
        z1 = self.draws.z1.to(self.z0.dtype)
        return soar.sft_loss(self.model, self.z0, z1, sigma, self.cond, **options)

    def gradients(self, loss):
        options = {"allow_unused": True, "retain_graph": True}
        return torch.autograd.grad(loss, list(self.model.parameters()), **options)


any_of = st.sampled_from
seeds = st.integers(0, 2**32 - 1)
levels = st.floats(0, 1)
sizes = st.lists(st.integers(1, 3), min_size=1, max_size=4)  # (C,) to (C, T, H, W)
shapes = st.builds(lambda batch, size: (batch, *size), st.integers(1, 4), sizes)
configs = st.builds(
    SoarConfig,
    lambda_aux=any_of([0.1, 1.0, 2.5]),
    num_aux_points=any_of([1, 2, 3]),
    num_rollout_paths=any_of([1, 2, 3]),
    num_sampling_steps=any_of([1, 2, 4, 40]),
    guidance_scale=any_of([0.0, 1.0, 4.5, -2.0]),
    shift=any_of([0.5, 1.0, 3.0, 6.0]),
    t_min=any_of([1e-3, 0.25]),
    logit_mean=any_of([-1.0, 0.0, 1.0]),
    logit_std=any_of([0.5, 1.0, 3.0]),
    sde_type=any_of(SDE_TYPES),
    sde_noise_scale=any_of([0.0, 0.5, 1.0]),
    shared_noise=any_of([True, False]),
    sigma_upper_ratio=any_of([1.0, 1.5, inf]),
)
cases = st.builds(Case, shapes, configs, seeds)


# --- 1. Without auxiliary terms SOAR is SFT

no_lambda = configs.map(lambda config: replace(config, lambda_aux=0.0))
no_points = configs.map(lambda config: replace(config, num_aux_points=0))
sft_cases = st.builds(Case, shapes, no_lambda | no_points, seeds, any_of(DTYPES))


@given(sft_cases)
def test_loss_and_gradients_equal_sft_bit_for_bit_when_lambda_or_n_is_zero(case):
    """lambda N = 0:  L = 1/B sum_b w(sigma) mean |v(z, sigma) - (z1 - z0)|^2,  dL too."""
    dtype, shift, calls = case.z0.dtype, case.config.shift, []
    case.draws = case.draws._replace(z1=case.draws.z1.to(dtype).float())  # exact in dtype
    wide = torch.promote_types(dtype, torch.float32)
    z0 = case.z0.to(wide)
    z1 = case.draws.z1.to(wide)
    t = case.draws.t.to(wide)

    def velocity(z, sigma, cond):
        calls.append(cond)
        return case.model(z.to(dtype), sigma, cond)

    def weighting(sigma):  # a learned one: it has a gradient too
        return sigma + case.model.null.mean()

    sigma = shift * t / (shift * t + (1 - t))
    s = sigma.reshape(-1, *[1] * (z0.ndim - 1))
    v = velocity((1 - s) * z0 + s * z1, sigma, case.cond).to(wide)
    error = ((v - (z1 - z0)) ** 2).flatten(1).mean(1)
    expected = (weighting(sigma) * error).sum() / len(z0)

    (term,) = case.terms(velocity, weighting=weighting)
    inputs = case.arguments(velocity)[:4]  # uncond is not needed
    loss = soar.soar_loss(*inputs, config=case.config, weighting=weighting)
    each = case.sft(sigma.double(), weighting=weighting)
    assert len(calls) == 3  # expected, term and loss take one each
    assert each.shape == case.shape[:1]
    for ours in (term.loss, loss, each.sum() / len(z0)):
        assert torch.equal(ours, expected)
        assert_close(case.gradients(ours), case.gradients(expected), **EXACT)


# --- 2. With an exact model each auxiliary term is SFT

ode_configs = configs.map(lambda config: replace(config, num_rollout_paths=1, shared_noise=True))
ode_cases = st.builds(Case, shapes, ode_configs, seeds)


@given(ode_cases)
def test_aux_term_equals_sft_at_sigma_aux_when_the_rollout_is_exact(case):
    """v = z1 - z0:  z_aux = (1 - sigma_aux) z0 + sigma_aux z1,  its target is z1 - z0.
    The calls that make the rollout are exact, the base term's with cond and, if guided, that with
    uncond; the calls at points are the model's, or all errors would be 0."""
    z1, calls = case.draws.z1.double(), []
    exact_calls = 1 if case.config.guidance_scale == 1 else 2

    def velocity(z, sigma, cond):
        calls.append(cond)
        assert_close(z, interpolate(case.z0, z1, sigma), rtol=1e-12, atol=1e-12)
        return z1 - case.z0 if len(calls) <= exact_calls else case.model(z, sigma, cond)

    base, *aux = case.terms(velocity, weighting=torch.exp)
    assert (base.error == 0).all()
    factor = case.config.lambda_aux / soar.loss_normalizer(case.draws.t.double(), case.config)
    for term in aux:
        assert_close(term.error, case.sft(term.sigma).detach(), **CLOSE)
        sft = case.sft(term.sigma, weighting=torch.exp)
        assert_close(term.loss, factor * sft.sum(), **CLOSE)


# --- 3. With ever more sampler steps too

@given(shapes, seeds)
def test_aux_terms_tend_to_sft_at_sigma_aux_as_the_number_of_steps_grows(shape, seed):
    """K -> infinity:  error(z_aux, sigma_aux) = SFT(sigma_aux) + O(1 / K)."""
    case = Case(shape, SoarConfig(), seed)
    gaps = []
    for steps in (10**4, 10**5, 10**6):
        case.config = SoarConfig(num_sampling_steps=steps)
        _, *aux = case.terms()
        off = [term.error - case.sft(term.sigma).detach() for term in aux]
        gaps.append(torch.stack(off).abs().max())
    for gap, next_gap in zip(gaps, gaps[1:]):
        assert next_gap < 0.2 * gap + 1e-7  # a tenth, but for the second order and rounding


# --- 4. Identities of the correction

@given(shapes, seeds, st.floats(1e-6, 1))
@example((2, 3), 0, 1e-6)
def test_correction_leads_to_the_clean_latent_from_any_state(shape, seed, sigma):
    """z - sigma v_corr = z0 for any z;  v_corr = z1 - z0 where z = (1 - sigma) z0 + sigma z1."""
    z, z0, z1 = (randn(seed + i, *shape) for i in range(3))
    s = full(shape, sigma)
    clean = z - sigma * soar.correction_target(z, z0, s)
    assert_close(clean, z0, rtol=1e-12, atol=1e-12)
    ideal = soar.correction_target(interpolate(z0, z1, s), z0, s)
    assert_close(ideal, z1 - z0, rtol=1e-12, atol=3e-14 / sigma)


@given(shapes, seeds, st.floats(0.05, 0.95), st.floats(0.05, 1), levels)
def test_correction_minus_ideal_velocity_equals_its_closed_form(shape, seed, a, fraction, u):
    """v_corr - (z1 - z0) = (z_aux - z_ideal) / sigma_aux
    = (1 - alpha) (sigma_next - sigma) (v - (z1 - z0)) / sigma_aux."""
    z0, z1, v = (randn(seed + i, *shape) for i in range(3))
    b = a * fraction
    c = b + u * (1 - b)
    sigma, sigma_next, sigma_aux = (full(shape, x) for x in (a, b, c))
    z_hat = rollout_step(interpolate(z0, z1, sigma), v, sigma, sigma_next)
    z_aux = soar.renoise(z_hat, z1, sigma_next, sigma_aux)
    off = soar.correction_target(z_aux, z0, sigma_aux) - (z1 - z0)
    assert_close(off, (z_aux - interpolate(z0, z1, sigma_aux)) / c, **CLOSE)
    alpha = (c - b) / (1 - b)
    assert_close(off, (1 - alpha) * (b - a) * (v - (z1 - z0)) / c, **CLOSE)


@given(st.floats(0, 1, allow_subnormal=False), st.floats(0.1, 10))
@example(1.0, 3.3)
def test_t_from_sigma_inverts_sigma_from_t_for_any_shift(t, shift):
    """sigma(t) = shift t / (1 + (shift - 1) t),  t(sigma(t)) = t;  sigma(0) = 0, sigma(1) = 1."""
    sigma = soar.sigma_from_t(t, shift)
    assert math.isclose(sigma, shift * t / (1 + (shift - 1) * t), rel_tol=1e-12)
    assert math.isclose(soar.t_from_sigma(sigma, shift), t, rel_tol=1e-12)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(soar.sigma_from_t(ends, shift), ends)


# --- 5. The loss is a weighted mean of the errors

def part_of(case, index):
    """The same case, for some samples of the batch only."""
    part, d = copy.copy(case), case.draws
    part.z0, part.cond = case.z0[index], case.cond[index]
    stacked = [x if x is None else x[:, index] for x in (d.path_noise, d.path_z1)]
    part.draws = Draws(
        d.z1[index],
        d.t[index],
        d.u[:, :, index],
        *stacked,
    )
    return part


@given(cases, st.floats(0.01, 100))
def test_loss_equals_e_for_any_lambda_n_and_m_when_all_errors_are_e(case, e):
    """mean |v - target|^2 = e at each point:  L = e (B + lambda points) / (B + lambda points)."""

    def velocity(z, sigma, cond):  # each target is (z - z0) / sigma, that of the base term too
        return soar.correction_target(z, case.z0, sigma) + math.sqrt(e)

    assert_close(case.loss(velocity).item(), e, rtol=1e-8, atol=0)


@given(cases, st.data())
def test_parts_of_a_batch_add_up_to_the_whole_under_its_normalizer(case, data):
    """n = B + lambda points of the whole:  L(whole) = L(left; n) + L(right; n),  L(2 n) = L / 2."""
    cut = data.draw(st.integers(1, max(1, len(case.z0) - 1)))
    n = soar.loss_normalizer(case.draws.t.double(), case.config)
    parts = [part_of(case, slice(0, cut)), part_of(case, slice(cut, None))]
    total = sum(part.loss(normalizer=n) for part in parts if len(part.z0))
    whole = case.loss()
    assert_close(total, whole, **CLOSE)
    assert_close(case.gradients(total), case.gradients(whole), **CLOSE)
    assert_close(case.loss(normalizer=2 * n.item()), whole / 2, **CLOSE)


# --- 6. No gradient through the rollout, one graph at a time

@given(cases)
def test_gradient_is_none_through_the_rollout_and_the_targets(case):
    """z_aux, v_corr constant:  d L_aux / d z0 = 0,  d L_aux / d v_uncond = 0."""
    case.z0.requires_grad_()
    _, *aux = case.terms()
    loss = sum(term.loss for term in aux)
    inputs = [case.z0, case.model.null]
    assert torch.autograd.grad(loss, inputs, allow_unused=True) == (None, None)


@given(cases)
def test_backward_of_each_term_adds_up_to_the_gradient_of_the_loss(case):
    """soar_loss = sum_i L_i,  d soar_loss = sum_i d L_i."""
    options = {"weighting": torch.exp, "normalizer": 7.0}
    loss = soar.soar_loss(*case.arguments(), **options)
    assert torch.equal(loss, case.loss(**options))
    for term in case.terms(**options):
        term.loss.backward()
    gradients = tuple(p.grad for p in case.model.parameters())
    assert_close(gradients, case.gradients(loss), **CLOSE)


@given(cases, st.booleans())
@example(Case((2, 3), SoarConfig(guidance_scale=1.0), 0), False)  # it keeps the base velocity
def test_one_graph_is_alive_at_a_time_whether_a_term_was_used_or_dropped(case, used):
    """When the model is called, nothing is left that an earlier call saved for its backward."""
    alive = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            alive.add(self)

    def velocity(z, sigma, cond):
        assert len(alive) == 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return case.model(z, sigma, cond)

    terms = case.terms(velocity)
    while (term := next(terms, None)) is not None:
        assert len(alive) > 0
        if used:
            term.loss.backward()
        del term


@given(cases, any_of([(0, 1), (1, 0), (0, 2)]), st.booleans())
def test_forwards_are_one_and_one_without_a_prompt_and_m_n(case, order, grad):
    """1 with cond + 1 with uncond, if the rollout is guided + M N with cond, each of B samples."""
    _, z0, draws, *prompts, config = case.arguments()
    cond, uncond = ([*prompts, None][i] for i in order)
    if uncond is None:
        config = replace(config, guidance_scale=1.0)
    calls = []

    def velocity(z, sigma, prompt):
        assert z.shape == case.shape and sigma.shape == case.shape[:1]
        calls.append((prompt is cond, prompt is uncond, torch.is_grad_enabled()))
        return case.model(z, sigma, prompt)

    with torch.set_grad_enabled(grad):
        for term in soar_terms(velocity, z0, draws, cond, uncond, config):
            assert torch.is_grad_enabled() == term.loss.requires_grad == grad
            assert not term.error.requires_grad
    guided = config.guidance_scale != 1
    with_cond, with_uncond = (True, False, grad), (False, True, False)
    aux_terms = config.num_rollout_paths * config.num_aux_points
    assert calls == [with_cond] + [with_uncond] * guided + [with_cond] * aux_terms


# --- A second implementation: the paper's formulas, one sample and one point at a time

def reference_step(kind, z, v, n, sigma, sigma_next, config):
    """From sigma to sigma_next by the formulas of section 2.2, for one sample."""
    d, eta, shift = sigma_next - sigma, config.sde_noise_scale, config.shift
    clean = z - sigma * v
    noise = z + (1 - sigma) * v
    if kind == "ode":
        return z + d * v
    if kind == "simple":
        return z + d * v + eta * math.sqrt(-d) * n
    if kind == "sde":
        return (1 - sigma_next) * clean + sigma_next * n
    if kind == "cps":
        q = sigma_next * math.sin(eta * math.pi / 2)
        kept = math.sqrt(max(sigma_next**2 - q**2, 0))
        return (1 - sigma_next) * clean + kept * noise + q * n
    top = shift * 0.999 / (1 + (shift - 1) * 0.999)
    S = eta * math.sqrt(sigma / (1 - min(sigma, top)))
    f = S**2 * d / (2 * sigma)
    return z * (1 + f) + v * (d + f * (1 - sigma)) + S * math.sqrt(-d) * n


def reference_points(case, b):
    """Error, level and whether it counts, of each point of sample b, the base one first."""
    c, z0, cond = case.config, case.z0[b], case.cond[b]
    draws = (x if x is None else x.double() for x in case.draws)
    z1, t, places, noise, path_z1 = draws
    z1, t = z1[b], t[b].item()

    def predict(z, sigma, cond):
        return case.model(z[None], full((1,), sigma), cond[None])[0]

    def point(z, target, sigma, counts):
        error = (predict(z, sigma, cond) - target).square().mean()
        return torch.hstack([error, error.new_tensor([sigma, counts])])

    t_next = t - 1 / c.num_sampling_steps
    end = max(t_next, c.t_min)
    end = min(end, t)  # t may be t_min rounded to float32, and that less
    sigma = c.shift * t / (1 + (c.shift - 1) * t)
    sigma_next = c.shift * end / (1 + (c.shift - 1) * end)
    z = (1 - sigma) * z0 + sigma * z1
    yield point(z, z1 - z0, sigma, True)
    v_cond = predict(z, sigma, cond).detach()
    v_uncond = predict(z, sigma, case.model.null).detach()
    v = (1 - c.guidance_scale) * v_uncond + c.guidance_scale * v_cond
    for m in range(c.num_rollout_paths):
        kind = c.sde_type if m else "ode"
        n = noise[m - 1, b] if m else None
        z_hat = reference_step(kind, z, v, n, sigma, sigma_next, c)
        toward = z1 if c.shared_noise else path_z1[m, b]
        for u in places[m, :, b].tolist():
            s = (1 - u) * sigma_next + u * min(c.sigma_upper_ratio * sigma, 1)
            alpha = (s - sigma_next) / (1 - sigma_next)
            z_aux = (1 - alpha) * z_hat + alpha * toward
            yield point(z_aux, (z_aux - z0) / s, s, m == 0 or t_next > c.t_min)


@given(cases, st.booleans())
@example(Case((2, 3), SoarConfig(1.0, 1, 2, shift=6.0, logit_mean=50.0), 0), False)  # t = 1
@example(Case((2, 3), SoarConfig(1.0, 1, 2, t_min=0.7, logit_mean=-50.0), 0), False)  # t < t_min
def test_terms_equal_the_papers_formulas_for_any_settings(case, extreme):
    def weighting(sigma):  # a learned one: each term has a gradient through it too
        learned = case.model.null.square().mean()
        return 0.5 + sigma**2 + learned

    if extreme:  # t where something begins or ends, u = 0 or as near to 1 as it comes
        t_min, step = case.config.t_min, 1 / case.config.num_sampling_steps
        ends = torch.tensor([t_min, 1, min(t_min + step, 1), t_min * (1 + 1e-6)])
        u = case.draws.u.round() * (1 - 2**-24)
        case.draws = case.draws._replace(t=ends[: len(case.z0)], u=u)
    samples = [torch.stack(list(reference_points(case, b))) for b in range(len(case.z0))]
    error, sigma, counts = torch.stack(samples, dim=2).unbind(1)  # each (1 + M N, B)
    weight = case.config.lambda_aux * counts
    weight[0] = 1
    loss = (weight * weighting(sigma) * error).sum(1) / weight.sum()
    terms = list(case.terms(weighting=weighting))
    expected = zip(loss, error.detach(), sigma.detach(), counts.bool())
    assert_close([tuple(term) for term in terms], list(expected), **CLOSE)
    ours = case.gradients(sum(term.loss for term in terms))
    assert_close(ours, case.gradients(loss.sum()), rtol=1e-8, atol=1e-8)


# --- Stochastic steps

@given(st.floats(0.01, 0.99), levels, levels)
def test_stochastic_steps_keep_the_marginal_of_the_path_but_simple(a, fraction, eta):
    """From a to b with v = z1 - z0:  z_hat = (1 - b) z0 + c1 z1 + c2 n.  It is distributed as the
    path at b where c1^2 + c2^2 = b^2: sde, cps; flow_sde to the second order in d = b - a."""
    b = a * fraction
    d = b - a
    r = eta**2 / (1 - a)
    angle = eta * math.pi / 2
    z0, z1, n = torch.eye(3, dtype=torch.float64)[:, None]  # z_hat is then its coefficients
    z = (1 - a) * z0 + a * z1
    v = z1 - z0
    step = partial(rollout_step, z, v, full((1,), a), full((1,), b))
    for kind, c1, c2, excess in [
        ("sde", 0.0, b, 0),
        ("cps", b * math.cos(angle), b * math.sin(angle), 0),
        ("flow_sde", b + r * d / 2, math.sqrt(-r * a * d), (r + r * r / 4) * d * d),
        ("simple", b, eta * math.sqrt(-d), -d * eta**2),
    ]:
        z_hat = step(kind=kind, noise=n, noise_scale=eta)
        assert_close(z_hat[0].tolist(), [1 - b, c1, c2], **CLOSE)
        assert_close(z_hat[0, 1:].square().sum().item(), b**2 + excess, **CLOSE)


# --- Precision

STATE_FUNCTIONS = [
    (interpolate, "z0 z1 sigma"),
    (partial(soar.guided_velocity, guidance_scale=2.0), "v_uncond v_cond"),
    (rollout_step, "z v sigma sigma_next"),
    *[(partial(rollout_step, kind=x), "z v noise sigma sigma_next") for x in SDE_TYPES],
    (soar.renoise, "z_hat z1 sigma_next sigma_aux"),
    (soar.correction_target, "z z0 sigma"),
]
LEVELS = {"sigma": 0.75, "sigma_next": 0.5, "sigma_aux": 0.625}


@pytest.mark.parametrize("function, names", STATE_FUNCTIONS)
def test_state_functions_compute_in_float32_or_better_with_gradients(function, names):
    """Off by some roundings of float32, 2^-24 each, for half-precision states and any levels."""
    sigmas = {x: full((2,), LEVELS[x]) for x in names.split() if x in LEVELS}
    half_sigmas = {x: sigma.bfloat16() for x, sigma in sigmas.items()}  # exact
    states = {x: randn(i, 2, 3) for i, x in enumerate(names.split()) if x not in LEVELS}
    for dtype in DTYPES:
        rough = {x: state.to(dtype) for x, state in states.items()}
        exact = {x: state.double() for x, state in rough.items()}
        ours = function(**rough, **half_sigmas)
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(ours.double(), function(**exact, **sigmas), rtol=2**-20, atol=2**-20)
    inputs = {x: tensor.requires_grad_() for x, tensor in (states | sigmas).items()}
    call = lambda *tensors: function(**dict(zip(inputs, tensors)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("output, grid", [(torch.bfloat16, 2**4), (torch.float64, 2**12)])
def test_terms_equal_float64_ones_to_1e5_whatever_the_models_dtype(dtype, output, grid):
    """Latents are multiples of 1/16, exact in any dtype; outputs, of 1/4096 if wide, which float32
    must not lose. A float32 target is then off by some 4 * 2^-23 (|z0| + |z1| + |v|) / sigma_aux
    < 6e-6, as sigma_aux >= sigma(0.25) = 0.5."""
    shape = (64, 16, 8, 8)
    config = SoarConfig(1.0, 6, 2, num_sampling_steps=4, t_min=0.25)
    z0 = (16 * randn(0, *shape)).round() / 16
    cond = (grid * randn(1, *shape)).round() / grid
    uncond = (grid * randn(2, *shape)).round() / grid
    draws = draw(shape, config, rng(3))

    def results(own):
        wide = torch.promote_types(own, torch.float32)

        def velocity(z, sigma, prompt):
            assert z.dtype == own and sigma.dtype == wide
            return prompt.to(output)

        weighting = {"weighting": lambda sigma: 0.5 + sigma.double()}
        for term in soar_terms(velocity, z0.to(own), draws, cond, uncond, config, **weighting):
            assert {x.dtype for x in term} == {wide, torch.bool}
            yield from (x.double() for x in term)

    assert_close(list(results(dtype)), list(results(torch.float64)), rtol=1e-5, atol=0)


def test_gradients_under_bf16_autocast_equal_float32_ones_to_its_rounding():
    """Autocast keeps its casts: one made without a graph must not cut a later term's gradient."""
    case = Case((32, 16), SoarConfig(), 0, torch.float32)
    expected = case.gradients(case.loss())
    with torch.autocast("cpu", torch.bfloat16):
        ours = case.gradients(case.loss())
    for rough, exact in zip(ours[:3], expected[:3]):
        assert (rough - exact).norm() < 0.05 * exact.norm()


# --- Draws

@given(shapes, configs, seeds)
def test_draws_equal_their_recipe_whatever_the_defaults_of_torch(shape, config, seed):
    """By the generator's state alone: z1, t, u, the paths' noise, the paths' z1, in this order."""
    paths, points, batch = config.num_rollout_paths, config.num_aux_points, shape[0]
    generator = rng(seed)
    normal = partial(torch.randn, generator=generator)
    z1, n = normal(shape), normal(batch)
    t = torch.sigmoid(config.logit_mean + config.logit_std * n).clamp(min=config.t_min)
    u = torch.rand(paths, points, batch, generator=generator)
    noise = normal(paths - 1, *shape)
    path_z1 = None if config.shared_noise else normal(paths, *shape)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            draws = draw(shape, config, generator.manual_seed(seed))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(tuple(draws), (z1, t, u, noise, path_z1), **EXACT)


@given(cases, seeds, any_of([0.0, 1e-6, 1.0]), any_of(DTYPES))
def test_levels_of_a_trainer_are_those_of_the_terms_from_t_min_up(case, seed, first, dtype):
    """sigma(t) = max(sigma, sigma(t_min));  all other draws stay."""
    t_min, shift = case.config.t_min, case.config.shift
    sigma = torch.rand(len(case.z0), generator=rng(seed))
    sigma[0] = first
    sigma = sigma.to(dtype)
    drawn = case.draws
    case.draws = soar.with_levels(drawn, sigma, case.config)
    lowest = shift * t_min / (1 + (shift - 1) * t_min)
    expected = sigma.double().clamp(min=lowest)
    assert_close(next(case.terms()).sigma, expected, rtol=1e-5, atol=1e-6)
    assert case.draws.t.dtype == torch.promote_types(dtype, torch.float32)
    assert case.draws._replace(t=drawn.t) == drawn


def test_terms_read_no_value_of_a_tensor_on_another_device():
    """To read one is an error on the meta device, which has none; on a GPU it would stall."""
    case = Case((2, 3), SoarConfig(num_rollout_paths=2), 0)
    case.model = case.model.to("meta")
    case.z0 = case.z0.to("meta")
    case.cond = case.cond.to("meta")
    case.draws = Draws(*(x if x is None else x.to("meta") for x in case.draws))
    assert len(list(case.terms())) == 1 + 2 * 6


# --- What is refused

Z, S = randn(0, 2, 3), full((2,), 0.5)
Z1, S1 = Z[:1], S[:1]
PATHS = SoarConfig(num_rollout_paths=2)
FRESH = SoarConfig(num_rollout_paths=2, shared_noise=False)
DRAWS = draw((2, 3), PATHS, rng(0))


def unused(z, sigma, cond):
    pytest.fail("the model was called")


def first(velocity=unused, z0=Z, cond=Z, uncond=Z, config=PATHS, weighting=None, **changed):
    """The first term, of draws some of which are changed."""
    draws = changed.pop("draws", DRAWS)._replace(**changed)
    return next(soar_terms(velocity, z0, draws, cond, uncond, config, weighting=weighting))


REFUSED = [  # a call, and the words that its error holds: what came, what was expected
    (lambda: SoarConfig(lambda_aux=-1e-9), "SoarConfig.lambda_aux; -1e-09; >= 0"),
    (lambda: SoarConfig(lambda_aux=inf), "SoarConfig.lambda_aux; inf; finite"),
    (lambda: SoarConfig(lambda_aux=nan), "SoarConfig.lambda_aux; nan; >= 0"),
    (lambda: SoarConfig(lambda_aux="1"), "SoarConfig.lambda_aux; '1'; float"),
    (lambda: SoarConfig(lambda_aux=True), "SoarConfig.lambda_aux; True; float"),
    (lambda: SoarConfig(num_aux_points=-1), "SoarConfig.num_aux_points; -1; >= 0"),
    (lambda: SoarConfig(num_aux_points=6.0), "SoarConfig.num_aux_points; 6.0; int"),
    (lambda: SoarConfig(num_rollout_paths=0), "SoarConfig.num_rollout_paths; 0; >= 1"),
    (lambda: SoarConfig(num_rollout_paths=True), "SoarConfig.num_rollout_paths; True; int"),
    (lambda: SoarConfig(num_sampling_steps=0), "SoarConfig.num_sampling_steps; 0; >= 1"),
    (lambda: SoarConfig(guidance_scale=-inf), "SoarConfig.guidance_scale; -inf; finite"),
    (lambda: SoarConfig(guidance_scale=nan), "SoarConfig.guidance_scale; nan; finite"),
    (lambda: SoarConfig(shift=0), "SoarConfig.shift; 0; > 0"),
    (lambda: SoarConfig(shift=inf), "SoarConfig.shift; inf; finite"),
    (lambda: SoarConfig(t_min=0.0), "SoarConfig.t_min; 0.0; > 0"),
    (lambda: SoarConfig(t_min=1), "SoarConfig.t_min; 1; < 1"),
    (lambda: SoarConfig(logit_mean=inf), "SoarConfig.logit_mean; inf; finite"),
    (lambda: SoarConfig(logit_std=0), "SoarConfig.logit_std; 0; > 0"),
    (lambda: SoarConfig(logit_std=inf), "SoarConfig.logit_std; inf; finite"),
    (lambda: SoarConfig(sde_type="ode"), "SoarConfig.sde_type; 'ode'; flow_sde"),
    (lambda: SoarConfig(sde_type=None), "SoarConfig.sde_type; None; str"),
    (lambda: SoarConfig(sde_noise_scale=-1), "SoarConfig.sde_noise_scale; -1; >= 0"),
    (lambda: SoarConfig(sde_noise_scale=inf), "SoarConfig.sde_noise_scale; inf; finite"),
    (lambda: SoarConfig(sde_type="cps", sde_noise_scale=2), "sde_noise_scale; 2; <= 1; cps"),
    (lambda: SoarConfig(shared_noise=1), "SoarConfig.shared_noise; 1; bool"),
    (lambda: SoarConfig(sigma_upper_ratio=0.9), "SoarConfig.sigma_upper_ratio; 0.9; >= 1"),
    (lambda: interpolate("1.0", Z, S), "z0; 1.0; Tensor"),
    (lambda: interpolate(S, S, S), "z0; [2]; Tensor"),
    (lambda: interpolate(Z[:0], Z[:0], S[:0]), "z0; [0, 3]; Tensor"),
    (lambda: interpolate(Z[:, :0], Z[:, :0], S), "z0; [2, 0]; Tensor"),
    (lambda: interpolate(Z.long(), Z.long(), S), "z0; int64"),
    (lambda: interpolate(Z, Z[:, :2], S), "z1; (2, 2); (2, 3)"),
    (lambda: interpolate(Z, Z.float(), S), "z1; float32; float64"),
    (lambda: interpolate(Z, Z.to("meta"), S), "z1; meta; cpu"),
    (lambda: interpolate(Z, [0.0], S), "z1; list; (2, 3)"),
    (lambda: interpolate(Z, Z, S1), "sigma; (1,); (2,)"),
    (lambda: interpolate(Z, Z, S[:, None]), "sigma; (2, 1); (2,)"),
    (lambda: interpolate(Z, Z, S.long()), "sigma; int64; floating"),
    (lambda: interpolate(Z, Z, S.to("meta")), "sigma; meta; cpu"),
    (lambda: interpolate(Z, Z, 0.5), "sigma; float; (2,)"),
    (lambda: soar.guided_velocity(Z, Z1, 2.0), "v_cond; (1, 3); (2, 3)"),
    (lambda: rollout_step(Z, Z1, S, S), "v; (1, 3); (2, 3)"),
    (lambda: rollout_step(Z, Z, S1, S), "sigma; (1,); (2,)"),
    (lambda: rollout_step(Z, Z, S, S1), "sigma_next; (1,); (2,)"),
    (lambda: rollout_step(Z, Z, S, S, kind="sde", noise=Z1), "noise; (1, 3); (2, 3)"),
    (lambda: rollout_step(Z, Z, S, S, kind="sde"), "'sde'; NoneType; Tensor"),
    (lambda: rollout_step(Z, Z, S, S, noise=Z), "'ode'; Tensor; None"),
    (lambda: rollout_step(Z, Z, S, S, kind="euler", noise=Z), "'euler'; flow_sde"),
    (lambda: soar.renoise(Z, Z1, S, S), "z1; (1, 3); (2, 3)"),
    (lambda: soar.renoise(Z, Z, S1, S), "sigma_next; (1,); (2,)"),
    (lambda: soar.renoise(Z, Z, S, S1), "sigma_aux; (1,); (2,)"),
    (lambda: soar.correction_target(Z, Z1, S), "z0; (1, 3); (2, 3)"),
    (lambda: soar.correction_target(Z, Z, S1), "sigma; (1,); (2,)"),
    (lambda: soar.sft_loss(unused, Z, Z1, S, None), "z1; (1, 3); (2, 3)"),
    (lambda: soar.sft_loss(unused, Z, Z, S1, None), "sigma; (1,); (2,)"),
    (lambda: first(z0=S), "z0; [2]; Tensor"),
    (lambda: first(z0=Z1), "draws.z1; (2, 3); (1, 3)"),
    (lambda: first(z0=Z.to("meta")), "draws.z1; cpu; meta"),
    (lambda: first(z1=DRAWS.z1.long()), "draws.z1; int64; floating"),
    (lambda: first(t=DRAWS.t[:1]), "draws.t; (1,); (2,)"),
    (lambda: first(t=None), "draws.t; None; (2,)"),
    (lambda: first(t=torch.tensor([0.0009, 1])), "draws.t; 0.0009 to 1; 0.001"),
    (lambda: first(t=torch.tensor([0.5, 1.01])), "draws.t; 0.5 to 1.01; to 1"),
    (lambda: first(t=torch.tensor([0.5, nan])), "draws.t; nan; 0.001"),
    (lambda: first(u=DRAWS.u[:1]), "draws.u; (1, 6, 2); (2, 6, 2)"),
    (lambda: first(config=SoarConfig()), "draws.u; (2, 6, 2); (1, 6, 2)"),
    (lambda: first(path_noise=DRAWS.z1), "draws.path_noise; (2, 3); (1, 2, 3)"),
    (lambda: first(draws=draw((2, 3), FRESH, rng(0))), "draws.path_z1; Tensor; None"),
    (lambda: first(config=FRESH), "draws.path_z1; None; (2, 2, 3)"),
    (lambda: soar.with_levels(DRAWS, 1000 * S, PATHS), "sigma; 500; [0, 1]"),
    (lambda: soar.with_levels(DRAWS, S - 0.6, PATHS), "sigma; -0.1; [0, 1]"),
    (lambda: soar.with_levels(DRAWS, S * nan, PATHS), "sigma; nan; [0, 1]"),
    (lambda: soar.with_levels(DRAWS, S1, PATHS), "sigma; (1,); (2,)"),
    (lambda: soar.with_levels(DRAWS, S.long(), PATHS), "sigma; int64; floating"),
    (lambda: first(uncond=None), "uncond; None; 4.5; guidance_scale=1"),
    (lambda: soar.soar_loss(unused, Z, DRAWS, Z, config=PATHS), "uncond; None; guidance_scale=1"),
    (lambda: first(uncond=PATHS), "uncond; SoarConfig; Tensor"),
    (lambda: first(uncond=["a cat"]), "uncond; list; Tensor"),
    (lambda: first(weighting=lambda sigma: sigma[:1]), "weighting; (1,); (2,)"),
    (lambda: first(weighting=lambda sigma: 1.0), "weighting; float; (2,)"),
    (lambda: first(lambda z, sigma, cond: z[:, :1]), "velocity; (2, 1); (2, 3)"),
    (lambda: first(lambda z, sigma, cond: (z,)), "velocity; tuple; (2, 3)"),
    (lambda: first(lambda z, sigma, cond: z.long()), "velocity; int64; floating"),
    (lambda: first(lambda z, sigma, cond: z.to("meta")), "velocity; meta; cpu"),
]


@pytest.mark.parametrize("call, words", REFUSED, ids=[words for _, words in REFUSED])
def test_error_names_what_came_and_what_was_expected_when_an_argument_does_not_fit(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words.split("; "):
        assert word in str(error.value)


def test_defaults_are_the_published_ones_and_bounds_are_taken():
    published = (1.0, 6, 1, 40, 4.5, 3.0, 1e-3, 0.0, 1.0, "flow_sde", 0.5, True, inf)
    lowest = (0, 0, 1, 1, -9, 1e-9, 1e-9, -9, 1e-9, "cps", 0, False, 1)
    highest = (9, 9, 9, 9, 9, 9, 0.999, 9, 9, "cps", 1, True, inf)
    for taken in (published, lowest, highest):
        assert tuple(asdict(SoarConfig(*taken)).values()) == taken
    assert SoarConfig() == SoarConfig(*published)
    assert SoarConfig(sde_noise_scale=7.0).sde_noise_scale == 7.0
    case = Case((2, 3), SoarConfig(), 0)
    assert torch.equal(soar.soar_loss(*case.arguments()[:-1]), case.loss())
    with pytest.raises(FrozenInstanceError):
        SoarConfig().shift = 1.0
    assert soar.sigma_from_t.__defaults__ == soar.t_from_sigma.__defaults__ == (3.0,)
    step = {"kind": "ode", "noise_scale": 0.5, "noise": None, "shift": 3.0}
    assert rollout_step.__kwdefaults__ == step
    assert soar.sft_loss.__kwdefaults__ == {"weighting": None}
    for function in (soar_terms, soar.soar_loss):
        assert function.__defaults__ == (None, None)
        assert function.__kwdefaults__ == {"weighting": None, "normalizer": None}
