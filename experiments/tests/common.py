"""What tests share: the small pipeline's flags, train.py's arguments, launched and forked ranks."""

import contextlib
import gc
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS, read_pairs
from experiments.shapes.sft_vs_soar import World, load_world

ROOT = Path(__file__).parents[2]
MODEL = {
    "pretrained_model_name_or_path": str(DATA / "model"),
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "mixed_precision": "no",
}
DATASET = {"dataset": str(PAIRS), "resolution": 64}


def words_of(flags: dict) -> list[str]:
    """Flags as on a command line: True and False as --name and --no-name, several values after one
    --name, and the items of a dict."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [str(word) for item in value.items() for word in (f"--{name}", *item)]
        else:
            values = value if isinstance(value, tuple | list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def train_args(**flags) -> train.Args:
    """train.py's arguments by its own parser, from flags as on its command line; without some,
    those of MODEL and DATASET. Raises ValueError: what the parser would print."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return train.parse(words_of(MODEL | DATASET | flags))
    except SystemExit:
        # Without the box that tyro draws around it.
        message = re.sub(r"(\s|[─-╿]|-{4,})+", " ", printed.getvalue())
        raise ValueError(message.strip()) from None


@contextlib.contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[pytest.ExceptionInfo]:
    """As pytest.raises, with these words in the message."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert all(word in message for word in words), (words, message)


def start(script: str, *words: str, **flags) -> subprocess.Popen:
    """script in a process group of its own, with one thread."""
    command = [sys.executable, script, *words, *words_of(flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # SIGINT is heeded again, which a shell's background ignores.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        command, cwd=ROOT, env=env, preexec_fn=heed, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 150) -> subprocess.CompletedProcess:
    """Wait for its end, and leave no process of its group behind."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        said = f"{stdout[-3000:]}\n{stderr[-3000:]}"
        raise AssertionError(f"no end after {timeout} s:\n{said}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(script: str, *words: str, **flags) -> subprocess.CompletedProcess:
    return finish(start(script, *words, **flags))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(count: int, action: Callable[[], None], log: Path) -> list[multiprocessing.Process]:
    """Ranks that call action under torchrun's variables, or a single process without them. They are
    forked from this process, which spares each 7 s of imports, and have one thread. What rank r
    prints goes to log.r."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    address["WORLD_SIZE"] = str(count)

    def rank_main(rank: int) -> None:
        if count > 1:
            os.environ |= address | {"RANK": str(rank)}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = log.with_suffix(f".{rank}").open("w", buffering=1)
        action()

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    gc.collect()
    # Else a rank might collect a process group of this process, and wait for threads that it lacks.
    gc.freeze()
    try:
        for rank in ranks:
            rank.start()
    finally:
        gc.unfreeze()
    return ranks


class Watch(TorchDispatchMode):
    """Shows the operations of torch to see(function, args)."""

    def __init__(self, see: Callable):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.see(function, args)
        return function(*args, **(kwargs or {}))


def copy_pairs(rows: range, path: Path) -> Path:
    """Some rows of the curated pairs as a parquet file of their own."""
    read_pairs().select(rows).to_parquet(path)
    return path


def small_world(folder: Path) -> World:
    """The first 12 pairs and every hundredth prompt, copied to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_pairs(range(12), folder / PAIRS.name)
    prompts = (DATA / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(prompts[::100]))
    return load_world(folder / "world.safetensors", folder)
