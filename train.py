"""SOAR post-training of Stable Diffusion 3.5 (or 3) Medium, and SFT by the same path.

    torchrun --nproc_per_node 8 train.py --dataset my_images --output_dir output/soar
    torchrun --nproc_per_node 8 train.py --dataset my_images --output_dir output/sft --lambda_aux 0

`python train.py` runs one process; --dry_run loads and checks everything, says what would run, and
stops. A run that was killed, or stopped by SIGTERM, SIGINT or SIGUSR1, goes on from its last
checkpoint when the same command is given again. The defaults are those of the published runs on
subsets: 5,000 steps of 8 GPUs x 4 images.

--dataset is a folder with images and metadata.jsonl (file_name and text on each line), or with
NAME.txt beside NAME.png, or with parquet or tar files; one such file; a .jsonl or .csv file of
image paths; or a hub id. All rows are checked before the first step.

Written to output_dir: checkpoint-NNNNNN/ with transformer/ (with --lora_rank a LoRA file in its
place), optimizer.safetensors and trainer_state.json; final, a link to the last; settings.json;
metrics.jsonl and tensorboard/, with errors also by quarter of sigma (1 is the cleanest);
validation-NNNNNN.png. Every random number is a function of (seed, step, sample): the number of GPUs
changes only the order of sums.
"""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import inspect
import io
import json
import math
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sample import (
    LORA,
    check_fit,
    check_size,
    digest,
    encode_images,
    encode_prompts,
    find_weights,
    identity,
    init_distributed,
    load_pipeline,
    load_transformer,
    locked,
    read_jsonl,
    read_lora,
    read_prompts,
    sample_images,
    save_whole,
    seeded,
    sync,
    to_device,
    visible,
)
from soar import (
    Draws,
    SoarConfig,
    Term,
    Velocity,
    draw,
    loss_normalizer,
    sigma_from_t,
    soar_terms,
)

# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    train_batch_size: int = 4
    """Images per GPU and forward."""
    gradient_accumulation_steps: int = 1
    """Forwards per step and GPU; the global batch is the product of both and the GPUs."""
    max_train_steps: int = 5000
    learning_rate: float = 2e-5
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Of diffusers.optimization.get_scheduler; all but constant warm up."""
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    lora_rank: int | None = None
    """Train LoRA matrices of this rank beside the attention's, alpha = rank, not all weights."""
    cond_dropout_rate: float = 0.0
    """Share of samples trained with an empty caption."""
    max_sequence_length: int = 77
    """T5 tokens that a caption is padded or cut to."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """What forwards run in. Trained weights, optimizer, states, losses and the VAE are float32."""
    seed: int = 42

    def __post_init__(self):
        positive = (
            "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate",
            "max_grad_norm", "lora_rank", "max_sequence_length",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} is {value}, expected more than 0, and finite")
        for name in ("lr_warmup_steps", "adam_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.cond_dropout_rate <= 1:
            raise ValueError(f"--cond_dropout_rate is {self.cond_dropout_rate}, expected 0 to 1")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            mend = "use --lr_scheduler constant_with_warmup"
            raise ValueError(f"--lr_scheduler constant does not read --lr_warmup_steps; {mend}")
        if self.mixed_precision not in ("bf16", "no"):
            fault = f"--mixed_precision is {self.mixed_precision}, expected bf16, or no for float32"
            raise ValueError(f"{fault}; in fp16 small gradients would vanish")


@dataclass(frozen=True)
class RestConfig:
    dataset_split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    min: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """COLUMN=NUMBER, such as aesthetic=6.8: leave out rows below that. May be given again."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Rows that cannot be used are listed; then stop, or go on without them."""
    dataloader_num_workers: int = 4
    """Processes that read images, per GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time, same bits."""
    compile: bool = False
    """torch.compile the transformer's blocks: the first step is slow, others are faster."""
    text_encoder_device: Literal["cpu"] | None = None
    """cpu: leave the text encoders there, which saves GPU memory and is slow."""
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int | None = None
    """Keep only so many checkpoints; older ones go once a new one is complete."""
    logging_steps: int = 10
    """Steps per line of metrics, which holds their means."""
    validation_prompts: Path | None = None
    """A prompt file as sample.py reads it: an image each, from noise that stays the same, with
    --num_sampling_steps and --guidance_scale."""
    validation_steps: int = 500
    """Steps between validation images; there are some before the first step and after the last."""
    dry_run: bool = False
    """Load and check everything, print the summary, and stop."""

    def __post_init__(self):
        positive = (
            "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")
        if self.dataloader_num_workers < 0:
            came = self.dataloader_num_workers
            raise ValueError(f"--dataloader_num_workers is {came}, expected at least 0")
        if self.image_column == self.caption_column:
            raise ValueError(f"--image_column and --caption_column are both {self.image_column}")
        self.minima()

    def minima(self) -> dict[str, float]:
        """--min as {column: least value}. Raises ValueError: it is not COLUMN=NUMBER."""
        try:
            pairs = [word.split("=") for word in self.min]
            return {column: float(least) for column, least in pairs}
        except ValueError:
            came = " ".join(self.min)
            raise ValueError(f"--min is {came}, expected COLUMN=NUMBER: aesthetic=6.8") from None


@dataclass(frozen=True)
class Args:
    dataset: str
    """A folder, a file or a hub id, see above."""
    output_dir: Path
    """Where the run is written, on a disk that all nodes see: new, empty, or holding the run that
    is to go on."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or folder of a Stable Diffusion 3 pipeline."""
    transformer: str | None = None
    """Where to start, if not from the pipeline's own transformer: a checkpoint of train.py, a
    diffusers transformer folder or a LoRA file."""
    resolution: int = 512
    """Pixels; images are scaled to cover the square, then cropped to its centre."""
    training: TrainingConfig = TrainingConfig()
    soar: SoarConfig = SoarConfig()
    rest: RestConfig = RestConfig()

    def __post_init__(self):
        if self.resolution < 1:
            raise ValueError(f"--resolution is {self.resolution}, expected at least 1")

    def global_batch(self, world_size: int) -> int:
        per_gpu = self.training.train_batch_size * self.training.gradient_accumulation_steps
        return per_gpu * world_size


# --- Data: read -----------------------------------------------------------------------------------

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif")
TABLE_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")


class Rows(NamedTuple):
    """The rows of a data set, not looked at yet."""

    table: datasets.Dataset
    root: Path | None  # where relative image paths start, and which none may leave
    notes: list[str]  # what was left out


def read_rows(args: Args) -> Rows:
    """The rows of --dataset, in an order that depends on names alone.
    Raises ValueError, FileNotFoundError: it cannot be read; names the file and the fault."""
    path, split = Path(args.dataset), args.rest.dataset_split
    if path.is_dir():
        rows = read_folder(path.resolve(), args)
    elif path.is_file():
        rows = read_file(path.resolve(), args)
    elif path.is_absolute() or args.dataset.startswith("."):
        raise FileNotFoundError(f"--dataset {args.dataset} does not exist")
    else:
        rows = Rows(datasets.load_dataset(args.dataset, split=split), None, [])
    if len(rows.table) == 0:
        raise ValueError(f"--dataset {args.dataset} holds no rows")
    return rows


