"""SOAR post-training of Stable Diffusion 3.5 (or 3) Medium, and SFT by the same path.

    torchrun --nproc_per_node 8 train.py --dataset my_images --output_dir output/soar
    torchrun --nproc_per_node 8 train.py --dataset my_images --output_dir output/sft --lambda_aux 0

`python train.py` runs one process; --dry_run checks all data, takes two steps in memory, says what
would run, and writes nothing. The defaults are those of the published runs on subsets: 5,000 steps
of 8 GPUs x 4 images.

However a run ended, the same command goes on from its last checkpoint. At SIGTERM, SIGINT or
SIGUSR1 it ends its step (or a validation, and then one more step), saves a checkpoint and stops;
torchrun leaves it 30 s for that (experiments/README.md, Signals: how to give it more).

Written to output_dir:
- checkpoint-NNNNNN/: transformer/ (with --lora_rank a LoRA file in its place),
  optimizer.safetensors, trainer_state.json. It gets this name once all of it is on the disk.
- metrics.jsonl, and the same in tensorboard/: each --logging_steps a line of loss, grad_norm and
  others (base_sigma_1: the base term's error at sigma below 0.25); with --held_out also {"step":
  500, "held_out": mean, "held_out_0.1": at sigma 0.1, ...}.
- validation-NNNNNN/: an image for each of --validation_prompts.

Every random number is a function of the seed and of what it is for, in training of (seed, step,
sample): for the same global batch the number of GPUs changes only the order of sums.
"""

import glob
import hashlib
import io
import json
import os
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import

import datasets
import numpy as np
import pyarrow
import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sample import (
    check_fit,
    check_numbers,
    check_size,
    checkpoints,
    count_cut,
    digest,
    encode_images,
    encode_prompts,
    find_weights,
    identity,
    init_distributed,
    load_lora,
    load_pipeline,
    load_transformer,
    locked,
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
    sft_loss,
    sigma_from_t,
    soar_terms,
)

# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    dataset: str
    """A hub id, whose split train is read; a folder with images and metadata.jsonl, of lines with
    file_name and text; a .parquet file; or a folder of them."""
    resolution: int = 512
    """Pixels; images are scaled to cover the square, then cropped to its centre."""
    image_column: str = "image"
    """Not read with metadata.jsonl, where it is file_name."""
    caption_column: str = "text"
    minima: Annotated[
        dict[str, float], tyro.conf.arg(name="min"), tyro.conf.UseAppendAction
    ] = field(default_factory=dict)
    """A column and a number, such as aesthetic 6.8: leave out rows below. May be given again."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Rows that cannot be used are counted, the first 20 listed; then stop, or go on without."""
    reader_threads: int = 4
    """Threads of each process that read images and draw noise."""

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class TrainingConfig:
    train_batch_size: int = 4
    """Images per GPU and forward."""
    gradient_accumulation_steps: int = 1
    """Forwards per step and GPU; the global batch is the product of both and the GPUs."""
    max_train_steps: int = 5000
    learning_rate: float = 2e-5
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Of diffusers.optimization.get_scheduler; all but constant warm up."""
    lr_warmup_steps: int = 0
    """Steps up to the full rate; the first has a share of it, not 0."""
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    lora_rank: int | None = None
    """Train LoRA matrices of this rank, alpha = rank, on the attention, in place of all weights."""
    cond_dropout_rate: float = 0.0
    """Share of samples trained with an empty caption. At 0 the velocity without a caption is not
    trained, but moves as the weights change; above 0 it is trained, by the base term and by SOAR's.
    """
    max_sequence_length: int = 77
    """T5 tokens that a caption is padded or cut to."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """Of forwards and of frozen weights: text encoders, the transformer under LoRA. Trained
    weights, optimizer, noisy latents, losses and the VAE are float32."""
    seed: int = 42

    def __post_init__(self):
        check_numbers(
            self,
            may_be_0=("lr_warmup_steps", "adam_weight_decay", "cond_dropout_rate", "seed"),
        )
        if self.cond_dropout_rate > 1:
            raise ValueError(f"--cond_dropout_rate is {self.cond_dropout_rate}, expected 0 to 1")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "--lr_scheduler constant does not read --lr_warmup_steps: use constant_with_warmup"
            )
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps is {self.lr_warmup_steps}, more than --max_train_steps"
                f" {self.max_train_steps}"
            )

    @property
    def bf16(self) -> bool:
        return self.mixed_precision == "bf16"


@dataclass(frozen=True)
class JobConfig:
    """How the job is done and what it reports; no weight depends on it but by rounding."""

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
    """Steps between validations; there is one before the first step and one after the last."""
    held_out: str | None = None
    """A second data set, to measure on, in a form that --dataset takes, with its columns and --min:
    at each validation the model's error on all of it is a line of metrics. How many of its pairs
    are also in --dataset is said at the start."""
    dry_run: bool = False
    """Check all data, take two steps in memory, say what would run, and stop."""

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class Args:
    data: DataConfig
    output_dir: Path
    """Where the run is written, on a disk that all nodes see: new, empty, or holding the run that
    is to go on."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or folder of a Stable Diffusion 3 pipeline."""
    transformer: str = "base"
    """Where to start: base, the pipeline's own transformer; another run's output_dir, of which each
    start takes the newest checkpoint; a checkpoint, a diffusers transformer folder or a LoRA file.
    With --lora_rank: base, or what holds a LoRA."""
    training: TrainingConfig = TrainingConfig()
    soar: SoarConfig = SoarConfig()
    job: JobConfig = JobConfig()


# --- Data: a table, all of which every start reads ------------------------------------------------

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # Pillow's limit, 1 MB, is below what workflow editors write


