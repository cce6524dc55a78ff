"""SOAR against SFT with networks, where the true law is known: two dimensions, four classes.

    python -m experiments.theory.toy                                       # about 33 minutes of one core
    python -m experiments.theory.toy --arms base sft soar --seeds 0 1      # a part of it
    python -m experiments.theory.toy --show experiments/theory/results/toy.json   # the tables again

Each class has two Gaussian modes. A small MLP is trained by flow matching, a tenth of its
conditions empty; from these weights each arm trains on, on fresh samples of the same law, with the
same pairs, noise and t for all arms of a seed (and a tenth of the conditions empty, as before, so
that the unconditional velocity stays the data's). Samples of 40 Euler steps on sigma_from_t are
compared with samples of the true law of their class, the data's, at every guidance:

    distance  sliced Wasserstein-1; the table's last row is that of two samples of the true law
    std       within modes (samples go to the nearer mode of their class), over the data's
    radius    mean distance from the origin over the data's: guidance overshoots it
    balance   share of the smaller mode, 0.5 in the data
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from soar import Draws, SoarConfig, draw, guided_velocity, loss_normalizer, sigma_from_t, soar_terms

CLASSES = 4
EMPTY = CLASSES
RADIUS, HALF_ANGLE, MODE_STD = 1.5, 0.5, 0.25
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)
MEASURES = ("distance", "std", "radius", "balance")
STEP_UNITS = 22  # a SOAR step's, in forwards; see the README


@dataclass(frozen=True)
class Arm:
    label: str
    config: SoarConfig = SoarConfig()
    units: int = STEP_UNITS  # of one step; SFT's is 3
    equal_compute: bool = False  # as many steps as SOAR's compute pays for
    change: Callable[[Draws, SoarConfig], Draws] = lambda draws, config: draws
    whole_steps: bool = False  # auxiliary terms only where the rollout is a whole step, t >= 1 / K


def from_one_step_up(draws: Draws, config: SoarConfig) -> Draws:
    """t at or above 1 / K: its law is squeezed into the rest of [0, 1]."""
    step = 1 / config.num_sampling_steps
    return draws._replace(t=step + config.t_min + (1 - step - config.t_min) * draws.t)


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
    "k10_t": Arm("K = 10, t drawn from 1 / K up", K10, change=from_one_step_up),
    "k10_t_min": Arm("K = 10, t_min = 1 / K", replace(K10, t_min=0.1)),
    "k10_t_min_0.02": Arm("K = 10, t_min = 0.02", replace(K10, t_min=0.02)),
    "k10_whole": Arm("K = 10, rollout only where t >= 1 / K", K10, whole_steps=True),
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
    show: Path | None = None
    """Print the tables of this toy.json, and train nothing."""

    def __post_init__(self):
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.arms:
            raise ValueError(f"--arms is {unknown or self.arms}, expected some of {list(ARMS)}")
        for name in ("pretrain_steps", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if self.samples < 16:
            raise ValueError(f"--samples is {self.samples}, expected at least 16")
        if not self.seeds:
            raise ValueError("--seeds is empty, expected at least one")


# --- The world and the model ---


def modes_of(classes: Tensor) -> Tensor:
    """The centers (B, 2 modes, 2) of classes (B,)."""
    angle = classes[:, None] * (2 * math.pi / CLASSES) + torch.tensor([-HALF_ANGLE, HALF_ANGLE])
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def data(classes: Tensor, generator: torch.Generator) -> Tensor:
    """z0 (B, 2) of classes (B,)."""
    which = torch.randint(2, classes.shape, generator=generator)
    centers = modes_of(classes)[torch.arange(len(classes)), which]
    return centers + MODE_STD * torch.randn(centers.shape, generator=generator)


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


# --- Training ---


def generator_of(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def loss_terms(model: Model, z0: Tensor, draws: Draws, classes: Tensor, arm: Arm):
    """soar_terms' losses; with whole_steps, samples of t < 1 / K are SFT samples."""
    config, empty = arm.config, torch.full_like(classes, EMPTY)
    if not arm.whole_steps:
        for term in soar_terms(model, z0, draws, classes, empty, config):
            yield term.loss
        return
    whole = draws.t >= 1 / config.num_sampling_steps
    sft = replace(config, lambda_aux=0.0)
    both = ((whole, config), (~whole, sft))
    normalizer = sum(loss_normalizer(draws.t[rows], c) for rows, c in both)
    for rows, c in both:
        if rows.any():
            part = Draws(draws.z1[rows], draws.t[rows], draws.u[:, :, rows], draws.path_noise, None)
            part = part._replace(path_noise=draws.path_noise[:, rows])
            inputs = (z0[rows], part, classes[rows], empty[rows], c)
            for term in soar_terms(model, *inputs, normalizer=normalizer):
                yield term.loss