def read_file(path: Path, args: Args) -> Rows:
    """A file of rows: parquet or tar, or .csv, .jsonl or .json with image paths relative to it."""
    if args.rest.dataset_split != "train":
        raise ValueError(f"--dataset_split {args.rest.dataset_split}: {path} is a single file")
    if path.suffix in TABLE_FILES:
        return Rows(load_tables([path]), path.parent, [])
    if path.suffix not in (".csv", ".jsonl", ".json"):
        kinds = ", ".join([*TABLE_FILES, ".csv", ".jsonl", ".json"])
        raise ValueError(f"--dataset {path}: expected a folder, a hub id, or a file of {kinds}")
    return Rows(datasets.Dataset(read_list(path)), path.parent, [])


def load_tables(files: list[Path]) -> datasets.Dataset:
    """Parquet, arrow or tar files, all of one kind, by datasets.load_dataset."""
    names = [glob.escape(str(path)) for path in files]
    data_files = {"train": names}
    return datasets.load_dataset(
        TABLE_FILES[files[0].suffix], data_files=data_files, split="train"
    )


def read_list(path: Path) -> pyarrow.Table:
    """A .jsonl, .json, .csv or .parquet file of rows, its columns as they are."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, strict=True))
            return as_table(path, rows, numbers_as_text=True)
        if path.suffix == ".json":
            return as_table(path, json.loads(path.read_text()))
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        return as_table(path, [row for _, row in read_jsonl(path, lines)])
    except (csv.Error, json.JSONDecodeError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def as_table(path: Path, rows: list[dict], numbers_as_text: bool = False) -> pyarrow.Table:
    """Rows that may lack some columns as a table. Raises ValueError: names a row, or a column whose
    values are of several kinds."""
    columns: dict[str, list] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row or (numbers_as_text and None in row.values()):
            raise ValueError(f"{path}, row {number}: expected a value for each column")
        for name in row:
            columns.setdefault(name, [None] * len(rows))[number - 1] = row[name]
    arrays = {}
    for name, values in columns.items():
        if numbers_as_text:
            with contextlib.suppress(ValueError):
                values = [float(x) if x else None for x in values]
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"{path}: column {name} mixes kinds of values: {error}") from None
    return pyarrow.table(arrays)


def read_folder(folder: Path, args: Args) -> Rows:
    """A folder: images listed by metadata files, or with a text file beside each, or tables."""
    files, passed = list_files(folder, args.output_dir.resolve())
    files, notes = choose_split(folder, files, args.rest.dataset_split)
    if passed:
        what = "hidden images or linked folders"
        notes.append(f"{len(passed)} {what}, such as {passed[0].relative_to(folder)}")
    lists = [path for path in files if path.name in METADATA]
    images = [path for path in files if path.suffix.lower() in IMAGE_FILES]
    tables = [path for path in files if path.suffix in TABLE_FILES and path not in lists]
    if lists:
        table = read_metadata(folder, lists)
        listed = set(table.column("image").to_pylist())
        rest = [path for path in images if str(path) not in listed]
        what = "images without a row in a metadata file"
    elif images:
        table = read_sidecars(folder, images)
        rest, what = tables, "tables beside the images"
    elif tables:
        kinds = sorted({path.suffix for path in tables})
        if len(kinds) > 1:
            raise ValueError(f"--dataset {folder} holds files of several kinds: {', '.join(kinds)}")
        return Rows(load_tables(tables), folder, notes)
    else:
        kinds = ", ".join([*METADATA, *IMAGE_FILES, *TABLE_FILES])
        raise ValueError(f"--dataset {folder} holds none of {kinds}")
    if rest:
        notes.append(f"{len(rest)} {what}, such as {rest[0].relative_to(folder)}")
    return Rows(datasets.Dataset(table), folder, notes)


def list_files(folder: Path, output_dir: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, but for those of output_dir; and what is passed over:
    hidden images, and folders that are links."""
    files, passed = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.is_relative_to(output_dir) and output_dir != folder
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        image = path.suffix.lower() in IMAGE_FILES
        if path.is_dir():
            passed += [path] if path.is_symlink() else []
        elif hidden or inside:
            passed += [path] if hidden and image and not inside else []
        else:
            files.append(path)
    return files, passed


def choose_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[str]]:
    """The files of a split, where the folder has splits: all its data in folders named so, or in
    files SPLIT-NNNNN-of-NNNNN.parquet. Else all files. Also says what was left out."""
    found: dict[str, list[Path]] = {}
    data = [x for x in files if x.suffix.lower() in (*IMAGE_FILES, *TABLE_FILES)]
    data += [x for x in files if x.name in METADATA and x not in data]
    for path in data:
        parts = path.relative_to(folder).parts
        shard = path.name.split("-")
        if path.suffix == ".parquet" and len(shard) > 3 and shard[-2] == "of":
            name = "-".join(shard[:-3])
        else:
            name = parts[0] if len(parts) > 1 else ""
        found.setdefault(name, []).append(path)
    if not found or not set(found) <= set(SPLITS):
        if split != "train":
            raise ValueError(f"--dataset_split {split}: {folder} has no folders named as splits")
        return files, []
    if split not in found:
        raise ValueError(f"--dataset_split {split}: {folder} has the splits {', '.join(found)}")
    notes = [f"{len(x)} files of the split {name}" for name, x in found.items() if name != split]
    other = {path for name, x in found.items() if name != split for path in x}
    return [path for path in files if path not in other], notes


def read_metadata(folder: Path, lists: list[Path]) -> pyarrow.Table:
    """The rows of metadata files, each beside or above its images, sorted by image path; the column
    file_name, as datasets' imagefolder names it, becomes image."""
    tables = []
    for path in lists:
        table = read_list(path)
        if "file_name" not in table.column_names:
            raise ValueError(f"{path} has no column file_name, but {table.column_names}")
        names = table.column("file_name").to_pylist()
        paths = [str(path.parent / name) if isinstance(name, str) else None for name in names]
        own = [x for x in table.column_names if x in ("file_name", "image")]
        images = pyarrow.array(paths, pyarrow.string())
        tables.append(table.drop_columns(own).append_column("image", images))
    try:
        table = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"the metadata files of {folder} do not agree: {error}") from None
    return table.sort_by("image")


def read_sidecars(folder: Path, images: list[Path]) -> pyarrow.Table:
    """Columns image and text, the text of NAME.txt beside NAME.png, or none if it is missing."""
    captions = []
    for path in images:
        file = path.with_suffix(".txt")
        try:
            text = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        captions.append(text)
    if not any(captions):
        expected = f"{' or '.join(METADATA)}, or NAME.txt beside each image"
        raise ValueError(f"--dataset {folder} holds images but no captions: expected {expected}")
    return pyarrow.table({"image": [str(path) for path in images], "text": captions})


