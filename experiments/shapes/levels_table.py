"""What the runs of experiments.shapes.levels say together: changes with intervals, tables, figure.

A change is of a mean error, in %. Its 95 % interval is over pairs and their noise, of the mean over
seeds; a star says that the interval leaves out 0 and that all seeds have this sign. A group is a
size of the training set and its latents' noise, as "2000-vae".
"""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch

from experiments.environment import markdown
from experiments.shapes import levels
from experiments.shapes.levels import ARMS, FIRST, GUIDANCES, LAWS, LEVELS, SEEDS, STARTS, Pairs
from experiments.shapes.sft_vs_soar import (
    CPU,
    finished,
    load_base,
    paired_over_seeds,
    percent,
    points,
)
from sample import save_whole
from soar import interpolate
from train import make_velocity

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"sft": "#d95f02", "sft_7_3": "#e6ab02", "soar_n1_l6": "#1b6ca8", "n1_still": "#2a9d5c"}
COMPARED = [("soar_n1_l6", "n1_still"), ("soar_n1_l6", "sft"), ("soar", "soar_k1e6")]
ENDS = {f"{law}, guidance {w:g}": (law, w) for w in GUIDANCES for law in LAWS}


def relative(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[float, float, bool]]:
    """By level a change, half its interval and its star, from errors (seeds, levels, pairs)."""
    a, b = ours.mean(0), theirs.mean(0)
    start = b.mean(1)
    ratio = a.mean(1) / start
    apart = a - b * ratio[:, None]
    change = 100 * (ratio - 1)
    half = 196 * apart.std(1, ddof=1) / len(a[0]) ** 0.5 / start
    by_seed = ours.mean(2) / theirs.mean(2) - 1
    agree = (np.sign(by_seed) == np.sign(change)).all(0)
    clear = agree & (abs(change) > half)
    return list(zip(change.round(2).tolist(), half.round(2).tolist(), clear.tolist()))


def errors_of(runs: list[dict]) -> dict[str, np.ndarray]:
    """(seeds, levels, pairs): by LAWS the velocity's, by ENDS the sampler's from each start."""
    made = {law: np.array([run["levels"][law] for run in runs]) for law in LAWS}
    for name, (law, w) in ENDS.items():
        starts = [f"{w:g} from {start:g}" for start in STARTS]
        ends = [[run["trajectory"][start][law] for start in starts] for run in runs]
        made[name] = np.array(ends)
    return made


def compared(ours: list[dict], theirs: list[dict]) -> dict[str, list[tuple]]:
    """Changes from runs of the same seeds."""
    a, b = errors_of(ours), errors_of(theirs)
    return {what: relative(a[what], b[what]) for what in a}


def summary(found: dict[int, dict], sft: dict[int, dict], base: dict) -> dict:
    """What an arm's runs, by seed, say."""
    runs = list(found.values())
    from_base = compared(runs, [base] * len(runs))
    made = {"seeds": sorted(found), "minus_base": {law: from_base[law] for law in LAWS}}
    errors = errors_of(runs)
    made["errors"] = {what: x.mean((0, 2)).round(5).tolist() for what, x in errors.items()}
    if found is not sft:
        made["minus_sft"] = compared(runs, list(sft.values()))
    return made


def collect(folder: Path) -> dict:
    """{"commits": of the runs, "groups": {group: {arm: summary}}}."""
    found = defaultdict(lambda: defaultdict(dict))  # runs by group, arm and seed
    scores = defaultdict(lambda: defaultdict(dict))
    commits, groups = set(), {}
    for job in levels.plan():
        result = finished(folder / f"{job.name}.json", levels.settings_of(job))
        found[job.group][job.arm][job.seed] = result
        commits.add(result["commit"])
    for job in levels.scored_jobs():
        result = finished(folder / f"{job.name}-score.json", levels.settings_of(job))
        scores[job.group][job.arm][job.seed] = np.array(result["correct"], float)
    for group, arms in found.items():
        base = arms.get("base", found[FIRST]["base"])[0]
        arms["base"] = dict.fromkeys(SEEDS, base)
        groups[group] = {arm: summary(x, arms["sft"], base) for arm, x in arms.items()}
        for arm, row in scored(scores[group]).items():
            groups[group][arm]["score"] = row
    return {"commits": sorted(commits), "groups": groups}


def scored(scores: dict[str, dict[int, np.ndarray]]) -> dict[str, dict]:
    """From a group's scores by arm, seed and prompt: means, and SFT's subtracted."""
    made = {}
    for arm, by_seed in scores.items():
        made[arm] = {"by_seed": [float(x.mean()) for x in by_seed.values()]}
        if arm != "sft":
            made[arm]["minus_sft"] = paired_over_seeds(scores, arm, "sft")
    return made


# --- How steeply the velocity leads to the mean ---


