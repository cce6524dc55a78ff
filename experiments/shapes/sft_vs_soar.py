"""SFT against SOAR on the shapes world: the same base, pairs, optimizer, seeds and noise, scored by GenEval's tasks.

    python -m experiments.shapes.sft_vs_soar --setting quick          # under 20 minutes on two cores
    python -m experiments.shapes.sft_vs_soar --setting full       # the same runs and every other arm, more images: hours
    python -m experiments.shapes.sft_vs_soar --setting blur           # sharpness over 300 steps, with reported cures
    python -m experiments.shapes.sft_vs_soar --setting control    # SOAR against its levels without its rollout, and N = 1
    python -m experiments.shapes.sft_vs_soar --setting quick --arms soar_n1 soar_l0.3

An arm is a training run on the curated pairs; its steps are train.py's, with the same random numbers, in one process
and with latents and prompts encoded once. Images have sample.py's noise for the same seed. Finished runs are kept in
output_dir/SETTING, and the same command goes on from there; runs are shared out to processes of one thread each, so
that results do not depend on their number. Written there: ARM-SEED.json, ARM-SEED.safetensors (weights), results.json
and table.md, and the figures score.png, drift.png and sheet.png (experiments/shapes/figures.py).
"""

import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from experiments.evaluate import diversity
from experiments.shapes.detect import count_layouts, score_image
from experiments.shapes.draw import (
    CURATED,
    DATA,
    HELD_OUT,
    MAX_SEQUENCE_LENGTH,
    PAIRS,
    TAGS,
    example,
    read_pairs,
    render,
)
from sample import (
    encode_images,
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
from soar import Draws, SoarConfig, draw, guided_velocity, interpolate, rollout_step, soar_terms
from train import batched, make_velocity, step_indices

GUIDANCE, SAMPLING_STEPS, IMAGE_SEEDS = 4.5, 40, 16
STARTS = (0, 10, 20)  # of the 40 sampler steps, where drift's trajectories begin: sigma 1, 0.9, 0.75
PROBED = ("base", "sft", "soar")  # whose drift and diversity are measured, on the first seed
CPU = torch.device("cpu")


# --- Arms and settings ------------------------------------------------------------------------------------------------


def endpoint_weighting(sigma: Tensor) -> Tensor:
    """w(sigma) = 2 sigma^2, of mean 1.1 over the training levels: twice the squared error of the clean endpoint."""
    return 2 * sigma**2


@dataclass(frozen=True)
class Arm:
    """A training run: its name in tables, its objective; its steps and batch as multiples of the setting's."""

    label: str
    config: SoarConfig = SoarConfig()
    steps: float = 1.0
    batch: float = 1.0
    weighting: Callable[[Tensor], Tensor] | None = None

    def compute(self) -> float:
        """Cost of the run over SFT's of equal steps and batch, counting a forward as 1 and its backward as 2."""
        config, points = self.config, self.config.num_rollout_paths * self.config.num_aux_points
        a_step = 3 + (3 * points + (config.guidance_scale != 1)) * (config.lambda_aux > 0)
        return self.steps * self.batch * a_step / 3


SFT = SoarConfig(lambda_aux=0.0)
ONE_POINT = SoarConfig(num_aux_points=1, lambda_aux=6.0)  # the same expected loss as SOAR's
ARMS = {
    "sft": Arm("SFT", SFT),
    "soar": Arm("SOAR"),
    "sft_steps": Arm("SFT, 22/3 of the steps", SFT, steps=22 / 3),
    "soar_steps": Arm("SOAR, 22/3 of the steps", steps=22 / 3),
    "soar_w1": Arm("SOAR, w = 1", SoarConfig(guidance_scale=1.0)),
    "soar_k1e6": Arm("SOAR, K = 10^6 (no drift)", SoarConfig(num_sampling_steps=10**6)),
    "sft_batch": Arm("SFT, 22/3 of the batch", SFT, batch=22 / 3),
    "soar_l0.3": Arm("SOAR, lambda = 0.3", SoarConfig(lambda_aux=0.3)),
    "soar_u1": Arm("SOAR, sigma' <= sigma0", SoarConfig(sigma_upper_ratio=1.0)),
    "soar_n1": Arm("SOAR, N = 1", SoarConfig(num_aux_points=1)),
    "soar_n1_l6": Arm("SOAR, N = 1, lambda = 6", ONE_POINT),
    "soar_n1_l6_steps": Arm("SOAR, N = 1, lambda = 6, 22/7 of the steps", ONE_POINT, steps=22 / 7),
    "soar_weighted": Arm("SOAR, weighting 2 sigma^2", weighting=endpoint_weighting),
    "sft_weighted": Arm("SFT, weighting 2 sigma^2", SFT, weighting=endpoint_weighting),
    "soar_n3": Arm("SOAR, N = 3", SoarConfig(num_aux_points=3)),
    "soar_sde": Arm("SOAR, + SDE path (M = 2)", SoarConfig(num_rollout_paths=2)),
    "soar_fresh": Arm("SOAR, + SDE path, fresh z1", SoarConfig(num_rollout_paths=2, shared_noise=False)),
    "soar_u1.5": Arm("SOAR, sigma' <= 1.5 sigma0", SoarConfig(sigma_upper_ratio=1.5)),
    "soar_l0.1": Arm("SOAR, lambda = 0.1", SoarConfig(lambda_aux=0.1)),
    "soar_l2": Arm("SOAR, lambda = 2", SoarConfig(lambda_aux=2.0)),
}  # in order of importance; "base" is no arm: it is what all start from


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
    curve: tuple[float, ...] = (0.5,)  # where some arms are scored on the way, as shares of their steps
    curve_arms: tuple[str, ...] = ("sft", "soar")
    curve_seeds: int = 1
    curve_prompts: int = 240  # some of the prompts, one image each
    unguided: int = 60  # images at guidance 1, for their sharpness
    drift_pairs: int = 24
    diverse_prompts: int = 6  # with IMAGE_SEEDS images each
    base: bool = True  # score the base, too


QUICK = Setting(("sft", "soar", "sft_steps"), steps=100, prompts=240, images=1)
FULL = dataclasses.replace(
    QUICK, arms=tuple(ARMS), prompts=600, images=2, curve=(0.25, 0.5, 0.75), curve_seeds=3, drift_pairs=96,
    curve_arms=("sft", "soar", "sft_steps", "soar_steps"), diverse_prompts=24,
)  # fmt: skip
BLUR = dataclasses.replace(
    QUICK, arms=("sft", "soar", "soar_l0.3", "soar_u1", "soar_w1"), steps=300, seeds=1, prompts=60, curve_prompts=60,
    curve=(1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6), curve_arms=("sft", "soar", "soar_l0.3", "soar_u1", "soar_w1"),
)  # fmt: skip
CONTROL = dataclasses.replace(
    QUICK, arms=("sft", "soar", "soar_k1e6", "soar_n1_l6", "soar_n1_l6_steps"), prompts=600, curve=(), base=False
)
SETTINGS = {"quick": QUICK, "full": FULL, "blur": BLUR, "control": CONTROL}


@dataclass(frozen=True)
class Args:
    setting: Literal["quick", "full", "blur", "control"] = "quick"
    output_dir: Path = Path("output/sft_vs_soar")
    """Where runs are kept, in a folder named after the setting."""
    arms: tuple[str, ...] = ()
    """Arms to run beside base, by default the setting's; results.json and the table hold all that are finished."""
    num_processes: int = 2
    """Runs at a time, each with one thread."""

    def __post_init__(self):
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"--arms {unknown[0]} is unknown, expected some of: {', '.join(ARMS)}")
        if self.num_processes < 1:
            raise ValueError(f"--num_processes is {self.num_processes}, expected at least 1")


