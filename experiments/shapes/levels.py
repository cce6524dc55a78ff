"""Level by level: what SOAR changes in the velocity, on pairs that no training has seen.

    python -m experiments.shapes.levels             # all of STAGES, then table and figures
    python -m experiments.shapes.levels --collect   # table and figures of what is finished
    python -m experiments.shapes.levels --sizes 2000 --arms sft soar_n1_l6

Arms are those of experiments.shapes.sft_vs_soar, of 100 steps of 16 pairs where not
said otherwise. Each is measured without images, at the same pairs and noise for all arms and seeds:
    levels      squared error of the velocity at LEVELS, to latents drawn from the VAE's posterior,
                as in training, and to its means; at each quarter of the steps on some of the pairs
    own         the same on pairs of the training set, to its means
    trajectory  from the ideal state of a drawn latent at one of STARTS by the sampler's own last
                steps: squared error of where it ends, to the drawn latent and to the mean
    by_heart    small sets only: the share of sampled latents that are nearer to a training latent
                than that one's nearest neighbour among all 2,000 is
    score       GenEval's, of 600 prompts, one image each; only of SCORED, after all other runs
REFIT starts from a base of its own: the committed one, trained 400 steps more as its last phase was
(experiments/shapes/build.py), on the posteriors' means in place of drawn latents.

A run (arm, seed, size of the set, its noise) is a file of its own, renamed when whole: the same
command goes on where it was killed. What they say together levels_table.py writes
beside them: levels.json, levels.md and a figure for each size and noise.
"""

import copy
import dataclasses
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from experiments.shapes import sft_vs_soar
from experiments.shapes.build import LATE_WRONG_CAPTIONS, mislabel, posterior, pretrain, to_pixels
from experiments.shapes.detect import score_image
from experiments.shapes.draw import BROAD, HELD_OUT, MAX_SEQUENCE_LENGTH, example, render
from experiments.shapes.sft_vs_soar import (
    CPU,
    QUICK,
    SAMPLING_STEPS,
    SFT,
    Arm,
    World,
    commit,
    finished,
    load_base,
    load_world,
    save_tensors,
    train,
)
from sample import encode_images, encode_prompts, save_whole, seeded
from soar import SoarConfig, guided_velocity, interpolate, rollout_step
from train import make_velocity

LEVELS = (0.1, 0.15, 0.25, 0.35, 0.55, 0.75, 0.9)
STARTS = (0.2, 0.35, 0.55, 0.75)  # the nearest levels of the sampler's steps are taken
GUIDANCES = (1.0, 4.5)
PAIRS, QUARTER_PAIRS, WALKED_PAIRS, SAMPLED = 150, 24, 16, 24
WHOLE = 2000
REFIT = "refit"  # in place of a noise: means, from the base that was trained on means
REFIT_SCENES, REFIT_STEPS = 8000, 400
SCORED, SCORED_PROMPTS = ("2000-refit", "2000-0"), 600  # groups, in this order
FIRST = "2000-vae"  # a group: pairs of the training set and their latents' noise
SETTING = dataclasses.replace(QUICK, curve=(0.25, 0.5, 0.75))
LAWS = ("drawn", "mean")


def one_point(**settings) -> SoarConfig:
    return SoarConfig(**{"num_aux_points": 1, "lambda_aux": 6.0} | settings)


