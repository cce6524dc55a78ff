"""train.py and sample.py on a pipeline of Stable Diffusion 3.5 Medium's exact shapes, on a CPU.

    python -m experiments.cost.rehearsal             half an hour on two cores; 22 GB, 17 of disk
    python -m experiments.cost.rehearsal --blocks 2  the same in little, in a minute

Writes a pipeline as the hub holds it: the config files' real values, T5 in two shards, weights of
the real shapes in bf16. The weights are random, and the tokenizers know single characters only.
Then it runs the commands that a user would give, each in a process of its own: training with LoRA,
killed after its first step and given again; images of the base and of the LoRA. It checks what they
promise, prints what each took, and deletes all it wrote. bf16 products are by bf16_products.py.
Raises AssertionError: a promise was not kept.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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

from experiments.environment import ROOT
from experiments.shapes.draw import PAIRS
from sample import ENCODERS, LORA, checkpoints, seeded, visible


@dataclass(frozen=True)
class Args:
    output_dir: Path = Path("output/rehearsal")
    """Where all is written, and deleted at the end: must be new or empty."""
    blocks: int | None = None
    """Blocks per network, of a few channels, at 64 x 64 pixels; by default all, of their real
    size, at 512 x 512."""

    def __post_init__(self):
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"--blocks is {self.blocks}, expected at least 1")


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


def empty_pipeline(blocks: int | None) -> StableDiffusion3Pipeline:
    """Models of their real size, or with so many small blocks, on the meta device, and tokenizers
    of single characters, with the real ones' classes, sizes and special tokens."""
    transformer, clip_l, clip_g, t5, vae = TRANSFORMER, CLIP_L, CLIP_G, T5, VAE
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
    characters = [chr(i) for i in range(33, 127)]
    vocabulary = {x: i for i, x in enumerate(characters + [x + "</w>" for x in characters])}
    vocabulary |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
    clip = {"vocab": vocabulary, "merges": [], "model_max_length": 77}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(x, -2.0) for x in characters]
    pieces += [(f"<unused {i}>", -99.0) for i in range(T5_VOCABULARY - 100 - len(pieces))]
    with torch.device("meta"):
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(**vae),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**clip_l)),
            tokenizer=CLIPTokenizer(**clip),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**clip_g)),
            tokenizer_2=CLIPTokenizer(**clip, pad_token="!"),
            text_encoder_3=T5EncoderModel(T5Config(**t5)),
            tokenizer_3=T5TokenizerFast(vocab=pieces, extra_ids=100, model_max_length=512),
        )


def random_weight(part: str, name: str, shape: torch.Size) -> Tensor:
    """bf16, a function of its names: norms 1, biases 0, others of variance 1 / (inputs)."""
    if len(shape) == 1:
        return torch.full(shape, float("bias" not in name), dtype=torch.bfloat16)
    x = torch.randn(shape, generator=seeded("rehearsal", part, name))
    return (x / math.sqrt(x[0].numel())).bfloat16()


def write_model(model: torch.nn.Module, folder: Path, shard: int) -> None:
    """Write a model's config and weights; never holds more of them than a shard, in bytes."""
    tensors = dict(model.named_parameters())  # tied ones once
    name = "diffusion_pytorch_model"
    if isinstance(model, PreTrainedModel):
        name = "model"
        model.config.architectures = [type(model).__name__]
        model.config.dtype = "bfloat16"
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    if isinstance(model, SD3Transformer2DModel):
        tensors["pos_embed.pos_embed"] = model.pos_embed.pos_embed  # a buffer that is saved, too
    tensors = {name: x.to(torch.bfloat16) for name, x in tensors.items()}
    pattern = name + "{suffix}.safetensors"
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=shard
    )
    for file, names in shards.filename_to_tensors.items():
        made = {x: random_weight(folder.name, x, tensors[x].shape) for x in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        del made
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def write_pipeline(folder: Path, blocks: int | None) -> None:
    pipe = empty_pipeline(blocks)
    pipe.save_config(folder)
    for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipe, name).save_pretrained(folder / name)
    for name in ("transformer", "vae", *ENCODERS):
        # In little, too, T5 is in two shards: its embeddings, then its blocks.
        shard = 5 * 10**9 if blocks is None else 17 * 10**6
        write_model(getattr(pipe, name), folder / name, shard)


# --- The commands -------------------------------------------------------------------------------


def start(words: list[str], env: dict[str, str]) -> int:
    """Start a script, with bf16 products, which are slow on most CPUs, in float32: its id."""
    command = [sys.executable, "-m", "experiments.cost.bf16_products", *words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env).pid


