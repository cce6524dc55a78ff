"""What GenEval and GenEval 2 wrote, in the table and in scores.json."""

import json
import math
from pathlib import Path

import pytest

from experiments.tests.evaluate.folders import cells, entry, make_folder, run, summary_of, values_of

TASKS = {"a bench": "single_object", "a cat": "single_object"}
TASKS |= {"two dogs": "counting", "two cats": "counting"}


def write_results(folder: Path, verdicts: list[bool]) -> str:
    """As evaluation/evaluate_images.py of djghosh13/geneval writes it, in another order."""
    rows, text = map(json.loads, (folder / "samples.jsonl").open()), ""
    for row, correct in zip(rows, verdicts, strict=True):
        line = {"filename": "/elsewhere/" + row["file"], "prompt": row["prompt"]}
        line |= {"tag": TASKS[row["prompt"]], "correct": correct}
        text = json.dumps(line).replace("/", "\\/") + "\n" + text
    (folder / "results.jsonl").write_text(text)
    return text


def test_geneval_is_the_official_overall_score_where_prompts_repeat_unevenly(tmp_path, capsys):
    """summary_scores.py: the mean over tasks of the share of correct images. Means over prompts,
    or over all images, would be other numbers."""
    prompts = ["a bench"] * 4 + ["a cat"] + ["two dogs"] * 2 + ["two cats"] * 2
    folders = [make_folder(tmp_path / x, prompts, 1) for x in "ab"]
    write_results(folders[0], [True, True, True, False, False, True, False, False, False])
    write_results(folders[1], [True] * 9)
    out = run(*folders, metrics=("geneval",), capsys=capsys)
    # At their task's mean of 3/5 prompts would have 2.4 and 0.6 correct images, and have 3 and 0;
    # at 1/4 0.5 and 0.5, and have 1 and 0. Errors: (2 (0.6^2 + 0.6^2))^0.5 / 5 and so on.
    assert summary_of(folders[0])["metrics"] == {
        "geneval": entry(0.425, math.hypot(0.24, 0.25) / 2, "4 prompts, 9 values, 2 tasks"),
        "geneval single_object": entry(0.6, 0.24, "2 prompts, 5 values"),
        "geneval counting": entry(0.25, 0.25, "2 x 2"),
    }
    assert "+0.575 (" in cells(out, "geneval")[-1]


def test_geneval_is_paired_where_both_folders_have_it_of_the_same_tasks(tmp_path, capsys):
    """results.jsonl is read where it is, whatever --metrics names."""
    folders = [make_folder(tmp_path / x, list(TASKS), 1) for x in "ab"]
    for folder in folders:
        text = write_results(folder, [True, False, True, True])
    (folder / "results.jsonl").write_text(text.replace('"counting"', '"single_object"', 1))
    run(*folders, metrics=("geneval",), capsys=capsys)
    summary = summary_of(folder)
    assert summary["minus"]["metrics"] == {} and summary["metrics"].keys() > {"geneval counting"}
    (folders[0] / "results.jsonl").unlink()
    with pytest.raises(ValueError, match=f"no results.jsonl.*\n.*evaluate_images.py {folders[0]}"):
        run(*folders, metrics=("geneval",))
    row = cells(run(*folders, metrics=(), capsys=capsys), "geneval")
    assert row == ["4 x 1, 2 tasks", "", "0.8333", ""]  # a task of one prompt: no error is known
    scorers = [summary_of(x)["scorers"] for x in folders]
    assert "geneval" in scorers[1] and "geneval" not in scorers[0]
    (folder / "results.jsonl").unlink()
    assert "| geneval" not in run(*folders, metrics=(), capsys=capsys)
    assert not any("geneval" in row for row in summary_of(folder)["rows"])


