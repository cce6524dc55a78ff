"""A CPU-sized stand-in for SD3.5-Medium, its training data and GenEval: drawings of simple shapes.

    python -m experiments.shapes build          # make everything in experiments/shapes_data from seeds
    python -m experiments.shapes score DIR      # GenEval's table for a folder of sample.py

The classes are the real ones: a StableDiffusion3Pipeline whose transformer (3.0 M parameters), VAE and three
text encoders are small; the text encoders are random and frozen. Scenes are 64 x 64 RGB, one to four objects
(four shapes, six colours) on a plain light background. Tasks, captions, metadata, folder layout and what
counts as correct follow GenEval (arXiv 2310.11513); a rule-based reader takes the place of its detector.

Notation: z0 clean latents, z1 noise, sigma in [0, 1] with 1 = noise, z_sigma = (1 - sigma) z0 + sigma z1,
velocity target z1 - z0, model timestep 1000 sigma.

Three sets of scenes come from disjoint seed ranges (BROAD, CURATED, HELD_OUT):
    broad     pretraining only, never stored; WRONG_CAPTIONS of its captions belong to another scene, and in a
              short last phase LATE_WRONG_CAPTIONS, so that the base knows more than it obeys: what SFT is for
    curated   shapes_data/train.parquet, every caption correct, with an `aesthetic` column (`aesthetic_score`)
    held out  shapes_data/prompts.jsonl, prompts only
What is held out: the prompt space is finite (460 captions), so the prompts of five tasks are also captions of
both training sets, of other scenes. The color_attr prompts are not: a fixed quarter of the 360 combinations
of two colours and two shapes is used for held-out prompts and in neither training set.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sample import encode_prompts

DATA = Path(__file__).parent / "shapes_data"
PAIRS = DATA / "train.parquet"
SIZE = 64  # pixels
MAX_SEQUENCE_LENGTH = 12  # tokens of the longest caption, for the CLIP tokenizers and for T5

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 200, 30),
    "purple": (150, 50, 180),
    "black": (20, 20, 20),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Harder tasks are drawn more often, as a broad set would have more of what takes more words to say.
TAG_WEIGHTS = (1, 2, 3, 1, 4, 4)

BROAD, CURATED, HELD_OUT = 0, 1_000_000, 2_000_000
WRONG_CAPTIONS, LATE_WRONG_CAPTIONS = 0.15, 0.7
CAPTION_DROPOUT = 0.1
SHIFT = 3.0


# ------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    """One drawn object: its centre (x, y) and half extent r are in pixels."""

    shape: str
    color: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """Up to four things that do not touch, on a background of one RGB colour."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@cache
def held_out_pairs() -> frozenset:
    """The quarter of (colour, shape, colour, shape) combinations that no training caption uses."""
    pairs = [
        (c, s, d, u) for c in COLORS for s in SHAPES for d in COLORS for u in SHAPES if c != d and s != u
    ]
    order = np.random.default_rng(HELD_OUT).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: len(pairs) // 4])


def make_metadata(rng: np.random.Generator, tag: str, held_out: bool = False) -> dict:
    """One prompt of task `tag` in the schema of GenEval's evaluation_metadata.jsonl.

    Args:
        rng: source of every random choice.
        tag: one of TAGS.
        held_out: draw color_attr prompts from `held_out_pairs` instead of its complement.
    Returns:
        {"tag", "include", "exclude" (counting only), "prompt"}; in a position prompt include[0] is the
        reference object and include[1] the one placed, as in GenEval.
    """
    a, b = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    c, d = (str(s) for s in rng.choice(list(COLORS), 2, replace=False))
    if tag == "single_object":
        include, text = [{"class": a, "count": 1}], f"a {a}"
    elif tag == "two_object":
        include, text = [{"class": a, "count": 1}, {"class": b, "count": 1}], f"a {a} and a {b}"
    elif tag == "counting":
        n = int(rng.integers(2, 5))
        include, text = [{"class": a, "count": n}], f"{NUMBERS[n]} {a}{'es' if a.endswith('s') else 's'}"
        exclude = [{"class": a, "count": n + 1}]
        return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}
    elif tag == "colors":
        include, text = [{"class": a, "count": 1, "color": c}], f"a {c} {a}"
    elif tag == "position":
        relation = str(rng.choice(list(RELATIONS)))
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        text = f"a {a} {relation} a {b}"
    elif tag == "color_attr":
        if ((c, a, d, b) in held_out_pairs()) != held_out:
            return make_metadata(rng, tag, held_out)
        include = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
        text = f"a {c} {a} and a {d} {b}"
    else:
        raise ValueError(f"unknown task {tag!r}, expected one of {TAGS}")
    return {"tag": tag, "include": include, "prompt": f"a photo of {text}"}


