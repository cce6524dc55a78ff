"""The reward of a text that was read, and the script that runs in PaddleOCR's environment."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from experiments.evaluate import ocr
from experiments.tests.common import ROOT
from experiments.tests.evaluate.folders import make_folder, run, values_of


def test_text_reward_is_flow_grpo_s():
    """1 - min(edits, length) / length without spaces and case."""
    for found, target, reward in (
        ("Hello World", "hello world", 1),
        ("xx helloworld yy", "Hello World", 1),  # stands in what was found
        ("hellp world", "hello world", 0.9),  # 1 of 10 letters
        ("", "stop", 0),
        ("a quite different long text", "stop", 0),  # more edits than letters
        ("st", "stop", 0.5),
    ):
        prompt = f'a sign with "{target}" and "another text"'
        assert ocr.text_reward(found, prompt) == pytest.approx(reward), found


PADDLE = """
class PaddleOCR:
    def __init__(self, **flags):
        assert flags == dict(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
        print("loaded")
    def ocr(self, image, cls):
        assert cls is False and image.dtype == "uint8" and image.ndim == 3
        if image.max() == 0:
            return [None]
        return [[[[0, 0], ("Open 24", 0.9)], [[0, 0], ("noise", 0.0)], [[0, 0], (" hours", 0.5)]]]
"""


def read(folder, paddle):
    (paddle / "paddleocr.py").write_text(PADDLE)
    words = [sys.executable, ROOT / "experiments/evaluate/ocr.py", folder]
    env = os.environ | {"PYTHONPATH": str(paddle)}
    return subprocess.run(words, env=env, capture_output=True, text=True)


def test_ocr_is_read_in_another_environment(tmp_path, capsys):
    """paddleocr is a stand-in with 2.9.1's calls. Without its file score.py says what to run."""
    folder = make_folder(tmp_path / "a", ['"open 24 hours"', '"open 24 noise"', '"stop"'], 1)
    Image.new("RGB", (8, 8)).save(folder / "00002/samples/00000.png")
    with pytest.raises(ValueError, match=f"has no ocr.jsonl.*\n.*ocr.py {folder}"):
        run(folder, metrics=("ocr",))
    done = read(folder, tmp_path)
    assert done.returncode == 0 and done.stdout == "loaded\n", done.stderr
    run(folder, metrics=("ocr",))
    assert values_of(folder, "ocr") == [1.0, pytest.approx(1 - 4 / 11), 0.0]
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "00002/samples/00000.png")
    with pytest.raises(ValueError, match="00002/samples/00000.png has changed"):
        run(folder, metrics=("ocr",))
    done = read(make_folder(tmp_path / "half", ['a "red" sign', 'a "blue sign']), tmp_path)
    assert done.returncode == 1 and done.stdout == ""  # before a model is loaded
    assert "straight double quotes" in done.stderr and "blue" in done.stderr
