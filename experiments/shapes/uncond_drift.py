"""Does training move the velocity without a prompt, which guidance is made from?

    python -m experiments.shapes.uncond_drift --output_dir output/uncond_drift

train.py trains the shapes world's base by SFT and by SOAR, with --cond_dropout_rate 0 and 0.1.
Measured: sft_vs_soar's score at guidance 4.5; and on held-out pairs' states of the ideal path, by
level, as root mean squares over pairs and latents:

    uncond    the trained v_uncond minus the base's
    cond      the same of v_cond
    guidance  the trained v_cond - v_uncond
    error     the trained v_uncond minus z1 - z0: where it grows, v_uncond has become worse

Finished runs are kept, and the same command goes on from there. Written: uncond_drift.json.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from experiments.shapes import sft_vs_soar
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS
from experiments.shapes.sft_vs_soar import World, commit, held_out, load_base, load_world, paired_test
from sample import save_whole, seeded
from soar import interpolate
from train import make_velocity

LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98)
MEASURES = ("uncond", "cond", "guidance", "error")
LAMBDAS, RATES = {"SFT": 0.0, "SOAR": 1.0}, (0.0, 0.1)
TRAIN = Path(__file__).parents[2] / "train.py"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PAIRS_MEASURED = 96


def flags_of(run: Path, steps: int, objective: str, rate: float, seed: int) -> list[str]:
    """train.py's, with the optimizer's settings of sft_vs_soar."""
    flags = {"pretrained_model_name_or_path": DATA / "model", "dataset": PAIRS, "output_dir": run}
    flags |= {"resolution": 64, "max_sequence_length": MAX_SEQUENCE_LENGTH, "seed": seed}
    flags |= {"mixed_precision": "no", "train_batch_size": 16, "learning_rate": 3e-4}
    flags |= {"lr_scheduler": "linear", "lr_warmup_steps": 10, "max_train_steps": steps}
    flags |= {"lambda_aux": LAMBDAS[objective], "cond_dropout_rate": rate}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@torch.no_grad()
def velocities(world: World, transformer, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """v_uncond, v_cond and z1 - z0 on the ideal path, (levels, pairs, ...)."""
    z0, cond = held_out(world, pairs)
    z1 = torch.randn(z0.shape, generator=seeded("uncond_drift"))
    velocity = make_velocity(transformer, torch.device("cpu"), False)
    levels = [torch.full((pairs,), sigma) for sigma in LEVELS]
    states = [interpolate(z0, z1, sigma) for sigma in levels]
    texts = (world.cond([""] * pairs), cond)
    made = [[velocity(z, s, text) for z, s in zip(states, levels)] for text in texts]
    v_uncond, v_cond = map(torch.stack, made)
    return v_uncond, v_cond, (z1 - z0).expand_as(v_cond)


def measures(model: tuple, base: tuple) -> dict[str, list[float]]:
    """By level, from what velocities returns."""
    v_uncond, v_cond, target = model
    differences = (v_uncond - base[0], v_cond - base[1], v_cond - v_uncond, v_uncond - target)
    sizes = [x.square().flatten(1).mean(1).sqrt().tolist() for x in differences]
    return {name: [round(x, 5) for x in size] for name, size in zip(MEASURES, sizes)}


def measured(world: World, transformer, base: tuple, prompts: int, seed: int) -> dict:
    setting = sft_vs_soar.Setting((), steps=0, prompts=prompts, images=1, unguided=1)
    correct = sft_vs_soar.score(world, transformer, setting, seed)["correct"]
    by_level = measures(velocities(world, transformer, PAIRS_MEASURED), base)
    return {"correct": "".join(correct)} | by_level


def show(runs: dict[str, list[dict]]) -> None:
    """A markdown table, and what a rate of 0.1 does to the score."""
    print(f"| run | score, % | of | {' | '.join(map(str, LEVELS))} |")
    print("| --- | ---: | --- " + "| ---: " * len(LEVELS) + "|")
    correct = {}
    for name, seeds in runs.items():
        x = correct[name] = np.array([[int(c) for c in x["correct"]] for x in seeds])
        error = x.std(ddof=1) / x.size**0.5
        label = f"{name} | {100 * x.mean():.1f} ± {100 * error:.1f}"
        for measure in MEASURES:
            mean = np.mean([x[measure] for x in seeds], axis=0)
            cells = [f"{x:.3f}" for x in mean]
            print(f"| {label} | {measure} | {' | '.join(cells)} |")
            label = " | "
    for objective in LAMBDAS:
        low, high = (correct[f"{objective}, rate {rate:g}"].mean(0) for rate in RATES)
        print(f"{objective}, rate 0.1 - 0: {paired_test(high, low)}")


def main(output_dir: Path, steps: int = 300, seeds: int = 2, prompts: int = 240) -> None:
    """prompts: of the score, an image of each."""
    output_dir.mkdir(parents=True, exist_ok=True)
    world = load_world(output_dir / "world.safetensors")
    start, runs = load_base(world), {"base": []}
    base = velocities(world, start, PAIRS_MEASURED)
    for seed in range(seeds):
        runs["base"].append(measured(world, start, base, prompts, seed))
        for rate, objective in itertools.product(RATES, LAMBDAS):
            name = f"{objective}, rate {rate:g}"
            run = output_dir / f"{objective}-{rate:g}-{seed}"
            last = run / f"checkpoint-{steps:06d}"
            if not last.exists():
                flags = flags_of(run, steps, objective, rate, seed)
                subprocess.run([sys.executable, str(TRAIN), *flags], check=True)
            model = load_base(world, last / WEIGHTS)
            runs.setdefault(name, []).append(measured(world, model, base, prompts, seed))
            kept = {"commit": commit(), "steps": steps, "levels": LEVELS, "runs": runs}
            save_whole(json.dumps(kept) + "\n", output_dir / "uncond_drift.json")
    show(runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
