"""One SOAR step in two dimensions, by soar.py's functions: the README's first figure.

    python -m experiments.theory.geometry experiments/theory/results/geometry.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

from soar import correction_target, guided_velocity, interpolate, renoise, rollout_step

IDEAL, DRIFT, TARGET = "#777777", "#d95f02", "#1b6ca8"


def at(point: Tensor) -> list[float]:
    return point[0].tolist()


def main(file: tyro.conf.Positional[Path]) -> None:
    """The velocity is wrong by a constant, and the step is long, for the drift to be seen."""
    z0, z1 = torch.tensor([[[0.0, 0.0]], [[4.0, 1.0]]])
    sigma, sigma_next = torch.tensor([[0.85], [0.5]])
    v_uncond = z1 - z0 + torch.tensor([0.0, -0.35])
    v_cond = z1 - z0 + torch.tensor([0.1, -0.75])
    z = interpolate(z0, z1, sigma)
    z_hat = rollout_step(z, guided_velocity(v_uncond, v_cond, 4.5), sigma, sigma_next)
    plt.rcParams["font.size"] = 10
    fig, ax = plt.subplots(figsize=(8, 4.2))
    ax.plot(*zip(at(z0), at(z1)), color="#bbbbbb", lw=2, zorder=1)
    ax.text(1.1, 0.0, "ideal path: $(1-\\sigma)\\,z_0 + \\sigma\\,z_1$", color=IDEAL)
    ax.plot(*zip(at(z_hat), at(z1)), color=DRIFT, lw=1.2, ls=":", zorder=1)
    step = {"arrowstyle": "-|>", "color": DRIFT, "lw": 2, "shrinkA": 5}
    ax.annotate("", at(z_hat), at(z), arrowprops=step)
    ax.text(2.55, 1.32, "one guided sampler step, no gradient", color=DRIFT, ha="center")
    arrow = {"arrowstyle": "-|>", "color": TARGET, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    for sigma_aux in torch.tensor([[0.56], [0.66], [0.76], [0.88]]):
        z_aux = renoise(z_hat, z1, sigma_next, sigma_aux)
        target = correction_target(z_aux, z0, sigma_aux)
        tip = z_aux - 0.45 * sigma_aux * target  # sigma_aux times the target leads to z0
        ax.annotate("", at(tip), at(z_aux), arrowprops=arrow)
        ax.plot(*zip(at(z_aux), at(z0)), color=TARGET, lw=0.5, alpha=0.5, zorder=0)
        (points,) = ax.plot(*at(z_aux), "o", color=TARGET, ms=6)
    points.set_label("re-noised points and their targets")
    for point, name, right, up, color in (
        (z0, "$z_0$, clean", -0.1, -0.28, "black"),
        (z1, "$z_1$, noise", -0.05, -0.28, "black"),
        (z, "$z$ at $\\sigma$", 0.0, -0.26, IDEAL),
        (z_hat, "$\\hat z$ at $\\sigma_\\mathrm{next}$", -0.75, 0.0, DRIFT),
    ):
        ax.plot(*at(point), "o", color=color, ms=8)
        ax.text(point[0, 0] + right, point[0, 1] + up, name, color=color)
    ax.legend(frameon=False, loc="lower right")
    ax.set(xlim=(-0.4, 4.6), aspect="equal")
    ax.axis("off")
    fig.tight_layout()
    fig.savefig(file, dpi=100)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
