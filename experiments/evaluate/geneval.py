"""What GenEval, GenEval 2 and ocr.py answer about a folder, for score.py's table.

They run in environments of their own (evaluation.md). GenEval's evaluate_images.py writes
results.jsonl. GenEval 2's evaluation.py reads a {prompt: file} and writes score_lists.json, a list
of the answers' probabilities for each prompt, in the order of the prompt file. Its repository,
facebookresearch/GenEval2, is CC BY-NC: nothing of it is here.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sample import save_whole


@dataclass(frozen=True)
class Column:
    """What a row of the table has from one folder: values, each with its prompt and its group."""

    values: np.ndarray
    prompts: np.ndarray
    groups: np.ndarray  # GenEval's tasks; "" for what has none

    def where(self, chosen: np.ndarray) -> "Column":
        return Column(self.values[chosen], self.prompts[chosen], self.groups[chosen])

    def pairs_with(self, other: "Column") -> bool:
        same = np.array_equal(self.prompts, other.prompts)
        return same and np.array_equal(self.groups, other.groups)

    def size(self) -> str:
        """Such as "553 x 4, 6 tasks": prompts, values of each where all have the same, tasks."""
        counts = Counter(self.prompts.tolist())
        each = set(counts.values())
        text = f" x {max(each)}" if len(each) == 1 else f" prompts, {len(self.values)} values"
        tasks = set(self.groups.tolist()) - {""}
        return f"{len(counts)}{text}" + (f", {len(tasks)} tasks" if len(tasks) > 1 else "")


def per_image(values: list[float], rows: list[dict]) -> Column:
    """One value for each row, without tasks."""
    prompts = np.array([row["prompt"] for row in rows])
    return Column(np.array(values), prompts, np.full(len(rows), ""))


def parse(text: str, where: object) -> Any:
    """Raises ValueError: names where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def read_lines(path: Path) -> list[dict]:
    """Raises ValueError: a line is not JSON, or there is none."""
    lines = enumerate(path.read_text().splitlines(), 1)
    rows = [parse(line, f"{path}, line {number}") for number, line in lines]
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def read_answers(path: Path, rows: list[dict]) -> list[dict]:
    """A file's line for each image. Raises ValueError: it is not of exactly these images and
    prompts."""
    found = {"/".join(Path(line["filename"]).parts[-3:]): line for line in read_lines(path)}
    differ = found.keys() ^ {row["file"] for row in rows}
    if differ:
        raise ValueError(f"{path} is not of this folder's images: {min(differ)} is in one only")
    for row in rows:
        line = found[row["file"]]
        if line["prompt"] != row["prompt"]:
            raise ValueError(f"{path}: {row['file']} is of another prompt, {line['prompt']!r}")
        if line.get("sha256", row["sha256"]) != row["sha256"]:  # GenEval's has none
            raise ValueError(f"{path}: {row['file']} has changed since: make it anew")
    return [found[row["file"]] for row in rows]


def read_ocr(path: Path, rows: list[dict]) -> dict[str, Column]:
    """ocr.py's rewards."""
    return {"ocr": per_image([line["ocr"] for line in read_answers(path, rows)], rows)}


def read_geneval(path: Path, rows: list[dict]) -> dict[str, Column]:
    """GenEval's verdicts, 0 or 1, in all and by task."""
    answers = read_answers(path, rows)
    tasks = np.array([line["tag"] for line in answers])
    verdicts = per_image([float(line["correct"]) for line in answers], rows)
    whole = replace(verdicts, groups=tasks)
    by_task = {f"geneval {x}": whole.where(tasks == x) for x in dict.fromkeys(tasks.tolist())}
    return {"geneval": whole} | by_task


