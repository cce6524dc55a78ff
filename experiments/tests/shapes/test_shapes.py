"""The scorer on scenes whose truth is known; the committed data and pipeline as a user loads them."""

import json
import re
import socket
from collections import defaultdict
from dataclasses import replace

import datasets
import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import ImageDraw
from safetensors.torch import load_file

import train
from experiments.shapes import build, detect, draw
from experiments.shapes.detect import score_image
from experiments.shapes.draw import CURATED, DATA, MAX_SEQUENCE_LENGTH, Scene, Thing, render
from experiments.tests.common import train_args
from sample import encode_prompts, sample_images, seeded

SEEDS = range(5_000_000, 5_000_040)
PROMPTS = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
PAIRS = draw.read_pairs()


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(tag):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        metadata = draw.make_metadata(rng, tag)
        yield rng, metadata, draw.make_scene(rng, metadata)


def change(scene, i, **fields):
    things = list(scene.things)
    things[i] = replace(things[i], **fields)
    return replace(scene, things=tuple(things))


def other(rng, options, *not_these):
    return str(rng.choice([option for option in options if option not in not_these]))


def wrong_shape(rng, metadata, scene):
    i = rng.integers(len(scene.things))
    return change(scene, i, shape=other(rng, draw.SHAPES, scene.things[i].shape))


def missing(rng, metadata, scene):
    gone = rng.integers(len(scene.things))
    return replace(scene, things=tuple(t for i, t in enumerate(scene.things) if i != gone))


def one_more(rng, metadata, scene):
    more = [dict(metadata["include"][0], count=metadata["include"][0]["count"] + 1)]
    return draw.make_scene(rng, {"include": more})


def wrong_color(rng, metadata, scene):
    i = rng.integers(len(scene.things))
    return change(scene, i, color=other(rng, draw.COLORS, scene.things[i].color))


def swapped_colors(rng, metadata, scene):
    a, b = scene.things
    return replace(scene, things=(replace(a, color=b.color), replace(b, color=a.color)))


def swapped_places(rng, metadata, scene):
    a, b = scene.things
    return replace(scene, things=(replace(a, shape=b.shape), replace(b, shape=a.shape)))


def transposed(rng, metadata, scene):
    return replace(scene, things=tuple(replace(t, x=t.y, y=t.x) for t in scene.things))


BREAKS = [(tag, broken) for tag in draw.TAGS for broken in (wrong_shape, missing)]
BREAKS += [("counting", one_more), ("colors", wrong_color), ("color_attr", wrong_color)]
BREAKS += [("color_attr", swapped_colors), ("position", swapped_places), ("position", transposed)]


@pytest.mark.parametrize("tag", draw.TAGS)
def test_score_image_accepts_every_rendered_scene(tag):
    for _, metadata, scene in scenes(tag):
        correct, reason, _ = score_image(render(scene), metadata)
        assert correct and reason == "", (metadata["prompt"], reason, scene)


@pytest.mark.parametrize("tag, broken", BREAKS, ids=lambda x: getattr(x, "__name__", x))
def test_score_image_rejects_every_scene_with_one_attribute_broken(tag, broken):
    for rng, metadata, scene in scenes(tag):
        correct, reason, _ = score_image(render(broken(rng, metadata, scene)), metadata)
        assert not correct and reason, (metadata["prompt"], scene)


def test_detect_reads_shape_color_and_box_of_every_rendered_thing():
    for tag in draw.TAGS:
        for _, _, scene in scenes(tag):
            found = {
                (f["shape"], f["color"], *np.array(f["box"]).reshape(2, 2).mean(0))
                for f in detect.detect(render(scene))
            }
            assert len(found) == len(scene.things)
            for thing in scene.things:
                assert any(
                    (f[0], f[1]) == (thing.shape, thing.color)
                    and abs(f[2] - thing.x) < 1.5
                    and abs(f[3] - thing.y) < 1.5
                    for f in found
                )