# --- The shapes world, encoded once -----------------------------------------------------------------------------------


class World(NamedTuple):
    pipe: StableDiffusion3Pipeline  # without its transformer
    data: Path
    mean: Tensor  # (n, 16, 8, 8) posterior of the training images, before shift and scale
    std: Tensor
    caption: Tensor  # (n,) rows of embeds
    embeds: dict[str, Tensor]  # the conditioning of every caption and prompt, row 0 that of ""
    number: dict[str, int]  # caption -> row
    prompts: list[dict]

    def cond(self, texts: list[str]) -> dict[str, Tensor]:
        """The transformer's conditioning of some captions or prompts, as encode_prompts returns it."""
        return {key: x[[self.number[text] for text in texts]] for key, x in self.embeds.items()}


def load_world(cached: Path, data: Path = DATA, model: Path = DATA / "model") -> World:
    """The pairs and prompts of data, encoded by the pipeline model; cached in a file.

    Raises OSError: data or model is not there; ValueError: the cached file belongs to other captions."""
    pipe = load_pipeline(str(model), torch.float32, CPU)
    pairs = read_pairs(data / PAIRS.name)
    prompts = read_prompts(data / "prompts.jsonl")
    # Embeddings may differ in their last bits with the batch they are made in: hence one order.
    texts = sorted({"", *pairs["text"], *(row["prompt"] for row in prompts)})
    if not cached.is_file():
        pixels = torch.cat([pipe.image_processor.preprocess(image) for image in pairs["image"]])
        with torch.no_grad():
            parts = [pipe.vae.encode(x).latent_dist for x in pixels.split(100)]
        made = encode_prompts(pipe, texts, MAX_SEQUENCE_LENGTH)
        made |= {name: torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std")}
        save_tensors(made, cached)
    tensors = load_file(cached)
    mean, std = tensors.pop("mean"), tensors.pop("std")
    if len(mean) != len(pairs) or len(tensors["pooled_projections"]) != len(texts):
        raise ValueError(f"{cached} was made from other data than {data}; delete it")
    number = {text: i for i, text in enumerate(texts)}
    caption = torch.tensor([number[text] for text in pairs["text"]])
    return World(pipe, data, mean, std, caption, tensors, number, prompts)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors beside path, to the disk, then rename: path never holds half of it."""
    staging = path.with_name(f".{path.name}.tmp")
    save_file({key: x.contiguous() for key, x in tensors.items()}, staging)
    sync(staging)
    staging.rename(path)
    sync(path.parent)


def load_base(world: World, weights: Path | None = None) -> SD3Transformer2DModel:
    """The base transformer in float32, frozen; with the weights of a finished run where given."""
    transformer = load_transformer(str(DATA / "model"), None, torch.float32, CPU)
    if weights:
        transformer.load_state_dict(load_file(weights))
    return transformer


# --- Training ---------------------------------------------------------------------------------------------------------


def step_inputs(world: World, config: SoarConfig, seed: int, step: int, batch: int) -> tuple[Tensor, Draws, dict, dict]:
    """What soar_terms takes at a step, counted from 1: z0, draws, cond, uncond, as train.py has them for this seed."""
    rows, shape, vae = step_indices(len(world.mean), batch, seed, step), world.mean.shape[1:], world.pipe.vae
    draws = batched([draw((1, *shape), config, seeded(seed, "draws", step, i)) for i in range(batch)])
    noise = torch.stack([torch.randn(shape, generator=seeded(seed, "vae", step, i)) for i in range(batch)])
    z0 = (world.mean[rows] + world.std[rows] * noise - vae.config.shift_factor) * vae.config.scaling_factor
    cond = {key: x[world.caption[rows]] for key, x in world.embeds.items()}
    return z0, draws, cond, world.cond([""] * batch)


def train(
    world: World, arm: Arm, setting: Setting, seed: int, base: Path | None = None
) -> dict[int, dict[str, Tensor]]:
    """Weights by step, at the setting's shares of the steps and at the end: AdamW and clipping as train.py has them.
    base: the weights to start from, by default the committed ones.

    Raises FloatingPointError: a loss is not finite."""
    transformer = load_base(world, base).requires_grad_(True).train()
    steps, batch = round(arm.steps * setting.steps), round(arm.batch * setting.batch)
    optimizer = torch.optim.AdamW(transformer.parameters(), setting.learning_rate, weight_decay=1e-2, fused=True)
    warmup = {"num_warmup_steps": setting.lr_warmup_steps, "num_training_steps": steps}
    schedule = get_scheduler(setting.lr_scheduler, optimizer, **warmup)
    velocity = make_velocity(transformer, CPU, False)
    marks, kept = {round(share * steps) for share in setting.curve} | {steps}, {}
    for step in range(1, steps + 1):
        total = 0.0
        inputs = step_inputs(world, arm.config, seed, step, batch)
        for term in soar_terms(velocity, *inputs, arm.config, weighting=arm.weighting):
            term.loss.backward()
            total += term.loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{arm.label}, seed {seed}: the loss of step {step} is not finite")
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in marks:
            kept[step] = copy.deepcopy(transformer.state_dict())
    return kept


# --- Measures ---------------------------------------------------------------------------------------------------------


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey image, whose values are in [0, 1]."""
    return float(ndimage.laplace(np.asarray(image.convert("L"), np.float64) / 255).var())


@torch.no_grad()
def training_sharpness(world: World, most: int = 600) -> dict[str, float]:
    """Mean sharpness of training images, each task counting the same; and of the same after the VAE, which bounds what
    samples can have."""
    images, tags = read_pairs(world.data / PAIRS.name)[:most]["image"], {}
    decoded = [world.pipe.vae.decode(x, return_dict=False)[0] for x in world.mean[:most].split(100)]
    pictures = world.pipe.image_processor.postprocess(torch.cat(decoded))
    for i, (image, picture) in enumerate(zip(images, pictures)):
        tags.setdefault(example(CURATED + i)[0]["tag"], []).append([sharpness(image), sharpness(picture)])
    real, rebuilt = np.mean([np.mean(pairs, axis=0) for pairs in tags.values()], axis=0).tolist()
    return {"training_sharpness": real, "reconstruction_sharpness": rebuilt}


def chosen(world: World, count: int) -> list[int]:
    """Numbers of `count` prompts, taken evenly: of each task the same number where count is a multiple of six."""
    return [i * len(world.prompts) // count for i in range(count)]


def sample(
    world: World, transformer, numbers: list[int], images: int, seed: int, guidance_scale: float = GUIDANCE,
    batch: int = 16,
) -> list[list[Image.Image]]:  # fmt: skip
    """Images of each prompt, from the noise that sample.py has for this seed and a file of these prompts."""
    work, made = list_images([world.prompts[i] for i in numbers], images, seed), []
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        draws = [seeded(x["seed"], x["prompt"], x["noise_index"]) for x in part]
        z1 = torch.stack([torch.randn(world.mean.shape[1:], generator=generator) for generator in draws])
        cond, uncond = world.cond([x["prompt"] for x in part]), world.cond([""] * len(part))
        made += sample_images(world.pipe, transformer, z1, cond, uncond, SAMPLING_STEPS, guidance_scale)
    return [made[k : k + images] for k in range(0, len(made), images)]


def score(world: World, transformer, setting: Setting, seed: int) -> dict:
    """correct: by prompt, a 0 or 1 an image; the mean sharpness of these images, and of a few at guidance 1."""
    numbers, few = chosen(world, setting.prompts), chosen(world, setting.unguided)
    made = sample(world, transformer, numbers, setting.images, seed)
    correct = ["".join(str(int(score_image(x, world.prompts[i])[0])) for x in xs) for i, xs in zip(numbers, made)]
    unguided = sample(world, transformer, few, 1, seed, guidance_scale=1.0)
    sharp, soft = (float(np.mean([sharpness(x) for xs in group for x in xs])) for group in (made, unguided))
    return {"correct": correct, "sharpness": sharp, "sharpness_unguided": soft}


def held_out(world: World, count: int) -> tuple[Tensor, dict]:
    """z0 (the posterior's means) and conditioning of pairs that no training set has."""
    examples = [example(HELD_OUT + 500_000 + i) for i in range(count)]
    pixels = torch.cat([world.pipe.image_processor.preprocess(render(scene)) for _, scene in examples])
    z0 = encode_images(world.pipe, pixels, torch.zeros(count, *world.mean.shape[1:]))
    return z0, encode_prompts(world.pipe, [metadata["prompt"] for metadata, _ in examples], MAX_SEQUENCE_LENGTH)


@torch.no_grad()
def drift(world: World, transformer, pairs: int) -> dict:
    """Errors of the predicted clean endpoint z - sigma v(z, sigma, c) along the sampler's trajectories, against z0.

    From held-out pairs (z0, z1) a trajectory begins at the ideal state of step s and goes on by the model's own guided
    steps. Returns sigma, and mean squared errors by step: "ideal" on the ideal path, and each start's "from_S" on the
    trajectory, from step S on. From step 0 it begins in pure noise, and does not know z0: what it draws may answer
    the caption as well, so that this error does not measure drift alone. From later steps the state holds z0."""
    z0, cond = held_out(world, pairs)
    z1 = torch.stack([torch.randn(z0.shape[1:], generator=seeded(0, "drift", k)) for k in range(pairs)])
    uncond = world.cond([""] * pairs)
    world.pipe.scheduler.set_timesteps(SAMPLING_STEPS)
    sigmas = world.pipe.scheduler.sigmas[:, None].expand(-1, pairs)
    velocity = lambda z, i, c: transformer(z, timestep=1000 * sigmas[i], return_dict=False, **c)[0]  # noqa: E731
    error = lambda z, v, i: float((z - sigmas[i, 0] * v - z0).square().mean())  # noqa: E731
    states = [interpolate(z0, z1, sigma) for sigma in sigmas]
    result = {"sigma": sigmas[:-1, 0].tolist()}
    result["ideal"] = [error(states[i], velocity(states[i], i, cond), i) for i in range(SAMPLING_STEPS)]
    for start in STARTS:
        z, errors = states[start], []
        for i in range(start, SAMPLING_STEPS):
            v = velocity(z, i, cond)
            errors.append(error(z, v, i))
            z = rollout_step(z, guided_velocity(velocity(z, i, uncond), v, GUIDANCE), sigmas[i], sigmas[i + 1])
        result[f"from_{start}"] = errors
    return result


def paired_test(a: np.ndarray, b: np.ndarray, resamples: int = 10_000) -> dict[str, float]:
    """The mean difference a - b of scores (P,) on the same prompts; its 95 % interval by a bootstrap over prompts; and
    p, two-sided, by flipping signs. Both speak of other prompts, not of other training seeds."""
    difference, rng = np.asarray(a, float) - np.asarray(b, float), np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(resamples, len(difference)))].mean(1)
    flipped = (rng.choice([-1.0, 1.0], size=(resamples, len(difference))) * difference).mean(1)
    p = (1 + (np.abs(flipped) >= abs(difference.mean()) - 1e-12).sum()) / (1 + resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "p": float(p)}


