"""SOAR post-training of Stable Diffusion 3.5 (or 3) Medium, and SFT by the same path.

    torchrun --nproc_per_node 8 train.py --dataset DIR_OR_HUB_ID --output_dir output/soar
    torchrun --nproc_per_node 8 train.py --dataset DIR_OR_HUB_ID --output_dir output/sft --lambda_aux 0

`python train.py` runs one process; --dry_run loads and checks everything, says what would run, and stops. The defaults
are the published run: 8 GPUs x 4 images, 5,000 steps. A run that was killed, or stopped by SIGTERM, SIGINT or SIGUSR1,
goes on from its last checkpoint when the same command is given again.

Written to output_dir: checkpoint-NNNNNN/{transformer/, optimizer.safetensors, trainer_state.json}, with --lora_rank
pytorch_lora_weights.safetensors in place of transformer/; final, a link to the last; settings.json; metrics.jsonl and
tensorboard/, with the loss, the base and auxiliary errors, both also by quarter of sigma (1 is the cleanest), gradient
norm, rates and memory; with --validation_prompts validation-NNNNNN.png. Every random number is a function of (seed,
step, sample): the number of GPUs changes only the order of sums.
"""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from experiments.pairs import Pairs
from experiments.sd3 import (
    check_size,
    encode_images,
    encode_prompts,
    init_distributed,
    load_pipeline,
    read_prompts,
    sample_images,
    save_whole,
    seeded,
    sync,
    to_device,
)
from experiments.trainable import (
    LORA,
    compile_blocks,
    load_trainable,
    local,
    make_ddp,
    make_optimizer,
    moments,
    trained,
)
from soar import Draws, SoarConfig, Term, Velocity, draw, loss_normalizer, sigma_from_t, soar_terms