def read_table(data: DataConfig, name: str) -> tuple[datasets.Dataset, Path]:
    """The rows of a data set, in its own order, and the folder that image paths start from. name:
    its flag and value, for errors.
    Raises ValueError, FileNotFoundError: it cannot be read; names the file and the mend."""
    path = Path(data.dataset)
    if not path.exists():
        return datasets.load_dataset(data.dataset, split="train"), Path()
    files = sorted(path.glob("[!.]*.parquet")) if path.is_dir() else [path]
    try:
        if (path / "metadata.jsonl").is_file():
            return read_metadata(path / "metadata.jsonl", data), path
        if not files or files[0].suffix != ".parquet":
            raise ValueError(
                "expected a folder with metadata.jsonl, a .parquet file, a folder of them, or a hub"
                " id. README, Data, says how to make one"
            )
        names = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset("parquet", data_files=names, split="train"), files[0].parent
    except (
        datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"{name}: {error.__cause__ or error}") from None


def read_metadata(file: Path, data: DataConfig) -> datasets.Dataset:
    """The columns of metadata.jsonl that data names; file_name becomes the image column."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object: {error}") from None
    known = {name for row in rows for name in row}
    columns = {}
    for column in (data.image_column, data.caption_column, *data.minima):
        name = "file_name" if column == data.image_column else column
        if name not in known:
            raise ValueError(f"{file} has no column {name}: {known}")
        columns[column] = [row.get(name) for row in rows]
        if column not in data.minima:  # one type a column, for Arrow; Pairs.check lists the None
            columns[column] = [x if isinstance(x, str) else None for x in columns[column]]
    return datasets.Dataset.from_dict(columns)


def at_least(table: datasets.Dataset, minima: dict[str, float]) -> list[int]:
    """The rows whose columns are at least minima; rows with a missing value are left out.
    Raises ValueError: a column holds no numbers."""
    keep = np.full(len(table), True)
    for column, least in minima.items():
        try:
            keep &= np.array(list(table[column]), dtype=float) >= least
        except (TypeError, ValueError) as error:
            raise ValueError(f"--min {column}: it holds no numbers: {error}") from None
    return np.flatnonzero(keep).tolist()


def decode(content: bytes) -> Image.Image:
    """8-bit RGB in sRGB, turned by its EXIF orientation, on white where it is transparent.
    Raises ValueError: its one channel has more than 8 bits; Pillow's errors: it is broken, or its
    colour profile is not for its pixels."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits: convert it to 8")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    # Pixels must be of the kind that the profile is for. A grey image with a grey profile: L. A
    # CMYK image: CMYK. All else, such as a grey image with an RGB profile: RGB.
    kind = "CMYK" if image.mode == "CMYK" else "RGB"
    if image.info.get("icc_profile"):  # None, if parts of it are missing: then taken as sRGB
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if profile.profile.xcolor_space == "GRAY" and image.mode in ("1", "L", "LA"):
            kind = "L"
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image.convert(kind), profile, srgb, outputMode="RGB")
    image = image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha) if alpha else image


def int_digest(*parts: bytes) -> int:
    """60 bits of a SHA-256 of these parts: a digest that fits an int64 tensor."""
    whole = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    return int(whole.hexdigest()[:15], 16)


