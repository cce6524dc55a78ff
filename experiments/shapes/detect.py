"""GenEval's scorer for the shapes world: a rule-based reader takes the place of its detector.

    python -m experiments.shapes.detect DIR      # GenEval's table for a folder of sample.py

Tasks, metadata, folder layout and what counts as correct follow GenEval (arXiv 2310.11513).
"""

import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from scipy import ndimage

from experiments.shapes.draw import COLORS, RELATIONS, SHAPES, SIZE, TAGS, Scene, Thing, render

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


def layout(image: Image.Image) -> tuple:
    """Every object as (shape, colour, cell of a 3 x 3 grid), sorted."""
    found = []
    for thing in detect(image):
        x0, y0, x1, y1 = thing["box"]
        cell = [min(int((a + b) / 2 * 3 / SIZE), 2) for a, b in ((x0, x1), (y0, y1))]
        found.append((thing["shape"], thing["color"], *cell))
    return tuple(sorted(found))


def count_layouts(folder: str | Path) -> float:
    """Distinct layouts among a prompt's images in a folder of sample.py, the mean over prompts."""
    counts = []
    for samples in sorted(Path(folder).glob("[0-9]*/samples")):
        layouts = {layout(Image.open(path)) for path in samples.glob("*.png")}
        counts.append(len(layouts))
    return float(np.mean(counts))


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


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Print GenEval's table for a folder of samples and write its results.jsonl into it."""
    for tag, accuracy in score_folder(folder, folder / "results.jsonl").items():
        print(f"{tag:<14} {accuracy:6.1%}")


if __name__ == "__main__":
    tyro.cli(main)