# --- Data: check ----------------------------------------------------------------------------------

LONGEST_CAPTION = 10_000  # characters; text encoders read some 300: what is longer is no caption
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # Pillow's limit, 1 MB, is below what workflow editors write


def read_image(cell: dict, root: Path | None) -> Image.Image:
    """8-bit RGB from a row's {"bytes", "path"}: turned by its EXIF orientation, in sRGB, 16 bits
    scaled to 8, laid on white where transparent.
    Raises ValueError: its path leaves root, its pixels have 32 bits, its colour profile cannot be
    used; Pillow's errors: it is no image, or a broken one."""
    if cell["bytes"] is not None:
        source = io.BytesIO(cell["bytes"])
    else:
        source = Path(root or "", cell["path"] or "")
        if root is not None and not source.resolve().is_relative_to(root):
            raise ValueError(f"the file is {source.resolve()}, outside {root}")
    image = ImageOps.exif_transpose(Image.open(source))
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (Pillow's mode {image.mode}), expected 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB in sRGB from an image in the colours of its ICC profile. Raises ValueError."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[own.profile.xcolor_space]
        grey, inks = image.mode in ("1", "L"), image.mode == "CMYK"
        if not {"RGB": not inks, "L": grey, "CMYK": inks}[mode]:
            raise ValueError(f"it is for {mode}, the pixels are {image.mode}")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image.convert(mode), own, srgb, outputMode="RGB")
    except (OSError, KeyError, ValueError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its ICC colour profile cannot be used: {error}") from None


def check_row(row: dict, rest: RestConfig, root: Path | None) -> dict:
    """{"problem": what is wrong with a pair, or "", "digest": of its content, "side": its shorter
    side in pixels}."""
    cell, caption = row[rest.image_column], row[rest.caption_column]
    column = rest.caption_column
    try:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"its {column} is {caption!r}, expected a text")
        if len(caption) > LONGEST_CAPTION:
            came = f"its {column} has {len(caption)} characters"
            raise ValueError(f"{came}, expected at most {LONGEST_CAPTION}")
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("it has no image")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = read_image(cell, root)
    except Exception as error:  # whatever Pillow raises: the row is listed with it
        name = Path(cell["path"]).name if cell and cell["path"] else "no file name"
        problem = f"({name}): {type(error).__name__}: {error}".replace("\n", " ")
        return {"problem": problem[:300], "digest": "", "side": 0}
    content = image.tobytes() + repr((image.size, caption)).encode()
    found = hashlib.sha256(content).hexdigest()
    return {"problem": "", "digest": found, "side": min(image.size)}


class Checks(torch.utils.data.Dataset):
    """check_row of each row, for a DataLoader, whose workers end with their parent."""

    def __init__(self, table: datasets.Dataset, rest: RestConfig, root: Path | None):
        self.table, self.rest, self.root = table, rest, root

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        return check_row(self.table[i], self.rest, self.root)


def check_rows(table: datasets.Dataset, rest: RestConfig, root: Path | None, files: list) -> list:
    """check_row of all rows, kept in datasets' cache under a key of the rows, of the image files as
    they are now (see file_states), and of the code."""
    code = [inspect.getsource(x) for x in (read_image, to_srgb, check_row)]
    columns = [rest.image_column, rest.caption_column, str(root)]
    content = json.dumps([table._fingerprint, files, columns, code])
    key = hashlib.sha256(content.encode()).hexdigest()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "soar_checked_rows" / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text())
    workers = min(len(os.sched_getaffinity(0)), len(table) // 256)
    loader = DataLoader(Checks(table, rest, root), 32, num_workers=workers, collate_fn=list)
    verdicts = []
    with tqdm(total=len(table), desc="checking rows", unit="row") as bar:
        for part in loader:
            verdicts += part
            bar.update(len(part))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_whole(json.dumps(verdicts), file)
    return verdicts


def file_state(path: str | None, root: Path | None) -> list[int]:
    """Size and time of change of an image file; nothing if it is not there."""
    try:
        status = Path(root or "", path or "").stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return []


def file_states(table: datasets.Dataset, column: str, root: Path | None) -> list[list[int] | None]:
    """file_state of each row's image, None where the row holds its bytes."""
    cells = table.data.column(column)
    in_row = pyarrow.compute.struct_field(cells, "bytes").is_valid().to_pylist()
    paths = pyarrow.compute.struct_field(cells, "path").to_pylist()
    return [None if x else file_state(path, root) for x, path in zip(in_row, paths)]


def at_least(table: datasets.Dataset, minima: dict[str, float], dataset: str) -> np.ndarray:
    """Indices of the rows whose columns are at least minima; a missing value is not.
    Raises ValueError: a column holds no numbers."""
    keep = np.full(len(table), True)
    for column, least in minima.items():
        values, kinds = table.data.column(column), pyarrow.types
        kind = values.type
        if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind)):
            fault = f"this column of {dataset} holds no numbers, but {kind}"
            raise ValueError(f"--min {column}: {fault}")
        enough = pyarrow.compute.greater_equal(values.cast(pyarrow.float64()), least)
        keep &= enough.fill_null(False).to_numpy()
    return np.flatnonzero(keep)


def check_columns(rows: Rows, args: Args) -> datasets.Dataset:
    """The rows with their images as {"bytes", "path"}. Raises ValueError: a column is not there, or
    holds no images."""
    table, rest = rows.table, args.rest
    wanted = {"image_column": [rest.image_column], "caption_column": [rest.caption_column]}
    for flag, columns in (wanted | {"min": list(rest.minima())}).items():
        for column in columns:
            if column not in table.column_names:
                came = f"{args.dataset} has the columns {table.column_names}"
                raise ValueError(f"--{flag} {column}: {came}")
    kind, kinds = table.data.column(rest.image_column).type, pyarrow.types
    struct = kinds.is_struct(kind) and {x.name for x in kind} <= {"bytes", "path"}
    path = (kinds.is_string(kind) or kinds.is_large_string(kind)) and rows.root is not None
    binary = kinds.is_binary(kind) or kinds.is_large_binary(kind)
    if not (struct or path or binary):
        fault = f"{rest.image_column} of {args.dataset} holds no images, but {kind}"
        raise ValueError(f"--image_column {fault}")
    if kinds.is_large_binary(kind):
        table = table.cast_column(rest.image_column, datasets.Value("binary"))
    return table.cast_column(rest.image_column, datasets.Image(decode=False))


