"""Level by level: what SOAR changes in the velocity, on pairs that no training has seen.

    python -m experiments.shapes.levels     # all runs of GROUPS, then tables and a figure

Arms are those of sft_vs_soar.py, of 100 steps of 16 pairs where not said otherwise. Each is
measured at the same pairs and noise for all arms and seeds:
    levels      squared error of the velocity at LEVELS, to latents drawn from the VAE's posterior,
                as in training, and to its means
    trajectory  from the ideal state of a drawn latent at one of STARTS by the sampler's own last
                steps: squared error of where it ends, to the drawn latent and to the mean
    score       GenEval's, of 600 prompts, one image each; only of SCORED, after all other runs
REFIT starts from a base of its own: the committed one, trained 400 steps more as its last phase was
(build.py), on the posteriors' means in place of drawn latents.

A run (arm, seed, size of the set, its noise) is a file of its own, renamed when whole: the same
command goes on where it was killed. levels_table.py says what they say together.
"""

import copy
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from experiments.shapes import sft_vs_soar
from experiments.shapes.build import LATE_WRONG_CAPTIONS, drawn, mislabel, posterior, pretrain
from experiments.shapes.draw import BROAD, HELD_OUT, MAX_SEQUENCE_LENGTH, example, render
from experiments.shapes.sft_vs_soar import (
    CPU,
    ONE_POINT,
    SFT,
    Arm,
    World,
    keep,
    load_base,
    load_world,
    share_out,
)
from sample import encode_images, encode_prompts, seeded
from soar import guided_velocity, interpolate, rollout_step
from train import make_velocity

LEVELS = (0.1, 0.15, 0.25, 0.35, 0.55, 0.75, 0.9)
STARTS = (0.2, 0.35, 0.55, 0.75)  # the nearest levels of the sampler's steps are taken
GUIDANCES = (1.0, 4.5)
PAIRS, SLOPE_PAIRS, WALKED_PAIRS = 150, 24, 16
WHOLE = 2000
REFIT = "refit"  # in place of a noise: means, from the base that was trained on means
REFIT_SCENES, REFIT_STEPS = 8000, 400
SCORED, SCORED_PROMPTS = ("2000-refit", "2000-0"), 600  # groups, in this order
FIRST = "2000-vae"  # a group: pairs of the training set and their latents' noise
SETTING = sft_vs_soar.QUICK
LAWS = ("drawn", "mean")


