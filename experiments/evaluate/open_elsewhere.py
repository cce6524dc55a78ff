"""Whether checkpoints of train.py open where Flow-GRPO and DiffusionNFT run: shown, not claimed.

    python -m experiments.evaluate.open_elsewhere                    # makes an environment, in a temp folder
    python -m experiments.evaluate.open_elsewhere --environment DIR  # keeps it there for the next time

Makes an environment with the versions that both repositories pin in setup.py (transformers 4.40.0,
diffusers 0.33.1, peft 0.10.0 and what these need; torch is ours), trains the shapes world's model
for some steps, once whole and once as a LoRA file, and opens the results there. Each line says
what was done and whether it did what experiments/evaluate/evaluation.md says; the exit code is 0 if all did.
Images are drawn here and there from the same noise, in float32 on the CPU. With the environment
made, 2 minutes on two cores. No weights or data are downloaded.

The shapes pipeline is first brought into the form of Stable Diffusion 3.5's repository on the hub:
CLIP tokenizers as vocab.json and merges.txt, which transformers 5 no longer writes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both are read at import
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import numpy as np
import torch
import transformers
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS
from sample import checkpoints

ROOT = Path(__file__).parents[2]
PINS = (
    "torch==2.13.0", "transformers==4.40.0", "diffusers==0.33.1", "peft==0.10.0",
    "accelerate==1.4.0", "huggingface-hub==0.29.1", "tokenizers==0.19.1", "numpy==1.26.4",
    "pillow==10.4.0", "sentencepiece",
)  # fmt: skip
DRAW = """
import sys, torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
folder, transformer, lora, file, length = sys.argv[1:]
parts = {}
if transformer:
    parts["transformer"] = SD3Transformer2DModel.from_pretrained(transformer)
pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
if lora:
    pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
pipe.set_progress_bar_config(disable=True)
pipe(
    "a photo of a red circle", num_inference_steps=8, guidance_scale=4.5, height=64, width=64,
    max_sequence_length=int(length), generator=torch.Generator().manual_seed(0),
).images[0].save(file)
"""


@dataclass(frozen=True)
class Args:
    environment: Path | None = None
    """Where to make the environment, or find the one that an earlier run made there; by default a
    temporary folder."""
    steps: int = 3
    """Training steps of both runs."""


def run(command: list, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, **options)


def make_environment(folder: Path, pins: tuple[str, ...], alone: tuple[str, ...] = ()) -> Path:
    """The Python of an environment with pins, and with alone, whose own requirements are left out.

    Raises RuntimeError: pip failed."""
    python = folder / "bin/python"
    done = folder / "pins.json"
    if not done.is_file() or json.loads(done.read_text()) != [*pins, *alone]:
        print(f"making {folder}: {' '.join((*pins, *alone))}", flush=True)
        run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "-q"]
        for words in (pins, ("--no-deps", *alone)) if alone else (pins,):
            made = run([*install, *words])
            if made.returncode:
                raise RuntimeError(f"pip install {' '.join(words)}: {made.stderr[-2000:]}")
        done.write_text(json.dumps([*pins, *alone]))
    return python


def as_downloaded(source: Path, folder: Path) -> Path:
    """A copy of a pipeline that transformers 5 wrote, its tokenizers in the files that the hub's
    repository has: vocab.json and merges.txt for CLIP, tokenizer.json for T5."""
    shutil.copytree(source, folder)
    for name in ("tokenizer", "tokenizer_2"):
        whole = folder / name / "tokenizer.json"
        model = json.loads(whole.read_text())["model"]
        (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [" ".join(pair) + "\n" for pair in model["merges"]]
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "".join(merges))
        whole.unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def with_transformer(base: Path, transformer: Path, folder: Path) -> Path:
    """A copy of a pipeline with another transformer/."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(transformer, folder / "transformer")
    return folder


def train(folder: Path, steps: int, *flags: str) -> Path:
    """A run of train.py on the shapes world. Returns its last checkpoint; raises RuntimeError."""
    command = [sys.executable, "train.py", "--output_dir", folder, "--max_train_steps", steps]
    command += ["--pretrained_model_name_or_path", DATA / "model", "--dataset", PAIRS]
    command += ["--resolution", 64, "--max_sequence_length", MAX_SEQUENCE_LENGTH]
    command += ["--mixed_precision", "no", *flags]
    done = run(command)
    if done.returncode:
        raise RuntimeError(f"train.py: {done.stderr[-2000:]}")
    return checkpoints(folder)[-1]


