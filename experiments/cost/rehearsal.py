"""train.py and sample.py on a pipeline of Stable Diffusion 3.5 Medium's exact shapes, on a CPU.

    python -m experiments.cost.rehearsal                 half an hour on two cores without bf16
                                                    arithmetic; 22 GB of memory, 17 of disk
    python -m experiments.cost.rehearsal --blocks 2      the same in little, in a minute

Writes a pipeline as the hub holds it: the config files' real values, T5 in two shards, weights of
the real shapes in bf16. The weights are random, and the tokenizers know single characters only.
Then it runs the commands that a user would give, each in a process of its own: training with LoRA,
killed after its first step and given again; images of the base and of the LoRA; the same image by
diffusers. It checks what they promise, prints what each took, and deletes all it wrote. On a
processor without bf16 arithmetic, bf16 products are made by bf16_products.py; the table says so.
Raises AssertionError: a promise was not kept.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import diffusers
import numpy as np
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from experiments.cost.bf16_products import Bf16Products
from sample import LORA, checkpoints, save_whole, seeded, visible

ROOT = Path(__file__).parents[2]
MEMORY = 22 * 2**30  # bytes that no command may take: what a machine of 24 GiB leaves
SLOW = 10e9  # operations a second in bf16; without instructions for it they are 1e9
PROMPT = "a photo of a red bench"
MAX_SEQUENCE_LENGTH = 77


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["all", "write", "diffusers"], tyro.conf.Positional] = "all"
    """write, diffusers: its parts that run in processes of their own."""
    output_dir: Path = Path("output/rehearsal")
    """Where all is written, and deleted at the end: must be new or empty."""
    blocks: int | None = None
    """Blocks per network, of a few channels, at 64 x 64 pixels; by default all, of their real
    size, at 512 x 512."""
    unbroken: bool = False
    """Also train both steps in one go, and compare bit by bit."""
    table: Path | None = None
    """A Markdown file for the table, which is printed in any case."""

    def __post_init__(self):
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"--blocks is {self.blocks}, expected at least 1")

    @property
    def resolution(self) -> int:
        return 512 if self.blocks is None else 64

    @property
    def model(self) -> Path:
        return self.output_dir / "model"


# --- The pipeline -------------------------------------------------------------------------------

CLIP_VOCABULARY, T5_VOCABULARY = 49408, 32100  # T5's embeddings have 28 rows more, never used
TRANSFORMER = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP = {
    "vocab_size": CLIP_VOCABULARY, "max_position_embeddings": 77, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
CLIP_L = CLIP | {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_G = CLIP | {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280,
    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A model of the pipeline."""

    name: str  # its folder
    kind: type
    config: dict
    file: str  # its weights, for huggingface_hub's names of shards
    shard: int  # most bytes in a file


def parts(blocks: int | None) -> list[Part]:
    """The pipeline's models, of their real size or with so many small blocks."""
    transformer, clip_l, clip_g, t5, vae, shard = TRANSFORMER, CLIP_L, CLIP_G, T5, VAE, 5 * 10**9
    if blocks is not None:
        transformer = transformer | {
            "num_layers": blocks, "num_attention_heads": 2, "joint_attention_dim": 256,
            "caption_projection_dim": 128, "pooled_projection_dim": 192, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
        }  # fmt: skip
        small = {"num_hidden_layers": blocks, "intermediate_size": 256}
        one_head = {"hidden_size": 64, "projection_dim": 64, "num_attention_heads": 1}
        two_heads = {"hidden_size": 128, "projection_dim": 128, "num_attention_heads": 2}
        clip_l, clip_g = clip_l | small | one_head, clip_g | small | two_heads
        t5 = t5 | {"d_model": 256, "d_ff": 640, "num_layers": blocks, "num_heads": 4}
        vae = vae | {"block_out_channels": (32, 32, 32, 32)}
        shard = 17 * 10**6  # T5's embeddings, then its blocks
    file = "model{suffix}.safetensors"
    diffusers_file = "diffusion_pytorch_" + file
    clip = CLIPTextModelWithProjection
    return [
        Part("transformer", SD3Transformer2DModel, transformer, diffusers_file, shard),
        Part("vae", AutoencoderKL, vae, diffusers_file, shard),
        Part("text_encoder", clip, clip_l, file, shard),
        Part("text_encoder_2", clip, clip_g, file, shard),
        Part("text_encoder_3", T5EncoderModel, t5, file, shard),
    ]


