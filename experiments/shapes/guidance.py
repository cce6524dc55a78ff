"""Finished runs of experiments.shapes.sft_vs_soar over the guidance that they are sampled with.

    python -m experiments.shapes.guidance output/sft_vs_soar/control

A method may only shift the guidance at which a model is best, so each arm is also shown at its own
best. By arm and guidance, means over seeds:

    score       GenEval's, as sft_vs_soar has it, on the first image of some prompts
    saturation  mean over pixels of max(R, G, B) - min(R, G, B), over that of the training images
    sharpness   variance of the Laplacian, over that of the training images

At guidance 1 and 4.5, of seed 0, also the spread: root mean variance of the VAE's latents over the
images of one prompt. What is finished is kept in the folder, and the same command goes on from
there; guidance.json and guidance.png are written.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from experiments.evaluate import diversity
from experiments.shapes.detect import score_image
from experiments.shapes.draw import DATA, PAIRS, read_pairs
from experiments.shapes.sft_vs_soar import (
    ARMS,
    World,
    chosen,
    commit,
    load_base,
    paired_test,
    sample,
    shared_world,
    sharpness,
)
from sample import save_whole

SPREAD_GUIDANCES = (1.0, 4.5)
MEASURES = ("score", "saturation", "sharpness")


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """Of a finished setting of experiments.shapes.sft_vs_soar."""
    arms: tuple[str, ...] = ("base", "sft", "soar", "soar_k1e6")
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0)
    seeds: int = 3
    prompts: int = 120
    """One image of each; a multiple of six."""
    spread_prompts: int = 12
    spread_images: int = 16
    num_processes: int = 2

    def __post_init__(self):
        for arm in self.arms:
            for seed in range(self.seeds):
                if arm != "base" and not weights_of(self.folder, arm, seed).is_file():
                    missing = weights_of(self.folder, arm, seed)
                    raise ValueError(f"--arms {arm}: {missing} is not there")
        least = {"seeds": 1, "prompts": 6, "spread_prompts": 1, "spread_images": 2}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least {number}")


def weights_of(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-{seed}.safetensors"


def saturation(image: Image.Image) -> float:
    """Mean over pixels of max(R, G, B) - min(R, G, B), values in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), np.float64) / 255
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def spread(images: list[list[Image.Image]]) -> list[float]:
    """For each prompt's images, the root mean variance of their VAE latents' posterior means."""
    extract = diversity.Extractor(str(DATA / "model/vae"))
    return [float(np.sqrt(extract(group).var(axis=0, ddof=1).mean())) for group in images]


def settings_of(args: Args) -> dict:
    kept = asdict(args)
    for name in ("folder", "arms", "seeds", "num_processes"):
        kept.pop(name)
    return json.loads(json.dumps(kept))


def run(args: Args, arm: str, seed: int) -> dict:
    """The measures of one run at every guidance: {"guidance": {w: ...}, "spread": {w: [...]}}."""
    torch.set_num_threads(1)
    path = args.folder / f"guidance-{arm}-{seed}.json"
    if path.is_file():
        result = json.loads(path.read_text())
        if result.pop("settings") == settings_of(args):
            return result
    world = shared_world(args.folder)
    transformer = load_base(world, None if arm == "base" else weights_of(args.folder, arm, seed))
    numbers = chosen(world, args.prompts)
    result = {"guidance": {}, "spread": {}}
    for w in args.guidances:
        images = [group[0] for group in sample(world, transformer, numbers, 1, seed, w)]
        correct = [score_image(x, world.prompts[i])[0] for i, x in zip(numbers, images)]
        result["guidance"][str(w)] = {
            "score": [int(x) for x in correct],
            "saturation": float(np.mean([saturation(x) for x in images])),
            "sharpness": float(np.mean([sharpness(x) for x in images])),
        }
    if seed == 0:
        few = chosen(world, args.spread_prompts)
        for w in SPREAD_GUIDANCES:
            images = sample(world, transformer, few, args.spread_images, seed, w)
            result["spread"][str(w)] = spread(images)
    save_whole(json.dumps(result | {"settings": settings_of(args)}) + "\n", path)
    return result


def training_images(world: World, most: int = 600) -> dict[str, float]:
    images = read_pairs(world.data / PAIRS.name)[:most]["image"]
    return {
        "saturation": float(np.mean([saturation(x) for x in images])),
        "sharpness": float(np.mean([sharpness(x) for x in images])),
    }


