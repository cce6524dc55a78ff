"""SFT and SOAR on the shapes world from end to end, by the commands that a user types.

    python -m experiments.demo

Trains the small Stable Diffusion 3 pipeline of experiments/shapes/data with two processes, by SFT
and by SOAR, for equally many steps. Draws prompts of held-out scenes with the base and both trained
transformers from the same noise, and prints GenEval's table for the three.
OUTPUT_DIR/images/compare.png shows them side by side: base, SFT, SOAR. Every command is printed
before it runs.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import sample
from experiments.environment import ROOT
from experiments.shapes.detect import score_folder
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS
from sample import visible

MODEL = {
    "pretrained_model_name_or_path": DATA / "model", "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "mixed_precision": "no",
}  # fmt: skip
# The pipeline is made for a CPU; two processes could not share a GPU. Nothing is downloaded.
ENV = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Args:
    output_dir: Path = Path("output/demo")
    """Must be empty or new."""
    max_train_steps: int = 100
    """Of SFT and of SOAR, whose steps, with N = 1 and lambda = 6, take 2.3 times as long."""
    num_prompts: int = 120
    """Held-out prompts to score, at most 600, taken evenly from the six tasks; one image each."""
    num_inference_steps: int = 40

    def __post_init__(self):
        if visible(self.output_dir):
            raise ValueError(f"--output_dir {self.output_dir} is not empty, expected a new one")
        if not 6 <= self.num_prompts <= 600:
            raise ValueError(f"--num_prompts is {self.num_prompts}, expected 6 to 600")


def run(script: str, **flags) -> None:
    """Run a script of the repository with two processes; raises CalledProcessError if it fails."""
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", os.path.relpath(ROOT / script)]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    print("\n$", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    subprocess.run(command, env=os.environ | ENV, check=True)


def main(args: Args) -> None:
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    prompts = (DATA / "prompts.jsonl").read_text().splitlines()
    chosen = [prompts[i * len(prompts) // args.num_prompts] for i in range(args.num_prompts)]
    (output / "prompts.jsonl").write_text("\n".join(chosen) + "\n")

    seconds = {}
    for name, lambda_aux in {"sft": 0.0, "soar": 6.0}.items():
        run(
            "train.py", dataset=PAIRS, output_dir=output / name, lambda_aux=lambda_aux,
            num_aux_points=1, resolution=64, train_batch_size=16, learning_rate=1e-4,
            max_train_steps=args.max_train_steps, logging_steps=1, **MODEL,
        )  # fmt: skip
        lines = (output / name / "metrics.jsonl").read_text().splitlines()  # one per step
        seconds[name] = sum(json.loads(line)["step_seconds"] for line in lines)

    flags = MODEL | {
        "prompts": output / "prompts.jsonl", "output_dir": output / "images",
        "transformer": ("base", str(output / "sft"), str(output / "soar")), "height": 64,
        "width": 64, "num_images_per_prompt": 1, "batch_size": 20,
        "num_inference_steps": args.num_inference_steps,
    }  # fmt: skip
    run("sample.py", **flags)
    jobs = sample.plan(sample.Args(**flags), [])

    scores = {}
    for name, job in zip(("base", "SFT", "SOAR"), jobs):
        scores[name] = score_folder(job.folder)
    (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(
        f"\n{'GenEval task':<14} {'base':>7} {'SFT':>7} {'SOAR':>7}   of {args.num_prompts} prompts"
    )
    for task in scores["base"]:
        print(f"{task:<14}", *(f"{found[task]:7.1%}" for found in scores.values()))
    right = [
        [json.loads(x)["correct"] for x in (job.folder / "results.jsonl").open()]
        for job in jobs[1:]
    ]
    alone = [sum(one and not other for one, other in zip(*pair)) for pair in (right, right[::-1])]
    print(f"SFT alone is right on {alone[0]} prompts, SOAR alone on {alone[1]}")
    print(
        f"{args.max_train_steps} steps took {seconds['sft']:.0f} s with SFT,"
        f" {seconds['soar']:.0f} s with SOAR"
    )
    print(f"{output / 'images/compare.png'}: from the left base, SFT, SOAR")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
