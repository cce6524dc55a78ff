"""What the tests of sample.py share: a run on the small pipeline of experiments/shapes/data."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sample
from experiments.shapes.draw import DATA
from experiments.tests.common import MODEL, raises

CPU = torch.device("cpu")
BASE = DATA / "model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE = MODEL | {
    "height": 64, "width": 64, "num_images_per_prompt": 2, "num_inference_steps": 2, "seed": 3,
}  # fmt: skip
ONE = SAMPLE | {"prompt": "a photo of a red circle", "num_images_per_prompt": 1}
FIRST = "00000/samples/00000.png"


def run(output_dir: Path, **flags) -> Path:
    torch.set_num_threads(1)  # as in a launched process
    try:
        sample.main(sample.Args(output_dir=output_dir, **flags))
    finally:
        if torch.distributed.is_initialized():  # it raised
            torch.distributed.destroy_process_group()
    return output_dir


def refused(output_dir: Path, *words: str, kind=ValueError, **flags) -> str:
    """The message, with these words, with which a run is refused."""
    with raises(kind, *words) as caught:
        run(output_dir, **flags)
    return str(caught.value)


def planned(transformer: str = "base", **flags) -> sample.Job:
    """What a run would do, without a model."""
    args = sample.Args(transformer=(transformer,), **ONE | {"output_dir": Path("out")} | flags)
    return sample.plan(args, [{"prompt": args.prompt}])[0]


def write_prompts(path: Path, texts: list[str]) -> dict:
    """ONE's flags for a file of these prompts."""
    path.write_text("".join(f"{text}\n" for text in texts))
    return ONE | {"prompt": None, "prompts": path}


def contents(folder: Path) -> dict[str, bytes]:
    """What a run writes, by relative path. Hidden files, such as its lock, are no part of it."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in shown}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def base_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(BASE, subfolder="transformer")


def write(tensors: dict[str, Tensor], path: Path, settings: str | None = None) -> Path:
    """A safetensors file; settings are peft's, where diffusers puts them."""
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": settings} if settings else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: x.clone().contiguous() for key, x in tensors.items()}, path, metadata=metadata)
    return path


def edit_weights(folder: Path, edit) -> None:
    """Apply edit to the tensors of the only file in a folder."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    write(tensors, file)


def scale_first(tensors: dict[str, Tensor]) -> None:
    """Other weights, of the same names and shapes."""
    name = min(name for name in tensors if name.endswith("weight"))
    tensors[name] = 0.5 * tensors[name]