N1 = "SOAR, N = 1, lambda = 6"
NO_ROLLOUT = replace(ONE_POINT, num_sampling_steps=10**6, guidance_scale=1.0)
PLAIN = ("sft", "soar_n1_l6", "soar", "sft_steps", "soar_n1_l6_steps", "soar_k1e6")
ARMS = {name: sft_vs_soar.ARMS[name] for name in PLAIN} | {
    "n1_still": Arm("its levels, no rollout", NO_ROLLOUT),
    "sft_7_3": Arm("SFT, 7/3 of the steps", SFT, steps=7 / 3),
    "n1_w1": Arm(f"{N1}, w = 1", replace(ONE_POINT, guidance_scale=1.0)),
    "n1_k20": Arm(f"{N1}, K = 20", replace(ONE_POINT, num_sampling_steps=20)),
    "n1_k100": Arm(f"{N1}, K = 100", replace(ONE_POINT, num_sampling_steps=100)),
    "n1_l1": Arm("SOAR, N = 1, lambda = 1", replace(ONE_POINT, lambda_aux=1.0)),
    "n1_l3": Arm("SOAR, N = 1, lambda = 3", replace(ONE_POINT, lambda_aux=3.0)),
    "n1_l12": Arm("SOAR, N = 1, lambda = 12", replace(ONE_POINT, lambda_aux=12.0)),
    "n1_u1.5": Arm(f"{N1}, ratio 1.5", replace(ONE_POINT, sigma_upper_ratio=1.5)),
}
SEEDS = (0, 1, 2)
CHEAP = ("sft", "soar_n1_l6", "n1_still", "sft_7_3")
DEAR = ("soar", "sft_steps", "soar_n1_l6_steps", "soar_k1e6")
OTHERS = ("n1_w1", "n1_k20", "n1_k100", "n1_l1", "n1_l3", "n1_l12", "n1_u1.5")
GROUPS = (  # pairs, std of the latents' noise (None: the VAE's own) or REFIT, arms
    (WHOLE, None, (*CHEAP, *DEAR, *OTHERS)),
    (WHOLE, REFIT, CHEAP),
    (WHOLE, 0.0, CHEAP),
    (64, None, (*CHEAP, *DEAR)),
    (WHOLE, 0.05, CHEAP),
    (256, None, CHEAP),
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


def plan() -> list[Job]:
    """All runs, in the order of GROUPS."""
    jobs = [Job("base", 0, WHOLE, noise) for noise in (None, REFIT)]
    for size, noise, arms in GROUPS:
        jobs += [Job(arm, seed, size, noise) for seed in SEEDS for arm in arms]
    return jobs


def scored_jobs() -> list[Job]:
    return [job for group in SCORED for job in plan() if job.group == group]


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
def trajectories(world: World, velocity, pairs: Pairs) -> dict[str, dict]:
    """{"GUIDANCE from START": {law: errors by pair}}, from states of drawn latents."""
    count, made = len(pairs.z1), {}
    uncond = world.cond([""] * count)
    world.pipe.scheduler.set_timesteps(sft_vs_soar.SAMPLING_STEPS)
    sigmas = world.pipe.scheduler.sigmas[:, None].expand(-1, count)
    for level, guidance in product(STARTS, GUIDANCES):
        start = int((sigmas[:, 0] - level).abs().argmin())
        z = interpolate(pairs.z0["drawn"], pairs.z1, sigmas[start])
        for sigma, sigma_next in zip(sigmas[start:], sigmas[start + 1 :]):
            v = velocity(z, sigma, pairs.cond)
            if guidance != 1:
                v = guided_velocity(velocity(z, sigma, uncond), v, guidance)
            z = rollout_step(z, v, sigma, sigma_next)
        made[f"{guidance:g} from {level:g}"] = {law: square(z - pairs.z0[law]) for law in LAWS}
    return made


# --- Runs ---


@cache
def shared(folder: Path) -> tuple[World, Pairs]:
    world = load_world(folder / "world.safetensors")
    return world, held_out(world, PAIRS)


def part(world: World, size: int, noise: float | str | None) -> World:
    """The first `size` pairs, their posteriors' noise scaled to a root mean square of `noise`."""
    std = world.std
    if noise is not None:  # scaled as the transformer sees it
        own = float(std.square().mean().sqrt()) * world.pipe.vae.config.scaling_factor
        std = std * (0.0 if noise == REFIT else noise) / own
    return world._replace(mean=world.mean[:size], std=std[:size], caption=world.caption[:size])


def refit(world: World, path: Path) -> None:
    """Write the weights of REFIT's base, unless they are there."""
    if path.is_file():
        return
    pixels, captions = drawn(BROAD, REFIT_SCENES)
    captions = mislabel(captions, LATE_WRONG_CAPTIONS, 0)
    mean, _ = posterior(world.pipe.vae, pixels)
    pipe = copy.copy(world.pipe)
    pipe.transformer = load_base()
    pretrain(pipe, mean, None, captions, REFIT_STEPS, 2, lr=5e-4)
    sft_vs_soar.save_tensors(pipe.transformer.state_dict(), path)


def base_of(folder: Path, job: Job) -> Path | None:
    """The weights that a run starts from, where they are not the committed ones."""
    return folder / "refit.safetensors" if job.noise == REFIT else None


def settings_of(job: Job) -> dict:
    """What the result of a run depends on, to be kept beside it."""
    counts = [PAIRS, WALKED_PAIRS, SCORED_PROMPTS]
    shared = {"setting": str(SETTING), "levels": list(LEVELS), "counts": counts}
    return {"run": str(job), "arm": str(ARMS.get(job.arm)), **shared}


def run(folder: Path, job: Job) -> float:
    """Train, measure, write JOB.json and the weights; returns the seconds it took."""
    return keep(folder / f"{job.name}.json", settings_of(job), lambda: measure(folder, job))


def measure(folder: Path, job: Job) -> dict:
    whole, pairs = shared(folder)
    base = base_of(folder, job)
    transformer = load_base(base)
    if arm := ARMS.get(job.arm):
        world = part(whole, job.size, job.noise)
        transformer = sft_vs_soar.train(world, arm, SETTING, job.seed, base)
        sft_vs_soar.save_tensors(transformer.state_dict(), folder / f"{job.name}.safetensors")
    velocity = make_velocity(transformer, CPU, False)
    return {
        "levels": by_level(velocity, pairs),
        "trajectory": trajectories(whole, velocity, pairs.first(WALKED_PAIRS)),
    }


def score(folder: Path, job: Job) -> float:
    """Draw and judge the images of a finished run, write JOB-score.json; returns the seconds."""
    weights = base_of(folder, job) if job.arm == "base" else folder / f"{job.name}.safetensors"

    def judge() -> dict:
        model = load_base(weights)
        found = sft_vs_soar.correct(shared(folder)[0], model, SCORED_PROMPTS, 1, job.seed)
        return {"correct": [bool(x) for (x,) in found]}

    return keep(folder / f"{job.name}-score.json", settings_of(job), judge)


def main(output_dir: Path = Path("output/levels"), num_processes: int = 2) -> None:
    """num_processes: runs at a time, each with one thread."""
    from experiments.shapes import levels_table  # which imports this

    output_dir.mkdir(parents=True, exist_ok=True)
    refit(shared(output_dir)[0], output_dir / "refit.safetensors")
    share_out(run, output_dir, {job.name: (job,) for job in plan()}, num_processes)
    share_out(score, output_dir, {job.name: (job,) for job in scored_jobs()}, num_processes)
    levels_table.save(output_dir)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