def in_threads(function: Callable, items: Iterator, threads: int, ahead: int) -> Iterator:
    """Yields function(item) in the order of items, computed by threads up to `ahead` items early.
    Raises what function raises when that item's turn comes. Threads, not processes: they end with
    this one, however it ends, and nothing is forked beside a GPU."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Pairs:
    """The image-caption pairs that --dataset, or another flag, gives. check() reads every row and
    keeps a digest; read() holds each later read against that: what is checked is what is trained.
    Raises ValueError, FileNotFoundError: it cannot be read, or a column does not fit."""

    def __init__(self, data: DataConfig, flag: str = "dataset"):
        self.data, self.name = data, f"--{flag} {data.dataset}"
        table, self.folder = read_table(data, self.name)
        columns = {data.image_column, data.caption_column, *data.minima}
        table = table.select_columns(sorted(columns))  # its error names one that is not there
        try:
            self.table = table.cast_column(data.image_column, datasets.Image(decode=False))
        except (pyarrow.ArrowException, TypeError, ValueError):
            raise ValueError(
                f"{self.name}: --image_column holds {table.features[data.image_column]}, no images"
            ) from None
        self.rows = at_least(table, data.minima)  # rows[i]: the table's row of pair i
        self.digests: list[int] = []
        self.processor = VaeImageProcessor(vae_scale_factor=1)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, cpu_group: dist.ProcessGroup, least: int = 1) -> str:
        """Read all rows, each rank a share, and leave out, or stop at, what cannot be used. Returns
        what was found, in words. Raises ValueError: rows that cannot be used; fewer than least."""
        data, chosen, rank = self.data, self.rows, dist.get_rank(cpu_group)
        check_ranks_agree({f"number of rows of {self.name}": len(chosen)}, cpu_group)
        digests = torch.zeros(len(chosen), dtype=torch.int64)  # 0: the row cannot be used
        own = range(rank, len(chosen), dist.get_world_size(cpu_group))
        threads = data.reader_threads
        verdicts = in_threads(self.inspect, (chosen[i] for i in own), threads, 8 * threads)
        for i, verdict in zip(tqdm(own, desc="checking rows", disable=rank > 0), verdicts):
            digests[i] = verdict[0]
        dist.all_reduce(digests, group=cpu_group)  # a row is 0 on all ranks but one
        good = digests > 0
        self.rows = [row for row, fine in zip(chosen, good.tolist()) if fine]
        self.digests = digests[good].tolist()
        said = (
            f"{len(self)} of {len(self.table)}, {len(set(self.digests))} different,"
            f" {len(chosen) - len(self)} unusable"
        )
        for row in sorted(set(chosen) - set(self.rows))[:20]:  # read again, for the words
            said += f"\n  {self.inspect(row)[1] or f'row {row}: another rank cannot read it'}"
        if len(self) < len(chosen) and data.on_bad_row == "stop":
            raise ValueError(
                f"{self.name}: {said}\n"
                "Correct these rows, or leave them out by --on_bad_row skip"
            )
        if len(self) < least:
            raise ValueError(f"{self.name} has {len(self)} pairs, expected {least} or more")
        return said

    def inspect(self, row: int) -> tuple[int, str]:
        """(digest, "") of a row, or (0, what is wrong with it)."""
        try:
            return self.load(row)[0], ""
        except ValueError as error:
            return 0, str(error)[:300]

    def load(self, row: int, checked: int | None = None) -> tuple[int, Image.Image, str]:
        """Digest, image and caption of a row. Raises ValueError: names the row, its file and what
        is wrong, also where the digest is not the checked one."""
        path = None
        try:
            cells = self.table[row]
            cell, caption = cells[self.data.image_column], cells[self.data.caption_column]
            path = cell and cell["path"]
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"its {self.data.caption_column} is {caption!r}, expected a text")
            if not cell or not (cell["bytes"] or path):
                raise ValueError("it has no image")
            content = cell["bytes"] or (self.folder / path).read_bytes()
            digest = int_digest(content, caption.encode())
            if checked not in (None, digest):
                raise ValueError("it has changed since the check, or this node has other data")
            return digest, decode(content), caption
        except Exception as error:  # whatever Pillow raises
            raise ValueError(f"row {row} ({path}): {type(error).__name__}: {error}") from None

    def read(self, index: int) -> tuple[Tensor, str]:
        """Pixels (3, R, R) in [-1, 1] and caption of a pair. Raises ValueError: it has changed."""
        _, image, caption = self.load(self.rows[index], self.digests[index])
        size = (self.data.resolution, self.data.resolution)
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        return self.processor.preprocess(image)[0], caption

    def captions(self) -> list[str]:
        column = self.data.caption_column
        return list(self.table.select_columns(column).select(self.rows)[column])


# --- Data: what a step takes ----------------------------------------------------------------------


class Batch(NamedTuple):
    """What a forward takes, on the CPU."""

    pixels: Tensor  # (B, 3, R, R) in [-1, 1]
    captions: list[str]
    vae_noise: Tensor  # (B, C, h, w) ~ N(0, I), which picks the VAE's sample
    draws: Draws


def step_indices(num_pairs: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The pairs of a step's global batch, by index; steps count from 1. An epoch is a permutation
    of all pairs, a function of (seed, epoch), cut into global batches; the rest is dropped."""
    epoch, k = divmod(step - 1, num_pairs // global_batch)
    order = torch.randperm(num_pairs, generator=seeded(seed, "epoch", epoch))
    return order[k * global_batch : (k + 1) * global_batch].tolist()


def batched(draws: list[Draws]) -> Draws:
    """Draws of one sample each, as one of all."""
    # Where B is: z1 (B, ...), t (B,), u (M, N, B), path_noise (M - 1, B, ...), path_z1 (M, B, ...).
    axes = Draws(z1=0, t=0, u=2, path_noise=1, path_z1=1)
    joined = []
    for values, axis in zip(zip(*draws), axes):  # values: of one field, of all samples
        joined.append(None if values[0] is None else torch.cat(values, axis))
    return Draws(*joined)


def read_batch(
    pairs: Pairs, indices: list[int], shape: tuple[int, ...], args: Args, keys: list[tuple]
) -> Batch:
    """Pairs by index, with latents of shape (C, h, w). What is random of a pair is a function of
    the seed and its key."""
    seed = args.training.seed
    pixels, captions = zip(*map(pairs.read, indices))
    noise = [torch.randn(shape, generator=seeded(seed, "vae", *key)) for key in keys]
    draws = [draw((1, *shape), args.soar, seeded(seed, "draws", *key)) for key in keys]
    return Batch(torch.stack(pixels), list(captions), torch.stack(noise), batched(draws))


def read_batches(
    pairs: Pairs, args: Args, shape: tuple[int, ...], rank: int, global_batch: int, done: int
) -> Iterator[Batch]:
    """This rank's batches for the steps from `done` + 1 on, with latents of shape (C, h, w), made
    by threads ahead of time, so that the host reads and draws nothing between two steps. What is
    random is a function of (seed, step, sample of the global batch)."""
    training, size = args.training, args.training.train_batch_size
    num_micros, threads = training.gradient_accumulation_steps, args.data.reader_threads

    def make(key: tuple[int, int]) -> Batch:
        step, micro = key
        indices = step_indices(len(pairs), global_batch, training.seed, step)
        # A micro-batch is a run of world_size * size samples, rank by rank.
        first = micro * (global_batch // num_micros) + rank * size
        keys = [(step, i) for i in range(first, first + size)]
        batch = read_batch(pairs, indices[first : first + size], shape, args, keys)
        for j, sample in enumerate(keys):
            dropped = torch.rand((), generator=seeded(training.seed, "caption", *sample))
            if dropped < training.cond_dropout_rate:
                batch.captions[j] = ""
        return batch

    keys = product(range(done + 1, training.max_train_steps + 1), range(num_micros))
    # In work or ready: the batches of the next step, and one more for each thread.
    return in_threads(make, keys, threads, ahead=num_micros + threads)


# --- Model and optimizer --------------------------------------------------------------------------

LORA_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state for a parameter


def load_trainable(
    name_or_path: str, weights: Path | None, training: TrainingConfig, device: torch.device
) -> SD3Transformer2DModel:
    """The transformer on device; trained parameters are float32.

    Without lora_rank all is trained: `weights` is a folder, or a LoRA file, which is merged into
    the pipeline's transformer, or None: that alone. With lora_rank LoRA matrices are trained over
    the pipeline's, frozen: `weights` is their file, or None: new ones.
    Raises ValueError: weights do not fit, or are a folder where a LoRA is trained."""
    if training.lora_rank is None:
        model = load_transformer(name_or_path, weights, torch.float32, device)
        for parameter in model.requires_grad_(True).parameters():
            # A copy is aligned in memory; a tensor out of a file may not be, which on a CPU changes
            # the last bits of a batch of 1, so that a resumed run would differ.
            parameter.data = parameter.data.clone()
        return model.train()
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    model = load_transformer(name_or_path, None, dtype, torch.device("cpu"))
    if weights is None:
        add_lora(model, training.lora_rank, training.seed)
    else:
        load_lora(model, weights)
        scales = {x.scaling["default"] for x in model.modules() if hasattr(x, "scaling")}
        if scales != {1.0} or model.peft_config["default"].r != training.lora_rank:
            raise ValueError(f"{weights}: rank or alpha is not --lora_rank {training.lora_rank}")
    return model.to(device).train()


def add_lora(model: SD3Transformer2DModel, rank: int, seed: int) -> None:
    """Freeze all weights, and put matrices A and B of this rank beside those of every attention,
    in float32, alpha = rank: B zero, A as peft draws it, a function of seed."""
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_MODULES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """torch.compile each block on first use. Blocks of a kind share their graphs: one with
    gradients, one without."""
    # optimize_ddp would cut graphs where DDP's buckets end, so that all-reduces start early; graphs
    # of one block are small enough to do without.
    torch._dynamo.config.optimize_ddp = False
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def make_ddp(transformer: torch.nn.Module) -> DistributedDataParallel:
    """DDP. Buffers are constants (SD3.5's positions: 0.9 GB), so none is sent before forwards."""
    with warnings.catch_warnings():
        # torch 2.13 has a new name for broadcast_buffers, which torch 2.9 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            transformer, broadcast_buffers=False, gradient_as_bucket_view=True
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
    optimizer = torch.optim.AdamW(
        parameters.values(), training.learning_rate, weight_decay=training.adam_weight_decay,
        fused=True,
    )  # fmt: skip
    if checkpoint is not None:
        saved = load_file(checkpoint / "optimizer.safetensors")
        state = {
            i: {key: saved[f"{name}.{key}"] for key in MOMENTS} for i, name in enumerate(parameters)
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return optimizer


def make_lr_factor(training: TrainingConfig, optimizer: torch.optim.AdamW) -> Callable:
    """What a step, counted from 1, multiplies the learning rate by: a function of the step, so
    there is no state to save. A schedule may be 0 at step 0 and at its last step: it is given
    max_train_steps + 1 of them, so no step that is taken, 1 to max_train_steps, has rate 0."""
    # Only its function is used. That it sets the optimizer's rate here is undone before each step.
    return get_scheduler(
        training.lr_scheduler, optimizer, num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps + 1,
    ).lr_lambdas[0]  # fmt: skip


# --- Checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, transformer: SD3Transformer2DModel, optimizer: torch.optim.AdamW, state: dict
) -> None:
    """Write checkpoint-NNNNNN whole or not at all: under a name with a dot, to the disk, renamed.
    Raises OSError: it could not be written; nothing of it is left."""
    staging = path.with_name(f".{path.name}")
    moments = {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in trained(transformer).items() for key in MOMENTS
    }  # fmt: skip
    try:
        if state["settings"]["lora_rank"]:
            layers = get_peft_model_state_dict(transformer)
            StableDiffusion3Pipeline.save_lora_weights(staging, layers)
        else:
            transformer.save_pretrained(staging / "transformer")
        save_file(moments, staging / "optimizer.safetensors")
        (staging / "trainer_state.json").write_text(json.dumps(state, indent=1))
        for written in (*staging.rglob("*"), staging):
            sync(written)
        staging.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"{path} could not be written: {error}. Earlier checkpoints are whole; make room, then"
            " give the same command again"
        ) from error


def hold(output_dir: Path, stack: ExitStack) -> None:
    """Lock output_dir until stack closes, and delete what a killed run left of a checkpoint.
    Raises RuntimeError: another run holds it."""
    stack.enter_context(locked(output_dir))
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def delete_old(output_dir: Path, limit: int | None) -> None:
    """Keep the newest checkpoints only. Renamed first: half of one must not pass for a whole."""
    for path in checkpoints(output_dir)[:-limit] if limit else []:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}")), ignore_errors=True)


