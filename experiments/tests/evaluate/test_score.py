"""Folders and their scores, the table's numbers, and the whole command."""

import json
import math
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from experiments.evaluate import score
from experiments.evaluate.geneval import Column
from experiments.tests.common import MODEL
from experiments.tests.evaluate.folders import cells, entry, make_folder, run, summary_of, values_of
from experiments.tests.evaluate.small_weights import COMMIT


@pytest.fixture
def bright(monkeypatch) -> SimpleNamespace:
    """In place of a model: the mean grey level times `weights`; `seen` are the prompts."""
    made = SimpleNamespace(weights=1, seen=[])

    def values(images, prompts):
        made.seen.extend(prompts)
        return torch.tensor([made.weights * np.asarray(image).mean() for image in images])

    kind = Mock(return_value=values, SOURCES=("its/source",))
    monkeypatch.setattr(score, "MODEL_BASED", {"aesthetic": kind})
    monkeypatch.setattr(score.scorers, "identity", lambda source: f"{source} {made.weights}")
    return made


def test_table_has_mean_error_paired_difference_and_protocol(tmp_path, bright, capsys):
    """Means over prompts, errors over prompts, differences image by image."""
    prompts = ["a red circle", "a blue square", "two circles"]
    first = make_folder(tmp_path / "a", prompts)
    other = make_folder(tmp_path / "b", prompts, look=1, torch="2.9.0")
    out = run(first, other, capsys=capsys)
    a, b = (np.reshape(values_of(x, "aesthetic"), (3, 2)) for x in (first, other))
    summary, row = summary_of(other), cells(out, "aesthetic")
    for found, per_prompt, cell, form in (
        (summary["metrics"], b.mean(1), row[2], ".4g"),
        (summary["minus"]["metrics"], (b - a).mean(1), row[3], "+.3g"),
    ):
        mean, error = per_prompt.mean(), per_prompt.std(ddof=1) / 3**0.5
        assert found == {"aesthetic": entry(mean, error, "3 x 2")}
        assert cell == f"{mean:{form}} ({error:.2g})"
    assert row[0] == "3 x 2"
    said = "pipeline p, shift 3.0, seed 42, num_inference_steps 40, guidance_scale 4.5, height 512"
    said += ", width 512, max_sequence_length 77, mixed_precision bf16, torch 2.14.1."
    assert f"Images: {said}" in out
    assert out.splitlines()[-1] == f"{other} was drawn with torch 2.9.0 for 2.14.1."