def test_score_image_allows_extra_objects_unless_a_clause_excludes_them():
    things = [
        Thing("circle", "red", 14, 14, 8),
        Thing("circle", "red", 48, 14, 8),
        Thing("square", "blue", 14, 48, 8),
    ]
    image = render(Scene(tuple(things), (230, 230, 230)))
    include = [{"class": "circle", "count": 1}]
    assert score_image(image, {"include": include})[0]
    correct, reason, details = score_image(
        image, {"include": include, "exclude": [{"class": "circle", "count": 2}]}
    )
    assert not correct and reason == "expected circle<2, found 2"
    assert sorted(details) == ["circle", "square"] and len(details["circle"]) == 2


def test_score_image_judges_the_best_matches_only(monkeypatch):
    def reads(*found):
        keys = ("shape", "color", "box")
        monkeypatch.setattr(detect, "detect", lambda image: [dict(zip(keys, f, strict=True)) for f in found])

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
    reads(("square", "blue", middle), ("circle", "red", left))
    assert score_image(None, beside)[1].endswith("no target for circle to be left of")


def test_detect_sorts_by_match_and_leaves_out_what_no_template_fits():
    circle, square = Thing("circle", "red", 13.6, 14.3, 7.2), Thing("square", "blue", 46, 14, 9)
    image = render(Scene((circle, square), (230, 230, 230)))
    pen = ImageDraw.Draw(image)
    # A bar, which stretched to its box is a square, and a speck.
    pen.rectangle((4, 40, 60, 52), draw.COLORS["green"])
    pen.rectangle((2, 58, 6, 62), draw.COLORS["black"])
    found = detect.detect(image)
    assert [f["shape"] for f in found] == ["square", "circle"] and found[0]["match"] > found[1]["match"]
    for f, thing in zip(found, (square, circle), strict=True):
        box = [thing.x - thing.r, thing.y - thing.r, thing.x + thing.r, thing.y + thing.r]
        assert np.abs(np.subtract(f["box"], box)).max() <= 1


@pytest.mark.parametrize(
    "box, expected",
    [
        ([0, 20, 10, 30], {"left of"}),
        ([40, 20, 50, 30], {"right of"}),
        ([20, 0, 30, 10], {"above"}),
        ([20, 40, 30, 50], {"below"}),
        ([0, 0, 10, 10], {"left of", "above"}),
        ([21, 21, 31, 31], set()),  # within GenEval's threshold of a tenth of both sizes
        ([20, 20, 30, 30], set()),
    ],
)
def test_relations_follow_genevals_rule(box, expected):
    assert detect.relations(box, [20, 20, 30, 30]) == expected


def test_score_folder_writes_results_that_genevals_summary_reads(tmp_path):
    truth = []
    for number, tag in enumerate(["single_object"] * 3 + ["colors"] * 2 + ["position"]):
        rng = np.random.default_rng(number)
        metadata = draw.make_metadata(rng, tag)
        scene = draw.make_scene(rng, metadata)
        samples = tmp_path / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        for k, s in enumerate([scene, missing(rng, metadata, scene)][: 1 if number == 0 else 2]):
            render(s).save(samples / f"{k:04d}.png")
            truth.append((tag, k == 0))
        (samples / "grid.png").write_bytes(b"not a sample")
    (tmp_path / "notes").mkdir()

    scores = detect.score_folder(tmp_path, tmp_path / "results.jsonl")
    # summary_scores.py: group the lines by tag, mean of `correct`, then the mean of the groups' means.
    groups = defaultdict(list)
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert json.loads(row["metadata"])["prompt"] == row["prompt"] and isinstance(
            json.loads(row["details"]), dict
        )
        assert row["correct"] is (row["reason"] == "")
        groups[row["tag"]].append(row["correct"])
    assert {tag: sum(c) for tag, c in groups.items()} == {"single_object": 3, "colors": 2, "position": 1}
    means = {tag: np.mean(correct) for tag, correct in groups.items()}
    assert scores == {
        "single_object": 0.6,
        "colors": 0.5,
        "position": 0.5,
        "overall": np.mean(list(means.values())),
    }
    with pytest.raises(ValueError, match="no NNNNN"):
        detect.score_folder(tmp_path / "notes")


