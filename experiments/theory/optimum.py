"""What SOAR's loss converges to, computed where the exact flow is known.

    python -m experiments.theory.optimum                 # the published setting
    python -m experiments.theory.optimum --num_sampling_steps 20 --guidance_scale 1
    python -m experiments.theory.optimum --sweep experiments/theory/results   # tables and figure

The world: a prompt c ~ N(0, 1) and z0 = c + data_std n. The empty prompt is the marginal over c,
N(0, 1 + data_std^2), with its exact velocity a(sigma) z: without caption dropout nothing trains it.
With a prompt v(z, sigma, c) = a(sigma) z + b(sigma) c. At each level the loss is a linear
regression, over the base terms of that level and the auxiliary terms that land on it, made by the
current velocity: the optimum is the fixed point. All of a term is linear in (c, n, z1, path noise,
path z1), so soar.py's own functions are run on the coefficients of these, and only t and sigma_aux
are left to integrate, by quadrature: no sampling.

Printed, for samples of 200 Euler steps at guidance 1 and 4.5 and each of DATA_STDS: the standard
deviation over the data's, and the mean's gain, E[sample | c] / c. At guidance 1 the exact flow has
1 and 1, but for the error of its Euler steps.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

from experiments.environment import markdown
from soar import (
    SoarConfig,
    correction_target,
    guided_velocity,
    interpolate,
    renoise,
    rollout_step,
    sigma_from_t,
    t_from_sigma,
)

DATA_STDS = (0.1, 0.2, 0.5, 1.0)  # of the data, given c
TOP = 14.0  # the highest level's logit; at level 1 itself every term has the exact flow for optimum


@dataclass(frozen=True)
class Args:
    soar: Annotated[SoarConfig, tyro.conf.arg(name="")] = field(default_factory=SoarConfig)
    sweep: Path | None = None
    """Solve all settings of the page instead; optimum.json and optimum.png are written there."""


# --- Velocities a(sigma) z + b(sigma) c ---


@dataclass(frozen=True)
class LinearVelocity:
    """The exact flow of N(c, data_std^2), and differences from it at levels, linear between."""

    data_std: float
    conditional: bool = True
    logits: Tensor | None = None  # (L,) logit of sigma, ascending; None: the exact flow
    differences: Tensor | None = None  # (L, 2), of a and b
    uncond: "LinearVelocity | None" = None  # what guidance starts from; None: this one, without c

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b at levels sigma, any shape, float64. Levels below the lowest one, which nothing
        trains, keep the exact flow; so do the lowest, where clamped t are base terms, and 1."""
        variance = ((1 - sigma) * self.data_std) ** 2 + sigma**2
        a = (sigma - (1 - sigma) * self.data_std**2) / variance
        b = -self.conditional * (1 + a * (1 - sigma))
        if self.logits is None:
            return a, b
        index, weight = place(sigma, self.logits)
        more = torch.lerp(self.differences[index], self.differences[index + 1], weight[..., None])
        trained = torch.logit(sigma) > self.logits[0] + 1e-6
        more = more * (trained & (sigma < 1))[..., None]
        return a + more[..., 0], b + more[..., 1]

    def slope_uncond(self, sigma: Tensor, a: Tensor) -> Tensor:
        """The velocity without a prompt is this times z; a is this velocity's own at sigma."""
        return a if self.uncond is None else self.uncond(sigma)[0]


