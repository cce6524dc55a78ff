"""How different the images of one prompt are, for two or more folders of sample.py; prints a table.

    python -m experiments.evaluate.diversity DIR DIR                     # latents of SD3.5's VAE
    python -m experiments.evaluate.diversity DIR DIR --features DIR/vae  # of another pipeline's
    python -m experiments.evaluate.diversity DIR DIR --features facebook/dinov2-base

Per prompt, over its images, then averaged over prompts: the Vendi score (arXiv 2210.02410) of the
cosine kernel, 1 for equal images and n for n mutually orthogonal ones; and the mean distance
between two images. Features are centred on the mean over all images of all folders, for what all
images share, such as a background, would hide their differences. Folders are compared on the
prompts that they have in common, so their numbers depend on which are given together.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

BATCH = 32  # images in one forward


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more folders of sample.py, each with two or more images per prompt."""
    features: str = "stabilityai/stable-diffusion-3.5-medium/vae"
    """PIPELINE/vae, a pipeline's VAE; or a vision model of transformers, as DINOv2. Path or id."""


class Diversity(NamedTuple):
    vendi: float  # 1 to the number of images per prompt
    distance: float  # in units of the features
    prompts: int
    images: int  # per prompt


def vendi_score(features: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K / n, K the cosine kernel of features (n, D).

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


def list_images(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The files NNNNN/samples/*.png by (NNNNN, prompt)."""
    found = {}
    for samples in sorted(folder.glob("[0-9]*/samples")):
        prompt = json.loads((samples.parent / "metadata.jsonl").read_text())["prompt"]
        found[samples.parent.name, prompt] = sorted(samples.glob("*.png"))
    return found


class Extractor:
    """Images -> features (n, D) float32: a VAE's posterior mean, or a vision model's pooled output,
    which for a model of text and images, as CLIP, is its image embedding."""

    def __init__(self, features: str):
        """Raises OSError: nothing is there that can be loaded."""
        pipeline, _, part = features.rpartition("/")
        self.vae = part == "vae"
        if self.vae:
            options = {"subfolder": "vae", "use_safetensors": True, "torch_dtype": torch.float32}
            self.model = AutoencoderKL.from_pretrained(pipeline, **options).eval()
        else:
            self.processor = AutoImageProcessor.from_pretrained(features)
            self.model = AutoModel.from_pretrained(features, use_safetensors=True).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        if self.vae:
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            scaled = pixels.permute(0, 3, 1, 2) / 127.5 - 1
            return self.model.encode(scaled).latent_dist.mean.flatten(1).numpy()
        pixels = self.processor(images, return_tensors="pt")
        of_images = getattr(self.model, "get_image_features", self.model)
        return of_images(**pixels).pooler_output.flatten(1).float().numpy()


def measure(folders: tuple[Path, ...], features: str) -> dict[Path, Diversity]:
    """The diversity of each folder over the prompts that all of them have.

    Raises ValueError: no common prompt, or not the same number of images, 2 or more, of each."""
    found = {folder: list_images(folder) for folder in folders}
    names = sorted(set.intersection(*(set(x) for x in found.values())))
    if len(folders) < 2 or not names:
        raise ValueError(f"expected 2 or more folders with a common prompt: {[*map(str, folders)]}")
    sizes = {len(x[name]) for x in found.values() for name in names}
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError(
            f"prompts have {min(sizes)} to {max(sizes)} images, expected the same number in all "
            "folders: draw with --num_images_per_prompt 2 or more"
        )
    extract, (n,), made = Extractor(features), sizes, {}
    for folder, paths in found.items():
        flat = [path for name in names for path in paths[name]]
        parts = []
        for start in range(0, len(flat), BATCH):
            images = [Image.open(path).convert("RGB") for path in flat[start : start + BATCH]]
            parts.append(extract(images))
        made[folder] = np.concatenate(parts).astype(np.float64)
    center = np.mean([x.mean(0) for x in made.values()], axis=0)
    result = {}
    for folder, x in made.items():
        groups = (x - center).reshape(len(names), n, -1)
        vendi, distance = np.mean([[vendi_score(g), mean_distance(g)] for g in groups], axis=0)
        result[folder] = Diversity(float(vendi), float(distance), len(names), n)
    return result


def main(args: Args) -> None:
    print("| folder | prompts x images | Vendi score | mean distance |")
    print("| --- | --- | ---: | ---: |")
    for folder, d in measure(args.folders, args.features).items():
        print(f"| {folder} | {d.prompts} x {d.images} | {d.vendi:.3f} | {d.distance:.3f} |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
