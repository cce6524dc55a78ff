"""Images for evaluation, in GenEval's folder layout; and what train.py needs of Stable Diffusion 3.

    python sample.py --prompt "a photo of a bench" --output_dir output/bench
    torchrun --nproc_per_node 8 sample.py --prompts evaluation_metadata.jsonl \\
        --output_dir output/geneval --transformer base output/sft output/soar

For each prompt it writes a folder: NNNNN/metadata.jsonl (the prompt's line of the file),
NNNNN/samples/NNNNN.png and NNNNN/grid.png. At the end it writes samples.jsonl, one line per image.
protocol.json holds what the images depend on. A single transformer writes to output_dir itself.
Several write to a folder each, named after the path given (output/soar: output-soar), and
compare.png shows them side by side. A run that was killed goes on by the same command.

The noise of an image is a function of (seed, prompt, how many images of that prompt came before).
So a part of the prompts, or the same in another order, gives the same images but for rounding.
Batches of images and of texts are cut before the processes share them out, and a batch that was
left half done is computed whole. So the files are the same for any number of processes, resumed or
not: to the byte on one kind of machine. Other batches run other kernels, which on a CPU in float32
is worth at most one grey level. States are always float32. Weights are read from safetensors files
only.
"""

import contextlib
import csv
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from fileinput import FileInput
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
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from soar import guided_velocity

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading: one bar for each part and rank

# === Stable Diffusion 3: what train.py uses =======================================================

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


# --- Processes, random numbers, files -------------------------------------------------------------


