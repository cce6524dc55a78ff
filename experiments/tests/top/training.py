"""What tests of train.py share: runs in this process or in forked ranks, and what they wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from experiments.shapes.draw import DATA
from experiments.tests.common import fork, raises, train_args
from soar import SoarConfig

SHORT = {"learning_rate": 1e-4, "num_rollout_paths": 2, "num_aux_points": 1, "logging_steps": 1}
SHORT |= {"num_sampling_steps": 44}
SOAR = SoarConfig(num_rollout_paths=2, num_aux_points=1)
THREE = {"max_train_steps": 3, "checkpointing_steps": 2, "train_batch_size": 2}  # by two ranks
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TIMES = {"step_seconds", "peak_memory_gb"}


def run(output_dir: Path, **flags) -> None:
    """train.py in this process."""
    try:
        train.main(train_args(output_dir=output_dir, **(SHORT | flags)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def refused(output_dir: Path, *words: str, kind=ValueError, **flags) -> None:
    with raises(kind, *words):
        run(output_dir, **flags)


def ends(count: int, action: Callable[[], None], log: Path) -> tuple[list[int], list[str]]:
    """Exit codes of forked ranks that call action, and what they printed."""
    ranks = fork(count, action, log)
    for rank in ranks:
        rank.join(100)
        rank.kill()  # if it still runs, which its exit code then tells
        rank.join()
    said = [log.with_suffix(f".{i}").read_text() for i in range(count)]
    return [rank.exitcode for rank in ranks], said


def all_lines(folder: Path) -> list[dict]:
    """Its metrics but for times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMES} for line in found]


def lines(folder: Path) -> list[dict]:
    """Those of training."""
    return [line for line in all_lines(folder) if "held_out" not in line]


def held_out_lines(folder: Path) -> list[dict]:
    return [line for line in all_lines(folder) if "held_out" in line]


def last(folder: Path) -> Path:
    """Its newest checkpoint."""
    return train.checkpoints(folder)[-1]


def equal(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_weights(a: Path, b: Path) -> bool:
    return all(equal(a / name, b / name) for name in (WEIGHTS, "optimizer.safetensors"))


def copy_base(folder: Path) -> Path:
    return shutil.copytree(DATA / "model", folder)
