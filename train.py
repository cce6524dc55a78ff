"""SOAR post-training of Stable Diffusion 3.5 (or 3) Medium, and SFT by the same path.

    torchrun --nproc_per_node 8 train.py --dataset DIR_OR_HUB_ID --output_dir output/soar
    torchrun --nproc_per_node 8 train.py --dataset DIR_OR_HUB_ID --output_dir output/sft --lambda_aux 0

`python train.py` runs one process. The defaults are the published run: 8 GPUs x 4 images, 5,000 steps. Written to
output_dir: metrics.jsonl, a line a step; checkpoint-NNNNNN/transformer, a diffusers directory; final, a link to the
last. Every random number is a function of (seed, step, sample): the number of GPUs changes only the order of sums.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import datasets
import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from sample import check_size, encode_prompts, init_distributed, load_pipeline, seeded
from soar import Draws, SoarConfig, draw, loss_normalizer, soar_terms


@dataclass(frozen=True, kw_only=True)
class Args(SoarConfig):
    """Settings of a run: SoarConfig's fields under their own names, and these."""

    num_aux_points: Annotated[int, tyro.conf.arg(aliases=["--trajectory_length"])] = SoarConfig.num_aux_points
    """N, auxiliary points a path; 0 is SFT."""
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--cfg_scale_sampling"])] = SoarConfig.guidance_scale
    """w of the rollout; 1 is unguided."""
    sde_type: Annotated[str, tyro.conf.arg(aliases=["--sde_rollout_type"])] = SoarConfig.sde_type
    """Step of rollout paths 2..M: simple, sde, flow_sde or cps."""
    dataset: str
    """An imagefolder directory (images, and metadata.jsonl with file_name and the caption column), or a hub id."""
    output_dir: Path
    """Where the run is written; must be empty or new."""
    image_column: str = "image"
    caption_column: str = "text"
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or directory of a Stable Diffusion 3 pipeline."""
    resolution: int = 512
    """Pixels; images are scaled to cover the square, then cropped at the centre."""
    train_batch_size: int = 4
    """Images a GPU and forward."""
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 5000
    checkpointing_steps: int = 1000
    learning_rate: float = 2e-5
    lr_scheduler: str = "constant"
    """A name that diffusers.optimization.get_scheduler knows; constant_with_warmup is the one that warms up."""
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """What forwards run in. Weights, optimizer, states, targets, losses and the VAE are float32."""
    gradient_checkpointing: bool = False
    max_sequence_length: int = 77
    """T5 tokens a caption is padded or cut to."""
    seed: int = 42
    dataloader_num_workers: int = 4

    def __post_init__(self):
        super().__post_init__()
        positive = "resolution train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps"
        for name in f"{positive} learning_rate max_grad_norm max_sequence_length".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected more than 0")
        for name in ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 0")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr_warmup_steps is not read by --lr_scheduler constant; use constant_with_warmup")

    def soar_config(self) -> SoarConfig:
        return SoarConfig(**{field.name: getattr(self, field.name) for field in fields(SoarConfig)})


# --- Data -------------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """(pixels (3, R, R) in [-1, 1], caption) by row number."""

    def __init__(self, args: Args):
        self.rows = datasets.load_dataset(args.dataset, split="train")
        for flag, column in (("image_column", args.image_column), ("caption_column", args.caption_column)):
            if column not in self.rows.column_names:
                raise ValueError(f"--{flag} {column}: {args.dataset} has the columns {self.rows.column_names}")
        if not isinstance(self.rows.features[args.image_column], datasets.Image):
            raise ValueError(f"--image_column {args.image_column} of {args.dataset} holds no images")
        self.args, self.processor = args, VaeImageProcessor(vae_scale_factor=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        row = self.rows[index]
        image, caption = ImageOps.exif_transpose(row[self.args.image_column]), row[self.args.caption_column]
        if not isinstance(caption, str) or not caption.strip():
            where = f"{self.args.dataset}, row {index}"
            raise ValueError(f"{where}: {self.args.caption_column} is {caption!r}, expected a text")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        size = self.args.resolution
        return self.processor.preprocess(image.convert("RGB"), size, size, resize_mode="crop")[0], caption


def batch_rows(num_rows: int, args: Args, rank: int, world_size: int) -> Iterator[list[int]]:
    """The rows of each forward of this rank, max_train_steps * gradient_accumulation_steps lists of train_batch_size.

    An epoch is a permutation of all rows, a function of (seed, epoch), cut into global batches; what is left over is
    dropped, and differs from epoch to epoch. Sample i of a global batch is the same for any split over ranks."""
    size = args.train_batch_size * args.gradient_accumulation_steps * world_size
    for step in range(args.max_train_steps):
        epoch, k = divmod(step, num_rows // size)
        if k == 0:
            order = torch.randperm(num_rows, generator=seeded(args.seed, "epoch", epoch)).tolist()
        for micro in range(args.gradient_accumulation_steps):
            part = batch_slice(micro, args, rank, world_size)
            yield order[k * size : (k + 1) * size][part]


def batch_slice(micro: int, args: Args, rank: int, world_size: int) -> slice:
    """Where the samples of a rank's forward stand in the global batch."""
    start = (micro * world_size + rank) * args.train_batch_size
    return slice(start, start + args.train_batch_size)