def make_scene(rng: np.random.Generator, metadata: dict) -> Scene:
    """A random scene that shows exactly what `metadata` asks for and nothing else."""
    wanted = [(req["class"], req.get("color")) for req in metadata["include"] for _ in range(req["count"])]
    relation = RELATIONS.get(metadata["include"][-1].get("position", [None])[0])
    low, high = {1: (9, 17), 2: (8, 12)}.get(len(wanted), (6.5, 8.5))
    while True:
        things = []
        for shape, color in wanted:
            r = rng.uniform(low, high)
            x, y = rng.uniform(r + 2, SIZE - r - 2, 2)
            things.append(Thing(shape, color or str(rng.choice(list(COLORS))), float(x), float(y), float(r)))
        gaps = [
            max(abs(p.x - q.x), abs(p.y - q.y)) - p.r - q.r for i, p in enumerate(things) for q in things[:i]
        ]
        if min(gaps, default=9) < 4:
            continue
        if relation:
            offset = np.array([things[1].x - things[0].x, things[1].y - things[0].y])
            if offset @ relation < 0.9 * np.linalg.norm(offset):
                continue
        break
    light = rng.integers(205, 250)
    background = tuple(int(v) for v in light + rng.integers(-5, 6, 3))
    return Scene(tuple(things), background)


def render(scene: Scene, supersample: int = 4) -> Image.Image:
    """Draw a scene with anti-aliased edges: a SIZE x SIZE RGB image."""
    k = supersample
    image = Image.new("RGB", (SIZE * k, SIZE * k), scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, r, fill = thing.x * k, thing.y * k, thing.r * k, COLORS[thing.color]
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif thing.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill)
        elif thing.shape == "triangle":
            pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill)
        elif thing.shape == "cross":
            pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill)
            pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill)
        else:
            raise ValueError(f"unknown shape {thing.shape!r}, expected one of {SHAPES}")
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def example(seed: int) -> tuple[dict, Scene]:
    """The metadata and the scene that belong to one seed, tasks in the proportions of TAG_WEIGHTS."""
    rng = np.random.default_rng(seed)
    tag = str(rng.choice(TAGS, p=np.array(TAG_WEIGHTS) / sum(TAG_WEIGHTS)))
    metadata = make_metadata(rng, tag)
    return metadata, make_scene(rng, metadata)


def aesthetic_score(scene: Scene) -> float:
    """A stated rule on the 4 to 8 scale of aesthetic predictors: large and contrasting things score high.

    4 + 2 (mean r - 6.5) / 10.5 + 2 mean |colour - background| / (255 sqrt 3)
    """
    size = np.mean([thing.r for thing in scene.things])
    contrast = np.mean([math.dist(COLORS[thing.color], scene.background) for thing in scene.things])
    return round(float(4 + 2 * (size - 6.5) / 10.5 + 2 * contrast / (255 * 3**0.5)), 3)


# ------------------------------------------------------------------------------------------------- scorer

MIN_AREA = 40  # pixels; the smallest drawn cross has 95
MIN_MATCH = 0.75  # intersection over union with the best template
POSITION_THRESHOLD = 0.1  # GenEval's: offsets below this share of the two sizes do not count


def _fit(mask: np.ndarray) -> np.ndarray:
    """A boolean mask of any size, stretched to 32 x 32."""
    return (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((32, 32), Image.Resampling.BILINEAR))
        > 127
    )