# --- Runs -------------------------------------------------------------------------------------------------------------


@cache
def shared_world(folder: Path) -> World:
    return load_world(folder / "world.safetensors")


def run_settings(name: str, setting: Setting, seed: int) -> dict:
    """What the result of a run depends on, to be kept beside it."""
    arm = ARMS.get(name)
    shared = {k: v for k, v in dataclasses.asdict(setting).items() if k not in ("arms", "seeds", "base")}
    own = {k: str(v) for k, v in vars(arm.config).items()} if arm else {}
    own |= {key: getattr(arm, key) for key in ("steps", "batch")} if arm else {}
    own |= {"weighted": arm.weighting is not None} if arm else {}
    return json.loads(json.dumps({"run": name, "seed": seed, "shared": shared, "arm": own}))


def finished(path: Path, settings: dict) -> dict | None:
    """A run's result where it is there. Raises ValueError: it was made with other settings."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != settings:
        raise ValueError(f"{path} was made with other settings: delete it, or give another --output_dir")
    return result


def run(folder: Path, name: str, setting: Setting, seed: int) -> float:
    """Train (unless the weights are there), measure, write NAME-SEED.json; returns the seconds it took."""
    torch.set_num_threads(1)
    began, path, settings = time.perf_counter(), folder / f"{name}-{seed}.json", run_settings(name, setting, seed)
    if finished(path, settings):
        return 0.0
    world, weights, arm = shared_world(folder), folder / f"{name}-{seed}.safetensors", ARMS.get(name)
    on_the_way, curve = path.with_suffix(".curve.json"), {}
    if arm and not (finished(on_the_way, settings) and weights.is_file()):
        kept = train(world, arm, setting, seed)
        *marks, last = sorted(kept)
        if name in setting.curve_arms and seed < setting.curve_seeds:
            transformer, fewer = load_base(world), dataclasses.replace(setting, prompts=setting.curve_prompts, images=1)
            for step in marks:
                transformer.load_state_dict(kept[step])
                curve[step] = score(world, transformer, fewer, seed)
        save_tensors(kept[last], weights)
        save_whole(json.dumps({"settings": settings, "curve": curve}), on_the_way)
    elif arm:
        curve = finished(on_the_way, settings)["curve"]
    trained = time.perf_counter()
    transformer = load_base(world, weights if arm else None)
    result = {"settings": settings, "curve": curve, **score(world, transformer, setting, seed)}
    if name in PROBED and seed == 0:
        result["drift"] = drift(world, transformer, setting.drift_pairs)
        numbers = chosen(world, setting.diverse_prompts)
        for i, images in zip(numbers, sample(world, transformer, numbers, IMAGE_SEEDS, seed)):
            samples = folder / "diversity" / name / f"{i:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            save_whole(json.dumps(world.prompts[i]) + "\n", samples.parent / "metadata.jsonl")
            for j, image in enumerate(images):
                save_whole(image, samples / f"{j:05d}.png")
    result["seconds"] = [trained - began, time.perf_counter() - trained]
    save_whole(json.dumps(result) + "\n", path)
    return time.perf_counter() - began


def rates(correct: list[str]) -> np.ndarray:
    """Per-prompt scores (P,) from a run's "correct"."""
    return np.array([np.mean([int(c) for c in word]) for word in correct])


