"""SFT against SOAR on the shapes world: the same base, pairs, seeds and noise, GenEval's tasks.

    python -m experiments.shapes.sft_vs_soar --setting quick     # under 20 minutes on two cores
    python -m experiments.shapes.sft_vs_soar --setting full      # more images: hours
    python -m experiments.shapes.sft_vs_soar --setting control   # is it the rollout? N = 1

An arm is a training run on the curated pairs; its steps are train.py's, with the same random
numbers, in one process and with latents and prompts encoded once. Images have sample.py's noise for
the same seed. Finished runs are kept in output_dir/SETTING, and the same command goes on from
there; each has one thread, so that results do not depend on their number. Written there:
ARM-SEED.json, ARM-SEED.safetensors (weights) and results.json.
"""

import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from experiments.environment import commit, markdown
from experiments.shapes.detect import score_image
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS, read_pairs
from sample import (
    encode_prompts,
    list_images,
    load_pipeline,
    load_transformer,
    read_prompts,
    sample_images,
    save_whole,
    seeded,
    sync,
)
from soar import Draws, SoarConfig, draw, soar_terms
from train import batched, make_velocity, step_indices

GUIDANCE, SAMPLING_STEPS = 4.5, 40
CPU = torch.device("cpu")


# --- Arms and settings ---


@dataclass(frozen=True)
class Arm:
    """A training run; its steps and batch are multiples of the setting's."""

    label: str
    config: SoarConfig = SoarConfig()
    steps: float = 1.0
    batch: float = 1.0

    def compute(self) -> float:
        """Cost over that of SFT of equal steps and batch: a forward is 1, its backward 2."""
        config = self.config
        points = config.num_rollout_paths * config.num_aux_points
        a_step = 3
        if config.lambda_aux:
            a_step += 3 * points + (config.guidance_scale != 1)
        return self.steps * self.batch * a_step / 3


SFT = SoarConfig(lambda_aux=0.0)
ONE_POINT = SoarConfig(num_aux_points=1, lambda_aux=6.0)  # the same expected loss as SOAR's
ARMS = {  # "base" is no arm: all start from it
    "sft": Arm("SFT", SFT),
    "soar": Arm("SOAR"),
    "sft_steps": Arm("SFT, 22/3 of the steps", SFT, steps=22 / 3),
    "sft_batch": Arm("SFT, 22/3 of the batch", SFT, batch=22 / 3),
    "soar_k1e6": Arm("SOAR, K = 10^6 (no drift)", SoarConfig(num_sampling_steps=10**6)),
    "soar_n1_l6": Arm("SOAR, N = 1, lambda = 6", ONE_POINT),
    "soar_n1_l6_steps": Arm("SOAR, N = 1, lambda = 6, 22/7 of the steps", ONE_POINT, steps=22 / 7),
}
OTHERS = {"sft": "minus SFT (95 %)", "sft_steps": "minus SFT of 22/3 steps", "soar": "minus SOAR"}


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share. Prompts are taken evenly from the six tasks."""

    arms: tuple[str, ...]
    steps: int
    prompts: int
    images: int  # a prompt, to be scored
    seeds: int = 3  # of training and of the images' noise
    batch: int = 16
    learning_rate: float = 3e-4
    lr_scheduler: str = "linear"
    lr_warmup_steps: int = 10


QUICK = Setting(("sft", "soar", "sft_steps"), steps=100, prompts=240, images=1)
FULL = dataclasses.replace(QUICK, arms=(*QUICK.arms, "sft_batch"), prompts=600, images=2)
CONTROL = dataclasses.replace(
    QUICK, arms=("sft", "soar", "soar_k1e6", "soar_n1_l6", "soar_n1_l6_steps"), prompts=600
)
SETTINGS = {"quick": QUICK, "full": FULL, "control": CONTROL}


# --- The shapes world, encoded once ---


class World(NamedTuple):
    pipe: StableDiffusion3Pipeline  # without its transformer
    mean: Tensor  # (n, 16, 8, 8) posterior of the training images, before shift and scale
    std: Tensor
    caption: Tensor  # (n,) rows of embeds
    embeds: dict[str, Tensor]  # the conditioning of every caption and prompt
    number: dict[str, int]  # caption -> row
    prompts: list[dict]

    def cond(self, texts: list[str]) -> dict[str, Tensor]:
        """The transformer's conditioning of captions or prompts, as encode_prompts returns it."""
        rows = [self.number[text] for text in texts]
        return {key: x[rows] for key, x in self.embeds.items()}


