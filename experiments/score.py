"""The paper's metrics for folders of sample.py, as one table.

    python -m experiments.score output/drawbench/base output/drawbench/output-soar-final
    python -m experiments.score output/ocr/base output/ocr/output-soar-final \\
        --metrics ocr --ocr_python .venv-ocr/bin/python
    python -m experiments.score output/geneval/base output/geneval/output-soar-final \\
        --metrics geneval --check_base

A row of the table is a metric, a column a folder: the mean over prompts of the mean over a
prompt's images, in brackets its standard error over prompts. Folders after the first also have
their paired difference from the first. FOLDER/scores.jsonl gets one line for each image,
FOLDER/scores.json the means. The same command goes on with a run that was killed. A score is kept
only while the image, its prompt and the metric's weights are those that it was computed from;
else it is computed anew, and the reason printed. Prompts with the same text count as one prompt.

| metric      | scale           | computed by                                               |
| pickscore   | 20 to 24        | transformers' CLIP                                        |
| clipscore   | 0.2 to 0.4      | transformers' CLIP                                        |
| aesthetic   | 1 to 10         | transformers' CLIP and LAION's linear head                |
| hpsv2       | 0.2 to 0.35     | transformers' CLIP from HPS v2.1's file                   |
| imagereward | -2 to 2         | transformers' BLIP from ImageReward's file                |
| ocr         | 0 to 1          | PaddleOCR 2.9.1 in an environment of its own              |
| ocr_rapid   | 0 to 1          | rapidocr: runs anywhere, not comparable with the paper    |
| geneval     | 0 to 1          | GenEval's evaluate_images.py: FOLDER/results.jsonl is read |
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from experiments.scorers import (
    Aesthetic,
    ClipScore,
    Hpsv2,
    ImageReward,
    Ocr,
    OcrRapid,
    PickScore,
    Weights,
    quoted,
)
from sample import save_whole

MODEL_BASED = {
    "pickscore": PickScore,
    "clipscore": ClipScore,
    "aesthetic": Aesthetic,
    "hpsv2": Hpsv2,
    "imagereward": ImageReward,
}
Metric = Literal[
    "pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward", "ocr", "ocr_rapid", "geneval"
]
# Stable Diffusion 3.5 Medium: base, SFT, SOAR. Source: README.md of Tencent-Hunyuan/HY-SOAR.
PUBLISHED = {
    "geneval": (0.63, 0.70, 0.78),
    "ocr": (0.59, 0.64, 0.67),
    "pickscore": (22.34, 22.71, 22.86),
    "hpsv2": (0.279, 0.284, 0.289),
    "aesthetic": (5.36, 5.35, 5.46),
    "imagereward": (0.85, 1.04, 1.09),
    "clipscore": (0.285, 0.295, 0.295),
}
SAVE_EVERY = 30  # seconds


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that sample.py has finished; differences are from the first."""
    metrics: tuple[Metric, ...] = tuple(MODEL_BASED)
    """What to compute. geneval is added where a folder has a results.jsonl."""
    weights: tuple[str, ...] = ()
    """ID=PATH, files on this machine in place of the hub's: a directory, or for xswu/HPSv2,
    THUDM/ImageReward and the aesthetic head, sac+logos+ava1-l14-linearMSE.pth, a file."""
    batch_size: int = 16
    """Images in one forward."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where models run."""
    ocr_python: Path = Path(sys.executable)
    """For ocr: the Python of the environment that has paddleocr."""
    check_base: bool = False
    """Also print the paper's base, SFT and SOAR, and how far the first folder is from its base."""

    def __post_init__(self):
        if not self.folders:
            raise ValueError("give at least one FOLDER that sample.py has finished")
        if len({folder.resolve() for folder in self.folders}) < len(self.folders):
            raise ValueError(f"one folder is given twice: {' '.join(map(str, self.folders))}")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, expected at least 1")


# --- Folders and their scores -------------------------------------------------------------------


