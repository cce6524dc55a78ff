"""The paper's metrics for folders of sample.py, as one table.

    python -m experiments.evaluate.score output/drawbench/base output/drawbench/output-soar-final
    python -m experiments.evaluate.score output/ocr/base output/ocr/output-soar-final \\
        --metrics ocr --ocr_python .venv-ocr/bin/python
    python -m experiments.evaluate.score output/geneval/base output/geneval/output-soar-final \\
        --metrics geneval --check_base

A row of the table is a metric, a column a folder: the mean over images, which for GenEval is the
mean over tasks of theirs, in brackets its standard error over prompts. Folders after the first
also have their paired difference from the first. FOLDER/scores.jsonl gets one line for each image,
FOLDER/scores.json the means. The same command goes on with a run that was killed. A score is kept
only while the image, its prompt and the metric's weights are those that it was computed from;
else it is computed anew, and the reason printed. Prompts with the same text count as one prompt.
Files among the folders, such as sample.py's compare.png, are passed over.

| metric      | scale           | computed by                                               |
| pickscore   | 20 to 24        | transformers' CLIP                                        |
| clipscore   | 0.2 to 0.4      | transformers' CLIP                                        |
| aesthetic   | 1 to 10         | transformers' CLIP and LAION's linear head                |
| hpsv2       | 0.2 to 0.35     | transformers' CLIP from HPS v2.1's file                   |
| imagereward | -2 to 2         | transformers' BLIP from ImageReward's file                |
| ocr         | 0 to 1          | PaddleOCR 2.9.1 in an environment of its own              |
| ocr_rapid   | 0 to 1          | rapidocr: runs anywhere, not comparable with the paper    |
| geneval     | 0 to 1          | GenEval's evaluate_images.py: FOLDER/results.jsonl is read |
| geneval2    | 0 to 100        | GenEval 2's evaluation.py, which it says how to run       |
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from experiments.evaluate.geneval import (
    Column,
    ask_geneval2,
    read_geneval,
    read_geneval2,
    read_json,
    read_lines,
)
from experiments.evaluate.scorers import (
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
READ = {  # what programs of others compute: the file that holds it in a folder
    "geneval": ("results.jsonl", read_geneval),
    "geneval2": ("score_lists.json", read_geneval2),
}
Metric = Literal[
    "pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward",
    "ocr", "ocr_rapid", "geneval", "geneval2",
]  # fmt: skip
# Stable Diffusion 3.5 Medium: prompts and images of each; base, SFT, SOAR. Source: README.md of
# Tencent-Hunyuan/HY-SOAR; the sets are those in dataset/ of NVlabs/DiffusionNFT.
PUBLISHED = {
    "geneval": ("553 x 4, 6 tasks", 0.63, 0.70, 0.78),
    "ocr": ("1018 x 1", 0.59, 0.64, 0.67),
    "pickscore": ("200 x 5", 22.34, 22.71, 22.86),
    "hpsv2": ("200 x 5", 0.279, 0.284, 0.289),
    "aesthetic": ("200 x 5", 5.36, 5.35, 5.46),
    "imagereward": ("200 x 5", 0.85, 1.04, 1.09),
    "clipscore": ("200 x 5", 0.285, 0.295, 0.295),
}
GENEVAL2_BASE = (
    "geneval2: for the base one figure was found, 22, with guidance 4.5, 40 steps, 512 pixels, 256 "
    "tokens: a developer's, not a paper's (Tencent-Hunyuan/UniRL, issue 221)."
)
PAPER = {"guidance_scale": 4.5, "num_inference_steps": 40, "height": 512, "width": 512}
WEIGHTS = ("from", "transformer", "lora")  # keys of protocol.json that a comparison is about
PACKAGES = ("torch", "diffusers", "transformers")  # other versions are named, not refused
FOOTER = (*PAPER, "max_sequence_length", "seed", "mixed_precision")
SAVE_EVERY = 30  # seconds


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that sample.py has finished; differences are from the first."""
    metrics: tuple[Metric, ...] = tuple(MODEL_BASED)
    """What to compute. geneval and geneval2 are added where a folder has their results."""
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
    across_protocols: bool = False
    """Compare folders whose images differ by more than their weights: the table names by what."""

    def __post_init__(self):
        if all(folder.is_file() for folder in self.folders):
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
        if not (path / "protocol.json").is_file():
            raise ValueError(f"{path} has no protocol.json, which sample.py writes first")
        self.protocol = read_json(path / "protocol.json")
        self.unlike: dict[str, list] = {}  # protocol, weights apart: the first folder's, this one's
        self.rows = read_lines(samples)
        missing = [row["file"] for row in self.rows if not (path / row["file"]).is_file()]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} of its images, such as {missing[0]}")
        for row in self.rows:
            row["sha256"] = hashlib.sha256((path / row["file"]).read_bytes()).hexdigest()
        self.prompts = [row["prompt"] for row in self.rows]
        self.keys = [(row["prompt_index"], row["image_index"]) for row in self.rows]
        self.read: dict[str, dict[str, Column]] = {}  # rows of the metrics of READ
        self.scorers: dict[str, str] = {}  # the weights of each metric that rows have
        self.recall()

    def recall(self) -> None:
        """Take over the scores of images that are the same as when they were scored."""
        kept, summary = self.path / "scores.jsonl", self.path / "scores.json"
        if not kept.is_file() or not summary.is_file():
            return
        scorers = read_json(summary)["scorers"]
        self.scorers = {name: x for name, x in scorers.items() if name not in READ}
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

    def take(self, name: str) -> None:
        """Read what another program computed."""
        file, read = READ[name]
        if not (self.path / file).is_file():
            raise ValueError(f"{self.path} has no {file}: run GenEval's evaluate_images.py")
        self.read[name] = read(self.path, self.rows)
        for row, value in zip(self.rows, self.read[name][name].values):
            row[name] = float(value)
        digest = hashlib.sha256((self.path / file).read_bytes()).hexdigest()
        self.scorers[name] = f"{file} sha256 {digest}"

    def columns(self, name: str) -> dict[str, Column]:
        """A metric's rows of the table by name; none if it was not computed for all images."""
        if name in self.read:
            return self.read[name]
        if not all(name in row for row in self.rows):
            return {}
        values = np.array([row[name] for row in self.rows])
        return {name: Column(values, np.array(self.prompts), np.full(len(values), ""))}