@cache
def normal_pool() -> Tensor:
    """20 million numbers ~ N(0, 1): drawing 8 billion would take minutes."""
    return torch.randn(20_000_003, generator=seeded("rehearsal")).bfloat16()


def random_weight(part: str, name: str, shape: torch.Size) -> Tensor:
    """bf16, a function of its names: norms 1, biases 0, others of variance 1 / (inputs)."""
    if len(shape) == 1:
        return torch.full(shape, float("bias" not in name), dtype=torch.bfloat16)
    pool, size = normal_pool(), shape.numel()
    room = max(1, len(pool) - size)
    start = int(torch.randint(room, (), generator=seeded("rehearsal", part, name)))
    x = pool.repeat(math.ceil((start + size) / len(pool))) if size > len(pool) else pool
    x = x[start : start + size].view(shape)
    return x * (1 / math.sqrt(x[0].numel()))


def write_part(part: Part, folder: Path) -> None:
    """Write a model's config and weights; never holds more of them than a shard."""
    configs = {CLIPTextModelWithProjection: CLIPTextConfig, T5EncoderModel: T5Config}
    with torch.device("meta"):
        if part.kind in configs:
            model = part.kind(configs[part.kind](**part.config))
        else:
            model = part.kind(**part.config)
    if isinstance(model, PreTrainedModel):
        model.config.architectures = [part.kind.__name__]
        model.config.dtype = "bfloat16"
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    tensors = dict(model.named_parameters())  # tied ones once
    if part.kind is SD3Transformer2DModel:
        tensors["pos_embed.pos_embed"] = model.pos_embed.pos_embed  # a buffer that is saved, too
    tensors = {name: x.to(torch.bfloat16) for name, x in tensors.items()}
    options = {"filename_pattern": part.file, "max_shard_size": part.shard}
    shards = split_torch_state_dict_into_shards(tensors, **options)
    for file, names in shards.filename_to_tensors.items():
        made = {name: random_weight(part.name, name, tensors[name].shape) for name in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        del made
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        name = part.file.format(suffix="") + ".index.json"
        save_whole(json.dumps(index, indent=1) + "\n", folder / name)


def write_tokenizers(folder: Path) -> None:
    """Tokenizers of single characters, with the real ones' classes, sizes and special tokens."""
    characters = [chr(i) for i in range(33, 127)]
    vocabulary = {x: i for i, x in enumerate(characters + [x + "</w>" for x in characters])}
    vocabulary |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
    clip = {"vocab": vocabulary, "merges": [], "model_max_length": 77}
    CLIPTokenizer(**clip).save_pretrained(folder / "tokenizer")
    CLIPTokenizer(**clip, pad_token="!").save_pretrained(folder / "tokenizer_2")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(x, -2.0) for x in characters]
    pieces += [(f"<unused {i}>", -99.0) for i in range(T5_VOCABULARY - 100 - len(pieces))]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=100, model_max_length=512)
    t5.save_pretrained(folder / "tokenizer_3")


def write_pipeline(args: Args) -> None:
    """Write the whole pipeline folder."""
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    for part in parts(args.blocks):
        folder = args.model / part.name
        folder.mkdir(parents=True)
        write_part(part, folder)
        library = "transformers" if "text" in part.name else "diffusers"
        index[part.name] = [library, part.kind.__name__]
    write_tokenizers(args.model)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(args.model / "scheduler")
    save_whole(json.dumps(index, indent=1) + "\n", args.model / "model_index.json")