def read_geneval2(path: Path, rows: list[dict]) -> dict[str, Column]:
    """Soft-TIFA in %: a prompt's geometric mean over its atoms, its mean, single atoms by skill,
    and the first by number of atoms. (A prompt file's atom_count leaves out the atoms "a".)

    Raises ValueError: the folder is not of GenEval 2's prompts, or the lists not of this folder."""
    lists = parse(path.read_text(), path)
    if len(lists) != len(rows):
        raise ValueError(f"{path} is of {len(lists)} prompts, its folder of {len(rows)}")
    asked = read_asked(path.parent, rows)
    for row, line, atoms in zip(rows, asked, lists):
        check_atoms(f"{path}, list of {row['prompt']!r}", atoms, len(line["skills"]))
    with np.errstate(divide="ignore"):  # a probability of 0 makes the geometric mean 0
        whole = per_image([100 * np.exp(np.mean(np.log(atoms))) for atoms in lists], rows)
    mean = per_image([100 * np.mean(atoms) for atoms in lists], rows)
    of_atoms = [row for row, atoms in zip(rows, lists) for _ in atoms]
    single = per_image(100 * np.concatenate(lists), of_atoms)
    skills = np.concatenate([line["skills"] for line in asked])
    counts = np.array([line["atom_count"] for line in asked])
    made = {"geneval2": whole, "geneval2 by atom": mean}
    made |= {f"geneval2 {x}": single.where(skills == x) for x in dict.fromkeys(skills.tolist())}
    made |= {f"geneval2 {n} atoms": whole.where(counts == n) for n in sorted(set(counts.tolist()))}
    return made


def read_asked(folder: Path, rows: list[dict]) -> list[dict]:
    """The line of the prompt file for each image. Raises ValueError: it is not GenEval 2's."""
    paths = [(folder / row["file"]).parents[1] / "metadata.jsonl" for row in rows]
    asked = [read_lines(path)[0] for path in paths]
    for path, line in zip(paths, asked):
        if not {"skills", "atom_count"} <= line.keys():
            raise ValueError(f"{path} has no skills: draw GenEval 2's geneval2_data.jsonl")
    return asked


def check_atoms(where: str, atoms: list, expected: int) -> None:
    """Raises ValueError: not one number for each atom, a sum of probabilities of answers."""
    if len(atoms) != expected:
        raise ValueError(f"{where} has {len(atoms)} numbers for {expected} atoms: another order?")
    for x in atoms:
        if not isinstance(x, float) or not 0 <= x < np.inf:
            raise ValueError(f"{where} has {x}, no probability: give --method soft_tifa_gm")


def write_geneval2_paths(folder: Path, rows: list[dict]) -> None:
    """Write geneval2_paths.json, which evaluation.py reads.

    Raises ValueError: other prompts, or several images of one, of which it would look at one."""
    read_asked(folder, rows)
    prompt, most = Counter(row["prompt"] for row in rows).most_common(1)[0]
    if most > 1:
        raise ValueError(
            f"{folder} has {most} images of {prompt!r}, and GenEval 2 takes one of each prompt: "
            "draw with --num_images_per_prompt 1"
        )
    files = {row["prompt"]: str(folder / row["file"]) for row in rows}
    save_whole(json.dumps(files, indent=1) + "\n", folder / "geneval2_paths.json")


READ = {  # what programs of others compute: the file that holds it in a folder
    "ocr": ("ocr.jsonl", read_ocr),
    "geneval": ("results.jsonl", read_geneval),
    "geneval2": ("score_lists.json", read_geneval2),
}
COMMANDS = {
    "ocr": "With PaddleOCR's Python:\nexperiments/evaluate/ocr.py {folder}",
    "geneval": "In GenEval's environment and folder:\npython evaluation/evaluate_images.py "
    "{folder} --outfile {folder}/results.jsonl --model-path DETECTOR/",
    "geneval2": "In GenEval 2's environment and folder:\npython evaluation.py "
    "--method soft_tifa_gm --benchmark_data geneval2_data.jsonl "
    "--image_filepath_data {folder}/geneval2_paths.json --output_file {folder}/score_lists.json",
}


def how_to_make(name: str, folder: Path, rows: list[dict]) -> str:
    """The command that makes a metric's file."""
    if name == "geneval2":
        write_geneval2_paths(folder.resolve(), rows)
    return f"{folder} has no {READ[name][0]}. {COMMANDS[name].format(folder=folder.resolve())}"