class Folder:
    """A folder of sample.py and the scores of its images, in the order of samples.jsonl."""

    def __init__(self, path: Path):
        """Raises ValueError: sample.py has not finished it, or an image is missing."""
        self.path = path
        samples = path / "samples.jsonl"
        if not samples.is_file():
            raise ValueError(f"{path} has no samples.jsonl: sample.py has not finished it")
        self.rows = read_lines(samples)
        missing = [row["file"] for row in self.rows if not (path / row["file"]).is_file()]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of its images, such as {missing[0]}")
        for row in self.rows:
            row["sha256"] = hashlib.sha256((path / row["file"]).read_bytes()).hexdigest()
        self.prompts = [row["prompt"] for row in self.rows]
        self.keys = [(row["prompt_index"], row["image_index"]) for row in self.rows]
        self.groups: dict[str, list[str]] = {}  # a metric's task of each image, if it has tasks
        self.scorers: dict[str, str] = {}  # the weights of each metric that rows have
        self.recall()

    def recall(self) -> None:
        """Take over the scores of images that are the same as when they were scored."""
        kept, summary = self.path / "scores.jsonl", self.path / "scores.json"
        if not kept.is_file() or not summary.is_file():
            return
        self.scorers = json.loads(summary.read_text())["scorers"]
        self.scorers.pop("geneval", None)  # read anew each time
        known = {(line["file"], line["prompt"], line["sha256"]): line for line in read_lines(kept)}
        for row in self.rows:
            line = known.get((row["file"], row["prompt"], row["sha256"]), {})
            row |= {name: line[name] for name in self.scorers if name in line}

    def expect(self, name: str, identity: str) -> list[dict]:
        """The rows without a score of this metric by these weights; others' scores are dropped."""
        scored = [row for row in self.rows if name in row]
        if scored and self.scorers[name] != identity:
            was = self.scorers[name]
            print(f"{self.path}: {name} is computed anew: was by {was}, now by {identity}")
            for row in scored:
                del row[name]
        elif name in self.scorers and len(scored) < len(self.rows):
            print(f"{self.path}: {name} is computed for {len(self.rows) - len(scored)} images")
        if self.scorers.get(name) != identity:
            self.scorers[name] = identity
            self.save()  # now, without the old scores: they never stand under the new weights
        return [row for row in self.rows if name not in row]

    def save(self, **summary) -> None:
        lines = [json.dumps(row) + "\n" for row in self.rows]
        save_whole("".join(lines), self.path / "scores.jsonl")
        text = json.dumps({"scorers": self.scorers, **summary}, indent=1)
        save_whole(text + "\n", self.path / "scores.json")

    def column(self, name: str) -> np.ndarray | None:
        """A metric's scores of all images, (images,), or None."""
        if not all(name in row for row in self.rows):
            return None
        return np.array([row[name] for row in self.rows], dtype=np.float64)