def check_numbers(config, may_be_0: tuple[str, ...] = ()) -> None:
    """Raises ValueError: a number of config is not more than 0 and finite."""
    for name, value in vars(config).items():
        number = type(value) in (int, float)
        if number and not (0 < value < math.inf or (value == 0 and name in may_be_0)):
            least = "at least 0" if name in may_be_0 else "more than 0"
            raise ValueError(f"--{name} is {value}, expected {least}, and finite")


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) under torchrun or alone; nccl on CUDA, gloo on a CPU."""
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun may keep its store when it restarts the ranks; a name for each attempt keeps
        # them from finding the addresses of the attempt before.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
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
    staging = path.with_name(f".{path.name}.tmp")
    try:
        with staging.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content.save(file, format="PNG")
        sync(staging)
        staging.rename(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def visible(folder: Path) -> list[Path]:
    """What a folder holds, but for hidden files (locks, unfinished writes, .DS_Store) and what a
    fresh disk has."""
    return sorted(path for path in folder.glob("[!.]*") if path.name != "lost+found")


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
    """SHA-256 of a file, or of the weights and settings in a folder, wherever it lies: of its
    safetensors, text and JSON files, the latter without _name_or_path and the like."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    parts = {}
    for file in visible(path):
        if file.suffix in (".safetensors", ".txt", ".model"):
            parts[file.name] = digest(file)
        elif file.suffix == ".json":
            content = json.loads(file.read_text())
            if isinstance(content, dict):
                content = {key: x for key, x in content.items() if not key.startswith("_")}
            parts[file.name] = content
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_prompts(path: Path) -> list[dict]:
    """The prompts of a file, each a dict with a non-empty "prompt"; other fields of .jsonl, .csv
    and .tsv are kept. Raises ValueError, which names file, line and fault; OSError."""
    rows = []
    with FileInput(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        try:
            for row in _rows(lines, path.suffix):
                prompt = row.get("prompt") if isinstance(row, dict) else None
                if not isinstance(prompt, str) or not prompt.strip():
                    raise ValueError('no "prompt", or one that is empty or not a text')
                prompt.encode()  # raises ValueError where the file is not UTF-8
                rows.append(row)
            if not rows:
                raise ValueError("the file ends without a prompt")
        except (ValueError, csv.Error) as error:
            fault = getattr(error, "msg", error)  # json's text has line numbers of its own
            raise ValueError(f"{path}, line {lines.lineno()}: {fault}") from None
    return rows


def _rows(lines: Iterator[str], suffix: str) -> Iterator[Any]:
    if suffix == ".txt":
        yield from ({"prompt": line.removesuffix("\n")} for line in lines)
    elif suffix == ".jsonl":
        yield from map(json.loads, lines)
    elif suffix in (".csv", ".tsv"):
        options = {"strict": True}
        if suffix == ".tsv":  # quotes are part of the text there, as in PartiPrompts
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        reader = csv.DictReader(lines, **options)
        names = [x for x in reader.fieldnames or () if x.strip().lower() in ("prompt", "prompts")]
        if len(names) != 1:
            raise ValueError(f"expected one column prompt, the header is {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError("it has more or fewer cells than the header")
            yield {"prompt": row.pop(names[0])} | row
    else:
        raise ValueError("expected a file whose name ends with .jsonl, .txt, .csv or .tsv")


# --- Load -----------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoints in order of steps: the folders with a name that train.py gives."""
    name = "checkpoint-([0-9]{6}|[1-9][0-9]{6,})"
    found = [path for path in output_dir.glob("checkpoint-*/") if re.fullmatch(name, path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_weights(given: str) -> tuple[Path | None, dict]:
    """The transformer folder or LoRA file that --transformer names, None for base; and the
    trainer_state.json beside it, or {}. A folder of checkpoints stands for its newest.
    Raises ValueError unless it names exactly one."""
    if given == "base":
        return None, {}
    path, found = Path(given).resolve(), []
    for folder in (path, *checkpoints(path)[-1:]):
        for place in (folder, folder / LORA, folder / "transformer"):
            if (place / "config.json").is_file() or place.is_file():
                found.append(place)
    if len(found) != 1:
        kinds = "base, a run or a checkpoint of train.py, a transformer folder or a LoRA file"
        came = " and ".join(map(str, found)) or "none"
        raise ValueError(f"--transformer {given}: expected one of {kinds}; found {came}")
    state = found[0].parent / "trainer_state.json"
    return found[0], json.loads(state.read_text()) if state.is_file() else {}


def check_fit(given: str, weights: Path | None, name_or_path: str) -> None:
    """Raises ValueError: a transformer folder's config is not one for the pipeline; names how."""
    if weights is None or weights.is_file():
        return
    base = SD3Transformer2DModel.load_config(name_or_path, subfolder="transformer")
    own = SD3Transformer2DModel.load_config(weights)
    for key in FIT:
        came, expected = own.get(key), base.get(key)
        if came != expected:
            fault = f"its {key} is {came}, that of {name_or_path} is {expected}"
            raise ValueError(f"--transformer {given} does not fit: {fault}")


def identity(name_or_path: str, part: str) -> str:
    """What tells a pipeline's weights from others, for the part "transformer" or "rest": the commit
    of a hub id, the digest of a folder."""
    root = Path(name_or_path)
    if not root.is_dir():
        options = {"subfolder": "transformer", "return_commit_hash": True}
        return SD3Transformer2DModel.load_config(name_or_path, **options)[1]
    if part == "transformer":
        return digest(root / "transformer")
    index = StableDiffusion3Pipeline.load_config(root)
    parts = {}
    for name in sorted(index):
        if name != "transformer" and (root / name).is_dir():
            parts[name] = index[name], digest(root / name)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_pipeline(
    name_or_path: str, dtype: torch.dtype, device: torch.device,
    text_encoder_device: torch.device | None = None,
) -> StableDiffusion3Pipeline:
    """The pipeline without its transformer, frozen: text encoders in dtype, the VAE in float32.
    Raises OSError: it is not there, or not in safetensors; ValueError: weights do not fit."""
    parts = {"vae": _load(AutoencoderKL, name_or_path, "vae", torch.float32).to(device)}
    for name, kind in ENCODERS.items():
        encoder = _load(kind, name_or_path, name, dtype)
        parts[name] = encoder.to(text_encoder_device or device)
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
        return _load(SD3Transformer2DModel, weights, "", dtype).to(device)
    if weights is None:
        return _load(SD3Transformer2DModel, name_or_path, "transformer", dtype).to(device)
    model = _load(SD3Transformer2DModel, name_or_path, "transformer", torch.float32)
    load_lora(model, weights)
    model.fuse_lora()
    model.unload_lora()
    # diffusers' own to() warns, though nothing must stay float32.
    return torch.nn.Module.to(model, device, dtype)


def _load(kind: type, name_or_path: str | Path, subfolder: str, dtype: torch.dtype):
    """kind.from_pretrained, frozen, of whose weights none is missing, left over or of another
    shape: the libraries fill what is missing with random numbers and pass over what is left."""
    options = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
    options["ignore_mismatched_sizes"] = True  # else transformers' error names no tensor
    try:
        model, info = kind.from_pretrained(name_or_path, subfolder=subfolder, **options)
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            for name in sorted(info[fault]):
                raise ValueError(f"{fault.replace('_', ' ')}: {name}")
    except (OSError, ValueError) as error:
        raised = OSError if isinstance(error, OSError) else ValueError
        raise raised(f"{Path(name_or_path, subfolder)}: {error}") from None
    return model.requires_grad_(False).eval()


# peft's settings of a LoRA that are heeded, or change nothing; of some, single values.
LORA_SETTINGS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias=none",
    "init_lora_weights=True", "init_lora_weights=gaussian", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "inference_mode", "task_type", "peft_type",
    "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "megatron_core",
    "qalora_group_size",
)  # fmt: skip
# Names in other formats, and how to make a file of diffusers' format from them.
OTHER_LORA = {
    "base_model.": "peft's: call PeftModel.from_pretrained(transformer, FOLDER), then "
    "transformer.save_lora_adapter(DIR)",
    "lora_down": "kohya's: rename lora_down to transformer.MODULE.lora_A.weight, and lora_up times "
    "alpha / rank to transformer.MODULE.lora_B.weight",
}


def load_lora(model: SD3Transformer2DModel, file: Path) -> None:
    """Give model the matrices of a LoRA file in float32, as its adapter "default"; all else is
    frozen. The file is train.py's or diffusers': MODULE.lora_A.weight (r, in) and
    MODULE.lora_B.weight (out, r), all or none after "transformer.", and perhaps peft's settings in
    its metadata, else alpha = r.
    Raises ValueError: a tensor has no place in model, is missing or has another shape; OSError."""
    try:
        if file.is_dir():
            raise ValueError("it is a folder with all weights; --lora_rank takes a LoRA file")
        with safe_open(file, "pt") as content:
            settings = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        names = " ".join(tensors)
        for word, mend in OTHER_LORA.items():
            if word in names:
                raise ValueError(f"its format is {mend}, for diffusers' format")
        if "lora_B" not in names:
            raise ValueError("it holds no LoRA")
        start = "transformer." if "transformer." in names else ""
        known = {start + name for name in LORA_SETTINGS}
        for name, x in settings.items():
            if x and not known & {name, f"{name}={x}"}:
                raise ValueError(f"its setting {name}={x} is not supported")
        model.load_lora_adapter(
            tensors, start[:-1] or None, adapter_name="default", metadata=settings or None
        )
        own = {name: x for name, x in model.named_parameters() if ".lora_" in name}
        own = {start + name.replace(".default.", "."): x for name, x in own.items()}
        for name in sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"{name} is {'missing' if name in own else 'not of this model'}")
    except (SafetensorError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"LoRA file {file}: {error}") from None
    for name, x in own.items():  # exactly: diffusers casts to the type of the frozen weights
        x.data = tensors[name].to(x.device, torch.float32)
        x.requires_grad_()  # peft freezes those of a file that says inference_mode


def check_size(
    pipe: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel, **pixels: int
) -> None:
    """Raises ValueError: the VAE and the patches do not divide a size in pixels (given by its
    flag's name), or the transformer has no positions for it."""
    unit = pipe.vae_scale_factor * transformer.config.patch_size
    most = unit * transformer.config.pos_embed_max_size
    for flag, size in pixels.items():
        if size % unit or size > most:
            raise ValueError(f"--{flag} is {size}, expected a multiple of {unit}, at most {most}")


# --- Encode and sample ----------------------------------------------------------------------------


def count_cut(pipe: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int) -> int:
    """How many texts have more tokens than a text encoder reads, which are cut."""
    limits = (
        (pipe.tokenizer, pipe.tokenizer_max_length),
        (pipe.tokenizer_2, pipe.tokenizer_max_length),
        (pipe.tokenizer_3, max_sequence_length),
    )
    cut = set()
    for tokenizer, most in limits:
        for start in range(0, len(texts), 1000):
            tokens = tokenizer(texts[start : start + 1000]).input_ids
            cut |= {start + i for i, x in enumerate(tokens) if len(x) > most}
    return len(cut)


# count_cut says it once; the pipeline would at each call.
logging.getLogger(StableDiffusion3Pipeline.__module__).addFilter(
    lambda record: "input was truncated" not in record.getMessage()
)


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
    with torch.autocast(z.device.type, enabled=False):  # within which train.py calls this
        pixels = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


# === Images for evaluation: what only this script uses ============================================


@dataclass(frozen=True)
class Args:
    output_dir: Path
    """Where images are written, on a disk that all nodes see: new, empty, or holding the run that
    is to go on."""
    transformer: tuple[str, ...] = ("base",)
    """One or several: runs of train.py, of which the newest checkpoint is taken, checkpoints,
    diffusers transformer folders, LoRA files, or base, the pipeline's own."""
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

    def __post_init__(self):
        check_numbers(self, may_be_0=("guidance_scale", "seed"))
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give either --prompts FILE or --prompt TEXT")


@dataclass(frozen=True)
class Job:
    """The images of one transformer."""

    weights: Path | None  # its folder or LoRA file; None is the pipeline's own
    folder: Path  # where its images go
    protocol: dict  # all that the images depend on


SETTINGS = (
    "num_images_per_prompt", "num_inference_steps", "guidance_scale", "height", "width", "seed",
    "batch_size", "mixed_precision", "compile",
)  # fmt: skip


def plan(args: Args, rows: list[dict]) -> list[Job]:
    """The jobs of the --transformer names; loads no model.
    Raises ValueError: names that cannot be used, or not together."""
    base = args.pretrained_model_name_or_path
    found = [find_weights(given) for given in args.transformer]
    trained = {state["settings"]["max_sequence_length"] for _, state in found if state}
    length = args.max_sequence_length or max(trained, default=77)
    if trained - {length}:
        fault = f"--max_sequence_length is {length}, in training it was {sorted(trained)}"
        if args.max_sequence_length is None:
            raise ValueError(f"{fault}: give the one that is meant")
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {fault}")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    scheduler.set_timesteps(args.num_inference_steps)
    common = {name: getattr(args, name) for name in SETTINGS}
    common |= {package: version(package) for package in ("torch", "diffusers", "transformers")}
    common["sigmas"] = scheduler.sigmas.tolist()
    common["max_sequence_length"] = length
    common["prompts"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    common |= {"pipeline": identity(base, "rest"), "lora": None}
    jobs = {}
    for given, (weights, _) in zip(args.transformer, found):
        check_fit(given, weights, base)
        place = {"pipeline": base, "transformer": str(weights or "base")}
        protocol = common | {"from": place, "transformer": identity(base, "transformer")}
        if weights is not None:
            protocol["lora" if weights.is_file() else "transformer"] = digest(weights)
        name = given.replace("/", "-").strip("-.") or Path(given).resolve().name  # of . and ..
        folder = args.output_dir / name if len(found) > 1 else args.output_dir
        jobs[folder] = Job(weights, folder, protocol)
    if len(jobs) < len(found):
        raise ValueError(f"two of --transformer {args.transformer} would write to one folder")
    return list(jobs.values())


def check_folder(folder: Path, protocol: dict) -> None:
    """Raises ValueError: folder holds images of another protocol, and says where they differ; or
    other files and no protocol."""
    file = folder / "protocol.json"
    if file.is_file():
        was = json.loads(file.read_text()) | {"from": protocol["from"]}  # wherever weights were
        keys = [key for key in was | protocol if was.get(key) != protocol.get(key)]
        other = [f"{key}: was {was.get(key)!s:.80}, now {protocol.get(key)!s:.80}" for key in keys]
        if other:
            fault = f"{folder} was made under another protocol; {'; '.join(other)}"
            raise ValueError(f"{fault}. Give another --output_dir")
    elif visible(folder):
        raise ValueError(f"--output_dir: {folder} is in other use, it holds no protocol.json")


def list_images(rows: list[dict], count: int, seed: int) -> list[dict]:
    """The lines of samples.jsonl, count for each prompt. An image's noise is a function of its
    seed, prompt and noise_index, which counts the images of the same prompt before it."""
    images, drawn = [], Counter()
    for i, row in enumerate(rows):
        for j in range(count):
            image = {
                "file": f"{i:05d}/samples/{j:05d}.png",
                "prompt": row["prompt"],
                "prompt_index": i,
                "image_index": j,
                "seed": seed,
                "noise_index": drawn[row["prompt"]],
            }
            drawn[row["prompt"]] += 1
            images.append(image)
    return images


def prepare(job: Job, rows: list[dict]) -> None:
    """Write all but images. protocol.json comes first, as it marks the folder as ours."""
    job.folder.mkdir(parents=True, exist_ok=True)
    save_whole(json.dumps(job.protocol, indent=1) + "\n", job.folder / "protocol.json")
    for i, row in enumerate(rows):
        folder = job.folder / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        save_whole(json.dumps(row) + "\n", folder / "metadata.jsonl")


# --- Draw -----------------------------------------------------------------------------------------


def encode_texts(
    pipe: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int
) -> dict[str, dict[str, Tensor]]:
    """encode_prompts' tensors without their first dimension, on the CPU, by text; also of ""."""
    texts, made = sorted({"", *texts}), {}
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        encoded = encode_prompts(pipe, part, max_sequence_length)
        for i, text in enumerate(part):
            made[text] = {key: x[i].cpu() for key, x in encoded.items()}
    return made


def stacked(embeds: dict[str, dict], texts: list[str], device: torch.device) -> dict[str, Tensor]:
    """The conditioning of a batch of texts, as encode_prompts returns it, on device."""
    return {key: torch.stack([embeds[x][key] for x in texts]).to(device) for key in embeds[""]}


def draw_images(
    args: Args, folder: Path, pipe, transformer, embeds, batches: list[list[dict]]
) -> None:
    """Draw these batches of list_images, and write the files that are missing."""
    unit, device = pipe.vae_scale_factor, pipe.vae.device
    shape = (transformer.config.in_channels, args.height // unit, args.width // unit)

    def write(images: list[Image.Image], batch: list[dict]) -> None:
        for image, line in zip(images, batch):
            if not (folder / line["file"]).is_file():
                save_whole(image, folder / line["file"])

    with ThreadPoolExecutor(1) as writer:  # writes images while the next ones are computed
        written = writer.submit(write, [], [])
        for batch in tqdm(batches, desc=folder.name, unit="batch", disable=dist.get_rank() > 0):
            draws = [seeded(x["seed"], x["prompt"], x["noise_index"]) for x in batch]
            noise = [torch.randn(shape, generator=generator) for generator in draws]
            cond = stacked(embeds, [x["prompt"] for x in batch], device)
            uncond = stacked(embeds, [""] * len(batch), device)
            images = sample_images(
                pipe, transformer, torch.stack(noise), cond, uncond, args.num_inference_steps,
                args.guidance_scale,
            )  # fmt: skip
            written.result()  # raises what went wrong
            written = writer.submit(write, images, batch)
        written.result()


def save_grid(paths: list[Path], columns: int, path: Path) -> None:
    """Images side by side. Raises FileNotFoundError: one is not there."""
    grid = make_image_grid([Image.open(x) for x in paths], len(paths) // columns, columns)
    save_whole(grid, path)


def run_job(
    args: Args, rows: list[dict], job: Job, pipe, transformer, embeds, cpu_group: dist.ProcessGroup
) -> None:
    """This rank's share of a job. samples.jsonl is written last, when every image is there.
    Raises ValueError: this rank has other settings, prompts or weights than rank 0."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count, size = args.num_images_per_prompt, args.batch_size
    images = list_images(rows, count, args.seed)
    paths = [job.folder / image["file"] for image in images]
    if rank == 0:
        prepare(job, rows)
    dist.barrier(cpu_group)
    check_folder(job.folder, job.protocol)
    own = range(rank * size, len(images), world_size * size)
    left = [k for k in own if not all(path.is_file() for path in paths[k : k + size])]
    batches = [images[k : k + size] for k in left]
    draw_images(args, job.folder, pipe, transformer, embeds, batches)
    dist.barrier(cpu_group)
    for i in range(rank, len(rows), world_size):
        save_grid(paths[count * i : count * (i + 1)], count, job.folder / f"{i:05d}/grid.png")
    dist.barrier(cpu_group)
    if rank == 0:
        lines = [json.dumps(image) + "\n" for image in images]
        save_whole("".join(lines), job.folder / "samples.jsonl")
        print(f"{len(images)} images in {job.folder}", flush=True)


def compare(args: Args, rows: list[dict], jobs: list[Job]) -> None:
    """compare.png: a row for each of up to 16 prompts, a column for each transformer."""
    shown = range(0, len(rows), math.ceil(len(rows) / 16))
    tiles = [job.folder / f"{i:05d}/samples/00000.png" for i in shown for job in jobs]
    save_grid(tiles, len(jobs), args.output_dir / "compare.png")
    print(f"{args.output_dir}/compare.png, from the left: {', '.join(args.transformer)}")


def main(args: Args) -> None:
    rows = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    texts = [row["prompt"] for row in rows]
    rank, _, device = init_distributed()
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks may end far apart
    jobs = plan(args, rows)
    max_sequence_length = jobs[0].protocol["max_sequence_length"]
    base = args.pretrained_model_name_or_path
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    with locked(args.output_dir) if rank == 0 else contextlib.nullcontext():
        for job in jobs if rank == 0 else ():  # a network disk may remember what was not there
            check_folder(job.folder, job.protocol)
        pipe = load_pipeline(base, dtype, device)
        if rank == 0:
            cut = count_cut(pipe, texts, max_sequence_length)
            most = min(pipe.tokenizer_max_length, max_sequence_length)
            print(f"{cut} of {len(texts)} prompts are cut at {most} tokens", flush=True)
        embeds = encode_texts(pipe, texts, max_sequence_length)
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None  # room for the rest
        for job in jobs:
            transformer = load_transformer(base, job.weights, dtype, device)
            check_size(pipe, transformer, height=args.height, width=args.width)
            if args.compile:
                torch.compiler.reset()  # else the last transformer's graphs count against the limit
                transformer.compile(dynamic=False)  # else kernels depend on the sizes seen before
            run_job(args, rows, job, pipe, transformer, embeds, cpu_group)
        if rank == 0 and len(jobs) > 1:
            compare(args, rows, jobs)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: all images written are whole, the same command goes on", flush=True)
        os._exit(130)  # at once: the end of a process group would wait for the other ranks
