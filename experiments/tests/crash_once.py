"""train.py in which, once, a rank raises: python crash_once.py MARK RANK STEP and the flags of train.py.

The file MARK is made then; where it is there already nothing is raised."""

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402

mark, rank, step = Path(sys.argv[1]), *map(int, sys.argv[2:4])
original, calls = train.encode_images, []


def encode_images(*args):
    calls.append(1)
    if not mark.exists() and int(os.environ["RANK"]) == rank and len(calls) == step:
        mark.touch()
        raise RuntimeError(f"rank {rank} cannot go on")
    return original(*args)


train.encode_images = encode_images
record(train.main)(train.parse(sys.argv[4:]))
