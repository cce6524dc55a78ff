"""SOAR: a post-training loss for rectified-flow models that also teaches the way back from the model's own errors.

    z0  (B, ...)  clean latent               z1     (B, ...)  Gaussian noise, the other end of the path
    t   (B,)      sampler time, 1 = noise    sigma  (B,)      noise level, 1 = noise; sigma = s t / (1 + (s - 1) t)
    v   (B, ...)  velocity dz/dsigma; z1 - z0 on the ideal path, z_sigma = (1 - sigma) z0 + sigma z1

1. Base term, alone it is SFT: |v(z_sigma0) - (z1 - z0)|^2 at a random sigma0.
2. Rollout, no gradient: one sampler step from sigma0 to sigma1 with the guided velocity of the current weights: z_hat.
3. Re-noise z_hat toward the *same* z1, to N random levels sigma' in [sigma1, 1]: z'.
4. Auxiliary terms: |v(z') - v_corr|^2 with v_corr = (z' - z0) / sigma', the velocity that leads from z' to z0.
5. Loss: (sum of base terms + lambda * sum of auxiliary terms) / (B + lambda * number of auxiliary terms).

Source: arXiv 2604.12617. The model is met only as velocity(z, sigma, cond) -> v: z in z0's dtype, sigma (B,) in float32
or better (a diffusers model takes timestep = 1000 * sigma). Bad arguments raise ValueError before it is called; values
of tensors are preconditions, not checked, for that would stall a GPU; `draw` guarantees them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
SDE_TYPES = ("simple", "sde", "flow_sde", "cps")


@dataclass(frozen=True)
class SoarConfig:
    """Settings, by default the published ones (arXiv 2604.12617). Raises ValueError: one is out of its range."""

    lambda_aux: float = 1.0  # weight of an auxiliary term; 0 is SFT
    num_aux_points: int = 6  # N; 0 is SFT
    num_rollout_paths: int = 1  # M; path 1 takes the ODE step, the others one of sde_type
    num_sampling_steps: int = 40  # K; the rollout steps 1 / K in t
    guidance_scale: float = 4.5  # w of the rollout; 1 is unguided
    shift: float = 3.0  # s of sigma(t)
    t_min: float = 1e-3  # the clean boundary: t is not drawn, and the rollout does not step, below it
    logit_mean: float = 0.0  # t = sigmoid(logit_mean + logit_std n), n ~ N(0, 1)
    logit_std: float = 1.0
    sde_type: str = "flow_sde"  # one of SDE_TYPES
    sde_noise_scale: float = 0.5  # eta
    shared_noise: bool = True  # False: every path re-noises toward a z1 of its own (the paper's ablation)
    sigma_upper_ratio: float = math.inf  # sigma' <= min(ratio * sigma0, 1)

    def __post_init__(self):
        for name, bounds in {
            "lambda_aux": "[0, inf)", "num_aux_points": "[0, inf)", "num_rollout_paths": "[1, inf)",
            "num_sampling_steps": "[1, inf)", "guidance_scale": "(-inf, inf)", "shift": "(0, inf)", "t_min": "(0, 1)",
            "logit_mean": "(-inf, inf)", "logit_std": "(0, inf)", "sde_type": SDE_TYPES, "shared_noise": (True, False),
            "sde_noise_scale": "[0, 1]" if self.sde_type == "cps" else "[0, inf)", "sigma_upper_ratio": "[1, inf]",
        }.items():  # fmt: skip
            x, kind = getattr(self, name), type(getattr(SoarConfig, name))
            fits = isinstance(x, (int, float) if kind is float else kind) and isinstance(x, bool) == (kind is bool)
            if fits and isinstance(bounds, str):
                low, high = map(float, bounds[1:-1].split(","))
                fits = low <= x <= high and (x != low or bounds[0] == "[") and (x != high or bounds[-1] == "]")
            if not fits or (kind is str and x not in bounds):
                raise ValueError(f"SoarConfig.{name} is {x!r}, expected {kind.__name__} in {bounds}")


def _check(name: str, x: Any, shape: tuple[int, ...] | None, like: Tensor, dtype: torch.dtype | None = None) -> None:
    fits = isinstance(x, Tensor) and x.shape == shape and x.device == like.device and x.is_floating_point()
    if not fits or dtype not in (None, x.dtype):
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{name} is {got}, expected {shape and tuple(shape)} {dtype or 'floating'} on {like.device}")


def _checked(states: dict[str, Tensor], **levels: Tensor) -> list[Tensor]:
    """States of one shape, dtype and device, in float32 or better; then levels (B,) as (B, 1, ...), to broadcast."""
    name, first = next(iter(states.items()))
    if not isinstance(first, Tensor) or first.ndim < 2 or 0 in first.shape:
        raise ValueError(f"{name} is {getattr(first, 'shape', first)!r}, expected a Tensor (B, ...), no dimension 0")
    for name, x in (states | levels).items():
        _check(name, x, *((first.shape, first, first.dtype) if name in states else (first.shape[:1], first)))
    dtype, ones = torch.promote_types(first.dtype, torch.float32), " 1" * (first.ndim - 1)
    return [x.to(dtype) for x in states.values()] + [rearrange(x.to(dtype), f"b -> b{ones}") for x in levels.values()]


def sigma_from_t(t: Tensor | float, shift: float = 3.0) -> Tensor | float:
    """Noise level sigma = s t / (1 + (s - 1) t) at sampler time t in [0, 1], any shape; exactly 1 at t = 1.
    Precondition: shift > 0. Raises nothing. Source: SD3, arXiv 2403.03206, section 5.3.2."""
    return shift * t / (shift * t + (1 - t))


def t_from_sigma(sigma: Tensor | float, shift: float = 3.0) -> Tensor | float:
    """Sampler time t at noise level sigma in [0, 1], any shape: the inverse of sigma_from_t."""
    return sigma_from_t(sigma, 1 / shift)


def interpolate(z0: Tensor, z1: Tensor, sigma: Tensor) -> Tensor:
    """Ideal state (1 - sigma) z0 + sigma z1, (B, ...) in float32 or better, from z0, z1 (B, ...) and levels sigma (B,).
    Raises ValueError: shapes, dtypes or devices differ. Source: arXiv 2209.03003, eq. 1."""
    z0, z1, sigma = _checked({"z0": z0, "z1": z1}, sigma=sigma)
    return (1 - sigma) * z0 + sigma * z1


def guided_velocity(v_uncond: Tensor, v_cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance v_uncond + w (v_cond - v_uncond), all (B, ...); returns float32 or better.
    Raises ValueError: shapes, dtypes or devices differ. Source: arXiv 2207.12598."""
    v_uncond, v_cond = _checked({"v_uncond": v_uncond, "v_cond": v_cond})
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def rollout_step(z, v, sigma, sigma_next, *, kind="ode", noise_scale=0.5, noise=None, shift=3.0) -> Tensor:
    """One sampler step from noise level sigma to sigma_next; d = sigma_next - sigma, x0 = z - sigma v, x1 = x0 + v:
        ode       z + d v
        simple    z + d v + eta sqrt(-d) n
        sde       (1 - sigma_next) x0 + sigma_next n
        flow_sde  z (1 + S^2 d / (2 sigma)) + v d (1 + S^2 (1 - sigma) / (2 sigma)) + S sqrt(-d) n
        cps       (1 - sigma_next) x0 + sqrt(sigma_next^2 - q^2) x1 + q n,   q = sigma_next sin(eta pi / 2)
    S = eta sqrt(sigma / (1 - sigma)), the sigma in that denominator at most sigma_from_t(0.999, shift).
    z, v, noise n ~ N(0, I) (None for ode): (B, ...). sigma, sigma_next: (B,), precondition sigma_next <= sigma.
    noise_scale: eta >= 0, at most 1 for cps, no part of ode and sde. Returns (B, ...) in float32 or better.
    Raises ValueError: kind, noise; shapes, dtypes, devices. Source: arXiv 2604.12617, section 2.2."""
    if kind not in ("ode", *SDE_TYPES) or (noise is None) != (kind == "ode"):
        raise ValueError(f"kind is {kind!r} and noise a {type(noise).__name__}, expected 'ode' and None or {SDE_TYPES}")
    states = {"z": z, "v": v} | ({} if noise is None else {"noise": noise})
    z, v, *n, sigma, sigma_next = _checked(states, sigma=sigma, sigma_next=sigma_next)
    d, x0 = sigma_next - sigma, z - sigma * v
    if kind in ("ode", "simple"):
        return z + d * v if kind == "ode" else z + d * v + noise_scale * (-d).sqrt() * n[0]
    if kind == "flow_sde":
        r = noise_scale**2 / (1 - sigma.clamp(max=sigma_from_t(0.999, shift)))  # S^2 / sigma, finite at sigma = 0
        return z * (1 + r * d / 2) + v * d * (1 + r * (1 - sigma) / 2) + (-r * sigma * d).sqrt() * n[0]
    q = 1.0 if kind == "sde" else math.sin(noise_scale * math.pi / 2)  # the table's q over sigma_next; sde is q = 1
    return (1 - sigma_next) * x0 + sigma_next * (math.sqrt(1 - q**2) * (x0 + v) + q * n[0])