def wait_for(path: Path, seconds: int = 300) -> None:
    """Wait until this node sees path: network disks show it late.
    Raises FileNotFoundError: it does not."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"rank {dist.get_rank()} has not seen {path} within {seconds} s, as others have:"
                " give an --output_dir that all nodes see"
            )
        time.sleep(0.5)


def greatest(numbers: list[int], cpu_group: dist.ProcessGroup) -> int:
    """The greatest of all ranks' numbers, 0 if there are none; the same on all ranks."""
    number = torch.tensor(max(numbers, default=0))
    dist.all_reduce(number, dist.ReduceOp.MAX, group=cpu_group)
    return int(number)


def newest_checkpoint(output_dir: Path, cpu_group: dist.ProcessGroup) -> Path | None:
    """The checkpoint to go on from, the newest that any rank sees; None for a fresh start.
    Raises FileNotFoundError: a rank does not see it."""
    step = greatest(
        [int(path.name.split("-")[1]) for path in checkpoints(output_dir)], cpu_group
    )
    if step == 0:
        return None
    path = output_dir / f"checkpoint-{step:06d}"
    wait_for(path)
    return path


def run_settings(args: Args, weights: Path | None, global_batch: int) -> dict:
    """What a resumed run must share: all that its result depends on, up to rounding, but the data's
    digest, which set_up adds."""
    values = asdict(args.training) | asdict(args.soar)
    del values["train_batch_size"], values["gradient_accumulation_steps"]  # see global_batch
    if args.training.lr_scheduler.startswith("constant"):
        del values["max_train_steps"]  # such a run may be made longer
    base = args.pretrained_model_name_or_path
    return values | {
        "sigma_upper_ratio": str(args.soar.sigma_upper_ratio),  # inf is not JSON
        "pipeline": identity(base, "rest"),  # all but its transformer
        "transformer": digest(weights) if weights else "base",  # what --transformer names
        "base_transformer": identity(base, "transformer"),  # of base, or what a LoRA is added to
        "resolution": args.data.resolution,
        "global_batch": global_batch,
    }