class Drawer:
    """Draws one image with a Python and says why it could not."""

    def __init__(self, python: str | Path, folder: Path):
        self.python, self.folder = python, folder
        folder.mkdir()

    def __call__(self, pipeline: Path, transformer: Path | str = "", lora: Path | str = ""):
        """Pixels (64, 64, 3) from 0 to 255, or the last line of the error."""
        file = self.folder / "image.png"
        file.unlink(missing_ok=True)
        words = [self.python, "-c", DRAW, pipeline, transformer, lora, file, MAX_SEQUENCE_LENGTH]
        done = run(words)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return np.array(Image.open(file).convert("RGB")).astype(int)


def apart(a, b) -> float:
    """The largest difference in grey levels; infinite if one could not be drawn."""
    if isinstance(a, str) or isinstance(b, str):
        return float("inf")
    return float(abs(a - b).max())


def report(passed: bool, text: str) -> bool:
    print(f"{'as said' if passed else 'NOT AS SAID'}: {text}", flush=True)
    return passed


def check_whole(base: Path, final: Path, work: Path, here: Drawer, there: Drawer) -> bool:
    """A run that trained all weights."""
    ours, original = here(base, final / "transformer"), here(base)
    moved = apart(ours, original)
    there_base = apart(there(base), original)
    ok = report(there_base <= 1, f"the base as downloaded opens there; {there_base:.0f} levels off")
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.transformer = SD3Transformer2DModel.from_pretrained(final / "transformer")
    pipe.save_pretrained(work / "saved")
    error = there(work / "saved")
    text = f"a pipeline written by save_pretrained does not open there: {error}"
    ok &= report(isinstance(error, str), text)
    folder = with_transformer(base, final / "transformer", work / "copied")
    off = apart(there(folder), ours)
    text = "a copy of the base with our transformer/ opens there"
    ok &= report(off <= 1 < moved, f"{text}; {off:.0f} levels off, training moved {moved:.0f}")
    off = apart(there(base, final / "transformer"), ours)
    return ok & report(off <= 1, f"our transformer/ alone opens there; {off:.0f} levels off")


def lora_pipeline(base: Path, lora: Path, dtype: torch.dtype = torch.float32):
    pipe = StableDiffusion3Pipeline.from_pretrained(base, dtype=dtype)
    pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    return pipe


def check_lora(base: Path, final: Path, work: Path, here: Drawer, there: Drawer) -> bool:
    """A run with --lora_rank."""
    ours, original = here(base, lora=final), here(base)
    moved = apart(ours, original)
    pipe = lora_pipeline(base, final)
    pipe.transformer.save_pretrained(work / "unfused")
    _, info = SD3Transformer2DModel.from_pretrained(work / "unfused", output_loading_info=True)
    missing = len(info["missing_keys"])
    text = "saved with the LoRA loaded, not fused, the transformer comes back with"
    ok = report(missing > 0, f"{text} {missing} tensors missing, so random")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(work / "fused")
    off = apart(there(with_transformer(base, work / "fused", work / "with_fused")), ours)
    text = "fuse_lora, unload_lora_weights, then saved: it opens there"
    ok &= report(off <= 1 < moved, f"{text}; {off:.0f} levels off, training moved {moved:.0f}")
    off = apart(there(base, lora=final), ours)
    ok &= report(off <= 1, f"the LoRA file itself opens there; {off:.0f} levels off")
    lost = lost_to_bf16(base, final)
    text = "fused in bf16, the LoRA's change is rounded; error over change, as norms:"
    return ok & report(lost > 0.01, f"{text} {lost:.2f}")


def lost_to_bf16(base: Path, lora: Path) -> float:
    """|bf16 weights with the LoRA fused - exact ones| / |the LoRA's change|, over the weights that
    it changes; the base in bf16 counts as exact."""
    before = lora_pipeline(base, lora, torch.bfloat16).transformer
    fused = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = lora_pipeline(base, lora, torch.bfloat16)
        pipe.transformer.to(dtype)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        fused.append(pipe.transformer.float().state_dict())
    exact, rounded = fused
    start = {name.replace(".base_layer", ""): x for name, x in before.float().state_dict().items()}
    changed = [name for name in exact if not torch.equal(exact[name], start[name])]
    error = sum((rounded[name] - exact[name]).square().sum() for name in changed)
    change = sum((exact[name] - start[name]).square().sum() for name in changed)
    return float((error / change).sqrt())


def main(args: Args) -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = make_environment((args.environment or work / "env").absolute(), PINS)
        base = as_downloaded(DATA / "model", work / "base")
        here, there = Drawer(sys.executable, work / "here"), Drawer(python, work / "there")
        whole = train(work / "whole", args.steps, "--learning_rate", "1e-3")
        ok = check_whole(base, whole, work, here, there)
        lora = train(work / "lora", args.steps, "--lora_rank", "4", "--learning_rate", "1e-2")
        ok &= check_lora(base, lora, work, here, there)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
