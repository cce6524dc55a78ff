"""Is your own version of SOAR right? A few calls tell, and say where it is not.

    check_port(port, generator=torch.Generator().manual_seed(0))

The port meets models whose answer is known. With an exact model, v = z1 - z0, every auxiliary state
lies on the ideal path at the level that it is labelled with, and every target is z1 - z0, whatever
the bound and the shift. With a model whose errors are e_cond and e_uncond, the rollout leaves the
path by (sigma_next - sigma) e, where e = e_uncond + w (e_cond - e_uncond), and

    z_aux - interpolate(z0, z1, sigma_aux) = (1 - alpha) (sigma_next - sigma) e
    target = (z_aux - z0) / sigma_aux

Not checked: weights and the loss's sum, the base term, the law of t and of sigma_aux, and any path
but that of the ODE step. Copy this file beside soar.py: it needs nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soar import SoarConfig, correction_target, interpolate, sigma_from_t

Point = tuple[Tensor, Tensor, Tensor]  # z_aux (B, ...), sigma_aux (B,), target (B, ...)
Port = Callable[..., Iterable[Point]]
CONFIGS = (  # one of each kind of bound, with several shifts, steps and guidance scales
    SoarConfig(),
    SoarConfig(shift=1.0, guidance_scale=2.0),
    SoarConfig(sigma_upper_ratio=1.5),
    SoarConfig(shift=7.5, num_sampling_steps=20, sigma_upper_ratio=1.0, guidance_scale=3.0),
)
EXACT = 1e-5  # of states and levels in float32, whose rounding errors are about 1e-6
HALF = 2e-2  # rounding errors of half precision stay below this
TABLE = 3e-3  # the nearest level in a table of 1000, shifted or not, is within this


class Levels(NamedTuple):
    """The levels of one point, each (B,): before and after the rollout, its label, its bound."""

    sigma: Tensor
    sigma_next: Tensor
    sigma_aux: Tensor
    sigma_upper: Tensor
    shift: float


def _mixed(hat: Tensor, x: Levels, upper: Tensor | float = 1.0) -> Tensor:
    """Level of a state between z_hat, which stands at hat, and z1, if alpha is 1 at upper."""
    alpha = (x.sigma_aux - x.sigma_next) / (upper - x.sigma_next)
    return (1 - alpha) * hat + alpha


STATE_FAULTS = {  # where an exact model's states stand
    "alpha is divided by sigma_upper - sigma_next, it must be by 1 - sigma_next":
        lambda x: _mixed(x.sigma_next, x, x.sigma_upper),
    "the rollout goes up, not down: is v's sign reversed, or are sigma and sigma_next swapped?":
        lambda x: _mixed(2 * x.sigma - x.sigma_next, x),
    "the label is a time without its shift: take sigma_from_t of it":
        lambda x: sigma_from_t(x.sigma_aux, x.shift),
    "the label counts from the noise: take 1 minus it": lambda x: 1 - x.sigma_aux,
}  # fmt: skip
ALPHA = "alpha must be (sigma_aux - sigma_next) / (1 - sigma_next), with the label's sigma_aux"
SCALES = {  # the multiple of e_cond - e_uncond by which the rollout errs
    "it is not guided": lambda w: 1.0,
    "it takes v_uncond alone": lambda w: 0.0,
    "v_cond and v_uncond are swapped": lambda w: 1 - w,
    "w (v_cond - v_uncond) is added to v_cond, it must be to v_uncond": lambda w: 1 + w,
}
END = "it is one step of 1 / K in t, not below t_min, with the shift and K that you sample with"


class _Model:
    """v = z1 - z0 + the errors, for any number of copies of the batch; it notes how it is called.
    cond is 1 and uncond 0 in each row. The errors have gradients, to see what keeps a graph."""

    def __init__(self, z0: Tensor, z1: Tensor, e_cond: Tensor, e_uncond: Tensor):
        self.z0, self.z1 = z0, z1
        self.e_cond, self.e_uncond = e_cond.requires_grad_(), e_uncond.requires_grad_()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, z: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        batch = len(self.z0)
        copies = len(z) // batch
        if z.shape != (copies * batch, *self.z0.shape[1:]) or sigma.shape != z.shape[:1]:
            came = f"z {tuple(z.shape)}, sigma {tuple(sigma.shape)}, cond {tuple(cond.shape)}"
            raise ValueError(f"the port calls velocity with {came}, expected z as z0, sigma (B,)")
        self.calls += zip(z.split(batch), sigma.split(batch), cond.split(batch))
        c = cond.view(-1, *[1] * (z.ndim - 1))
        rows = torch.arange(len(z)) % batch
        ideal = (self.z1 - self.z0)[rows]
        return ideal + c * self.e_cond[rows] + (1 - c) * self.e_uncond[rows]


def check_port(port: Port, configs: Sequence[SoarConfig] = CONFIGS, *,
               generator: torch.Generator) -> float:
    """Largest deviation of a port's states and targets from what they must be: about 1e-6.

    port: called as port(velocity, z0, z1, t, cond, uncond, config), it makes one step from the
    sampler times t (B,) and returns the auxiliary points, each (z_aux, sigma_aux, target), of the
    step. z0, z1: (B, 4, 16, 16), float32. It calls velocity(z, sigma, cond) as it would its model,
    with sigma in [0, 1]; cond and uncond are (B, 1), and may be concatenated along with z.
    configs: what is tried. A port with settings of its own gets a SoarConfig that has the same, and
    a port without a bound configs=[SoarConfig()].
    Raises ValueError, which names the mistake and the settings that show it."""
    largest = 0.0
    for config in configs:
        try:
            largest = max(largest, _check_config(port, config, generator))
        except ValueError as error:
            values = vars(config).items()
            changed = [f"{name}={x}" for name, x in values if x != getattr(SoarConfig, name)]
            raise ValueError(f"{error} [{', '.join(changed) or 'the default config'}]") from None
    return largest


def _check_config(port: Port, config: SoarConfig, generator: torch.Generator) -> float:
    B = 8
    t = torch.linspace(0.01, 0.99, B)
    z0, z1, e_cond, e_uncond = torch.randn(4, B, 4, 16, 16, generator=generator)
    cond, uncond = torch.ones(B, 1), torch.zeros(B, 1)

    def met(model):
        points = _points(port(model, z0, z1, t, cond, uncond, config), z0)
        return points, [_levels(t, sigma_aux, config) for _, sigma_aux, _ in points]

    exact = _Model(z0, z1, torch.zeros_like(z0), torch.zeros_like(z0))
    points, levels = met(exact)
    largest = _check_states(points, levels, z0, z1)
    _check_calls(points, exact)
    largest = max(largest, _check_targets(points, z0, z1))

    wrong = _Model(z0, z1, e_cond, e_uncond)
    points, levels = met(wrong)
    largest = max(largest, _check_rollout(points, levels, wrong, config))
    _check_range(levels)
    return max(largest, _check_targets(points, z0, z1))


def _points(points: Iterable[Point], z0: Tensor) -> list[Point]:
    points = list(points)
    if not points:
        raise ValueError("the port returns no auxiliary points")
    for z, sigma, target in points:
        if z.shape != z0.shape or target.shape != z0.shape or sigma.shape != z0.shape[:1]:
            came = f"{tuple(z.shape)}, {tuple(sigma.shape)}, {tuple(target.shape)}"
            raise ValueError(f"a point's state, level and target are {came}, expected those of z0")
        if not all(x.isfinite().all() for x in (z, sigma, target)):
            raise ValueError("a point has an infinity or a NaN")
        if z.requires_grad or target.requires_grad:
            raise ValueError("a state or target has a graph: put the rollout under no_grad")
        if sigma.max() > 1 + EXACT or sigma.min() < 0:
            came = f"from {sigma.min():g} to {sigma.max():g}"
            raise ValueError(f"labels are {came}, expected noise levels from 0 to 1")
    return [(z.double(), sigma.double(), target.double()) for z, sigma, target in points]


def _levels(t: Tensor, sigma_aux: Tensor, config: SoarConfig) -> Levels:
    t = t.double()
    sigma = sigma_from_t(t, config.shift)
    t_next = (t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    upper = (config.sigma_upper_ratio * sigma).clamp(max=1)
    return Levels(sigma, sigma_from_t(t_next, config.shift), sigma_aux, upper, config.shift)


def _along(x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """How much of direction is in each sample of x, (B,); the rest, root mean square (B,)."""
    x, direction = x.double().flatten(1), direction.double().flatten(1)
    amount = (x * direction).sum(1) / (direction**2).sum(1)
    rest = x - amount[:, None] * direction
    return amount, (rest**2).mean(1).sqrt()


def _worst(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float, float]:
    """The largest difference, and the two numbers there."""
    a, b = torch.stack(found).flatten(), torch.stack(expected).flatten()
    worst = (a - b).abs().argmax()
    return (a - b).abs()[worst].item(), a[worst].item(), b[worst].item()


def _check_states(points: list[Point], levels: list[Levels], z0: Tensor, z1: Tensor) -> float:
    """Of an exact model: on the ideal path, at the level of their label."""
    found = [_along(z - z0, z1 - z0) for z, _, _ in points]
    at, rest = [x for x, _ in found], max(x.max().item() for _, x in found)
    if rest > EXACT:
        why = "are they formed in half precision? Form them in float32"
        if rest > HALF:
            why = "do they go toward fresh noise? Re-noise toward z1, the noise of the base term"
        raise ValueError(f"an exact model's states are off the path by {rest:.2g}: {why}")
    off, state, label = _worst(at, [x.sigma_aux for x in levels])
    if off < EXACT:
        return max(off, rest)
    why = ALPHA
    if off < TABLE:
        why = "is the label rounded to a table of timesteps? Give the model its exact level"
    for name, level in STATE_FAULTS.items():
        if _worst(at, [level(x) for x in levels])[0] < 10 * EXACT:
            why = name
    where = f"stands at {state:.4f} and is labelled {label:.4f}"
    raise ValueError(f"an exact model's state {where}: {why}")


def _check_calls(points: list[Point], model: _Model) -> None:
    """An exact model is called on the path, at the level of the state, and without the prompt only
    in the rollout."""
    for z, sigma, cond in model.calls:
        if sigma.max() > 1 + EXACT:
            raise ValueError(f"velocity is called at {sigma.max():g}: it takes sigma in [0, 1]")
        at, _ = _along(z - model.z0, model.z1 - model.z0)
        half = z.element_size() < 4  # cast for the model, which moves it by less than this
        off, state, level = _worst([at], [sigma.double()])
        if off > (2e-4 if half else EXACT):
            why = "two different levels"
            if off < TABLE:
                why = "is the timestep rounded to a table? Give the model its exact level"
            came = f"a state at {state:.4f} and the level {level:.4f}"
            raise ValueError(f"velocity is called with {came}: {why}")
        is_point = any((z - x).abs().max() < (HALF if half else EXACT) for x, _, _ in points)
        if is_point and cond.min() < 1:
            raise ValueError("an auxiliary point is predicted without the prompt too: guidance "
                             "belongs to the rollout alone, points are trained with cond")


def _check_targets(points: list[Point], z0: Tensor, z1: Tensor) -> float:
    """All must be (z_aux - z0) / sigma_aux, to float32's error before the division."""
    off = 0.0
    for z, sigma, target in points:
        missed = (target - correction_target(z, z0.double(), sigma)).flatten(1)
        off = max(off, ((missed**2).mean(1).sqrt() * sigma).max().item())
    if off < EXACT:
        return off
    why = "divide by the level of the point, after z_aux - z0"
    if off < HALF:
        why = "are they formed in half precision? Form them in float32"
    if all((x - (z1 - z0)).abs().max() < 10 * EXACT for _, _, x in points):
        why = "they are z1 - z0, as in SFT, also where the state has left the path"
    raise ValueError(f"targets miss (z_aux - z0) / sigma_aux by {off:.2g} / sigma_aux: {why}")