def test_metadata_follows_genevals_schema_and_captions_its_phrasing():
    noun = r"(circle|square|triangle|cross)"
    color = r"(red|green|blue|yellow|purple|black)"
    patterns = {
        "single_object": f"a {noun}",
        "two_object": f"a {noun} and a {noun}",
        "counting": "(two|three|four) (circles|squares|triangles|crosses)",
        "colors": f"a {color} {noun}",
        "position": f"a {noun} (left of|right of|above|below) a {noun}",
        "color_attr": f"a {color} {noun} and a {color} {noun}",
    }
    assert [sum(m["tag"] == tag for m in PROMPTS) for tag in draw.TAGS] == [100] * 6
    for m in PROMPTS:
        assert re.fullmatch("a photo of " + patterns[m["tag"]], m["prompt"]), m
        assert set(m) == {"tag", "include", "prompt"} | ({"exclude"} if m["tag"] == "counting" else set())
        extra = {"colors": {"color"}, "color_attr": {"color"}}.get(m["tag"], set())
        for i, req in enumerate(m["include"]):
            assert set(req) == {"class", "count"} | extra | (
                {"position"} if m["tag"] == "position" and i else set()
            )
        if m["tag"] == "position":
            placed, reference = m["include"][1], m["include"][0]
            assert (
                m["prompt"]
                == f"a photo of a {placed['class']} {placed['position'][0]} a {reference['class']}"
            )
            assert placed["position"][1] == 0
        if m["tag"] == "counting":
            assert m["exclude"] == [
                {"class": m["include"][0]["class"], "count": m["include"][0]["count"] + 1}
            ]
        # The prompt can be met: a scene drawn for it is correct.
        assert score_image(render(draw.make_scene(np.random.default_rng(1), m)), m)[0]


def test_held_out_color_attr_prompts_are_in_no_training_caption():
    held_out = {m["prompt"] for m in PROMPTS if m["tag"] == "color_attr"}
    broad = {draw.example(draw.BROAD + i)[0]["prompt"] for i in range(3_000)}
    assert len(held_out) > 50 and len(draw.held_out_pairs()) == 90
    assert not held_out & set(PAIRS["text"]) and not held_out & broad


def test_committed_data_is_what_the_seeds_make(tmp_path):
    assert build.held_out_prompts() == PROMPTS
    build.write_data(tmp_path, 20)
    written = draw.read_pairs(tmp_path / "train.parquet")
    assert len(written) == 20
    for made, row in zip(written, PAIRS.select(range(20)), strict=True):
        assert np.array_equal(np.asarray(made.pop("image")), np.asarray(row.pop("image"))) and made == row


def test_committed_training_set_is_complete_correct_and_varied():
    assert len(PAIRS) == 2_000 and set(PAIRS.features) == {"image", "text", "aesthetic"}
    for i, row in enumerate(PAIRS):
        assert 4 <= row["aesthetic"] <= 8
        if i % 10 == 0:
            metadata, scene = draw.example(CURATED + i)
            image = row["image"]
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            assert score_image(image, metadata)[0] and metadata["prompt"] == row["text"]
            assert row["aesthetic"] == draw.aesthetic_score(scene)
    assert np.std(PAIRS["aesthetic"]) > 0.3


def test_datasets_and_train_py_read_the_training_set_in_its_order():
    loaded = datasets.load_dataset("parquet", data_files=str(DATA / "train.parquet"), split="train")
    assert loaded.features == PAIRS.features and loaded["text"] == PAIRS["text"]
    pairs = train.Pairs(train_args(output_dir="unused").data)
    assert pairs.captions() == PAIRS["text"][:]
    assert len(train.Pairs(train_args(output_dir="unused", min={"aesthetic": 6.8}).data)) == 66