@cache
def _templates() -> list[tuple[str, np.ndarray]]:
    # Each shape sharp and as a decoder blurs it when small: thin tips drop out of the mask and of its box.
    masks = []
    for shape in SHAPES:
        for r, blur in ((30, 0), (9, 1)):
            drawn = render(Scene((Thing(shape, "black", SIZE / 2, SIZE / 2, r),), (255, 255, 255)))
            mask = ndimage.gaussian_filter(np.asarray(drawn.convert("L"), float), blur) < 137
            masks.append((shape, _fit(mask[ndimage.find_objects(mask.astype(int))[0]])))
    return masks


def detect(image: Image.Image) -> list[dict]:
    """Read the objects of an image, best template match first.

    Pixels take the palette colour whose direction from the background is nearest: blurred edges are mixtures
    with the background, so blur moves them along that direction and leaves it unchanged.

    Args:
        image: any size and mode; read as RGB at SIZE x SIZE.
    Returns:
        [{"shape", "color", "box": [x0, y0, x1, y1] in pixels, "match": in [0, 1]}]
    """
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    rgb = np.asarray(image, np.float64)
    border = np.concatenate([rgb[0], rgb[-1], rgb[1:-1, 0], rgb[1:-1, -1]])
    background = np.median(border, axis=0)
    offset = rgb - background
    palette = np.array(list(COLORS.values())) - background
    reach = np.linalg.norm(palette, axis=1)
    nearest = (offset @ (palette / reach[:, None]).T).argmax(-1)
    strong = np.linalg.norm(offset, axis=-1) > 0.5 * reach[nearest]
    found = []
    for index, color in enumerate(COLORS):
        labels, _ = ndimage.label(strong & (nearest == index))
        for number, window in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[window] == number
            height, width = mask.shape
            if mask.sum() < MIN_AREA or not 0.7 < width / height < 1 / 0.7:
                continue
            scaled = _fit(mask)
            match, shape = max(((scaled & m).sum() / (scaled | m).sum(), s) for s, m in _templates())
            if match >= MIN_MATCH:
                box = [window[1].start, window[0].start, window[1].stop, window[0].stop]
                found.append({"shape": shape, "color": color, "box": box, "match": float(match)})
    return sorted(found, key=lambda f: -f["match"])


def relations(box: list, reference: list) -> set[str]:
    """Where `box` lies from `reference`, both [x0, y0, x1, y1], by GenEval's rule: up to two relations."""
    a, b = np.array(box, float).reshape(2, 2), np.array(reference, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    slack = POSITION_THRESHOLD * (a[1] - a[0] + b[1] - b[0])
    direction = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0) / max(np.linalg.norm(offset), 1e-9)
    return {name for name, axis in RELATIONS.items() if direction @ np.array(axis) > 0.5}


def score_image(image: Image.Image, metadata: dict) -> tuple[bool, str, dict]:
    """Judge one image as GenEval does.

    Every `include` clause must hold: at least `count` objects of the class, the best matches among them of
    `color`, each of them in `position` to those of the clause it refers to. An `exclude` clause fails the
    image when `count` or more objects of its class are there.

    Returns:
        correct; reason, "" if correct, else one line for each broken clause; details, boxes by class.
    """
    found = detect(image)
    details = {shape: [f["box"] for f in found if f["shape"] == shape] for shape in SHAPES}
    details = {shape: boxes for shape, boxes in details.items() if boxes}
    reasons, groups = [], []
    for req in metadata.get("include", []):
        name, count = req["class"], req["count"]
        group = [f for f in found if f["shape"] == name][:count]
        colors = [f["color"] for f in group]
        broken = ""
        if len(group) < count:
            broken = f"expected {name}>={count}, found {len(group)}"
        elif "color" in req and colors.count(req["color"]) < count:
            broken = f"expected {req['color']} {name}>={count}, found {', '.join(colors)}"
        elif "position" in req:
            relation, target = req["position"]
            if groups[target] is None:
                broken = f"no target for {name} to be {relation}"
            for f in group:
                for g in groups[target] or []:
                    true = relations(f["box"], g["box"])
                    if relation not in true:
                        broken = (
                            f"expected {name} {relation} target, found {' and '.join(sorted(true))} target"
                        )
        groups.append(None if broken else group)
        reasons += [broken] if broken else []
    for req in metadata.get("exclude", []):
        number = len(details.get(req["class"], []))
        if number >= req["count"]:
            reasons.append(f"expected {req['class']}<{req['count']}, found {number}")
    return not reasons, "\n".join(reasons), details


