"""GenEval's scorer for the shapes world: a rule-based reader takes the place of its detector.

    python -m experiments.shapes.detect DIR      # GenEval's table for a folder of sample.py

Tasks, metadata, folder layout and what counts as correct follow GenEval (arXiv 2310.11513).
"""

import json
from collections import defaultdict
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


def fit(mask: np.ndarray) -> np.ndarray:
    """A boolean mask of any size, stretched to 32 x 32."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR)) > 127


@cache
def templates() -> list[tuple[str, np.ndarray]]:
    # Each shape sharp and as a decoder blurs it when small: thin tips drop out of the mask and of
    # its box.
    masks = []
    for shape in SHAPES:
        for r, blur in ((30, 0), (9, 1)):
            thing = Thing(shape, "black", SIZE / 2, SIZE / 2, r)
            drawn = render(Scene((thing,), (255, 255, 255))).convert("L")
            mask = ndimage.gaussian_filter(np.asarray(drawn, float), blur) < 137
            window = ndimage.find_objects(mask.astype(int))[0]
            masks.append((shape, fit(mask[window])))
    return masks


def detect(image: Image.Image) -> list[dict]:
    """Read the objects of an image of any size and mode, best template match first.

    Pixels take the palette colour whose direction from the background is nearest: blurred edges are
    mixtures with the background, so blur moves them along that direction and leaves it unchanged.
    Returns [{"shape", "color", "box": [x0, y0, x1, y1] in pixels, "match": in [0, 1]}]."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    rgb = np.asarray(image, float)
    border = np.concatenate([rgb[0], rgb[-1], rgb[1:-1, 0], rgb[1:-1, -1]])
    background = np.median(border, axis=0)
    offset = rgb - background
    palette = np.array(list(COLORS.values())) - background
    reach = np.linalg.norm(palette, axis=1)
    directions = palette / reach[:, None]
    nearest = (offset @ directions.T).argmax(-1)
    strong = np.linalg.norm(offset, axis=-1) > 0.5 * reach[nearest]
    found = []
    for index, color in enumerate(COLORS):
        labels, _ = ndimage.label(strong & (nearest == index))
        for number, window in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[window] == number
            height, width = mask.shape
            if mask.sum() < MIN_AREA or not 0.7 < width / height < 1 / 0.7:
                continue
            match, shape = best_template(mask)
            if match >= MIN_MATCH:
                y, x = window
                box = [x.start, y.start, x.stop, y.stop]
                found.append({"shape": shape, "color": color, "box": box, "match": match})
    return sorted(found, key=lambda f: -f["match"])


def best_template(mask: np.ndarray) -> tuple[float, str]:
    """Intersection over union with the template that fits best, and its shape."""
    mask, found = fit(mask), []
    for shape, template in templates():
        overlap = (mask & template).sum() / (mask | template).sum()
        found.append((overlap, shape))
    return max(found)


def relations(box: list, reference: list) -> set[str]:
    """Where `box` lies from `reference`, [x0, y0, x1, y1], by GenEval's rule: up to two."""
    a, b = np.reshape(box, (2, 2)), np.reshape(reference, (2, 2))
    offset = a.mean(0) - b.mean(0)
    slack = POSITION_THRESHOLD * (a[1] - a[0] + b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - slack, 0)
    distance = max(np.linalg.norm(offset), 1e-9)
    direction = np.sign(offset) * beyond / distance
    return {name for name, axis in RELATIONS.items() if direction @ axis > 0.5}


def score_image(image: Image.Image, metadata: dict) -> tuple[bool, str]:
    """Judge one image as GenEval does.

    Every `include` clause must hold: at least `count` objects of the class, the best matches among
    them of `color`, each of them in `position` to those of the clause it refers to. An `exclude`
    clause fails the image when `count` or more objects of its class are there.
    Returns whether it is correct; the reason, one line for each broken clause."""
    found, reasons, groups = detect(image), [], []
    for clause in metadata["include"]:
        group = [f for f in found if f["shape"] == clause["class"]][: clause["count"]]
        broken = broken_clause(clause, group, groups)
        groups.append([] if broken else group)
        reasons += [broken] if broken else []
    for clause in metadata.get("exclude", []):
        name, most = clause["class"], clause["count"]
        number = sum(f["shape"] == name for f in found)
        if number >= most:
            reasons.append(f"expected {name}<{most}, found {number}")
    return not reasons, "\n".join(reasons)


def broken_clause(clause: dict, group: list[dict], groups: list[list[dict]]) -> str:
    """Why the objects of an include clause do not meet it, or ""; groups: those of earlier ones,
    none where it was broken."""
    name, count = clause["class"], clause["count"]
    colors = [f["color"] for f in group]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    if "color" in clause and colors.count(clause["color"]) < count:
        return f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}"
    if "position" in clause:
        relation, target = clause["position"]
        if not groups[target]:
            return f"no target for {name} to be {relation}"
        for f in group:
            for g in groups[target]:
                true = relations(f["box"], g["box"])
                if relation not in true:
                    place = " and ".join(sorted(true))
                    return f"expected {name} {relation} target, found {place} target"
    return ""


def score_folder(path: Path) -> dict[str, float]:
    """Score samples in GenEval's layout, path/NNNNN/metadata.jsonl and path/NNNNN/samples/NNNN.png;
    write path/results.jsonl, which its summary_scores.py reads.
    Returns accuracy by tag in [0, 1], and "overall", the mean over the tags that occur.
    Raises ValueError: no sample was found."""
    rows, correct = [], defaultdict(list)
    for filename in sorted(path.glob("[0-9]*/samples/[0-9]*.png")):
        metadata = json.loads((filename.parents[1] / "metadata.jsonl").read_text())
        tag = metadata["tag"]
        row = {"filename": str(filename), "tag": tag, "prompt": metadata["prompt"]}
        with Image.open(filename) as image:
            row["correct"], row["reason"] = score_image(image, metadata)
        rows.append(json.dumps(row | {"metadata": json.dumps(metadata)}) + "\n")
        correct[tag].append(row["correct"])
    if not rows:
        raise ValueError(f"no NNNNN/samples/NNNN.png under {path}")
    (path / "results.jsonl").write_text("".join(rows))
    scores = {tag: float(np.mean(correct[tag])) for tag in TAGS if tag in correct}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Print GenEval's table for a folder of samples and write its results.jsonl into it."""
    for tag, accuracy in score_folder(folder).items():
        print(f"{tag:<14} {accuracy:6.1%}")


if __name__ == "__main__":
    tyro.cli(main)