N1 = "SOAR, N = 1, lambda = 6"
NO_ROLLOUT = {"num_sampling_steps": 10**6, "guidance_scale": 1.0}
PLAIN = ("sft", "soar_n1_l6", "soar", "sft_steps", "soar_n1_l6_steps", "soar_k1e6")
ARMS = {name: sft_vs_soar.ARMS[name] for name in PLAIN} | {
    "n1_still": Arm("its levels, no rollout", one_point(**NO_ROLLOUT)),
    "sft_7_3": Arm("SFT, 7/3 of the steps", SFT, steps=7 / 3),
    "n1_w1": Arm(f"{N1}, w = 1", one_point(guidance_scale=1.0)),
    "n1_k20": Arm(f"{N1}, K = 20", one_point(num_sampling_steps=20)),
    "n1_k100": Arm(f"{N1}, K = 100", one_point(num_sampling_steps=100)),
    "n1_l1": Arm("SOAR, N = 1, lambda = 1", one_point(lambda_aux=1.0)),
    "n1_l3": Arm("SOAR, N = 1, lambda = 3", one_point(lambda_aux=3.0)),
    "n1_l12": Arm("SOAR, N = 1, lambda = 12", one_point(lambda_aux=12.0)),
    "n1_u1.5": Arm(f"{N1}, ratio 1.5", one_point(sigma_upper_ratio=1.5)),
}
CHEAP = ("sft", "soar_n1_l6", "n1_still", "sft_7_3")
DEAR = ("soar", "sft_steps", "soar_n1_l6_steps", "soar_k1e6")
OTHERS = ("n1_w1", "n1_k20", "n1_k100", "n1_l1", "n1_l3", "n1_l12", "n1_u1.5")
SEEDS = (0, 1, 2)
STAGES = (  # pairs, std of the latents' noise (None: the VAE's own) or REFIT, arms, seeds
    (WHOLE, None, ("base", *CHEAP), SEEDS),
    (WHOLE, None, DEAR, (0,)),
    (WHOLE, 0.0, CHEAP, SEEDS),
    (64, None, CHEAP, SEEDS),
    (WHOLE, 0.05, CHEAP, SEEDS),
    (256, None, CHEAP, SEEDS),
    (WHOLE, None, DEAR, SEEDS),
    (WHOLE, REFIT, CHEAP, SEEDS),
    (WHOLE, None, OTHERS, SEEDS),
    (64, None, DEAR, SEEDS),
)


class Job(NamedTuple):
    arm: str
    seed: int
    size: int
    noise: float | str | None

    @property
    def group(self) -> str:
        return f"{self.size}-{'vae' if self.noise is None else self.noise or 0}"

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.group}-{self.seed}"


@dataclass(frozen=True)
class Args:
    output_dir: Path = Path("output/levels")
    arms: tuple[str, ...] = ()
    """By default all; base is run with any."""
    sizes: tuple[int, ...] = ()
    """Of the training set: some of 2000, 256, 64; by default all."""
    collect: bool = False
    """Run nothing; collect what is finished."""
    num_processes: int = 2
    """Runs at a time, each with one thread."""

    def __post_init__(self):
        for name in self.arms:
            if name not in ARMS:
                raise ValueError(f"--arms {name} is unknown, expected some of: {', '.join(ARMS)}")
        for size in self.sizes:
            if size not in {stage[0] for stage in STAGES}:
                raise ValueError(f"--sizes {size} is in no stage, expected some of 2000, 256, 64")
        if self.num_processes < 1:
            raise ValueError(f"--num_processes is {self.num_processes}, expected at least 1")


def plan(args: Args) -> list[Job]:
    """All runs, in the order of STAGES."""
    jobs = [Job("base", 0, WHOLE, None)]
    if any(noise == REFIT for _, noise, *_ in STAGES):
        jobs.append(Job("base", 0, WHOLE, REFIT))
    for size, noise, arms, seeds in STAGES:
        if args.sizes and size not in args.sizes:
            continue
        arms = [arm for arm in arms if arm != "base" and arm in (args.arms or ARMS)]
        jobs += [Job(arm, seed, size, noise) for seed in seeds for arm in arms]
    return list(dict.fromkeys(jobs))


# --- Measures ---


class Pairs(NamedTuple):
    z0: dict[str, Tensor]  # by LAWS
    z1: Tensor
    cond: dict[str, Tensor]

    def first(self, count: int) -> "Pairs":
        cond = {key: x[:count] for key, x in self.cond.items()}
        return Pairs({law: x[:count] for law, x in self.z0.items()}, self.z1[:count], cond)


def held_out(world: World, count: int) -> Pairs:
    examples = [example(HELD_OUT + 500_000 + i) for i in range(count)]
    images = [render(scene) for _, scene in examples]
    pixels = torch.cat([world.pipe.image_processor.preprocess(image) for image in images])
    shape = (count, *world.mean.shape[1:])
    z1, noise = (torch.randn(shape, generator=seeded("levels", name)) for name in ("z1", "vae"))
    z0 = {
        "drawn": encode_images(world.pipe, pixels, noise),
        "mean": encode_images(world.pipe, pixels, torch.zeros(shape)),
    }
    prompts = [metadata["prompt"] for metadata, _ in examples]
    return Pairs(z0, z1, encode_prompts(world.pipe, prompts, MAX_SEQUENCE_LENGTH))


