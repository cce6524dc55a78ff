"""What the runs of experiments.shapes.levels say together: changes with intervals, theory, table, figures.

A change is of a mean error, in %. Its 95 % interval is over pairs and their noise, of the mean over
seeds; a star says that the interval leaves out 0 and that all seeds have this sign. A group is a
size of the training set and its latents' noise, as "2000-vae".
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from experiments.shapes.levels import (
    ARMS,
    CPU,
    FIRST,
    GUIDANCES,
    LAWS,
    LEVELS,
    QUARTER_PAIRS,
    STARTS,
    Args,
    Pairs,
    plan,
    settings_of,
    shared,
)
from experiments.shapes.sft_vs_soar import World, finished, load_base
from experiments.theory.optimum import exact_flow, line_of, optimum
from sample import save_whole
from soar import SoarConfig, interpolate
from train import make_velocity

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"sft": "#d95f02", "sft_7_3": "#e6ab02", "soar_n1_l6": "#1b6ca8", "n1_still": "#2a9d5c"}
COMPARED = (
    ("soar_n1_l6", "n1_still"),
    ("soar_n1_l6", "sft"),
    ("soar", "soar_k1e6"),
    ("soar", "sft"),
)
TITLES = {"drawn": "drawn from the VAE's posterior", "mean": "the posterior's means"}
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the latents' noise, over which the theory is averaged


def relative(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """The change of a mean error in %, from errors (seeds, pairs): its 95 % interval over pairs and
    whether all seeds agree in its sign with an interval that leaves out 0."""
    a, b = ours.mean(0), theirs.mean(0)
    change = 100 * (a.mean() / b.mean() - 1)
    apart = a - b * a.mean() / b.mean()
    half = 196 * apart.std(ddof=1) / len(a) ** 0.5 / b.mean()
    seeds = 100 * (ours.mean(1) / theirs.mean(1) - 1)
    agree = (np.sign(seeds) == np.sign(change)).all()
    return {
        "change": round(float(change), 3),
        "half": round(float(half), 3),
        "clear": bool(abs(change) > half and agree),
        "by_seed": seeds.round(3).tolist(),
    }


def labels_of(law: str) -> list[str]:
    return [f"{law} {level:g}" for level in LEVELS]


def errors_of(run: dict) -> dict[str, list[float]]:
    """{label: errors by pair} of all that is compared."""
    made = {}
    for law in LAWS:
        made |= dict(zip(labels_of(law), run["levels"][law]))
        made |= {f"{law}, {label}": errors[law] for label, errors in run["trajectory"].items()}
    return made


def by_quarter(run: dict) -> dict[str, list[float]]:
    """{law: held-out error over all levels at the quarters}, on the same pairs."""
    steps = sorted(run["quarters"], key=int)
    made = {}
    for law in LAWS:
        points = [run["quarters"][step][law] for step in steps]
        points.append([errors[:QUARTER_PAIRS] for errors in run["levels"][law]])
        made[law] = [round(float(np.mean(point)), 5) for point in points]
    return made


def summary(found: dict[int, dict], sft: dict[int, dict], base: dict) -> dict:
    """What an arm's runs, by seed, say."""
    made = {"seeds": sorted(found), "errors": {}, "minus_base": {}, "minus_sft": {}}
    errors = {seed: errors_of(x) for seed, x in found.items()}
    of_sft = {seed: errors_of(x) for seed, x in sft.items() if seed in found}
    for label, start in errors_of(base).items():
        ours = np.array([x[label] for x in errors.values()])
        made["errors"][label] = round(float(ours.mean()), 5)
        made["minus_base"][label] = relative(ours, np.array([start] * len(ours)))
        if of_sft and found is not sft:
            ours = np.array([errors[seed][label] for seed in of_sft])
            theirs = np.array([x[label] for x in of_sft.values()])
            made["minus_sft"][label] = relative(ours, theirs)
    quarters = [by_quarter(x) for x in found.values()]
    made["quarters"] = {law: np.mean([x[law] for x in quarters], 0).tolist() for law in LAWS}
    own = np.mean([x["own"]["mean"] for x in found.values()], (0, 2))
    made["own"] = own.round(5).tolist()
    hearts = [x["by_heart"] for x in found.values() if "by_heart" in x]
    made["by_heart"] = float(np.mean(hearts)) if hearts else None
    return made


