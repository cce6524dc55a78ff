"""Finished folders of sample.py with random images, and score.py on them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.evaluate import score

PROTOCOL = {"pipeline": "p", "lora": None, "shift": 3.0, "sigmas": [1.0] * 40, "seed": 42}
PROTOCOL |= {"num_inference_steps": 40, "guidance_scale": 4.5, "height": 512, "width": 512}
PROTOCOL |= {"max_sequence_length": 77, "mixed_precision": "bf16", "torch": "2.14.1"}


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours, as noise would not survive resizing."""
    small = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))[None]
    pixels = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())


def make_folder(
    path: Path, prompts: list[str], images: int = 2, look: int = 0, rows: tuple = (), **protocol
) -> Path:
    """Each from weights of its own; rows: the lines of the prompt file, if they hold more."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    own = {"from": {"transformer": path.name}, "transformer": path.name}
    (path / "protocol.json").write_text(json.dumps(own | PROTOCOL | protocol))
    for i, prompt in enumerate(prompts):
        for j in range(images):
            file = f"{i:05d}/samples/{j:05d}.png"
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            picture(100 * look + 10 * i + j, 32, 32).save(path / file)
            line = {"file": file, "prompt": prompt, "prompt_index": i, "image_index": j}
            lines.append(json.dumps(line | {"seed": 42}) + "\n")
        row = rows[i] if rows else {"prompt": prompt}
        (path / f"{i:05d}/metadata.jsonl").write_text(json.dumps(row) + "\n")
    (path / "samples.jsonl").write_text("".join(lines))
    return path


def run(*folders: Path, capsys=None, **fields) -> str:
    args = score.Args(folders=folders, device="cpu", **fields)
    score.main(args)
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