def curves(world: World, runs: dict, setting: Setting) -> dict:
    """{arm: {seed: {step: score, sharpness, sharpness_unguided}}} from the base, step 0, to the end, for what has
    points on the way; scores are of the first image of the curve's prompts."""
    fewer, made = set(chosen(world, setting.curve_prompts)), {}
    kept = [k for k, i in enumerate(chosen(world, setting.prompts)) if i in fewer]
    for name in setting.curve_arms:
        for seed, x in runs.get(name, {}).items():
            if not x["curve"] or seed not in runs.get("base", {}):
                continue
            ends = {0: runs["base"][seed], round(ARMS[name].steps * setting.steps): x}
            ends = {step: y | {"correct": [y["correct"][k][0] for k in kept]} for step, y in ends.items()}
            points = sorted((ends | {int(step): y for step, y in x["curve"].items()}).items())
            made.setdefault(name, {})[str(seed)] = {str(step): {
                "score": float(rates(y["correct"]).mean()), "sharpness": y["sharpness"],
                "sharpness_unguided": y["sharpness_unguided"]} for step, y in points}  # fmt: skip
    return made


def collect(folder: Path, setting: Setting) -> dict:
    """Everything that the table and the figures need, from the runs that are finished."""
    runs = {name: [finished(folder / f"{name}-{seed}.json", run_settings(name, setting, seed))
                   for seed in range(setting.seeds)] for name in ("base", *ARMS)}  # fmt: skip
    runs = {name: {seed: x for seed, x in enumerate(found) if x} for name, found in runs.items() if any(found)}
    world, summary = shared_world(folder), {}
    tags = np.array([world.prompts[i]["tag"] for i in chosen(world, setting.prompts)])
    for name, found in runs.items():
        scores = {seed: rates(x["correct"]) for seed, x in found.items()}
        whole = np.array([np.mean([x[tags == tag].mean() for tag in TAGS]) for x in scores.values()])
        row = {"label": ARMS[name].label if name in ARMS else "base", "seeds": sorted(scores), "score": whole.mean()}
        row |= {"compute": ARMS[name].compute() if name in ARMS else 0.0, "by_seed": whole.tolist()}
        row |= {"std": whole.std(ddof=1) if len(whole) > 1 else None, "tags": {
            tag: np.mean([x[tags == tag].mean() for x in scores.values()]) for tag in TAGS}}  # fmt: skip
        row |= {key: np.mean([x[key] for x in found.values()]) for key in ("sharpness", "sharpness_unguided")}
        row["seconds"] = np.mean([x["seconds"] for x in found.values()], axis=0).tolist()
        for other in ("base", "sft", "sft_steps", "soar"):
            common = [seed for seed in scores if seed in runs.get(other, {})]
            if name != other and common:
                theirs = [rates(runs[other][seed]["correct"]) for seed in common]
                row[f"minus_{other}"] = paired_test(np.mean([scores[s] for s in common], 0), np.mean(theirs, 0))
        summary[name] = row
    result = {"setting": dataclasses.asdict(setting), "commit": commit(), "arms": summary}
    result |= training_sharpness(world)
    result["curves"] = curves(world, runs, setting)
    result["drift"] = {name: runs[name][0]["drift"] for name in PROBED if 0 in runs.get(name, {})}
    folders = {name: folder / "diversity" / name for name in result["drift"]}
    if len(folders) > 1:
        made = diversity.measure(tuple(folders.values()), str(DATA / "model/vae"))
        result["diversity"] = {
            name: made[path]._asdict() | {"layouts": count_layouts(path)} for name, path in folders.items()
        }
    return result