def collect(args: Args, runs: dict[str, list[dict]]) -> dict:
    """{"settings", "commit", "arms": {arm: {"guidance": {w: score, saturation, sharpness, by_seed},
    "best": w, "spread": {w: mean, over_sft: ratio and its standard error over prompts}}}, and the
    differences of scores at each one's best}."""
    real = training_images(shared_world(args.folder))
    arms, scores = {}, {}
    for arm, found in runs.items():
        rows = {}
        for w in map(str, args.guidances):
            parts = [x["guidance"][w] for x in found]
            scores[arm, w] = np.mean([x["score"] for x in parts], axis=0)
            row = {"score": float(scores[arm, w].mean())}
            row["by_seed"] = [float(np.mean(x["score"])) for x in parts]
            for name in ("saturation", "sharpness"):
                row[name] = float(np.mean([x[name] for x in parts])) / real[name]
            rows[w] = row
        best = max(rows, key=lambda w: rows[w]["score"])
        arms[arm] = {"guidance": rows, "best": best, "spread": {}}
        for w, values in found[0]["spread"].items():
            arms[arm]["spread"][w] = {"mean": float(np.mean(values))}
            if "sft" in runs:
                ratios = np.divide(values, runs["sft"][0]["spread"][w])
                error = float(ratios.std(ddof=1) / len(ratios) ** 0.5)
                arms[arm]["spread"][w] |= {"over_sft": float(ratios.mean()), "error": error}
    result = {"settings": settings_of(args) | {"seeds": args.seeds}, "commit": commit()}
    result |= {"arms": arms, "at_best": {}}
    for first, second in (("soar", "sft"), ("soar_k1e6", "sft"), ("soar", "soar_k1e6")):
        if {first, second} <= set(arms):
            both = [scores[arm, arms[arm]["best"]] for arm in (first, second)]
            result["at_best"][f"{first} - {second}"] = paired_test(*both)
    return result


def label(arm: str) -> str:
    return ARMS[arm].label if arm in ARMS else arm


def table(result: dict) -> str:
    """Markdown: score / saturation / sharpness by arm and guidance; then the spread."""
    guidances = result["settings"]["guidances"]
    lines = ["| arm | " + " | ".join(f"{w:g}" for w in guidances) + " | best |"]
    lines.append("| --- " + "| ---: " * (len(guidances) + 1) + "|")
    for arm, found in result["arms"].items():
        cells = [label(arm)]
        for w in guidances:
            row = found["guidance"][str(w)]
            score = f"{100 * row['score']:.1f}"
            cells.append(f"{score} / {row['saturation']:.2f} / {row['sharpness']:.2f}")
        lines.append("| " + " | ".join([*cells, f"{float(found['best']):g}"]) + " |")
    lines += ["", "| arm | spread over SFT's, guidance 1 | guidance 4.5 |", "| --- | ---: | ---: |"]
    for arm, found in result["arms"].items():
        spreads = [x for x in found["spread"].values() if "over_sft" in x]
        cells = [label(arm)] + [f"{x['over_sft']:.3f} ± {x['error']:.3f}" for x in spreads]
        lines.append("| " + " | ".join(cells) + " |")
    for names, test in result["at_best"].items():
        percent = [100 * test[key] for key in ("difference", "low", "high")]
        lines.append("\n{}, each at its best: {:+.1f} ({:+.1f} to {:+.1f})".format(names, *percent))
    return "\n".join(lines) + "\n"


def figure(result: dict, path: Path) -> None:
    """The three measures over guidance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    guidances = result["settings"]["guidances"]
    fig, axes = plt.subplots(1, 3, figsize=(8, 3))
    for name, ax in zip(MEASURES, axes):
        for arm, found in result["arms"].items():
            values = [found["guidance"][str(w)][name] for w in guidances]
            ax.plot(guidances, values, marker="o", ms=3, label=label(arm))
        ax.set(xscale="log", xlabel="guidance", title=name)
        ax.set_xticks(guidances, [f"{w:g}" for w in guidances])
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(args: Args) -> None:
    shared_world(args.folder)
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    pool = ProcessPoolExecutor(args.num_processes, multiprocessing.get_context("spawn"))
    runs: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    with pool:
        futures = [(arm, pool.submit(run, args, arm, seed)) for arm, seed in jobs]
        for arm, future in tqdm(futures, desc="runs"):
            runs[arm].append(future.result())
    result = collect(args, runs)
    save_whole(json.dumps(result, indent=1) + "\n", args.folder / "guidance.json")
    figure(result, args.folder / "guidance.png")
    print(table(result), end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
