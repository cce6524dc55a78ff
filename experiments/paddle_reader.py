"""Reads text in images with PaddleOCR, for score.py, in an environment that has paddleocr 2.9.1.

Standard input: an image file in base64 on each line. Standard output: "ready", then the text found
in each, as JSON. Called as flow_grpo/ocr.py of yifan123/flow_grpo calls it.
"""

import base64
import io
import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what paddle prints must not mix with the answers
    import numpy as np
    from paddleocr import PaddleOCR
    from PIL import Image

    engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        image = Image.open(io.BytesIO(base64.b64decode(line))).convert("RGB")
        lines = engine.ocr(np.array(image), cls=False)[0] or []
        text = "".join(words for _, (words, confidence) in lines if confidence > 0)
        print(json.dumps(text), file=answers, flush=True)


if __name__ == "__main__":
    main()