def collect(folder: Path) -> dict:
    """{group: {arm: summary}} of the finished runs, and how many there are to be."""
    found, whole, commits, done = {}, plan(Args()), set(), 0
    for job in whole:
        if result := finished(folder / f"{job.name}.json", settings_of(job)):
            found.setdefault(job.group, {}).setdefault(job.arm, {})[job.seed] = result
            commits.add(result["commit"])
            done += 1
    if not found.get(FIRST, {}).get("base"):
        raise ValueError(f"{folder}: no base run is finished; leave out --collect")
    groups = {}
    for group, arms in found.items():
        base = arms.get("base", found[FIRST]["base"])[0]
        arms["base"] = dict.fromkeys(arms.get("sft", {}), base)
        sft = arms.get("sft", {})
        groups[group] = {arm: summary(arms[arm], sft, base) for arm in arms if arms[arm]}
    return {"commits": sorted(commits), "runs": [done, len(whole)], "groups": groups}


# --- Is it the contraction? ---


def solved(noise: float, guidance: float, **settings):
    """The exact flow and SOAR's optimum of optimum.py's world, whose c is the mean latent and whose
    data_std is the latents' noise. Unguided there is no empty prompt: at low levels a state tells
    its mean with a prompt or without."""
    guided = guidance != 1
    config = SoarConfig(guidance_scale=guidance, **settings)
    return exact_flow(noise, guided), optimum(config, noise, guided)


def solved_errors(velocity, noise: float) -> dict[str, Tensor]:
    """{law: squared error by level} of a solved velocity a z + b c; b is 0 where there is no c."""
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    a, b = velocity(sigma)
    of_c = a * (1 - sigma) + b + 1 if velocity.conditional else torch.zeros_like(a)
    to_mean = of_c**2 + (a * sigma - 1) ** 2
    return {"drawn": to_mean + (a * (1 - sigma) * noise + noise) ** 2, "mean": to_mean}


def predicted(noises: list[float], guidance: float, **settings) -> dict[str, list[float]]:
    """The change from the exact flow to the optimum by level: of the squared error on each law, the
    mean over the latents' noises, and of the slope."""
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    changes, slopes = {law: [] for law in LAWS}, []
    for noise in noises:
        exact, best = solved(noise, guidance, **settings)
        before, after = solved_errors(exact, noise), solved_errors(best, noise)
        slopes.append(best(sigma)[0] - exact(sigma)[0])
        for law in LAWS:
            changes[law].append(after[law] - before[law])
    made = {law: torch.stack(x).mean(0).tolist() for law, x in changes.items()}
    return made | {"slope": pooled(slopes, noises)}


def pooled(slopes: list[Tensor], noises: list[float]) -> list[float]:
    """Slopes by noise as one regression over all elements finds them: each weighs as its square."""
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    weights = torch.stack([((1 - sigma) * noise) ** 2 + sigma**2 for noise in noises])
    return ((torch.stack(slopes) * weights).sum(0) / weights.sum(0)).tolist()


@torch.no_grad()
def slopes(velocity, pairs: Pairs) -> list[float]:
    """By level: the slope of the velocity along what a state has beside its mean latent, noise of
    the latent and z1. The exact flow's is a(sigma) of optimum.py; a greater one contracts more."""
    made = []
    for level in LEVELS:
        sigma = torch.full((len(pairs.z1),), level)
        z = interpolate(pairs.z0["drawn"], pairs.z1, sigma)
        apart = z - (1 - level) * pairs.z0["mean"]
        v = velocity(z, sigma, pairs.cond) + pairs.z0["mean"]
        made.append(float((v * apart).sum() / apart.square().sum()))
    return made


def measured_slopes(folder: Path) -> dict[str, list[float]]:
    """{arm: mean slopes by level} of the runs on all pairs with their own noise."""
    world, pairs = shared(folder)
    found = {"base": [slopes_of(world, None, pairs)]}
    for job in plan(Args()):
        weights = folder / f"{job.name}.safetensors"
        if job.group == FIRST and weights.is_file():
            found.setdefault(job.arm, []).append(slopes_of(world, weights, pairs))
    return {arm: np.mean(x, 0).tolist() for arm, x in found.items()}


def slopes_of(world: World, weights: Path | None, pairs: Pairs) -> list[float]:
    model = load_base(world, weights)
    return slopes(make_velocity(model, CPU, False), pairs.first(QUARTER_PAIRS))


def latent_noises(world: World) -> list[float]:
    """QUANTILES of the posteriors' standard deviations, as the transformer sees them."""
    found = np.quantile(world.std.numpy(), QUANTILES) * world.pipe.vae.config.scaling_factor
    return found.tolist()


def theory(folder: Path, arms: dict) -> dict[str, dict[str, list[float]]]:
    """{velocity: {what: by level}}: predicted changes, measured ones, and slopes themselves."""
    noises = latent_noises(shared(folder)[0])
    made = {
        "the optimum minus the exact flow, unguided": predicted(noises, 1.0),
        "the same, w = 4.5": predicted(noises, 4.5),
    }
    found = measured_slopes(folder)
    for ours, theirs in COMPARED:
        if ours in arms and theirs in arms:
            a, b = (arms[arm]["errors"] for arm in (ours, theirs))
            change = {law: [a[x] - b[x] for x in labels_of(law)] for law in LAWS}
            change["slope"] = np.subtract(found[ours], found[theirs]).tolist()
            made[f"{label_of(ours)}, minus {label_of(theirs)}"] = change
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    exact = pooled([exact_flow(noise)(sigma)[0] for noise in noises], noises)
    made["the exact flow"] = {"slope itself": exact}
    return made | {label_of(arm): {"slope itself": x} for arm, x in found.items()}


