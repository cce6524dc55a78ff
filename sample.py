"""Images for evaluation, in GenEval's folder layout; and what train.py needs of Stable Diffusion 3.

    python sample.py --prompt "a photo of a bench" --output_dir output/bench
    torchrun --nproc_per_node 8 sample.py --prompts evaluation_metadata.jsonl \\
        --output_dir output/geneval --transformer base output/sft/final output/soar/final

For each prompt it writes a folder: NNNNN/metadata.jsonl (the prompt's line of the file),
NNNNN/samples/NNNNN.png and NNNNN/grid.png. At the end it writes samples.jsonl, one line per image.
protocol.json holds what the images depend on. A single transformer writes to output_dir itself.
Several write to a folder each, named after the path given (output/soar/final: output-soar-final),
and compare.png shows them side by side. A run that was killed goes on by the same command.

The noise of an image is a function of (seed, prompt index, image index). Batches of images and of
texts are cut before the processes share them out, and a batch that was left half done is computed
whole. So the files are the same for any number of processes, resumed or not: to the byte on one
kind of machine. Another batch_size runs other kernels, which on a CPU in float32 is worth at most
one grey level. States are always float32. Weights are read from safetensors files only.
"""

import contextlib
import csv
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import

import diffusers
import torch
import torch.distributed as dist
import transformers
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from soar import guided_velocity

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading: one bar for each part and rank

ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
# What a transformer must share with the pipeline's own to take its place.
FIT = (
    "_class_name", "in_channels", "out_channels", "patch_size", "pos_embed_max_size",
    "joint_attention_dim", "pooled_projection_dim",
)  # fmt: skip
LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers gives such files
PEFT = "adapter_config.json"  # beside a LoRA file of peft: its alpha, among others