def check_same(was: dict, now: dict, output_dir: Path) -> None:
    """Raises ValueError: the settings of a run are not those that are given; names them."""
    names = [name for name in was | now if was.get(name) != now.get(name)]
    if names:
        other = "; ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in names)
        raise ValueError(
            f"{output_dir} was made with other settings: {other}. Give these, or another"
            " --output_dir"
        )


def check_ranks_agree(values: dict, cpu_group: dist.ProcessGroup) -> None:
    """Raises ValueError: a value of rank 0's is another on some rank; names it."""
    own = torch.tensor([int_digest(str(value).encode()) for value in values.values()])
    first = own.clone()
    dist.broadcast(first, 0, group=cpu_group)
    differs = (own != first).long()
    dist.all_reduce(differs, group=cpu_group)
    names = [f"{name} (here {values[name]})" for name, x in zip(values, differs.tolist()) if x]
    if names:
        raise ValueError(
            f"ranks do not have the same {', '.join(names)}: give all nodes the same command,"
            " weights and data"
        )


# --- What the user sees ---------------------------------------------------------------------------

# loss, grad_norm: means over steps. base, aux: mean error of a point, unweighted; behind each the
# same by quarter of sigma, an order that add_term relies on.
METRICS = (
    "loss", "grad_norm",
    "base", "base_sigma_1", "base_sigma_2", "base_sigma_3", "base_sigma_4",
    "aux", "aux_sigma_1", "aux_sigma_2", "aux_sigma_3", "aux_sigma_4",
)  # fmt: skip


def zero_sums(device: torch.device) -> Tensor:
    """(metric, 2) float64: a sum and a count for each of METRICS, which is their ratio."""
    return torch.zeros(len(METRICS), 2, dtype=torch.float64, device=device)


def add_term(sums: Tensor, term: Term, auxiliary: bool) -> None:
    """Add a term's errors to sums, in all and by quarter of sigma."""
    row = METRICS.index("aux" if auxiliary else "base")
    counts = term.counts.double()  # 1 if the sample is part of the loss, else 0
    errors = torch.stack([term.error.double() * counts, counts], dim=1)
    sums[METRICS.index("loss"), 0] += term.loss.detach()
    sums[row] += errors.sum(0)
    quarter = (4 * term.sigma).long().clamp(max=3)
    sums.index_add_(0, row + 1 + quarter, errors)


class Log:
    """What rank 0 writes beside checkpoints: TensorBoard's files and metrics.jsonl. A run that
    goes on from step `done` starts with it: it deletes the lines of later steps, and the held-out
    line of step `done` if that is measured again."""

    def __init__(self, output_dir: Path, done: int, measured_again: bool):
        file = output_dir / "metrics.jsonl"
        file.touch()
        lines = file.read_text(errors="replace").splitlines()
        kept = [json.loads(x) for x in lines if x.endswith("}")]  # a crash may leave half a line
        kept = [x for x in kept if x["step"] <= done]
        if measured_again:
            kept = [x for x in kept if x["step"] < done or "held_out" not in x]
        save_whole("".join(json.dumps(x) + "\n" for x in kept), file)
        self.file = file.open("a", buffering=1)
        self.writer = SummaryWriter(output_dir / "tensorboard", purge_step=done + 1)

    def write(self, line: dict[str, float]) -> None:
        self.file.write(json.dumps(line) + "\n")
        os.fsync(self.file.fileno())
        for name, value in line.items():
            self.writer.add_scalar(name, value, line["step"])


SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)  # noise levels at which held-out pairs are measured
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def note_signals() -> list[int]:
    """From now on SIGTERM, SIGINT and SIGUSR1 are put on this list and do nothing else."""
    noted = []
    for number in SIGNALS:
        signal.signal(number, lambda signum, _: noted.append(signum))
    return noted


# --- Set up ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a run consists of, checked and loaded."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup  # gloo, of all ranks: for tensors on the CPU, and for long waits
    pairs: Pairs
    held_out: Pairs | None
    pairs_said: str  # by Pairs.check, for report
    global_batch: int
    settings: dict
    step: int  # steps done
    totals: Tensor  # as zero_sums: since the last line of metrics
    pipe: StableDiffusion3Pipeline  # without its transformer
    transformer: SD3Transformer2DModel
    ddp: DistributedDataParallel
    optimizer: torch.optim.AdamW
    lr_factor: Callable
    uncond: dict[str, Tensor]  # the empty prompt's embeddings, for a batch
    latent_shape: tuple[int, int, int]
    seconds: list[float] = field(default_factory=list)  # of each step since the last line