# --- Settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args(SoarConfig):
    """Settings of a run: SoarConfig's fields under their own names, and these."""

    num_aux_points: Annotated[int, tyro.conf.arg(aliases=["--trajectory_length"])] = SoarConfig.num_aux_points
    """N, auxiliary points a path; 0 is SFT."""
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--cfg_scale_sampling"])] = SoarConfig.guidance_scale
    """w of the rollout and of validation images; 1 is unguided."""
    sde_type: Annotated[str, tyro.conf.arg(aliases=["--sde_rollout_type"])] = SoarConfig.sde_type
    """Step of rollout paths 2..M: simple, sde, flow_sde or cps."""
    dataset: str
    """What datasets.load_dataset reads: a directory (imagefolder, parquet, webdataset ...), a hub id, or a .parquet,
    .csv, .json, .jsonl or .tar file, with images or their paths, relative to the file."""
    output_dir: Path
    """Where the run is written, on a disk that all nodes see: new, empty, or holding the run that is to go on."""
    dataset_split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    min: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """COLUMN=NUMBER, such as aesthetic=6.8: keep rows where this column is at least that; may be given again."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about rows that cannot be used, which are listed: stop, or go on without them."""
    resolution: int = 512
    """Pixels; images are scaled to cover the square, then cropped."""
    crop: Literal["center", "random"] = "center"
    random_flip: bool = False
    """Mirror half of the images. Off, as it makes captions such as "left of" false."""
    cond_dropout_rate: float = 0.0
    """Share of samples trained with an empty caption."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or directory of a Stable Diffusion 3 pipeline."""
    train_batch_size: int = 4
    """Images a GPU and forward."""
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 5000
    learning_rate: float = 2e-5
    lr_scheduler: str = "constant"
    """A name that diffusers.optimization.get_scheduler knows; constant_with_warmup is the one that warms up."""
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: str = "bf16"
    """bf16 or no: what forwards run in. Weights, optimizer, states, targets, losses and the VAE are float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time, the same bits."""
    lora_rank: int | None = None
    """Train matrices of this rank beside the attention's, alpha = rank; the weights stay, in --mixed_precision."""
    shard_optimizer: bool = False
    """AdamW's moments in equal shares on all ranks (ZeRO stage 1): 8 bytes a parameter less memory, the same bits."""
    compile: bool = False
    """torch.compile the transformer's blocks: a slow first step, faster others."""
    text_encoder_device: Literal["cpu"] | None = None
    """cpu: leave the text encoders there, which is slow; by default they are on the GPU."""
    max_sequence_length: int = 77
    """T5 tokens a caption is padded or cut to."""
    seed: int = 42
    dataloader_num_workers: int = 4
    resume_from_checkpoint: str = "latest"
    """latest: from the last checkpoint in output_dir, if any; PATH: from that one; none: output_dir must be new."""
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int | None = None
    """Keep only so many checkpoints, the newest; older ones are deleted once a new one is complete."""
    logging_steps: int = 10
    """A line of metrics every so many steps, a mean over them; between lines the host does not wait for the device."""
    validation_prompts: Path | None = None
    """A prompt file as sample.py reads it, an image each: num_sampling_steps steps, guidance_scale, fixed noise."""
    validation_steps: int = 500
    """Validation images every so many steps, and before the first."""
    dry_run: bool = False
    """Load and check everything, print the summary, and stop."""

    def __post_init__(self):
        super().__post_init__()
        zero = ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers")
        for name, value in vars(self).items():
            if name in zero and value < 0:
                raise ValueError(f"--{name} is {value}, expected at least 0")
            kinds = ("_steps", "_size", "_limit", "_norm", "_length", "_rank", "resolution", "learning_rate")
            positive = name.endswith(kinds)
            if positive and name not in zero and value is not None and not value > 0:
                raise ValueError(f"--{name} is {value}, expected more than 0")
        if not 0 <= self.cond_dropout_rate <= 1:
            raise ValueError(f"--cond_dropout_rate is {self.cond_dropout_rate}, expected 0 to 1")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr_warmup_steps is not read by --lr_scheduler constant; use constant_with_warmup")
        if self.mixed_precision == "fp16":
            raise ValueError("--mixed_precision fp16: small gradients would vanish in it; use bf16, or no for float32")
        if self.mixed_precision not in ("bf16", "no"):
            raise ValueError(f"--mixed_precision is {self.mixed_precision}, expected bf16 or no")
        if self.image_column == self.caption_column:
            raise ValueError(f"--image_column and --caption_column are both {self.image_column}")
        self.minima()

    def minima(self) -> dict[str, float]:
        """--min as {column: least value}. Raises ValueError: a word is not COLUMN=NUMBER."""
        try:
            return {column: float(value) for column, value in (word.split("=") for word in self.min)}
        except ValueError:
            raise ValueError(f"--min is {' '.join(self.min)}, expected COLUMN=NUMBER such as aesthetic=6.8") from None

    def global_batch(self, world_size: int) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * world_size

    def settings(self, world_size: int, data: str) -> dict:
        """What the result of a run depends on. data: the digest of its pairs, wherever they lie."""
        free = "dataset dataset_split image_column caption_column min on_bad_row output_dir train_batch_size dry_run"
        free += " gradient_accumulation_steps gradient_checkpointing dataloader_num_workers resume_from_checkpoint"
        free += " checkpointing_steps checkpoints_total_limit logging_steps validation_prompts validation_steps"
        free += " shard_optimizer compile text_encoder_device"  # which change rounding at most
        free += " max_train_steps" * self.lr_scheduler.startswith("constant")
        values = {name: str(x) if x == math.inf else x for name, x in vars(self).items() if name not in free.split()}
        return values | {"global_batch": self.global_batch(world_size), "data": data}


# --- Data -------------------------------------------------------------------------------------------------------------

