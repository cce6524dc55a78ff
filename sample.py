"""Images for evaluation, in GenEval's folder layout.

    python sample.py --prompt "a photo of a bench" --output_dir output/bench
    torchrun --nproc_per_node 8 sample.py --prompts evaluation_metadata.jsonl --output_dir output/geneval \\
        --transformer base output/sft/final output/soar/final

writes NNNNN/metadata.jsonl (the prompt's line), NNNNN/samples/NNNNN.png and NNNNN/grid.png, a folder a prompt; at the
end samples.jsonl, a line an image; protocol.json says what they depend on. One transformer writes to output_dir itself;
each of several to a folder in it, named by the parts of the path given, output/soar/final to output-soar-final, and
compare.png shows them side by side. The same command goes on with a run that was killed.

The initial noise of an image is a function of (seed, prompt index, image index) alone. Batches, of images and of texts
to encode, are cut from all of them before the processes share them out; one that was left half done is computed whole.
So on one kind of machine files are equal to the byte for any number of processes, in any order, resumed or not. Another
batch_size runs other kernels: on a CPU in float32 that is worth at most one grey level. States are float32 always.
"""

import gc
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from experiments.sd3 import (
    check_size,
    encode_prompts,
    init_distributed,
    load_pipeline,
    load_transformer,
    read_prompts,
    sample_images,
    save_whole,
    seeded,
)

FIT = "_class_name in_channels out_channels patch_size pos_embed_max_size joint_attention_dim pooled_projection_dim"


