"""Workers of pytest-xdist share the cores: with one thread each none waits for another."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