class Pairs(torch.utils.data.Dataset):
    """The checked pairs: (pixels (3, R, R) in [-1, 1], caption) by (row, step, sample of the global
    batch). Raises ValueError: rows or columns that cannot be used; what read_rows raises."""

    def __init__(self, args: Args):
        rest, rows = args.rest, read_rows(args)
        table = check_columns(rows, args)
        self.args, self.root = args, rows.root
        self.processor = VaeImageProcessor(vae_scale_factor=1)
        total = len(table)
        numbers = at_least(table, rest.minima(), args.dataset)
        states = file_states(table, rest.image_column, rows.root)
        self.files = [states[i] for i in numbers]
        if len(numbers) < total:
            table = table.select(numbers)
        verdicts = check_rows(table, rest, rows.root, self.files)

        bad = [i for i, verdict in enumerate(verdicts) if verdict["problem"]]
        good = [i for i, verdict in enumerate(verdicts) if not verdict["problem"]]
        listed = "".join(f"\n  row {numbers[i]} {verdicts[i]['problem']}" for i in bad[:20])
        listed += "\n  ..." if len(bad) > 20 else ""
        if bad and rest.on_bad_row == "stop":
            fault = f"{len(bad)} of {len(table)} rows of {args.dataset} cannot be used:{listed}"
            raise ValueError(f"{fault}\nCorrect them, or leave them out by --on_bad_row skip")
        small = sum(verdicts[i]["side"] < args.resolution for i in good)
        below = total - len(table)
        self.report = f"{len(good)} of {total}: {below} left out by --min, {len(bad)} unusable; "
        self.report += f"{small} are smaller than {args.resolution} pixels and enlarged"
        self.report += "".join(f"; left out: {note}" for note in rows.notes) + listed
        self.table, self.good = table, good
        self.numbers = [int(numbers[i]) for i in good]
        content = "".join(verdicts[i]["digest"] for i in good)
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, str]:
        index, step, i = key
        row = self.table[self.good[index]]
        cell, caption = row[self.args.rest.image_column], row[self.args.rest.caption_column]
        checked = self.files[self.good[index]]
        if checked is not None and checked != file_state(cell["path"], self.root):
            raise RuntimeError(f"{cell['path']} has changed since it was checked: start again")
        size = (self.args.resolution, self.args.resolution)
        image = ImageOps.fit(read_image(cell, self.root), size, Image.Resampling.LANCZOS)
        drop = torch.rand((), generator=seeded(self.args.training.seed, "pair", step, i))
        if drop < self.args.training.cond_dropout_rate:
            caption = ""
        return self.processor.preprocess(image)[0], caption


def load_pairs(args: Args, hosts: dist.ProcessGroup) -> Pairs:
    """Pairs, whose rows one process of each node checks. Raises ValueError: nodes, or ranks, see
    different data; the global batch is larger than the data."""
    pairs = Pairs(args) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    dist.barrier(hosts)
    pairs = pairs or Pairs(args)
    own = torch.tensor([int(pairs.digest[:15], 16), len(pairs)])
    found = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own, group=hosts)
    for rank, other in enumerate(found):
        if not torch.equal(other, found[0]):
            fault = f"ranks 0 and {rank} see different data in {args.dataset}"
            counts = f"{int(found[0][1])} and {int(other[1])} pairs"
            raise ValueError(f"{fault} ({counts}): give all nodes the same files")
    batch = args.global_batch(dist.get_world_size())
    if len(pairs) < batch:
        fault = f"--dataset {args.dataset} has {len(pairs)} pairs"
        raise ValueError(f"{fault}, fewer than a global batch of {batch}")
    return pairs


# --- Data: which rank sees what -------------------------------------------------------------------


def step_rows(num_rows: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The rows of a step's global batch; steps count from 1. An epoch is a permutation of all rows,
    a function of (seed, epoch), cut into global batches; the remainder is dropped."""
    epoch, k = divmod(step - 1, num_rows // global_batch)
    order = torch.randperm(num_rows, generator=seeded(seed, "epoch", epoch))
    return order[k * global_batch : (k + 1) * global_batch].tolist()


def batch_slice(micro: int, args: Args, rank: int, world_size: int) -> slice:
    """Where the samples of a rank's forward are in the global batch."""
    start = (micro * world_size + rank) * args.training.train_batch_size
    return slice(start, start + args.training.train_batch_size)


def batch_keys(
    num_rows: int, args: Args, rank: int, world_size: int, start: int
) -> Iterator[list[tuple[int, int, int]]]:
    """What this rank's forwards after step start ask of Pairs: lists of (row, step, sample)."""
    for step in range(start + 1, args.training.max_train_steps + 1):
        rows = step_rows(num_rows, args.global_batch(world_size), args.training.seed, step)
        for micro in range(args.training.gradient_accumulation_steps):
            part = batch_slice(micro, args, rank, world_size)
            yield [(rows[i], step, i) for i in range(part.start, part.stop)]


def take(draws: Draws, part: slice, device: torch.device) -> Draws:
    """The draws of some samples of the global batch, on device."""
    path_z1 = None
    if draws.path_z1 is not None:
        path_z1 = to_device(draws.path_z1[:, part], device)
    return Draws(
        z1=to_device(draws.z1[part], device),
        t=to_device(draws.t[part], device),
        u=to_device(draws.u[:, :, part], device),
        path_noise=to_device(draws.path_noise[:, part], device),
        path_z1=path_z1,
    )


# --- Model and optimizer --------------------------------------------------------------------------

LORA_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state for a parameter


def load_trainable(
    args: Args, checkpoint: Path | None, device: torch.device
) -> SD3Transformer2DModel:
    """The transformer of checkpoint, else of --transformer, else of the pipeline, on device.
    What is trained is float32. Raises ValueError: the weights do not fit."""
    base, rank = args.pretrained_model_name_or_path, args.training.lora_rank
    start = find_weights(args.transformer)[0] if args.transformer else None
    if checkpoint is not None:
        start = checkpoint / (LORA if rank else "transformer")
    if rank is None:
        model = load_transformer(base, start, torch.float32, device)
        return model.requires_grad_(True).train()
    dtype = torch.bfloat16 if args.training.mixed_precision == "bf16" else torch.float32
    model = load_transformer(base, None, dtype, torch.device("cpu"))
    matrices = read_lora(start, model) if start else {}
    add_lora(model, rank, args.training.seed)
    if start:
        set_lora(model, matrices, start)
    return model.to(device).train()


def add_lora(model: SD3Transformer2DModel, rank: int, seed: int) -> None:
    """Freeze all weights, and put matrices A and B of this rank beside those of every attention,
    alpha = rank: B zero, A as peft draws it, a function of (seed, name)."""
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_MODULES))
    model.add_adapter(config)
    for name, parameter in trained(model).items():
        parameter.data = torch.zeros(parameter.shape)
        if "lora_A" in name:
            generator = seeded(seed, name)
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def set_lora(model: SD3Transformer2DModel, matrices: dict, file: Path) -> None:
    """Give the model's LoRA the matrices that read_lora found in file. Raises ValueError: they are
    of other modules, or of another rank."""
    parameters = trained(model)
    names = {name.split(".lora_A.")[0] for name in parameters if ".lora_A." in name}
    if set(matrices) != names:
        other = min(set(matrices) ^ names)
        raise ValueError(f"{file} does not fit --lora_rank: only one of the two has {other}")
    with torch.no_grad():
        for name, (a, b, scale) in matrices.items():
            own = parameters[f"{name}.lora_A.default.weight"]
            if a.shape != own.shape:
                raise ValueError(f"{file} has rank {len(a)}, --lora_rank is {len(own)}")
            own.copy_(a)
            parameters[f"{name}.lora_B.default.weight"].copy_(scale * b)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """torch.compile each block on first use: one graph per kind of block, with gradients or not."""
    # Else every graph is cut where DDP's buckets end, so that all-reduces start early: blocks are
    # small enough for that.
    torch._dynamo.config.optimize_ddp = False
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def make_ddp(transformer, gradient_as_bucket_view: bool = True) -> DistributedDataParallel:
    """DDP. Buffers are constants (SD3.5's positions: 0.9 GB), so none is sent before forwards."""
    with warnings.catch_warnings():
        # torch 2.13 has a new name for broadcast_buffers, which torch 2.9 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            transformer, broadcast_buffers=False, gradient_as_bucket_view=gradient_as_bucket_view
        )


