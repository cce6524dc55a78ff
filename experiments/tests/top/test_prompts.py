"""sample.py's prompts, whole or cut, and its flags."""

import csv
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import sample
from experiments.tests.top.sampling import BASE, CPU, FIRST, ONE, refused, run, write_prompts

# --- Files of prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "Expecting value"]),
        ("p.jsonl", b'{"prompt": 3}\n', ["line 1", '"prompt"']),
        ("p.jsonl", b"[]\n", ["line 1", '"prompt"']),
        ("p.jsonl", b"", ["ends"]),
        ("p.txt", b"a\nb\n  \n", ["line 3", '"prompt"']),
        ("p.txt", b"a\nb\n\xff\n", ["line 3", "utf-8"]),
        ("p.csv", b"", ["header"]),
        ("p.csv", b"Prompt\tCategory\na\tb\n", ["line 1", "header", "Prompt\\tCategory"]),
        ("p.csv", b"Prompt,prompts\na,b\n", ["line 1", "header", "Prompt", "prompts"]),
        ("p.csv", b"Prompts,Category\na,b\na cat, a dog,b\n", ["line 3", "cells"]),
        ("p.csv", b'Prompts,Category\n"a\nb",c\n"d"e,f\n', ["line 4"]),
        ("p.tsv", b"Prompt\tCategory\na\tb\nc\n", ["line 3", "cells"]),
        ("p.json", b"a\n", [".jsonl", ".txt", ".csv", ".tsv"]),
    ],
)
def test_prompt_file_errors_name_file_and_line(tmp_path, no_model, name, text, words):
    (tmp_path / name).write_bytes(text)
    flags = ONE | {"prompt": None, "prompts": tmp_path / name}
    message = refused(tmp_path / "out", *words, **flags)
    assert message.count(str(tmp_path / name)) == 1 and not (tmp_path / "out").exists()


def test_prompt_files_of_the_benchmarks_are_read(tmp_path):
    bench = {"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
    other = {"tag": "x", "include": [], "prompt": "zwei Bänke\u2028und eine", "exclude": None}
    geneval = [bench, other]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in geneval)
    (tmp_path / "geneval.jsonl").write_text(lines)
    assert sample.read_prompts(tmp_path / "geneval.jsonl") == geneval
    ocr = ['A sign that says "Hello, World"', 'Neon letters \u2028 "OPEN" at night; it\'s late']
    (tmp_path / "test.txt").write_text("\ufeff" + "\n".join(ocr))
    assert sample.read_prompts(tmp_path / "test.txt") == [{"prompt": text} for text in ocr]
    rows = [("A red car.", "Colors"), ('A sign that says "Hi",\nin two lines', "Text")]
    with (tmp_path / "drawbench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *rows])
    expected = [{"prompt": text, "Category": kind} for text, kind in rows]
    assert sample.read_prompts(tmp_path / "drawbench.csv") == expected
    (tmp_path / "lower.csv").write_text("id, PROMPT\r\n1,a\r\n2,b\r\n")
    assert [row["prompt"] for row in sample.read_prompts(tmp_path / "lower.csv")] == ["a", "b"]
    # Tabs between columns, a quote that opens a prompt, no doubled quotes, empty notes.
    prompts = ['"O P E N" in neon over a door', 'a sign with "Yes" on it', 'a 6" nail, rusty', "42"]
    text = "Prompt\tCategory\tNote\n" + "".join(f"{prompt}\tArts\t\n" for prompt in prompts)
    (tmp_path / "PartiPrompts.tsv").write_text(text)
    expected = [{"prompt": prompt, "Category": "Arts", "Note": ""} for prompt in prompts]
    assert sample.read_prompts(tmp_path / "PartiPrompts.tsv") == expected


# --- Prompts that are cut -------------------------------------------------------------------------


def test_texts_are_cut_beyond_the_tokens_of_clip_or_of_t5(tmp_path, capsys):
    """n words are n tokens, and two more for CLIP, which reads 12, or one more for T5."""
    pipe = sample.load_pipeline(str(BASE), torch.float32, CPU)
    texts = [" ".join(["red"] * n) for n in range(14)]
    assert sample.count_cut(pipe, texts, 12) == 3  # 11, 12 and 13 words, by CLIP
    assert sample.count_cut(pipe, texts, 100) == 3
    assert sample.count_cut(pipe, texts, 5) == 9  # 5 to 13 words, by T5
    assert sample.count_cut(pipe, texts * 150, 5) == 9 * 150
    flags = write_prompts(tmp_path / "p.txt", [texts[3], texts[11]])
    run(tmp_path / "out", **flags)
    assert capsys.readouterr().out.splitlines()[0] == "1 of 2 prompts are cut at 12 tokens"


def test_pipelines_warning_of_cut_texts_is_silent_and_no_other(caplog):
    log = logging.getLogger(StableDiffusion3Pipeline.__module__)
    log.addHandler(caplog.handler)
    pipe = sample.load_pipeline(str(BASE), torch.float32, CPU)
    tokens = pipe.tokenizer(["red " * 20]).input_ids
    sample.encode_prompts(pipe, ["red " * 20], 5)
    log.warning("another")
    log.removeHandler(caplog.handler)
    assert len(tokens[0]) > 12 and set(caplog.messages) == {"another"}


# --- Flags ----------------------------------------------------------------------------------------


def test_flags_out_of_range_are_errors_that_name_them(tmp_path):
    for given in ({}, {"prompt": "a", "prompts": Path("b.txt")}):
        with pytest.raises(ValueError, match="(?s)--prompts.*--prompt"):
            sample.Args(output_dir=Path("o"), **given)
    for name, value in (("batch_size", 0), ("guidance_scale", math.nan), ("seed", math.inf)):
        with pytest.raises(ValueError, match=f"--{name} is {value}.*finite"):
            sample.Args(output_dir=Path("o"), prompt="a", **{name: value})
    for name, size in (("width", 68), ("height", 136)):
        refused(tmp_path / "a", f"--{name}", str(size), "8", "128", **ONE | {name: size})
    run(tmp_path / "a", **ONE | {"width": 72})  # the same folder is free for what fits
    assert Image.open(tmp_path / "a" / FIRST).size == (72, 64)


def test_published_protocol_is_the_default():
    args = sample.Args(output_dir=Path("o"), prompt="a")
    assert (args.num_images_per_prompt, args.num_inference_steps) == (4, 40)
    assert (args.guidance_scale, args.height, args.width) == (4.5, 512, 512)
    assert (args.transformer, args.mixed_precision) == (("base",), "bf16")
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3.5-medium"
