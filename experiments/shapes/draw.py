"""The shapes world's scenes: drawings of simple shapes with their captions, after GenEval's tasks.

Scenes are 64 x 64 RGB, one to four objects (four shapes, six colours) on a plain light background.
Three sets of scenes come from disjoint seed ranges (BROAD, CURATED, HELD_OUT):
    broad     pretraining only, never stored
    curated   data/train.parquet, every caption correct, with a column `aesthetic`
    held out  data/prompts.jsonl, prompts only
There are 460 captions, so the held-out prompts of five tasks are also captions of both training
sets, of other scenes. Those of color_attr are not: a fixed quarter of the 360 combinations of two
colours and two shapes is kept for held-out prompts.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image, ImageDraw

DATA = Path(__file__).parent / "data"
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


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@cache
def held_out_pairs() -> frozenset:
    """The quarter of (colour, shape, colour, shape) combinations that no training caption uses."""
    four = product(COLORS, SHAPES, COLORS, SHAPES)
    pairs = [(c, a, d, b) for c, a, d, b in four if c != d and a != b]
    order = np.random.default_rng(HELD_OUT).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: len(pairs) // 4])


def make_metadata(rng: np.random.Generator, tag: str, held_out: bool = False) -> dict:
    """One prompt of task `tag` in the schema of GenEval's evaluation_metadata.jsonl.

    held_out: draw color_attr prompts from `held_out_pairs` instead of its complement.
    Returns {"tag", "include", "exclude" (counting only), "prompt"}; in a position prompt include[0]
    is the reference object and include[1] the one placed, as in GenEval."""
    a, b = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    c, d = (str(s) for s in rng.choice(list(COLORS), 2, replace=False))
    first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
    exclude = {}
    if tag == "single_object":
        include, text = [first], f"a {a}"
    elif tag == "two_object":
        include, text = [first, second], f"a {a} and a {b}"
    elif tag == "counting":
        n = int(rng.integers(2, 5))
        include, text = [{"class": a, "count": n}], f"{NUMBERS[n]} {plural(a)}"
        exclude = {"exclude": [{"class": a, "count": n + 1}]}
    elif tag == "colors":
        include, text = [first | {"color": c}], f"a {c} {a}"
    elif tag == "position":
        relation = str(rng.choice(list(RELATIONS)))
        include = [second, first | {"position": [relation, 0]}]
        text = f"a {a} {relation} a {b}"
    else:
        if ((c, a, d, b) in held_out_pairs()) != held_out:
            return make_metadata(rng, tag, held_out)
        include = [first | {"color": c}, second | {"color": d}]
        text = f"a {c} {a} and a {d} {b}"
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {text}"}


def make_scene(rng: np.random.Generator, metadata: dict) -> Scene:
    """A random scene that shows exactly what `metadata` asks for and nothing else."""
    clauses = metadata["include"]
    wanted = [(x["class"], x.get("color")) for x in clauses for _ in range(x["count"])]
    relation = RELATIONS.get(clauses[-1].get("position", [None])[0])
    low, high = {1: (9, 17), 2: (8, 12)}.get(len(wanted), (6.5, 8.5))
    while True:
        things = []
        for shape, color in wanted:
            r = rng.uniform(low, high)
            x, y = rng.uniform(r + 2, SIZE - r - 2, 2)
            color = color or str(rng.choice(list(COLORS)))
            things.append(Thing(shape, color, float(x), float(y), float(r)))
        if fits(things, relation):
            break
    light = rng.integers(205, 250)
    background = tuple(int(v) for v in light + rng.integers(-5, 6, 3))
    return Scene(tuple(things), background)


def fits(things: list[Thing], relation: tuple[int, int] | None) -> bool:
    """Whether no two are nearer than 4 pixels and the second lies where relation wants it."""
    for i, p in enumerate(things):
        for q in things[:i]:
            if max(abs(p.x - q.x), abs(p.y - q.y)) - p.r - q.r < 4:
                return False
    if relation is None:
        return True
    offset = np.array([things[1].x - things[0].x, things[1].y - things[0].y])
    return offset @ relation >= 0.9 * np.linalg.norm(offset)


def render(scene: Scene) -> Image.Image:
    """Draw a scene with anti-aliased edges: a SIZE x SIZE RGB image."""
    k = 4  # drawn as much larger
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
        else:
            pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill)
            pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def example(seed: int) -> tuple[dict, Scene]:
    """The metadata and the scene of one seed, tasks in the proportions of TAG_WEIGHTS."""
    rng = np.random.default_rng(seed)
    tag = str(rng.choice(TAGS, p=np.array(TAG_WEIGHTS) / sum(TAG_WEIGHTS)))
    metadata = make_metadata(rng, tag)
    return metadata, make_scene(rng, metadata)


def aesthetic_score(scene: Scene) -> float:
    """4 + 2 (mean r - 6.5) / 10.5 + 2 mean |colour - background| / (255 sqrt 3): a stated rule on
    the 4 to 8 scale of aesthetic predictors."""
    size = np.mean([thing.r for thing in scene.things])
    contrast = np.mean([math.dist(COLORS[thing.color], scene.background) for thing in scene.things])
    return round(float(4 + 2 * (size - 6.5) / 10.5 + 2 * contrast / (255 * 3**0.5)), 3)


def read_pairs(path: Path = PAIRS) -> datasets.Dataset:
    """The curated pairs, in order: rows {"image": PNG image, "text", "aesthetic"}."""
    return datasets.Dataset(pyarrow.parquet.read_table(path))