def set_up(args: Args, stack: ExitStack) -> Run:
    """Check and load everything. On rank 0 stack holds output_dir, but in a dry run.
    Raises ValueError, OSError, RuntimeError: names a flag, file or row that cannot be used."""
    base, training, folder = args.pretrained_model_name_or_path, args.training, args.output_dir
    weights, _ = find_weights(args.transformer)
    check_fit(args.transformer, weights, base)
    # Before the ranks wait for one another: a wrong flag fails at once.
    pairs, other = Pairs(args.data), args.job.held_out
    held_out = Pairs(replace(args.data, dataset=other), "held_out") if other else None
    rank, world_size, device = init_distributed()
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    global_batch = training.train_batch_size * training.gradient_accumulation_steps * world_size
    settings = run_settings(args, weights, global_batch)
    flags = vars(args.data) | vars(args.training) | vars(args.job)  # settings has SOAR's
    check_ranks_agree(flags | settings | {"output_dir": folder}, cpu_group)
    if visible(folder) and not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"--output_dir {folder} is not empty and holds no run: no metrics.jsonl")
    if rank == 0 and not args.job.dry_run:
        hold(folder, stack)  # from here on no other run adds a checkpoint
    checkpoint = newest_checkpoint(folder, cpu_group)
    state = {"step": 0, "sums": zero_sums(device).tolist()}
    if checkpoint is not None:
        weights, state = find_weights(str(checkpoint))
        # Now but for the data, before all rows are read; below with them.
        check_same(state["settings"], settings | {"data": state["settings"]["data"]}, folder)
    if state["step"] > training.max_train_steps:
        raise ValueError(f"{checkpoint} is beyond --max_train_steps {training.max_train_steps}")
    pairs_said = pairs.check(cpu_group, global_batch)
    settings["data"] = int_digest(json.dumps(pairs.digests).encode())
    if checkpoint is not None:
        check_same(state["settings"], settings, folder)
    if held_out is not None:  # a pair for each rank at least, or its batch would be empty
        pairs_said += f"\nheld out     {held_out.check(cpu_group, world_size)}; "
        pairs_said += f"{len({*held_out.digests} & {*pairs.digests})} also in --dataset"
    pipe = load_frozen(args, device)
    transformer = load_trainable(base, weights, training, device)
    check_size(pipe, transformer, resolution=args.data.resolution)
    if args.job.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = make_optimizer(training, trained(transformer), checkpoint)
    uncond = encode_prompts(pipe, [""] * training.train_batch_size, training.max_sequence_length)
    side = args.data.resolution // pipe.vae_scale_factor
    dist.barrier(cpu_group)  # DDP is the first to use nccl, which would not wait for a slow disk
    return Run(
        rank=rank, world_size=world_size, device=device, cpu_group=cpu_group, pairs=pairs,
        held_out=held_out, pairs_said=pairs_said, global_batch=global_batch, settings=settings,
        step=state["step"], pipe=pipe, transformer=transformer, ddp=make_ddp(transformer),
        optimizer=optimizer, uncond=uncond,
        totals=torch.tensor(state["sums"], dtype=torch.float64, device=device),
        lr_factor=make_lr_factor(training, optimizer),
        latent_shape=(transformer.config.in_channels, side, side),
    )  # fmt: skip


def load_frozen(args: Args, device: torch.device) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer. Raises ValueError: --shift is not its sampler's."""
    dtype = torch.bfloat16 if args.training.bf16 else torch.float32
    pipe = load_pipeline(
        args.pretrained_model_name_or_path, dtype, device, args.job.text_encoder_device
    )
    if pipe.scheduler.config.shift != args.soar.shift:
        raise ValueError(
            f"--shift is {args.soar.shift}, but the pipeline samples with shift"
            f" {pipe.scheduler.config.shift}"
        )
    return pipe


def warm_up(velocity: Velocity, run: Run, batch_size: int) -> None:
    """DDP rebuilds its buckets once, in the first forward after a backward. Have that behind us:
    else the first step after each start, and so a resumed run, would add gradients in another
    order."""
    z = torch.zeros(batch_size, *run.latent_shape, device=run.device)
    sigma = torch.ones(batch_size, device=run.device)
    for _ in range(2):  # the second forward rebuilds them
        velocity(z, sigma, run.uncond).sum().backward()
        run.optimizer.zero_grad(set_to_none=False)


def report(args: Args, run: Run) -> None:
    """Say what will run. Raises OSError: output_dir cannot be written, or has too little room."""
    training, folder, steps = args.training, args.output_dir, args.training.max_train_steps
    length, captions = training.max_sequence_length, run.pairs.captions()
    cut = count_cut(run.pipe, captions, length)
    size = sum(x.numel() for x in trained(run.transformer).values())
    each = 12.5 * size / 1e9  # GB: a weight and two moments in float32, and some for buffers
    every, limit = args.job.checkpointing_steps, args.job.checkpoints_total_limit
    to_come = sum(step > run.step for step in (*range(every, steps, every), steps))
    if limit:  # the oldest goes when a new one is whole, so limit + 1 at once; some may be there
        to_come = min(to_come, max(limit + 1 - len(checkpoints(folder)), 1))
    needed = each * to_come
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    tempfile.TemporaryFile(dir=place).close()  # a trial, which leaves nothing
    free = shutil.disk_usage(place).free / 1e9
    print(
        f"""model        {args.pretrained_model_name_or_path}, transformer {args.transformer}
trained      {size / 1e6:,.1f} M parameters
pairs        {run.pairs_said}
captions     {cut} of {len(captions)} are cut at {length} tokens; {len(set(captions))} are different
global batch {run.global_batch} = {run.world_size} processes \
x {training.gradient_accumulation_steps} x {training.train_batch_size}
steps        {steps}, {run.step} done; {len(captions) // run.global_batch} an epoch
written to   {folder}: {each:.2f} GB a checkpoint, {needed:.2f} GB to come; {free:.2f} GB free""",
        flush=True,
    )
    if free < needed:
        raise OSError(
            f"--output_dir {folder} has no room for {needed:.2f} GB: make room, or give"
            " --checkpoints_total_limit"
        )