def open_folders(args: Args) -> list[Folder]:
    """Raises ValueError: two folders do not hold images of the same prompts, or not under the same
    protocol."""
    folders = [Folder(path) for path in args.folders if not path.is_file()]
    first = folders[0]
    for folder in folders[1:]:
        if (folder.keys, folder.prompts) != (first.keys, first.prompts):
            raise ValueError(
                f"{folder.path} and {first.path} are of different prompts or numbers of images: "
                "differences would mean nothing. Give one set of prompts at a time"
            )
        for key in first.protocol | folder.protocol:
            pair = [first.protocol.get(key), folder.protocol.get(key)]
            if key not in WEIGHTS and pair[0] != pair[1]:
                folder.unlike[key] = pair
        if folder.unlike.keys() - set(PACKAGES) and not args.across_protocols:
            raise ValueError(
                f"{folder.path} differs from {first.path} by more than weights: "
                f"{unlike_text(folder)}. --across_protocols compares them and says so"
            )
    return folders


def unlike_text(folder: Folder) -> str:
    """Such as "guidance_scale 1.0 for 4.5"; long lists and digests are left out."""
    parts = []
    for key, (first, own) in folder.unlike.items():
        short = max(len(str(first)), len(str(own))) < 40
        parts.append(f"{key} {own} for {first}" if short else key)
    return ", ".join(parts)


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
            values = scorer(images, [row["prompt"] for row in batch])
            values = values.tolist() if isinstance(values, torch.Tensor) else values
            for row, value in zip(batch, values, strict=True):
                if not np.isfinite(value):
                    raise ValueError(f"{name} of {folder.path / row['file']} is {value}")
                row[name] = value
            bar.update(len(batch))
            if time.monotonic() - saved > SAVE_EVERY:
                folder.save()
                saved = time.monotonic()
    folder.save()


def find_scorers(args: Args, names: list[str]) -> dict[str, tuple[str, Callable]]:
    """By metric: the identity of its weights, and what loads it.

    Raises OSError: names all weights that are not to be had."""
    weights, found, missing = Weights(args.weights), {}, {}
    for name in names:
        if name == "ocr":
            found[name] = Ocr.versions(args.ocr_python), partial(Ocr, args.ocr_python)
        elif name == "ocr_rapid":
            found[name] = OcrRapid.versions(), OcrRapid
        else:
            kind, identities = MODEL_BASED[name], []
            for source in kind.SOURCES:
                try:
                    identities.append(f"{source} {weights.identity(source)}")
                except OSError as error:
                    missing[source] = error
            load = partial(kind, weights, torch.device(args.device))
            found[name] = "; ".join(identities), load
    if missing:
        raise OSError(
            f"not on this machine, and not to be had from the hub: {', '.join(missing)}. Give the "
            f"path of each: --weights ID=PATH ... ({next(iter(missing.values()))})"
        )
    return found


def score(args: Args, name: str, scorer: tuple[str, Callable], folders: list[Folder]) -> None:
    """One metric for all folders; its model is loaded only if an image still needs it."""
    identity, load = scorer
    todo = [folder.expect(name, identity) for folder in folders]
    if not any(todo):
        return
    try:
        model = load()
    except OSError as error:
        raise OSError(f"{name} needs {identity}; --weights ID=PATH gives files: {error}") from None
    try:
        for folder, rows in zip(folders, todo):
            if rows:
                fill(folder, name, rows, model, args.batch_size)
    finally:
        if isinstance(model, Ocr):
            model.close()


# --- The table ----------------------------------------------------------------------------------


Cell = tuple[float, float]  # mean, standard error


def mean_and_error(column: Column) -> Cell:
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