def make_velocity(ddp: torch.nn.Module, device: torch.device, bf16: bool) -> Velocity:
    """The model as soar_terms calls it."""

    def velocity(z: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return ddp(z, timestep=1000 * sigma, return_dict=False, **cond)[0]

    return velocity


def make_optimizer(
    training: TrainingConfig, parameters: dict[str, torch.nn.Parameter], checkpoint: Path | None
) -> torch.optim.AdamW:
    """AdamW over parameters, with its state from checkpoint, if any."""
    rates = {"lr": training.learning_rate, "weight_decay": training.adam_weight_decay}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True, **rates)
    if checkpoint is None:
        return optimizer
    state = {}
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for i, name in enumerate(parameters):
            state[i] = {key: file.get_tensor(f"{name}.{key}") for key in MOMENTS}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return optimizer


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: dict) -> dict[str, Tensor]:
    """AdamW's state as {"PARAMETER.KEY": tensor}."""
    found = {}
    for name, parameter in parameters.items():
        for key, x in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = x
    return found


# --- Checkpoints ----------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in order of steps."""
    found = [path.parent for path in output_dir.glob("checkpoint-[0-9]*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(
    path: Path, transformer: SD3Transformer2DModel, optimizer: dict[str, Tensor], state: dict
) -> None:
    """Write checkpoint-NNNNNN whole or not at all: beside it, to the disk, trainer_state.json last,
    then renamed. optimizer: of optimizer_tensors.
    Raises OSError: it could not be written; nothing of it is left."""
    staging = path.with_name(f".{path.name}")
    try:
        if state["settings"]["lora_rank"]:
            layers = get_peft_model_state_dict(transformer)
            StableDiffusion3Pipeline.save_lora_weights(staging, layers)
        else:
            transformer.save_pretrained(staging / "transformer")
        save_file(optimizer, staging / "optimizer.safetensors")
        for written in (*staging.rglob("*"), staging):
            sync(written)
        save_whole(json.dumps(state, indent=1) + "\n", staging / "trainer_state.json")
        staging.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        mend = "Earlier checkpoints are whole; make room, then give the same command again"
        raise OSError(f"{path} could not be written: {error}. {mend}") from error


def delete_old(output_dir: Path, limit: int | None) -> None:
    """Keep the newest checkpoints only. A rename first: what is being deleted is none any more."""
    found = checkpoints(output_dir)
    for path in found[: len(found) - (limit or len(found))]:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}")))


def find_checkpoint(args: Args) -> Path | None:
    """The checkpoint in output_dir to go on from, or None for a fresh start; reads names only.
    Raises ValueError, FileNotFoundError: output_dir is in other use, or a checkpoint incomplete."""
    output_dir, found = args.output_dir, checkpoints(args.output_dir)
    if visible(output_dir) and not (output_dir / "settings.json").is_file():
        fault = "is not empty and holds no run: settings.json is not there"
        raise ValueError(f"--output_dir {output_dir} {fault}")
    for path in sorted(output_dir.glob("checkpoint-[0-9]*")):
        if path not in found:
            fault = f"{path} is incomplete: it has no trainer_state.json"
            raise FileNotFoundError(f"{fault}. Complete it, or delete it")
    final = output_dir / "final"
    if final.is_dir() and not final.is_symlink():
        fault = f"{final} is a folder, where a link to the last checkpoint was"
        raise ValueError(f"{fault}. Move it away; a checkpoint goes on if named checkpoint-NNNNNN")
    return found[-1] if found else None


def check_settings(settings: dict, path: Path) -> None:
    """Raises ValueError: the run of this .json was made with other settings; names them."""
    was, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
    was = was.get("settings", was)
    names = [name for name in was | now if was.get(name) != now.get(name)]
    if names:
        other = "; ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in names)
        fault = f"{path.parent} was made with other settings: {other}"
        raise ValueError(f"{fault}. Give these, or another --output_dir")


def run_settings(args: Args, world_size: int, pairs: Pairs) -> dict:
    """All that the result of a run depends on, but for rounding: weights and data by content."""
    values = dataclasses.asdict(args.training) | dataclasses.asdict(args.soar)
    del values["train_batch_size"], values["gradient_accumulation_steps"]
    if args.training.lr_scheduler.startswith("constant"):
        del values["max_train_steps"]
    values["sigma_upper_ratio"] = str(args.soar.sigma_upper_ratio)  # inf is not JSON
    base = args.pretrained_model_name_or_path
    values["pipeline"] = identity(base, "rest")[:16]
    start = find_weights(args.transformer)[0] if args.transformer else None
    values["transformer"] = (digest(start) if start else identity(base, "transformer"))[:16]
    values["resolution"] = args.resolution
    values["global_batch"] = args.global_batch(world_size)
    values["data"] = pairs.digest
    return values


def check_start(args: Args, settings: dict, checkpoint: Path | None, step: int) -> None:
    """Raises ValueError: output_dir is of other settings, or beyond --max_train_steps."""
    files = [args.output_dir / "settings.json"]
    if checkpoint is not None:
        files.append(checkpoint / "trainer_state.json")
    for path in files:
        if path.is_file():
            check_settings(settings, path)
    steps = args.training.max_train_steps
    if step > steps:
        raise ValueError(f"--max_train_steps is {steps}, but {checkpoint} is at step {step}")


def check_transformer(args: Args) -> None:
    """Raises ValueError, FileNotFoundError: --transformer is nothing to start from."""
    if args.transformer is None:
        return
    weights, _ = find_weights(args.transformer)
    check_fit(args.transformer, weights, args.pretrained_model_name_or_path)
    if args.training.lora_rank and weights is not None and weights.is_dir():
        fault = f"--transformer {args.transformer} is no LoRA file"
        mend = "make a pipeline folder with that transformer, for --pretrained_model_name_or_path"
        raise ValueError(f"{fault}: with --lora_rank only matrices are saved; {mend}")