def train(model: Model, arm: Arm, steps: int, seed: int, phase: int, args: Args) -> Model:
    """A trained copy. The pairs, noise and t of a step are functions of seed, phase and step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        generator = generator_of(seed, phase, step)
        classes = torch.randint(CLASSES, (args.batch_size,), generator=generator)
        z0 = data(classes, generator)
        empty = torch.rand(classes.shape, generator=generator) < 0.1
        classes = torch.where(empty, EMPTY, classes)
        draws = arm.change(draw(z0.shape, arm.config, generator), arm.config)
        optimizer.zero_grad()
        for loss in loss_terms(model, z0, draws, classes, arm):
            loss.backward()
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


def measure(x: Tensor, classes: Tensor, reference: Tensor) -> dict[str, float]:
    """The four measures of samples x (B, 2), means over the classes; reference: of the true law."""
    found = {name: [] for name in MEASURES}
    for k in range(CLASSES):
        rows = classes == k
        z, true = x[rows], reference[rows]
        centers = modes_of(torch.tensor([k]))[0]
        nearer = torch.cdist(z, centers).argmin(1)
        parts = [z[nearer == mode] for mode in (0, 1)]
        around = torch.cat([part - part.mean(0) for part in parts if len(part)])
        found["distance"].append(distance(z, true))
        found["std"].append(float(around.square().mean().sqrt()) / MODE_STD)
        found["radius"].append(float(z.norm(dim=1).mean() / true.norm(dim=1).mean()))
        found["balance"].append(min(map(len, parts)) / len(z))
    return {name: float(np.mean(values)) for name, values in found.items()}


def evaluate(model: Model, seed: int, args: Args) -> dict[str, dict[str, float]]:
    """The measures by guidance; noise and reference are the same for all arms of a seed."""
    generator = generator_of(seed, 3)
    classes = torch.arange(CLASSES).repeat_interleave(args.samples)
    reference = data(classes, generator)
    z1 = torch.randn(reference.shape, generator=generator)
    samples = {str(w): sample(model, classes, w, z1) for w in GUIDANCES}
    return {w: measure(x, classes, reference) for w, x in samples.items()}


def floor(seed: int, args: Args) -> dict[str, float]:
    """The measures of other samples of the true law."""
    generator = generator_of(seed, 3)
    classes = torch.arange(CLASSES).repeat_interleave(args.samples)
    reference = data(classes, generator)
    return measure(data(classes, generator_of(seed, 4)), classes, reference)


def run(args: Args) -> dict:
    """{"settings", "floor": per seed, "arms": {name: per seed: guidance: measures}}; seeds that a
    toy.json of the same settings and arms has already are not run again."""
    settings = {"pretrain_steps": args.pretrain_steps, "steps": args.steps}
    settings |= {"seeds": list(args.seeds)}
    settings |= {"batch_size": args.batch_size, "learning_rate": args.learning_rate}
    settings |= {"samples": args.samples}
    result = {"settings": settings, "floor": [], "arms": {name: [] for name in args.arms}}
    if (args.output_dir / "toy.json").is_file():
        before = json.loads((args.output_dir / "toy.json").read_text())
        if before["settings"] == settings and set(before["arms"]) == set(args.arms):
            result = before
    for seed in args.seeds[len(result["floor"]) :]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Model()
        base = train(model, ARMS["sft"], args.pretrain_steps, seed, 1, args)
        for name in args.arms:
            arm = ARMS[name]
            steps = args.steps * STEP_UNITS // arm.units if arm.equal_compute else args.steps
            trained = train(base, arm, steps, seed, 2, args) if arm.units else base
            row = evaluate(trained, seed, args)
            result["arms"][name].append(row)
            distances = " ".join(f"{row[w]['distance']:.3f}" for w in ("1.0", "4.5"))
            print(f"seed {seed}, {name}: distance {distances} at guidance 1 and 4.5", flush=True)
        result["floor"].append(floor(seed, args))
        save(result, args.output_dir)
    return result


def save(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.json").write_text(json.dumps(result, indent=1) + "\n")


# --- Tables and figure ---


def column(result: dict, name: str, measure_name: str, guidance: float | str) -> np.ndarray:
    """Over seeds; guidance "best": each arm's own, that of the least mean distance."""
    rows = result["arms"][name]
    if guidance == "best":
        guidance = best_guidance(result, name)
    return np.array([row[str(guidance)][measure_name] for row in rows])