def take(draws: Draws, part: slice, device: torch.device) -> Draws:
    """The draws of some samples of the global batch, on device."""
    per_path = (None if x is None else x[:, part].to(device) for x in (draws.path_noise, draws.path_z1))
    return Draws(draws.z1[part].to(device), draws.t[part].to(device), draws.u[:, :, part].to(device), *per_path)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(transformer: SD3Transformer2DModel, output_dir: Path, step: int) -> Path:
    """Write output_dir/checkpoint-NNNNNN: beside, synced to disk, then renamed, so that it is whole or not there."""
    path, staging = output_dir / f"checkpoint-{step:06d}", output_dir / f".checkpoint-{step:06d}"
    transformer.save_pretrained(staging / "transformer")
    for written in (*staging.rglob("*"), staging):
        sync(written)
    staging.rename(path)
    sync(output_dir)
    return path


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# --- Training ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(pipe: StableDiffusion3Pipeline, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents z0 (B, C, h, w) float32, (x - shift_factor) * scaling_factor with x = mean + std * noise of the VAE."""
    posterior, config = pipe.vae.encode(pixels).latent_dist, pipe.vae.config
    return (posterior.mean + posterior.std * noise - config.shift_factor) * config.scaling_factor


def main(args: Args) -> None:
    train(args)
    # Only now, with train's frame gone and DDP with it. Were DDP to hold the last reference to the group, it would wait
    # for gloo's threads while it holds the interpreter's lock, and they for that lock (seen with torch 2.13).
    dist.destroy_process_group()


def train(args: Args) -> None:
    """All of a run, between checks of its settings and its last checkpoint."""
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir {args.output_dir} is not empty, expected a new one")
    config = args.soar_config()
    rank, world_size, device = init_distributed()
    accumulation = args.gradient_accumulation_steps
    global_batch = args.train_batch_size * accumulation * world_size

    pairs = Pairs(args) if rank == 0 else None  # rank 0 alone writes the data set's cache
    dist.barrier()
    pairs = pairs or Pairs(args)
    if len(pairs) < global_batch:
        raise ValueError(f"--dataset {args.dataset} has {len(pairs)} pairs, a global batch takes {global_batch}")
    loader = DataLoader(
        pairs, batch_sampler=list(batch_rows(len(pairs), args, rank, world_size)),
        num_workers=args.dataloader_num_workers, pin_memory=device.type == "cuda",
    )  # fmt: skip

    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, device)
    if pipe.scheduler.config.shift != args.shift:
        raise ValueError(f"--shift is {args.shift}, but the pipeline samples with shift {pipe.scheduler.config.shift}")
    transformer = SD3Transformer2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="transformer")
    check_size(pipe, transformer, resolution=args.resolution)
    transformer.to(device).train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ddp = DistributedDataParallel(transformer, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(transformer.parameters(), args.learning_rate, weight_decay=args.adam_weight_decay)
    lr_schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )

    def velocity(z: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            return ddp(z, timestep=1000 * sigma, return_dict=False, **cond)[0]

    side = args.resolution // pipe.vae_scale_factor
    latents_shape = (global_batch, transformer.config.in_channels, side, side)
    uncond = encode_prompts(pipe, [""] * args.train_batch_size, args.max_sequence_length)
    num_terms = 1 + config.num_rollout_paths * config.num_aux_points if config.lambda_aux > 0 else 1
    args.output_dir.mkdir(parents=True, exist_ok=True)
    metrics = (args.output_dir / "metrics.jsonl").open("a", buffering=1) if rank == 0 else None
    bar, batches = tqdm(total=args.max_train_steps, desc="steps", disable=rank > 0), iter(loader)

    for step in range(1, args.max_train_steps + 1):
        started, sums = time.perf_counter(), torch.zeros(3, device=device)
        generator = seeded(args.seed, "step", step)  # every rank draws for the global batch, and takes its samples
        draws, vae_noise = draw(latents_shape, config, generator), torch.randn(latents_shape, generator=generator)
        normalizer = loss_normalizer(draws.t, config)
        for micro in range(accumulation):
            part, (pixels, captions) = batch_slice(micro, args, rank, world_size), next(batches)
            z0 = encode_images(pipe, pixels.to(device), vae_noise[part].to(device))
            cond = encode_prompts(pipe, captions, args.max_sequence_length)
            # DDP averages gradients over the ranks, where the loss is a sum: hence normalizer / world_size.
            terms = soar_terms(
                velocity, z0, take(draws, part, device), cond, uncond, config, normalizer=normalizer.item() / world_size
            )
            for i in range(num_terms):
                last = micro == accumulation - 1 and i == num_terms - 1
                with contextlib.nullcontext() if last else ddp.no_sync():  # one all-reduce a step, in the last backward
                    term = next(terms)
                    term.loss.backward()
                sums[0] += term.loss.detach() / world_size
                sums[1 if i == 0 else 2] += term.error.sum()
        grad_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(sums)
        loss, base, aux = sums.tolist()
        line = {"step": step, "loss": loss, "base": base / global_batch}
        if num_terms > 1:
            line["aux"] = aux * config.lambda_aux / (normalizer.item() - global_batch)
        line |= {"grad_norm": grad_norm.item(), "lr": lr_schedule.get_last_lr()[0]}
        line["images_per_second"] = global_batch / (time.perf_counter() - started)
        lr_schedule.step()
        if rank == 0:
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{value:.3g}" for key, value in line.items() if key != "step"})
            bar.update()
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                path = save_checkpoint(transformer, args.output_dir, step)

    if rank == 0:
        (args.output_dir / "final").symlink_to(path.name)
        bar.close()
        print(f"{path}\nto see it: python sample.py --transformer {args.output_dir / 'final'} --prompts FILE")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
