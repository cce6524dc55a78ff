"""What train.py and sample.py share: the processes, seeds, whole files, prompt files, and Stable Diffusion 3.

Weights are read from safetensors files only, no pickle."""

import csv
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from soar import guided_velocity


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process, under torchrun or alone; nccl on CUDA, gloo on CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun may keep its store when it restarts: without a name for each try, old addresses would be found there.
        store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    return dist.get_rank(), dist.get_world_size(), device


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of key alone, such as (seed, "step", 17)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on device, by a copy that the host does not wait for: only a copy from pinned memory is one."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_whole(image: Image.Image | str, path: Path) -> None:
    """Write a PNG, or a text, beside path, to the disk, then rename: path never holds half of it. Raises OSError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            file.write(image.encode()) if isinstance(image, str) else image.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file, each a dict with a non-empty "prompt"; other fields of .jsonl and .csv are kept.

    Raises ValueError: names the file, the line and what is wrong with it; OSError: it cannot be read."""
    if path.suffix not in (".jsonl", ".txt", ".csv"):
        raise ValueError(f"{path}: expected a .jsonl, .txt or .csv file")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path} is empty, expected a prompt a line")
    texts, rows, reader = (line.decode() for line in lines), [], None  # decoded one by one: an error has its line
    try:
        if path.suffix == ".csv":
            reader = csv.reader((text + "\n" for text in texts), strict=True)
            columns = ["prompt" if name.strip().lower() in ("prompt", "prompts") else name for name in next(reader)]
            records = (dict(zip(columns, cells, strict=True)) for cells in reader)
        else:
            records = map(json.loads, texts) if path.suffix == ".jsonl" else ({"prompt": text} for text in texts)
        for row in records:
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise ValueError('no "prompt", or one that is empty or not a text')
            rows.append(row)
    except (ValueError, csv.Error) as error:
        problem = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path}, line {reader.line_num if reader else len(rows) + 1}: {problem}") from None
    if not rows:
        raise ValueError(f"{path} holds a header and no prompt")
    return rows


# --- Stable Diffusion 3 -----------------------------------------------------------------------------------------------


def load_pipeline(
    name_or_path: str, dtype: torch.dtype, device: torch.device, text_encoder_device: torch.device | None = None
) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer: text encoders in dtype, the VAE in float32, all frozen, on device.

    Raises OSError: nothing is there, or it is not a pipeline, or not in safetensors (diffusers' message)."""
    dtypes = {"vae": torch.float32, "default": dtype}
    options = {"transformer": None, "dtype": dtypes, "use_safetensors": True}
    pipe = StableDiffusion3Pipeline.from_pretrained(name_or_path, **options)
    for module in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if module is not None:
            module.requires_grad_(False).eval().to(device if module is pipe.vae else text_encoder_device or device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_transformer(
    name_or_path: str, weights: Path | None, dtype: torch.dtype, device: torch.device
) -> SD3Transformer2DModel:
    """A transformer in dtype, frozen, on device: that of the pipeline name_or_path, or of the directory weights, or the
    pipeline's with the LoRA file weights merged into it in float32.

    Raises ValueError: names a tensor that is missing, superfluous or of another shape; OSError: nothing is there."""
    lora = weights is not None and weights.is_file()
    path, subfolder = (weights, None) if weights and not lora else (name_or_path, "transformer")
    options = {"dtype": torch.float32 if lora else dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = SD3Transformer2DModel.from_pretrained(path, subfolder=subfolder, **options)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if lora:
        modules = {f"transformer.{name}" for name, _ in model.named_modules()}
        with safe_open(weights, "pt") as file:  # diffusers would leave out what it does not know
            wrong += [key for key in file.keys() if key.split(".lora")[0].removesuffix(".alpha") not in modules]
    if wrong:
        raise ValueError(f"{weights or path} does not fit {name_or_path}: it lacks, or has no place for, {wrong[0]}")
    if lora:
        try:
            model.load_lora_adapter(str(weights), prefix="transformer", use_safetensors=True)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {name_or_path}: {error}") from None
        model.fuse_lora()
        model.unload_lora()
        model.to(dtype)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int) -> dict[str, Tensor]:
    """The transformer's conditioning, on the VAE's device: encoder_hidden_states (B, CLIP's tokens and T5's, D),
    pooled_projections (B, D'). Source: diffusers' StableDiffusion3Pipeline.encode_prompt."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=pipe.text_encoder.device, **options)
    made = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return {key: to_device(x, pipe.vae.device) for key, x in made.items()}


@torch.no_grad()
def encode_images(pipe: StableDiffusion3Pipeline, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents z0 (B, C, h, w) float32, (x - shift_factor) * scaling_factor with x = mean + std * noise of the VAE."""
    posterior, config = pipe.vae.encode(pixels).latent_dist, pipe.vae.config
    return (posterior.mean + posterior.std * noise - config.shift_factor) * config.scaling_factor


def check_size(pipe: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel, **pixels: int) -> None:
    """Raises ValueError: a height, width or resolution that the VAE and the patches do not divide, or is too large."""
    unit = pipe.vae_scale_factor * transformer.config.patch_size
    for flag, size in pixels.items():
        if size % unit or size > unit * transformer.config.pos_embed_max_size:
            most = unit * transformer.config.pos_embed_max_size
            raise ValueError(f"--{flag} is {size}, expected a multiple of {unit} pixels, at most {most}")


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
