"""The variance of SOAR's gradient with the N levels sigma' of a sample drawn independently, as published, or
stratified: one in each N-th of [sigma1, 1]. Both have the same expectation.

    python -m experiments.gradient_variance --num_aux_points 6
    python -m experiments.gradient_variance --same_loss 1 2 3 6

The second compares N = 1, 2, 3, 6 with lambda = 6 / N, which have one expected gradient, by its
variance over all that is random in a step; each N sees the same pairs, z1 and t.

On the shapes world's base model, with the pairs and random numbers of train.py, in two ways: over all that is random in
a step (pairs, z1, t, sigma'), which is what training sees; and over sigma' alone, the rest held. A variance is the sum
of all parameters' variances over the repeats; ratios have 95 % intervals by a bootstrap over repeats.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from experiments.sft_vs_soar import CPU, World, load_base, load_world, step_inputs
from sample import save_whole, seeded
from soar import Draws, SoarConfig, draw, soar_terms
from train import make_velocity


@dataclass(frozen=True)
class Args:
    num_aux_points: int = 6
    """N."""
    batch_size: int = 16
    repeats: int = 48
    """Gradients in each of the four ways."""
    same_loss: tuple[int, ...] = ()
    """Compare these N instead, at lambda = 6 / N."""
    weights: Path | None = None
    """A finished run's weights of experiments.sft_vs_soar, in place of the base."""
    output_dir: Path = Path("output/gradient_variance")

    def __post_init__(self):
        for name, least in (("num_aux_points", 1), ("batch_size", 1), ("repeats", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least {least}")
        if self.same_loss and (len(self.same_loss) < 2 or min(self.same_loss) < 1):
            raise ValueError(f"--same_loss is {self.same_loss}, expected two or more N from 1 up")


def stratify(draws: Draws) -> Draws:
    """The same draws with point n of N in the n-th part of its range: u (M, N, B) becomes (n + u) / N."""
    parts = draws.u.shape[1]
    return draws._replace(u=(draws.u + torch.arange(parts)[:, None]) / parts)


def gradient(transformer, inputs: tuple, config: SoarConfig) -> Tensor:
    """The gradient of a step's whole loss, flat, in float32."""
    transformer.zero_grad()
    for term in soar_terms(make_velocity(transformer, CPU, False), *inputs, config):
        term.loss.backward()
    return torch.cat([x.grad.flatten() for x in transformer.parameters()])


def squared_distances(gradients: Tensor) -> np.ndarray:
    """(R, R) of gradients (R, P), in float64: all that variances and their bootstrap need."""
    x = gradients.double() - gradients.double().mean(0)
    gram = x @ x.T
    return (gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram).numpy()


def variance(distances: np.ndarray, rows: np.ndarray | None = None) -> float:
    """The sum of the parameters' sample variances; over the resample `rows`, leaving out pairs of a row with itself."""
    d = distances if rows is None else distances[np.ix_(rows, rows)]
    apart = ~np.eye(len(d), dtype=bool) if rows is None else rows[:, None] != rows[None]
    return float(d[apart].mean() / 2)


def measure(world: World, args: Args) -> dict:
    """{"all", "levels"}: variances independent and stratified, their ratio and its interval."""
    config = SoarConfig(num_aux_points=args.num_aux_points)
    transformer = load_base(world, args.weights).requires_grad_(True).train()
    held, made = step_inputs(world, config, 0, 1, args.batch_size), {}
    for over in ("all", "levels"):
        gradients = {"independent": [], "stratified": []}
        for repeat in tqdm(range(args.repeats), desc=f"gradients over {over}"):
            inputs = step_inputs(world, config, 0, repeat + 1, args.batch_size)
            if over == "levels":
                u = draw(held[0].shape, config, seeded("gradient_variance", repeat)).u
                inputs = (held[0], held[1]._replace(u=u), *held[2:])
            gradients["independent"].append(gradient(transformer, inputs, config))
            inputs = (inputs[0], stratify(inputs[1]), *inputs[2:])
            gradients["stratified"].append(gradient(transformer, inputs, config))
        distances = {name: squared_distances(torch.stack(x)) for name, x in gradients.items()}
        row = {name: variance(d) for name, d in distances.items()}
        rng, ratios = np.random.default_rng(0), []
        for rows in rng.integers(args.repeats, size=(2000, args.repeats)):  # paired: the same repeats in both
            ratios.append(variance(distances["stratified"], rows) / variance(distances["independent"], rows))
        low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
        made[over] = row | {"ratio": row["stratified"] / row["independent"], "low": low, "high": high}
    return made


def measure_same_loss(world: World, args: Args) -> dict:
    """{N: variance at lambda = 6 / N, its ratio to the last N's and the ratio's interval, units of
    a step}."""
    transformer = load_base(world, args.weights).requires_grad_(True).train()
    distances = {}
    for points in args.same_loss:
        config = SoarConfig(num_aux_points=points, lambda_aux=6 / points)
        gradients = []
        for repeat in tqdm(range(args.repeats), desc=f"gradients of N = {points}"):
            inputs = step_inputs(world, config, 0, repeat + 1, args.batch_size)
            gradients.append(gradient(transformer, inputs, config))
        distances[points] = squared_distances(torch.stack(gradients))
    last = distances[args.same_loss[-1]]
    resamples = np.random.default_rng(0).integers(args.repeats, size=(2000, args.repeats))
    made = {}
    for points, d in distances.items():
        ratios = [variance(d, rows) / variance(last, rows) for rows in resamples]
        low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
        row = {"variance": variance(d), "ratio": variance(d) / variance(last)}
        made[points] = row | {"low": low, "high": high, "units": 3 * points + 4}
    return made


def main_same_loss(args: Args) -> None:
    result = measure_same_loss(load_world(args.output_dir / "world.safetensors"), args)
    for points, row in result.items():
        print(f"N = {points}, lambda = {6 / points:g}: variance {row['variance']:.3e}, "
              f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) of the last one's, "
              f"a step of {row['units']} units")  # fmt: skip
    settings = {"batch_size": args.batch_size, "repeats": args.repeats}
    text = json.dumps(settings | {"N": result}, indent=1)
    save_whole(text + "\n", args.output_dir / "gradient_variance_same_loss.json")


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.same_loss:
        main_same_loss(args)
        return
    result = measure(load_world(args.output_dir / "world.safetensors"), args)
    for over, row in result.items():
        print(f"over {over}: independent {row['independent']:.3e}, stratified {row['stratified']:.3e}, "
              f"ratio {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})")  # fmt: skip
    text = json.dumps({"num_aux_points": args.num_aux_points, "batch_size": args.batch_size, **result}, indent=1)
    save_whole(text + "\n", args.output_dir / f"gradient_variance_n{args.num_aux_points}.json")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
