"""What a training run loses when it is killed, signalled, or runs out of disk: tried on the shapes world.

    python -m experiments.faults

starts train.py on the CPU again and again, and ends with a table. The run that was killed is then finished, and must
have the weights of one that was not, bit by bit. About ten minutes; the full disk needs root, for a tmpfs.
"""

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import tyro
from safetensors.torch import load_file
from tqdm import tqdm

import train
from experiments.tests.common import DATASET, MODEL, finish, start

INTERVAL = 3  # steps between checkpoints
FLAGS = MODEL | DATASET | {"train_batch_size": 2, "num_aux_points": 1, "checkpointing_steps": INTERVAL}
FLAGS |= {"logging_steps": 1, "learning_rate": 1e-5}
FLAGS |= {"checkpoints_total_limit": 2, "max_train_steps": 100_000}


@dataclass(frozen=True)
class Args:
    kills: int = 50
    """How often kill -9 is tried."""
    seed: int = 0
    """Of the moments of the kills."""


def steps_done(folder: Path) -> int:
    """Whole lines of metrics.jsonl, a line a step."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def steps_saved(folder: Path) -> int:
    """The step of the last checkpoint, 0 if there is none; every checkpoint that counts as complete must load."""
    found = train.checkpoints(folder)
    for path in found:
        load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
        load_file(path / "optimizer.safetensors")
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def wait(process: subprocess.Popen, true: Callable[[], bool]) -> None:
    """Until true(). Raises RuntimeError: the process ended first."""
    while not true():
        if process.poll() is not None:
            raise RuntimeError(f"it ended too early:\n{finish(process).stderr[-3000:]}")
        time.sleep(0.002)


def kill(root: Path, args: Args) -> list[str]:
    """kill -9 within two seconds after a run has started or gone on; every tenth at any moment of its start."""
    folder, moments = root / "killed", random.Random(args.seed)
    metrics, worst, while_saving, in_steps = folder / "metrics.jsonl", 0, 0, 0
    for i in tqdm(range(args.kills), desc="kill -9"):
        started = metrics.stat().st_ino if metrics.is_file() else None
        process, before = start(1, "train.py", output_dir=folder, **FLAGS), steps_saved(folder)
        if i % 10 < 9:
            wait(process, lambda: metrics.is_file() and metrics.stat().st_ino != started)  # it has been cut and renamed
            time.sleep(moments.uniform(0, 2))
            in_steps += 1
        else:
            time.sleep(moments.uniform(0, 5))
        process.kill()
        process.communicate()
        while_saving += any(folder.glob(".checkpoint-*"))
        assert steps_saved(folder) >= before, f"checkpoint {before} is gone"
        worst = max(worst, steps_done(folder) - steps_saved(folder))
    assert worst <= INTERVAL, f"{worst} steps are lost, of an interval of {INTERVAL}"
    steps = steps_saved(folder) + 1
    for name in ("killed", "whole"):
        flags = FLAGS | {"max_train_steps": steps, "output_dir": root / name}
        done = finish(start(1, "train.py", **flags), timeout=3600)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("transformer/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        killed, whole = (load_file(root / x / "final" / name) for x in ("killed", "whole"))
        assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole), name
    tried = f"kill -9, {args.kills} times: {in_steps} in the first 2 s of steps, {while_saving} left a save half done"
    return [f"{tried} | {worst} steps at most, of an interval of {INTERVAL}; step {steps} then equal bit by bit"]


def signals(root: Path, args: Args) -> list[str]:
    """SIGTERM, SIGINT, SIGUSR1 to one rank, to both, to torchrun, which is told to pass on SIGUSR1 too, and to the
    whole process tree, data loader's workers first, as SLURM and systemd do."""
    rows = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for target in ("one rank", "both ranks", "torchrun", "the whole tree"):
            folder = root / f"{number.name} {target}".replace(" ", "-")
            launcher = "--standalone --nproc_per_node 2 --signals_to_handle".split()
            launcher += ["SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "train.py"]
            flags = FLAGS | {"output_dir": folder, "dataloader_num_workers": 2}
            process = start(1, "-m", "torch.distributed.run", *launcher, **flags)
            wait(process, lambda: steps_done(folder) > INTERVAL)
            below = psutil.Process(process.pid).children(recursive=True)[::-1]
            ranks = sorted(p.pid for p in psutil.Process(process.pid).children() if "train.py" in p.cmdline())
            targets = {"one rank": ranks[1:2], "both ranks": ranks, "torchrun": [process.pid]}
            targets["the whole tree"] = [*(p.pid for p in below), process.pid]
            for pid in targets[target]:
                os.kill(pid, number)
            done, saved = finish(process), steps_saved(folder)
            assert psutil.wait_procs(below, timeout=15)[1] == [], "a process is left"
            assert f"after step {saved}; the same command goes on from" in done.stdout, done.stderr[-3000:]
            lost = steps_done(folder) - saved
            rows.append(f"{number.name} to {target} | {lost} steps; torchrun's exit code is {done.returncode}")
    return rows


def full_disk(root: Path, args: Args) -> list[str]:
    """A disk that has room for two checkpoints and a half, and must keep three for a moment."""
    folder = root / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=95m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        return [f"disk full in a save | not run: {mounted.stderr.strip()}"]
    try:
        done = finish(start(1, "train.py", output_dir=folder / "run", **FLAGS))
        (error,) = (line for line in done.stderr.splitlines() if line.startswith("[rank0]: OSError: "))
        assert steps_saved(folder / "run") == 2 * INTERVAL and not list((folder / "run").glob(".checkpoint-*"))
        where = error.removeprefix("[rank0]: ").replace(str(folder / "run") + "/", "")
        return [f"disk full in the third save | {INTERVAL} steps; both earlier checkpoints load; {where}"]
    finally:
        subprocess.run(["umount", folder], check=True)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as root:
        rows = [row for tried in (full_disk, signals, kill) for row in tried(Path(root), args)]
    print("| tried | lost |", "| --- | --- |", *(f"| {row} |" for row in rows), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