def own_pairs(world: World, count: int) -> Pairs:
    """Of the training set, evenly; means alone."""
    rows = [i * len(world.mean) // count for i in range(count)]
    z1 = torch.randn((count, *world.mean.shape[1:]), generator=seeded("levels", "own"))
    cond = {key: x[world.caption[rows]] for key, x in world.embeds.items()}
    return Pairs({"mean": scaled(world, world.mean[rows])}, z1, cond)


def scaled(world: World, latents: Tensor) -> Tensor:
    config = world.pipe.vae.config
    return (latents - config.shift_factor) * config.scaling_factor


def square(x: Tensor) -> list[float]:
    """Mean square over all but the pairs."""
    return [round(value, 6) for value in x.square().flatten(1).mean(1).tolist()]


@torch.no_grad()
def by_level(velocity, pairs: Pairs) -> dict[str, list[list[float]]]:
    """{law: errors by level and pair}."""
    made = {}
    for law, z0 in pairs.z0.items():
        made[law] = []
        for level in LEVELS:
            sigma = torch.full((len(z0),), level)
            v = velocity(interpolate(z0, pairs.z1, sigma), sigma, pairs.cond)
            made[law].append(square(v - (pairs.z1 - z0)))
    return made


@torch.no_grad()
def walk(world: World, velocity, z: Tensor, cond: dict, start: int, guidance: float) -> Tensor:
    """Where the sampler's steps from the start-th on lead."""
    uncond = world.cond([""] * len(z))
    world.pipe.scheduler.set_timesteps(SAMPLING_STEPS)
    sigmas = world.pipe.scheduler.sigmas[:, None].expand(-1, len(z))
    for i in range(start, SAMPLING_STEPS):
        v = velocity(z, sigmas[i], cond)
        if guidance != 1:
            v = guided_velocity(velocity(z, sigmas[i], uncond), v, guidance)
        z = rollout_step(z, v, sigmas[i], sigmas[i + 1])
    return z


def trajectories(world: World, velocity, pairs: Pairs) -> dict[str, dict]:
    """{"GUIDANCE from START": {law: errors by pair}}, from states of drawn latents."""
    world.pipe.scheduler.set_timesteps(SAMPLING_STEPS)
    sigmas, made = world.pipe.scheduler.sigmas, {}
    for level in STARTS:
        start = int((sigmas - level).abs().argmin())
        z = interpolate(pairs.z0["drawn"], pairs.z1, sigmas[start].expand(len(pairs.z1)))
        for guidance in GUIDANCES:
            end = walk(world, velocity, z, pairs.cond, start, guidance)
            errors = {law: square(end - pairs.z0[law]) for law in LAWS}
            made[f"{guidance:g} from {level:g}"] = errors
    return made


def by_heart(samples: Tensor, training: Tensor, everything: Tensor) -> float:
    """The share of samples nearer to a training latent than its nearest neighbour; all (n, ...)."""
    distances, nearest = torch.cdist(samples.flatten(1), training.flatten(1)).min(1)
    apart = torch.cdist(training.flatten(1)[nearest], everything.flatten(1))
    neighbour = apart.topk(2, largest=False).values[:, 1]  # the first is the latent itself
    return float((distances < neighbour).float().mean())


# --- Runs ---


@cache
def shared(folder: Path) -> tuple[World, Pairs]:
    world = load_world(folder / "world.safetensors")
    return world, held_out(world, PAIRS)


def part(world: World, size: int, noise: float | str | None) -> World:
    """The first `size` pairs, their posteriors' noise scaled to a root mean square of `noise`."""
    std = world.std
    if noise == REFIT:
        std = torch.zeros_like(std)
    elif noise is not None:
        std = std * noise / own_noise(world)
    return world._replace(mean=world.mean[:size], std=std[:size], caption=world.caption[:size])


def own_noise(world: World) -> float:
    """The root mean square of the posteriors' standard deviations, as the transformer sees them."""
    return float(world.std.square().mean().sqrt()) * world.pipe.vae.config.scaling_factor


def refit(world: World, path: Path) -> None:
    """Write the weights of REFIT's base, unless they are there."""
    if path.is_file():
        return
    examples = [example(BROAD + i) for i in range(REFIT_SCENES)]
    pixels = to_pixels(render(scene) for _, scene in examples)
    captions = [metadata["prompt"] for metadata, _ in examples]
    captions = mislabel(captions, LATE_WRONG_CAPTIONS, 0)
    mean, _ = posterior(world.pipe.vae, pixels)
    pipe = copy.copy(world.pipe)
    pipe.transformer = load_base(world).requires_grad_(True)
    checkpoint = path.with_suffix(".part.safetensors")
    pretrain(pipe, mean, None, captions, REFIT_STEPS, 2, checkpoint, lr=5e-4)
    save_tensors(pipe.transformer.state_dict(), path)


def base_of(folder: Path, job: Job) -> Path | None:
    """The weights that a run starts from, where they are not the committed ones."""
    return folder / "refit.safetensors" if job.noise == REFIT else None


def score(folder: Path, job: Job) -> float:
    """Draw and judge the images of a finished run, write JOB-score.json; returns the seconds."""
    torch.set_num_threads(1)
    began, path = time.perf_counter(), folder / f"{job.name}-score.json"
    settings = settings_of(job) | {"prompts": SCORED_PROMPTS}
    if finished(path, settings):
        return 0.0
    world, _ = shared(folder)
    weights = base_of(folder, job) if job.arm == "base" else folder / f"{job.name}.safetensors"
    numbers = sft_vs_soar.chosen(world, SCORED_PROMPTS)
    images = sft_vs_soar.sample(world, load_base(world, weights), numbers, 1, job.seed)
    correct = [score_image(x, world.prompts[i])[0] for i, (x,) in zip(numbers, images)]
    result = {"settings": settings, "commit": commit(), "correct": correct}
    save_whole(json.dumps(result) + "\n", path)
    return time.perf_counter() - began


def settings_of(job: Job) -> dict:
    arm = ARMS.get(job.arm)
    own = {key: str(x) for key, x in vars(arm.config).items()} | {"steps": arm.steps} if arm else {}
    counts = [PAIRS, QUARTER_PAIRS, WALKED_PAIRS, SAMPLED]
    shared = {"setting": dataclasses.asdict(SETTING), "levels": LEVELS, "counts": counts}
    return json.loads(json.dumps({"job": job._asdict(), "arm": own, **shared}))


def run(folder: Path, job: Job) -> float:
    """Train, measure, write JOB.json and the weights; returns the seconds it took."""
    torch.set_num_threads(1)
    began, path = time.perf_counter(), folder / f"{job.name}.json"
    if finished(path, settings_of(job)):
        return 0.0
    whole, pairs = shared(folder)
    world, arm = part(whole, job.size, job.noise), ARMS.get(job.arm)
    base = base_of(folder, job)
    transformer = load_base(whole, base)
    kept = train(world, arm, SETTING, job.seed, base) if arm else {0: transformer.state_dict()}
    *quarters, last = sorted(kept)
    velocity = make_velocity(transformer, CPU, False)
    result = {"settings": settings_of(job), "commit": commit(), "quarters": {}}
    for step in quarters:
        transformer.load_state_dict(kept[step])
        result["quarters"][step] = by_level(velocity, pairs.first(QUARTER_PAIRS))
    transformer.load_state_dict(kept[last])
    result["levels"] = by_level(velocity, pairs)
    result["own"] = by_level(velocity, own_pairs(world, QUARTER_PAIRS))
    result["trajectory"] = trajectories(whole, velocity, pairs.first(WALKED_PAIRS))
    if job.size < WHOLE:
        own = own_pairs(world, SAMPLED)
        samples = walk(whole, velocity, own.z1, own.cond, 0, GUIDANCES[-1])
        result["by_heart"] = by_heart(samples, scaled(whole, world.mean), scaled(whole, whole.mean))
    if arm:
        save_tensors(kept[last], path.with_suffix(".safetensors"))
    result["seconds"] = time.perf_counter() - began
    save_whole(json.dumps(result) + "\n", path)
    return result["seconds"]


def main(args: Args) -> None:
    from experiments.shapes import levels_table  # matplotlib is needed there only

    args.output_dir.mkdir(parents=True, exist_ok=True)
    world, _ = shared(args.output_dir)  # encoded before the processes start
    jobs = [] if args.collect else plan(args)
    if any(job.noise == REFIT for job in jobs):
        refit(world, args.output_dir / "refit.safetensors")
    pool = ProcessPoolExecutor(args.num_processes, multiprocessing.get_context("spawn"))
    scored = [job for group in SCORED for job in jobs if job.group == group]
    with pool:
        for work, some in ((run, jobs), (score, scored)):
            futures = {pool.submit(work, args.output_dir, job): job.name for job in some}
            for future in tqdm(as_completed(futures), work.__name__, len(some), unit="run"):
                tqdm.write(f"{futures[future]}: {future.result():.0f} s")
    levels_table.save(args.output_dir)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
