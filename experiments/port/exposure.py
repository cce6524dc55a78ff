"""How far does a rollout move your model's targets from SFT's? A few forwards tell, no training. To
be copied beside soar.py: it needs nothing else.

    print(exposure(velocity, z0, cond, uncond, config, generator=generator))

Auxiliary points are made by soar_terms from the model's own rollouts. At each, z_aux at sigma_aux:

    on      mean |v(z_ideal) - (z1 - z0)|^2 where z_ideal = (1 - sigma_aux) z0 + sigma_aux z1: SFT's
    off     mean |v(z_aux) - target|^2 with SOAR's target (z_aux - z0) / sigma_aux
    blind   mean |v(z_ideal) - target|^2: of a model that does not see that it is off the path
    shift   mean |target - (z1 - z0)|^2: all that tells an auxiliary term's target from SFT's

Where the shift is a small part of `on`, a short run of SOAR is SFT at more levels: so it was on the
shapes world, where the share is 0.05 %. It does not tell where a long run ends, nor of a fault of
the model: of experiments.theory.optimum's exact flow the share is 0.5 % at data_std 1 and 24 % at 0.2, and
off > on. It tells of the step, as it grows with w and 1 / K: hence it is also given for other K,
which costs no more forwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soar import Draws, SoarConfig, Velocity, correction_target, draw, interpolate, soar_terms

EDGES = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the levels sigma_aux
STEPS = (4, 7, 10, 14, 20, 28, 40, 100, 1000)  # K
ERRORS = ("on", "off", "blind", "shift")


class Point(NamedTuple):
    z: Tensor  # (B, ...) z_aux
    sigma: Tensor  # (B,) sigma_aux
    target: Tensor  # (B, ...) (z_aux - z0) / sigma_aux
    z_ideal: Tensor  # (B, ...) the state of the ideal path at sigma_aux
    ideal: Tensor  # (B, ...) z1 - z0


@torch.no_grad()
def points_of(velocity, z0, draws: Draws, cond, uncond, config: SoarConfig) -> Iterator[Point]:
    """The points of velocity's own ODE rollouts, in the order of soar_terms."""
    calls = []

    def recorded(z, sigma, c):
        calls.append((z, sigma))
        return velocity(z, sigma, c)

    list(soar_terms(recorded, z0, draws, cond, uncond, config))
    first = len(calls) - config.num_rollout_paths * config.num_aux_points
    for z, sigma in calls[first : first + config.num_aux_points]:
        z_ideal = interpolate(z0, draws.z1.to(z0), sigma)
        target = correction_target(z, z0, sigma)
        yield Point(z, sigma, target, z_ideal, draws.z1.to(z0) - z0)


@torch.no_grad()
def errors_at(velocity: Velocity, point: Point, cond: Any) -> dict[str, Tensor]:
    """on, off, blind and shift of each sample, (B,), from two forwards."""
    v = velocity(point.z, point.sigma, cond)
    v_ideal = velocity(point.z_ideal.to(point.z.dtype), point.sigma, cond)
    differences = {"on": v_ideal - point.ideal, "off": v - point.target}
    differences |= {"blind": v_ideal - point.target, "shift": point.target - point.ideal}
    return {name: x.square().flatten(1).mean(1) for name, x in differences.items()}


@torch.no_grad()
def shifts_by_steps(velocity, z0, draws: Draws, cond, uncond, config: SoarConfig) -> dict:
    """{K: shift (N B,)} for K of STEPS: the forwards at the rollout's start serve them all."""
    kept = []

    def started(z, sigma, c):
        kept.append(velocity(z, sigma, c))
        return kept[-1]

    base, *_ = soar_terms(started, z0, draws, cond, None, replace(config, lambda_aux=0.0))
    if config.guidance_scale != 1:
        list(soar_terms(started, z0, draws, uncond, None, replace(config, lambda_aux=0.0)))
    made = {}
    for steps in STEPS:
        replayed = iter(kept)
        still = lambda z, *_, replayed=replayed: next(replayed, torch.zeros_like(z))  # noqa: E731
        at = replace(config, num_sampling_steps=steps)
        found = [x.target - x.ideal for x in points_of(still, z0, draws, cond, uncond, at)]
        made[steps] = torch.cat([x.square().flatten(1).mean(1) for x in found])
    return made


