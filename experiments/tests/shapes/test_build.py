"""experiments.shapes.build, and the committed pipeline as a user loads it."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.shapes import build, draw
from experiments.shapes.detect import score_image
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH
from sample import read_prompts

PAIRS = draw.read_pairs()
PROMPTS = [row["prompt"] for row in read_prompts(DATA / "prompts.jsonl")]
CAPTIONS = sorted({"", *PAIRS["text"], *PROMPTS})


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusion3Pipeline.from_pretrained(DATA / "model")


def test_a_small_build_makes_the_same_pairs_and_a_pipeline_of_the_same_parts(pipe, tmp_path):
    build.build(tmp_path, scenes=64, pairs=20, vae_steps=2, steps=2, late_steps=1)
    assert (tmp_path / "prompts.jsonl").read_text() == (DATA / "prompts.jsonl").read_text()
    written = draw.read_pairs(tmp_path / "train.parquet")
    for ours, theirs in zip(written, PAIRS.select(range(20)), strict=True):
        assert np.array_equal(ours.pop("image"), theirs.pop("image")) and ours == theirs
    made = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    assert set(made.components) == set(pipe.components)
    for name, part in pipe.components.items():
        assert type(made.components[name]) is type(part), name
        if isinstance(part, torch.nn.Module):
            made.components[name].load_state_dict(part.state_dict())  # names and shapes agree


def test_committed_pipeline_is_float32_for_its_reader_and_half_on_disk(pipe):
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_3):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert pipe.scheduler.config.shift == 3.0 and pipe.vae.config.latent_channels == 16
    assert pipe.tokenizer_max_length == MAX_SEQUENCE_LENGTH
    files = [file for file in DATA.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10e6
    assert {file.suffix for file in files} == {".safetensors", ".json", ".jsonl", ".parquet"}
    weights = load_file(DATA / "model/transformer/diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_every_caption_tokenizes_whole(pipe, name):
    tokenizer = getattr(pipe, name)
    ids = tokenizer(CAPTIONS).input_ids
    special = 1 if name == "tokenizer_3" else 2  # T5 adds </s> only
    for caption, row in zip(CAPTIONS, ids, strict=True):
        assert len(row) == len(caption.split()) + special <= MAX_SEQUENCE_LENGTH, caption
        words = tokenizer.convert_ids_to_tokens(row, skip_special_tokens=True)
        spelt = " ".join(x.replace("</w>", "").replace("▁", "") for x in words)
        assert spelt == caption  # so no word became <unk>
    assert len({tuple(row) for row in ids}) == len(CAPTIONS)


@torch.no_grad()
def test_vae_round_trip_is_read_correctly_and_latents_have_unit_variance(pipe):
    pixels, _ = build.drawn(draw.CURATED, 100)
    metadata = [draw.example(draw.CURATED + i)[0] for i in range(100)]
    latents, _ = build.posterior(pipe.vae, pixels)
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1 and abs(scaled.std() - 1) < 0.1
    images = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    correct = [score_image(image, m)[0] for image, m in zip(images, metadata, strict=True)]
    assert np.mean(correct) >= 0.97


def test_mislabelled_captions_change_places_among_themselves():
    captions = [f"caption {i}" for i in range(2_000)]
    mixed = build.mislabel(captions, 0.3, 0)
    assert sorted(mixed) == sorted(captions) and mixed == build.mislabel(captions, 0.3, 0)
    assert 0.25 < np.mean([a != b for a, b in zip(captions, mixed)]) < 0.35