def place(sigma: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Between which two levels sigma lies: the index of the first, the weight of the second."""
    x = torch.logit(sigma).clamp(logits[0], logits[-1])
    index = torch.searchsorted(logits, x, right=True).clamp(1, len(logits) - 1) - 1
    low, high = logits[index], logits[index + 1]
    return index, (x - low) / (high - low)


def exact_flow(data_std: float, conditional: bool = True) -> LinearVelocity:
    marginal = LinearVelocity(math.hypot(1, data_std), conditional=False)
    return LinearVelocity(data_std, conditional, uncond=marginal if conditional else None)


def sampled(velocity: LinearVelocity, steps: int, guidance: float, shift: float = 3.0) -> tuple:
    """Mean gain, E[sample | c] / c, and standard deviation over the data's, by Euler steps."""
    sigmas = sigma_from_t(1 - torch.arange(steps + 1, dtype=torch.float64) / steps, shift)
    a, b = velocity(sigmas[:-1])
    a_uncond = velocity.slope_uncond(sigmas[:-1], a)
    slopes = a_uncond + guidance * (a - a_uncond)
    gain = 0.0  # the state is gain c + std z1
    std = 1.0
    lengths = sigmas[1:] - sigmas[:-1]
    for d, slope, pull in zip(lengths.tolist(), slopes.tolist(), b.tolist()):
        gain += d * (slope * gain + guidance * pull)
        std += d * slope * std
    return gain, abs(std) / velocity.data_std


# --- The joint law of t and sigma_aux ---


def log_density(logit_t: Tensor, config: SoarConfig) -> Tensor:
    """log of the density of logit t, any shape."""
    x = (logit_t - config.logit_mean) / config.logit_std
    return -(x**2) / 2 - math.log(config.logit_std * math.sqrt(2 * math.pi))


def nodes_of(sigma_aux: Tensor, config: SoarConfig, count: int) -> tuple[Tensor, Tensor]:
    """t (L, Q), from which a rollout can lead to levels sigma_aux (L,), and the log of their masses
    (L, Q), by Gauss-Legendre in logit t between the points where anything has a kink. The law of t
    has a mass of its own at t_min, where draw clamps it: the last node."""
    top = float(t_from_sigma(torch.sigmoid(torch.tensor(TOP, dtype=torch.float64)), config.shift))
    step, ratio = 1 / config.num_sampling_steps, config.sigma_upper_ratio
    low = t_from_sigma(sigma_aux / ratio, config.shift).clamp(min=config.t_min)
    high = (t_from_sigma(sigma_aux, config.shift) + step).clamp(max=top)
    kinks = sorted([config.t_min + step, t_from_sigma(1 / ratio, config.shift)])
    edges = [low, *(torch.full_like(low, x).clamp(low, high) for x in kinks), high]
    edges = torch.logit(torch.stack(edges, 1))
    roots, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(count))
    half = (edges[:, 1:] - edges[:, :-1])[..., None] / 2
    x = edges[:, :-1, None] + half * (1 + roots)
    log_mass = (half * weights).log() + log_density(x, config)
    x_min = torch.logit(torch.full_like(low, config.t_min))
    at_t_min = torch.special.log_ndtr((x_min - config.logit_mean) / config.logit_std)
    x, log_mass = x.flatten(1), log_mass.flatten(1)
    t = torch.sigmoid(torch.cat([x, x_min[:, None]], 1)).clamp(min=config.t_min)
    return t, torch.cat([log_mass, at_t_min[:, None]], 1)


def log_weights(sigma_aux: Tensor, config: SoarConfig, count: int) -> tuple[Tensor, ...]:
    """Of each level, up to a factor of the level: the log of the base term's weight (L, 1), of the
    auxiliary terms' on the ODE path (L, Q) and on all stochastic paths (L, Q); and t (L, Q)."""
    t, log_mass = nodes_of(sigma_aux, config, count)
    t_next = t - 1 / config.num_sampling_steps
    sigma = sigma_from_t(t, config.shift)
    sigma_next = sigma_from_t(t_next.clamp(min=config.t_min), config.shift)
    width = (config.sigma_upper_ratio * sigma).clamp(max=1) - sigma_next
    points = config.lambda_aux * config.num_aux_points
    on_ode = log_mass + math.log(points) - width.log() if points else torch.full_like(t, -math.inf)
    reached = (width > 0) & (sigma_next + width > sigma_aux[:, None] * (1 - 1e-12))
    on_ode = torch.where(reached, on_ode, -math.inf)
    paths = torch.where(t_next > config.t_min, float(config.num_rollout_paths - 1), 0.0)
    logit_t = torch.logit(t_from_sigma(sigma_aux, config.shift))
    base = log_density(logit_t, config) - (sigma_aux * (1 - sigma_aux)).log()
    return base[:, None], on_ode, on_ode + paths.log(), t