def write_pairs(folder: Path, side: int) -> None:
    """Four images that are not square, with captions."""
    folder.mkdir()
    lines = []
    for i in range(4):
        generator = seeded("rehearsal", "image", i)
        pixels = torch.randint(256, (side, side + 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


# --- The commands -------------------------------------------------------------------------------


@dataclass
class Row:
    """What a command took. Memory in bytes: the peak of all pages, and of those that are not the
    pages of a file, which the system can drop."""

    name: str
    seconds: float
    peak: int
    peak_own: int
    written: str
    end: str

    def line(self) -> str:
        """A line of the table."""
        peaks = f"{self.peak / 2**30:.2f} | {self.peak_own / 2**30:.2f}"
        return f"| {self.name} | {self.end} | {self.seconds:.0f} | {peaks} | {self.written} |"


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, links left out."""
    files = [x for x in folder.rglob("*") if x.is_file() and not x.is_symlink()]
    return {str(x.relative_to(folder)): x.stat().st_size for x in files}


def new_files(folder: Path, before: dict[str, int]) -> str:
    """What a command wrote, by the first two parts of its path, from 50 kB on."""
    found: dict[str, int] = {}
    for name, size in sizes(folder).items():
        if before.get(name) != size:
            place = "/".join(Path(name).parts[:2])
            found[place] = found.get(place, 0) + size
    shown = [x for x in sorted(found) if found[x] >= 50_000]
    names = [f"{x} {found[x] / 1e6:,.1f} MB" for x in shown]
    return ", ".join([*names, f"{len(found) - len(shown)} small ones"])


def own_memory(pid: int) -> int:
    """Bytes of a process's memory that belong to no file; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [x for x in status.splitlines() if x.startswith("RssAnon:")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def run(name: str, args: Args, words: list, kill_at: Path | None = None) -> Row:
    """Run a Python command, and wait; with kill_at, until that path is there, then kill it.
    Raises AssertionError: it ended in another way, or took more memory than MEMORY."""
    words = [str(x) for x in words]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    before, start = sizes(args.output_dir), time.perf_counter()
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.output_dir / "cache")}
    env = os.environ | env | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env)
    own, pid = 0, 0
    try:
        while pid == 0:
            time.sleep(0.005)
            own = max(own, own_memory(process.pid))
            if kill_at is not None and kill_at.exists():
                os.kill(process.pid, signal.SIGKILL)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    finally:
        if pid == 0:  # interrupted
            process.kill()
    process.returncode = os.waitstatus_to_exitcode(status)
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.returncode == expected, f"{name} ended with {process.returncode}"
    seconds, peak = time.perf_counter() - start, 1024 * usage.ru_maxrss
    assert own < MEMORY, f"{name} took {own / 2**30:.1f} GiB, more than {MEMORY / 2**30:.0f}"
    end = "killed" if kill_at else "exit 0"
    row = Row(name, seconds, peak, own, new_files(args.output_dir, before), end)
    print(row.line(), flush=True)
    return row


@cache
def slow_in_bf16() -> bool:
    """Whether this processor has no instructions for bf16: by the time of a product as a backward
    has them."""
    weight, gradient = torch.randn(1536, 1536).bfloat16(), torch.randn(256, 1536).bfloat16()
    gradient @ weight  # not timed: threads start here
    start = time.perf_counter()
    gradient @ weight
    return 2 * 256 * 1536 * 1536 / (time.perf_counter() - start) < SLOW


def script(name: str) -> list[str]:
    """The words that run train.py or sample.py."""
    return ["-m", "experiments.cost.bf16_products", name] if slow_in_bf16() else [name]