@cache
def load_world(cached: Path, data: Path = DATA) -> World:
    """The pairs and prompts of data, encoded by the committed pipeline; cached in a file.

    Raises OSError: data is not there; ValueError: the cached file is of other captions."""
    pipe = load_pipeline(str(DATA / "model"), torch.float32, CPU)
    pairs = read_pairs(data / PAIRS.name)
    prompts = read_prompts(data / "prompts.jsonl")
    # Embeddings may differ in their last bits with the batch they are made in: hence one order.
    texts = sorted({"", *pairs["text"], *(row["prompt"] for row in prompts)})
    if not cached.is_file():
        pixels = torch.cat([pipe.image_processor.preprocess(image) for image in pairs["image"]])
        with torch.no_grad():
            parts = [pipe.vae.encode(x).latent_dist for x in pixels.split(100)]
        made = encode_prompts(pipe, texts, MAX_SEQUENCE_LENGTH)
        made["mean"] = torch.cat([part.mean for part in parts])
        made["std"] = torch.cat([part.std for part in parts])
        save_tensors(made, cached)
    tensors = load_file(cached)
    mean, std = tensors.pop("mean"), tensors.pop("std")
    if len(mean) != len(pairs) or len(tensors["pooled_projections"]) != len(texts):
        raise ValueError(f"{cached} was made from other data than {data}; delete it")
    number = {text: i for i, text in enumerate(texts)}
    caption = torch.tensor([number[text] for text in pairs["text"]])
    return World(pipe, mean, std, caption, tensors, number, prompts)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors beside path, to the disk, then rename: path never holds half of it."""
    staging = path.with_name(f".{path.name}.tmp")
    save_file({key: x.contiguous() for key, x in tensors.items()}, staging)
    sync(staging)
    staging.rename(path)
    sync(path.parent)


def load_base(weights: Path | None = None) -> SD3Transformer2DModel:
    """The base transformer in float32, frozen; with the weights of a finished run where given."""
    transformer = load_transformer(str(DATA / "model"), None, torch.float32, CPU)
    if weights:
        transformer.load_state_dict(load_file(weights))
    return transformer


# --- Training ---


def step_inputs(
    world: World, config: SoarConfig, seed: int, step: int, batch: int
) -> tuple[Tensor, Draws, dict, dict]:
    """What soar_terms takes at a step, counted from 1: z0, draws, cond, uncond, as train.py's."""
    rows = step_indices(len(world.mean), batch, seed, step)
    shape = world.mean.shape[1:]
    draws, noise = [], []
    for i in range(batch):
        draws.append(draw((1, *shape), config, seeded(seed, "draws", step, i)))
        noise.append(torch.randn(shape, generator=seeded(seed, "vae", step, i)))
    vae = world.pipe.vae.config
    latents = world.mean[rows] + world.std[rows] * torch.stack(noise)
    z0 = (latents - vae.shift_factor) * vae.scaling_factor
    cond = {key: x[world.caption[rows]] for key, x in world.embeds.items()}
    return z0, batched(draws), cond, world.cond([""] * batch)


