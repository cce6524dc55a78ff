"""What GenEval and GenEval 2 answer about a folder of sample.py, as columns of score.py's table.

Both run in environments of their own, as evaluation.md says. GenEval's evaluate_images.py writes
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
    groups: np.ndarray
    """GenEval's tasks; "" for what has none."""
    unit: str = "images"

    def where(self, chosen: np.ndarray) -> "Column":
        parts = (self.values[chosen], self.prompts[chosen], self.groups[chosen])
        return Column(*parts, self.unit)

    def pairs_with(self, other: "Column") -> bool:
        same = np.array_equal(self.prompts, other.prompts)
        return same and np.array_equal(self.groups, other.groups)

    def size(self) -> str:
        """Such as "553 x 4, 6 tasks": prompts, values of each where all have the same, tasks."""
        counts = Counter(self.prompts.tolist())
        even = len(set(counts.values())) == 1 and self.unit == "images"
        each = max(counts.values())
        text = f" x {each}" if even else f" prompts, {len(self.values)} {self.unit}"
        tasks = set(self.groups.tolist()) - {""}
        return f"{len(counts)}{text}" + (f", {len(tasks)} tasks" if len(tasks) > 1 else "")


def read_json(path: Path) -> Any:
    """Raises ValueError: names the file that is not JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


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


def read_geneval(folder: Path, rows: list[dict]) -> dict[str, Column]:
    """GenEval's verdicts, 0 or 1, in all and by task, from results.jsonl: one line an image.

    Raises ValueError: it is not of exactly these images and prompts."""
    path = folder / "results.jsonl"
    results = {"/".join(Path(x["filename"]).parts[-3:]): x for x in read_lines(path)}
    differ = results.keys() ^ {row["file"] for row in rows}
    if differ:
        raise ValueError(f"{path} is not of this folder's images: {min(differ)} is in one only")
    for row in rows:
        prompt = results[row["file"]]["prompt"]
        if prompt != row["prompt"]:
            raise ValueError(f"{path}: {row['file']} is of another prompt, {prompt!r}")
    verdicts = np.array([float(results[row["file"]]["correct"]) for row in rows])
    tasks = np.array([results[row["file"]]["tag"] for row in rows])
    whole = Column(verdicts, np.array([row["prompt"] for row in rows]), tasks)
    by_task = {f"geneval {x}": whole.where(tasks == x) for x in dict.fromkeys(tasks.tolist())}
    return {"geneval": whole} | by_task


def read_geneval2(folder: Path, rows: list[dict]) -> dict[str, Column]:
    """Soft-TIFA in %, from score_lists.json: a prompt's geometric mean over its atoms, its mean,
    single atoms by skill, and the first by number of atoms. (A prompt file's atom_count leaves out
    the atoms "a".)

    Raises ValueError: the folder is not of GenEval 2's prompts, or the lists not of this folder."""
    path = folder / "score_lists.json"
    lists = read_json(path)
    if len(lists) != len(rows):
        raise ValueError(f"{path} is of {len(lists)} prompts, {folder} of {len(rows)}")
    asked = read_asked(folder, rows)
    for row, line, atoms in zip(rows, asked, lists):
        check_atoms(f"{path}, list of {row['prompt']!r}", atoms, len(line["skills"]))
    prompts = np.array([row["prompt"] for row in rows])
    none = np.full(len(rows), "")
    with np.errstate(divide="ignore"):  # a probability of 0 makes the geometric mean 0
        geometric = np.array([np.exp(np.log(atoms).mean()) for atoms in lists])
    whole = Column(100 * geometric, prompts, none)
    mean = replace(whole, values=100 * np.array([np.mean(atoms) for atoms in lists]))
    sizes = [len(atoms) for atoms in lists]
    values = 100 * np.concatenate(lists)
    single = Column(values, prompts.repeat(sizes), none.repeat(sizes), "atoms")
    skills = np.concatenate([line["skills"] for line in asked])
    counts = np.array([line["atom_count"] for line in asked])
    made = {"geneval2": whole, "geneval2 by atom": mean}
    made |= {f"geneval2 {x}": single.where(skills == x) for x in dict.fromkeys(skills.tolist())}
    made |= {f"geneval2 {n} atoms": whole.where(counts == n) for n in sorted(set(counts.tolist()))}
    return made


def read_asked(folder: Path, rows: list[dict]) -> list[dict]:
    """The line of the prompt file for each image. Raises ValueError: it is not GenEval 2's."""
    asked = []
    for row in rows:
        path = (folder / row["file"]).parents[1] / "metadata.jsonl"
        asked += read_lines(path)[:1]
        if not {"skills", "atom_count"} <= asked[-1].keys():
            raise ValueError(f"{path} has no skills: draw GenEval 2's geneval2_data.jsonl")
    return asked


def check_atoms(where: str, atoms: list, expected: int) -> None:
    """Raises ValueError: not one number for each atom, a sum of probabilities of answers."""
    if len(atoms) != expected:
        raise ValueError(f"{where} has {len(atoms)} numbers for {expected} atoms: another order?")
    for x in atoms:
        if not isinstance(x, float) or not 0 <= x < np.inf:
            raise ValueError(f"{where} has {x}, no probability: give --method soft_tifa_gm")


def ask_geneval2(folder: Path, rows: list[dict]) -> str:
    """Write geneval2_paths.json, which evaluation.py reads, and say how to run it.

    Raises ValueError: other prompts, or several images of one, of which it would look at one."""
    read_asked(folder, rows)
    counts = Counter(row["prompt"] for row in rows)
    prompt, most = counts.most_common(1)[0]
    if most > 1:
        raise ValueError(
            f"{folder} has {most} images of {prompt!r}, and GenEval 2 takes one of each prompt: "
            "draw with --num_images_per_prompt 1"
        )
    paths = folder.resolve() / "geneval2_paths.json"
    files = {row["prompt"]: str(folder.resolve() / row["file"]) for row in rows}
    save_whole(json.dumps(files, indent=1) + "\n", paths)
    return (
        f"{folder} has no score_lists.json. In GenEval 2's environment and folder:\n"
        f"python evaluation.py --method soft_tifa_gm --benchmark_data geneval2_data.jsonl \\\n"
        f"    --image_filepath_data {paths} \\\n"
        f"    --output_file {folder.resolve() / 'score_lists.json'}"
    )