def train_words(args: Args, output_dir: Path) -> list:
    """The README's command for a small GPU, with two steps and a learning rate that shows."""
    return [
        *script("train.py"), "--pretrained_model_name_or_path", args.model,
        "--dataset", args.output_dir / "pairs", "--output_dir", output_dir,
        "--lora_rank", 16, "--mixed_precision", "bf16", "--gradient_checkpointing",
        "--resolution", args.resolution, "--train_batch_size", 1, "--num_aux_points", 1,
        "--max_train_steps", 2, "--checkpointing_steps", 1, "--logging_steps", 1,
        "--learning_rate", 1e-2,
    ]  # fmt: skip


def sample_words(args: Args, lora: Path, output_dir: Path) -> list:
    """The base's image and the LoRA's, from the same noise."""
    side = args.resolution
    return [
        *script("sample.py"), "--pretrained_model_name_or_path", args.model, "--prompt", PROMPT,
        "--output_dir", output_dir, "--transformer", "base", lora, "--num_inference_steps", 2,
        "--num_images_per_prompt", 1, "--height", side, "--width", side,
    ]  # fmt: skip


def own_words(args: Args, what: str) -> list:
    """A part of this file in a process of its own."""
    words = ["-m", "experiments.cost.rehearsal", what, "--output_dir", args.output_dir]
    return words + (["--blocks", args.blocks] if args.blocks else [])


def draw_with_diffusers(args: Args) -> None:
    """The LoRA's image by diffusers alone, from sample.py's noise; all of it in bf16."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    pipe.load_lora_weights(checkpoints(args.output_dir / "lora")[-1], weight_name=LORA)
    side = args.resolution // pipe.vae_scale_factor
    noise = torch.randn(1, 16, side, side, generator=seeded(42, PROMPT, 0))
    with Bf16Products() if slow_in_bf16() else contextlib.nullcontext():
        image = pipe(
            PROMPT, height=args.resolution, width=args.resolution, num_inference_steps=2,
            guidance_scale=4.5, latents=noise.bfloat16(), max_sequence_length=MAX_SEQUENCE_LENGTH,
        ).images[0]  # fmt: skip
    image.save(args.output_dir / "diffusers.png")


# --- What they promise --------------------------------------------------------------------------


def check_first_step(output_dir: Path) -> None:
    """A kill leaves a whole checkpoint."""
    path = output_dir / "checkpoint-000001"
    names = [x.name for x in visible(path)]
    assert names == ["optimizer.safetensors", LORA, "trainer_state.json"], names
    assert json.loads((path / "trainer_state.json").read_text())["step"] == 1


def check_resumed(output_dir: Path, first: list[str]) -> None:
    """The second step follows the first, of which nothing was changed; all is finite; a checkpoint
    takes 12 bytes per trained parameter. first: metrics.jsonl after the kill."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == first[0], "the resumed run wrote step 1 again"
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2], metrics
    assert all(math.isfinite(x) for line in metrics for x in line.values()), metrics
    assert checkpoints(output_dir)[-1].name == "checkpoint-000002"
    before, after = (load_file(output_dir / f"checkpoint-00000{i}" / LORA) for i in (1, 2))
    assert before.keys() == after.keys()
    for name, x in after.items():
        # The last block's text queries lead nowhere: no gradient.
        moved = not torch.equal(x, before[name]) or "add_q_proj" in name
        assert moved and x.isfinite().all(), f"{name} did not move, or is not finite"
    moments = load_file(output_dir / "checkpoint-000002/optimizer.safetensors")
    assert all(x.isfinite().all() for x in moments.values())
    steps = {float(x) for name, x in moments.items() if name.endswith(".step")}
    assert steps == {2.0}, f"AdamW counts {steps} steps, expected 2"
    trained = sum(x.numel() for x in after.values())
    written = sum(sizes(output_dir / "checkpoint-000002").values())
    per_parameter = written / trained
    assert 12 <= per_parameter < 12.5, f"{per_parameter:.2f} bytes per parameter, expected 12"
    print(f"{trained / 1e6:.2f} M trained parameters, {per_parameter:.2f} bytes each on disk")