def train(
    world: World, arm: Arm, setting: Setting, seed: int, base: Path | None = None
) -> SD3Transformer2DModel:
    """The trained transformer; AdamW and clipping as train.py has them.
    base: the weights to start from, by default the committed ones.

    Raises FloatingPointError: a loss is not finite."""
    transformer = load_base(base).requires_grad_(True).train()
    steps, batch = round(arm.steps * setting.steps), round(arm.batch * setting.batch)
    rate = setting.learning_rate
    optimizer = torch.optim.AdamW(transformer.parameters(), rate, weight_decay=1e-2, fused=True)
    schedule = get_scheduler(
        setting.lr_scheduler, optimizer, num_warmup_steps=setting.lr_warmup_steps,
        num_training_steps=steps,
    )  # fmt: skip
    velocity = make_velocity(transformer, CPU, False)
    for step in range(1, steps + 1):
        total = 0.0
        inputs = step_inputs(world, arm.config, seed, step, batch)
        for term in soar_terms(velocity, *inputs, arm.config):
            term.loss.backward()
            total += term.loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{arm.label}, seed {seed}: loss of step {step} is not finite")
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return transformer.eval().requires_grad_(False)


# --- Measures ---


def sample(
    world: World, transformer, numbers: list[int], images: int, seed: int
) -> list[list[Image.Image]]:
    """Images of each prompt, from sample.py's noise for this seed and a file of these prompts."""
    work = list_images([world.prompts[i] for i in numbers], images, seed)
    made = []
    for start in range(0, len(work), 16):
        part = work[start : start + 16]
        draws = [seeded(x["seed"], x["prompt"], x["noise_index"]) for x in part]
        z1 = torch.stack([torch.randn(world.mean.shape[1:], generator=x) for x in draws])
        cond, uncond = world.cond([x["prompt"] for x in part]), world.cond([""] * len(part))
        made += sample_images(world.pipe, transformer, z1, cond, uncond, SAMPLING_STEPS, GUIDANCE)
    return [made[k : k + images] for k in range(0, len(made), images)]


