"""The pairs that train.py trains on: read by datasets.load_dataset, every row checked before the first step."""

import hashlib
import io
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from experiments.sd3 import seeded

FILES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".tar": "webdataset"}
LONGEST_CAPTION = 10_000  # characters; the text encoders read some 300, so what is longer is not a caption


def read_image(cell: dict, root: str | None) -> Image.Image:
    """8-bit RGB from a row's {"bytes", "path"}: turned by its EXIF orientation, 16 bits scaled to 8, laid on white
    where transparent. root: the directory where relative paths start, and which none may leave.

    Raises ValueError: the path leaves root, pixels have 32 bits; Pillow's errors: it is no image, or a broken one."""
    path = Path(root or "", cell["path"] or "")
    if cell["bytes"] is None and root and not path.resolve().is_relative_to(root):
        raise ValueError(f"the file is {path.resolve()}, outside {root}")
    image = ImageOps.exif_transpose(Image.open(path if cell["bytes"] is None else io.BytesIO(cell["bytes"])))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (Pillow's mode {image.mode}), expected 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def check_row(row: dict, image_column: str, caption_column: str, root: str | None) -> dict:
    """{"problem": what is wrong with the pair, or "", "digest": of its content, "side": its shorter side in pixels}."""
    cell, caption = row[image_column], row[caption_column]
    verdict = {"problem": "", "digest": "", "side": 0}
    try:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"its {caption_column} is {caption!r}, expected a text")
        if len(caption) > LONGEST_CAPTION:
            raise ValueError(f"its {caption_column} has {len(caption)} characters, expected at most {LONGEST_CAPTION}")
        if cell is None:
            raise ValueError("it has no image")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = read_image(cell, root)
        digest = hashlib.sha256(image.tobytes() + repr((image.size, caption)).encode()).hexdigest()
        verdict |= {"digest": digest, "side": min(image.size)}
    except Exception as error:  # whatever Pillow raises: the row is listed with it
        name = Path(cell["path"]).name if cell and cell["path"] else "no file name"
        verdict["problem"] = f"({name}): {type(error).__name__}: {error}".replace("\n", " ")[:300]
    return verdict


class Pairs(torch.utils.data.Dataset):
    """The checked pairs: (pixels (3, R, R) in [-1, 1], caption) by (row, step, sample of the global batch).

    Raises ValueError: a column is missing or of another kind, rows cannot be used; load_dataset's own errors."""

    def __init__(self, args):
        path, self.args, self.processor = Path(args.dataset), args, VaeImageProcessor(vae_scale_factor=1)
        file = {"path": FILES[path.suffix], "data_files": str(path)} if path.suffix in FILES else {"path": args.dataset}
        rows = datasets.load_dataset(**file, split=args.dataset_split)
        wanted = {"image_column": [args.image_column], "caption_column": [args.caption_column], "min": args.minima()}
        for flag, column in ((flag, column) for flag, columns in wanted.items() for column in columns):
            if column not in rows.column_names:
                raise ValueError(f"--{flag} {column}: {args.dataset} has the columns {rows.column_names}")
        kinds = {column: str(getattr(feature, "dtype", "")) for column, feature in rows.features.items()}
        if not isinstance(rows.features[args.image_column], datasets.Image) and (
            "string" not in kinds[args.image_column] or not path.exists()
        ):
            raise ValueError(f"--image_column {args.image_column} of {args.dataset} holds no images")
        self.root = str((path if path.is_dir() else path.parent).resolve()) if path.exists() else None
        rows = rows.cast_column(args.image_column, datasets.Image(decode=False))
        keep = np.full(len(rows), True)
        for column, least in args.minima().items():
            if not kinds[column].startswith(("float", "int")):
                raise ValueError(f"--min {column}: this column of {args.dataset} holds no numbers")
            keep &= np.array(rows[column][:], dtype=float) >= least
        total, numbers = len(rows), np.flatnonzero(keep)
        rows = rows.select(numbers)

        verdicts = rows.map(  # cached by datasets under the fingerprints of the rows and of check_row
            check_row, desc="checking rows", num_proc=min(len(os.sched_getaffinity(0)), 1 + len(rows) // 256),
            remove_columns=rows.column_names, fn_kwargs={
                "image_column": args.image_column, "caption_column": args.caption_column, "root": self.root},
        )  # fmt: skip
        problems, sides = list(verdicts["problem"]), list(verdicts["side"])
        good, bad = ([i for i, problem in enumerate(problems) if bool(problem) == which] for which in (False, True))
        listed = "".join(f"\n  row {numbers[i]} {problems[i]}" for i in bad[:20]) + "\n  ..." * (len(bad) > 20)
        if bad and args.on_bad_row == "stop":
            unusable = f"{len(bad)} of {len(rows)} rows of {args.dataset} cannot be used:{listed}"
            raise ValueError(f"{unusable}\nMend them, or leave them out with --on_bad_row skip")
        small = sum(sides[i] < args.resolution for i in good)
        self.report = f"{len(good)} of {total}: {total - len(rows)} left out by --min, {len(bad)} that cannot be used; "
        self.report += f"{small} are smaller than {args.resolution} pixels and enlarged{listed}"
        self.rows, self.numbers = rows.select(good), [int(numbers[i]) for i in good]
        self.digest = hashlib.sha256("".join(verdicts.select(good)["digest"]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, str]:
        index, step, i = key
        row, size = self.rows[index], self.args.resolution
        x, y, flip, drop = torch.rand(4, generator=seeded(self.args.seed, "pair", step, i)).tolist()
        image = read_image(row[self.args.image_column], self.root)
        center = (x, y) if self.args.crop == "random" else (0.5, 0.5)
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, centering=center)
        if self.args.random_flip and flip < 0.5:
            image = ImageOps.mirror(image)
        caption = "" if drop < self.args.cond_dropout_rate else row[self.args.caption_column]
        return self.processor.preprocess(image)[0], caption
