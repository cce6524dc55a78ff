"""SOAR (arXiv 2604.12617): a post-training loss for rectified-flow models. It is SFT, and also
trains the model to head for the clean latent from wherever one sampler step of its own lands.
To use it elsewhere, copy this file: it needs torch and einops.

    draws = draw(z0.shape, config, generator)
    for term in soar_terms(velocity, z0, draws, cond, uncond, config):
        term.loss.backward()

    z0      (B, ...)  clean latent, the end of the path at noise level 0
    z1      (B, ...)  Gaussian noise, the end at noise level 1
    sigma   (B,)      noise level; on the ideal path z = (1 - sigma) z0 + sigma z1
    t       (B,)      sampler time, 1 = noise: sigma = shift t / (1 + (shift - 1) t)
    v       (B, ...)  velocity dz/dsigma, what the model predicts; z1 - z0 on the ideal path

One training step (algorithm 1 of the SOAR paper), for B samples; sigma(t) is that of the line on t:

    0. draw      z1 ~ N(0, I); t = sigmoid(n), n ~ N(0, 1), raised to t_min where it is below.
    1. base      sigma = sigma(t), z = (1 - sigma) z0 + sigma z1. Target z1 - z0. This is SFT.
    2. rollout   One of K sampler steps, from z, by the model as it is, without a gradient:
                 t_next = max(t - 1/K, t_min), sigma_next = sigma(t_next),
                 v = v_uncond + guidance_scale (v_cond - v_uncond), both at z and sigma,
                 z_hat = z + (sigma_next - sigma) v.
    3. re-noise  To N auxiliary points, each at a level sigma_aux, uniform from sigma_next to 1:
                 alpha = (sigma_aux - sigma_next) / (1 - sigma_next),
                 z_aux = (1 - alpha) z_hat + alpha z1, the same z1.
    4. correct   Target (z_aux - z0) / sigma_aux, for the model with the prompt.
    5. loss      error = w(sigma) * mean over a sample's elements of (v - target)^2, at an auxiliary
                 point w(sigma_aux); w is the weighting, 1 if none is given. The loss is
                 (sum of base errors + lambda * sum of auxiliary errors) / (B + lambda * points),
                 a weighted mean; points = B N auxiliary errors. B and points are those of the
                 global batch, over all ranks and micro-batches.

With M > 1 (num_rollout_paths) there are M rollouts from z, of N points each: the first is that of
step 2, each other one takes a stochastic step. In those others a sample whose t - 1/K is not above
t_min does not count, so `points` depends on t. With one path all samples count.

The model is called only as velocity(z, sigma, cond) -> v: z in z0's dtype, sigma in float32 or
better (a diffusers model takes timestep = 1000 * sigma). States, targets and losses are float32 or
better. A wrong type, shape, dtype or device raises ValueError before the model runs; the checks
are at the end. On a GPU, which that would stall, values of tensors are not looked at, but by
with_levels: what is said of them is for the caller to keep, and `draw` keeps it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # (z, sigma, cond) -> v
Weighting = Callable[[Tensor], Tensor] | None  # sigma (B,) -> w(sigma) (B,); None is 1
SDE_TYPES = ("simple", "sde", "flow_sde", "cps")


@dataclass(frozen=True)
class SoarConfig:
    """Settings, by default the published ones."""

    lambda_aux: float = 1.0  # weight of an auxiliary term; 0 is SFT
    num_aux_points: int = 6  # N, on each path; 0 is SFT
    num_rollout_paths: int = 1  # M; the first takes the ODE step, each other one of sde_type
    num_sampling_steps: int = 40  # K; not below 40, see experiments/theory/optimum.md, "Few steps"
    guidance_scale: float = 4.5  # of the rollout: the one you sample with; 1 is unguided
    shift: float = 3.0  # of sigma(t); that of the sampler
    t_min: float = 1e-3  # the clean boundary: no t is drawn and no rollout ends below it
    logit_mean: float = 0.0  # t = sigmoid(logit_mean + logit_std n), n ~ N(0, 1)
    logit_std: float = 1.0  # see logit_mean
    sde_type: str = "flow_sde"  # the step of the other paths: simple, sde, flow_sde or cps
    sde_noise_scale: float = 0.5  # eta, how much noise such a step adds; sde does not read it
    shared_noise: bool = True  # False: each path has a z1 of its own to go toward (an ablation)
    sigma_upper_ratio: float = math.inf  # bounds sigma_aux: uniform to min(ratio * sigma, 1)

    def __post_init__(self):
        _check_config(self)

    @property
    def num_terms(self) -> int:
        """Of soar_terms: the base term and, unless lambda N = 0, M N auxiliary ones."""
        points = self.num_rollout_paths * self.num_aux_points
        return 1 if self.lambda_aux == 0 else 1 + points


def sigma_from_t(t: Tensor | float, shift: float = 3.0) -> Tensor | float:
    """Noise level at sampler time t in [0, 1], any shape (arXiv 2403.03206, section 5.3.2)."""
    return shift * t / (shift * t + (1 - t))  # in this form t = 1 gives 1 exactly


def t_from_sigma(sigma: Tensor | float, shift: float = 3.0) -> Tensor | float:
    """Sampler time at noise level sigma: the inverse of sigma_from_t."""
    return sigma_from_t(sigma, 1 / shift)


def interpolate(z0: Tensor, z1: Tensor, sigma: Tensor) -> Tensor:
    """The ideal state at noise level sigma (arXiv 2209.03003, eq. 1)."""
    # _aligned, at the end, makes float32 or better of all, and (B, 1, ...) of levels (B,).
    z0, z1, sigma = _aligned(z0=z0, z1=z1, sigma=sigma)
    return (1 - sigma) * z0 + sigma * z1


def guided_velocity(v_uncond: Tensor, v_cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598)."""
    v_uncond, v_cond = _aligned(v_uncond=v_uncond, v_cond=v_cond)
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def rollout_step(z: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, kind: str = "ode",
                 noise_scale=0.5, noise: Tensor | None = None, shift=3.0) -> Tensor:
    """One sampler step from sigma down to sigma_next, by the ODE or by a kind of SDE_TYPES.
    noise: n ~ N(0, I); None for the ODE. noise_scale: eta >= 0, for cps at most 1, unused by sde.
    shift: used by flow_sde only. SOAR paper, section 2.2; flow_sde: arXiv 2505.05470; cps: arXiv
    2509.05952."""
    if kind not in ("ode", *SDE_TYPES) or (noise is None) != (kind == "ode"):
        came = f"kind is {kind!r} and noise a {type(noise).__name__}"
        raise ValueError(f"{came}, expected 'ode' and None, or one of {SDE_TYPES} and a Tensor")
    if kind == "ode":
        z, v, sigma, sigma_next = _aligned(z=z, v=v, sigma=sigma, sigma_next=sigma_next)
        return z + (sigma_next - sigma) * v

    z, v, n, sigma, sigma_next = _aligned(z=z, v=v, noise=noise, sigma=sigma, sigma_next=sigma_next)
    eta = noise_scale
    d = sigma_next - sigma  # negative
    z_data = z - sigma * v  # the two ends of the path that v predicts
    z_noise = z + (1 - sigma) * v
    if kind == "simple":
        return z + d * v + eta * (-d).sqrt() * n
    if kind == "sde":  # new noise in place of all the predicted noise
        return (1 - sigma_next) * z_data + sigma_next * n
    if kind == "cps":  # predicted noise rotated toward new noise, which keeps its variance
        angle = eta * math.pi / 2
        rotated = math.cos(angle) * z_noise + math.sin(angle) * n
        return (1 - sigma_next) * z_data + sigma_next * rotated
    if kind == "flow_sde":
        # z (1 + S^2 d / (2 sigma)) + v d (1 + S^2 (1 - sigma) / (2 sigma)) + S sqrt(-d) n,
        # S = eta sqrt(sigma / (1 - sigma)). S^2 / sigma is taken as eta^2 / (1 - sigma), which at
        # sigma = 0 is not 0 / 0. At 1 it is infinite, so its sigma is at most that of t = 0.999.
        s2_over_sigma = eta**2 / (1 - sigma.clamp(max=sigma_from_t(0.999, shift)))
        drift = z * s2_over_sigma / 2 + v * (1 + s2_over_sigma * (1 - sigma) / 2)
        diffusion = (s2_over_sigma * sigma).sqrt()
        return z + d * drift + diffusion * (-d).sqrt() * n


