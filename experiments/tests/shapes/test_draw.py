"""experiments.shapes.draw: prompts and scenes, and the committed pairs that are made of them."""

import re

import numpy as np

from experiments.shapes import draw
from experiments.shapes.detect import score_image
from sample import read_prompts

PROMPTS = read_prompts(draw.DATA / "prompts.jsonl")
PAIRS = draw.read_pairs()
NOUN, COLOR = "(circle|square|triangle|cross)", "(red|green|blue|yellow|purple|black)"
PHRASES = {
    "single_object": f"a {NOUN}",
    "two_object": f"a {NOUN} and a {NOUN}",
    "counting": "(two|three|four) (circles|squares|triangles|crosses)",
    "colors": f"a {COLOR} {NOUN}",
    "position": f"a {NOUN} (left of|right of|above|below) a {NOUN}",
    "color_attr": f"a {COLOR} {NOUN} and a {COLOR} {NOUN}",
}


def test_metadata_follows_genevals_schema_and_captions_its_phrasing():
    assert [sum(m["tag"] == tag for m in PROMPTS) for tag in draw.TAGS] == [100] * 6
    for m in PROMPTS:
        tag, include = m["tag"], m["include"]
        assert re.fullmatch("a photo of " + PHRASES[tag], m["prompt"]), m
        extra = {"color"} if tag in ("colors", "color_attr") else set()
        keys = [{"class", "count"} | extra for _ in include]
        if tag == "position":
            keys[1].add("position")
            reference, placed = include
            relation, target = placed["position"]
            words = f"{placed['class']} {relation} a {reference['class']}"
            assert m["prompt"] == f"a photo of a {words}" and target == 0
        assert [set(clause) for clause in include] == keys
        more = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
        assert m.get("exclude") == (more if tag == "counting" else None)


def test_held_out_color_attr_prompts_are_in_no_training_caption():
    held_out = {m["prompt"] for m in PROMPTS if m["tag"] == "color_attr"}
    broad = {draw.example(draw.BROAD + i)[0]["prompt"] for i in range(1_500)}
    assert len(held_out) > 50 and len(draw.held_out_pairs()) == 90
    assert not held_out & set(PAIRS["text"]) and not held_out & broad


def test_committed_training_set_is_complete_correct_and_varied():
    assert len(PAIRS) == 2_000 and set(PAIRS.features) == {"image", "text", "aesthetic"}
    for i in range(0, 2_000, 10):
        row = PAIRS[i]
        metadata, scene = draw.example(draw.CURATED + i)
        image = row["image"]
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        assert score_image(image, metadata)[0] and metadata["prompt"] == row["text"]
        assert row["aesthetic"] == draw.aesthetic_score(scene)
    scores = np.array(PAIRS["aesthetic"])
    assert scores.min() >= 4 and scores.max() <= 8 and scores.std() > 0.3
