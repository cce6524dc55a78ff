"""How far SOAR's auxiliary terms are from SFT terms, and whether training on them helps more off the path than on it.

    python -m experiments.off_path output/sft_vs_soar/quick --arms base sft soar sft_steps

On held-out pairs of the shapes world, states z' are made by soar.py from rollouts of the base model, and each arm's
weights (of seed 0) are asked for the velocity there. Mean squared errors, over pairs, points and latents:
    sft      of the base term, at sigma0
    off      of the auxiliary terms: at z', against v_corr
    on       of SFT terms at the same sigma', at the ideal state, against z1 - z0
    blind    of the velocity at the ideal state, against v_corr: of a model that does not see that it is off
    target   of v_corr against z1 - z0: what tells an auxiliary term's target from an SFT term's
off - on is what being off the path costs, blind - off what the model mends of it. All of it for
rollout steps of 1 / K in t, by default three K. experiments/exposure.py measures the same on a model
of your own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.exposure import ERRORS, errors_at, points_of
from experiments.sft_vs_soar import CPU, World, held_out, load_base, load_world
from sample import save_whole, seeded
from soar import SoarConfig, draw, sft_loss, sigma_from_t
from train import make_velocity


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """Of a finished setting of experiments.sft_vs_soar."""
    arms: tuple[str, ...] = ("base", "sft", "soar", "sft_steps")
    num_sampling_steps: tuple[int, ...] = (40, 10, 4)
    """K of the rollout."""
    pairs: int = 96
    output_dir: Path | None = None
    """Where off_path.json is written, by default the folder."""

    def __post_init__(self):
        missing = [arm for arm in self.arms if arm != "base" and not (self.folder / f"{arm}-0.safetensors").is_file()]
        if missing:
            raise ValueError(f"--arms {missing[0]}: {self.folder / missing[0]}-0.safetensors is not there")
        if not self.num_sampling_steps or min(self.num_sampling_steps) < 1:
            raise ValueError(f"--num_sampling_steps is {self.num_sampling_steps}, expected numbers from 1 up")
        if self.pairs < 1:
            raise ValueError(f"--pairs is {self.pairs}, expected at least 1")


@torch.no_grad()
def measure(world: World, args: Args, num_sampling_steps: int) -> dict[str, dict[str, float]]:
    """{arm: {"sft", "off", "on", "blind", "target"}}, for one K."""
    config = SoarConfig(num_sampling_steps=num_sampling_steps)
    z0, cond = held_out(world, args.pairs)
    uncond = world.cond([""] * args.pairs)
    draws = draw(z0.shape, config, seeded("off_path"))
    sigma = sigma_from_t(draws.t, config.shift)

    def velocity_of(arm: str):
        model = load_base(world, None if arm == "base" else args.folder / f"{arm}-0.safetensors")
        return make_velocity(model, CPU, False)

    points = list(points_of(velocity_of("base"), z0, draws, cond, uncond, config))
    made = {}
    for arm in args.arms:
        velocity = velocity_of(arm)
        errors = [errors_at(velocity, point, cond) for point in points]
        mean = {name: float(torch.stack([x[name] for x in errors]).mean()) for name in ERRORS}
        row = {"sft": float(sft_loss(velocity, z0, draws.z1, sigma, cond).mean())}
        row |= {name: mean[name] for name in ("off", "on", "blind")}
        made[arm] = row | {"target": mean["shift"]}
    return made


def main(args: Args) -> None:
    world, made = load_world(args.folder / "world.safetensors"), {}
    for steps in args.num_sampling_steps:
        made[steps] = measure(world, args, steps)
        for arm, row in made[steps].items():
            row = row | {"off - on": row["off"] - row["on"], "blind - off": row["blind"] - row["off"]}
            print(f"K = {steps:<3} {arm:<14} " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    output_dir = args.output_dir or args.folder
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {"pairs": args.pairs, "num_sampling_steps": made}
    save_whole(json.dumps(result, indent=1) + "\n", output_dir / "off_path.json")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
