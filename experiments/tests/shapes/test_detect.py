"""experiments.shapes.detect on scenes whose truth is known."""

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageDraw

from experiments.shapes import detect, draw
from experiments.shapes.detect import score_image
from experiments.shapes.draw import Scene, Thing, render

def change(scene, i, field, options):
    """Scene with another one of options in a field of its thing i."""
    things, options = list(scene.things), list(options)
    other = options[options.index(getattr(things[i], field)) - 1]
    things[i] = replace(things[i], **{field: other})
    return replace(scene, things=tuple(things))


def wrong_shape(rng, metadata, scene):
    return change(scene, 0, "shape", draw.SHAPES)


def wrong_color(rng, metadata, scene):
    return change(scene, -1, "color", draw.COLORS)


def missing(rng, metadata, scene):
    gone = rng.integers(len(scene.things))
    return replace(scene, things=scene.things[:gone] + scene.things[gone + 1 :])


def one_more(rng, metadata, scene):
    first = metadata["include"][0]
    return draw.make_scene(rng, {"include": [first | {"count": first["count"] + 1}]})


def swapped(rng, metadata, scene):
    a, b = scene.things
    return replace(scene, things=(replace(a, shape=b.shape), replace(b, shape=a.shape)))


BREAKS = {"counting": [one_more], "colors": [wrong_color], "position": [swapped]}
BREAKS["color_attr"] = [wrong_color, swapped]


@pytest.mark.parametrize("tag", draw.TAGS)
def test_score_image_accepts_a_rendered_scene_and_rejects_it_with_one_attribute_broken(tag):
    for seed in range(5_000_000, 5_000_040):
        rng = np.random.default_rng(seed)
        metadata = draw.make_metadata(rng, tag)
        scene = draw.make_scene(rng, metadata)
        assert score_image(render(scene), metadata)[:2] == (True, ""), (metadata["prompt"], scene)
        for broken in (wrong_shape, missing, *BREAKS.get(tag, ())):
            correct, reason, _ = score_image(render(broken(rng, metadata, scene)), metadata)
            assert not correct and reason, (broken, metadata["prompt"], scene)


def test_score_image_allows_extra_objects_unless_a_clause_excludes_them():
    circles = Thing("circle", "red", 14, 14, 8), Thing("circle", "red", 48, 14, 8)
    image = render(Scene((*circles, Thing("square", "blue", 14, 48, 8)), (230, 230, 230)))
    metadata = {"include": [{"class": "circle", "count": 1}]}
    assert score_image(image, metadata)[0]
    metadata["exclude"] = [{"class": "circle", "count": 2}]
    correct, reason, boxes = score_image(image, metadata)
    assert not correct and reason == "expected circle<2, found 2"
    assert len(boxes["circle"]) == 2 and len(boxes["square"]) == 1


def test_score_image_judges_the_best_matches_only(monkeypatch):
    def reads(*found):
        found = [dict(zip(("shape", "color", "box"), f, strict=True)) for f in found]
        monkeypatch.setattr(detect, "detect", lambda image: found)

    left, middle, right = [0, 20, 10, 30], [20, 20, 30, 30], [40, 20, 50, 30]
    red_circle = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
    reads(("circle", "red", left), ("circle", "blue", right))
    assert score_image(None, red_circle)[0]
    reads(("circle", "blue", right), ("circle", "red", left))
    assert score_image(None, red_circle)[1] == "expected red circle>=1, found blue"

    placed = {"class": "circle", "count": 1, "position": ["left of", 0]}
    beside = {"include": [{"class": "square", "count": 1, "color": "red"}, placed]}
    reads(("square", "red", middle), ("circle", "red", left), ("circle", "red", right))
    assert score_image(None, beside)[0]


def test_detect_sorts_by_match_and_leaves_out_what_no_template_fits():
    circle, square = Thing("circle", "red", 13.6, 14.3, 7.2), Thing("square", "blue", 46, 14, 9)
    image = render(Scene((circle, square), (230, 230, 230)))
    pen = ImageDraw.Draw(image)
    # A bar, which stretched to its box is a square, a speck, and a corner.
    pen.rectangle((24, 40, 60, 52), draw.COLORS["green"])
    pen.rectangle((30, 58, 34, 62), draw.COLORS["black"])
    pen.line(((4, 40), (4, 58), (20, 58)), draw.COLORS["purple"], width=4)
    found = detect.detect(image)
    assert [f["shape"] for f in found] == ["square", "circle"]
    assert found[0]["match"] > found[1]["match"]
    for f, thing in zip(found, (square, circle), strict=True):
        x, y, r = thing.x, thing.y, thing.r
        assert np.abs(np.subtract(f["box"], [x - r, y - r, x + r, y + r])).max() <= 1


@pytest.mark.parametrize("box, expected", [
    ([0, 20, 10, 30], {"left of"}),
    ([20, 40, 30, 50], {"below"}),
    ([0, 0, 10, 10], {"left of", "above"}),
    ([21, 21, 31, 31], set()),  # within GenEval's threshold of a tenth of both sizes
])  # fmt: skip
def test_relations_follow_genevals_rule(box, expected):
    assert detect.relations(box, [20, 20, 30, 30]) == expected


def test_score_folder_writes_results_that_genevals_summary_reads(tmp_path):
    for number, tag in enumerate(["single_object"] * 3 + ["colors"] * 2 + ["position"]):
        rng = np.random.default_rng(number)
        metadata = draw.make_metadata(rng, tag)
        scene = draw.make_scene(rng, metadata)
        samples = tmp_path / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        render(scene).save(samples / "0000.png")
        if number:
            render(missing(rng, metadata, scene)).save(samples / "0001.png")
        (samples / "grid.png").write_bytes(b"not a sample")

    scores = detect.score_folder(tmp_path, tmp_path / "results.jsonl")
    # summary_scores.py: group the lines by tag, mean of `correct`, then the mean of these.
    groups = defaultdict(list)
    for row in map(json.loads, (tmp_path / "results.jsonl").open()):
        assert set(row) > {"filename", "tag", "prompt", "correct", "reason", "metadata"}
        groups[row["tag"]].append(row["correct"])
    means = {tag: np.mean(x) for tag, x in groups.items()}
    assert means == {"single_object": 0.6, "colors": 0.5, "position": 0.5}
    assert scores == means | {"overall": np.mean([0.6, 0.5, 0.5])}
    with pytest.raises(ValueError, match="no NNNNN"):
        detect.score_folder(samples)
