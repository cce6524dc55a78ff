"""The paper's OCR for folders of sample.py: reads the text in each image, and writes its reward.

    .venv-ocr/bin/python experiments/evaluate/ocr.py output/ocr/base output/ocr/output-soar

It runs in an environment of its own (evaluation.md): PaddleOCR's packages do not agree with ours,
so nothing of ours is imported here. FOLDER/ocr.jsonl gets one line per image, for score.py. Models
and formula are those of OcrScorer in flow_grpo/ocr.py of yifan123/flow_grpo.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm


def quoted(prompt: str) -> str:
    """What is to be read: the prompt's first text in straight double quotes.

    Raises ValueError: there is none."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise ValueError(f"OCR needs a text in straight double quotes in each prompt: {prompt!r}")
    return parts[1]


def text_reward(found: str, prompt: str) -> float:
    """1 - edits / length of the quoted text, spaces and case apart; 1 if it stands in what was
    found, never below 0."""
    target = quoted(prompt).replace(" ", "").lower()
    found = found.replace(" ", "").lower()
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


def main(folders: list[Path]) -> None:
    rows = {}
    for folder in folders:
        lines = (folder / "samples.jsonl").read_text().splitlines()
        rows[folder] = [json.loads(line) for line in lines]
        for row in rows[folder]:
            quoted(row["prompt"])  # before any model is loaded
    from paddleocr import PaddleOCR

    engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
    for folder in folders:
        lines = []
        for row in tqdm(rows[folder], unit="image", desc=str(folder)):
            data = (folder / row["file"]).read_bytes()
            image = Image.open(io.BytesIO(data)).convert("RGB")
            found = engine.ocr(np.array(image), cls=False)[0] or []
            text = "".join(words for _, (words, confidence) in found if confidence > 0)
            line = {"filename": row["file"], "prompt": row["prompt"], "text": text}
            line["sha256"] = hashlib.sha256(data).hexdigest()
            line["ocr"] = text_reward(text, row["prompt"])
            lines.append(json.dumps(line) + "\n")
        (folder / "ocr.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    try:
        main([Path(word) for word in sys.argv[1:]])
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
