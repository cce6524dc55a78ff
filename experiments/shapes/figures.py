"""The table and the figures of experiments.shapes.sft_vs_soar, from its results.json.

    python -m experiments.shapes.figures output/sft_vs_soar/quick --output_dir experiments/shapes/results
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"base": "#777777", "sft": "#d95f02", "soar": "#1b6ca8"}
NAMES = {"base": "base", "sft": "SFT", "soar": "SOAR"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100}


def score(result: dict, path: Path) -> None:
    """Score and sharpness over steps, the means over seeds that have every point: one column for the arms of equal
    steps, one for the longer ones where they are there. Bands are +- one standard error over images."""
    setting, curves, real = result["setting"], result["curves"], result["training_sharpness"]
    longer = [name for name in curves if name.endswith("_steps")]
    columns = [names for names in ([name for name in curves if name not in longer], longer) if names]
    fig, axes = plt.subplots(2, max(len(columns), 1), figsize=(8, 5.2), squeeze=False, sharex="col", sharey="row")
    for column, names in zip(axes.T, columns):
        others = iter(("#2a9d5c", "#8a4fbf", "#c2185b"))
        for name in names:
            seeds, color = list(curves[name].values()), COLORS.get(name.removesuffix("_steps")) or next(others)
            steps = sorted(int(step) for step in seeds[0])
            mean = lambda key: np.mean([[x[str(step)][key] for step in steps] for x in seeds], axis=0)  # noqa: E731
            y = mean("score")
            error = np.sqrt(y * (1 - y) / (setting["curve_prompts"] * len(seeds)))
            label = f"{result['arms'][name]['label']}; {len(seeds)} seed{'s' * (len(seeds) != 1)}"
            column[0].plot(steps, 100 * y, "o-", color=color, label=label)
            column[0].fill_between(steps, 100 * (y - error), 100 * (y + error), color=color, alpha=0.15, lw=0)
            for key, style in (("sharpness", "o-"), ("sharpness_unguided", "o--")):
                column[1].plot(steps, mean(key) / real, style, color=color, ms=4)
        column[0].legend(frameon=False, loc="lower right", fontsize=8)
        column[1].set_xlabel("step (dashed: guidance 1)")
    axes[0, 0].set_ylabel("score, %")
    axes[1, 0].set_ylabel("sharpness, training images = 1")
    save(fig, path)


def drift(result: dict, path: Path) -> None:
    """The excess of the endpoint's error on the model's own trajectory over the ideal path's, by sigma and start."""
    curves = result["drift"]
    starts = sorted(int(key.removeprefix("from_")) for key in next(iter(curves.values())) if key.startswith("from_"))
    fig, axes = plt.subplots(1, 1 + len(starts[1:]), figsize=(8, 3.2))
    for name, x in curves.items():
        axes[0].plot(x["sigma"], x["ideal"], color=COLORS[name], label=NAMES[name])
    axes[0].set(title="on the ideal path", ylabel="error of the clean endpoint")
    for ax, start in zip(axes[1:], starts[1:]):
        for name, x in curves.items():
            ax.plot(x["sigma"][start:], np.array(x[f"from_{start}"]) - x["ideal"][start:], color=COLORS[name])
        ax.set(title=f"excess, from {x['sigma'][start]:.2f}")
    for ax in axes:
        ax.set_xlabel("sigma")
        ax.invert_xaxis()
    axes[0].legend(frameon=False)
    save(fig, path)


def sheet(folder: Path, names: list[str], path: Path, columns: int = 10) -> None:
    """Rows of images of base, SFT and SOAR from the same noise, out of the diversity folders."""
    files = [path.relative_to(folder / names[0]) for path in (folder / names[0]).glob("*/samples/*.png")]
    chosen = sorted(files, key=lambda path: (path.name, path.parts))[:columns]  # the first image of every prompt first
    fig, axes = plt.subplots(len(names), columns, figsize=(8, 8 * (len(names) + 0.6) / columns), squeeze=False)
    for row, name in zip(axes, names):
        for ax, path_in_folder in zip(row, chosen):
            ax.imshow(Image.open(folder / name / path_in_folder))
            ax.set(xticks=[], yticks=[])
            if name == names[0]:
                text = json.loads((folder / name / path_in_folder.parts[0] / "metadata.jsonl").read_text())["prompt"]
                words = text.removeprefix("a photo of ").split()
                half = (len(words) + 1) // 2
                ax.set_title(" ".join(words[:half]) + "\n" + " ".join(words[half:]), fontsize=6)
        row[0].set_ylabel(NAMES[name], fontsize=9)
    fig.subplots_adjust(left=0.03, right=0.99, top=0.85, bottom=0.01, wspace=0.04, hspace=0.04)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def table(result: dict) -> str:
    """The runs as a markdown table: scores in %, differences in points, sharpness over that of the training images."""
    head = "arm | compute | seeds | score (std) | minus SFT (95 %) | minus SFT of 22/3 steps | sharpness, w 4.5 / 1"
    lines, real = [f"| {head} |", "| --- " + "| ---: " * 6 + "|"], result["training_sharpness"]
    for row in result["arms"].values():
        cells = [row["label"], f"{row['compute']:.1f}", f"{len(row['seeds'])}", f"{100 * row['score']:.1f}"]
        cells[-1] += "" if row["std"] is None else f" ({100 * row['std']:.1f})"
        for test in (row.get("minus_sft"), row.get("minus_sft_steps")):
            percent = [100 * test[key] for key in ("difference", "low", "high")] if test else []
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*percent) if test else "")
        cells.append(f"{row['sharpness'] / real:.2f} / {row['sharpness_unguided'] / real:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save(fig, path: Path) -> None:
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_all(result: dict, folder: Path, output_dir: Path) -> None:
    """score.png, drift.png and sheet.png, in output_dir; folder holds the runs of result."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        if result["curves"]:
            score(result, output_dir / "score.png")
        if result["drift"]:
            drift(result, output_dir / "drift.png")
            sheet(folder / "diversity", list(result["drift"]), output_dir / "sheet.png")


def main(folder: tyro.conf.Positional[Path], output_dir: Path) -> None:
    """Draw the figures of a finished setting, the folder that holds results.json, into output_dir."""
    draw_all(json.loads((folder / "results.json").read_text()), folder, output_dir)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