def read_lines(path: Path) -> list[dict]:
    """Raises ValueError: names the file and the line that is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def open_folders(paths: tuple[Path, ...]) -> list[Folder]:
    """Raises ValueError: two folders do not hold images of the same prompts."""
    folders = [Folder(path) for path in paths]
    first = folders[0]
    for folder in folders[1:]:
        if (folder.keys, folder.prompts) != (first.keys, first.prompts):
            raise ValueError(
                f"{folder.path} and {first.path} are of different prompts or numbers of images: "
                "differences would mean nothing. Give one set of prompts at a time"
            )
    return folders


# --- Scoring ------------------------------------------------------------------------------------


def open_image(path: Path) -> Image.Image:
    """Raises ValueError: names the file that is no image."""
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


@torch.no_grad()
def fill(folder: Folder, name: str, rows: list[dict], scorer: Callable, batch_size: int) -> None:
    """Score rows, saving every SAVE_EVERY seconds. Raises ValueError: a score is not finite."""
    saved = time.monotonic()
    total = len(folder.rows)
    label = f"{name} of {folder.path}"
    with tqdm(total=total, initial=total - len(rows), unit="image", desc=label) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = [open_image(folder.path / row["file"]) for row in batch]
            values = torch.as_tensor(scorer(images, [row["prompt"] for row in batch]))
            for row, value in zip(batch, values.double().tolist(), strict=True):
                if not np.isfinite(value):
                    raise ValueError(f"{name} of {folder.path / row['file']} is {value}")
                row[name] = value
            bar.update(len(batch))
            if time.monotonic() - saved > SAVE_EVERY:
                folder.save()
                saved = time.monotonic()
    folder.save()


def score(args: Args, name: str, folders: list[Folder]) -> None:
    """One metric for all folders; its model is loaded only if an image still needs it."""
    weights = Weights(args.weights)
    if name == "ocr":
        identity, load = Ocr.versions(args.ocr_python), partial(Ocr, args.ocr_python)
    elif name == "ocr_rapid":
        identity, load = OcrRapid.versions(), OcrRapid
    else:
        kind = MODEL_BASED[name]
        identity = "; ".join(f"{x} {weights.identity(x)}" for x in kind.SOURCES)
        load = partial(kind, weights, torch.device(args.device))
    todo = [folder.expect(name, identity) for folder in folders]
    if not any(todo):
        return
    scorer = load()
    try:
        for folder, rows in zip(folders, todo):
            if rows:
                fill(folder, name, rows, scorer, args.batch_size)
    finally:
        if isinstance(scorer, Ocr):
            scorer.close()


def read_geneval(folder: Folder) -> None:
    """Take over GenEval's verdicts (0 or 1) and tasks from results.jsonl, which its
    evaluation/evaluate_images.py writes, one line for each image.

    Raises ValueError: it is missing, or not of exactly this folder's images and prompts."""
    path = folder.path / "results.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder.path} has no results.jsonl: run GenEval's evaluate_images.py")
    results = {"/".join(Path(x["filename"]).parts[-3:]): x for x in read_lines(path)}
    differ = results.keys() ^ {row["file"] for row in folder.rows}
    if differ:
        raise ValueError(f"{path} is not of this folder's images: {min(differ)} is in one only")
    tasks = []
    for row in folder.rows:
        result = results[row["file"]]
        if result["prompt"] != row["prompt"]:
            raise ValueError(f"{path}: {row['file']} is of another prompt, {result['prompt']!r}")
        row["geneval"] = float(result["correct"])
        tasks.append(result["tag"])
    folder.groups["geneval"] = tasks
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder.scorers["geneval"] = f"results.jsonl sha256 {digest}"


# --- The table ----------------------------------------------------------------------------------


Cell = tuple[float, float]  # mean, standard error


def mean_and_error(values: np.ndarray, prompts: list[str], groups: list[str]) -> Cell:
    """The mean over groups of the mean over a group's prompts, and its standard error over prompts
    (nan if a group has one prompt). GenEval's overall score is this, its tasks being the groups."""
    means: dict[str, dict[str, list[float]]] = {}
    for value, prompt, group in zip(values, prompts, groups, strict=True):
        means.setdefault(group, {}).setdefault(prompt, []).append(value)
    averages, variances = [], []
    for by_prompt in means.values():
        of_prompts = np.array([np.mean(x) for x in by_prompt.values()])
        averages.append(of_prompts.mean())
        few = len(of_prompts) < 2
        variances.append(np.nan if few else of_prompts.var(ddof=1) / len(of_prompts))
    return float(np.mean(averages)), float(np.sqrt(np.sum(variances)) / len(means))


@dataclass(frozen=True)
class Row:
    """A metric's line: one (mean, standard error) and one paired difference for each folder."""

    name: str
    cells: list[Cell | None]
    differences: list[Cell | None]