@dataclass(frozen=True)
class Args:
    output_dir: Path
    """Where images are written, on a disk that all nodes see: new, empty, or holding the run that
    is to go on."""
    transformer: tuple[str, ...] = ("base",)
    """One or several: checkpoints of train.py, diffusers transformer folders, LoRA files, or base,
    the pipeline's own."""
    prompts: Path | None = None
    """A file of prompts: .jsonl with "prompt" on each line; .txt, one per line; .csv or .tsv with a
    column prompt."""
    prompt: str | None = None
    """A single prompt, in place of --prompts."""
    num_images_per_prompt: int = 4
    """Images per prompt, each from noise of its own."""
    num_inference_steps: int = 40
    """Euler steps."""
    guidance_scale: float = 4.5
    """w of v_uncond + w (v_cond - v_uncond); 1 is unguided."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    seed: int = 42
    """Of the noise."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or folder of a Stable Diffusion 3 pipeline."""
    batch_size: int = 4
    """Images per forward and process; guidance doubles it."""
    max_sequence_length: int | None = None
    """T5 tokens that a prompt is padded or cut to; by default as in training, else 77. SD3 does not
    mask padding, so images depend on it."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """What the transformer and the text encoders run in. The VAE and all states are float32."""
    compile: bool = False
    """torch.compile the transformer: the first batch is slow, others are faster."""
    offload_text_encoders: bool = False
    """Free the text encoders once the prompts are encoded, before the transformer is loaded."""

    def __post_init__(self):
        counts = (
            "num_images_per_prompt", "num_inference_steps", "height", "width", "batch_size",
            "max_sequence_length",
        )  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale is {self.guidance_scale}, expected a finite number")
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give either --prompts FILE or --prompt TEXT")


# --- Processes, random numbers, files -------------------------------------------------------------


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) under torchrun or alone; nccl on CUDA, gloo on a CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun may keep its store when it restarts the ranks; a name for each attempt keeps
        # them from finding the addresses of the attempt before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return rank, world_size, device


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of key alone, such as (seed, "step", 17)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on device. From pinned memory, as here, the host does not wait for the copy."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_whole(content: Image.Image | str, path: Path) -> None:
    """Write a PNG or a text so that path never holds half of it: beside it, to the disk, renamed.
    Raises OSError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def visible(folder: Path) -> list[Path]:
    """What a folder holds, but for hidden files (locks, unfinished writes, .DS_Store) and what a
    fresh disk has."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in paths if path.name != "lost+found")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it for this process, whose end, of any kind, frees it.
    Raises RuntimeError: another process holds it, and names it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept by children
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RuntimeError(f"--output_dir {folder} is in use by {file.read()}") from None
        except OSError as error:  # some network disks have no locks
            print(f"warning: {folder} can't be locked ({error}), start no second run there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def digest(path: Path) -> str:
    """SHA-256 of a file (of a LoRA file: with peft's settings, if they lie beside it), or of the
    weights and settings in a folder, wherever it lies: of its safetensors, text and JSON files, the
    latter without _name_or_path and the like. Hidden files do not count."""
    if path.is_file():
        with path.open("rb") as file:
            result = hashlib.file_digest(file, "sha256")
        if path.suffix == ".safetensors" and path.with_name(PEFT).is_file():
            result.update(path.with_name(PEFT).read_bytes())
        return result.hexdigest()
    parts = []
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if name.startswith(".") or "/." in name:
            continue
        if file.suffix in (".safetensors", ".txt", ".model"):
            parts.append([name, digest(file)])
        elif file.suffix == ".json" and not file.name.endswith(".index.json"):
            content = json.loads(file.read_text())
            if isinstance(content, dict):
                content = {key: x for key, x in content.items() if not key.startswith("_")}
            parts.append([name, content])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_prompts(path: Path) -> list[dict]:
    """The prompts of a file, each a dict with a non-empty "prompt"; other fields of .jsonl, .csv
    and .tsv are kept. Raises ValueError, which names file, line and fault; OSError."""
    readers = {".jsonl": read_jsonl, ".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file whose name ends with {', '.join(readers)}")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path} is empty, expected prompts")
    rows = []
    for number, row in readers[path.suffix](path, lines):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            fault = 'no "prompt", or one that is empty or not a text'
            raise ValueError(f"{path}, line {number}: {fault}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds a header and no prompt")
    return rows


def _decoded(path: Path, lines: list[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def read_jsonl(path: Path, lines: list[bytes]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a file. Raises ValueError, which names the line."""
    for number, text in _decoded(path, lines):
        try:
            yield number, json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None


def _read_txt(path: Path, lines: list[bytes]) -> Iterator[tuple[int, dict]]:
    for number, text in _decoded(path, lines):
        yield number, {"prompt": text}


def _read_csv(path: Path, lines: list[bytes]) -> Iterator[tuple[int, dict]]:
    texts = (text + "\n" for _, text in _decoded(path, lines))
    if path.suffix == ".tsv":  # quotes are part of the text there, as in PartiPrompts
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts, strict=True)
    try:
        header = next(reader)
        names = ["prompt" if x.strip().lower() in ("prompt", "prompts") else x for x in header]
        if names.count("prompt") != 1:
            raise ValueError(f"expected one column prompt, the header has {header}")
        for cells in reader:
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells, the header has {len(names)}")
            yield reader.line_num, dict(zip(names, cells))
    except (ValueError, csv.Error) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


# --- Stable Diffusion 3: load ---------------------------------------------------------------------