def check_same(a: Path, b: Path) -> None:
    """Two runs ended with the same bits."""
    for name in (LORA, "optimizer.safetensors"):
        left, right = (load_file(checkpoints(run)[-1] / name) for run in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key} differs"
    print("killed and unbroken run ended with the same bits")


def check_images(args: Args) -> str:
    """The images differ as they should: diffusers' is twice as near to the LoRA's as the base's
    is, or nearer.
    Returns the distances, mean absolute differences of grey levels."""
    folder = args.output_dir / "images"
    names = {"base": folder / "base", "lora": next(folder.glob("*-lora"))}
    images = {}
    for name, place in names.items():
        assert json.loads((place / "protocol.json").read_text())["num_inference_steps"] == 2
        images[name] = np.asarray(Image.open(place / "00000/samples/00000.png")).astype(float)
    images["diffusers"] = np.asarray(Image.open(args.output_dir / "diffusers.png")).astype(float)
    for name, image in images.items():
        assert image.shape == (args.resolution, args.resolution, 3), (name, image.shape)
        assert image.std() > 1, f"the image of {name} is blank"
    assert (folder / "compare.png").is_file()
    own = np.abs(images["lora"] - images["diffusers"]).mean()
    other = np.abs(images["base"] - images["lora"]).mean()
    found = f"LoRA against diffusers' LoRA {own:.2f}, LoRA against base {other:.2f} grey levels"
    assert own < other / 2, found
    return found


# --- All of it ----------------------------------------------------------------------------------


def rehearse(args: Args) -> tuple[list[Row], str]:
    """Write the pipeline, run all commands, check them. Returns what each took, and a remark."""
    output, rows = args.output_dir, []
    rows.append(run("write the pipeline", args, own_words(args, "write")))
    write_pairs(output / "pairs", args.resolution)
    lora, log = output / "lora", output / "lora/metrics.jsonl"
    words = train_words(args, lora)
    rows.append(run("train, step 1", args, words, kill_at=lora / "checkpoint-000001"))
    check_first_step(lora)
    first = log.read_text().splitlines()
    rows.append(run("train, the same command", args, words))
    check_resumed(lora, first)
    if args.unbroken:
        rows.append(run("train, unbroken", args, train_words(args, output / "unbroken")))
        check_same(lora, output / "unbroken")
    words = sample_words(args, lora, output / "images")
    rows.append(run("sample, base and LoRA", args, words))
    rows.append(run("diffusers, LoRA", args, own_words(args, "diffusers")))
    remark = check_images(args)
    print(remark)
    return rows, remark


def as_table(rows: list[Row], args: Args, remark: str) -> str:
    """Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    size = "SD3.5 Medium's shapes" if args.blocks is None else f"{args.blocks} small blocks"
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"{date}, commit {commit or 'unknown'}, {size}, {os.cpu_count()} cores, no GPU.", ""]
    if slow_in_bf16():
        lines[0] += " bf16 products in float32: the processor has no instructions for them."
    lines += ["| command | ends | seconds | peak GiB | without files' pages | written |"]
    lines += ["| --- | --- | ---: | ---: | ---: | --- |"]
    lines += [row.line() for row in rows]
    total = sum(row.seconds for row in rows)
    return "\n".join([*lines, "", f"{total / 60:.1f} minutes in all. {remark}.", ""])


def main(args: Args) -> None:
    args = replace(args, output_dir=args.output_dir.resolve())
    if args.what != "all":
        {"write": write_pipeline, "diffusers": draw_with_diffusers}[args.what](args)
        return
    if visible(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} is not empty, expected a new one")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        rows, remark = rehearse(args)
    finally:
        shutil.rmtree(args.output_dir)
    table = as_table(rows, args, remark)
    print("\n" + table)
    if args.table is not None:
        save_whole(table, args.table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