def check_room(output_dir: Path) -> float:
    """Free bytes where output_dir is or will be. Raises OSError: nothing can be written there."""
    place = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be written: {error}") from None
    return shutil.disk_usage(place).free


# --- What the user sees ---------------------------------------------------------------------------

# bf16, dense, from the data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "B200": 2250}


def add_term(sums: Tensor, term: Term, auxiliary: bool) -> None:
    """Add a term to a step's sums (5, 4) float64. Rows: errors and counts of base points, errors
    and counts of auxiliary points, each by quarter of sigma; (loss, gradient norm, steps, 0)."""
    quarter = (4 * term.sigma).long().clamp(max=3)
    row = 2 if auxiliary else 0
    sums[row].index_add_(0, quarter, term.error.double() * term.counts)
    sums[row + 1].index_add_(0, quarter, term.counts.double())
    sums[4, 0] += term.loss.detach()


def means(sums: list[list[float]]) -> dict[str, float]:
    """Metrics from sums over steps: loss; mean errors, unweighted, also by quarter of sigma; the
    gradient's norm before it is clipped."""
    loss, grad_norm, steps, _ = sums[4]
    line = {"loss": loss / steps}
    for name, errors, counts in (("base", sums[0], sums[1]), ("aux", sums[2], sums[3])):
        if sum(counts):
            line[name] = sum(errors) / sum(counts)
        for quarter, (error, count) in enumerate(zip(errors, counts), 1):
            if count:
                line[f"{name}_sigma_{quarter}"] = error / count
    line["grad_norm"] = grad_norm / steps
    return line


class Log:
    """What rank 0 writes beside checkpoints: settings.json; metrics.jsonl, cut off after step
    start; TensorBoard's files."""

    def __init__(self, output_dir: Path, settings: dict, start: int):
        save_whole(json.dumps(settings, indent=1) + "\n", output_dir / "settings.json")
        (output_dir / "final").unlink(missing_ok=True)
        for path in output_dir.glob(".checkpoint-*"):  # of a run killed while it saved or deleted
            shutil.rmtree(path)
        for path in output_dir.glob(".*.tmp"):
            path.unlink()
        file = output_dir / "metrics.jsonl"
        kept = []
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half written in a crash
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
        save_whole("".join(kept), file)
        self.file = file.open("a", buffering=1)
        self.writer = SummaryWriter(output_dir / "tensorboard", purge_step=start + 1)

    def write(self, line: dict[str, float]) -> None:
        self.file.write(json.dumps(line) + "\n")
        os.fsync(self.file.fileno())
        for name, value in line.items():
            self.writer.add_scalar(name, value, line["step"])


def link_final(checkpoint: Path) -> None:
    """Make final a link to the last checkpoint, and say how to see it."""
    final, staging = checkpoint.parent / "final", checkpoint.parent / ".final"
    try:
        staging.unlink(missing_ok=True)
        staging.symlink_to(checkpoint.name)
        staging.rename(final)
    except OSError as error:
        print(f"no link {final} could be made: {error}")
        final = checkpoint
    print(f"{checkpoint} is complete; to see it:")
    print(f"python sample.py --transformer {final} --prompts FILE --output_dir DIR", flush=True)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Within, SIGTERM, SIGINT and SIGUSR1 are listed and do nothing else."""
    noted = []
    previous = {}
    for number in SIGNALS:
        previous[number] = signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def deaf_to_signals(_: int) -> None:
    """For DataLoader workers: a signal to the whole process tree is the ranks' to heed, which still
    need their workers until the step ends. Workers end with their rank, by torch's watchdog."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# --- Set up ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a run consists of, checked and loaded."""

    rank: int
    world_size: int
    device: torch.device
    hosts: dist.ProcessGroup  # for what hosts agree on, and for their long waits
    pairs: Pairs
    prompts: list[dict]  # of validation images
    settings: dict  # on rank 0
    start: int  # steps done
    totals: Tensor  # (5, 4) float64, see add_term: sums since the last line of metrics
    pipe: StableDiffusion3Pipeline  # without its transformer
    transformer: SD3Transformer2DModel
    ddp: DistributedDataParallel
    optimizer: torch.optim.AdamW
    uncond: dict[str, Tensor]  # the empty prompt's embeddings


def set_up(args: Args) -> Run:
    """Check and load everything; writes nothing.
    Raises ValueError, OSError: names a flag, file or row that cannot be used."""
    checkpoint = find_checkpoint(args)
    check_transformer(args)
    prompts = read_prompts(args.rest.validation_prompts) if args.rest.validation_prompts else []
    rank, world_size, device = init_distributed()
    hosts = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    pairs = load_pairs(args, hosts)
    state = {"step": 0, "sums": [[0.0] * 4] * 5}
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    settings = {}
    if rank == 0:  # as the digests of weights take a while
        settings = run_settings(args, world_size, pairs)
        check_start(args, settings, checkpoint, state["step"])
    dist.barrier(hosts)

    pipe = load_frozen(args, device)
    transformer = load_trainable(args, checkpoint, device)
    check_size(pipe, transformer, resolution=args.resolution)
    if args.rest.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ddp = make_ddp(transformer)
    optimizer = make_optimizer(args.training, trained(transformer), checkpoint)
    totals = torch.tensor(state["sums"], dtype=torch.float64, device=device)
    empty = [""] * args.training.train_batch_size
    uncond = encode_prompts(pipe, empty, args.training.max_sequence_length)
    return Run(
        rank, world_size, device, hosts, pairs, prompts, settings, state["step"], totals, pipe,
        transformer, ddp, optimizer, uncond,
    )  # fmt: skip


def load_frozen(args: Args, device: torch.device) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer. Raises ValueError: --shift is not its sampler's."""
    dtype = torch.bfloat16 if args.training.mixed_precision == "bf16" else torch.float32
    encoders = torch.device(args.rest.text_encoder_device or device)
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, device, encoders)
    if pipe.scheduler.config.shift != args.soar.shift:
        came = f"the pipeline samples with shift {pipe.scheduler.config.shift}"
        raise ValueError(f"--shift is {args.soar.shift}, but {came}")
    return pipe


def count_terms(soar: SoarConfig) -> int:
    """Terms of soar_terms: the base term and M N auxiliary ones."""
    if soar.lambda_aux == 0:
        return 1
    return 1 + soar.num_rollout_paths * soar.num_aux_points


def count_flops(args: Args, run: Run, velocity: Velocity, z: Tensor) -> float:
    """Operations of a step, over all ranks, from those of a forward of z. Runs two forwards and
    backwards: DDP settles its buckets in the second, and then gradients are views of them."""
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            v = velocity(z, torch.ones(len(z), device=z.device), run.uncond)
        (0 * v.sum()).backward()
        run.optimizer.zero_grad(set_to_none=False)
    terms = count_terms(args.soar)
    passes = 2 if args.training.lora_rank else 3  # frozen weights need no gradients of their own
    rollout = 1 if terms > 1 and args.soar.guidance_scale != 1 else 0
    micro_batches = args.training.gradient_accumulation_steps * run.world_size
    return counter.get_total_flops() * (passes * terms + rollout) * micro_batches