@dataclass(frozen=True)
class Args:
    output_dir: Path
    """Where images are written, on a disk that all nodes see: new, empty, or holding the run that is to go on."""
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Hub id or directory of a Stable Diffusion 3 pipeline."""
    transformer: tuple[str, ...] = ("base",)
    """Checkpoints of train.py, diffusers transformer directories, LoRA files, or base, the pipeline's own."""
    prompts: Path | None = None
    """A .jsonl file, an object with a "prompt" a line; .txt, a prompt a line; .csv with a column prompt or Prompts."""
    prompt: str | None = None
    """A single prompt, in place of --prompts."""
    num_images_per_prompt: int = 4
    """Images a prompt, each from noise of its own."""
    num_inference_steps: int = 40
    """Euler steps, each one forward for both branches of guidance."""
    guidance_scale: float = 4.5
    """w of v_uncond + w (v_cond - v_uncond); 1 is unguided."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    seed: int = 42
    """Of the initial noise."""
    batch_size: int = 4
    """Images per forward and process; guidance doubles it."""
    max_sequence_length: int | None = None
    """T5 tokens a prompt is padded or cut to; by default as in training, else 77. SD3 does not mask padding."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """What the transformer and the text encoders run in. The VAE and all states are float32."""
    compile: bool = False
    """torch.compile the transformer: a slow first batch, faster others."""
    offload_text_encoders: bool = False
    """Free the text encoders once the prompts are encoded, before the transformer is loaded."""

    def __post_init__(self):
        counts = "num_images_per_prompt num_inference_steps height width batch_size max_sequence_length"
        for name in counts.split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give either --prompts FILE or --prompt TEXT")


# --- What to sample, and where ----------------------------------------------------------------------------------------


def find_weights(given: str) -> tuple[Path | None, dict]:
    """The transformer directory or LoRA file that a --transformer names, None for base; its trainer_state.json, or {}.

    Raises FileNotFoundError: nothing of the kind is there."""
    if given == "base":
        return None, {}
    path = Path(given).resolve()
    files = [x for x in (path, path / "pytorch_lora_weights.safetensors") if x.suffix == ".safetensors" and x.is_file()]
    weights = files[0] if files else path / "transformer" if (path / "transformer").is_dir() else path
    if not files and not (weights / "config.json").is_file():
        kinds = "base, a checkpoint of train.py, a diffusers transformer directory or a LoRA .safetensors file"
        raise FileNotFoundError(f"--transformer {given} is none of {kinds}: there is no {weights / 'config.json'}")
    state = weights.parent / "trainer_state.json"
    return weights, json.loads(state.read_text()) if state.is_file() else {}


def check_folder(folder: Path, protocol: dict) -> None:
    """Raises ValueError: folder was made under another protocol, and says where; or it holds files and no protocol."""
    file = folder / "protocol.json"
    if not file.is_file() and any(folder.glob("[!.]*")):
        raise ValueError(f"--output_dir: {folder} is not empty and holds no run that could go on: no protocol.json")
    was = json.loads(file.read_text()) if file.is_file() else protocol
    other = [f"{x}: was {was.get(x)}, now {protocol.get(x)}" for x in was | protocol if was.get(x) != protocol.get(x)]
    if other:
        raise ValueError(f"{folder} was made under another protocol; {'; '.join(other)}. Give another --output_dir")


def plan(args: Args, rows: list[dict]) -> dict[Path, tuple[str, Path | None, dict]]:
    """The folder of each --transformer, with its name, weights and protocol; reads configs and no weights.

    Raises ValueError: output_dir is in other use, or a transformer does not fit the pipeline; names how they differ."""
    base, found, jobs = args.pretrained_model_name_or_path, {x: find_weights(x) for x in args.transformer}, {}
    config, revision = SD3Transformer2DModel.load_config(base, subfolder="transformer", return_commit_hash=True)
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(base, subfolder="scheduler")
    trained = {x: state["settings"]["max_sequence_length"] for x, (_, state) in found.items() if "settings" in state}
    if args.max_sequence_length is None and len(set(trained.values())) > 1:
        raise ValueError(f"give --max_sequence_length: the checkpoints were trained with {trained}")
    length = args.max_sequence_length or next(iter(trained.values()), 77)
    flags = "num_images_per_prompt num_inference_steps guidance_scale height width seed batch_size mixed_precision"
    for given, (weights, state) in found.items():
        own = SD3Transformer2DModel.load_config(weights) if weights and weights.is_dir() else config
        other = [f"{x} is {own.get(x)}, not {config.get(x)}" for x in FIT.split() if own.get(x) != config.get(x)]
        if other:
            raise ValueError(f"--transformer {given} does not fit the pipeline {base}: {'; '.join(other)}")
        if trained.get(given, length) != length and os.environ.get("RANK", "0") == "0":
            print(f"warning: --max_sequence_length is {length}, but {given} was trained with {trained[given]}")
        protocol = {"pretrained_model_name_or_path": base, "revision": revision, "transformer": str(weights or "base")}
        protocol |= {"step": state.get("step"), "scheduler": scheduler["_class_name"], "shift": scheduler["shift"]}
        protocol |= {flag: getattr(args, flag) for flag in (*flags.split(), "compile")}
        protocol |= {"max_sequence_length": length}
        protocol |= {"prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
        protocol |= {package: version(package) for package in ("torch", "diffusers", "transformers")}
        name = "-".join(part for part in Path(given).parts if part not in ("/", "..")) if len(found) > 1 else ""
        check_folder(args.output_dir / name, protocol)
        jobs[args.output_dir / name] = (given, weights, protocol)
    if len(jobs) < len(args.transformer):
        raise ValueError(f"--transformer {' '.join(args.transformer)}: two of these would write to one folder")
    if len(jobs) > 1 and any(path.is_file() and path.name != "compare.png" for path in args.output_dir.glob("[!.]*")):
        raise ValueError(f"--output_dir {args.output_dir} holds other files than a comparison's: give another")
    return jobs


# --- Sampling ---------------------------------------------------------------------------------------------------------


def encode_texts(pipe: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int) -> dict[str, dict]:
    """encode_prompts' tensors without their first dimension, on the CPU, of each text and of ""."""
    texts = sorted({"", *texts})
    parts = [encode_prompts(pipe, texts[start : start + 16], max_sequence_length) for start in range(0, len(texts), 16)]
    made = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
    return {text: {key: x[i] for key, x in made.items()} for i, text in enumerate(texts)}


def gather(embeds: dict[str, dict], texts: list[str], device: torch.device) -> dict[str, Tensor]:
    """The conditioning of a batch of texts, as encode_prompts returns it, on device."""
    return {key: torch.stack([embeds[text][key] for text in texts]).to(device) for key in embeds[""]}


