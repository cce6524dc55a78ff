"""SOAR against SFT with networks, where the true law is known: two dimensions, four classes.

    python -m experiments.theory.toy         # half an hour of one core; --arms, --seeds: a part

Each class has two Gaussian modes. A small MLP is trained by flow matching, a tenth of its
conditions empty; from these weights each arm trains on, on fresh samples of the same law, with the
same pairs, noise and t for all arms of a seed (and a tenth of the conditions empty, as before, so
that the unconditional velocity stays the data's). Samples of 40 Euler steps on sigma_from_t are
compared with samples of the true law of their class:

    distance  sliced Wasserstein-1; the table's last row is that of two samples of the true law
    std       within modes (samples go to the nearer mode of their class), over the data's
    radius    mean distance from the origin over the data's: guidance overshoots it

And by level of noise, on states of the true law: the squared error of the velocity against the true
one, with the class as condition and without one.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from experiments.environment import markdown
from soar import SoarConfig, draw, guided_velocity, sigma_from_t, soar_terms

CLASSES = 4
EMPTY = CLASSES
RADIUS, HALF_ANGLE, MODE_STD = 1.5, 0.5, 0.25
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)
MEASURES = ("distance", "std", "radius")
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)  # sigma
STEP_UNITS = 22  # a SOAR step's, in forwards; see the README


@dataclass(frozen=True)
class Arm:
    label: str
    config: SoarConfig = SoarConfig()
    units: int = STEP_UNITS  # of one step; SFT's is 3
    equal_compute: bool = False  # as many steps as SOAR's compute pays for


SFT = SoarConfig(lambda_aux=0.0)
N1 = SoarConfig(num_aux_points=1, lambda_aux=6.0)
K10 = SoarConfig(num_sampling_steps=10)
ARMS = {
    "base": Arm("base", SFT, 0),
    "sft": Arm("SFT", SFT, 3),
    "sft_steps": Arm("SFT, SOAR's compute", SFT, 3, equal_compute=True),
    "soar": Arm("SOAR"),
    "no_rollout": Arm("SOAR, K = 10^6 (no rollout)", SoarConfig(num_sampling_steps=10**6)),
    "n1": Arm("SOAR, N = 1, lambda = 6", N1, 7),
    "n1_steps": Arm("SOAR, N = 1, lambda = 6, SOAR's compute", N1, 7, equal_compute=True),
    "lambda_0.1": Arm("SOAR, lambda = 0.1", SoarConfig(lambda_aux=0.1)),
    "lambda_0.3": Arm("SOAR, lambda = 0.3", SoarConfig(lambda_aux=0.3)),
    "w1": Arm("SOAR, w = 1", SoarConfig(guidance_scale=1.0), 21),
    "k100": Arm("SOAR, K = 100", SoarConfig(num_sampling_steps=100)),
    "k20": Arm("SOAR, K = 20", SoarConfig(num_sampling_steps=20)),
    "k10": Arm("SOAR, K = 10", K10),
    "k10_t_min": Arm("K = 10, t_min = 1 / K", replace(K10, t_min=0.1)),
    "k10_t_min_0.02": Arm("K = 10, t_min = 0.02", replace(K10, t_min=0.02)),
}


@dataclass(frozen=True)
class Args:
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of pretraining, training and samples."""
    pretrain_steps: int = 6000
    steps: int = 500
    """Of each arm but those of equal compute."""
    batch_size: int = 256
    learning_rate: float = 1e-3
    """At the start of pretraining, and of each arm; it falls to 0 linearly."""
    samples: int = 600
    """Per class and guidance."""
    output_dir: Path = Path("output/toy")
    """toy.json and toy.png are written here."""

    def __post_init__(self):
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.arms:
            raise ValueError(f"--arms is {unknown or self.arms}, expected some of {list(ARMS)}")
        for name in ("pretrain_steps", "steps", "batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if len(self.seeds) < 2:
            raise ValueError(f"--seeds is {self.seeds}, expected two or more for a standard error")


# --- The world, the model, training ---


def modes_of(classes: Tensor) -> Tensor:
    """The centers (B, 2 modes, 2) of classes (B,)."""
    angle = classes[:, None] * (2 * math.pi / CLASSES) + torch.tensor([-HALF_ANGLE, HALF_ANGLE])
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def data(classes: Tensor, generator: torch.Generator) -> Tensor:
    """z0 (B, 2) of classes (B,)."""
    which = torch.randint(2, classes.shape, generator=generator)
    centers = modes_of(classes)[torch.arange(len(classes)), which]
    return centers + MODE_STD * torch.randn(centers.shape, generator=generator)


def true_velocity(z: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
    """E[z1 - z0 | z] (B, 2), of a Gaussian mixture: of a class's modes, or for EMPTY of all."""
    centers = modes_of(torch.arange(CLASSES)).flatten(0, 1)
    left_out = classes[:, None] != torch.arange(CLASSES).repeat_interleave(2)
    left_out &= (classes != EMPTY)[:, None]
    sigma = sigma[:, None]
    variance = ((1 - sigma) * MODE_STD) ** 2 + sigma**2
    away = z[:, None] - (1 - sigma[..., None]) * centers  # (B, mode, 2)
    log_odds = -away.square().sum(2) / (2 * variance)
    odds = log_odds.masked_fill(left_out, -math.inf).softmax(1)
    slope = (sigma - (1 - sigma) * MODE_STD**2) / variance
    return (odds[..., None] * (slope[..., None] * away - centers)).sum(1)


class Model(nn.Module):
    """velocity(z, sigma, class) by an MLP; class EMPTY is no condition."""

    def __init__(self, width: int = 128, frequencies: int = 8):
        super().__init__()
        self.embed = nn.Embedding(CLASSES + 1, 16)
        self.frequencies = torch.arange(frequencies) * math.pi / 2
        sizes = [2 + 1 + 2 * frequencies + 16, width, width, width]
        hidden = [x for pair in zip(sizes, sizes[1:]) for x in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, z: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        angles = sigma[:, None] * self.frequencies
        inputs = [z, sigma[:, None], angles.sin(), angles.cos(), self.embed(classes)]
        return self.layers(torch.cat(inputs, 1))


def generator_of(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def train(model: Model, arm: Arm, steps: int, seed: int, phase: int, args: Args) -> Model:
    """A trained copy. The pairs, noise and t of a step are functions of seed, phase and step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        generator = generator_of(seed, phase, step)
        classes = torch.randint(CLASSES, (args.batch_size,), generator=generator)
        z0 = data(classes, generator)
        dropped = torch.rand(classes.shape, generator=generator) < 0.1
        classes = torch.where(dropped, EMPTY, classes)
        draws = draw(z0.shape, arm.config, generator)
        optimizer.zero_grad()
        empty = torch.full_like(classes, EMPTY)
        for term in soar_terms(model, z0, draws, classes, empty, arm.config):
            term.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


# --- Measures ---


@torch.no_grad()
def sample(model: Callable, classes: Tensor, guidance: float, z: Tensor, steps: int = 40) -> Tensor:
    """Euler steps of the guided velocity, from noise z (B, 2)."""
    sigmas = sigma_from_t(1 - torch.arange(steps + 1) / steps)
    empty = torch.full_like(classes, EMPTY)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        level = sigma.expand(len(z))
        v = model(z, level, classes)
        if guidance != 1:
            v = guided_velocity(model(z, level, empty), v, guidance)
        z = z + (sigma_next - sigma) * v
    return z


def distance(x: Tensor, y: Tensor, directions: int = 32) -> float:
    """Sliced Wasserstein-1 distance of as many points x and y (n, 2)."""
    angles = torch.arange(directions) * math.pi / directions
    across = torch.stack([angles.cos(), angles.sin()])
    sorted_x, sorted_y = ((points @ across).sort(0).values for points in (x, y))
    return float((sorted_x - sorted_y).abs().mean())


def measure(x: Tensor, classes: Tensor, reference: Tensor) -> list[float]:
    """MEASURES of samples x (B, 2), means over the classes; reference: of the true law."""
    found = []
    for k in range(CLASSES):
        rows = classes == k
        z, true = x[rows], reference[rows]
        nearer = torch.cdist(z, modes_of(torch.tensor([k]))[0]).argmin(1)
        parts = [z[nearer == mode] for mode in (0, 1)]
        around = torch.cat([part - part.mean(0) for part in parts if len(part)])
        std = float(around.square().mean().sqrt()) / MODE_STD
        radius = float(z.norm(dim=1).mean() / true.norm(dim=1).mean())
        found.append([distance(z, true), std, radius])
    return np.mean(found, 0).round(5).tolist()


def evaluate(model: Model, seed: int, args: Args) -> tuple[list[float], list[list[float]]]:
    """The measures of other samples of the true law, and the model's at GUIDANCES; noise and
    reference are the same for all arms of a seed."""
    generator = generator_of(seed, 3)
    classes = torch.arange(CLASSES).repeat_interleave(args.samples)
    reference = data(classes, generator)
    z1 = torch.randn(reference.shape, generator=generator)
    floor = measure(data(classes, generator_of(seed, 4)), classes, reference)
    samples = [sample(model, classes, w, z1) for w in GUIDANCES]
    return floor, [measure(x, classes, reference) for x in samples]


@torch.no_grad()
def errors(model: Callable, seed: int, args: Args) -> list[list[float]]:
    """By level: the squared error of the velocity with the class, and without a condition."""
    generator = generator_of(seed, 5)
    classes = torch.arange(CLASSES).repeat_interleave(args.samples)
    z0 = data(classes, generator)
    z1 = torch.randn(z0.shape, generator=generator)
    found = []
    for level in LEVELS:
        z, sigma = (1 - level) * z0 + level * z1, torch.full_like(z0[:, 0], level)
        conditions = classes, torch.full_like(classes, EMPTY)
        wrong = [model(z, sigma, x) - true_velocity(z, sigma, x) for x in conditions]
        found.append([round(float(x.square().sum(1).mean()), 6) for x in wrong])
    return found


def run(args: Args) -> dict:
    """{"settings", "true law": MEASURES by seed, arm: by seed and guidance, "errors": by arm}."""
    settings = {x: y for x, y in vars(args).items() if x not in ("arms", "output_dir")}
    result = {"settings": settings, "true law": []} | {name: [] for name in args.arms}
    result["errors"] = {name: [] for name in args.arms}
    for seed in args.seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Model()
        base = train(model, ARMS["sft"], args.pretrain_steps, seed, 1, args)
        for name in args.arms:
            arm = ARMS[name]
            steps = args.steps * STEP_UNITS // arm.units if arm.equal_compute else args.steps
            trained = train(base, arm, steps, seed, 2, args) if arm.units else base
            floor, rows = evaluate(trained, seed, args)
            result[name].append(rows)
            result["errors"][name].append(errors(trained, seed, args))
            print(f"seed {seed}, {name}: distance {rows[0][0]:.3f} at guidance 1", flush=True)
        result["true law"].append(floor)
    return result


# --- Tables and figure ---


def column(result: dict, name: str, measure_name: str, guidance: float) -> np.ndarray:
    """Over seeds."""
    by_seed = np.array(result[name])
    return by_seed[:, GUIDANCES.index(guidance), MEASURES.index(measure_name)]


def mean_error(x: np.ndarray) -> str:
    """Mean and standard error over seeds."""
    return f"{x.mean():.3f} ± {x.std(ddof=1) / math.sqrt(len(x)):.3f}"


def table(result: dict) -> str:
    lines = [["arm", "compute", "distance at 1", "at 4.5", "std at 1 / 4.5", "radius at 4.5"]]
    for name in (x for x in ARMS if x in result):
        arm = ARMS[name]
        units = STEP_UNITS if arm.equal_compute else arm.units
        cells = [arm.label, f"{units / 3:.1f}"]
        cells += [mean_error(column(result, name, "distance", w)) for w in (1.0, 4.5)]
        stds = [f"{column(result, name, 'std', w).mean():.2f}" for w in (1.0, 4.5)]
        cells.append(" / ".join(stds))
        cells.append(f"{column(result, name, 'radius', 4.5).mean():.2f}")
        lines.append(cells)
    floor, std, radius = np.mean(result["true law"], axis=0)
    cells = [f"{floor:.3f}", "", f"{std:.2f}", f"{radius:.2f}"]
    lines.append(["the true law, other samples", "", *cells])
    return markdown(lines)


def errors_table(result: dict) -> str:
    """SFT's errors, times 1000, and the other arms' differences from it, over seeds."""
    lines = [["arm", "condition", *(f"sigma {x}" for x in LEVELS)]]
    for name in (x for x in MAIN if x in result):
        for i, condition in enumerate(("class", "none")):
            values = 1000 * np.array(result["errors"][name])[:, :, i]
            label = ARMS[name].label
            if name != "sft":
                label += ", minus SFT"
                values -= 1000 * np.array(result["errors"]["sft"])[:, :, i]
            cells = [f"{x.mean():.1f} ± {x.std(ddof=1) / math.sqrt(len(x)):.1f}" for x in values.T]
            lines.append([label, condition, *cells])
    return markdown(lines, names=2)


MAIN = ("sft", "base", "sft_steps", "soar", "no_rollout", "n1", "w1")
PAIRS = (
    ("soar", "sft"), ("no_rollout", "sft"), ("soar", "no_rollout"), ("sft_steps", "soar"),
    ("n1", "soar"), ("n1_steps", "soar"),
)  # fmt: skip


def pairs(result: dict) -> str:
    """Differences of two arms' distances, paired over seeds."""
    lines = [["distance of", "minus that of", "at 1", "at 4.5"]]
    for names in (x for x in PAIRS if set(x) <= set(result)):
        cells = [ARMS[name].label for name in names]
        for w in (1.0, 4.5):
            first, second = (column(result, name, "distance", w) for name in names)
            cells.append(mean_error(first - second))
        lines.append(cells)
    return markdown(lines, names=2)


def figure(result: dict, path: Path) -> None:
    """Distance and std over guidance, means of the seeds and their standard errors."""
    shown = ("sft", "sft_steps", "soar", "no_rollout", "w1", "k20")
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    labels = {"distance": "distance to the true law", "std": "std within modes, data = 1"}
    for (key, label), ax in zip(labels.items(), axes):
        for name in (x for x in shown if x in result):
            values = np.stack([column(result, name, key, w) for w in GUIDANCES])
            error = values.std(1, ddof=1) / math.sqrt(values.shape[1])
            ax.errorbar(GUIDANCES, values.mean(1), error, marker="o", ms=3, label=ARMS[name].label)
        ax.set(xscale="log", xlabel="guidance", ylabel=label)
        ax.set_xticks(GUIDANCES, [f"{w:g}" for w in GUIDANCES])
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(args: Args) -> None:
    result = run(args)
    print(table(result), pairs(result), errors_table(result), sep="\n", end="")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "toy.json").write_text(json.dumps(result) + "\n")
    figure(result, args.output_dir / "toy.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