# --- Training -------------------------------------------------------------------------------------


def training_step(args: Args, run: Run, velocity: Velocity, batches: Iterator[Batch]) -> None:
    """Take the next step. Raises what update raises, and ValueError: an image has changed."""
    began = time.perf_counter()
    soar, sums = args.soar, zero_sums(run.device)
    micros = list(islice(batches, args.training.gradient_accumulation_steps))
    # The loss is a sum over the global batch / total; DDP takes means of gradients over the ranks,
    # so each rank divides its own part by total / world_size.
    total = sum(loss_normalizer(batch.draws.t, soar) for batch in micros)
    dist.all_reduce(total, group=run.cpu_group)
    normalizer = total.item() / run.world_size

    for batch in micros:
        z0, cond, draws = encode(batch, run, args.training.max_sequence_length)
        terms = soar_terms(velocity, z0, draws, cond, run.uncond, soar, normalizer=normalizer)
        backward(terms, soar.num_terms, run.ddp, sums, last=batch is micros[-1])

    # The mean over ranks of their sums of losses is the loss of the step: so each rank counts 1.
    sums[METRICS.index("loss"), 1] = 1
    dist.all_reduce(sums)
    update(args, run, micros, sums)
    run.step, run.totals = run.step + 1, run.totals + sums
    run.seconds.append(time.perf_counter() - began)


def encode(batch: Batch, run: Run, max_sequence_length: int) -> tuple[Tensor, dict, Draws]:
    """z0, conditioning and draws of a batch, on the device."""
    device = run.device
    z0 = encode_images(
        run.pipe, to_device(batch.pixels, device), to_device(batch.vae_noise, device)
    )
    cond = encode_prompts(run.pipe, batch.captions, max_sequence_length)
    return z0, cond, Draws(*(x if x is None else to_device(x, device) for x in batch.draws))