def run(args: Args, rows: list[dict], jobs: dict[Path, tuple[str, Path | None, dict]]) -> None:
    """Sample what plan returned. Raises RuntimeError: in the end a folder does not hold exactly what was asked for."""
    rank, world_size, device = init_distributed()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # one process may end long before another
    work = [(i, j) for i in range(len(rows)) for j in range(args.num_images_per_prompt)]
    batches = [work[start : start + args.batch_size] for start in range(0, len(work), args.batch_size)]
    paths = {folder: {(i, j): folder / f"{i:05d}/samples/{j:05d}.png" for i, j in work} for folder in jobs}
    done = {folder: {key for key, path in paths[folder].items() if path.is_file()} for folder in jobs}
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = load_pipeline(args.pretrained_model_name_or_path, dtype, device)
    length = next(iter(jobs.values()))[2]["max_sequence_length"]
    embeds = encode_texts(pipe, [row["prompt"] for row in rows], length)
    if args.offload_text_encoders:
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
        gc.collect()
        torch.cuda.empty_cache()
    dist.barrier(group)  # no process writes before each has seen what is there

    for folder, (given, weights, protocol) in jobs.items():
        transformer = load_transformer(args.pretrained_model_name_or_path, weights, dtype, device)
        check_size(pipe, transformer, height=args.height, width=args.width)
        if args.compile:
            torch.compiler.reset()  # or one transformer's graphs count against the next one's limit
            transformer.compile(dynamic=False)  # dynamic kernels would depend on the sizes that came before
        if rank == 0:
            prepare(folder, rows, protocol)
        dist.barrier(group)
        shape = (transformer.config.in_channels, *(n // pipe.vae_scale_factor for n in (args.height, args.width)))
        shares = [[b for b in batches[r::world_size] if not done[folder].issuperset(b)] for r in range(world_size)]
        awaited = [[paths[folder][x] for b in share for x in b if x not in done[folder]][::-1] for share in shares]
        bar = tqdm(total=len(work), initial=len(done[folder]), unit="image", desc=given, disable=rank > 0)
        with ThreadPoolExecutor(1) as writer:  # compresses and writes images while the next ones are computed
            writes = []
            for batch in shares[rank]:
                z1 = torch.stack([torch.randn(shape, generator=seeded(args.seed, i, j)) for i, j in batch])
                cond = gather(embeds, [rows[i]["prompt"] for i, _ in batch], device)
                uncond = gather(embeds, [""] * len(batch), device)
                made = sample_images(pipe, transformer, z1, cond, uncond, args.num_inference_steps, args.guidance_scale)
                list(writes)  # waits for the batch before, and raises what went wrong
                new = [(image, paths[folder][key]) for key, image in zip(batch, made) if key not in done[folder]]
                writes = writer.map(save_whole, *zip(*new))
                for files in awaited if rank == 0 else ():  # each process writes in order: its next file is its mark
                    while files and files[-1].is_file():
                        files.pop()
                        bar.update()
            list(writes)
        dist.barrier(group)
        bar.update(len(work) - bar.n)
        bar.close()
        if rank == 0:
            rate = (len(work) - len(done[folder])) / bar.format_dict["elapsed"]
            finish(args, rows, folder, paths[folder])
            print(f"{len(work)} images of {len(rows)} prompts in {folder}; {rate:.2f} images/s", flush=True)
        for i in range(rank, len(rows), world_size):
            images = [Image.open(paths[folder][i, j]) for j in range(args.num_images_per_prompt)]
            columns = max(c for c in range(1, 5) if len(images) % c == 0)
            save_whole(make_image_grid(images, len(images) // columns, columns), folder / f"{i:05d}/grid.png")


def prepare(folder: Path, rows: list[dict], protocol: dict) -> None:
    """Write all but images: protocol.json first, as it marks the folder as ours. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(json.dumps(protocol, indent=1) + "\n", folder / "protocol.json")
    for path in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        path.unlink()
    for i, row in enumerate(rows):
        (folder / f"{i:05d}/samples").mkdir(parents=True, exist_ok=True)
        save_whole(json.dumps(row) + "\n", folder / f"{i:05d}/metadata.jsonl")


def finish(args: Args, rows: list[dict], folder: Path, paths: dict[tuple[int, int], Path]) -> None:
    """Count the images and list them in samples.jsonl. Raises RuntimeError: an image is missing, or one too many."""
    wrong = set(paths.values()) ^ set(folder.glob("[0-9]*/samples/*"))
    if wrong:
        raise RuntimeError(f"{len(wrong)} images of {folder} are missing or were not asked for, such as {min(wrong)}")
    lines = []
    for (i, j), path in paths.items():
        line = {"file": str(path.relative_to(folder)), "prompt": rows[i]["prompt"], "prompt_index": i, "image_index": j}
        lines.append(json.dumps(line | {"seed": args.seed}) + "\n")
    save_whole("".join(lines), folder / "samples.jsonl")


def main(args: Args) -> None:
    rows = [{"prompt": args.prompt}] if args.prompts is None else read_prompts(args.prompts)
    jobs = plan(args, rows)
    run(args, rows, jobs)
    if len(jobs) > 1 and dist.get_rank() == 0:
        shown = range(0, len(rows), -(-len(rows) // 16))
        tiles = [Image.open(folder / f"{i:05d}/samples/00000.png") for i in shown for folder in jobs]
        save_whole(make_image_grid(tiles, len(shown), len(jobs)), args.output_dir / "compare.png")
        print(f"{args.output_dir / 'compare.png'}, from the left: {', '.join(args.transformer)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: all images written are whole, and the same command goes on from here", flush=True)
        os._exit(130)  # at once: the end of a process group waits for the other processes