def _check_rollout(
    points: list[Point], levels: list[Levels], model: _Model, config: SoarConfig
) -> float:
    """The states of a wrong model have left the path as far, and in the direction, as they must."""
    w = config.guidance_scale
    e_cond, e_uncond = model.e_cond.detach().double(), model.e_uncond.detach().double()
    basis = torch.stack([e_cond.flatten(1), e_uncond.flatten(1)], -1)
    shares, off = [], 0.0
    for (z, _, _), x in zip(points, levels):
        left = z - interpolate(model.z0.double(), model.z1.double(), x.sigma_aux)
        moved = (1 - x.sigma_aux) / (1 - x.sigma_next) * (x.sigma_next - x.sigma)
        missed = left - moved.view(-1, 1, 1, 1) * (e_uncond + w * (e_cond - e_uncond))
        off = max(off, (missed.flatten(1) ** 2).mean(1).sqrt().max().item())
        shares.append(torch.linalg.lstsq(basis, left.flatten(1)[..., None]).solution[..., 0])
    if off < EXACT * max(1.0, abs(w)):
        return off
    shares = torch.stack(shares)
    if shares.abs().max() < EXACT:
        raise ValueError("no state of a wrong model leaves the path: there is no rollout")
    moved = shares.sum(-1)  # (points, B)
    scale = (shares[..., 0].sum() / moved.sum()).item()
    if abs(scale - w) > 0.01:
        named = (name for name, fault in SCALES.items() if abs(fault(w) - scale) < 0.01)
        name = next(named, "is it the scale you sample with?")
        raise ValueError(f"the rollout is guided by {scale:.2f} in place of {w:g}: {name}")
    # moved is (1 - sigma_aux) / (1 - end) (end - sigma), solved for the end; the lowest point of
    # each sample says it best.
    aux = torch.stack([x.sigma_aux for x in levels])
    lowest = aux.argmin(0, keepdim=True)
    ratio = moved.gather(0, lowest)[0] / (1 - aux.gather(0, lowest)[0])
    end = (levels[0].sigma + ratio) / (1 + ratio)
    _, found, right = _worst([end], [levels[0].sigma_next])
    raise ValueError(f"the rollout ends at {found:.4f}, expected sigma_next = {right:.4f}: {END}")


def _check_range(levels: list[Levels]) -> None:
    for x in levels:
        low, high = x.sigma_aux < x.sigma_next - EXACT, x.sigma_aux > x.sigma_upper + EXACT
        if (low | high).any():
            row = (low | high).nonzero()[0, 0]
            came, least, most = x.sigma_aux[row], x.sigma_next[row], x.sigma_upper[row]
            bounds = f"[sigma_next, sigma_upper] = [{least:.4f}, {most:.4f}]"
            raise ValueError(f"a point's level is {came:.4f}, expected within {bounds}; for a port "
                             "without a bound give configs=[SoarConfig()]")
