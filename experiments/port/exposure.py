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
the model: of experiments.theory.optimum's exact flow the share is 0.5 % at data_std 1, 24 % at 0.2,
and off > on (commit fcca179). It tells of the step, as it grows with w and 1 / K.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from soar import Draws, SoarConfig, Velocity, correction_target, draw, interpolate, soar_terms

EDGES = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the levels sigma_aux
ERRORS = ("on", "off", "blind", "shift")
THRESHOLD = 0.01  # of the shift over the error on the path, above which SOAR is not SFT


def square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


@torch.no_grad()
def errors_of(velocity, z0, draws: Draws, cond, uncond, config: SoarConfig) -> dict[str, Tensor]:
    """sigma and the ERRORS (P,) of every point and sample."""
    calls = []

    def recorded(z, sigma, c):
        v = velocity(z, sigma, c)
        calls.append((z, sigma, v))
        return v

    list(soar_terms(recorded, z0, draws, cond, uncond, config))
    points = calls[-config.num_aux_points :]
    z1 = draws.z1.to(z0)
    ideal = z1 - z0
    found = []
    for z, sigma, v_aux in points:
        target = correction_target(z, z0, sigma)
        v_ideal = velocity(interpolate(z0, z1, sigma).to(z.dtype), sigma, cond)
        gaps = (v_ideal - ideal, v_aux - target, v_ideal - target, target - ideal)  # as ERRORS
        found.append([sigma, *map(square, gaps)])
    return dict(zip(("sigma", *ERRORS), map(torch.cat, zip(*found))))


@dataclass(frozen=True)
class Exposure:
    """What was found; str() is the report."""

    steps: int  # K of the config
    errors: dict[str, Tensor]  # sigma and ERRORS, (P,) each

    @property
    def share(self) -> float:
        """The shift over the error on the ideal path."""
        return float(self.errors["shift"].mean() / self.errors["on"].mean())

    def line(self, name: str, rows: Tensor) -> str:
        means = [f"{float(self.errors[x][rows].mean()):6.4f}" for x in ERRORS]
        return f"{name:12} {int(rows.sum()):9} " + " ".join(means)

    def __str__(self) -> str:
        sigma = self.errors["sigma"]
        lines = ["sigma_aux       points     on    off  blind  shift"]
        for low, high in zip(EDGES, EDGES[1:]):
            rows = (sigma >= low) & ((sigma < high) | (high == 1))
            if rows.any():
                lines.append(self.line(f"{low:4.2f} to {high:4.2f}", rows))
        lines.append(self.line("all", sigma >= 0))
        cost = self.errors["off"] - self.errors["on"]
        error = float(cost.std() / len(cost) ** 0.5)
        lines.append(f"off - on: {float(cost.mean()):.4f}, standard error {error:.4f}")
        size = f"the shift is {self.share:.2%} of the error on the ideal path at K = {self.steps}"
        verdict = "is more than SFT" if self.share > THRESHOLD else "is SFT"
        lines.append(f"A short run of SOAR {verdict} at more levels: {size}.")
        return "\n".join(lines)


def exposure(
    velocity: Velocity, z0: Tensor, cond: Any, uncond: Any = None, config=SoarConfig(), *,
    generator: torch.Generator, repeats: int = 4,
) -> Exposure:
    """The report on a trained model, in eval mode, with z0 (B, ...) and cond of its own data.

    uncond, config: as in training by soar_terms; the config must have auxiliary points. repeats:
    how many times noise and levels are drawn. Forwards: repeats times 2 N + 2 of B samples.
    Raises ValueError: lambda N is 0; or as soar_terms."""
    if config.lambda_aux * config.num_aux_points == 0:
        raise ValueError(f"{config} has no auxiliary points: lambda_aux or num_aux_points is 0")
    config = replace(config, num_rollout_paths=1)
    found = []
    for _ in range(repeats):
        draws = draw(z0.shape, config, generator)
        found.append(errors_of(velocity, z0, draws, cond, uncond, config))
    errors = {name: torch.cat([x[name] for x in found]) for name in found[0]}
    return Exposure(config.num_sampling_steps, errors)