@torch.no_grad()
def slopes(velocity, pairs: Pairs) -> list[float]:
    """By level: the slope of the velocity along what a state has beside its mean latent, noise of
    the latent and z1. The exact flow's is a(sigma) of experiments/theory/optimum.py; a greater one
    contracts more."""
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
    pairs = levels.shared(folder)[1].first(levels.SLOPE_PAIRS)
    found = defaultdict(list)
    for job in levels.plan():
        if job.group == FIRST:
            weights = None if job.arm == "base" else folder / f"{job.name}.safetensors"
            velocity = make_velocity(load_base(weights), CPU, False)
            found[job.arm].append(slopes(velocity, pairs))
    return {arm: np.mean(x, 0).round(5).tolist() for arm, x in found.items()}


def differences(arms: dict, found: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """{arms compared: {what: by level}}, of the squared errors and of the slopes."""
    made = {}
    for ours, theirs in COMPARED:
        a, b = (arms[arm]["errors"] | {"slope": found[arm]} for arm in (ours, theirs))
        name = f"{label_of(ours)}, minus {label_of(theirs)}"
        rows = {what: np.subtract(a[what], b[what]) for what in (*LAWS, "slope")}
        made[name] = {what: x.round(5).tolist() for what, x in rows.items()}
    return made


# --- Tables and figure ---


def label_of(arm: str) -> str:
    return ARMS[arm].label if arm in ARMS else arm


def changes(arms: dict, what: str) -> str:
    """SFT's errors, then each arm's change against them in %."""
    lines = [["arm", "compute", "seeds", *map(str, LEVELS if what in LAWS else STARTS)]]
    for arm, x in arms.items():
        if "minus_sft" in x:
            cells = []
            for change, half, clear in x["minus_sft"][what]:
                star = "*" if clear else ""
                cells.append(f"{change:+.1f} ± {half:.1f}{star}")
        else:
            cells = [f"{error:.4f}" for error in x["errors"][what]]
        compute = ARMS[arm].compute() if arm in ARMS else 0
        lines.append([label_of(arm), f"{compute:.1f}", str(len(x["seeds"])), *cells])
    return markdown(lines)


def scores_of(arms: dict) -> str:
    lines = [["arm", "seeds", "score, % (std)", "minus SFT (95 %)"]]
    for arm, x in arms.items():
        if row := x.get("score"):
            seeds = row["by_seed"]
            change = points(row.get("minus_sft"))
            lines.append([label_of(arm), str(len(seeds)), percent(seeds), change])
    return markdown(lines) if len(lines) > 1 else ""


def tables(result: dict) -> str:
    """Markdown, a chapter for each group."""
    commits = ", ".join(result["commits"])
    parts = [f"The runs' commits: {commits}.\n"]
    parts.append("SFT's error, each arm's change against it in %: the velocity's, the sampler's.\n")
    for group, arms in result["groups"].items():
        parts.append(f"## {group}\n")
        for what in (*LAWS, *ENDS):
            parts.append(f"{what}\n\n{changes(arms, what)}")
        parts.append(scores_of(arms))
    parts.append("## Errors and slopes\n\nDifferences of the squared errors and of the slopes\n")
    lines = [["velocity", "of", *map(str, LEVELS)]]
    slopes_of = {label_of(arm): {"slope itself": x} for arm, x in result["slopes"].items()}
    for name, found in (result["differences"] | slopes_of).items():
        for what, values in found.items():
            lines.append([name, what, *map("{:+.4f}".format, values)])
    return "\n".join([*parts, markdown(lines)])


def figure(arms: dict, path: Path) -> None:
    """Error relative to the base over sigma, on drawn latents and on means; bands are intervals."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for ax, law in zip(axes, LAWS):
        ax.axhline(0, color="#bbbbbb", lw=1)
        for arm, color in COLORS.items():
            y, half, _ = np.transpose(arms[arm]["minus_base"][law])
            ax.plot(LEVELS, y, "o-", ms=3, color=color, label=label_of(arm))
            ax.fill_between(LEVELS, y - half, y + half, color=color, alpha=0.15, lw=0)
        ax.set_xlabel("sigma")
        ax.set_title(f"held-out latents: {law}", fontsize=9)
    axes[0].set_ylabel("error against the base's, %")
    axes[1].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def save(folder: Path) -> None:
    """levels.json, levels.md and levels.png, of all runs."""
    result = collect(folder)
    result["slopes"] = measured_slopes(folder)
    result["differences"] = differences(result["groups"][FIRST], result["slopes"])
    for arms in result["groups"].values():
        for x in arms.values():
            if "minus_sft" in x:
                del x["errors"]  # the table has the change
    save_whole(json.dumps(result) + "\n", folder / "levels.json")
    save_whole(tables(result), folder / "levels.md")
    print(tables(result))
    figure(result["groups"][FIRST], folder / "levels.png")