def step_rows(num_rows: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The rows of a step's global batch; steps count from 1. An epoch is a permutation of all rows, a function of
    (seed, epoch), cut into global batches; what is left over is dropped, and differs from epoch to epoch."""
    epoch, k = divmod(step - 1, num_rows // global_batch)
    order = torch.randperm(num_rows, generator=seeded(seed, "epoch", epoch))
    return order[k * global_batch : (k + 1) * global_batch].tolist()


def batch_slice(micro: int, args: Args, rank: int, world_size: int) -> slice:
    """Where the samples of a rank's forward stand in the global batch."""
    start = (micro * world_size + rank) * args.train_batch_size
    return slice(start, start + args.train_batch_size)


def batch_keys(num_rows: int, args: Args, rank: int, world_size: int, start: int) -> Iterator[list[tuple]]:
    """What Pairs is asked for by each forward of this rank after step start: lists of (row, step, sample)."""
    for step in range(start + 1, args.max_train_steps + 1):
        rows = step_rows(num_rows, args.global_batch(world_size), args.seed, step)
        for micro in range(args.gradient_accumulation_steps):
            part = batch_slice(micro, args, rank, world_size)
            yield [(rows[i], step, i) for i in range(part.start, part.stop)]


def take(draws: Draws, part: slice, device: torch.device) -> Draws:
    """The draws of some samples of the global batch, on device."""
    parts = draws.z1[part], draws.t[part], draws.u[:, :, part], draws.path_noise[:, part]
    path_z1 = None if draws.path_z1 is None else to_device(draws.path_z1[:, part], device)
    return Draws(*(to_device(x, device) for x in parts), path_z1)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in order of steps."""
    found = [path.parent for path in output_dir.glob("checkpoint-[0-9]*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(path: Path, transformer: SD3Transformer2DModel, moments: dict[str, Tensor], state: dict) -> None:
    """Write checkpoint-NNNNNN whole or not at all: beside, to the disk, trainer_state.json last, then renamed.

    Raises OSError: it could not be written; nothing of it is left."""
    staging = path.with_name(f".{path.name}")
    try:
        if state["settings"]["lora_rank"]:
            StableDiffusion3Pipeline.save_lora_weights(staging, get_peft_model_state_dict(transformer))
        else:
            transformer.save_pretrained(staging / "transformer")
        save_file(moments, staging / "optimizer.safetensors")
        for written in (*staging.rglob("*"), staging):
            sync(written)
        save_whole(json.dumps(state, indent=1) + "\n", staging / "trainer_state.json")
        staging.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        mend = "Earlier checkpoints are whole; make room, then give the same command again"
        raise OSError(f"{path} could not be written: {error}. {mend}") from error


def find_start(args: Args) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; reads names only.

    Raises ValueError, FileNotFoundError: output_dir is in other use, or a checkpoint in it, or the one given, is not
    complete."""
    used, own = args.output_dir.is_dir() and any(args.output_dir.iterdir()), checkpoints(args.output_dir)
    if used and args.resume_from_checkpoint == "none":
        raise ValueError(f"--output_dir {args.output_dir} is not empty, and --resume_from_checkpoint is none")
    if used and not (args.output_dir / "settings.json").is_file():
        raise ValueError(f"--output_dir {args.output_dir} is not empty and holds no run: settings.json is not there")
    broken = [path for path in sorted(args.output_dir.glob("checkpoint-[0-9]*")) if path not in own]
    if broken:
        raise FileNotFoundError(f"{broken[0]} is incomplete: it has no trainer_state.json. Complete it, or delete it")
    if args.resume_from_checkpoint in ("latest", "none"):
        return own[-1] if own else None
    path = Path(args.resume_from_checkpoint)
    weights = LORA if args.lora_rank else "transformer/config.json"
    for name in ("trainer_state.json", "optimizer.safetensors", weights):
        if not (path / name).is_file():
            raise FileNotFoundError(f"--resume_from_checkpoint {path} is missing or incomplete: it has no {name}")
    later = [p.name for p in own if int(p.name[11:]) > json.loads((path / "trainer_state.json").read_text())["step"]]
    if later:
        raise ValueError(f"--output_dir {args.output_dir} holds {later[-1]}, later than {path}: give another one")
    return path


def check_settings(settings: dict, path: Path) -> None:
    """Raises ValueError: the run of this .json was made with other settings; names them, as they were and are."""
    was, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
    was = was.get("settings", was)
    other = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in was | now if was.get(name) != now.get(name)]
    if other:
        mend = "Give these, or another --output_dir"
        raise ValueError(f"{path.parent} was made with other settings: {'; '.join(other)}. {mend}")


