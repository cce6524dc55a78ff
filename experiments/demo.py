"""SOAR on the shapes world from end to end, by the commands that a user types: train, sample, score, look.

    python -m experiments.demo

Trains the small Stable Diffusion 3 pipeline of experiments/shapes_data with two processes, draws the held-out prompts
with the base and the trained transformer from the same noise, scores both and writes OUTPUT_DIR/compare.png (left of
each pair: base, right: SOAR). Every command is printed before it runs. With --lambda_aux 0 the same trains SFT.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from diffusers.utils import make_image_grid
from PIL import Image

from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH, PAIRS, score_folder

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Args:
    output_dir: Path = Path("output/demo")
    """Must be empty or new."""
    max_train_steps: int = 120
    num_prompts: int = 240
    """Held-out prompts to score, at most 600, taken evenly from the six tasks; one image each."""
    num_inference_steps: int = 40
    learning_rate: float = 1e-4
    lambda_aux: float = 1.0
    seed: int = 42


def run(script: str, **flags) -> None:
    """Run a script of the repository with two processes; raises CalledProcessError if it fails."""
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print("\n$", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], cwd=ROOT, check=True)


def compare(left: Path, right: Path, pairs: int) -> Image.Image:
    """A sheet of image pairs, the first image of evenly spaced prompts of two folders of sample.py."""
    folders = sorted(path.name for path in left.iterdir() if path.name.isdigit())
    shown = folders[:: max(1, len(folders) // pairs)][:pairs]
    images = [Image.open(side / name / "samples" / "00000.png") for name in shown for side in (left, right)]
    columns = max(c for c in (2, 4, 6, 8) if len(images) % c == 0)
    return make_image_grid(images, len(images) // columns, columns, resize=128)


def main(args: Args) -> None:
    output = args.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise ValueError(f"--output_dir {args.output_dir} is not empty, expected a new one")
    prompts = (DATA / "prompts.jsonl").read_text().splitlines()
    chosen = [prompts[i * len(prompts) // args.num_prompts] for i in range(args.num_prompts)]
    (output / "prompts.jsonl").write_text("\n".join(chosen) + "\n")
    model = {"pretrained_model_name_or_path": DATA / "model", "max_sequence_length": MAX_SEQUENCE_LENGTH}
    model |= {"mixed_precision": "no", "seed": args.seed}
    run(
        "train.py", dataset=PAIRS, output_dir=output / "train", resolution=64, train_batch_size=16,
        max_train_steps=args.max_train_steps, learning_rate=args.learning_rate, lambda_aux=args.lambda_aux,
        dataloader_num_workers=0, **model,
    )  # fmt: skip
    scores = {}
    for name, transformer in {"base": {}, "trained": {"transformer": output / "train" / "final"}}.items():
        run(
            "sample.py", prompts=output / "prompts.jsonl", output_dir=output / name, height=64, width=64, batch_size=20,
            num_images_per_prompt=1, num_inference_steps=args.num_inference_steps, **transformer, **model,
        )  # fmt: skip
        scores[name] = score_folder(output / name, output / name / "results.jsonl")
    compare(output / "base", output / "trained", 16).save(output / "compare.png")
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"\n{'GenEval task':<14} {'base':>7} {'trained':>7}   of {args.num_prompts} prompts, one image each")
    for task in scores["base"]:
        print(f"{task:<14} {scores['base'][task]:7.1%} {scores['trained'][task]:7.1%}")
    print(f"{output / 'compare.png'}: base on the left of each pair, trained on the right")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