def score_folder(path: str | Path, outfile: str | Path | None = None) -> dict[str, float]:
    """Score samples in GenEval's layout, path/NNNNN/metadata.jsonl and path/NNNNN/samples/NNNN.png.

    Args:
        path: the folder that holds the prompts' folders.
        outfile: where GenEval's results.jsonl goes, which its summary_scores.py reads; None writes nothing.
    Returns:
        accuracy by tag in [0, 1], and "overall", the mean over the tags that occur (each counts the same).
    Raises:
        ValueError: no sample was found.
    """
    rows = []
    for folder in sorted(os.listdir(path)):
        folderpath = Path(path) / folder
        if not folderpath.is_dir() or not folder.isdigit():
            continue
        metadata = json.loads((folderpath / "metadata.jsonl").read_text())
        for name in sorted(os.listdir(folderpath / "samples")):
            filename = folderpath / "samples" / name
            if not filename.is_file() or not re.match(r"\d+\.png", name):
                continue
            with Image.open(filename) as image:
                correct, reason, details = score_image(image, metadata)
            row = {"filename": str(filename), "tag": metadata["tag"], "prompt": metadata["prompt"]}
            row |= {"correct": correct, "reason": reason}
            rows.append(row | {"metadata": json.dumps(metadata), "details": json.dumps(details)})
    if not rows:
        raise ValueError(f"no NNNNN/samples/NNNN.png under {path}")
    if outfile is not None:
        Path(outfile).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = [tag for tag in TAGS if any(row["tag"] == tag for row in rows)]
    scores = {tag: float(np.mean([row["correct"] for row in rows if row["tag"] == tag])) for tag in tags}
    return scores | {"overall": float(np.mean(list(scores.values())))}


# ------------------------------------------------------------------------------------------------- model


def vocabulary() -> list[str]:
    """Every word of every caption."""
    plurals = [s + ("es" if s.endswith("s") else "s") for s in SHAPES]
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return sorted({"a", "photo", "of", "and", *SHAPES, *plurals, *COLORS, *NUMBERS.values(), *relation_words})


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """Word-level tokenizers: two CLIP ones, whose BPE merges spell whole words, and a Unigram T5.

    The BPE trainer breaks ties in an order that changes from run to run, and with it CLIP's token numbers: another
    build's pipeline is as good as the committed one, but not the same bits."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.train_from_iterator(vocabulary(), BpeTrainer(
        vocab_size=10_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    ))  # fmt: skip
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    limit = {"model_max_length": MAX_SEQUENCE_LENGTH}
    clips = [CLIPTokenizer(vocab=trained["vocab"], merges=merges, **limit) for _ in range(2)]
    # T5TokenizerFast reloads only from a Unigram vocabulary.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *(("▁" + word, -1.0) for word in vocabulary())]
    return *clips, T5TokenizerFast(vocab=pieces, extra_ids=0, **limit)


@torch.no_grad()
def _spread(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    # The classes' own init is made for training: at std 0.02 a random encoder returns nearly the same vector
    # for every caption. Unit embeddings and variance-preserving layers keep words apart; T5's wide relative
    # bias makes its heads look at neighbours, so that a shape's embedding holds the colour next to it.
    for name, p in model.named_parameters():
        if p.ndim == 2:
            scale = 1.0 if "embed" in name or "shared" in name else p.shape[1] ** -0.5
            scale = 3.0 if "relative_attention_bias" in name else scale
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval().requires_grad_(False)


def build_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline around a trained VAE: frozen random text encoders and an untrained transformer."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizers()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_SEQUENCE_LENGTH, projection_dim=32,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer_3), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():  # the constructors draw from the global generator
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 8, patch_size=1, in_channels=16, num_layers=5, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128,
            pooled_projection_dim=64, out_channels=16, pos_embed_max_size=16, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )  # fmt: skip
        encoders = CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip), T5EncoderModel(t5)
    encoders = [_spread(encoder, generator) for encoder in encoders]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae,
        text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=encoders[2],
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size -> (n, 3, height, width) uint8."""
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2).contiguous()


