"""Finished folders of sample.py with random images, and score.py on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.evaluate import score

PROTOCOL = {
    "pipeline": "p", "lora": None, "shift": 3.0, "sigmas": [1.0] * 40, "seed": 42,
    "num_inference_steps": 40, "guidance_scale": 4.5, "height": 512, "width": 512,
    "max_sequence_length": 77, "mixed_precision": "bf16", "torch": "2.14.1",
}  # fmt: skip


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours, as noise would not survive resizing."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_folder(path: Path, prompts: list, images: int = 2, look: int = 0, **protocol) -> Path:
    """Each from weights of its own; prompts: texts, or lines of a prompt file that hold more."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    own = {"from": {"transformer": path.name}, "transformer": path.name}
    (path / "protocol.json").write_text(json.dumps(own | PROTOCOL | protocol))
    for i, prompt in enumerate(prompts):
        row = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        (path / f"{i:05d}/samples").mkdir(parents=True, exist_ok=True)
        (path / f"{i:05d}/metadata.jsonl").write_text(json.dumps(row) + "\n")
        for j in range(images):
            file = f"{i:05d}/samples/{j:05d}.png"
            picture(100 * look + 10 * i + j, 32, 32).save(path / file)
            line = {"file": file, "prompt": row["prompt"], "prompt_index": i, "image_index": j}
            lines.append(json.dumps(line | {"seed": 42}) + "\n")
    (path / "samples.jsonl").write_text("".join(lines))
    return path


def run(*folders: Path, metrics: tuple = ("aesthetic",), capsys=None) -> str:
    score.main(score.Args(folders, metrics, device="cpu"))
    return capsys.readouterr().out if capsys else ""


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def values_of(folder: Path, name: str) -> list[float]:
    return [row[name] for row in summary_of(folder)["rows"]]


def entry(mean: float, error: float, of: str) -> dict:
    """A row's figures in scores.json."""
    return {"mean": pytest.approx(mean), "standard_error": pytest.approx(error), "of": of}


def cells(printed: str, name: str) -> list[str]:
    """Those of a metric's row in the table."""
    line = next(x for x in printed.splitlines() if x.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]