# --- The regression, and its fixed point ---


@dataclass(frozen=True)
class Problem:
    """All that stays the same from one iteration to the next."""

    config: SoarConfig
    flow: LinearVelocity
    sigma_aux: Tensor  # (L,)
    base: Tensor  # (L, 1) weight
    paths: tuple[tuple[str, Tensor], ...]  # kind of step, weights (L, Q)
    t: Tensor  # (L, Q)


def make_problem(config: SoarConfig, flow: LinearVelocity, levels: int, nodes: int) -> Problem:
    lowest = math.log(config.shift) + math.log(config.t_min / (1 - config.t_min))
    middle, few = max(lowest + 1, 4.0), levels // 8  # near noise little changes
    logits = torch.cat([
        torch.linspace(lowest, middle, levels - few, dtype=torch.float64),
        torch.linspace(middle, TOP, few + 1, dtype=torch.float64)[1:],
    ])  # fmt: skip
    sigma_aux = torch.sigmoid(logits)
    *logs, t = log_weights(sigma_aux, config, nodes)
    largest = torch.cat(logs, 1).max(1, keepdim=True).values
    base, ode, stochastic = ((x - largest).exp() for x in logs)
    paths = [("ode", ode), (config.sde_type, stochastic)][: config.num_rollout_paths]
    return Problem(config, flow, sigma_aux, base, tuple(paths), t)


def regress(problem: Problem, a: Tensor, b: Tensor) -> Tensor:
    """The best a and b (L, 2) of every level where the rollout is by the velocity a z + b c, these
    (L, Q).

    A row of five numbers stands for a combination of c, n, z1, path noise, path z1."""
    config, shape = problem.config, problem.t.shape
    a_uncond = problem.flow.slope_uncond(sigma_from_t(problem.t, config.shift), a)
    t, *slopes = (x.flatten() for x in (problem.t, a, b, a_uncond))
    a, b, a_uncond = (x[:, None] for x in slopes)
    rows = torch.eye(5, dtype=torch.float64)[:, None].expand(5, len(t), 5)
    c, n, z1, path_noise, path_z1 = rows
    c = problem.flow.conditional * c
    z0 = c + problem.flow.data_std * n
    t_next = (t - 1 / config.num_sampling_steps).clamp(min=config.t_min)
    sigma, sigma_next = (sigma_from_t(x, config.shift) for x in (t, t_next))
    sigma_aux = problem.sigma_aux[:, None].expand(shape).flatten()

    levels = slice(len(problem.sigma_aux))
    ideal = interpolate(z0[levels], z1[levels], problem.sigma_aux)
    moments = problem.base * products(ideal, (z1 - z0)[levels])
    z = interpolate(z0, z1, sigma)
    v = guided_velocity(a_uncond * z, a * z + b * c, config.guidance_scale)
    options = {"noise_scale": config.sde_noise_scale, "shift": config.shift}
    for kind, weight in problem.paths:
        options |= {"kind": kind, "noise": None if kind == "ode" else path_noise}
        z_hat = rollout_step(z, v, sigma, sigma_next, **options)
        z_aux = renoise(z_hat, z1 if config.shared_noise else path_z1, sigma_next, sigma_aux)
        terms = products(z_aux, correction_target(z_aux, z0, sigma_aux))
        moments = moments + (weight[..., None] * terms.view(*shape, 5)).sum(1)

    # The normal equations' a and b; b is 0 where there is no condition.
    zz, zc, cc, zv, cv = moments.unbind(-1)
    if not problem.flow.conditional:
        return torch.stack([zv / zz, torch.zeros_like(zz)], -1)
    determinant = zz * cc - zc**2
    a = (cc * zv - zc * cv) / determinant
    return torch.stack([a, (cv - zc * a) / cc], -1)