def run(name: str, output_dir: Path, words: list, kill_at: Path | None = None) -> None:
    """Run a script, and wait; with kill_at, until that path is there, then kill it. Prints
    a row: how it ended, seconds, and its peak memory in GiB with pages of the files that it reads.
    Raises AssertionError: it ended in another way."""
    began = time.perf_counter()
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output_dir / "cache")}
    pid = start([str(x) for x in words], env | {"CUDA_VISIBLE_DEVICES": ""})
    ended = 0
    try:
        while not ended:
            time.sleep(0.005)
            if kill_at is not None and kill_at.exists():
                os.kill(pid, signal.SIGKILL)
            ended, status, usage = os.wait4(pid, os.WNOHANG)
    finally:
        if not ended:  # interrupted
            os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    assert code == (0 if kill_at is None else -signal.SIGKILL), f"{name} ended with {code}"
    end = "killed" if kill_at else "exit 0"
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss / 2**20
    print(f"| {name} | {end} | {seconds:.0f} | {peak:.2f} |", flush=True)


# --- What they promise --------------------------------------------------------------------------


def check_resumed(output_dir: Path, first: list[str]) -> None:
    """The second step follows the first, of which nothing was changed; all is finite; a checkpoint
    takes 12 bytes per trained parameter. first: metrics.jsonl after the kill."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == first[0], "the resumed run wrote step 1 again"
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2], metrics
    assert all(math.isfinite(x) for line in metrics for x in line.values()), metrics
    last = checkpoints(output_dir)[-1]
    assert last.name == "checkpoint-000002", last
    before, after = (load_file(x / LORA) for x in (output_dir / "checkpoint-000001", last))
    assert before.keys() == after.keys()
    for name, x in after.items():
        # The last block's text queries lead nowhere: no gradient.
        moved = not torch.equal(x, before[name]) or "add_q_proj" in name
        assert moved and x.isfinite().all(), f"{name} did not move, or is not finite"
    moments = load_file(last / "optimizer.safetensors")
    assert all(x.isfinite().all() for x in moments.values())
    steps = {float(x) for name, x in moments.items() if name.endswith(".step")}
    assert steps == {2.0}, f"AdamW counts {steps} steps, expected 2"
    written = sum(x.stat().st_size for x in last.iterdir())
    per_parameter = written / sum(x.numel() for x in after.values())
    assert 12 <= per_parameter < 12.5, f"{per_parameter:.2f} bytes per parameter, expected 12"


def check_images(folder: Path, side: int) -> None:
    """They are of the size that was asked for, not blank, and training has changed them."""
    places = (folder / "base", next(folder.glob("*-lora")))
    images = [np.asarray(Image.open(x / "00000/samples/00000.png")).astype(float) for x in places]
    for image in images:
        assert image.shape == (side, side, 3), image.shape
        assert image.std() > 1, "an image is blank"
    apart = np.abs(images[0] - images[1]).mean()
    assert apart > 1 and (folder / "compare.png").is_file(), apart


# --- All of it ----------------------------------------------------------------------------------


def main(args: Args) -> None:
    output, lora = args.output_dir.resolve(), args.output_dir.resolve() / "lora"
    if visible(output):
        raise ValueError(f"--output_dir {output} is not empty, expected a new one")
    output.mkdir(parents=True, exist_ok=True)
    side = 512 if args.blocks is None else 64
    # The README's command for a small GPU, with two steps and a learning rate that shows.
    train = [
        "train.py", "--pretrained_model_name_or_path", output / "model", "--dataset", PAIRS,
        "--output_dir", lora, "--lora_rank", 16, "--mixed_precision", "bf16",
        "--gradient_checkpointing", "--resolution", side, "--train_batch_size", 1,
        "--num_aux_points", 1, "--max_train_steps", 2, "--checkpointing_steps", 1,
        "--logging_steps", 1, "--learning_rate", 1e-2,
    ]  # fmt: skip
    sample = [  # both images are from the same noise
        "sample.py", "--pretrained_model_name_or_path", output / "model", "--prompt", "a bench",
        "--output_dir", output / "images", "--transformer", "base", lora,
        "--num_inference_steps", 2, "--num_images_per_prompt", 1, "--height", side, "--width", side,
    ]  # fmt: skip
    try:
        write_pipeline(output / "model", args.blocks)
        print("| command | ends | seconds | peak GiB |\n| --- | --- | ---: | ---: |")
        run("train, step 1", output, train, kill_at=lora / "checkpoint-000001")
        first = (lora / "metrics.jsonl").read_text().splitlines()
        run("train, the same command", output, train)
        check_resumed(lora, first)
        run("sample, base and LoRA", output, sample)
        check_images(output / "images", side)
    finally:
        shutil.rmtree(output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