# --- Table and figure ---


def table_of(head: list[str], rows: list[list[str]]) -> str:
    lines = [line_of(head), "| --- " + "| ---: " * (len(head) - 1) + "|"]
    return "\n".join(lines + [line_of(row) for row in rows])


def label_of(arm: str) -> str:
    return ARMS[arm].label if arm in ARMS else arm


def changes(arms: dict, labels: list[str]) -> list[list[str]]:
    """Rows of a group: SFT's errors, then every arm's change against them in %."""
    rows = []
    for arm, x in arms.items():
        cells = [f"{x['errors'][label]:.4f}" for label in labels]
        if x["minus_sft"]:
            cells = [cell_of(x["minus_sft"][label]) for label in labels]
        compute = ARMS[arm].compute() if arm in ARMS else 0
        rows.append([label_of(arm), f"{compute:.1f}", str(len(x["seeds"])), *cells])
    return rows


def cell_of(x: dict) -> str:
    return f"{x['change']:+.1f} ± {x['half']:.1f}" + "*" * x["clear"]


def over_steps(arms: dict) -> str:
    rows = []
    for arm, x in arms.items():
        cells = [" / ".join(f"{y:.4f}" for y in x["quarters"][law]) for law in LAWS]
        best = int(np.argmin(x["quarters"]["drawn"])) + 1
        heart = "" if x["by_heart"] is None else f"{x['by_heart']:.0%}"
        rows.append([label_of(arm), *cells, str(best), f"{np.mean(x['own']):.4f}", heart])
    return table_of(["arm", *LAWS, "best (drawn)", "own pairs' means", "by heart"], rows)


def tables(result: dict) -> str:
    """Markdown, a chapter for each group."""
    done, total = result["runs"]
    parts = [f"{done} of {total} runs are finished; commits: {', '.join(result['commits'])}."]
    head = ["arm", "compute", "seeds"]
    levels = [f"{level:g}" for level in LEVELS]
    for group, arms in result["groups"].items():
        parts.append(f"## {group}")
        for law in LAWS:
            parts.append(f"Velocity, held-out latents: {law}. SFT's error, change against it in %")
            parts.append(table_of([*head, *levels], changes(arms, labels_of(law))))
        for guidance in GUIDANCES:
            starts = [f"{law}, {guidance:g} from {x:g}" for law in LAWS for x in STARTS]
            parts.append("Where the sampler ends, from drawn states")
            parts.append(table_of([*head, *starts], changes(arms, starts)))
        parts.append(f"All levels, at the quarters of the steps, {QUARTER_PAIRS} pairs")
        parts.append(over_steps(arms))
    rows = [
        [name, what, *(f"{y:+.4f}" for y in values)]
        for name, found in result["theory"].items()
        for what, values in found.items()
    ]
    parts.append("## Is it the contraction?")
    parts.append("Changes of the squared errors and of the velocity's slope along the noise")
    parts.append(table_of(["velocity", "of", *levels], rows))
    return "\n\n".join(parts) + "\n"


def figure(arms: dict, path: Path) -> None:
    """Error relative to the base over sigma, on drawn latents and on means; bands are intervals."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for ax, law in zip(axes, LAWS):
        ax.axhline(0, color="#bbbbbb", lw=1)
        for arm, color in COLORS.items():
            if arm in arms:
                points = [arms[arm]["minus_base"][label] for label in labels_of(law)]
                y = np.array([x["change"] for x in points])
                half = np.array([x["half"] for x in points])
                ax.plot(LEVELS, y, "o-", ms=3, color=color, label=label_of(arm))
                ax.fill_between(LEVELS, y - half, y + half, color=color, alpha=0.15, lw=0)
        ax.set_xlabel("sigma")
        ax.set_title(f"held-out latents: {TITLES[law]}", fontsize=9)
    axes[0].set_ylabel("error against the base's, %")
    axes[1].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def save(folder: Path) -> None:
    """levels.json, levels.md and the figures, of what is finished."""
    result = collect(folder)
    result["theory"] = theory(folder, result["groups"].get(FIRST, {}))
    save_whole(json.dumps(result) + "\n", folder / "levels.json")
    save_whole(tables(result), folder / "levels.md")
    print(tables(result))
    for group, arms in result["groups"].items():
        figure(arms, folder / f"levels-{group}.png")