@dataclass(frozen=True)
class Exposure:
    """What was found; str() is the report."""

    steps: int  # K of the config
    sigma: Tensor  # (P,) of every point, as the errors
    errors: dict[str, Tensor]
    shift_by_steps: dict[int, float]
    threshold: float

    @property
    def share(self) -> float:
        """The shift over the error on the ideal path."""
        return float(self.errors["shift"].mean() / self.errors["on"].mean())

    @property
    def unlike_sft(self) -> bool:
        return self.share > self.threshold

    @property
    def steps_that_matter(self) -> int | None:
        """The largest K of STEPS at which the shift passes the threshold."""
        on = float(self.errors["on"].mean())
        beyond = [k for k, x in self.shift_by_steps.items() if x > self.threshold * on]
        return max(beyond, default=None)

    def __str__(self) -> str:
        lines = ["sigma_aux       points     on    off  blind  shift"]
        for low, high in zip(EDGES, EDGES[1:]):
            rows = (self.sigma >= low) & ((self.sigma < high) | (high == 1))
            if rows.any():
                means = [f"{float(self.errors[name][rows].mean()):6.4f}" for name in ERRORS]
                lines.append(f"{low:4.2f} to {high:4.2f} {int(rows.sum()):9} " + " ".join(means))
        means = [f"{float(self.errors[name].mean()):6.4f}" for name in ERRORS]
        lines.append(f"all          {len(self.sigma):9} " + " ".join(means))
        cost = self.errors["off"] - self.errors["on"]
        error = float(cost.std() / len(cost) ** 0.5)
        lines.append(f"off - on: {float(cost.mean()):.4f}, standard error {error:.4f}")
        shifts = ", ".join(f"{k}: {x:.4f}" for k, x in self.shift_by_steps.items())
        lines.append(f"shift by K: {shifts}")
        matters = self.steps_that_matter
        size = f"the shift is {self.share:.2%} of the error on the ideal path at K = {self.steps}"
        at = f"{self.threshold:.0%} of that error"
        reach = f"reaches {at} at K = {matters} and below" if matters else f"stays below {at}"
        verdict = "is more than SFT" if self.unlike_sft else "is SFT"
        lines.append(f"A short run of SOAR {verdict} at more levels: {size}; it {reach}.")
        return "\n".join(lines)


def exposure(
    velocity: Velocity, z0: Tensor, cond: Any, uncond: Any = None, config=SoarConfig(), *,
    generator: torch.Generator, repeats: int = 4, threshold: float = 0.01,
) -> Exposure:
    """The report on a trained model, in eval mode, with z0 (B, ...) and cond of its own data.

    uncond, config: as in training by soar_terms; the config must have auxiliary points. repeats:
    how many times noise and levels are drawn. threshold: of the shift over the error on the ideal
    path, above which SOAR is not SFT at more levels. Forwards: repeats times 3 N + 4 of B samples.
    Raises ValueError: lambda N is 0; or as soar_terms."""
    if config.lambda_aux * config.num_aux_points == 0:
        raise ValueError(f"{config} has no auxiliary points: lambda_aux or num_aux_points is 0")
    config = replace(config, num_rollout_paths=1)
    sigmas, errors, shifts = [], {name: [] for name in ERRORS}, {k: [] for k in STEPS}
    for _ in range(repeats):
        draws = draw(z0.shape, config, generator)
        for point in points_of(velocity, z0, draws, cond, uncond, config):
            sigmas.append(point.sigma)
            for name, x in errors_at(velocity, point, cond).items():
                errors[name].append(x)
        for k, x in shifts_by_steps(velocity, z0, draws, cond, uncond, config).items():
            shifts[k].append(x)
    errors = {name: torch.cat(x) for name, x in errors.items()}
    by_steps = {k: float(torch.cat(x).mean()) for k, x in shifts.items()}
    return Exposure(config.num_sampling_steps, torch.cat(sigmas), errors, by_steps, threshold)
