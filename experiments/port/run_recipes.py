"""Run the recipes of recipes.md in diffusers' training scripts, whole, with tiny random models.

    python -m experiments.port.run_recipes --diffusers CHECKOUT [--only flux2_lora ...]
    python -m experiments.port.run_recipes --diffusers CHECKOUT --only flux2_lora --write DIR

CHECKOUT is a clone of huggingface/diffusers; its scripts are read from there and edited as the page
says. The second command writes them to DIR. The first runs each three times on eight images of the
shapes world: with the self-test in float32 and in bf16, then with SOAR in place of its loss. A row
for each is printed in the form of the page's last table. Text encoders are stubs that return random
embeddings of the prompt. Needs torchvision.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import datasets
import diffusers
import pyarrow.parquet
import torch

from experiments.environment import run

HERE = Path(__file__).parent
DATA = HERE.parent / "shapes/data"
BEFORE = "    # Handle class prompt for prior-preservation.\n"
FIRST = "                # Add noise according to flow matching.\n"
LAST = "                accelerator.backward(loss)\n"


def blocks(page: str) -> dict[str, list[str]]:
    """The Python blocks of a page by the heading that they stand under; of a diff the new code."""
    found: dict[str, list[str]] = {}
    heading = ""
    pattern = r"^#+ ([^\n]*)$|^```(python|diff)\n(.*?)^```$"
    for title, language, text in re.findall(pattern, page, re.M | re.S):
        heading = title or heading
        if language == "diff":
            new = [line[1:] for line in text.splitlines() if not line.startswith("-")]
            text = "\n".join(new) + "\n"
        if text:
            found.setdefault(heading, []).append(text)
    return found


PAGE = blocks((HERE / "recipes.md").read_text())


def edited(script: str, heading: str, *, self_test: bool) -> str:
    """A diffusers script with the recipe pasted as the page says: the self-test beside the
    script's own loss, or SOAR in its place."""
    shared, loop = PAGE["diffusers' scripts"]
    before, inside = PAGE[heading]
    for anchor in (BEFORE, FIRST, LAST):
        if script.count(anchor) != 1:
            raise ValueError(f"the script has {script.count(anchor)} lines {anchor.strip()!r}")
    script = script.replace(BEFORE, textwrap.indent(shared + before, " " * 4) + BEFORE)
    start, end = script.index(FIRST), script.index(LAST)
    if self_test:
        check = "sigmas, noise, weighting = timesteps / 1000, pack(noise), loss_weights\n"
        check += PAGE["The self-test"][0]
        return script[:end] + textwrap.indent(inside + check, " " * 16) + script[end:]
    recipe = textwrap.indent(inside + loop, " " * 16)
    return script[:start] + recipe + script[end + len(LAST) :]


SMALL = {  # of the real classes
    "FluxTransformer2DModel": {
        "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32,
        "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
        "timestep_guidance_channels": 256, "axes_dims_rope": [4, 4, 4, 4],
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
    "ZImageTransformer2DModel": {
        "in_channels": 16, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
    },
    "AutoencoderKLFlux2": {
        "sample_size": 32, "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (4, 4, 4),
        "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True], "latents_mean": [0.1] * 4, "latents_std": [0.9] * 4,
    },
}  # fmt: skip


def small(name: str, **other) -> torch.nn.Module:
    return getattr(diffusers, name)(**SMALL[name] | other)


class Script(NamedTuple):
    file: str
    heading: str  # of the page
    transformer: str = ""  # "": the whole pipeline is the shapes world's
    vae: str = ""  # "": the shapes world's
    scheduler: dict = {}
    stubs: tuple[str, ...] = ()  # loaded from the pipeline's folder: see Text


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}
FLUX = DYNAMIC | {"max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0}
QWEN = DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192}
SCRIPTS = {
    "sd3": Script("train_dreambooth_sd3.py", "Stable Diffusion 3"),
    "sd3_lora": Script("train_dreambooth_lora_sd3.py", "Stable Diffusion 3"),
    "flux_lora": Script(
        "train_dreambooth_lora_flux.py", "Flux.1", "FluxTransformer2DModel", "", FLUX,
        ("FluxPipeline", "CLIPTokenizer", "T5TokenizerFast",
         "import_model_class_from_model_name_or_path"),
    ),
    "flux2_lora": Script(
        "train_dreambooth_lora_flux2.py", "Flux.2", "Flux2Transformer2DModel",
        "AutoencoderKLFlux2", FLUX,
        ("Flux2Pipeline", "PixtralProcessor", "Mistral3ForConditionalGeneration"),
    ),
    "qwen_lora": Script(
        "train_dreambooth_lora_qwen_image.py", "Qwen-Image", "QwenImageTransformer2DModel",
        "AutoencoderKLQwenImage", QWEN,
        ("QwenImagePipeline", "Qwen2Tokenizer", "Qwen2_5_VLForConditionalGeneration"),
    ),
    "z_image_lora": Script(
        "train_dreambooth_lora_z_image.py", "Z-Image", "ZImageTransformer2DModel", "",
        {"shift": 3.0}, ("ZImagePipeline", "Qwen2Tokenizer", "Qwen3Model"),
    ),
}  # fmt: skip