def test_the_error_of_uneven_repeats_is_the_spread_over_draws_of_prompts():
    """1,500 sets of 60 prompts, 1 or 5 images of each, a prompt's images being alike."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(1500):
        counts = generator.choice([1, 5], 60)
        values = (generator.normal(size=60) + (counts == 5)).repeat(counts)
        names = np.arange(60).repeat(counts)
        found.append(score.mean_and_error(Column(values, names, np.zeros(len(values)))))
    means, errors = np.transpose(found)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)


def test_scores_of_the_same_images_and_weights_are_kept_and_no_others(tmp_path, bright, capsys):
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    run(folder)
    before = values_of(folder, "aesthetic")
    run(folder)
    assert bright.seen == ["red", "red", "blue", "blue"]
    assert values_of(folder, "aesthetic") == before
    Image.new("RGB", (32, 32)).save(folder / "00001/samples/00000.png")
    out = run(folder, capsys=capsys)
    assert len(bright.seen) == 8 and f"{folder / 'scores.json'} is of other images" in out
    after = values_of(folder, "aesthetic")
    assert [x == y for x, y in zip(before, after)] == [True, True, False, True]
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("blue", "green"))
    run(folder)
    assert bright.seen[8:] == ["red", "red", "green", "green"]
    bright.weights = 2
    out = run(folder, capsys=capsys)
    assert len(bright.seen) == 16
    assert "aesthetic is computed anew: was by its/source 1, now by its/source 2" in out
    assert values_of(folder, "aesthetic") == [2 * x for x in after]


@pytest.mark.parametrize("death", range(3))
def test_scores_never_stand_under_other_weights_whenever_a_run_dies(
    tmp_path, bright, monkeypatch, death
):
    """Dies at one of its writes; afterwards each score in the folder is by the weights named."""
    folders = [make_folder(tmp_path / x, ["red", "blue"]) for x in "ab"]
    run(*folders)
    first, outcomes = values_of(folders[0], "aesthetic"), [DEFAULT] * death + [OSError("disk full")]
    monkeypatch.setattr(score, "save_whole", Mock(wraps=score.save_whole, side_effect=outcomes))
    bright.weights = 2
    with pytest.raises(OSError, match="disk full"):
        run(*folders)
    for folder in folders:
        by = int(summary_of(folder)["scorers"]["aesthetic"].split()[-1])
        assert values_of(folder, "aesthetic") == [by * x for x in first]


def test_folders_that_cannot_be_scored_are_refused_by_name(tmp_path, bright):
    first, image = "00000/samples/00000.png", "00001/samples/00001.png"
    good, *bad = (make_folder(tmp_path / str(i), ["red", "blue"]) for i in range(5))
    for folder, file in zip(bad, ("protocol.json", "samples.jsonl", image)):
        (folder / file).unlink()
    (bad[3] / first).write_bytes(b"no image")
    other = make_folder(tmp_path / "other", ["red", "green"])
    more = make_folder(tmp_path / "more", ["red", "blue"], 3)
    named = ["protocol.json", "samples.jsonl", image, first] + 2 * ["different prompts"]
    for folder, name in zip([*bad, other, more], named, strict=True):
        with pytest.raises(ValueError, match=name) as error:
            run(good, folder)
        assert str(folder) in str(error.value)
    with pytest.raises(SystemExit, match=f"^error: {bad[0]} has no protocol.json"):
        score.command([str(good), str(bad[0])])
    with pytest.raises(ValueError, match="at least one FOLDER"):
        run(good / "protocol.json")
    bright.weights = math.inf
    with pytest.raises(ValueError, match=f"aesthetic of {more / first} is inf"):
        run(more)
    assert not (more / "scores.json").exists()


def test_folders_of_other_protocols_are_refused(tmp_path, bright):
    a = make_folder(tmp_path / "a", ["red", "blue"])
    for changed, named in (
        ({"guidance_scale": 1.0}, "guidance_scale 1.0 for 4.5"),
        ({"sigmas": [1.0] * 4, "num_inference_steps": 4}, "num_inference_steps 4 for 40, sigmas"),
        ({"seed": 1, "torch": "2.9.0"}, "seed 1 for 42"),
        ({"unheard_of": 1}, "unheard_of 1 for None"),
    ):
        b = make_folder(tmp_path / "b", ["red", "blue"], **changed)
        with pytest.raises(ValueError, match=f"{b} differs from {a} by more than weights: {named}"):
            run(a, b)
    assert not (b / "scores.json").exists()


def test_missing_weights_are_named_all_at_once(tmp_path, hub, monkeypatch):
    """Before any model is loaded; also those of which the cache has the config alone."""
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(SystemExit) as error:
            score.command([str(folder)])
    for name, kind in score.MODEL_BASED.items():
        assert f"{name}, which needs {' and '.join(kind.SOURCES)}" in str(error.value)
    weights = hub["yuvalkirstain/PickScore_v1"] / "model.safetensors"
    weights.rename(tmp_path / "away")
    with pytest.raises(SystemExit, match="pickscore needs all of yuvalkirstain/PickScore_v1"):
        score.command([str(folder), "--metrics", "pickscore"])
    (tmp_path / "away").rename(weights)
    assert not (folder / "scores.json").exists()


def test_a_folder_of_the_shapes_world_goes_through_every_metric(tmp_path, hub, capsys):
    """sample.py draws lines of GenEval 2's form from two names of one transformer."""
    more = {"tag": "colors", "atom_count": 2, "skills": ["object", "attribute"]}
    rows = [{"prompt": x} | more for x in ('a red circle "on"', 'a blue square "off"')]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    transformers = ("base", MODEL["pretrained_model_name_or_path"] + "/transformer")
    flags = {"height": 64, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": 1}
    flags |= {"prompts": file, "output_dir": tmp_path / "out", "transformer": transformers}
    sample.main(sample.Args(**flags, **MODEL))
    given = sorted((tmp_path / "out").iterdir())
    folders = [x for x in given if x.is_dir()]
    assert len(folders) == 2 and tmp_path / "out/compare.png" in given
    answer = {"tag": "colors", "correct": True, "ocr": 0.5}
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "samples.jsonl").open()]
        answers = [row | answer | {"filename": row["file"]} for row in rows]
        for name in ("results.jsonl", "ocr.jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in answers))
        (folder / "score_lists.json").write_text("[[0.5, 0.75], [1.0, 0.25]]")
    names = {*score.MODEL_BASED, *score.READ}
    out = run(*given, metrics=tuple(score.MODEL_BASED), capsys=capsys)
    for summary in map(summary_of, folders):
        assert len(summary["rows"]) == 2 and names | {"geneval colors"} < summary["metrics"].keys()
        assert all(math.isfinite(row[name]) for row in summary["rows"] for name in names)
    assert {summary["minus"]["metrics"][name]["mean"] for name in names} == {0}
    assert all(cells(out, name)[0] == "2 x 1" for name in names)
    assert "guidance_scale 4.5" in out and "height 64" in out
    assert f"yuvalkirstain/PickScore_v1 commit {COMMIT}; " in summary["scorers"]["pickscore"]
