"""experiments.environment: a command's output or its error; an environment made once."""

import sys

import pytest

from experiments import environment as module
from experiments.environment import environment, run


def test_output_of_a_command_or_the_end_of_its_error():
    told = "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['CUDA_VISIBLE_DEVICES'])"
    assert run(sys.executable, "-c", told).split() == ["1"]
    with pytest.raises(RuntimeError, match="exit status 1 .*\n.*\n(.*\n)*ValueError: why$"):
        run(sys.executable, "-c", "print('before'); raise ValueError('why')")


def test_an_environment_is_made_once_for_its_pins_and_again_after_a_failure(tmp_path, monkeypatch):
    calls = []

    def recorded(*words):
        calls.append(words[2])
        if words[2] == "venv":
            (tmp_path / "lib/python3.11/site-packages").mkdir(parents=True, exist_ok=True)
        if "bad" in words:
            raise RuntimeError("pip")

    monkeypatch.setattr(module, "run", recorded)
    for pins, made in ((("a",), 2), (("a",), 0), (("a", "b"), 2)):
        calls.clear()
        python = environment(tmp_path, pins, with_ours=True)
        assert python == tmp_path / "bin" / "python" and len(calls) == made
    assert list(tmp_path.glob("lib/python*/site-packages/ours.pth"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="pip"):
            environment(tmp_path, ("bad",))