def update(args: Args, run: Run, micros: list[Batch], sums: Tensor) -> None:
    """Clip the gradients, write their norm to sums and move the weights. Raises FloatingPointError:
    the loss or the gradient is not finite; no weight was changed."""
    training, step = args.training, run.step + 1
    parameters = list(trained(run.transformer).values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
    # DDP has averaged the gradients, so all ranks have the same norm, which is counted once.
    sums[METRICS.index("grad_norm")] = torch.stack([norm, torch.ones_like(norm)]).double()
    if not sums.isfinite().all():  # the host waits here for the device, once a step
        indices = step_indices(len(run.pairs), run.global_batch, training.seed, step)
        sigma = sigma_from_t(torch.cat([batch.draws.t for batch in micros]), args.soar.shift)
        raise FloatingPointError(
            f"loss or gradient of step {step} is not finite; no weight was changed by it. Its rows"
            f" of --dataset: {[run.pairs.rows[i] for i in indices]}; its sigma on rank {run.rank}:"
            f" {sigma.min():.4f} to {sigma.max():.4f}"
        )
    run.optimizer.param_groups[0]["lr"] = training.learning_rate * run.lr_factor(step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=False)  # gradients stay views of DDP's buckets


def backward(terms: Iterator[Term], num_terms: int, ddp, sums: Tensor, last: bool) -> None:
    """Back-propagate the terms one by one, so that one graph is in memory at a time, and add them
    to sums. last: no batch of the step follows, so gradients are averaged over the ranks."""
    # autocast drops its bf16 copies of the weights when its outermost block ends. This one changes
    # no dtype (velocity's does); it is here to be the outermost, so that the copies last for all
    # terms. Each term can go backward through them, as a cast saves no tensor that the first would
    # free. A copy made under no_grad, as in the rollout, would be used again without a gradient:
    # soar_terms yields the base term first, so none is.
    with torch.autocast(sums.device.type, enabled=False):
        for i in range(num_terms):
            average = last and i == num_terms - 1
            with nullcontext() if average else ddp.no_sync():
                term = next(terms)  # the forward, which no_sync must hold as well
                term.loss.backward()
            add_term(sums, term, auxiliary=i > 0)
            del term  # or what its graph still holds would be there during the next forward


def validate(args: Args, run: Run, prompts: list[dict]) -> None:
    """Write an image for each prompt, which the ranks share out, to a folder in output_dir: from
    the noise that sample.py has for a prompt's first image and --seed."""
    training = args.training
    folder = args.output_dir / f"validation-{run.step:06d}"
    folder.mkdir(exist_ok=True)
    uncond = {key: x[:1] for key, x in run.uncond.items()}
    for i in range(run.rank, len(prompts), run.world_size):
        text = prompts[i]["prompt"]
        noise = torch.randn(1, *run.latent_shape, generator=seeded(training.seed, text, 0))
        cond = encode_prompts(run.pipe, [text], training.max_sequence_length)
        with (
            torch.autocast(run.device.type, torch.bfloat16, enabled=training.bf16),
            torch.compiler.set_stance("force_eager"),  # no graphs for shapes that come up here only
        ):
            (image,) = sample_images(
                run.pipe, run.transformer, noise, cond, uncond, args.soar.num_sampling_steps,
                args.soar.guidance_scale,
            )  # fmt: skip
        save_whole(image, folder / f"{i:05d}.png")


@torch.no_grad()
def held_out_errors(args: Args, run: Run, velocity: Velocity) -> dict[str, float]:
    """The base term's error on --held_out, at each of SIGMAS and their mean. A pair's noise is a
    function of (seed, its row), and stays the same."""
    pairs, training = run.held_out, args.training
    sums = torch.zeros(len(SIGMAS), dtype=torch.float64, device=run.device)
    # So that nodes with other data are found, most rows are read by a rank that did not digest
    # them: shares are in one piece, where those of check() were every n-th row.
    own = torch.arange(len(pairs)).tensor_split(run.world_size)[run.rank]
    for part in own.split(training.train_batch_size):
        indices = part.tolist()
        keys = [("held out", pairs.rows[i]) for i in indices]
        batch = read_batch(pairs, indices, run.latent_shape, args, keys)
        z0, cond, draws = encode(batch, run, training.max_sequence_length)
        for k, level in enumerate(SIGMAS):
            sigma = torch.full_like(draws.t, level)
            with torch.compiler.set_stance("force_eager"):  # or a smaller last batch needs a graph
                sums[k] += sft_loss(velocity, z0, draws.z1, sigma, cond).sum()
    dist.all_reduce(sums)
    errors = (sums / len(pairs)).tolist()
    by_level = {f"held_out_{level}": error for level, error in zip(SIGMAS, errors)}
    return {"step": run.step, "held_out": statistics.mean(errors), **by_level}


def save(args: Args, run: Run) -> None:
    """Write a checkpoint, on rank 0, and delete those beyond the limit; other ranks wait."""
    if run.rank == 0:
        state = {"step": run.step, "settings": run.settings, "sums": run.totals.tolist()}
        path = args.output_dir / f"checkpoint-{run.step:06d}"
        save_checkpoint(path, run.transformer, run.optimizer, state)
        delete_old(args.output_dir, args.job.checkpoints_total_limit)
    dist.barrier(run.cpu_group)


def train(args: Args, stack: ExitStack) -> None:
    """A run from its checks to its last checkpoint, or to one that a signal asks for. stack closes
    TensorBoard's files and the lock, also after an error."""
    training, job, steps = args.training, args.job, args.training.max_train_steps
    prompts = read_prompts(job.validation_prompts) if job.validation_prompts else []
    run = set_up(args, stack)
    if job.compile:
        compile_blocks(run.transformer)
    velocity = make_velocity(run.ddp, run.device, training.bf16)
    warm_up(velocity, run, training.train_batch_size)
    if run.rank == 0:
        report(args, run)
    batches = read_batches(run.pairs, args, run.latent_shape, run.rank, run.global_batch, run.step)
    if job.dry_run:
        for _ in range(min(2, steps - run.step)):  # AdamW's moments are there from the second on
            training_step(args, run, velocity, batches)
            print(
                f"rank {run.rank}       {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of memory;"
                f" {steps * run.seconds[-1] / 3600:.2f} hours for {steps} such steps"
            )
        return

    def validation_due() -> bool:
        return run.step == steps or run.step % job.validation_steps == 0

    noted = note_signals()
    log = None
    if run.rank == 0:
        # The loop begins with this step's validation if that is due, so a resumed run repeats it.
        measured_again = run.held_out is not None and validation_due()
        log = Log(args.output_dir, run.step, measured_again)
        stack.callback(log.writer.close)
    dist.barrier(run.cpu_group)
    wait_for(args.output_dir / "metrics.jsonl")
    bar = tqdm(total=steps, initial=run.step, desc="steps", disable=run.rank > 0)
    stop_signal = 0

    while not stop_signal:
        # A step that is both saved and validated is saved first, at the end of this loop: a run
        # that is killed while it validates goes on from that step, and validates it again.
        if validation_due():
            if prompts:
                validate(args, run, prompts)
            if run.held_out:
                line = held_out_errors(args, run, velocity)
                if log:
                    log.write(line)
        if run.step == steps:
            break

        training_step(args, run, velocity, batches)
        bar.update()
        stop_signal = greatest(noted, run.cpu_group)
        if run.step % job.logging_steps == 0:
            line = metrics_line(run)
            if log:
                log.write(line)
            bar.set_postfix(loss=line["loss"])
        if stop_signal or run.step == steps or run.step % job.checkpointing_steps == 0:
            save(args, run)

    bar.close()
    ended = f"stopped by {signal.Signals(stop_signal).name}" if stop_signal else "complete"
    if run.rank == 0:
        print(f"{args.output_dir}: step {run.step} of {steps} is saved; {ended}")


def metrics_line(run: Run) -> dict[str, float]:
    """The METRICS since the last line, the seconds of a step, and this rank's peak of GPU memory
    since its start. Starts the next sums."""
    line = {
        "step": run.step,
        **{name: total / n for name, (total, n) in zip(METRICS, run.totals.tolist()) if n},
        "lr": run.optimizer.param_groups[0]["lr"],
        "step_seconds": statistics.mean(run.seconds),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    run.totals.zero_()
    run.seconds.clear()
    return line


def main(args: Args) -> None:
    with ExitStack() as stack:
        train(args, stack)
    # Only now that train has returned and DDP is freed. If DDP held the last reference to the
    # group, its destructor would join gloo's threads while it holds Python's lock (GIL), which they
    # need: a deadlock, seen with torch 2.13.
    dist.destroy_process_group()


def parse(words: list[str] | None = None) -> Args:
    """Args from the command line, or from words."""
    return tyro.cli(
        Args, args=words, description=__doc__, config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )  # fmt: skip


if __name__ == "__main__":
    record(main)(parse())