def load_pipeline(
    name_or_path: str, dtype: torch.dtype, device: torch.device,
    text_encoder_device: torch.device | None = None,
) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer, frozen: text encoders in dtype, the VAE in float32.
    Raises OSError: it is not there, or not in safetensors; ValueError: weights do not fit."""
    index = StableDiffusion3Pipeline.load_config(name_or_path)
    parts = {"vae": _load(AutoencoderKL, name_or_path, "vae", torch.float32).to(device)}
    for name, kind in ENCODERS.items():
        if index.get(name, [None])[0] is None:
            raise ValueError(f"{name_or_path}: it has no {name}, and all three encoders are needed")
        encoder = _load(kind, name_or_path, name, dtype)
        parts[name] = encoder.to(text_encoder_device or device)
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipe = StableDiffusion3Pipeline.from_pretrained(name_or_path, transformer=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_transformer(
    name_or_path: str, weights: Path | None, dtype: torch.dtype, device: torch.device
) -> SD3Transformer2DModel:
    """A transformer in dtype, frozen, on device: that of the pipeline name_or_path, or of the
    folder weights, or the pipeline's with the LoRA file weights merged into it in float32.
    Raises ValueError: weights do not fit, names one; OSError: nothing is there."""
    if weights is not None and weights.is_dir():
        model = _load(SD3Transformer2DModel, weights, None, dtype)
    elif weights is None:
        model = _load(SD3Transformer2DModel, name_or_path, "transformer", dtype)
    else:
        model = _load(SD3Transformer2DModel, name_or_path, "transformer", torch.float32)
        load_lora(model, weights)
        model.fuse_lora()
        model.unload_lora()
        torch.nn.Module.to(model, dtype)  # diffusers' own warns, though nothing must stay float32
    return model.requires_grad_(False).eval().to(device)


def _load(kind: type, name_or_path: str | Path, subfolder: str | None, dtype: torch.dtype):
    """kind.from_pretrained, of whose weights none is missing, left over or of another shape: the
    libraries fill what is missing with random numbers and pass over what is left."""
    options = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
    place = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
    if kind in ENCODERS.values():
        options["ignore_mismatched_sizes"] = True  # else transformers' error names no tensor
    try:
        model, info = kind.from_pretrained(name_or_path, subfolder=subfolder or "", **options)
    except ValueError as error:  # diffusers' names a tensor and no file
        raise ValueError(f"{place}: {error}") from None
    for name, came, expected in info["mismatched_keys"]:
        raise ValueError(f"{place}: {name} is {tuple(came)}, expected {tuple(expected)}")
    if info["missing_keys"]:
        raise ValueError(f"{place}: the weights lack {min(info['missing_keys'])}")
    if info["unexpected_keys"]:
        left_over = min(info["unexpected_keys"])
        raise ValueError(f"{place}: {kind.__name__} has no place for {left_over}")
    return model


# peft's settings of a LoRA that do not change what its matrices mean, or that load_lora heeds.
LORA_SETTINGS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "inference_mode", "task_type", "base_model_name_or_path", "revision",
    "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size", "peft_type",
    "peft_version",
)  # fmt: skip
# What other formats have in their keys, and how to make a file of diffusers from them.
FOREIGN_LORA = {
    r"base_model\.model\.": "it is peft's: PeftModel.from_pretrained(transformer, FOLDER), then "
    "transformer.save_lora_adapter(DIR) writes diffusers'",
    r"lora[._](down|up)\.|\.alpha$": "it is kohya's: name lora_down transformer.MODULE.lora_A.weight, "
    "and lora_up times alpha / rank transformer.MODULE.lora_B.weight",
}


def load_lora(model: SD3Transformer2DModel, file: Path) -> None:
    """Give model the matrices of a LoRA file in float32, as its adapter "default"; all else is
    frozen. The file is train.py's or diffusers': MODULE.lora_A.weight (r, in) and
    MODULE.lora_B.weight (out, r), with or without "transformer." before them, and with peft's
    settings in its metadata, else alpha = r.
    Raises ValueError, before model is changed, unless each tensor has its place and shape."""
    tensors, config = _read_lora(file)
    linear = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    ranks = {}
    for key, x in tensors.items():
        module, _, matrix = key.rpartition(".lora_")
        if module not in linear or matrix not in ("A.weight", "B.weight"):
            mends = [mend for form, mend in FOREIGN_LORA.items() if re.search(form, key)]
            fault = "; ".join([f"the model has no place for {key}", *mends])
            raise ValueError(f"{file} does not fit: {fault}")
        if matrix == "A.weight":
            ranks[module] = x.shape[:1]
    for module in {key.rpartition(".lora_")[0] for key in tensors}:
        rank, weight = ranks.get(module, ()), linear[module].weight
        expected = {"A": (*rank, weight.shape[1]), "B": (weight.shape[0], *rank)}
        for matrix, shape in expected.items():
            key = f"{module}.lora_{matrix}.weight"
            came = tuple(tensors[key].shape) if key in tensors else "missing"
            if came != shape or 0 in shape:
                raise ValueError(f"{file} does not fit: {key} is {came}, expected {shape}")
    try:
        model.load_lora_adapter(tensors, None, adapter_name="default", metadata=config or None)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{file}: its settings do not fit its matrices: {error}") from None
    for key, x in tensors.items():  # diffusers has cast them to the type of the frozen weights
        parameter = model.get_parameter(key.replace(".weight", ".default.weight"))
        parameter.data = x.to(parameter.device, torch.float32)


def _read_lora(file: Path) -> tuple[dict[str, Tensor], dict]:
    """A LoRA file's tensors and peft's settings, {} if there are none; without "transformer."."""
    try:
        with safe_open(file, "pt") as content:
            settings = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: content.get_tensor(key) for key in content.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} can't be read: {error}") from None
    if not tensors:
        raise ValueError(f"{file} holds no LoRA weights")
    prefix = "transformer." if all(key.startswith("transformer.") for key in tensors) else ""
    config = {key.removeprefix("transformer."): x for key, x in settings.items()}
    other = [key for key, x in config.items() if x and key not in LORA_SETTINGS]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        other.append("init_lora_weights")  # one that changes the frozen weights
    if other:
        raise ValueError(f"{file}: its setting {other[0]} is not supported")
    return {key.removeprefix(prefix): x for key, x in tensors.items()}, config


def check_size(
    pipe: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel, **pixels: int
) -> None:
    """Raises ValueError: the VAE and the patches do not divide a size in pixels (given by its
    flag's name), or the transformer has no positions for it."""
    unit = pipe.vae_scale_factor * transformer.config.patch_size
    most = unit * transformer.config.pos_embed_max_size
    for flag, size in pixels.items():
        if size % unit or size > most:
            expected = f"a multiple of {unit} pixels, at most {most}"
            raise ValueError(f"--{flag} is {size}, expected {expected}")


# --- Stable Diffusion 3: encode and sample --------------------------------------------------------


def _not_of_cuts(record: logging.LogRecord) -> bool:
    return not re.search("input was truncated|longer than the specified maximum", record.getMessage())


# count_cut says it once; the pipeline would at each call.
for _module in (StableDiffusion3Pipeline, PreTrainedTokenizerBase):
    logging.getLogger(_module.__module__).addFilter(_not_of_cuts)


def count_cut(pipe: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int) -> int:
    """How many texts have more tokens than a text encoder reads, which are cut."""
    limits = [
        (pipe.tokenizer, pipe.tokenizer_max_length),
        (pipe.tokenizer_2, pipe.tokenizer_max_length),
        (pipe.tokenizer_3, max_sequence_length),
    ]
    count = 0
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        cut = set()
        for tokenizer, most in limits:
            tokens = tokenizer(part).input_ids
            cut |= {i for i, x in enumerate(tokens) if len(x) > most}
        count += len(cut)
    return count


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int
) -> dict[str, Tensor]:
    """The transformer's conditioning, on the VAE's device: encoder_hidden_states (B, CLIP's tokens
    and T5's, D), pooled_projections (B, D'). Source: StableDiffusion3Pipeline.encode_prompt."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )  # fmt: skip
    return {
        "encoder_hidden_states": to_device(embeds, pipe.vae.device),
        "pooled_projections": to_device(pooled, pipe.vae.device),
    }


@torch.no_grad()
def encode_images(pipe: StableDiffusion3Pipeline, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents z0 (B, C, h, w) float32 of pixels (B, 3, H, W) in [-1, 1]: the sample of the VAE's
    posterior that noise ~ N(0, I), like z0, picks, shifted and scaled."""
    posterior = pipe.vae.encode(pixels).latent_dist
    x = posterior.mean + posterior.std * noise
    return (x - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@torch.no_grad()
def sample_images(
    pipe: StableDiffusion3Pipeline, transformer, z1: Tensor, cond: dict, uncond: dict,
    steps: int, guidance_scale: float,
) -> list[Image.Image]:
    """Images from noise z1 (B, C, h, w) float32, by Euler steps of the pipeline's own scheduler.
    cond, uncond: of encode_prompts, for B prompts; both branches of guidance share a forward.
    Source: StableDiffusion3Pipeline.__call__, which this equals but for float32 states."""
    guided = guidance_scale != 1
    if guided:
        cond = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
    z = z1.to(pipe.vae.device)
    dtype = next(transformer.parameters()).dtype
    pipe.scheduler.set_timesteps(steps, device=z.device)
    for timestep in pipe.scheduler.timesteps:
        z_in = torch.cat([z, z]) if guided else z
        timesteps = timestep.expand(len(z_in))
        v = transformer(z_in.to(dtype), timestep=timesteps, return_dict=False, **cond)[0].float()
        if guided:
            v_uncond, v_cond = v.chunk(2)
            v = guided_velocity(v_uncond, v_cond, guidance_scale)
        z = pipe.scheduler.step(v, timestep, z, return_dict=False)[0]
    latents = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


# --- What to sample, and where --------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoints in order of steps: the folders with a name that train.py gives."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        digits = path.name.removeprefix("checkpoint-")
        if re.fullmatch("[0-9]{6}|[1-9][0-9]{6,}", digits) and path.is_dir():
            found[int(digits)] = path
    return [found[step] for step in sorted(found)]


def find_weights(given: str) -> tuple[Path | None, dict]:
    """The transformer folder or LoRA file that --transformer names, None for base; and the
    trainer_state.json beside it, or {}. A folder of checkpoints stands for its newest.
    Raises FileNotFoundError: nothing of the kind is there; ValueError: two are."""
    if given == "base":
        return None, {}
    path = Path(given).resolve()
    run = checkpoints(path)
    for name in ("transformer", LORA, "config.json"):
        if run and (path / name).exists():
            fault = f"holds checkpoints and {name}"
            raise ValueError(f"--transformer {given} {fault}: name the one that is meant")
    path = run[-1] if run else path
    if path.suffix == ".safetensors" and path.is_file():
        weights = path
    elif (path / LORA).is_file():
        weights = path / LORA
    else:
        weights = path / "transformer" if (path / "transformer").is_dir() else path
        if not (weights / "config.json").is_file():
            kinds = "base, a run or checkpoint of train.py, a transformer folder, a LoRA file"
            fault = f"there is no {weights / 'config.json'}"
            raise FileNotFoundError(f"--transformer {given} is none of: {kinds}; {fault}")
    state = weights.parent / "trainer_state.json"
    return weights, json.loads(state.read_text()) if state.is_file() else {}


def check_fit(given: str, weights: Path | None, name_or_path: str) -> None:
    """Raises ValueError: a transformer folder's config is not one for the pipeline; names how."""
    if weights is None or weights.is_file():
        return
    base = SD3Transformer2DModel.load_config(name_or_path, subfolder="transformer")
    own = SD3Transformer2DModel.load_config(weights)
    other = [f"{key} is {own.get(key)}, not {base.get(key)}" for key in FIT]
    other = [x for x, key in zip(other, FIT) if own.get(key) != base.get(key)]
    if other:
        fault = f"--transformer {given} does not fit the pipeline {name_or_path}"
        raise ValueError(f"{fault}: {'; '.join(other)}")


@cache
def identity(name_or_path: str, part: str) -> str:
    """What tells a pipeline's weights from others, for the part "transformer" or "rest": the commit
    of a hub id, the digest of a folder."""
    if not Path(name_or_path).is_dir():
        options = {"subfolder": "transformer", "return_commit_hash": True}
        return SD3Transformer2DModel.load_config(name_or_path, **options)[1]
    if part == "transformer":
        return digest(Path(name_or_path, "transformer"))
    parts = []
    for name, kind in sorted(StableDiffusion3Pipeline.load_config(name_or_path).items()):
        folder = Path(name_or_path, name)
        if name != "transformer" and isinstance(kind, list) and folder.is_dir():
            parts.append([name, kind, digest(folder)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """The images of one transformer."""

    given: str  # as --transformer names it
    weights: Path | None  # its folder or LoRA file; None is the pipeline's own
    state: dict  # of the checkpoint
    folder: Path  # where its images go

    def protocol(self, args: Args, rows: list[dict], max_sequence_length: int) -> dict:
        """All that the images depend on. "from" says where weights came from, which does not
        matter: their digests do."""
        base = args.pretrained_model_name_or_path
        lora = self.weights is not None and self.weights.is_file()
        full = self.weights is not None and not lora
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(base, subfolder="scheduler")
        packages = ("torch", "diffusers", "transformers")
        return {
            "from": {
                "pipeline": base,
                "transformer": str(self.weights or "base"),
                "step": self.state.get("step"),
            },
            "pipeline": identity(base, "rest"),
            "transformer": digest(self.weights) if full else identity(base, "transformer"),
            "lora": digest(self.weights) if lora else None,
            "scheduler": scheduler["_class_name"],
            "shift": scheduler["shift"],
            "num_images_per_prompt": args.num_images_per_prompt,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "height": args.height,
            "width": args.width,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "max_sequence_length": max_sequence_length,
            "mixed_precision": args.mixed_precision,
            "compile": args.compile,
            "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        } | {package: version(package) for package in packages}


def plan(args: Args) -> tuple[list[Job], int]:
    """The jobs of the --transformer names, and max_sequence_length; reads configs, no weights.
    Raises ValueError, FileNotFoundError: names that cannot be used, or not together."""
    jobs, trained = [], {}
    for given in args.transformer:
        weights, state = find_weights(given)
        check_fit(given, weights, args.pretrained_model_name_or_path)
        parts = [part for part in Path(given).parts if part not in ("/", "..")]
        name = "-".join(parts) or Path(given).resolve().name  # . and .. have no parts
        name = name if len(args.transformer) > 1 else ""
        jobs.append(Job(given, weights, state, args.output_dir / name))
        if "settings" in state:
            trained[given] = state["settings"]["max_sequence_length"]
    if len({job.folder for job in jobs}) < len(jobs):
        names = " ".join(args.transformer)
        raise ValueError(f"--transformer {names}: two of these would write to one folder")
    if args.max_sequence_length is None and len(set(trained.values())) > 1:
        raise ValueError(f"give --max_sequence_length: the checkpoints were trained with {trained}")
    length = args.max_sequence_length or next(iter(trained.values()), 77)
    for given, own in trained.items():
        if own != length and os.environ.get("RANK", "0") == "0":
            print(f"warning: --max_sequence_length is {length}, but {given} was trained with {own}")
    return jobs, length


def check_folder(folder: Path, protocol: dict) -> None:
    """Raises ValueError: folder holds images of another protocol, and says where they differ; or
    other files and no protocol."""
    file = folder / "protocol.json"
    if not file.is_file():
        if visible(folder):
            fault = "is not empty and holds no run that could go on: no protocol.json"
            raise ValueError(f"--output_dir: {folder} {fault}")
        return
    was = json.loads(file.read_text())
    keys = [key for key in was | protocol if key != "from" and was.get(key) != protocol.get(key)]
    if keys:
        other = "; ".join(f"{key}: was {was.get(key)}, now {protocol.get(key)}" for key in keys)
        fault = f"{folder} was made under another protocol; {other}"
        raise ValueError(f"{fault}. Give another --output_dir")


def check_output(
    args: Args, rows: list[dict], jobs: list[Job], max_sequence_length: int
) -> list[dict]:
    """The jobs' protocols. Raises ValueError: output_dir, or a job's folder, is in other use."""
    files = [x for x in visible(args.output_dir) if x.is_file() and x.name != "compare.png"]
    if len(jobs) > 1 and files:
        fault = f"--output_dir {args.output_dir} holds other files than a comparison's"
        raise ValueError(f"{fault}, such as {files[0].name}: give another one")
    protocols = [job.protocol(args, rows, max_sequence_length) for job in jobs]
    for job, protocol in zip(jobs, protocols):
        check_folder(job.folder, protocol)
    return protocols


def prepare(folder: Path, rows: list[dict], protocol: dict) -> None:
    """Write all but images. protocol.json comes first, as it marks the folder as ours."""
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(json.dumps(protocol, indent=1) + "\n", folder / "protocol.json")
    for path in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        path.unlink()
    for i, row in enumerate(rows):
        (folder / f"{i:05d}/samples").mkdir(parents=True, exist_ok=True)
        save_whole(json.dumps(row) + "\n", folder / f"{i:05d}/metadata.jsonl")


# --- Sampling -------------------------------------------------------------------------------------


def encode_texts(
    pipe: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int
) -> dict[str, dict[str, Tensor]]:
    """encode_prompts' tensors without their first dimension, on the CPU, by text; also of ""."""
    texts = sorted({"", *texts})
    made = {}
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        encoded = encode_prompts(pipe, part, max_sequence_length)
        encoded = {key: x.cpu() for key, x in encoded.items()}
        for i, text in enumerate(part):
            made[text] = {key: x[i] for key, x in encoded.items()}
    return made


def stacked(embeds: dict[str, dict], texts: list[str], device: torch.device) -> dict[str, Tensor]:
    """The conditioning of a batch of texts, as encode_prompts returns it, on device."""
    made = {}
    for key in embeds[""]:
        made[key] = torch.stack([embeds[text][key] for text in texts]).to(device)
    return made


def image_path(folder: Path, i: int, j: int) -> Path:
    """Where image j of prompt i lies."""
    return folder / f"{i:05d}/samples/{j:05d}.png"


def batches_to_do(args: Args, rows: list[dict], folder: Path) -> list[list[tuple[int, int, bool]]]:
    """All batches of which an image is missing, each a list of (prompt, image, whether missing)."""
    work = []
    for i in range(len(rows)):
        for j in range(args.num_images_per_prompt):
            work.append((i, j, not image_path(folder, i, j).is_file()))
    batches = [work[k : k + args.batch_size] for k in range(0, len(work), args.batch_size)]
    return [batch for batch in batches if any(missing for _, _, missing in batch)]


def sample_job(args: Args, rows: list[dict], job: Job, pipe, transformer, embeds, batches) -> None:
    """Draw these batches and write the images that are missing."""
    sides = (args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    shape = (transformer.config.in_channels, *sides)
    device = pipe.vae.device
    with ThreadPoolExecutor(1) as writer:  # writes images while the next ones are computed
        pending = []
        for batch in tqdm(batches, desc=job.given, unit="batch", disable=dist.get_rank() > 0):
            noise = [torch.randn(shape, generator=seeded(args.seed, i, j)) for i, j, _ in batch]
            cond = stacked(embeds, [rows[i]["prompt"] for i, _, _ in batch], device)
            uncond = stacked(embeds, [""] * len(batch), device)
            images = sample_images(
                pipe, transformer, torch.stack(noise), cond, uncond, args.num_inference_steps,
                args.guidance_scale,
            )  # fmt: skip
            for write in pending:
                write.result()  # raises what went wrong
            pending = []
            for image, (i, j, missing) in zip(images, batch):
                if missing:
                    path = image_path(job.folder, i, j)
                    pending.append(writer.submit(save_whole, image, path))
        for write in pending:
            write.result()


def write_grids(args: Args, rows: list[dict], folder: Path) -> None:
    """This rank's share of the prompts' grids."""
    columns = max(c for c in range(1, 5) if args.num_images_per_prompt % c == 0)
    for i in range(dist.get_rank(), len(rows), dist.get_world_size()):
        paths = [image_path(folder, i, j) for j in range(args.num_images_per_prompt)]
        grid = make_image_grid([Image.open(x) for x in paths], len(paths) // columns, columns)
        save_whole(grid, folder / f"{i:05d}/grid.png")


def finish(args: Args, rows: list[dict], folder: Path) -> None:
    """Count the images and list them in samples.jsonl. Raises RuntimeError: one is missing, or was
    not asked for."""
    lines, paths = [], set()
    for i, row in enumerate(rows):
        for j in range(args.num_images_per_prompt):
            path = image_path(folder, i, j)
            paths.add(path)
            line = {"file": str(path.relative_to(folder)), "prompt": row["prompt"]}
            line |= {"prompt_index": i, "image_index": j, "seed": args.seed}
            lines.append(json.dumps(line) + "\n")
    wrong = paths ^ set(folder.glob("[0-9]*/samples/[0-9]*"))
    if wrong:
        fault = f"{len(wrong)} images of {folder} are missing or were not asked for"
        raise RuntimeError(f"{fault}, such as {min(wrong)}")
    save_whole("".join(lines), folder / "samples.jsonl")


def run(args: Args, rows: list[dict], jobs: list[Job], max_sequence_length: int) -> None:
    """Sample all jobs. Raises RuntimeError: a folder does not end up with what was asked for."""
    rank, world_size, device = init_distributed()
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks may end far apart
    base = args.pretrained_model_name_or_path
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    with locked(args.output_dir) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            protocols = check_output(args, rows, jobs, max_sequence_length)
        dist.barrier(hosts)
        pipe = load_pipeline(base, dtype, device)
        embeds = encode_texts(pipe, [row["prompt"] for row in rows], max_sequence_length)
        if args.offload_text_encoders:
            pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
            gc.collect()
            torch.cuda.empty_cache()

        for k, job in enumerate(jobs):
            transformer = load_transformer(base, job.weights, dtype, device)
            check_size(pipe, transformer, height=args.height, width=args.width)
            if args.compile:
                torch.compiler.reset()  # else the last transformer's graphs count against the limit
                transformer.compile(dynamic=False)  # else kernels depend on the sizes seen before
            if rank == 0:
                prepare(job.folder, rows, protocols[k])
            dist.barrier(hosts)
            batches = batches_to_do(args, rows, job.folder)
            dist.barrier(hosts)  # no rank writes before each has seen what is missing
            start = time.perf_counter()
            share = batches[rank::world_size]
            sample_job(args, rows, job, pipe, transformer, embeds, share)
            dist.barrier(hosts)
            if rank == 0:
                finish(args, rows, job.folder)
                images = sum(missing for batch in batches for _, _, missing in batch)
                rate = images / (time.perf_counter() - start)
                done = f"{images} images drawn, {rate:.2f} images/s"
                print(f"{len(rows)} prompts in {job.folder}; {done}", flush=True)
            write_grids(args, rows, job.folder)
        dist.barrier(hosts)
        if rank == 0 and len(jobs) > 1:
            compare(args, rows, jobs)
    dist.destroy_process_group()


def compare(args: Args, rows: list[dict], jobs: list[Job]) -> None:
    """compare.png: a row for each of up to 16 prompts, a column for each transformer."""
    shown = range(0, len(rows), math.ceil(len(rows) / 16))
    tiles = [Image.open(image_path(job.folder, i, 0)) for i in shown for job in jobs]
    save_whole(make_image_grid(tiles, len(shown), len(jobs)), args.output_dir / "compare.png")
    print(f"{args.output_dir / 'compare.png'}, from the left: {', '.join(args.transformer)}")


def main(args: Args) -> None:
    if args.prompts is None:
        rows = [{"prompt": args.prompt}]
    else:
        rows = read_prompts(args.prompts)
        if args.prompts.name == "generation_prompts.txt" and os.environ.get("RANK", "0") == "0":
            print("note: GenEval's scorer needs the tags that evaluation_metadata.jsonl has")
    jobs, max_sequence_length = plan(args)
    run(args, rows, jobs, max_sequence_length)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: all images written are whole, the same command goes on", flush=True)
        os._exit(130)  # at once: the end of a process group would wait for the other ranks
