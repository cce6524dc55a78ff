"""The README's commands, in order, as its reader gives them, on the small pipeline with two steps;
links and commands of all pages."""

import glob
import os
import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import sample
import train
from experiments.evaluate import score
from experiments.shapes.draw import read_pairs
from experiments.tests.common import MODEL, ROOT, words_of
from experiments.tests.test_layout import ROOMS

README = (ROOT / "README.md").read_text()
SHORT = {
    "train.py": MODEL | {"resolution": 64, "max_train_steps": 2, "num_aux_points": 1},
    "sample.py": MODEL | {"height": 64, "width": 64, "num_inference_steps": 2},
}


def block(heading: str, language: str) -> str:
    """The code under a heading."""
    text = README.split(f"# {heading}\n")[1]
    return re.search(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)[1]


@pytest.fixture
def my_images(tmp_path, monkeypatch):
    """The data that Data starts from, and what its code makes of it."""
    monkeypatch.chdir(tmp_path)
    Path("my_images").mkdir()
    for i, row in enumerate(read_pairs().select(range(6))):
        row["image"].save(f"my_images/{i}.png")
        Path(f"my_images/{i}.txt").write_text(row["text"])
    exec(block("Data", "python"), {})


def test_commands_of_training_and_sampling_run_in_order(my_images, monkeypatch, capsys):
    Path("prompts.txt").write_text("a photo of a red circle\n")
    greys = lambda images, prompts: [float(np.asarray(x).mean()) for x in images]  # noqa: E731
    scorer = Mock(return_value=greys, SOURCES=())  # for those whose weights are not here
    monkeypatch.setattr(score, "MODEL_BASED", dict.fromkeys(score.MODEL_BASED, scorer))
    commands = block("Train and sample", "bash").replace("\\\n", "").splitlines()
    done = []
    for command in commands:
        words = shlex.split(command, comments=True)
        script = next((x for x in words if x.endswith(".py")), "")
        if script:
            rest = words[words.index(script) + 1 :] + words_of(SHORT[script])
        if script == "train.py":
            train.main(train.parse(rest))
        elif script == "sample.py":
            sample.main(sample.tyro.cli(sample.Args, args=rest, use_underscores=True))
        elif words[:3] == ["python", "-m", "experiments.evaluate.score"]:
            given = [x for word in words[3:] for x in sorted(glob.glob(word)) or [word]]
            score.command([*given, "--device", "cpu"])
        else:
            assert not words or words[:2] in (["pip", "install"], ["hf", "auth"]), command
        done.append(script or " ".join(words[:3]))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    score_command = "python -m experiments.evaluate.score"
    assert done[-4:] == ["train.py", "train.py", "sample.py", score_command]
    assert "| pickscore" in capsys.readouterr().out
    folders = sorted(x for x in os.listdir("output/images") if Path("output/images", x).is_dir())
    assert folders == ["base", "output-sft", "output-soar"]


def test_rows_of_the_two_layouts_made_in_data_are_the_same(my_images):
    found = []
    for name in ("my_images", "my_images.parquet"):
        pairs = train.Pairs(train.DataConfig(name, 64))
        found.append(sorted(pairs.inspect(row)[0] for row in pairs.rows))
        shutil.rmtree("my_images", ignore_errors=True)  # the parquet file holds the images
    assert found[0] == found[1] and len(found[0]) == 6 and 0 not in found[0]


def pages() -> list[Path]:
    """All Markdown pages of the repository."""
    return [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md")]


each_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_of_a_page_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if heading:
            lines = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
            assert heading in anchors, f"{target}#{heading}"


@each_page
def test_commands_that_a_page_names_exist(page):
    for name in re.findall(r"(?:-m |`)experiments\.([\w.]+)", page.read_text()):
        path = ROOT / "experiments" / f"{name.replace('.', '/')}.py"
        assert "__main__" in path.read_text(), name


@each_page
def test_tests_that_a_page_names_exist(page):
    text = page.read_text()
    found = re.findall(r'`(pytest|test_\w+\.py) -k "?([^"`]+)"?`', text)
    assert len(found) == text.count(" -k ")
    assert len(found) >= 17 or page.name != "cuda_lines.md"
    for file, words in found:
        pattern = "test_*.py" if file == "pytest" else file
        paths = [*ROOT.glob(pattern), *(ROOT / "experiments").rglob(pattern)]
        tests = re.findall(r"^def (test_\w+)", "".join(x.read_text() for x in paths), re.M)
        for word in words.split(" or "):
            assert any(word in test for test in tests), f"{file} -k {word}"


# --- The index of experiments/ ---


def index() -> str:
    return (ROOT / "experiments/README.md").read_text()


def test_every_promise_of_the_index_names_its_tests():
    promises = index().split("## What a training run promises")[1].split("\n### ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 9 and all("`pytest -k" in row for row in rows)


def test_the_index_has_every_command():
    folder = ROOT / "experiments"
    files = [path for place in (".", *ROOMS) for path in (folder / place).glob("*.py")]
    paths = [path for path in files if "__main__" in path.read_text()]
    run = {str(path.relative_to(folder)).removesuffix(".py").replace("/", ".") for path in paths}
    lines = [line for line in index().split("\n## What a")[0].splitlines() if line.startswith("|")]
    assert run == {name for line in lines for name in re.findall(r"^\| `([\w.]+)", line)}