def compare(name: str, folders: list[Folder], task: str | None = None) -> Row:
    """A metric's row, or that of one of its tasks."""
    first = folders[0].column(name)
    cells, differences = [], []
    for folder in folders:
        values = folder.column(name)
        groups = folder.groups.get(name, [""] * len(folder.rows))
        chosen = [task in (None, group) for group in groups]
        picked = [list(np.array(x)[chosen]) for x in (folder.prompts, groups)]
        cells.append(None if values is None else mean_and_error(values[chosen], *picked))
        paired = values is not None and first is not None and folder is not folders[0]
        minus = (values - first)[chosen] if paired else None
        differences.append(None if minus is None else mean_and_error(minus, *picked))
    return Row(f"{name} {task}" if task else name, cells, differences)


def all_rows(names: list[str], folders: list[Folder]) -> list[Row]:
    """Each metric's row; GenEval's is followed by those of its tasks."""
    rows = []
    for name in names:
        rows.append(compare(name, folders))
        tasks = next((x.groups[name] for x in folders if name in x.groups), [])
        rows += [compare(name, folders, task) for task in dict.fromkeys(tasks)]
    return rows


def show(cell: Cell | None, digits: int, sign: str = "") -> str:
    if cell is None:
        return ""
    mean, error = cell
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ({error:.{digits}f})")


def table(rows: list[Row], folders: list[Folder], check_base: bool) -> str:
    """Markdown."""
    head = ["metric", str(folders[0].path)]
    for folder in folders[1:]:
        head += [str(folder.path), "minus the first"]
    if check_base:
        head += ["paper: base", "SFT", "SOAR", "the first minus the paper's base"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        digits = 4 if row.name in ("clipscore", "hpsv2") else 3
        line = [row.name, show(row.cells[0], digits)]
        for cell, difference in zip(row.cells[1:], row.differences[1:]):
            line += [show(cell, digits), show(difference, digits, "+")]
        if check_base:
            line += against_paper(row, digits)
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_paper(row: Row, digits: int) -> list[str]:
    """The paper's three numbers, and ours minus its base."""
    if row.name not in PUBLISHED:
        return ["", "", "", ""]
    published = [str(x) for x in PUBLISHED[row.name]]
    if row.cells[0] is None:
        return [*published, ""]
    return [*published, f"{row.cells[0][0] - PUBLISHED[row.name][0]:+.{digits}f}"]


def numbers(cell: Cell | None) -> dict | None:
    """For scores.json, which has no nan."""
    if cell is None:
        return None
    mean, error = cell
    return {"mean": mean, "standard_error": None if np.isnan(error) else error}


def summarize(rows: list[Row], folders: list[Folder]) -> None:
    """Write each folder's scores.json: all its metrics, and differences of those in the table."""
    for i, folder in enumerate(folders):
        own = all_rows(list(folder.scorers), [folder])
        metrics = {row.name: numbers(row.cells[0]) for row in own if row.cells[0]}
        minus = {row.name: numbers(row.differences[i]) for row in rows if row.differences[i]}
        counts = {"images": len(folder.rows), "prompts": len(set(folder.prompts))}
        first = {"minus": {"folder": str(folders[0].path), "metrics": minus}} if i else {}
        folder.save(**counts, metrics=metrics, **first)


def main(args: Args) -> None:
    torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions would round to 10 bits
    folders = open_folders(args.folders)
    names = list(dict.fromkeys(args.metrics))
    for prompt in folders[0].prompts if {"ocr", "ocr_rapid"} & set(names) else ():
        quoted(prompt)  # before any model is loaded
    judged = [folder for folder in folders if (folder.path / "results.jsonl").is_file()]
    for folder in folders if "geneval" in names else judged:
        read_geneval(folder)
    for name in names:
        if name != "geneval":
            score(args, name, folders)
    if judged and "geneval" not in names:
        names.append("geneval")
    rows = all_rows(names, folders)
    summarize(rows, folders)
    print(table(rows, folders, args.check_base))
    if "ocr_rapid" in names:
        print("ocr_rapid: other models than the paper's OCR, not comparable with it")


def command(words: list[str] | None = None) -> None:
    """The command line, by default the process's own. What a user can mend ends in one line."""
    try:
        main(tyro.cli(Args, args=words, description=__doc__, use_underscores=True))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on from the last save")


if __name__ == "__main__":
    command()
