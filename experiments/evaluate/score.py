"""The paper's metrics for folders of sample.py, as one table.

    python -m experiments.evaluate.score output/drawbench/base output/drawbench/output-soar
    python -m experiments.evaluate.score output/geneval/* --metrics geneval

A row is a metric, a column a folder: the mean over images, for GenEval the mean over tasks of
theirs, in brackets its standard error over prompts; prompts with the same text count as one.
Folders after the first also have their paired difference from the first. Files among the folders,
such as sample.py's compare.png, are passed over.

Five metrics are computed here (scorers.py). ocr, geneval and geneval2 are read from files that
other environments write (geneval.py); where one is missing, the command for it is printed.
FOLDER/scores.json gets the means and each image's scores. Scores of the same images, prompts and
weights are not computed again.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from experiments.evaluate import scorers
from experiments.evaluate.geneval import READ, Column, how_to_make, parse, per_image, read_lines
from sample import save_whole

MODEL_BASED = {
    "pickscore": scorers.PickScore,
    "clipscore": scorers.ClipScore,
    "aesthetic": scorers.Aesthetic,
    "hpsv2": scorers.Hpsv2,
    "imagereward": scorers.ImageReward,
}
Metric = Literal[*MODEL_BASED, *READ]
WEIGHTS = ("from", "transformer", "lora")  # keys of protocol.json that a comparison is about
PACKAGES = ("torch", "diffusers", "transformers")  # other versions are named, not refused
BATCH = 16  # images in one forward


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that sample.py has finished; differences are from the first."""
    metrics: tuple[Metric, ...] = tuple(MODEL_BASED)
    """What to compute or read. What other environments wrote is added where it is there."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where models run."""


# --- Folders and their scores -------------------------------------------------------------------