def train_vae(pixels: Tensor, steps: int, seed: int, batch: int = 16, lr: float = 2e-3) -> AutoencoderKL:
    """Train a 16-channel, 8x down-sampling autoencoder on (n, 3, 64, 64) uint8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8,
            sample_size=SIZE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    for step in (bar := tqdm(range(steps), desc="vae", mininterval=10)):
        x = pixels[torch.randint(len(pixels), (batch,), generator=generator)] / 127.5 - 1
        found = vae.encode(x).latent_dist
        y = vae.decode(found.sample(generator=generator)).sample
        # A weak KL term keeps latents smooth without blurring: edges are what the scorer reads.
        kl = 0.5 * (found.mean**2 + found.var - 1 - found.logvar).mean()
        loss = (x - y).abs().mean() + (x - y).square().mean() + 1e-3 * kl
        optimizer.param_groups[0]["lr"] = lr * min(
            (step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix(l1=f"{(x - y).abs().mean().item():.4f}", kl=f"{kl.item():.3f}")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """(n, 3, 64, 64) uint8 -> the posterior's mean and std, (n, 16, 8, 8) float32, before shift and scale."""
    chunks = tqdm(pixels.split(batch), desc="latents", mininterval=10)
    found = [vae.encode(x / 127.5 - 1).latent_dist for x in chunks]
    return torch.cat([x.mean for x in found]), torch.cat([x.std for x in found])