def renoise(z_hat: Tensor, z1: Tensor, sigma_hat: Tensor, sigma: Tensor) -> Tensor:
    """State (1 - alpha) z_hat + alpha z1 with alpha = (sigma - sigma_hat) / (1 - sigma_hat), in float32 or better.
    z_hat (at sigma_hat), z1: (B, ...). sigma_hat, sigma: (B,), preconditions sigma_hat <= sigma <= 1, sigma_hat < 1.
    Raises ValueError: shapes, dtypes or devices differ. Source: arXiv 2604.12617, section 2.2."""
    z_hat, z1, sigma_hat, sigma = _checked({"z_hat": z_hat, "z1": z1}, sigma_hat=sigma_hat, sigma=sigma)
    alpha = (sigma - sigma_hat) / (1 - sigma_hat)
    return (1 - alpha) * z_hat + alpha * z1


def correction_target(z: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
    """Velocity v_corr = (z - z0) / sigma, from z - sigma v_corr = z0: z's way to z0, on the ideal path or off it.
    z, z0: (B, ...). sigma: (B,), precondition > 0. Returns (B, ...) in float32 or better.
    Raises ValueError: shapes, dtypes or devices differ. Source: arXiv 2604.12617, section 2.3."""
    z, z0, sigma = _checked({"z": z, "z0": z0}, sigma=sigma)
    return (z - z0) / sigma


class Draws(NamedTuple):
    z1: Tensor  # (B, ...) ~ N(0, I), as path_noise and path_z1
    t: Tensor  # (B,) in [t_min, 1]
    u: Tensor  # (M, N, B) in [0, 1): sigma' = sigma1 + u (upper - sigma1), upper = min(sigma_upper_ratio * sigma0, 1)
    path_noise: Tensor  # (M - 1, B, ...) for the stochastic steps
    path_z1: Tensor | None  # (M, B, ...) where shared_noise is False


def draw(shape: tuple[int, ...], config: SoarConfig, generator: torch.Generator) -> Draws:
    """Every random number of one step for a z0 of this shape: float32, on the generator's device, of its state alone.
    z1 and t come first, so they do not depend on lambda, N or M: an SFT run sees the same ones."""
    rng = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    z1 = torch.randn(*shape, **rng)
    t = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(shape[0], **rng)).clamp(min=config.t_min)
    u = torch.rand(config.num_rollout_paths, config.num_aux_points, shape[0], **rng)
    path_noise = torch.randn(config.num_rollout_paths - 1, *shape, **rng)
    return Draws(z1, t, u, path_noise, None if config.shared_noise else torch.randn(len(u), *shape, **rng))