def correct(world: World, transformer, prompts: int, images: int, seed: int) -> list[list[int]]:
    """0 or 1 for each image of each of so many prompts, evenly from the tasks."""
    numbers, judged = [i * len(world.prompts) // prompts for i in range(prompts)], []
    for i, found in zip(numbers, sample(world, transformer, numbers, images, seed)):
        judged.append([int(score_image(image, world.prompts[i])[0]) for image in found])
    return judged


def paired_test(a: np.ndarray, b: np.ndarray, resamples: int = 10_000) -> dict[str, float]:
    """The mean difference a - b of scores (P,); its 95 % interval by a bootstrap over prompts; p,
    two-sided, by flipping signs. Both speak of other prompts, not of other training seeds."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    rng, count = np.random.default_rng(0), len(difference)
    means = difference[rng.integers(count, size=(resamples, count))].mean(1)
    flipped = (rng.choice([-1.0, 1.0], size=(resamples, count)) * difference).mean(1)
    as_far = np.abs(flipped) >= abs(difference.mean()) - 1e-12
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    p = (1 + int(as_far.sum())) / (1 + resamples)
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": p}


# --- Runs ---


def run_settings(name: str, setting: Setting, seed: int) -> dict:
    """What the result of a run depends on, to be kept beside it."""
    shared = dataclasses.replace(setting, arms=(), seeds=0)
    return {"run": name, "seed": seed, "shared": str(shared), "arm": str(ARMS.get(name))}


def finished(path: Path, settings: dict) -> dict | None:
    """A run's result where it is there. Raises ValueError: it was made with other settings."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != settings:
        raise ValueError(f"{path} was made with other settings: give another --output_dir")
    return result


def keep(path: Path, settings: dict, measure: Callable[[], dict]) -> float:
    """Write what measure returns to path, unless it is there; returns the seconds it took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    if finished(path, settings):
        return 0.0
    result = {"settings": settings, "commit": commit(), **measure()}
    result["seconds"] = time.perf_counter() - began
    save_whole(json.dumps(result) + "\n", path)
    return result["seconds"]


def run(folder: Path, name: str, setting: Setting, seed: int) -> float:
    """Train, score, write NAME-SEED.json and the weights; returns the seconds it took."""
    path = folder / f"{name}-{seed}.json"

    def measure() -> dict:
        world, transformer = load_world(folder / "world.safetensors"), load_base()
        if arm := ARMS.get(name):
            transformer = train(world, arm, setting, seed)
            save_tensors(transformer.state_dict(), path.with_suffix(".safetensors"))
        return {"correct": correct(world, transformer, setting.prompts, setting.images, seed)}

    return keep(path, run_settings(name, setting, seed), measure)


def collect(folder: Path, setting: Setting) -> dict:
    """What the table needs, from the setting's runs."""
    scores, rows = {name: {} for name in ("base", *setting.arms)}, {}
    for name, seed in product(scores, range(setting.seeds)):
        result = finished(folder / f"{name}-{seed}.json", run_settings(name, setting, seed))
        scores[name][seed] = np.mean(result["correct"], 1)
    for name, found in scores.items():
        arm = ARMS.get(name)
        row = {"label": arm.label if arm else name, "compute": arm.compute() if arm else 0.0}
        row["by_seed"] = [float(x.mean()) for x in found.values()]
        for other in OTHERS:
            if other != name and other in scores:
                row[f"minus_{other}"] = paired_over_seeds(scores, name, other)
        rows[name] = row
    return {"setting": dataclasses.asdict(setting), "commit": commit(), "arms": rows}


def paired_over_seeds(scores: dict[str, dict], name: str, other: str) -> dict:
    """paired_test of two arms' scores by seed and prompt, over the seeds that both have."""
    common = sorted(set(scores[name]) & set(scores[other]))
    a, b = (np.mean([scores[arm][seed] for seed in common], 0) for arm in (name, other))
    return paired_test(a, b)


def table(result: dict) -> str:
    """Markdown: scores in %, differences in points."""
    rows = result["arms"].values()
    others = [name for name in OTHERS if any(f"minus_{name}" in row for row in rows)]
    lines = [["arm", "compute", "seeds", "score (std)", *(OTHERS[name] for name in others)]]
    for row in rows:
        seeds = row["by_seed"]
        cells = [row["label"], f"{row['compute']:.1f}", str(len(seeds)), percent(seeds)]
        lines.append(cells + [points(row.get(f"minus_{other}")) for other in others])
    return markdown(lines)


def percent(by_seed: list[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    std = f" ({100 * np.std(by_seed, ddof=1):.1f})" if len(by_seed) > 1 else ""
    return f"{100 * np.mean(by_seed):.1f}{std}"


def points(test: dict[str, float] | None) -> str:
    if test is None:
        return ""
    difference, low, high = (100 * test[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def share_out(work: Callable, folder: Path, jobs: dict[str, tuple], processes: int) -> None:
    """work(folder, *job) for each job, by name, in its order; work returns seconds."""
    if processes < 1:
        raise ValueError(f"--num_processes is {processes}, expected at least 1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, folder, *job): name for name, job in jobs.items()}
        for future in tqdm(as_completed(futures), work.__name__, len(jobs), unit="run"):
            tqdm.write(f"{futures[future]}: {future.result():.0f} s")


def main(
    setting: Literal["quick", "full", "control"] = "quick",
    output_dir: Path = Path("output/sft_vs_soar"), num_processes: int = 2,
) -> None:  # fmt: skip
    """num_processes: runs at a time, each with one thread."""
    shared, folder = SETTINGS[setting], output_dir / setting
    folder.mkdir(parents=True, exist_ok=True)
    load_world(folder / "world.safetensors")  # encoded before the processes start
    jobs = {}
    for seed, name in product(range(shared.seeds), ("base", *shared.arms)):
        jobs[f"{name}-{seed}"] = (name, shared, seed)
    share_out(run, folder, jobs, num_processes)
    result = collect(folder, shared)
    save_whole(json.dumps(result, indent=1) + "\n", folder / "results.json")
    print(table(result))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