@dataclass(frozen=True)
class Row:
    """A metric's line: one (mean, standard error) and one paired difference for each folder."""

    name: str
    size: str
    cells: list[Cell | None]
    differences: list[Cell | None]


def compare(name: str, columns: list[Column | None]) -> Row:
    """A row from one column for each folder."""
    first, cells, differences = columns[0], [], []
    for column in columns:
        cells.append(mean_and_error(column) if column else None)
        paired = column and first and column is not first and column.pairs_with(first)
        minus = replace(column, values=column.values - first.values) if paired else None
        differences.append(mean_and_error(minus) if minus else None)
    size = next(column.size() for column in columns if column)
    return Row(name, size, cells, differences)


def all_rows(names: list[str], folders: list[Folder]) -> list[Row]:
    """Each metric's row; GenEval's are followed by those of their parts."""
    rows = []
    for name in names:
        columns = [folder.columns(name) for folder in folders]
        for part in dict.fromkeys(part for made in columns for part in made):
            rows.append(compare(part, [made.get(part) for made in columns]))
    return rows


def show(cell: Cell | None, digits: int, sign: str = "") -> str:
    if cell is None:
        return ""
    mean, error = cell
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(error) else f" ({error:.{digits}f})")


def table(rows: list[Row], folders: list[Folder], check_base: bool) -> str:
    """Markdown, and below it under which protocol the images were made."""
    head = ["metric", "prompts x images", str(folders[0].path)]
    for folder in folders[1:]:
        head += [str(folder.path), "minus the first"]
    if check_base:
        head += ["paper: base", "SFT", "SOAR", "the first minus the paper's base"]
    lines, notes = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)], []
    for row in rows:
        digits = 4 if row.name in ("clipscore", "hpsv2") else 3
        line = [row.name, row.size, show(row.cells[0], digits)]
        for cell, difference in zip(row.cells[1:], row.differences[1:]):
            line += [show(cell, digits), show(difference, digits, "+")]
        if check_base:
            line += against_paper(row, digits, folders[0].protocol, notes)
        lines.append(line)
    text = ["| " + " | ".join(line) + " |" for line in lines]
    made = ", ".join(f"{key} {folders[0].protocol.get(key)}" for key in FOOTER)
    text += ["", f"Images: {made}. Our scorers: float32."]
    for folder in folders[1:]:
        if folder.unlike:
            text.append(f"{folder.path} differs by more than weights: {unlike_text(folder)}.")
    return "\n".join(text + notes)


def against_paper(row: Row, digits: int, protocol: dict, notes: list[str]) -> list[str]:
    """The paper's three numbers, and ours minus its base; or a note on why these do not compare."""
    if row.name not in PUBLISHED:
        return ["", "", "", ""]
    size, *published = PUBLISHED[row.name]
    theirs = {"prompts x images": size} | PAPER
    ours = {"prompts x images": row.size} | protocol
    other = [f"{x} {ours.get(x)}, there {y}" for x, y in theirs.items() if ours.get(x) != y]
    if other:
        notes.append(f"{row.name} is not set against the paper's base: {'; '.join(other)}.")
    own = row.cells[0]
    difference = "" if other or own is None else f"{own[0] - published[0]:+.{digits}f}"
    return [*map(str, published), difference]


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
        metrics = {x.name: numbers(x.cells[0]) | {"of": x.size} for x in own}
        minus = {row.name: numbers(row.differences[i]) for row in rows if row.differences[i]}
        counts = {"images": len(folder.rows), "prompts": len(set(folder.prompts))}
        first = {"folder": str(folders[0].path), "unlike": folder.unlike, "metrics": minus}
        folder.save(**counts, metrics=metrics, **({"minus": first} if i else {}))


def read_results(names: list[str], folders: list[Folder]) -> None:
    """Read what other programs computed, where it is named or there; names gets what was found."""
    if "geneval2" in names:
        lacking = [x for x in folders if not (x.path / "score_lists.json").is_file()]
        if lacking:
            raise ValueError("\n".join([ask_geneval2(x.path, x.rows) for x in lacking]))
    for name, (file, _) in READ.items():
        there = [folder for folder in folders if (folder.path / file).is_file()]
        for folder in folders if name in names else there:
            folder.take(name)
        if there and name not in names:
            names.append(name)


def main(args: Args) -> None:
    torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions would round to 10 bits
    folders = open_folders(args)
    names = list(dict.fromkeys(args.metrics))
    for prompt in folders[0].prompts if {"ocr", "ocr_rapid"} & set(names) else ():
        quoted(prompt)  # before any model is loaded
    found = find_scorers(args, [name for name in names if name not in READ])
    read_results(names, folders)
    for name, scorer in found.items():
        score(args, name, scorer, folders)
    rows = all_rows(names, folders)
    summarize(rows, folders)
    print(table(rows, folders, args.check_base))
    if "ocr_rapid" in names:
        print("ocr_rapid: other models than the paper's OCR, not comparable with it.")
    if "geneval2" in names:
        print(GENEVAL2_BASE)


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
