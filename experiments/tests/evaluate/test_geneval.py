"""What GenEval and GenEval 2 wrote, in the table and in scores.json."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.evaluate import score
from experiments.tests.evaluate.folders import (
    make_folder,
    run,
    summary_of,
    table_row,
    values_of,
)

TASKS = {"a bench": "single_object", "a cat": "single_object"}
TASKS |= {"two dogs": "counting", "two cats": "counting"}


def write_results(folder: Path, verdicts: list[bool]) -> None:
    """As evaluation/evaluate_images.py of djghosh13/geneval writes it, in another order."""
    lines = []
    for row, correct in zip(score.read_lines(folder / "samples.jsonl"), verdicts, strict=True):
        result = {"filename": f"/elsewhere/images/{row['file']}", "tag": TASKS[row["prompt"]]}
        result |= {"prompt": row["prompt"], "correct": correct, "reason": "", "details": "{}"}
        lines.append(json.dumps(result).replace("/", "\\/") + "\n")
    (folder / "results.jsonl").write_text("".join(reversed(lines)))


def test_geneval_is_the_official_overall_score_where_prompts_repeat_unevenly(tmp_path, capsys):
    """summary_scores.py: the mean over tasks of the share of correct images. Means over prompts,
    or over all images, would be other numbers."""
    prompts = ["a bench"] * 4 + ["a cat"] + ["two dogs"] * 2 + ["two cats"] * 2
    folders = [make_folder(tmp_path / x, prompts, 1) for x in "ab"]
    write_results(folders[0], [True, True, True, False, False, True, False, False, False])
    write_results(folders[1], [True] * 9)
    out = run(*folders, metrics=("geneval",), capsys=capsys)
    single, counting = 3 / 5, 1 / 4
    metrics = summary_of(folders[0])["metrics"]
    means = {x: metrics[x]["mean"] for x in metrics}
    expected = {"geneval": (single + counting) / 2}
    expected |= {"geneval single_object": single, "geneval counting": counting}
    assert means == pytest.approx(expected)
    sizes = [metrics[x]["of"] for x in expected]
    assert sizes == ["4 prompts, 9 values, 2 tasks", "2 prompts, 5 values", "2 x 2"]
    # Of each prompt: the correct images less what they would be at the task's mean
    off = [[3 - 4 * single, 0 - single], [1 - 2 * counting, 0 - 2 * counting]]
    variances = [2 * np.sum(np.square(x)) / n**2 for x, n in zip(off, (5, 4))]
    errors = [metrics[x]["standard_error"] for x in expected]
    assert errors == pytest.approx([sum(variances) ** 0.5 / 2, *np.sqrt(variances)])
    assert f"{1 - expected['geneval']:+.3g} (" in table_row(out, "geneval")[-1]


def test_geneval_of_one_folder_leaves_the_other_s_cells_empty(tmp_path, capsys):
    """results.jsonl is read where it is, whatever --metrics names."""
    folders = [make_folder(tmp_path / x, list(TASKS), 1) for x in "ab"]
    write_results(folders[1], [True, False, True, True])
    row = table_row(run(*folders, metrics=(), capsys=capsys), "geneval")
    assert row[:2] == ["4 x 1, 2 tasks", ""] and row[2].startswith("0.75 (") and row[3] == ""
    scorers = [summary_of(x)["scorers"] for x in folders]
    assert "geneval" in scorers[1] and "geneval" not in scorers[0]
    (folders[1] / "results.jsonl").unlink()
    assert "| geneval" not in run(*folders, metrics=(), capsys=capsys)
    assert not any("geneval" in row for row in summary_of(folders[1])["rows"])


def test_geneval_of_other_tasks_is_not_paired(tmp_path):
    """The same image, called counting in one folder and single_object in the other."""
    folders = [make_folder(tmp_path / x, list(TASKS), 1) for x in "ab"]
    for folder in folders:
        write_results(folder, [True, False, True, True])
    text = (folders[1] / "results.jsonl").read_text()
    (folders[1] / "results.jsonl").write_text(text.replace('"counting"', '"single_object"', 1))
    run(*folders, metrics=("geneval",))
    summary = summary_of(folders[1])
    assert summary["minus"]["metrics"] == {} and summary["metrics"].keys() > {"geneval counting"}


def test_geneval_of_other_images_or_prompts_is_refused(tmp_path):
    folder = make_folder(tmp_path / "a", list(TASKS), 1)
    with pytest.raises(ValueError, match=f"no results.jsonl.*\n.*evaluate_images.py {folder}"):
        run(folder, metrics=("geneval",))
    write_results(folder, [True] * 4)
    text = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(text.replace("a cat", "a dog"))
    with pytest.raises(ValueError, match="00001/samples/00000.png is of another prompt"):
        run(folder, metrics=("geneval",))
    (folder / "results.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="not of this folder's images"):
        run(folder, metrics=("geneval",))
    (folder / "results.jsonl").write_text(text + "{")
    with pytest.raises(ValueError, match="results.jsonl, line 5: not JSON"):
        run(folder, metrics=("geneval",))


ATOMS = (
    {"prompt": "a green cat", "atom_count": 3, "skills": ["count", "attribute", "object"]},
    {"prompt": "two red pigs and a car", "atom_count": 5, "skills": ["count", "object", "count"]},
    {"prompt": "six cows", "atom_count": 3, "skills": ["count", "object"]},
)
LISTS = [[0.5, 0.25, 1.0], [0.1, 0.9, 0.0], [0.3, 0.8]]


def geneval2_folder(path: Path, images: int = 1) -> Path:
    return make_folder(path, [row["prompt"] for row in ATOMS], images, rows=ATOMS)


def test_geneval2_is_soft_tifa_in_all_by_atom_skill_and_number_of_atoms(tmp_path):
    """Of 100: the mean over prompts of the geometric mean over atoms, and of the mean; single
    atoms of a skill; a difference is paired by prompt."""
    folders = [geneval2_folder(tmp_path / x) for x in "ab"]
    (folders[0] / "score_lists.json").write_text(json.dumps(LISTS))
    better = [[0.5, 0.5, 1.0], *LISTS[1:]]
    (folders[1] / "score_lists.json").write_text(json.dumps(better))
    run(*folders, metrics=("geneval2",))
    metrics = summary_of(folders[0])["metrics"]
    geometric = [100 * 0.125 ** (1 / 3), 0, 100 * 0.24**0.5]
    means = {x: metrics[x]["mean"] for x in metrics}
    assert means == pytest.approx({
        "geneval2": np.mean(geometric),
        "geneval2 by atom": 100 * np.mean([1.75 / 3, 1.0 / 3, 1.1 / 2]),
        "geneval2 count": 100 * np.mean([0.5, 0.1, 0.0, 0.3]),
        "geneval2 attribute": 25,
        "geneval2 object": 100 * np.mean([1, 0.9, 0.8]),
        "geneval2 3 atoms": np.mean(geometric[::2]),
        "geneval2 5 atoms": 0,
    })  # fmt: skip
    error = np.std(geometric, ddof=1) / 3**0.5
    assert metrics["geneval2"]["standard_error"] == pytest.approx(error)
    sizes = [metrics[f"geneval2{x}"]["of"] for x in ("", " by atom", " count", " 3 atoms")]
    assert sizes == ["3 x 1", "3 x 1", "3 prompts, 4 values", "2 x 1"]
    minus = summary_of(folders[1])["minus"]["metrics"]
    assert minus["geneval2 attribute"]["mean"] == pytest.approx(25)
    assert minus["geneval2 object"]["mean"] == 0
    assert values_of(folders[0], "geneval2") == pytest.approx(geometric)


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
    folder = geneval2_folder(tmp_path / "a")
    for lists, named in (
        (LISTS[:2], "is of 2 prompts, .* of 3"),
        (LISTS[::-1], "list of 'a green cat' has 2 numbers for 3 atoms"),
        ([[0.5, 0.25, float("nan")], *LISTS[1:]], "has nan, no probability"),
        ([[1, 0, 1], [0, 0, 0], [1, 1]], "has 1, no probability: give --method soft_tifa_gm"),
        ([[0.5, 0.25, -0.5], *LISTS[1:]], "has -0.5, no probability"),
    ):
        (folder / "score_lists.json").write_text(json.dumps(lists))
        with pytest.raises(ValueError, match=named):
            run(folder, metrics=("geneval2",))
