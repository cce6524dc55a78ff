"""What tests share: the small pipeline's flags, a launcher, a part of the shapes world."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from experiments.sft_vs_soar import World, load_world
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH

ROOT = Path(__file__).parents[2]
MODEL = {"pretrained_model_name_or_path": str(DATA / "model"), "max_sequence_length": MAX_SEQUENCE_LENGTH}
MODEL |= {"mixed_precision": "no"}


def start(processes: int, script: str, *words: str, **flags) -> subprocess.Popen:
    """script under torchrun, or alone with 1 process, in a process group of its own; one thread a process."""
    words += tuple(str(word) for name, value in flags.items() for word in (f"--{name}", value))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable]), script, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background ignores it
    return subprocess.Popen(command, cwd=ROOT, env=env, preexec_fn=heed, **options)


def finish(process: subprocess.Popen, timeout: float = 150) -> subprocess.CompletedProcess:
    """Wait for its end, and leave no process of its group behind."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-9", "-P", str(process.pid)])  # torchrun's workers, which have groups of their own
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{stdout[-3000:]}\n{stderr[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(processes: int, script: str, *words: str, **flags) -> subprocess.CompletedProcess:
    return finish(start(processes, script, *words, **flags))


def small_world(folder: Path) -> World:
    """The first 12 pairs and every hundredth prompt, copied to folder."""
    (folder / "train").mkdir(parents=True)
    lines = (DATA / "train/metadata.jsonl").read_text().splitlines(keepends=True)[:12]
    (folder / "train/metadata.jsonl").write_text("".join(lines))
    for line in lines:
        shutil.copy(DATA / "train" / json.loads(line)["file_name"], folder / "train")
    prompts = (DATA / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(prompts[::100]))
    return load_world(folder / "world.safetensors", folder)
