"""Whether checkpoints of train.py open where Flow-GRPO and DiffusionNFT run: shown, not claimed.

    python -m experiments.evaluate.open_elsewhere

Makes an environment with the versions that both repositories pin in setup.py, torch apart, trains
the shapes world's model for 3 steps, once whole and once as a LoRA file, and opens the results
there. Each line says whether what evaluation.md says is so; the exit code is 0 if all is. Images
are drawn here and there from the same noise, in float32 on the CPU: 2 minutes on two cores, and the
installation. No weights or data are downloaded: the shapes pipeline is first brought into the form
of Stable Diffusion 3.5's repository, whose CLIP tokenizers are vocab.json and merges.txt.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both are read at import
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from experiments.environment import ROOT, environment, run
from sample import checkpoints

DATA = ROOT / "experiments/shapes/data"
TOKENS = 12  # of the shapes world's longest caption
PINS = (
    "torch==2.13.0", "transformers==4.40.0", "diffusers==0.33.1", "peft==0.10.0",
    "accelerate==1.4.0", "huggingface-hub==0.29.1", "tokenizers==0.19.1", "numpy==1.26.4",
    "pillow==10.4.0", "sentencepiece",
)  # fmt: skip
FILE = "pytorch_lora_weights.safetensors"
DRAW = f"""
import sys
import torch
from diffusers import StableDiffusion3Pipeline
folder, lora, file = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(folder)
if lora:
    pipe.load_lora_weights(lora, weight_name="{FILE}")
pipe.set_progress_bar_config(disable=True)
pipe(
    "a photo of a red circle", num_inference_steps=8, guidance_scale=4.5, height=64, width=64,
    max_sequence_length={TOKENS}, generator=torch.Generator().manual_seed(0),
).images[0].save(file)
"""


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


def train(folder: Path, *flags: str) -> Path:
    """The last checkpoint of 3 steps of train.py on the shapes world."""
    command = [sys.executable, "train.py", "--output_dir", folder, "--max_train_steps", 3]
    command += ["--pretrained_model_name_or_path", DATA / "model"]
    command += ["--dataset", DATA / "train.parquet", "--resolution", 64]
    run(*command, "--max_sequence_length", TOKENS, "--mixed_precision", "no", *flags)
    return checkpoints(folder)[-1]


def draw(python: str | Path, pipeline: Path, lora: Path | str = "") -> np.ndarray:
    """Pixels (64, 64, 3), 0 to 255."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.png")
        run(python, "-c", DRAW, pipeline, lora, file)
        return np.array(Image.open(file)).astype(int)


def compare(python: Path, work: Path) -> bool:
    """Each statement of evaluation.md on reward-based training."""

    def report(passed: bool, text: str) -> bool:
        print(f"{'as said' if passed else 'NOT AS SAID'}: {text}", flush=True)
        return passed

    def alike(what: str, here: np.ndarray, there: np.ndarray) -> bool:
        off, moved = abs(there - here).max(), abs(here - original).max()
        text = f"{what} opens there; {off} grey levels off, {moved} from the base's image"
        return report(off <= 1 and (moved > 1 or here is original), text)

    base = as_downloaded(DATA / "model", work / "base")
    original = draw(sys.executable, base)
    ok = alike("the base as downloaded", original, draw(python, base))

    whole = train(work / "whole", "--learning_rate", "1e-3") / "transformer"
    copied = with_transformer(base, whole, work / "copied")
    ours = draw(sys.executable, copied)
    ok &= alike("a copy of the base with our transformer/", ours, draw(python, copied))
    StableDiffusion3Pipeline.from_pretrained(copied).save_pretrained(work / "saved")
    error = None
    try:
        draw(python, work / "saved")
    except RuntimeError as raised:
        error = str(raised).splitlines()[-1]
    ok &= report(error is not None, f"what save_pretrained writes does not open there: {error}")

    lora = train(work / "lora", "--lora_rank", "4", "--learning_rate", "1e-2")
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_lora_weights(lora, weight_name=FILE)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(work / "fused")
    fused = with_transformer(base, work / "fused", work / "with_fused")
    ok &= alike("a fused LoRA", draw(sys.executable, base, lora), draw(python, fused))
    return ok


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sys.exit(0 if compare(environment(work / "environment", PINS), work) else 1)