def report(args: Args, run: Run, flops: float) -> None:
    """Say what will run. Raises OSError: output_dir is read-only, or has too little room."""
    training, terms = args.training, count_terms(args.soar)
    size = sum(x.numel() for x in trained(run.transformer).values())
    batch = args.global_batch(run.world_size)
    factors = (run.world_size, training.gradient_accumulation_steps, training.train_batch_size)
    shares = f"{factors[0]} processes x {factors[1]} x {factors[2]}"
    rollout = " and 1 without" if terms > 1 and args.soar.guidance_scale != 1 else ""
    needed = 12 * size  # bytes: a weight and AdamW's two moments, in float32
    free = check_room(args.output_dir)
    room = f"{needed / 1e9:.2f} GB a checkpoint; {free / 1e9:.2f} GB are free"
    precision = {"bf16": "bfloat16", "no": "float32"}[training.mixed_precision]
    start = args.transformer or args.pretrained_model_name_or_path
    print(f"model        {start}")
    print(f"trained      {size / 1e6:,.1f} M parameters; forwards in {precision}")
    print(f"pairs        {run.pairs.report}")
    print(f"global batch {batch} = {shares}")
    steps = f"{training.max_train_steps}, {run.start} done"
    print(f"steps        {steps}; an epoch is {len(run.pairs) // batch}")
    cost = f"{flops / 1e12:.2f} TFLOP for the global batch"
    print(f"a step       {terms} forwards with backwards{rollout} of each image; {cost}")
    print(f"written to   {args.output_dir}, {room}", flush=True)
    if free < needed:
        fault = f"{free / 1e9:.2f} GB are free, fewer than a checkpoint takes"
        raise OSError(f"--output_dir {args.output_dir}: {fault}")


# --- Training -------------------------------------------------------------------------------------


def backward(terms: Iterator[Term], num_terms: int, ddp, sums: Tensor, last: bool) -> None:
    """Back-propagate the terms one by one, so that one graph is in memory at a time, and add them
    to sums. last: no micro-batch of the step follows, so gradients are averaged over the ranks."""
    # autocast keeps the bf16 copies of the weights until the outermost context ends: with this one
    # around velocity's own they are made once, and not for every term.
    with torch.autocast(sums.device.type, enabled=False):
        for i in range(num_terms):
            average = last and i == num_terms - 1
            with contextlib.nullcontext() if average else ddp.no_sync():
                term = next(terms)  # the forward, which no_sync must hold as well
                term.loss.backward()
            add_term(sums, term, auxiliary=i > 0)
            del term  # or what its graph still holds would be there during the next forward


def clip_gradients(parameters: list[Tensor], max_norm: float, sums: Tensor) -> None:
    """Clip by the norm over all gradients; add losses of all ranks, and the norm, to sums."""
    dist.all_reduce(sums)
    sums[4, 0] /= dist.get_world_size()  # DDP's normalizer is for a mean over ranks
    sums[4, 1] = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    sums[4, 2] = 1


def check_finite(sums: Tensor, args: Args, pairs: Pairs, draws: Draws, step: int) -> None:
    """Raises FloatingPointError: the loss or the gradient is not finite; names sigma and rows."""
    if sums.isfinite().all():  # the host waits here for the device, once a step
        return
    sigma = sigma_from_t(draws.t, args.soar.shift)
    rows = step_rows(len(pairs), len(sigma), args.training.seed, step)
    fault = f"loss or gradient of step {step} is not finite; no weight was changed by it"
    levels = f"Its sigma: {sigma.min():.4f} to {sigma.max():.4f}"
    numbers = [pairs.numbers[i] for i in rows]
    raise FloatingPointError(f"{fault}. {levels}; its rows of {args.dataset}: {numbers}")