# --- What the user sees -----------------------------------------------------------------------------------------------

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "B200": 2250}  # bf16, dense, from the data sheets


def add_term(sums: Tensor, term: Term, auxiliary: bool) -> None:
    """Add a term to a step's sums (5, 4) float64: errors and counts of the base, then of auxiliary points, each by
    quarter of sigma; then (loss, gradient norm, steps, 0). A point that does not count has error 0."""
    quarter, row = (4 * term.sigma).long().clamp(max=3), 2 * auxiliary
    sums[row].index_add_(0, quarter, term.error.double())
    sums[row + 1].index_add_(0, quarter, (term.error != 0).double())
    sums[4, 0] += term.loss.detach()


def means(sums: list[list[float]]) -> dict[str, float]:
    """Metrics from sums over steps: the loss; mean errors, unweighted; the same by quarter of sigma, 1 the cleanest."""
    *errors, (loss, grad_norm, steps, _) = sums
    line = {"loss": loss / steps}
    for name, error, count in (("base", *errors[:2]), ("aux", *errors[2:])):
        if sum(count):
            line[name] = sum(error) / sum(count)
            line |= {f"{name}_sigma_{q}": e / n for q, (e, n) in enumerate(zip(error, count), 1) if n}
    return line | {"grad_norm": grad_norm / steps}


