"""Images for evaluation, in GenEval's folder layout.

    python sample.py --prompt "a photo of a bench" --output_dir output/bench
    torchrun --nproc_per_node 8 sample.py --prompts evaluation_metadata.jsonl --output_dir output/geneval \\
        --transformer output/soar/final

writes output_dir/00000/metadata.jsonl (the prompt's line), 00000/samples/00000.png ... and 00000/grid.png, a folder a
prompt. The initial noise of an image is a function of (seed, prompt index, image index), and the images of a batch one
of (prompts, batch_size), whichever process makes it: files do not depend on the number of processes. Another batch size
runs other kernels: on the CPU in float32 that is worth at most one grey level. States are float32 always.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from soar import guided_velocity


@dataclass(frozen=True)
class Args:
    output_dir: Path
    """Where the folders are written; must be empty or new."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or directory of a Stable Diffusion 3 pipeline."""
    transformer: Path | None = None
    """A checkpoint of train.py, or any diffusers transformer directory; by default the pipeline's own."""
    prompts: Path | None = None
    """A .jsonl file, one object with a "prompt" a line, or a .txt file, one prompt a line."""
    prompt: str | None = None
    """A single prompt, in place of --prompts."""
    num_images_per_prompt: int = 4
    num_inference_steps: int = 40
    guidance_scale: float = 4.5
    """w of v_uncond + w (v_cond - v_uncond); 1 is unguided."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    seed: int = 42
    batch_size: int = 4
    """Images per forward and process; guidance doubles it."""
    max_sequence_length: int = 77
    """T5 tokens a prompt is padded or cut to: as in training, or the images differ, for SD3 does not mask padding."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """What the transformer and the text encoders run in. The VAE and all states are float32."""

    def __post_init__(self):
        counts = "num_images_per_prompt num_inference_steps height width batch_size max_sequence_length"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give either --prompts FILE or --prompt TEXT")


# --- Shared with train.py ---------------------------------------------------------------------------------------------


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process, under torchrun or alone; nccl on CUDA, gloo on CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return dist.get_rank(), dist.get_world_size(), device


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of key alone, such as (seed, "step", 17)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def load_pipeline(name_or_path: str, dtype: torch.dtype, device: torch.device) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer: text encoders in dtype, the VAE in float32, all frozen, on device.

    Raises OSError: nothing is there, or it is not a pipeline (diffusers' message)."""
    pipe = StableDiffusion3Pipeline.from_pretrained(name_or_path, transformer=None, torch_dtype=dtype)
    pipe.vae.to(dtype=torch.float32)
    for module in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if module is not None:
            module.requires_grad_(False).eval().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
    """The transformer's conditioning: encoder_hidden_states (B, CLIP's tokens and T5's, D), pooled_projections (B, D').

    Source: diffusers' StableDiffusion3Pipeline.encode_prompt."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=pipe.vae.device, **options)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def check_size(pipe: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel, **pixels: int) -> None:
    """Raises ValueError: a height, width or resolution that the VAE and the patches do not divide, or is too large."""
    unit = pipe.vae_scale_factor * transformer.config.patch_size
    for flag, size in pixels.items():
        if size % unit or size > unit * transformer.config.pos_embed_max_size:
            most = unit * transformer.config.pos_embed_max_size
            raise ValueError(f"--{flag} is {size}, expected a multiple of {unit} pixels, at most {most}")


# --- Prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file, each a dict with a non-empty "prompt"; the rest of a .jsonl object is kept as it is.

    Raises ValueError: names the file, the line and what is wrong with it; OSError: it cannot be read."""
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: expected a .jsonl or a .txt file")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty, expected a prompt a line")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{path}, line {number}: no "prompt", or one that is empty or not a text')
        rows.append(row)
    return rows


# --- Sampler ----------------------------------------------------------------------------------------------------------