def best_guidance(result: dict, name: str) -> float:
    return min(GUIDANCES, key=lambda w: column(result, name, "distance", w).mean())


def mean_error(x: np.ndarray) -> str:
    """Mean and standard error over seeds."""
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return f"{x.mean():.3f} ± {error:.3f}"


def table(result: dict) -> str:
    """Markdown: distances at guidance 1, 4.5 and each arm's best; what samples at 1 and 4.5 are."""
    head = ["arm", "compute", "distance at 1", "at 4.5", "best w", "std at 1 / 4.5"]
    head += ["radius at 4.5", "balance at 4.5"]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for name in result["arms"]:
        arm = ARMS[name]
        units = STEP_UNITS if arm.equal_compute else arm.units
        cells = [arm.label, f"{units / 3:.1f}"]
        cells += [mean_error(column(result, name, "distance", w)) for w in (1.0, 4.5)]
        cells += [f"{best_guidance(result, name):g}"]
        at = {key: [column(result, name, key, w).mean() for w in (1.0, 4.5)] for key in MEASURES}
        cells.append(f"{at['std'][0]:.2f} / {at['std'][1]:.2f}")
        cells += [f"{at[key][1]:.2f}" for key in ("radius", "balance")]
        lines.append("| " + " | ".join(cells) + " |")
    true = np.mean([[row[key] for key in MEASURES] for row in result["floor"]], axis=0)
    cells = ["the true law, other samples", "", f"{true[0]:.3f}", "", "", f"{true[1]:.2f}"]
    lines.append("| " + " | ".join(cells + [f"{true[2]:.2f}", f"{true[3]:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


PAIRS = (
    ("soar", "sft"), ("no_rollout", "sft"), ("soar", "no_rollout"), ("sft_steps", "soar"),
    ("n1", "soar"), ("n1_steps", "soar"),
)  # fmt: skip


def pairs(result: dict) -> str:
    """Markdown: differences of two arms' distances, paired over seeds."""
    lines = ["| distance of | minus that of | at 1 | at 4.5 | each at its best |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for names in PAIRS:
        if set(names) <= set(result["arms"]):
            cells = [ARMS[name].label for name in names]
            for w in (1.0, 4.5, "best"):
                first, second = (column(result, name, "distance", w) for name in names)
                cells.append(mean_error(first - second))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(result: dict, path: Path) -> None:
    """Distance and std over guidance, means of the seeds and their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("sft", "sft_steps", "soar", "no_rollout", "w1", "k20")
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for key, ax in zip(("distance", "std"), axes):
        for name in (x for x in shown if x in result["arms"]):
            values = np.stack([column(result, name, key, w) for w in GUIDANCES])
            error = values.std(1, ddof=1) / math.sqrt(values.shape[1])
            ax.errorbar(GUIDANCES, values.mean(1), error, marker="o", ms=3, label=ARMS[name].label)
        ax.set(xscale="log", xlabel="guidance")
        ax.set_xticks(GUIDANCES, [f"{w:g}" for w in GUIDANCES])
        ax.minorticks_off()
    axes[0].set_ylabel("distance to the true law")
    axes[1].set_ylabel("std within modes, data = 1")
    axes[0].legend(frameon=False, fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(args: Args) -> None:
    if args.show is not None:
        result = json.loads(args.show.read_text())
        print(table(result), pairs(result), sep="\n", end="")
        return
    result = run(args)
    print(table(result), pairs(result), sep="\n", end="")
    if len(args.seeds) > 1:
        figure(result, args.output_dir / "toy.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