def commit() -> str:
    """The repository's commit, with a + where files differ from it; "unknown" outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
        return head + "+" * bool(subprocess.run(["git", "status", "--porcelain", "-uno"], **git).stdout)
    return "unknown"


def main(args: Args) -> None:
    from experiments.shapes import figures  # matplotlib is needed here only

    setting, folder = SETTINGS[args.setting], args.output_dir / args.setting
    folder.mkdir(parents=True, exist_ok=True)
    shared_world(folder)  # encoded before the processes start
    names = ["base"] * setting.base + list(args.arms or setting.arms)
    jobs = [(name, seed) for seed in range(setting.seeds) for name in names]
    pool = ProcessPoolExecutor(args.num_processes, multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(jobs), desc="runs", unit="run") as bar:
        futures = {pool.submit(run, folder, name, setting, seed): f"{name}-{seed}" for name, seed in jobs}
        for future in as_completed(futures):
            bar.write(f"{futures[future]}: {future.result():.0f} s")
            bar.update()
    result = collect(folder, setting)
    save_whole(json.dumps(result, indent=1) + "\n", folder / "results.json")
    save_whole(figures.table(result), folder / "table.md")
    print(figures.table(result))
    figures.draw_all(result, folder, folder)
    print(f"{folder}: results.json, table.md and the figures")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
