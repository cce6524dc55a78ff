"""How different the images of one prompt are, for two or more folders of sample.py; prints a table.

    python -m experiments.evaluate.diversity DIR_A DIR_B --features vae          # the latents of a Stable Diffusion 3 VAE
    python -m experiments.evaluate.diversity DIR_A DIR_B --features MODEL_DIR    # a vision model, such as DINOv2 or CLIP

Per prompt, over its images, then averaged over prompts: the Vendi score (arXiv 2210.02410) of the cosine kernel, 1 for
equal images and n for n mutually orthogonal ones; and the mean distance between two images. Features are centred on
the mean over all images of all folders, for what all images share, such as a background, would hide their differences.
Folders are compared on the prompts that they have in common, so their numbers depend on which are given together.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

from experiments.shapes.detect import detect
from experiments.shapes.draw import DATA, SIZE


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more folders of sample.py, each with two or more images a prompt."""
    features: str = "vae"
    """vae, or a path or hub id that transformers' AutoModel and AutoImageProcessor load: DINOv2, CLIP ..."""
    pretrained_model_name_or_path: str = str(DATA / "model")
    """The pipeline whose VAE is meant by --features vae: a path or hub id."""
    layouts: bool = False
    """Shapes world only: also count the distinct layouts of a prompt's images."""
    batch_size: int = 32
    """Images per forward."""


class Diversity(NamedTuple):
    vendi: float  # 1 to the number of images a prompt
    distance: float  # in units of the features
    layouts: float  # distinct ones a prompt; nan unless asked for
    prompts: int
    images: int  # a prompt


def vendi_score(features: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K / n, K the cosine kernel of features (n, D): 1 to n.
    A zero row is similar to nothing but itself. Source: arXiv 2210.02410, definition 3.1."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    kernel = unit @ unit.T
    np.fill_diagonal(kernel, 1.0)
    p = np.linalg.eigvalsh(kernel / len(kernel))
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance over the pairs of rows of features (n, D), n >= 2."""
    i, j = np.triu_indices(len(features), 1)
    return float(np.linalg.norm(features[i] - features[j], axis=1).mean())


def layout(image: Image.Image) -> tuple:
    """What experiments.shapes.detect sees: the sorted (shape, colour, cell of a 3 x 3 grid) of every object."""
    found = detect(image)
    cell = lambda a, b: min(int((a + b) / 2 * 3 / SIZE), 2)  # noqa: E731
    return tuple(sorted((f["shape"], f["color"], cell(*f["box"][::2]), cell(*f["box"][1::2])) for f in found))


def list_images(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The files NNNNN/samples/*.png by (NNNNN, prompt). Raises ValueError: fewer than 2 for a prompt."""
    found = {}
    for path in sorted(folder.glob("[0-9]*/samples")):
        prompt = json.loads((path.parent / "metadata.jsonl").read_text())["prompt"]
        found[path.parent.name, prompt] = sorted(path.glob("*.png"))
    few = [name for (name, _), paths in found.items() if len(paths) < 2]
    if not found or few:
        what = f"{folder / few[0]} has fewer than 2 images" if few else f"{folder} has no NNNNN/samples"
        raise ValueError(f"{what}; expected a folder of sample.py, made with --num_images_per_prompt 2 or more")
    return found


class Extractor:
    """Images -> features (n, D) float32, by a VAE's posterior mean or a vision model's pooled output.

    A model with text and image towers, as CLIP, gives its image embedding. Raises OSError: nothing is there that
    diffusers, or transformers, can load; ValueError: the model has no pooled output."""

    def __init__(self, args: Args):
        self.vae = args.features == "vae"
        if self.vae:
            options = {"subfolder": "vae", "use_safetensors": True, "torch_dtype": torch.float32}
            self.model = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, **options).eval()
        else:
            self.processor = AutoImageProcessor.from_pretrained(args.features)
            self.model = AutoModel.from_pretrained(args.features, use_safetensors=True).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        if self.vae:
            images = [ImageOps.fit(image, images[0].size) for image in images]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
            return self.model.encode(pixels / 127.5 - 1).latent_dist.mean.flatten(1).numpy()
        pixels = self.processor(images, return_tensors="pt")
        if hasattr(self.model, "get_image_features"):
            made = self.model.get_image_features(**pixels)
            return getattr(made, "pooler_output", made).float().numpy()
        made = getattr(self.model(**pixels), "pooler_output", None)
        if made is None:
            raise ValueError(f"--features: {type(self.model).__name__} gives no pooled output; DINOv2 and CLIP do")
        return made.flatten(1).float().numpy()


def measure(args: Args) -> dict[Path, Diversity]:
    """The diversity of each folder over the prompts that all of them have.

    Raises ValueError: fewer than two folders, no common prompt, or other numbers of images for one prompt."""
    if len(args.folders) < 2:
        raise ValueError(f"{len(args.folders)} folders were given, expected at least 2 to compare")
    found = {folder: list_images(folder) for folder in args.folders}
    names = sorted(set.intersection(*(set(x) for x in found.values())))
    if not names:
        raise ValueError(f"{', '.join(map(str, args.folders))} have no prompt in common")
    sizes = {len(x[name]) for x in found.values() for name in names}
    if len(sizes) > 1:
        raise ValueError(f"prompts have {min(sizes)} to {max(sizes)} images, expected the same number in all folders")
    extract, (n,), features, layouts = Extractor(args), sizes, {}, {}
    for folder, paths in found.items():
        flat = [path for name in names for path in paths[name]]
        images = [Image.open(path).convert("RGB") for path in flat]
        parts = [extract(images[i : i + args.batch_size]) for i in range(0, len(images), args.batch_size)]
        features[folder] = np.concatenate(parts).astype(np.float64)
        kinds = [layout(image) for image in images] if args.layouts else []
        counts = [len(set(kinds[i : i + n])) for i in range(0, len(kinds), n)]
        layouts[folder] = float(np.mean(counts)) if counts else float("nan")
    center = np.mean([x.mean(0) for x in features.values()], axis=0)
    result = {}
    for folder, x in features.items():
        groups = (x - center).reshape(len(names), n, -1)
        vendi, distance = np.mean([[vendi_score(g), mean_distance(g)] for g in groups], axis=0)
        result[folder] = Diversity(float(vendi), float(distance), layouts[folder], len(names), n)
    return result


def main(args: Args) -> None:
    print("| folder | prompts x images | Vendi score | mean distance | layouts |", "| --- " * 5 + "|", sep="\n")
    for folder, d in measure(args).items():
        layouts = f"{d.layouts:.2f}" if args.layouts else "not run"
        print(f"| {folder} | {d.prompts} x {d.images} | {d.vendi:.3f} | {d.distance:.3f} | {layouts} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