def _state(transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    named = dict(transformer.named_parameters())
    state = {f"weight.{name}": p.detach() for name, p in named.items()}
    return state | {f"{key}.{name}": v for name, p in named.items() for key, v in optimizer.state[p].items()}


@torch.no_grad()
def _restore(
    transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    for name, p in transformer.named_parameters():
        p.copy_(state[f"weight.{name}"])
        optimizer.state[p] = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}


def pretrain(
    pipe: StableDiffusion3Pipeline, mean: Tensor, std: Tensor | None, captions: list[str], steps: int, seed: int,
    checkpoint: Path, batch: int = 64, lr: float = 1e-3, compile: bool = False,
) -> None:  # fmt: skip
    """Train pipe.transformer in place by rectified flow.

        mean |v(z_sigma, sigma, c) - (z1 - z0)|^2,   t ~ logit-normal(0, 1),   sigma = 3 t / (1 + 2 t)

    Args:
        mean, std: (n, 16, 8, 8) float32 of the VAE's posterior, before shift and scale. z0 is a sample of it, or
            its mean where std is None.
        captions: n captions; CAPTION_DROPOUT of the draws see "" instead, for guidance.
        steps: optimizer steps of `batch` samples; the learning rate falls to 0 over the last quarter.
        checkpoint: written every 500 steps; where it exists, the run goes on from it, as if never stopped.
        compile: use torch.compile (needs a C++ compiler), 1.3 times as fast.
    """
    table = sorted({"", *captions})  # "" comes first
    embeds = encode_prompts(pipe, table, MAX_SEQUENCE_LENGTH)
    index = torch.tensor([table.index(c) for c in captions])
    generator = torch.Generator().manual_seed(seed)
    transformer, vae = pipe.transformer.train(), pipe.vae.config
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    first, average = 0, None
    if checkpoint.exists():
        state = load_file(checkpoint)
        generator.set_state(state["generator"])
        first = int(state["done"])
        _restore(transformer, optimizer, state)
    if compile:
        transformer.compile()
    for step in (
        bar := tqdm(range(first, steps), desc="transformer", initial=first, total=steps, mininterval=10)
    ):
        rows = torch.randint(len(mean), (batch,), generator=generator)
        keep = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        caption = index[rows] * keep
        z1 = torch.randn(batch, *mean.shape[1:], generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        z0 = mean[rows]
        if std is not None:
            z0 = z0 + std[rows] * torch.randn(z0.shape, generator=generator)
        z0 = (z0 - vae.shift_factor) * vae.scaling_factor
        s = sigma[:, None, None, None]
        cond = {key: x[caption] for key, x in embeds.items()}
        v = transformer((1 - s) * z0 + s * z1, timestep=1000 * sigma, return_dict=False, **cond)[0]
        loss = (v - (z1 - z0)).square().mean()
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, 1, (steps - step) / (steps / 4))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 500 == 0:
            state = _state(transformer, optimizer)
            state |= {"generator": generator.get_state(), "done": torch.tensor(step + 1)}
            save_file(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
    transformer.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- commands


def held_out_prompts(per_task: int = 100) -> list[dict]:
    """The metadata of prompts.jsonl: `per_task` draws of each task, in the order of TAGS."""
    tags = [tag for tag in TAGS for _ in range(per_task)]
    return [
        make_metadata(np.random.default_rng(HELD_OUT + i), tag, held_out=True) for i, tag in enumerate(tags)
    ]


def mislabel(captions: list[str], share: float, seed: int) -> list[str]:
    """The captions, of which about this share have changed places among themselves."""
    mixed, rng = np.array(captions), np.random.default_rng(seed)
    wrong = np.flatnonzero(rng.random(len(mixed)) < share)
    mixed[wrong] = mixed[rng.permutation(wrong)]
    return mixed.tolist()


def write_pairs(rows: list[dict], path: Path) -> None:
    """Write pairs {"image": {"bytes", "path"}, "text", "aesthetic"} to a parquet file, as datasets keeps images."""
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "aesthetic": datasets.Value("float64")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(path)


def read_pairs(path: Path = PAIRS) -> datasets.Dataset:
    """The curated pairs, in order: rows {"image": PNG image, "text", "aesthetic"}."""
    return datasets.Dataset(pyarrow.parquet.read_table(path))


def write_data(out: Path, pairs: int) -> None:
    """Write the curated pairs out/train.parquet and the held-out out/prompts.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pairs):
        metadata, scene = example(CURATED + i)
        png = io.BytesIO()
        render(scene).save(png, format="PNG", optimize=True)
        image = {"bytes": png.getvalue(), "path": f"{i:05d}.png"}
        rows.append({"image": image, "text": metadata["prompt"], "aesthetic": aesthetic_score(scene)})
    write_pairs(rows, out / PAIRS.name)
    (out / "prompts.jsonl").write_text("".join(json.dumps(m) + "\n" for m in held_out_prompts()))


def build(
    out: Path = DATA, work: Path = Path("/tmp/shapes_build"), scenes: int = 32_000, pairs: int = 2_000,
    vae_steps: int = 1_500, steps: int = 6_000, late_steps: int = 400, seed: int = 0, compile: bool = False,
) -> None:  # fmt: skip
    """Make the data and the pipeline from seeds; what lies in `work` already is not made again."""
    write_data(out, pairs)
    examples = [example(BROAD + i) for i in tqdm(range(scenes), desc="scenes", mininterval=10)]
    captions = [metadata["prompt"] for metadata, _ in examples]
    pixels = to_pixels(render(scene) for _, scene in tqdm(examples, desc="drawing", mininterval=10))

    if not (work / "vae").exists():
        vae = train_vae(pixels, vae_steps, seed)
        latents, _ = posterior(vae, pixels[:2_000])
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        vae.save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)

    if (work / "pipeline").exists():  # a new one's tokens have other numbers, which its transformer would not know
        pipe = StableDiffusion3Pipeline.from_pretrained(work / "pipeline", vae=vae)
    else:
        pipe = build_pipeline(vae, seed)
        pipe.save_pretrained(work / "pipeline")
    mean, std = posterior(vae, pixels)
    if not (work / "transformer").exists():
        noisy = mislabel(captions, WRONG_CAPTIONS, seed)
        pretrain(pipe, mean, None, noisy, steps, seed, work / "pretrain.safetensors", compile=compile)
        pipe.transformer.save_pretrained(work / "transformer")
    pipe.transformer = SD3Transformer2DModel.from_pretrained(work / "transformer")
    noisy = mislabel(captions, LATE_WRONG_CAPTIONS, seed)
    pretrain(pipe, mean, std, noisy, late_steps, seed + 1, work / "late.safetensors", lr=5e-4, compile=compile)

    # Half precision on disk only: from_pretrained gives float32 back.
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(out / "model")


def score(folder: tyro.conf.Positional[Path]) -> None:
    """Print GenEval's table for a folder of samples and write its results.jsonl into it."""
    for tag, accuracy in score_folder(folder, folder / "results.jsonl").items():
        print(f"{tag:<14} {accuracy:6.1%}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"build": build, "score": score})