def test_committed_files_are_at_most_ten_megabytes_and_hold_no_pickle():
    files = [f for f in DATA.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10e6
    assert {f.suffix for f in files} == {".safetensors", ".json", ".jsonl", ".parquet"}
    weights = load_file(DATA / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}


def test_pipeline_loads_with_the_network_off_and_has_the_real_classes(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(DATA / "model")
    expected = {
        "transformer": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "text_encoder_3": transformers.T5EncoderModel,
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
        "tokenizer_3": transformers.T5TokenizerFast,
    }
    for name, kind in expected.items():
        component = getattr(pipe, name)
        assert type(component) is kind, name
        assert not isinstance(component, torch.nn.Module) or {p.dtype for p in component.parameters()} == {
            torch.float32
        }
    assert pipe.scheduler.config.shift == 3.0 and pipe.vae.config.latent_channels == 16
    assert pipe.tokenizer_max_length == MAX_SEQUENCE_LENGTH


def test_every_caption_tokenizes_whole_in_all_tokenizers_also_after_reload(pipe, tmp_path):
    captions = sorted(set(PAIRS["text"]) | {m["prompt"] for m in PROMPTS} | {""})
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name)
        ids = tokenizer(captions).input_ids
        special = 1 if name == "tokenizer_3" else 2  # T5 adds </s> only
        for caption, row in zip(captions, ids, strict=True):
            words = [token for token in tokenizer.convert_ids_to_tokens(row)]
            assert len(row) == len(caption.split()) + special <= MAX_SEQUENCE_LENGTH, (caption, words)
            spelt = [
                w.replace("</w>", "").replace("▁", "") for w in words if w not in tokenizer.all_special_tokens
            ]
            assert " ".join(spelt) == caption  # so no word became <unk>
        assert len({tuple(row) for row in ids}) == len(captions)
        tokenizer.save_pretrained(tmp_path / name)
        reloaded = type(tokenizer).from_pretrained(tmp_path / name)
        assert reloaded(captions).input_ids == ids


def test_embeddings_keep_all_captions_apart(pipe):
    captions = sorted(set(PAIRS["text"]) | {m["prompt"] for m in PROMPTS} | {""})
    prompt_embeds, pooled_prompt_embeds = encode_prompts(pipe, captions, MAX_SEQUENCE_LENGTH).values()
    assert prompt_embeds.shape == (len(captions), 2 * MAX_SEQUENCE_LENGTH, 64)
    assert pooled_prompt_embeds.shape == (len(captions), 64)
    norm = prompt_embeds.flatten(1).norm(dim=1).mean()
    distance = torch.cdist(prompt_embeds.flatten(1), prompt_embeds.flatten(1)) + norm * torch.eye(
        len(captions)
    )
    assert distance.min() > 0.2 * norm


@torch.no_grad()
def test_vae_round_trip_is_read_correctly_and_latents_have_unit_variance(pipe):
    examples = [draw.example(CURATED + i) for i in range(100)]
    latents, _ = build.posterior(pipe.vae, build.to_pixels(render(scene) for _, scene in examples))
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1 and abs(scaled.std() - 1) < 0.1
    images = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    correct = [score_image(image, m)[0] for image, (m, _) in zip(images, examples, strict=True)]
    assert np.mean(correct) >= 0.97


def test_mislabelled_captions_change_places_among_themselves():
    captions = [f"caption {i}" for i in range(2_000)]
    mixed = build.mislabel(captions, 0.3, 0)
    assert sorted(mixed) == sorted(captions) and mixed == build.mislabel(captions, 0.3, 0)
    assert 0.25 < np.mean([a != b for a, b in zip(captions, mixed)]) < 0.35
    assert build.mislabel(captions, 0, 0) == captions


@torch.no_grad()
def test_base_draws_what_some_prompts_ask_for(pipe):
    prompts = [m for m in PROMPTS if m["tag"] == "colors"][:12]
    cond = encode_prompts(pipe, [m["prompt"] for m in prompts], MAX_SEQUENCE_LENGTH)
    uncond = encode_prompts(pipe, [""] * len(prompts), MAX_SEQUENCE_LENGTH)
    z1 = torch.randn(len(prompts), 16, 8, 8, generator=seeded("test"))
    images = sample_images(pipe, pipe.transformer, z1, cond, uncond, 20, 4.5)
    correct = [score_image(image, m)[0] for image, m in zip(images, prompts, strict=True)]
    assert np.mean(correct) >= 0.25  # an untrained transformer scores 0