class Term(NamedTuple):
    loss: Tensor  # scalar, already normalised: the sum over the terms is the SOAR loss
    error: Tensor  # (B,) detached, unweighted mean squared error per sample; 0 for a point that does not count
    sigma: Tensor  # (B,) noise level


def loss_normalizer(t: Tensor, config: SoarConfig) -> Tensor:
    """B + lambda P, 0-dimensional, in t's dtype, for samples at sampler times t (B,): those of the whole global batch.
    P counts N points on each sample's ODE path and, where its step ends above t_min, N on each stochastic path."""
    stochastic = (config.num_rollout_paths - 1) * (t - 1 / config.num_sampling_steps > config.t_min).to(t.dtype)
    return (1 + config.lambda_aux * config.num_aux_points * (1 + stochastic)).sum()


def _errors(velocity, z, target, sigma, cond, dtype, weighting) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted squared errors (B,); the same unweighted, detached; the velocity, detached."""
    weight = torch.ones_like(sigma) if weighting is None else weighting(sigma)
    _check("weighting(sigma)", weight, sigma.shape, sigma)
    v = velocity(z.to(dtype), sigma, cond)
    _check("velocity(z, sigma, cond)", v, z.shape, z)
    error = reduce((v.to(z.dtype) - target) ** 2, "b ... -> b", "mean")
    return weight.to(error.dtype) * error, error.detach(), v.detach().to(z.dtype)


def sft_loss(velocity: Velocity, z0: Tensor, z1: Tensor, sigma: Tensor, cond: Any, *, weighting=None) -> Tensor:
    """Flow-matching loss w(sigma) * mean |v(z_sigma, sigma, cond) - (z1 - z0)|^2, (B,), not reduced; float32 or better.
    z0, z1: (B, ...). sigma: (B,). Raises ValueError: as soar_terms. Source: arXiv 2209.03003, eq. 1."""
    x0, x1, _ = _checked({"z0": z0, "z1": z1}, sigma=sigma)
    return _errors(velocity, interpolate(x0, x1, sigma), x1 - x0, sigma.to(x0.dtype), cond, z0.dtype, weighting)[0]


def soar_terms(velocity: Velocity, z0: Tensor, draws: Draws, cond: Any, uncond: Any = None, config=SoarConfig(), *,
               weighting=None, normalizer: Tensor | float | None = None) -> Iterator[Term]:
    """The terms of the SOAR loss: the base term, then M N auxiliary ones, each from one forward of B samples.
    Call backward on each as it comes: gradients add up to the whole loss's, with one graph alive at a time. Forwards:
    1 + 1 unconditional, under no_grad (none if guidance_scale is 1 or uncond None) + M N; if lambda N = 0, 1: SFT.
    z0: (B, ...). draws: of draw(z0.shape, config, generator). cond, uncond: with the prompt and without.
    weighting: w, sigma (B,) -> (B,), None is 1. normalizer: None is loss_normalizer(draws.t, config), for one rank.
    Raises ValueError: an argument's type, shape, dtype or device. Source: arXiv 2604.12617, algorithm 1."""
    (x0,), M, N, like = _checked({"z0": z0}), config.num_rollout_paths, config.num_aux_points, z0.shape
    if uncond is not None and not isinstance(uncond, type(cond)) and not isinstance(cond, type(uncond)):
        raise ValueError(f"uncond is a {type(uncond).__name__}, expected a {type(cond).__name__} like cond, or None")
    shapes = (like, like[:1], (M, N, len(z0)), (M - 1, *like), None if config.shared_noise else (M, *like))
    for name, x, shape in zip(Draws._fields, draws, shapes):
        if x is not None or shape is not None:
            _check(f"draws.{name}", x, shape, z0)
    z1, t, u, path_noise = (x.to(x0.dtype) for x in draws[:4])
    endpoints = [z1] * M if config.shared_noise else draws.path_z1.to(x0.dtype)
    total = loss_normalizer(t, config) if normalizer is None else normalizer
    t1 = (t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    sigma0, sigma1 = sigma_from_t(t, config.shift), sigma_from_t(t1, config.shift)

    def term(z, target, sigma, weight=1.0, counts=1.0):
        weighted, error, v = _errors(velocity, z, target, sigma, cond, z0.dtype, weighting)
        return Term(weight * (counts * weighted).sum() / total, counts * error, sigma), v

    def terms():
        z = interpolate(x0, z1, sigma0)
        base, v = term(z, z1 - x0, sigma0)
        yield base
        del base  # or its graph would live on
        if config.lambda_aux == 0 or N == 0:
            return
        with torch.no_grad():
            if uncond is not None and config.guidance_scale != 1:
                v = guided_velocity(velocity(z.to(z0.dtype), sigma0, uncond).to(x0.dtype), v, config.guidance_scale)
            sde = {"kind": config.sde_type, "noise_scale": config.sde_noise_scale, "shift": config.shift}
            z_hats = [rollout_step(z, v, sigma0, sigma1, **k) for k in ({}, *(sde | {"noise": n} for n in path_noise))]
        for m, (z_hat, endpoint) in enumerate(zip(z_hats, endpoints)):
            for n in range(N):
                with torch.no_grad():
                    sigma = sigma1 + u[m, n] * ((config.sigma_upper_ratio * sigma0).clamp(max=1) - sigma1)
                    z = renoise(z_hat, endpoint, sigma1, sigma)
                    target = correction_target(z, x0, sigma)
                yield term(z, target, sigma, config.lambda_aux, t1 > config.t_min if m > 0 else 1.0)[0]
    return terms()


def soar_loss(velocity: Velocity, z0: Tensor, cond: Any, uncond: Any = None, config=SoarConfig(), *,
              generator: torch.Generator, weighting=None) -> Tensor:
    """The sum of soar_terms, whose arguments and errors it has, with draws from generator; holds every term's graph."""
    draws = draw(z0.shape, config, generator)
    return sum(term.loss for term in soar_terms(velocity, z0, draws, cond, uncond, config, weighting=weighting))