class Folder:
    """A folder of sample.py and the scores of its images, in the order of samples.jsonl."""

    def __init__(self, path: Path):
        """Raises ValueError: sample.py has not finished it, or an image is missing."""
        self.path = path
        for name in ("protocol.json", "samples.jsonl"):
            if not (path / name).is_file():
                raise ValueError(f"{path} has no {name}: sample.py has not finished it")
        self.protocol = parse((path / "protocol.json").read_text(), path / "protocol.json")
        self.rows = []
        for line in read_lines(path / "samples.jsonl"):
            row = {key: line[key] for key in ("file", "prompt", "prompt_index", "image_index")}
            file = path / row["file"]
            if not file.is_file():
                raise ValueError(f"{path} lacks {row['file']}: run sample.py again")
            self.rows.append(row | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
        self.set = [(row["prompt"], row["prompt_index"], row["image_index"]) for row in self.rows]
        self.columns: dict[str, dict[str, Column]] = {}  # by metric, its rows of the table
        self.scorers: dict[str, str] = {}  # by metric, the weights or the file that it is of
        self.recall()

    def recall(self) -> None:
        """Take over what an earlier run computed, if it was of the same images and prompts."""
        file = self.path / "scores.json"
        if not file.is_file():
            return
        kept = parse(file.read_text(), file)
        same = [{key: row[key] for key in self.rows[0]} for row in kept.get("rows", [])]
        if same != self.rows:
            print(f"{file} is of other images or prompts: its scores are computed anew")
            return
        for name, scorer in kept["scorers"].items():
            if name in MODEL_BASED:
                self.take([row[name] for row in kept["rows"]], name, scorer)

    def take(self, values: list[float], name: str, scorer: str) -> None:
        self.columns[name] = {name: per_image(values, self.rows)}
        self.scorers[name] = scorer

    def read(self, name: str) -> None:
        """Take what another program computed."""
        path = self.path / READ[name][0]
        self.columns[name] = READ[name][1](path, self.rows)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.scorers[name] = f"{path.name} sha256 {digest}"

    def save(self, **summary) -> None:
        rows = [dict(row) for row in self.rows]
        for name, made in self.columns.items():
            for row, value in zip(rows, made[name].values):
                row[name] = float(value)
        whole = {"scorers": self.scorers, **summary, "rows": rows}
        save_whole(json.dumps(whole, indent=1) + "\n", self.path / "scores.json")


def unlike(first: Folder, other: Folder, keys: set[str]) -> str:
    """Where two protocols differ, such as "guidance_scale 1.0 for 4.5"."""
    parts = []
    for key in sorted(keys):
        a, b = first.protocol.get(key), other.protocol.get(key)
        if a != b:
            parts.append(f"{key} {b!s:.40} for {a!s:.40}")
    return ", ".join(parts)


def open_folders(paths: tuple[Path, ...]) -> list[Folder]:
    """Raises ValueError: two folders are not of the same prompts, or of different protocols."""
    folders = [Folder(path) for path in paths if not path.is_file()]
    if not folders:
        raise ValueError("give at least one FOLDER that sample.py has finished")
    first = folders[0]
    for folder in folders[1:]:
        if folder.set != first.set:
            raise ValueError(
                f"{folder.path} and {first.path} are of different prompts or numbers of images: "
                "differences would mean nothing. Give one set of prompts at a time"
            )
        keys = (first.protocol | folder.protocol).keys() - {*WEIGHTS, *PACKAGES}
        differ = unlike(first, folder, keys)
        if differ:
            raise ValueError(
                f"{folder.path} differs from {first.path} by more than weights: {differ}. "
                "Draw both alike, or give each to a command of its own"
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
def compute(folder: Folder, name: str, model) -> list[float]:
    """A model's value for each image. Raises ValueError: one is not finite."""
    values = []
    for start in tqdm(range(0, len(folder.rows), BATCH), desc=f"{name} of {folder.path}"):
        batch = folder.rows[start : start + BATCH]
        images = [open_image(folder.path / row["file"]) for row in batch]
        values += map(float, model(images, [row["prompt"] for row in batch]))
    for row, value in zip(folder.rows, values, strict=True):
        if not np.isfinite(value):
            raise ValueError(f"{name} of {folder.path / row['file']} is {value}")
    return values


def find_weights(names: list[str]) -> dict[str, str]:
    """By metric, of which commits its weights are. Raises OSError: names all that are missing."""
    found, missing = {}, []
    for name in names:
        sources = MODEL_BASED[name].SOURCES
        try:
            found[name] = "; ".join(scorers.identity(source) for source in sources)
        except OSError as error:
            missing.append(f"{name}, which needs {' and '.join(sources)} ({error})")
    if missing:
        raise OSError(
            "weights are neither here nor to be had from the hub. Where it can be reached: hf "
            f"download ID; then bring its HF_HOME or TORCH_HOME here. For {'; '.join(missing)}"
        )
    return found


def score(name: str, scorer: str, folders: list[Folder], device: torch.device) -> None:
    """One metric for all folders; its model is loaded only if one still needs it."""
    todo = [folder for folder in folders if folder.scorers.get(name) != scorer]
    if not todo:
        return
    try:
        model = MODEL_BASED[name](device)
    except OSError as error:
        raise OSError(f"{name} needs all of {scorer}: {error}") from None
    for folder in todo:
        if name in folder.scorers:
            was = folder.scorers[name]
            print(f"{folder.path}: {name} is computed anew: was by {was}, now by {scorer}")
        folder.take(compute(folder, name, model), name, scorer)
        folder.save()


def read_results(names: list[str], folders: list[Folder]) -> list[str]:
    """Read what other programs computed, where it is named or there; returns what was found.
    Raises ValueError: how to make what is named and missing."""
    found = []
    for name, (file, _) in READ.items():
        there = [folder for folder in folders if (folder.path / file).is_file()]
        lacking = [folder for folder in folders if folder not in there]
        if name in names and lacking:
            raise ValueError("\n".join(how_to_make(name, x.path, x.rows) for x in lacking))
        for folder in there:
            folder.read(name)
        if there:
            found.append(name)
    return found


# --- The table ----------------------------------------------------------------------------------


def mean_and_error(column: Column) -> tuple[float, float]:
    """The mean over groups of the mean over a group's values, and its standard error if prompts
    are drawn at random (nan if a group has one). With tasks as groups this is the overall score of
    GenEval's evaluation/summary_scores.py, which knows no prompts."""
    sums: dict[str, dict[str, list[float]]] = {}
    for value, prompt, group in zip(column.values, column.prompts, column.groups, strict=True):
        sums.setdefault(group, {}).setdefault(prompt, []).append(value)
    means, variances = [], []
    for by_prompt in sums.values():
        totals = np.array([np.sum(x) for x in by_prompt.values()])
        counts = np.array([len(x) for x in by_prompt.values()])
        means.append(totals.sum() / counts.sum())
        # A mean of ratios: each prompt's total less what it would be at the mean
        off = (totals - counts * means[-1]) / counts.sum()
        n = len(totals)
        variances.append(n / (n - 1) * (off**2).sum() if n > 1 else np.nan)
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(means))


def minus(column: Column | None, first: Column | None) -> Column | None:
    """The differences image by image; None if the two are not of the same prompts and tasks."""
    if not column or not first or not column.pairs_with(first):
        return None
    return replace(column, values=column.values - first.values)


def table_of(names: list[str], folders: list[Folder]) -> dict[str, list[Column | None]]:
    """By row of the table a column for each folder; GenEval's are followed by their parts'."""
    rows = {}
    for name in names:
        columns = [folder.columns.get(name, {}) for folder in folders]
        for part in dict.fromkeys(part for made in columns for part in made):
            rows[part] = [made.get(part) for made in columns]
    return rows


def show(column: Column | None, form: str = ".4g") -> str:
    if column is None:
        return ""
    mean, error = mean_and_error(column)
    return f"{mean:{form}}" + ("" if np.isnan(error) else f" ({error:.2g})")


def render(rows: dict[str, list[Column | None]], folders: list[Folder]) -> str:
    """Markdown, and below it under which protocol the images were made."""
    first = folders[0]
    head = ["metric", "prompts x images", str(first.path)]
    for folder in folders[1:]:
        head += [str(folder.path), "minus the first"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for name, columns in rows.items():
        size = next(column.size() for column in columns if column)
        line = [name, size, show(columns[0])]
        for column in columns[1:]:
            line += [show(column), show(minus(column, columns[0]), "+.3g")]
        lines.append(line)
    text = ["| " + " | ".join(line) + " |" for line in lines]
    made = {key: str(value) for key, value in first.protocol.items() if key not in WEIGHTS}
    short = [f"{key} {value}" for key, value in made.items() if len(value) < 40]
    text += ["", f"Images: {', '.join(short)}. Our scorers: float32."]
    for folder in folders[1:]:
        differ = unlike(first, folder, set(PACKAGES))
        if differ:
            text.append(f"{folder.path} was drawn with {differ}.")
    return "\n".join(text)


def as_json(column: Column) -> dict:
    mean, error = mean_and_error(column)
    error = None if np.isnan(error) else error  # JSON has no nan
    return {"mean": mean, "standard_error": error, "of": column.size()}


def summarize(rows: dict[str, list[Column | None]], folders: list[Folder]) -> None:
    """Write each folder's scores.json: all its metrics, and differences of those in the table."""
    for i, folder in enumerate(folders):
        own = table_of(list(folder.columns), [folder])
        metrics = {name: as_json(columns[0]) for name, columns in own.items()}
        paired = {name: minus(columns[i], columns[0]) for name, columns in rows.items() if i}
        differences = {name: as_json(column) for name, column in paired.items() if column}
        first = {"folder": str(folders[0].path), "metrics": differences}
        folder.save(metrics=metrics, minus=first)


def main(args: Args) -> None:
    torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions would round to 10 bits
    folders = open_folders(args.folders)
    weights = find_weights([name for name in dict.fromkeys(args.metrics) if name in MODEL_BASED])
    found = read_results(list(args.metrics), folders)
    for name, scorer in weights.items():
        score(name, scorer, folders, torch.device(args.device))
    rows = table_of([*weights, *found], folders)
    summarize(rows, folders)
    print(render(rows, folders))


def command(words: list[str] | None = None) -> None:
    """The command line, by default the process's own. What a user can mend ends in one line."""
    try:
        main(tyro.cli(Args, args=words, description=__doc__, use_underscores=True))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on from the last metric")


if __name__ == "__main__":
    command()