def load_transformer(args: Args, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """The transformer of --transformer, or the pipeline's own, for inference. Raises OSError: none is there."""
    path, subfolder = args.transformer or args.pretrained_model_name_or_path, "transformer"
    if args.transformer and not (args.transformer / subfolder).is_dir():
        subfolder = None
    model = SD3Transformer2DModel.from_pretrained(path, subfolder=subfolder, torch_dtype=dtype)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def sample_images(
    pipe: StableDiffusion3Pipeline, transformer, z1: Tensor, cond: dict, uncond: dict, steps: int, guidance_scale: float
) -> list[Image.Image]:
    """Images from noise z1 (B, C, h, w) float32 on the CPU, by Euler steps of the pipeline's own scheduler.

    cond, uncond: as encode_prompts returns them, for B prompts. What StableDiffusion3Pipeline computes, with the states
    in float32; both branches share a forward. Source: diffusers' StableDiffusion3Pipeline.__call__."""
    guided = guidance_scale != 1
    both = {key: torch.cat([uncond[key], cond[key]]) for key in cond} if guided else cond
    z, dtype = z1.to(pipe.vae.device), next(transformer.parameters()).dtype
    pipe.scheduler.set_timesteps(steps, device=z.device)
    for timestep in pipe.scheduler.timesteps:
        z_in = torch.cat([z, z]) if guided else z
        v = transformer(z_in.to(dtype), timestep=timestep.expand(len(z_in)), return_dict=False, **both)[0]
        v = guided_velocity(*v.chunk(2), guidance_scale) if guided else v.float()
        z = pipe.scheduler.step(v, timestep, z, return_dict=False)[0]
    latents = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


def save_whole(image: Image.Image, path: Path) -> None:
    """Write a PNG beside path, then rename: path never holds half an image."""
    image.save(path.with_suffix(".tmp"), format="PNG")
    path.with_suffix(".tmp").rename(path)


def main(args: Args) -> None:
    rows = [{"prompt": args.prompt}] if args.prompts is None else read_prompts(args.prompts)
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir {args.output_dir} is not empty, expected a new one")

    rank, world_size, device = init_distributed()
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, device)
    transformer = load_transformer(args, dtype, device)
    check_size(pipe, transformer, height=args.height, width=args.width)
    shape = (transformer.config.in_channels, args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    folders = [args.output_dir / f"{index:05d}" for index in range(len(rows))]
    dist.barrier()  # no rank writes before each has seen that output_dir is empty

    for row, folder in list(zip(rows, folders))[rank::world_size]:
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    dist.barrier()

    work = [(i, j) for i in range(len(rows)) for j in range(args.num_images_per_prompt)]
    batches = [work[start : start + args.batch_size] for start in range(0, len(work), args.batch_size)]
    batches = batches[rank::world_size]
    # One prompt at a time: its embeddings then do not depend on the batch it is in.
    encode = lambda prompt: encode_prompts(pipe, [prompt], args.max_sequence_length)  # noqa: E731
    wanted = sorted({i for batch in batches for i, _ in batch})
    embeds, empty = {i: encode(rows[i]["prompt"]) for i in wanted}, encode("")
    bar = tqdm(total=sum(map(len, batches)), desc=f"images of rank 0 of {world_size}", disable=rank > 0)
    for batch in batches:
        z1 = torch.stack([torch.randn(shape, generator=seeded(args.seed, i, j)) for i, j in batch])
        cond = {key: torch.cat([embeds[i][key] for i, _ in batch]) for key in empty}
        uncond = {key: x.expand(len(batch), *x.shape[1:]) for key, x in empty.items()}
        images = sample_images(pipe, transformer, z1, cond, uncond, args.num_inference_steps, args.guidance_scale)
        for (i, j), image in zip(batch, images):
            save_whole(image, folders[i] / "samples" / f"{j:05d}.png")
        bar.update(len(batch))
    dist.barrier()

    for folder in folders[rank::world_size]:
        images = [Image.open(folder / "samples" / f"{j:05d}.png") for j in range(args.num_images_per_prompt)]
        columns = max(c for c in range(1, 5) if len(images) % c == 0)
        save_whole(make_image_grid(images, len(images) // columns, columns), folder / "grid.png")
    dist.barrier()
    if rank == 0:
        print(f"{len(rows) * args.num_images_per_prompt} images of {len(rows)} prompts in {args.output_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