def validate(args: Args, run: Run, step: int, log: Log | None) -> None:
    """An image per prompt, in batches that the ranks share out, as a grid in output_dir and in
    TensorBoard: from noise that is a function of (seed, prompt), the same at each validation."""
    size, pipe = args.training.train_batch_size, run.pipe
    side = args.resolution // pipe.vae_scale_factor
    shape = (run.transformer.config.in_channels, side, side)
    bf16 = args.training.mixed_precision == "bf16"
    images = torch.zeros(len(run.prompts), args.resolution, args.resolution, 3, dtype=torch.uint8)
    run.transformer.eval()
    for start in range(run.rank * size, len(run.prompts), run.world_size * size):
        part = range(start, min(start + size, len(run.prompts)))
        seeds = [seeded(args.training.seed, "validation", i) for i in part]
        noise = [torch.randn(shape, generator=generator) for generator in seeds]
        texts = [run.prompts[i]["prompt"] for i in part]
        cond = encode_prompts(pipe, texts, args.training.max_sequence_length)
        uncond = {key: x[: len(part)] for key, x in run.uncond.items()}
        with (
            torch.autocast(run.device.type, torch.bfloat16, enabled=bf16),
            torch.compiler.set_stance("force_eager"),  # no graphs for shapes that come up here only
        ):
            made = sample_images(
                pipe, run.transformer, torch.stack(noise), cond, uncond,
                args.soar.num_sampling_steps, args.soar.guidance_scale,
            )  # fmt: skip
        for i, image in zip(part, made):
            images[i] = torch.from_numpy(np.array(image))
    run.transformer.train()
    dist.all_reduce(images, group=run.hosts)  # each is 0 on all ranks but the one that made it
    if log is not None:
        columns = max(c for c in range(1, 9) if len(images) % c == 0)
        tiles = [Image.fromarray(x.numpy()) for x in images]
        grid = make_image_grid(tiles, len(images) // columns, columns)
        save_whole(grid, args.output_dir / f"validation-{step:06d}.png")
        log.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")


class Meter:
    """Speed, of all ranks together, since the last line of metrics, validation or checkpoint; this
    rank's peak of memory since its start; mfu: the share of the GPUs' peak speed that is used."""

    def __init__(self, args: Args, run: Run, flops: float):
        self.images, self.flops = args.global_batch(run.world_size), flops
        self.device, self.world_size = run.device, run.world_size
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        bf16 = args.training.mixed_precision == "bf16"
        self.peaks = [x for gpu, x in PEAK_TFLOPS.items() if gpu in name and bf16]
        self.restart(run.start)

    def restart(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def line(self, step: int) -> dict[str, float]:
        rate = (step - self.step) / (time.perf_counter() - self.time)
        tflops = self.flops * rate / 1e12
        line = {"images_per_second": self.images * rate, "tflops_per_second": tflops}
        line["peak_memory_gb"] = self.peak_memory() / 1e9
        if self.peaks:
            line["mfu"] = tflops / self.world_size / self.peaks[0]
        return line

    def peak_memory(self) -> int:
        """Bytes: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def log_line(run: Run, step: int, lr: float, meter: Meter, log: Log | None, bar: tqdm) -> None:
    """Write a line of metrics, and start the next sums."""
    line = {"step": step} | means(run.totals.tolist()) | {"lr": lr} | meter.line(step)
    run.totals.zero_()
    if log is not None:
        log.write(line)
        shown = ("loss", "base", "aux", "grad_norm", "images_per_second")
        bar.set_postfix({key: f"{line[key]:.3g}" for key in shown if key in line})


def save(args: Args, run: Run, step: int) -> Path:
    """Write a checkpoint, on rank 0, and delete those beyond the limit; other ranks wait."""
    path = args.output_dir / f"checkpoint-{step:06d}"
    if run.rank == 0:
        state = {"step": step, "settings": run.settings, "sums": run.totals.tolist()}
        tensors = optimizer_tensors(run.optimizer, trained(run.transformer))
        save_checkpoint(path, run.transformer, tensors, state)
        delete_old(args.output_dir, args.rest.checkpoints_total_limit)
    dist.barrier(run.hosts)
    return path


def any_signal(noted: list[int], hosts: dist.ProcessGroup) -> int:
    """The number of a signal that came to a rank, 0 if to none; the same on all ranks."""
    number = torch.tensor(max(noted, default=0))
    dist.all_reduce(number, dist.ReduceOp.MAX, group=hosts)
    return int(number)


def train(args: Args, stack: contextlib.ExitStack) -> None:
    """A run from its checks to its last checkpoint, or to one that a signal asks for."""
    training, rest = args.training, args.rest
    run = set_up(args)
    rank, world_size, device = run.rank, run.world_size, run.device
    pipe, ddp, optimizer = run.pipe, run.ddp, run.optimizer
    parameters = list(trained(run.transformer).values())
    side = args.resolution // pipe.vae_scale_factor
    channels = run.transformer.config.in_channels
    latents_shape = (args.global_batch(world_size), channels, side, side)
    num_terms = count_terms(args.soar)
    lr_factor = make_lr_factor(training, optimizer)
    velocity = make_velocity(ddp, device, training.mixed_precision == "bf16")
    z = torch.zeros(training.train_batch_size, *latents_shape[1:], device=device)
    flops = count_flops(args, run, velocity, z)
    if rank == 0:
        report(args, run, flops)
    if rest.dry_run:
        return
    noted = stack.enter_context(signals_noted())
    log, batches = start_writing(args, run, stack)
    if rest.compile:
        compile_blocks(run.transformer)
    steps = training.max_train_steps
    step, number = run.start, 0
    path = args.output_dir / f"checkpoint-{step:06d}"
    bar = tqdm(total=steps, initial=run.start, desc="steps", disable=rank > 0)
    if run.prompts and run.start == 0:
        validate(args, run, 0, log)
    meter = Meter(args, run, flops)

    for step in range(run.start + 1, steps + 1):
        # ------------------------------------------------------------------------------------------
        # One training step. Every rank draws for the whole global batch and takes its own samples,
        # so the random numbers do not depend on the number of GPUs.
        generator = seeded(training.seed, "step", step)
        draws = draw(latents_shape, args.soar, generator)
        vae_noise = torch.randn(latents_shape, generator=generator)
        # Gradients are of a sum over the global batch, DDP takes means over ranks: so divide.
        normalizer = loss_normalizer(draws.t, args.soar).item() / world_size
        sums = torch.zeros(5, 4, dtype=torch.float64, device=device)

        for micro in range(training.gradient_accumulation_steps):
            part = batch_slice(micro, args, rank, world_size)
            pixels, captions = next(batches)
            z0 = encode_images(pipe, to_device(pixels, device), to_device(vae_noise[part], device))
            cond = encode_prompts(pipe, captions, training.max_sequence_length)
            terms = soar_terms(velocity, z0, take(draws, part, device), cond, run.uncond, args.soar,
                               normalizer=normalizer)
            last = micro == training.gradient_accumulation_steps - 1
            backward(terms, num_terms, ddp, sums, last)

        clip_gradients(parameters, training.max_grad_norm, sums)
        check_finite(sums, args, run.pairs, draws, step)
        lr = training.learning_rate * lr_factor(step - 1)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets
        # ------------------------------------------------------------------------------------------
        run.totals += sums
        bar.update()
        number = any_signal(noted, run.hosts)
        if step % rest.logging_steps == 0:
            log_line(run, step, lr, meter, log, bar)
            meter.restart(step)
        if run.prompts and (step % rest.validation_steps == 0 or step == steps):
            validate(args, run, step, log)
            meter.restart(step)
        if number or step % rest.checkpointing_steps == 0 or step == steps:
            path = save(args, run, step)
            meter.restart(step)
        if number:
            break

    bar.close()
    if rank == 0:
        finish(args, step, path, number)


def start_writing(
    args: Args, run: Run, stack: contextlib.ExitStack
) -> tuple[Log | None, Iterator]:
    """Take output_dir, on rank 0, and start reading images. Raises RuntimeError: another process
    has output_dir; FileNotFoundError: this node does not see it."""
    log = None
    if run.rank == 0:
        stack.enter_context(locked(args.output_dir))
        log = Log(args.output_dir, run.settings, run.start)
        stack.callback(log.writer.close)
    dist.barrier(run.hosts)
    if not (args.output_dir / "settings.json").is_file():
        fault = f"--output_dir {args.output_dir} is not seen by rank {run.rank}"
        raise FileNotFoundError(f"{fault}: give one that all nodes see")
    loader = DataLoader(
        run.pairs,
        batch_sampler=batch_keys(len(run.pairs), args, run.rank, run.world_size, run.start),
        num_workers=args.rest.dataloader_num_workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=deaf_to_signals,
    )
    return log, iter(loader)


def make_lr_factor(training: TrainingConfig, optimizer: torch.optim.AdamW):
    """What the learning rate is multiplied by, a function of the steps done: no state to save."""
    scheduler = get_scheduler(
        training.lr_scheduler, optimizer, num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
    )  # fmt: skip
    return scheduler.lr_lambdas[0]


def finish(args: Args, step: int, path: Path, number: int) -> None:
    """Say how the run ended. path: its last checkpoint; number: of the signal that stopped it."""
    if step == args.training.max_train_steps:
        link_final(path)
    else:
        name = signal.Signals(number).name
        print(f"stopped by {name} after step {step}; the same command goes on from {path}")


def main(args: Args) -> None:
    with contextlib.ExitStack() as stack:
        train(args, stack)
    # Only now, with train's frame gone and DDP with it. If DDP held the last reference to the
    # group, it would wait for gloo's threads while it holds the interpreter's lock, and they for
    # that lock (seen with torch 2.13).
    dist.destroy_process_group()


def parse(words: list[str] | None = None) -> Args:
    """Args from the command line, or from words."""
    options = {"description": __doc__, "use_underscores": True}
    return tyro.cli(Args, args=words, config=(tyro.conf.OmitArgPrefixes,), **options)


if __name__ == "__main__":
    record(main)(parse())