def save_pipeline(script: Script, folder: Path) -> None:
    torch.manual_seed(0)
    if not script.transformer:
        shutil.copytree(DATA / "model", folder)
        return
    transformer = small(script.transformer)
    for parameter in transformer.parameters():  # zeros of a fresh model would hide mistakes
        parameter.data += 0.05 * torch.randn(parameter.shape)
    transformer.save_pretrained(folder / "transformer")
    if script.vae:
        vae = small(script.vae)
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(DATA / "model", subfolder="vae")
        vae.register_to_config(scaling_factor=1.0, shift_factor=0.05)
    vae.save_pretrained(folder / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**script.scheduler)
    scheduler.save_pretrained(folder / "scheduler")


def embeddings(prompt: str | list[str], *shape: int) -> list[torch.Tensor]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    rng = torch.Generator()
    return [torch.randn(shape, generator=rng.manual_seed(len(x))) for x in prompts]


class Text:
    """In place of a text encoder and its tokenizer, and of a pipeline of the two."""

    def __init__(self, heading: str):
        self.heading = heading

    def from_pretrained(self, *_, **__):
        return self

    to = requires_grad_ = load_lora_weights = __call__ = from_pretrained

    def encode_prompt(self, prompt, **_):
        each = embeddings(prompt, 6, 16)
        if self.heading == "Z-Image":
            return each, None
        if self.heading == "Qwen-Image":
            return torch.stack(each), torch.ones(len(each), 6, dtype=torch.int64)
        ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 6)))
        return torch.stack(each), ids.expand(len(each), -1, -1)


def encode_prompt(text_encoders, tokenizers, prompt, *_):
    """In place of the SD3 and Flux scripts' own: the tiny CLIP takes 12 tokens, not 77."""
    embeds = torch.stack(embeddings(prompt, 7, 64))
    if len(text_encoders) == 3:
        return embeds[:, 1:], embeds[:, 0]
    return embeds[:, 1:], embeds[:, 0, :32], torch.zeros(6, 3)


# --- One run, in a process of its own ---


def source(checkout: Path, name: str) -> str:
    return (checkout / "examples/dreambooth" / SCRIPTS[name].file).read_text()


def save_images(folder: Path) -> None:
    lines = []
    folder.mkdir()
    pairs = datasets.Dataset(pyarrow.parquet.read_table(DATA / "train.parquet"))
    for i, row in enumerate(pairs.select(range(8))):
        row["image"].save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def load(script: Script, path: Path):
    """The edited script as a module, with stubs for its text encoders."""
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if script.heading in ("Stable Diffusion 3", "Flux.1"):
        module.encode_prompt = encode_prompt
    text = Text(script.heading)
    for name in script.stubs:
        stub = text
        if name.endswith("Pipeline"):  # its other methods are called
            stub = type(name, (getattr(module, name),), {"from_pretrained": text.from_pretrained})
        setattr(module, name, stub)
    return module


def run_one(checkout: str, name: str, mode: str) -> None:
    """Prints a JSON line: how far the self-test's ratios are off, and what was saved."""
    script = SCRIPTS[name]
    with TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = Path(work)
        path = folder / "script.py"
        text = source(Path(checkout), name)
        path.write_text(edited(text, script.heading, self_test=mode != "soar"))
        save_pipeline(script, folder / "model")
        save_images(folder / "data")
        module = load(script, path)
        words = f"""--pretrained_model_name_or_path {folder / "model"}
            --dataset_name {folder / "data"} --caption_column text --instance_prompt x
            --output_dir {folder / "out"} --resolution 64 --train_batch_size 2 --max_train_steps 4
            --seed 0 --learning_rate 1e-4 --mixed_precision {"bf16" if mode == "bf16" else "no"}"""
        module.args = module.parse_args(words.split())  # a global there
        module.main(module.args)
        saved = sorted(x.name for x in (folder / "out").rglob("*.safetensors"))
    ratios = re.findall(r"ratio ([\d.]+|nan)", printed.getvalue())
    print(json.dumps({"off": [abs(float(x) - 1) for x in ratios], "saved": saved}))


def row(checkout: Path, name: str) -> str:
    """A line of the page's last table, from three runs."""
    results = {}
    for mode in ("float32", "bf16", "soar"):
        call = f"run_one({str(checkout)!r}, {name!r}, {mode!r})"
        code = f"from experiments.port.run_recipes import run_one; {call}"
        results[mode] = json.loads(run(sys.executable, "-c", code).splitlines()[-1])
    file, heading, *_ = SCRIPTS[name]
    old = source(checkout, name)
    new = edited(old, heading, self_test=False)
    removed = old[old.index(FIRST) : old.index(LAST) + len(LAST)].count("\n")
    added = new.count("\n") - old.count("\n") + removed
    off = [f"{max(results[mode]['off']):.0e}" for mode in ("float32", "bf16")]
    ran = "yes" if results["soar"]["saved"] else "no"
    return f"| {' | '.join((file, f'{added}, {removed}', *off, ran))} |"


def write(checkout: Path, name: str, folder: Path) -> None:
    """The script with SOAR in place of its loss, and with the self-test, as selftest_SCRIPT."""
    file, heading, *_ = SCRIPTS[name]
    text = source(checkout, name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(edited(text, heading, self_test=False))
    (folder / f"selftest_{file}").write_text(edited(text, heading, self_test=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--write", type=Path, help="write the scripts there, and run nothing")
    args = parser.parse_args()
    for name in args.only:
        if args.write:
            write(args.diffusers, name, args.write)
        else:
            print(row(args.diffusers.resolve(), name), flush=True)


if __name__ == "__main__":
    main()
