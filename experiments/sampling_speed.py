"""Images per second of sample.py's functions and of a plain StableDiffusion3Pipeline loop, on the shapes world.

    python -m experiments.sampling_speed

Both draw the same prompts to PNG files with the same steps, guidance and precision, in one process, alternating; the
models are loaded before the clock starts. The plain loop calls the pipeline on batch_size prompts at a time, as they
come; sample.py's way encodes all prompts first, and writes files to the disk, not to a cache, beside the next batch.
Prints medians over the repeats, and the median of the ratios of neighbouring runs.
"""

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline

import sample
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH, SIZE


@dataclass(frozen=True)
class Args:
    num_prompts: int = 32
    """Prompts, one image each."""
    num_inference_steps: int = 10
    """Euler steps, with guidance 4.5."""
    repeats: int = 7
    """Runs of each way and batch size; one more of each warms up."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images per forward, of both ways."""


def plain(pipe: StableDiffusion3Pipeline, prompts: list[str], batch_size: int, steps: int, folder: Path) -> None:
    """The loop one would write: batch_size prompts a call, images to folder."""
    generator = torch.Generator().manual_seed(0)
    options = {"height": SIZE, "width": SIZE, "max_sequence_length": MAX_SEQUENCE_LENGTH, "guidance_scale": 4.5}
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        images = pipe(part, num_inference_steps=steps, generator=generator, **options).images
        for i, image in enumerate(images, start):
            image.save(folder / f"{i:05d}.png")


def ours(pipe: StableDiffusion3Pipeline, prompts: list[str], batch_size: int, steps: int, folder: Path) -> None:
    """The same by sample.py's encode_texts, sample_images and save_whole."""
    embeds, shape = sample.encode_texts(pipe, prompts, MAX_SEQUENCE_LENGTH), (16, SIZE // 8, SIZE // 8)
    with ThreadPoolExecutor(1) as writer:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            z1 = torch.stack([torch.randn(shape, generator=sample.seeded(0, start + i, 0)) for i in range(len(part))])
            cond, uncond = (sample.stacked(embeds, x, pipe.vae.device) for x in (part, [""] * len(part)))
            images = sample.sample_images(pipe, pipe.transformer, z1, cond, uncond, steps, 4.5)
            writes = [writer.submit(sample.save_whole, x, folder / f"{i:05d}.png") for i, x in enumerate(images, start)]
    for write in writes:
        write.result()


def main(args: Args) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(DATA / "model", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    lines = sample.read_prompts(DATA / "prompts.jsonl")
    prompts = [lines[i * len(lines) // args.num_prompts]["prompt"] for i in range(args.num_prompts)]
    ways, seconds = {"plain": plain, "ours": ours}, {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats + 1):
            for batch_size in args.batch_sizes:
                order = list(ways) if repeat % 2 else list(ways)[::-1]
                for name in order:
                    start = time.perf_counter()
                    ways[name](pipe, prompts, batch_size, args.num_inference_steps, Path(folder))
                    if repeat:  # the first warms up
                        seconds.setdefault((name, batch_size), []).append(time.perf_counter() - start)
    print(f"{len(prompts)} prompts, {args.num_inference_steps} steps, medians of {args.repeats} runs")
    rates = {key: len(prompts) / statistics.median(x) for key, x in seconds.items()}
    for size in args.batch_sizes:
        pairs = [a / b for a, b in zip(seconds["plain", size], seconds["ours", size])]
        ratio = f"{statistics.median(pairs):.2f} (of single runs: {min(pairs):.2f} to {max(pairs):.2f})"
        print(f"batch {size}: plain {rates['plain', size]:.2f}, ours {rates['ours', size]:.2f} images/s; ratio {ratio}")
    for size in args.batch_sizes[1:]:
        gain = rates["ours", size] / rates["plain", args.batch_sizes[0]]
        print(f"ours at batch {size} over plain at batch {args.batch_sizes[0]}: {gain:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
