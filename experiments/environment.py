"""What experiments share: a command of another program, an environment to run it in, the commit
that results are of, a table.

Nothing is downloaded but packages: what runs is told to be offline, and sees no GPU.
"""

import contextlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*words: object) -> str:
    """What the command prints, run at the repository's root. Raises RuntimeError: it failed; the
    last line is the last of its own error."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}".strip()
        raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}:\n{said}")
    return done.stdout


def commit() -> str:
    """The repository's commit, with a + where files differ from it; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    return "unknown"


def markdown(lines: list[list[str]], names: int = 1) -> str:
    """A table of cells, its head first; the first columns are names, the others numbers."""
    rule = ["---"] * names + ["---:"] * (len(lines[0]) - names)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


def environment(folder: Path, pins: tuple[str, ...], *, with_ours: bool = False) -> Path:
    """The Python of an environment with these packages, made unless the folder has it already.

    with_ours: what is installed for this Python is there too, and need not be pinned.
    Raises RuntimeError: pip failed."""
    folder = folder.absolute()
    python, done = folder / "bin" / "python", folder / "pins.txt"
    if not done.is_file() or done.read_text().splitlines() != list(pins):
        print(f"making {folder}: {' '.join(pins)}", flush=True)
        run(sys.executable, "-m", "venv", "--clear", folder)
        if with_ours:
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
        run(python, "-m", "pip", "install", "-q", *pins)
        done.write_text("\n".join(pins))
    return python