def products(z: Tensor, target: Tensor) -> Tensor:
    """E of z z, z c, c c, z target, c target, (..., 5), from the coefficients."""
    c = torch.zeros_like(z)
    c[..., 0] = 1
    pairs = ((z, z), (z, c), (c, c), (z, target), (c, target))
    return torch.stack([(x * y).sum(-1) for x, y in pairs], -1)


def jacobian(best: Tensor, a: Tensor, b: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """d best / d differences, (2 L, 2 L): best (L, 2) of level l depends on its own nodes' a and b
    (L, Q) alone, and these on the differences of two levels each."""
    count = len(best)
    rows = torch.arange(count)[:, None].expand(a.shape)
    whole = torch.zeros(2, count, 2, count, dtype=a.dtype)
    for i in range(2):
        slopes = torch.autograd.grad(best[:, i].sum(), (a, b), retain_graph=True)
        for j, slope in enumerate(slopes):
            for at, share in ((index, 1 - weight), (index + 1, weight)):
                whole[i, :, j].index_put_((rows, at), slope * share, accumulate=True)
    return whole.view(2 * count, 2 * count)


def solve(
    config: SoarConfig, flow: LinearVelocity, levels: int = 250, nodes: int = 24,
    iterations: int = 100, tolerance: float = 1e-6,
) -> LinearVelocity:
    """SOAR's optimum: where training from the exact flow, at an equal rate for all levels, comes to
    rest. That path is followed by implicit steps, each twice as long as the last, so that it ends
    in Newton's. Raises ValueError: it does not come to rest."""
    problem = make_problem(config, flow, levels, nodes)
    logits = torch.logit(problem.sigma_aux)
    exact = torch.stack(flow(problem.sigma_aux), -1)
    sigma = sigma_from_t(problem.t, config.shift)
    index, weight = place(sigma, logits)
    differences = torch.zeros_like(exact)
    length = 1.0
    for _ in range(iterations):
        velocity = replace(flow, logits=logits, differences=differences)
        a, b = (x.requires_grad_(True) for x in velocity(sigma))
        best = regress(problem, a, b)
        change = (best - exact).detach() - differences
        relative = float((change.abs() / (1 + differences.abs())).max())
        if relative < tolerance:
            return velocity
        slopes = jacobian(best, a, b, index, weight)
        matrix = (1 + 1 / length) * torch.eye(2 * levels, dtype=torch.float64) - slopes
        differences = differences + torch.linalg.solve(matrix, change.T.flatten()).view(2, -1).T
        length *= 2
    raise ValueError(f"after {iterations} iterations the velocity still changes by {relative:.1e}: "
                     f"no optimum was found for {config}")  # fmt: skip


# --- Table, figure ---


def optimum(config: SoarConfig, data_std: float, caption_dropout: bool = False) -> LinearVelocity:
    """What SOAR converges to.
    caption_dropout, at any rate: then the velocity without a prompt is trained too, by SOAR."""
    flow = exact_flow(data_std)
    if caption_dropout:  # of dropped samples, all unguided
        flow = replace(flow, uncond=solve(config, flow.uncond))
    return solve(config, flow)


SWEEP = {  # label: what differs from the published settings
    "published: K = 40, lambda = 1, N = 6, w = 4.5": {},
    "w = 1, unguided": {"guidance_scale": 1.0},
    "w = 2": {"guidance_scale": 2.0},
    "w = 7": {"guidance_scale": 7.0},
    "K = 20": {"num_sampling_steps": 20},
    "K = 100": {"num_sampling_steps": 100},
    "K = 100, w = 1": {"num_sampling_steps": 100, "guidance_scale": 1.0},
    "lambda = 0.1": {"lambda_aux": 0.1},
    "lambda = 0.1, w = 1": {"lambda_aux": 0.1, "guidance_scale": 1.0},
    "lambda = 2": {"lambda_aux": 2.0},
    "ratio 1.5": {"sigma_upper_ratio": 1.5},
    "ratio 1": {"sigma_upper_ratio": 1.0},
    "M = 2, flow_sde": {"num_rollout_paths": 2},
    "fresh z1": {"shared_noise": False},
    "t_min = 1 / 40": {"t_min": 0.025},
    "caption dropout": {"caption_dropout": True},
}
COLUMNS = ("std at 1", "gain at 1", "std at 4.5", "gain at 4.5")


def values(velocity: LinearVelocity, shift: float = 3.0) -> list[float]:
    """COLUMNS, of samples of 200 steps."""
    found = [sampled(velocity, 200, guidance, shift) for guidance in (1.0, 4.5)]
    return [round(x, 6) for gain, std in found for x in (std, gain)]


def swept(label: str, data_std: float) -> list[float]:
    settings = dict(SWEEP[label])
    dropout = settings.pop("caption_dropout", False)
    config = SoarConfig(**settings)
    best = optimum(config, data_std, caption_dropout=dropout)
    return values(best)


def table(made: dict) -> str:
    lines = [["setting", *COLUMNS]]
    for label, rows in made.items():
        cells = [" / ".join(f"{x:.2f}" for x in column) for column in zip(*rows)]
        lines.append([label, *cells])
    return markdown(lines)


def figure(path: Path) -> None:
    """Left: std at guidance 1 over data_std. Right: gain at guidance w, data_std 1, over w."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    data_stds = np.geomspace(0.04, 2, 30).tolist()
    flows = [exact_flow(data_std) for data_std in data_stds]
    left.semilogx(data_stds, [sampled(x, 200, 1.0)[1] for x in flows], color="#777777")
    for w, k, style in ((1.0, 40, "C0--"), (4.5, 40, "C1-"), (4.5, 100, "C2-")):
        config = SoarConfig(num_sampling_steps=k, guidance_scale=w)
        stds = [sampled(solve(config, flow), 200, 1.0)[1] for flow in flows]
        left.semilogx(data_stds, stds, style, label=f"w = {w:g}, K = {k}")
    left.set(xlabel="s", ylabel="std over the data's", title="spread at guidance 1")
    ws = [1, 2, 3, 4, 5, 6, 7]
    flow = exact_flow(1.0)
    right.plot(ws, [sampled(flow, 200, w)[0] for w in ws], color="#777777", label="exact flow")
    for k, style in ((20, "C3-"), (40, "C1-"), (100, "C2-")):
        configs = [SoarConfig(num_sampling_steps=k, guidance_scale=w) for w in ws]
        gains = [sampled(solve(x, flow), 200, x.guidance_scale)[0] for x in configs]
        right.plot(ws, gains, style, label=f"K = {k}")
    right.set(xlabel="w, of rollout and sampling", ylabel="E[sample | c] / c", title="gain, s = 1")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def write_sweep(folder: Path) -> None:
    made = {"exact flow": [values(exact_flow(data_std)) for data_std in DATA_STDS]}
    made |= {label: [swept(label, data_std) for data_std in DATA_STDS] for label in SWEEP}
    print(table(made), end="")
    folder.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f'"{label}": {json.dumps(rows)}' for label, rows in made.items())
    (folder / "optimum.json").write_text(f"{{\n{text}\n}}\n")
    figure(folder / "optimum.png")


def main(args: Args) -> None:
    if args.sweep is not None:
        write_sweep(args.sweep)
    else:
        shift = args.soar.shift
        made = {"exact flow": [values(exact_flow(x), shift) for x in DATA_STDS]}
        made["SOAR"] = [values(optimum(args.soar, x), shift) for x in DATA_STDS]
        print(table(made), end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
