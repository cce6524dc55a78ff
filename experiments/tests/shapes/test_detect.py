"""experiments.shapes.detect on scenes whose truth is known."""

import json

import numpy as np
import pytest
from PIL import ImageDraw

from experiments.shapes import detect, draw
from experiments.shapes.detect import score_image
from experiments.shapes.draw import Scene, Thing, render

GREY = (230, 230, 230)
CIRCLE = {"class": "circle", "count": 1}


def others(metadata):
    """What asks for one thing else: a shape, one more, a colour, or the two shapes exchanged."""
    first, *rest = metadata["include"]
    shapes = {clause["class"] for clause in metadata["include"]}
    colors = {clause.get("color") for clause in metadata["include"]}
    yield [first | {"class": min({*draw.SHAPES} - shapes)}, *rest]
    yield [first | {"count": first["count"] + 1}, *rest]
    if "color" in first:
        yield [first | {"color": min({*draw.COLORS} - colors)}, *rest]
    if metadata["tag"] in ("color_attr", "position"):
        (second,) = rest
        yield [first | {"class": second["class"]}, second | {"class": first["class"]}]


@pytest.mark.parametrize("tag", draw.TAGS)
def test_score_image_accepts_a_rendered_scene_and_rejects_it_where_one_thing_else_is_asked(tag):
    for seed in range(5_000_000, 5_000_040):
        rng = np.random.default_rng(seed)
        metadata = draw.make_metadata(rng, tag)
        image = render(draw.make_scene(rng, metadata))
        assert score_image(image, metadata) == (True, ""), metadata["prompt"]
        wrong = [metadata | {"include": include} for include in others(metadata)]
        wrong.append(metadata | {"exclude": metadata["include"]})
        for asked in wrong:
            correct, reason = score_image(image, asked)
            assert not correct and reason, asked


def test_score_image_allows_extra_objects_unless_a_clause_excludes_them():
    circles = Thing("circle", "red", 14, 14, 8), Thing("circle", "red", 48, 14, 8)
    image = render(Scene((*circles, Thing("square", "blue", 14, 48, 8)), GREY))
    metadata = {"include": [CIRCLE]}
    assert score_image(image, metadata)[0]
    metadata["exclude"] = [CIRCLE | {"count": 2}]
    assert score_image(image, metadata) == (False, "expected circle<2, found 2")


def test_score_image_judges_the_best_matches_only(monkeypatch):
    def reads(*found):
        names = ("shape", "color", "box")
        rows = [dict(zip(names, row, strict=True)) for row in found]
        monkeypatch.setattr(detect, "detect", lambda image: rows)

    left, middle, right = [0, 20, 10, 30], [20, 20, 30, 30], [40, 20, 50, 30]
    red_circle = {"include": [CIRCLE | {"color": "red"}]}
    reads(("circle", "red", left), ("circle", "blue", right))
    assert score_image(None, red_circle)[0]
    reads(("circle", "blue", right), ("circle", "red", left))
    assert score_image(None, red_circle)[1] == "expected red circle>=1, found blue"

    red_square = {"class": "square", "count": 1, "color": "red"}
    beside = {"include": [red_square, CIRCLE | {"position": ["left of", 0]}]}
    reads(("square", "red", middle), ("circle", "red", left), ("circle", "red", right))
    assert score_image(None, beside)[0]


def test_detect_sorts_by_match_and_leaves_out_what_no_template_fits():
    circle = Thing("circle", "red", 13.6, 14.3, 7.2)
    square = Thing("square", "blue", 46, 14, 9)
    image = render(Scene((circle, square), GREY))
    pen = ImageDraw.Draw(image)
    # A bar, which stretched to its box is a square, a speck, and a corner.
    pen.rectangle((24, 40, 60, 52), draw.COLORS["green"])
    pen.rectangle((30, 58, 34, 62), draw.COLORS["black"])
    pen.line(((4, 40), (4, 58), (20, 58)), draw.COLORS["purple"], width=4)
    found = detect.detect(image)
    assert [f["shape"] for f in found] == ["square", "circle"]
    assert found[0]["match"] > found[1]["match"]
    boxes = [[37, 5, 55, 23], [6.4, 7.1, 20.8, 21.5]]
    assert np.allclose([f["box"] for f in found], boxes, rtol=0, atol=1)


def test_relations_follow_genevals_rule():
    for box, expected in (
        ([0, 20, 10, 30], {"left of"}),
        ([20, 40, 30, 50], {"below"}),
        ([0, 0, 10, 10], {"left of", "above"}),
        ([21, 21, 31, 31], set()),  # within GenEval's threshold of a tenth of both sizes
    ):
        assert detect.relations(box, [20, 20, 30, 30]) == expected


def test_score_folder_writes_results_that_genevals_summary_reads(tmp_path):
    """summary_scores.py: the mean over tags of the mean of `correct`."""
    tags = ["single_object"] * 3 + ["colors"] * 2 + ["position"]
    right = Scene((Thing("circle", "red", 32, 32, 10),), GREY)
    for number, tag in enumerate(tags):
        metadata = {"tag": tag, "include": [CIRCLE], "prompt": "a circle"}
        samples = tmp_path / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        render(right).save(samples / "0000.png")
        if number:
            render(Scene((), GREY)).save(samples / "0001.png")
        (samples / "grid.png").write_bytes(b"not a sample")

    scores = detect.score_folder(tmp_path)
    assert scores == {"single_object": 0.6, "colors": 0.5, "position": 0.5, "overall": 1.6 / 3}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [row["correct"] for row in rows] == [True] + 5 * [True, False]
    assert [row["tag"] for row in rows[::2]] == tags
    for row in rows:
        assert row.keys() > {"filename", "reason", "metadata"}
        assert row["prompt"] == "a circle"
    with pytest.raises(ValueError, match="no NNNNN"):
        detect.score_folder(samples)