def renoise(z_hat: Tensor, z1: Tensor, sigma_next: Tensor, sigma_aux: Tensor) -> Tensor:
    """The state at sigma_aux, between z_hat at sigma_next < 1 and z1 at 1 (SOAR, section 2.2)."""
    z_hat, z1, sigma_next, sigma_aux = _aligned(
        z_hat=z_hat, z1=z1, sigma_next=sigma_next, sigma_aux=sigma_aux
    )
    alpha = (sigma_aux - sigma_next) / (1 - sigma_next)
    return (1 - alpha) * z_hat + alpha * z1


def correction_target(z: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
    """The v that leads from any z, at sigma > 0, to z0: z - sigma v = z0 (SOAR, section 2.3)."""
    z, z0, sigma = _aligned(z=z, z0=z0, sigma=sigma)
    return (z - z0) / sigma


class Draws(NamedTuple):
    z1: Tensor  # (B, ...) ~ N(0, I), as path_noise and path_z1
    t: Tensor  # (B,) in [t_min, 1]
    u: Tensor  # (M, N, B) in [0, 1): where sigma_aux lies from sigma_next to 1, or to its bound
    path_noise: Tensor  # (M - 1, B, ...) for the stochastic steps, so empty with one path
    path_z1: Tensor | None  # (M, B, ...), or None if shared_noise


def draw(shape: tuple[int, ...], config: SoarConfig, generator: torch.Generator) -> Draws:
    """All random numbers of a step for a z0 of this shape: float32, on the generator's device, from
    its state alone. z1 and t come first: SFT, and SOAR with another N or M, get the same ones."""
    rng = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    size = _shapes(shape, config)
    z1 = torch.randn(size.z1, **rng)
    logit = config.logit_mean + config.logit_std * torch.randn(size.t, **rng)
    t = torch.sigmoid(logit).clamp(min=config.t_min)
    u = torch.rand(size.u, **rng)
    path_noise = torch.randn(size.path_noise, **rng)
    path_z1 = None if config.shared_noise else torch.randn(size.path_z1, **rng)
    return Draws(z1, t, u, path_noise, path_z1)


def with_levels(draws: Draws, sigma: Tensor, config: SoarConfig) -> Draws:
    """draws at a trainer's own noise levels sigma (B,) in [0, 1], in place of those of `draw`; one
    below sigma(t_min) is raised to it. Looks at their values: a GPU is waited for once."""
    _expect("sigma", sigma, draws.t.shape, draws.t.device)
    if not ((sigma >= 0) & (sigma <= 1)).all():
        raise ValueError(f"sigma is from {sigma.min():g} to {sigma.max():g}, expected noise levels "
                         "in [0, 1], as timesteps / 1000")
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
    return draws._replace(t=t_from_sigma(sigma, config.shift).clamp(config.t_min, 1))


def _shapes(shape: tuple[int, ...], config: SoarConfig) -> Draws:
    """The shape of each field of Draws."""
    M, N, B = config.num_rollout_paths, config.num_aux_points, shape[0]
    path_z1 = None if config.shared_noise else (M, *shape)
    return Draws(z1=shape, t=(B,), u=(M, N, B), path_noise=(M - 1, *shape), path_z1=path_z1)


class Term(NamedTuple):
    loss: Tensor  # scalar, already normalised: the sum over the terms is the SOAR loss
    error: Tensor  # (B,) detached, unweighted mean squared error of each sample
    sigma: Tensor  # (B,) noise level
    counts: Tensor  # (B,) bool: whether the sample is part of the loss; True if M = 1


def sft_loss(velocity: Velocity, z0: Tensor, z1: Tensor, sigma: Tensor, cond: Any, *,
             weighting: Weighting = None) -> Tensor:
    """The flow-matching loss w(sigma) * mean |v - (z1 - z0)|^2, (B,), not reduced over samples. z0
    and z1 have one dtype: z0.float() goes with draws.z1."""
    z = interpolate(z0, z1, sigma)
    sigma = sigma.to(z.dtype)
    w = _weights(weighting, sigma)
    v = _predict(velocity, z, sigma, cond, z0.dtype)
    return w * reduce((v - (z1.to(z) - z0.to(z))) ** 2, "b ... -> b", "mean")


def soar_terms(velocity: Velocity, z0: Tensor, draws: Draws, cond: Any, uncond: Any = None,
               config: SoarConfig | None = None, *, weighting: Weighting = None,
               normalizer: Tensor | float | None = None) -> Iterator[Term]:
    """The terms of the SOAR loss: the base term, then M N auxiliary ones. Call backward on each as
    it comes: gradients add up to the whole loss's, with one graph in memory.

    draws: from draw(z0.shape, config, generator). cond, uncond: what velocity takes, with and
    without the prompt; uncond may be None if guidance_scale is 1 or lambda N is 0. config: None is
    SoarConfig(). normalizer: what the sums are divided by, see loss_normalizer; None: this batch's
    own. Forwards: 1 with cond, 1 with uncond if guidance_scale is not 1, M N with cond; if
    lambda N = 0 the first only, and that is SFT."""
    config = config or SoarConfig()
    dtype = getattr(z0, "dtype", None)  # the model's; our states are wider
    (z0,) = _aligned(z0=z0)
    z1, t, u, path_noise, path_z1 = _checked_draws(draws, z0, config)
    _check_uncond(cond, uncond, config)
    normalizer = loss_normalizer(t, config) if normalizer is None else normalizer
    t_next, above_t_min = _rollout_end(t, config)
    sigma = sigma_from_t(t, config.shift)
    sigma_next = sigma_from_t(t_next, config.shift)

    def term(v: Tensor, target: Tensor, sigma: Tensor, w: Tensor, counts: Tensor) -> Term:
        error = reduce((v - target) ** 2, "b ... -> b", "mean")
        return Term((counts * w * error).sum() / normalizer, error.detach(), sigma, counts)

    # 1. Base term: SFT at sigma.
    z = interpolate(z0, z1, sigma)
    w = _weights(weighting, sigma)
    v = _predict(velocity, z, sigma, cond, dtype)
    yield term(v, z1 - z0, sigma, w, torch.ones_like(above_t_min))
    v = v.detach()  # or the graph would live on
    if config.num_terms == 1:
        return

    # 2. Rollout: one step from z with the guided velocity, by the ODE and M - 1 times stochastic.
    with torch.no_grad():
        if config.guidance_scale != 1:
            v_uncond = _predict(velocity, z, sigma, uncond, dtype)
            v = guided_velocity(v_uncond, v, config.guidance_scale)
        z_hats = [rollout_step(z, v, sigma, sigma_next)]
        for noise in path_noise:
            z_hats.append(rollout_step(z, v, sigma, sigma_next, kind=config.sde_type, noise=noise,
                                       noise_scale=config.sde_noise_scale, shift=config.shift))

    # 3, 4. From each z_hat toward z1, to N levels; the target leads from there to z0.
    sigma_upper = (config.sigma_upper_ratio * sigma).clamp(max=1)
    for m, z_hat in enumerate(z_hats):
        endpoint = z1 if config.shared_noise else path_z1[m]
        counts = above_t_min if m > 0 else torch.ones_like(above_t_min)
        for n in range(config.num_aux_points):
            with torch.no_grad():
                sigma_aux = sigma_next + u[m, n] * (sigma_upper - sigma_next)
                z_aux = renoise(z_hat, endpoint, sigma_next, sigma_aux)
                target = correction_target(z_aux, z0, sigma_aux)
            w = config.lambda_aux * _weights(weighting, sigma_aux)
            v = _predict(velocity, z_aux, sigma_aux, cond, dtype)
            yield term(v, target, sigma_aux, w, counts)
            del v


def soar_loss(velocity: Velocity, z0: Tensor, draws: Draws, cond: Any, uncond: Any = None,
              config=None, *, weighting: Weighting = None, normalizer=None) -> Tensor:
    """The sum of soar_terms, whose arguments it takes; holds all graphs until its one backward."""
    options = {"weighting": weighting, "normalizer": normalizer}
    return sum(x.loss for x in soar_terms(velocity, z0, draws, cond, uncond, config, **options))


def loss_normalizer(t: Tensor, config: SoarConfig) -> Tensor:
    """B + lambda * points, for B samples at sampler times t (B,). Where M = 1 that is
    B (1 + lambda N), and needed only if batches differ in size. It must be that of the global
    batch, over ranks and micro-batches, of which it is the sum:

        normalizer = loss_normalizer(t, config)  # t of all micro-batches of this rank's step
        torch.distributed.all_reduce(normalizer)
        normalizer = normalizer / world_size     # where gradients are averaged, as DDP does

    Where the trainer divides the loss by the number of micro-batches, divide by that too."""
    _, above_t_min = _rollout_end(t, config)
    paths = 1 + (config.num_rollout_paths - 1) * above_t_min.to(t.dtype)
    return (1 + config.lambda_aux * config.num_aux_points * paths).sum()


def _rollout_end(t: Tensor, config: SoarConfig) -> tuple[Tensor, Tensor]:
    """Where the rollout from t ends; whether that is above t_min, where stochastic points count."""
    t_next = t - 1 / config.num_sampling_steps
    end = t_next.clamp(min=config.t_min)
    # Never above t, which may be t_min rounded to float32, and that may be a little less.
    return torch.minimum(end, t), t_next > config.t_min


# --- Checks and casts: nothing of the method from here on ---


def _check_config(config: SoarConfig) -> None:
    def require(name: str, expected: str, ok: bool) -> None:
        if not ok:
            raise ValueError(f"SoarConfig.{name} is {getattr(config, name)!r}, expected {expected}")

    for field in fields(config):
        x, kind = getattr(config, field.name), type(field.default)
        fits = isinstance(x, (int, float) if kind is float else kind)
        fits = fits and isinstance(x, bool) == (kind is bool)  # to Python a bool is an int
        require(field.name, f"of type {kind.__name__}", fits)
    require("lambda_aux", ">= 0 and finite", 0 <= config.lambda_aux < math.inf)
    require("num_aux_points", ">= 0", config.num_aux_points >= 0)
    require("num_rollout_paths", ">= 1", config.num_rollout_paths >= 1)
    require("num_sampling_steps", ">= 1", config.num_sampling_steps >= 1)
    require("guidance_scale", "finite", math.isfinite(config.guidance_scale))
    require("shift", "> 0 and finite", 0 < config.shift < math.inf)
    require("t_min", "> 0 and < 1", 0 < config.t_min < 1)
    require("logit_mean", "finite", math.isfinite(config.logit_mean))
    require("logit_std", "> 0 and finite", 0 < config.logit_std < math.inf)
    require("sde_type", f"one of {SDE_TYPES}", config.sde_type in SDE_TYPES)
    require("sde_noise_scale", ">= 0 and finite", 0 <= config.sde_noise_scale < math.inf)
    if config.sde_type == "cps":
        require("sde_noise_scale", "<= 1 for cps", config.sde_noise_scale <= 1)
    require("sigma_upper_ratio", ">= 1", config.sigma_upper_ratio >= 1)


def _aligned(**tensors: Any) -> list[Tensor]:
    """Tensors of one batch, ready to be combined: all in float32 or better, levels (B,), which are
    those named sigma..., as (B, 1, ...). States (B, ...) must be like the first, in dtype too."""
    name, first = next(iter(tensors.items()))
    if not isinstance(first, Tensor) or first.ndim < 2 or first.numel() == 0:
        came = getattr(first, "shape", first)
        raise ValueError(f"{name} is {came!r}, expected a Tensor (B, ...), no dimension 0")
    wide = torch.promote_types(first.dtype, torch.float32)
    aligned = []
    for name, x in tensors.items():
        if name.startswith("sigma"):
            _expect(name, x, first.shape[:1], first.device)
            x = x.view(-1, *[1] * (first.ndim - 1))
        else:
            _expect(name, x, first.shape, first.device, first.dtype)
        aligned.append(x.to(wide))
    return aligned


def _expect(name: str, x: Any, shape: tuple, device: torch.device, dtype=None) -> None:
    """Raises ValueError unless x is a floating Tensor of this shape, device and dtype, if given."""
    came = f"a {type(x).__name__}"
    fits = False
    if isinstance(x, Tensor):
        came = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        fits = x.shape == shape and x.device == device and x.is_floating_point()
    if not fits or dtype not in (None, x.dtype):
        expected = f"{tuple(shape)} {dtype or 'floating'} on {device}"
        raise ValueError(f"{name} is {came}, expected {expected}")


def _predict(velocity: Velocity, z: Tensor, sigma: Tensor, cond: Any, dtype: torch.dtype) -> Tensor:
    """The model's velocity in z's dtype; the model itself gets z in dtype."""
    v = velocity(z.to(dtype), sigma, cond)
    _expect("velocity(z, sigma, cond)", v, z.shape, z.device)
    return v.to(z.dtype)


def _weights(weighting: Weighting, sigma: Tensor) -> Tensor:
    w = torch.ones_like(sigma) if weighting is None else weighting(sigma)
    _expect("weighting(sigma)", w, sigma.shape, sigma.device)
    return w.to(sigma.dtype)


def _checked_draws(draws: Draws, z0: Tensor, config: SoarConfig) -> Draws:
    """draws in z0's dtype. On a CPU, where it costs nothing, the values of t are looked at too."""
    for name, x, shape in zip(Draws._fields, draws, _shapes(z0.shape, config)):
        if shape is not None:
            _expect(f"draws.{name}", x, shape, z0.device)
        elif x is not None:
            raise ValueError(f"draws.{name} is a {type(x).__name__}, expected None: shared_noise")
    t, t_min = draws.t, config.t_min
    if t.device.type == "cpu" and not ((t >= t_min) & (t <= 1)).all():
        came = f"from {t.min():g} to {t.max():g}"
        raise ValueError(f"draws.t is {came}, expected sampler times from t_min = {t_min} to 1")
    return Draws(*(x if x is None else x.to(z0.dtype) for x in draws))


def _check_uncond(cond: Any, uncond: Any, config: SoarConfig) -> None:
    if uncond is None:
        if config.num_terms > 1 and config.guidance_scale != 1:
            raise ValueError(f"uncond is None and guidance_scale {config.guidance_scale:g}: pass "
                             "uncond, or guidance_scale=1")
    elif not (isinstance(uncond, type(cond)) or isinstance(cond, type(uncond))):
        # Else a config passed in uncond's place would be taken for uncond.
        came = f"uncond is a {type(uncond).__name__}"
        raise ValueError(f"{came}, expected a {type(cond).__name__} like cond")