def test_geneval_of_other_images_or_prompts_is_refused(tmp_path):
    folder = make_folder(tmp_path / "a", list(TASKS), 1)
    text = write_results(folder, [True] * 4)
    for wrong, named in (
        (text.replace("a cat", "a dog"), "00001/samples/00000.png is of another prompt"),
        ("".join(text.splitlines(keepends=True)[:2]), "not of this folder's images"),
        (text.replace("00003", "00004"), "not of this folder's images"),
        (text + "{", "results.jsonl, line 5"),
    ):
        (folder / "results.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match=named):
            run(folder, metrics=("geneval",))


ATOMS = [
    {"prompt": "a green cat", "atom_count": 3, "skills": ["count", "attribute", "object"]},
    {"prompt": "two red pigs and a car", "atom_count": 5, "skills": ["count", "object", "count"]},
    {"prompt": "six cows", "atom_count": 3, "skills": ["count", "object"]},
]
LISTS = [[0.5, 0.25, 1.0], [0.1, 0.9, 0.0], [0.2, 0.8]]  # geometric means 0.5, 0 and 0.4


def geneval2_folder(path: Path, images: int = 1, lists: list = ()) -> Path:
    folder = make_folder(path, ATOMS, images)
    if lists:
        (folder / "score_lists.json").write_text(json.dumps(lists))
    return folder


def test_geneval2_is_soft_tifa_in_all_by_atom_skill_and_number_of_atoms(tmp_path):
    """Of 100: the mean over prompts of the geometric mean over atoms, and of the mean; single
    atoms of a skill; a difference is paired by prompt."""
    first = geneval2_folder(tmp_path / "a", lists=LISTS)
    second = geneval2_folder(tmp_path / "b", lists=[[0.5, 0.5, 1.0], *LISTS[1:]])
    run(first, second, metrics=("geneval2",))
    metrics = summary_of(first)["metrics"]
    assert metrics["geneval2"] == entry(30, (700 / 3) ** 0.5, "3 x 1")
    assert {name: (row["mean"], row["of"]) for name, row in metrics.items()} == {
        "geneval2": (pytest.approx(30), "3 x 1"),
        "geneval2 by atom": (pytest.approx(100 * (1.75 / 3 + 1 / 3 + 1 / 2) / 3), "3 x 1"),
        "geneval2 count": (pytest.approx(20), "3 prompts, 4 values"),
        "geneval2 attribute": (pytest.approx(25), "1 x 1"),
        "geneval2 object": (pytest.approx(90), "3 x 1"),
        "geneval2 3 atoms": (pytest.approx(45), "2 x 1"),
        "geneval2 5 atoms": (0, "1 x 1"),
    }
    minus = summary_of(second)["minus"]["metrics"]
    assert minus["geneval2 attribute"]["mean"] == pytest.approx(25)
    assert minus["geneval2 object"]["mean"] == 0
    assert values_of(first, "geneval2") == pytest.approx([50, 0, 40])


def test_geneval2_writes_what_evaluation_reads_and_says_how_to_run_it(tmp_path):
    """{prompt: file}, files by whole paths, for every folder without results."""
    folders = [geneval2_folder(tmp_path / x) for x in "ab"]
    with pytest.raises(ValueError, match="--image_filepath_data") as error:
        run(*folders, metrics=("geneval2",))
    for folder in folders:
        paths = json.loads((folder / "geneval2_paths.json").read_text())
        files = [str(folder / f"{i:05d}/samples/00000.png") for i in range(3)]
        assert paths == dict(zip([row["prompt"] for row in ATOMS], files))
        assert f"--output_file {folder / 'score_lists.json'}" in str(error.value)


def test_geneval2_refuses_several_images_other_prompts_and_other_lists(tmp_path):
    for folder, named in (
        (geneval2_folder(tmp_path / "two", 2), "2 images of 'a green cat'.*per_prompt 1"),
        (make_folder(tmp_path / "other", ["a", "b"], 1), "00000/metadata.jsonl has no skills"),
    ):
        with pytest.raises(ValueError, match=named):
            run(folder, metrics=("geneval2",))
        assert not (folder / "geneval2_paths.json").exists()
    for lists, named in (
        (LISTS[:2], "is of 2 prompts, .* of 3"),
        (LISTS[::-1], "list of 'a green cat' has 2 numbers for 3 atoms"),
        ([[0.5, 0.25, float("nan")], *LISTS[1:]], "has nan, no probability"),
        ([[1, 0, 1], [0, 0, 0], [1, 1]], "has 1, no probability: give --method soft_tifa_gm"),
        ([[0.5, 0.25, -0.5], *LISTS[1:]], "has -0.5, no probability"),
    ):
        with pytest.raises(ValueError, match=named):
            run(geneval2_folder(tmp_path / "a", lists=lists), metrics=("geneval2",))