class Run:
    """What rank 0 writes beside checkpoints: settings.json, metrics.jsonl cut off after step start, TensorBoard."""

    def __init__(self, output_dir: Path, settings: dict, start: int):
        output_dir.mkdir(parents=True, exist_ok=True)
        save_whole(json.dumps(settings, indent=1) + "\n", output_dir / "settings.json")
        (output_dir / "final").unlink(missing_ok=True)
        for path in output_dir.glob(".checkpoint-*"):  # of a run that was killed while it saved or deleted
            shutil.rmtree(path)
        file = output_dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        save_whole("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= start), file)
        self.file = file.open("a", buffering=1)
        self.writer = SummaryWriter(output_dir / "tensorboard", purge_step=start + 1)

    def log(self, line: dict[str, float]) -> None:
        self.file.write(json.dumps(line) + "\n")
        os.fsync(self.file.fileno())
        for name, value in line.items():
            self.writer.add_scalar(name, value, line["step"])


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGTERM, SIGINT and SIGUSR1 do nothing within but to be listed."""
    noted, numbers = [], (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- Training ---------------------------------------------------------------------------------------------------------


def make_velocity(ddp: torch.nn.Module, device: torch.device, bf16: bool) -> Velocity:
    """The model as soar_terms calls it."""

    def velocity(z: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return ddp(z, timestep=1000 * sigma, return_dict=False, **cond)[0]

    return velocity


def add_gradients(terms: Iterator[Term], num_terms: int, ddp: torch.nn.Module, sums: Tensor, last: bool) -> None:
    """Add the terms' gradients, one graph alive at a time, and their errors to sums, as add_term does.
    last: no micro-batch of the step follows, so gradients are averaged over the ranks, once, in the last backward."""
    # With a context around velocity's own, the bf16 copies of the weights are made once, in the base term: all terms
    # use them, and their backward passes go through the same cast. Off, so that backward passes run as ever.
    with torch.autocast(sums.device.type, enabled=False):
        for i in range(num_terms):
            with contextlib.nullcontext() if last and i == num_terms - 1 else ddp.no_sync():
                term = next(terms)
                term.loss.backward()
            add_term(sums, term, auxiliary=i > 0)
            del term


def update(optimizer, max_grad_norm: float, sums: Tensor, bad: Tensor, step: int) -> Tensor:
    """Clip gradients and update, on all ranks alike, unless this step or one before was not finite; complete sums.
    Returns the first step that was not finite, 0 if none. bad: what it returned last. Never waits for the device."""
    dist.all_reduce(sums)
    sums[4, 0] /= dist.get_world_size()
    sums[4, 1] = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    sums[4, 2] = 1
    bad = torch.where((bad == 0) & ~sums.isfinite().all(), step, bad)
    local(optimizer).found_inf = (bad > 0).float()  # from then on, no update: the last good weights stay
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # they stay views of DDP's buckets: no second copy while terms add up
    return bad


def validate(args: Args, pipe, transformer, uncond, rows: list[dict], step: int, cpu, run) -> None:
    """An image per prompt, made in batches that the ranks share out, as a grid in output_dir and in TensorBoard."""
    side, size = args.resolution // pipe.vae_scale_factor, args.train_batch_size
    images = torch.zeros(len(rows), args.resolution, args.resolution, 3, dtype=torch.uint8)
    transformer.eval()
    for start in range(dist.get_rank() * size, len(rows), dist.get_world_size() * size):
        part = range(start, min(start + size, len(rows)))
        shape = (transformer.config.in_channels, side, side)
        z1 = torch.stack([torch.randn(shape, generator=seeded(args.seed, "validation", i)) for i in part])
        cond = encode_prompts(pipe, [rows[i]["prompt"] for i in part], args.max_sequence_length)
        empty = {key: x[: len(part)] for key, x in uncond.items()}
        autocast = torch.autocast(pipe.vae.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")
        with autocast, torch.compiler.set_stance("force_eager"):  # compiled, it would take graphs for shapes of its own
            steps, w = args.num_sampling_steps, args.guidance_scale
            made = sample_images(pipe, transformer, z1, cond, empty, steps, w)
        images[part.start : part.stop] = torch.from_numpy(np.stack([np.asarray(image) for image in made]))
    transformer.train()
    dist.all_reduce(images, group=cpu)  # each is 0 on all ranks but the one that made it
    if run is not None:
        columns = max(c for c in range(1, 9) if len(rows) % c == 0)
        grid = make_image_grid([Image.fromarray(x.numpy()) for x in images], len(rows) // columns, columns)
        save_whole(grid, args.output_dir / f"validation-{step:06d}.png")
        run.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")


def main(args: Args) -> None:
    with contextlib.ExitStack() as stack:
        train(args, stack)
    # Only now, with train's frame gone and DDP with it. Were DDP to hold the last reference to the group, it would wait
    # for gloo's threads while it holds the interpreter's lock, and they for that lock (seen with torch 2.13).
    dist.destroy_process_group()


def train(args: Args, stack: contextlib.ExitStack) -> None:
    """A run from its checks to its last checkpoint, or to one that a signal asks for. stack: unwound after it."""
    checkpoint = find_start(args)
    prompts = read_prompts(args.validation_prompts) if args.validation_prompts else []
    accumulation, output_dir = args.gradient_accumulation_steps, args.output_dir
    rank, world_size, device = init_distributed()
    global_batch = args.global_batch(world_size)
    cpu = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # for what hosts agree on, and their long waits

    pairs = Pairs(args) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None  # one process a node checks the rows
    dist.barrier(group=cpu)
    pairs = Pairs(args) if pairs is None else pairs
    if len(pairs) < global_batch:
        raise ValueError(f"--dataset {args.dataset} has {len(pairs)} pairs, a global batch takes {global_batch}")
    settings, state = args.settings(world_size, pairs.digest), {"step": 0, "sums": [[0.0] * 4] * 5}
    if checkpoint:
        check_settings(settings, checkpoint / "trainer_state.json")
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    if (output_dir / "settings.json").is_file():
        check_settings(settings, output_dir / "settings.json")
    start = state["step"]
    if start > args.max_train_steps:
        raise ValueError(f"--max_train_steps is {args.max_train_steps}, but {checkpoint} is at step {start}")

    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    encoders = torch.device(args.text_encoder_device or device)
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, device, encoders)
    if pipe.scheduler.config.shift != args.shift:
        raise ValueError(f"--shift is {args.shift}, but the pipeline samples with shift {pipe.scheduler.config.shift}")
    transformer = load_trainable(args, checkpoint, dtype, device)
    check_size(pipe, transformer, resolution=args.resolution)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ddp = make_ddp(transformer)
    parameters, velocity = trained(transformer), make_velocity(ddp, device, dtype == torch.bfloat16)
    optimizer = make_optimizer(args, parameters, checkpoint)
    lr_factor = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    ).lr_lambdas[0]  # a function of the step: no state to save

    side = args.resolution // pipe.vae_scale_factor
    latents_shape = (global_batch, transformer.config.in_channels, side, side)
    uncond = encode_prompts(pipe, [""] * args.train_batch_size, args.max_sequence_length)
    num_terms = 1 + args.num_rollout_paths * args.num_aux_points if args.lambda_aux > 0 else 1
    rollout = num_terms > 1 and args.guidance_scale != 1
    for _ in range(2):  # DDP settles its buckets in the second backward, and gradients become views of them
        with FlopCounterMode(display=False) as counter:
            z = torch.zeros(latents_shape, device=device)[: args.train_batch_size]
            v = velocity(z, torch.ones(len(z), device=device), uncond)
        (0 * v.sum()).backward()
        optimizer.zero_grad(set_to_none=False)
    passes = 2 if args.lora_rank else 3  # of a term: weights that stay need no gradients of their own
    flops = counter.get_total_flops() * (passes * num_terms + rollout) * accumulation * world_size
    size = sum(x.numel() for x in parameters.values())
    modules = [transformer, *(x for x in pipe.components.values() if isinstance(x, torch.nn.Module))]
    frozen = sum(x.nbytes for m in modules for x in m.parameters() if not x.requires_grad and x.device == device)
    memory = (8 + 8 / (world_size if args.shard_optimizer else 1) + 2 * (dtype == torch.bfloat16)) * size + frozen
    if args.compile:
        compile_blocks(transformer)
    free = shutil.disk_usage(next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())).free
    if rank == 0:
        print(
            f"model        {checkpoint or args.pretrained_model_name_or_path}",
            f"trained      {size / 1e6:,.1f} M parameters; forwards in {str(dtype)[6:]}",
            f"pairs        {pairs.report}",
            f"global batch {global_batch} = {world_size} processes x {accumulation} x {args.train_batch_size}",
            f"steps        {args.max_train_steps}, {start} done; an epoch is {len(pairs) // global_batch}",
            f"a step       {num_terms} forwards with backwards{' and 1 without' * rollout}, {flops / 1e12:.2f} TFLOP",
            f"memory       {memory / 1e9:.2f} GB a device, and activations",
            f"written to   {output_dir}, {12 * size / 1e9:.2f} GB a checkpoint; {free / 1e9:.2f} GB are free",
            sep="\n", flush=True,
        )  # fmt: skip
    if free < 12 * size:
        raise OSError(f"--output_dir {output_dir}: {free / 1e9:.2f} GB are free, fewer than a checkpoint takes")
    if args.dry_run:
        return

    run = Run(output_dir, settings, start) if rank == 0 else None
    dist.barrier(group=cpu)
    if not (output_dir / "settings.json").is_file():
        raise FileNotFoundError(f"--output_dir {output_dir} is not seen by rank {rank}: give one that all nodes see")
    loader = DataLoader(
        pairs, batch_sampler=batch_keys(len(pairs), args, rank, world_size, start),
        num_workers=args.dataloader_num_workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    ram = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    peak_memory = torch.cuda.max_memory_allocated if device.type == "cuda" else ram
    gpu = torch.cuda.get_device_name() if device.type == "cuda" and dtype == torch.bfloat16 else ""
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    bar = tqdm(total=args.max_train_steps, initial=start, desc="steps", disable=rank > 0)
    noted = stack.enter_context(signals_noted())
    batches, step, stop, mark, mark_step = iter(loader), start, False, time.perf_counter(), start
    totals, bad = torch.tensor(state["sums"], dtype=torch.float64, device=device), torch.zeros((), device=device)

    while not stop:
        if prompts and (step % args.validation_steps == 0 or step == args.max_train_steps):
            validate(args, pipe, transformer, uncond, prompts, step, cpu, run)
            mark, mark_step = time.perf_counter(), step
        if step == args.max_train_steps:
            break
        step += 1
        generator = seeded(args.seed, "step", step)  # every rank draws for the global batch, takes its samples
        draws, vae_noise = draw(latents_shape, args, generator), torch.randn(latents_shape, generator=generator)
        # DDP averages gradients over the ranks, where the loss is a sum: hence the division.
        normalizer = loss_normalizer(draws.t, args).item() / world_size
        sums = torch.zeros(5, 4, dtype=torch.float64, device=device)
        for micro in range(accumulation):
            part, (pixels, captions) = batch_slice(micro, args, rank, world_size), next(batches)
            z0 = encode_images(pipe, to_device(pixels, device), to_device(vae_noise[part], device))
            cond = encode_prompts(pipe, captions, args.max_sequence_length)
            terms = soar_terms(velocity, z0, take(draws, part, device), cond, uncond, args, normalizer=normalizer)
            add_gradients(terms, num_terms, ddp, sums, last=micro == accumulation - 1)
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * lr_factor(step - 1)
        bad = update(optimizer, args.max_grad_norm, sums, bad, step)
        totals += sums
        bar.update()

        host = torch.tensor([max(noted, default=0), peak_memory() / 1e9], dtype=torch.float64)
        dist.all_reduce(host, dist.ReduceOp.MAX, group=cpu)
        stop, log = bool(host[0]), step % args.logging_steps == 0
        save = stop or step % args.checkpointing_steps == 0 or step == args.max_train_steps
        if (log or save) and bad:
            first = int(bad)
            sigma = sigma_from_t(draw(latents_shape, args, seeded(args.seed, "step", first)).t, args.shift)
            rows = [pairs.numbers[i] for i in step_rows(len(pairs), global_batch, args.seed, first)]
            raise FloatingPointError(
                f"loss or gradient of step {first} is not finite; nothing was updated or saved from there on. "
                f"Its sigma: {sigma.min():.4f} to {sigma.max():.4f}; its rows of {args.dataset}: {rows}"
            )
        if log:
            rate = (step - mark_step) / (time.perf_counter() - mark)
            line = {"step": step} | means(totals.tolist()) | {"lr": lr, "images_per_second": global_batch * rate}
            line |= {"tflops_per_second": flops * rate / 1e12, "peak_memory_gb": host[1].item()}
            line |= {"mfu": flops * rate / 1e12 / world_size / peak} if peak else {}
            totals.zero_()
            if rank == 0:
                run.log(line)
                shown = ("loss", "base", "aux", "grad_norm", "images_per_second")
                bar.set_postfix({key: f"{line[key]:.3g}" for key in shown if key in line})
        if save:
            path, found = output_dir / f"checkpoint-{step:06d}", moments(optimizer, parameters)
            if rank == 0:
                state = {"step": step, "settings": settings, "sums": totals.tolist()}
                save_checkpoint(path, transformer, found, state)
                kept = args.checkpoints_total_limit or step
                for old in checkpoints(output_dir)[:-kept]:
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # at once no checkpoint any more
            dist.barrier(group=cpu)
        if log or save:
            mark, mark_step = time.perf_counter(), step

    bar.close()
    if rank == 0:
        run.writer.close()
        if step < args.max_train_steps:
            name = signal.Signals(int(host[0])).name
            print(f"stopped by {name} after step {step}; the same command goes on from {path}", flush=True)
            return
        (output_dir / ".final").unlink(missing_ok=True)
        (output_dir / ".final").symlink_to(f"checkpoint-{step:06d}")
        (output_dir / ".final").rename(output_dir / "final")
        print(f"{output_dir}/checkpoint-{step:06d} is complete; to see it:")
        print(f"python sample.py --transformer {output_dir / 'final'} --prompts FILE --output_dir DIR", flush=True)


if __name__ == "__main__":
    record(main)(tyro.cli(Args, description=__doc__, use_underscores=True))
