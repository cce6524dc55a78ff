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
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent / "shapes/data"
BEFORE = "    # Handle class prompt for prior-preservation.\n"
FIRST = "                # Add noise according to flow matching.\n"
LAST = "                accelerator.backward(loss)\n"
SCRIPTS = {  # name: script, heading of the page, other arguments
    "sd3": ("train_dreambooth_sd3.py", "Stable Diffusion 3", []),
    "sd3_lora": ("train_dreambooth_lora_sd3.py", "Stable Diffusion 3", []),
    "flux_lora": ("train_dreambooth_lora_flux.py", "Flux.1", []),
    "flux2_lora": ("train_dreambooth_lora_flux2.py", "Flux.2", []),
    "qwen_lora": ("train_dreambooth_lora_qwen_image.py", "Qwen-Image", []),
    "z_image_lora": ("train_dreambooth_lora_z_image.py", "Z-Image", []),
}


def blocks(page: str) -> dict[str, list[str]]:
    """The Python blocks of the page by the heading that they stand under; of a diff the new code."""
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


def edited(script: str, heading: str, *, self_test: bool) -> str:
    """A diffusers script with the recipe pasted as the page says: the self-test beside the
    script's own loss, or SOAR in its place."""
    page = blocks((HERE / "recipes.md").read_text())
    shared, loop = page["diffusers' scripts"]
    before, inside = page[heading]
    for anchor in (BEFORE, FIRST, LAST):
        if script.count(anchor) != 1:
            raise ValueError(f"the script has {script.count(anchor)} lines {anchor.strip()!r}")
    script = script.replace(BEFORE, textwrap.indent(shared + before, " " * 4) + BEFORE)
    start, end = script.index(FIRST), script.index(LAST)
    if self_test:
        (check,) = page["Their self-test"]
        return script[:end] + textwrap.indent(inside + check, " " * 16) + script[end:]
    recipe = textwrap.indent(inside + loop, " " * 16)
    return script[:start] + recipe + script[end + len(LAST) :]


# --- Tiny pipelines of the real classes ---


def _save_pipeline(name: str, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    if name.startswith("sd3"):
        shutil.copytree(DATA / "model", folder, dirs_exist_ok=True)
        return
    scheduler, vae, transformer = {
        "flux_lora": _flux, "flux2_lora": _flux2, "qwen_lora": _qwen, "z_image_lora": _z_image,
    }[name]()  # fmt: skip
    for parameter in transformer.parameters():  # zeros of a fresh model would hide mistakes
        parameter.data += 0.05 * torch.randn(parameter.shape)
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    if name == "flux_lora":  # loaded, and then not called: see _encode
        from transformers import CLIPTextModel

        clip = CLIPTextModel.from_pretrained(DATA / "model", subfolder="text_encoder")
        clip.save_pretrained(folder / "text_encoder")
        for source, target in FLUX_TEXT.items():
            shutil.copytree(DATA / "model" / source, folder / target)


def _scheduler(**config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _vae(scale: float, shift: float):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(DATA / "model", subfolder="vae")
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return vae


FLUX_TEXT = {"text_encoder_3": "text_encoder_2", "tokenizer": "tokenizer"}
FLUX_TEXT |= {"tokenizer_3": "tokenizer_2"}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}


def _flux():
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = _scheduler(**DYNAMIC, max_shift=1.15, max_image_seq_len=4096, shift=3.0)
    return scheduler, _vae(1.0, 0.05), transformer


def _flux2():
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(4, 4, 4),
        layers_per_block=1, latent_channels=4, norm_num_groups=1,
    )  # fmt: skip
    return _scheduler(**DYNAMIC, max_shift=1.15, max_image_seq_len=4096, shift=3.0), vae, transformer


def _qwen():
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
    )  # fmt: skip
    return _scheduler(**DYNAMIC, max_shift=0.9, max_image_seq_len=8192), vae, transformer


def _z_image():
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return _scheduler(shift=3.0), _vae(1.0, 0.05), transformer


class _Text:
    """In place of a text encoder and its tokenizer, and of a pipeline of the two."""

    def __init__(self, name: str):
        self.name = name

    def from_pretrained(self, *_, **__):
        return self

    to = requires_grad_ = load_lora_weights = from_pretrained

    def encode_prompt(self, prompt, **_):
        import torch

        prompts = [prompt] if isinstance(prompt, str) else prompt
        rng = torch.Generator()
        each = [torch.randn(6, 16, generator=rng.manual_seed(len(x))) for x in prompts]
        if self.name == "z_image_lora":
            return each, None
        embeds = torch.stack(each)
        if self.name == "qwen_lora":
            return embeds, torch.ones(len(each), 6, dtype=torch.int64)
        ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 6)))
        return embeds, ids.expand(len(each), -1, -1)


def _encode(text_encoders, tokenizers, prompt, *_):
    """In place of the SD3 and Flux scripts' encode_prompt: the tiny CLIP takes 12 tokens, not 77."""
    import torch

    prompts = [prompt] if isinstance(prompt, str) else prompt
    rng = torch.Generator()
    each = [torch.randn(7, 64, generator=rng.manual_seed(len(x))) for x in prompts]
    embeds = torch.stack(each)
    if len(text_encoders) == 3:
        return embeds[:, 1:], embeds[:, 0]
    return embeds[:, 1:], embeds[:, 0, :32], torch.zeros(6, 3)


STUBBED = {
    "flux_lora": ("FluxPipeline",),  # loaded at the end, for images that are not asked for
    "flux2_lora": ("Flux2Pipeline", "PixtralProcessor", "Mistral3ForConditionalGeneration"),
    "qwen_lora": ("QwenImagePipeline", "Qwen2Tokenizer", "Qwen2_5_VLForConditionalGeneration"),
    "z_image_lora": ("ZImagePipeline", "Qwen2Tokenizer", "Qwen3Model"),
}


# --- One run, in a process of its own ---


def run_one(diffusers: Path, name: str, mode: str) -> None:
    """Prints a JSON line: the self-test's ratios, or the steps that SOAR ran."""
    sys.path.insert(0, str(HERE.parents[1]))  # soar.py
    from experiments.shapes.draw import read_pairs

    folder = Path(tempfile.mkdtemp())
    script, heading, extra = SCRIPTS[name]
    path = diffusers / "examples" / "dreambooth" / script
    text = edited(path.read_text(), heading, self_test=mode != "soar")
    (folder / "script.py").write_text(text)
    _save_pipeline(name, folder / "model")
    (folder / "data").mkdir()
    lines = []
    for i, row in enumerate(read_pairs().select(range(8))):
        row["image"].save(folder / "data" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"]}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))

    spec = importlib.util.spec_from_file_location("script", folder / "script.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name in ("sd3", "sd3_lora", "flux_lora"):
        module.encode_prompt = _encode
    if name in STUBBED:
        pipeline, *rest = STUBBED[name]
        stub = _Text(name)
        patched = type("Pipeline", (getattr(module, pipeline),), {"from_pretrained": stub.to})
        setattr(module, pipeline, patched)
        for other in rest:
            setattr(module, other, stub)
    words = f"""--pretrained_model_name_or_path {folder / "model"} --dataset_name {folder / "data"}
        --caption_column text --instance_prompt x --output_dir {folder / "out"} --resolution 64
        --train_batch_size 2 --max_train_steps 4 --seed 0 --learning_rate 1e-4
        --mixed_precision {"bf16" if mode == "bf16" else "no"}""".split()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.args = module.parse_args(words + extra)  # a global there
        module.main(module.args)
    ratios = re.findall(r"ratio ([\d.]+|nan)", printed.getvalue())
    saved = sorted(x.name for x in (folder / "out").rglob("*.safetensors"))
    print(json.dumps({"off": [abs(float(x) - 1) for x in ratios], "saved": saved}))
    shutil.rmtree(folder)


def changed_lines(diffusers: Path, name: str) -> tuple[int, int]:
    script, heading, _ = SCRIPTS[name]
    old = (diffusers / "examples" / "dreambooth" / script).read_text()
    new = edited(old, heading, self_test=False)
    removed = old[old.index(FIRST) : old.index(LAST) + len(LAST)].count("\n")
    return new.count("\n") - old.count("\n") + removed, removed


def write(diffusers: Path, names: list[str], folder: Path) -> None:
    """The scripts with SOAR in place of their loss, and with the self-test, as SELFTEST_SCRIPT."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        script, heading, _ = SCRIPTS[name]
        text = (diffusers / "examples" / "dreambooth" / script).read_text()
        (folder / script).write_text(edited(text, heading, self_test=False))
        (folder / f"selftest_{script}").write_text(edited(text, heading, self_test=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--write", type=Path, help="write the scripts there, and run nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.diffusers, *args.one)
    if args.write:
        write(args.diffusers, args.only, args.write)
        return
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    for name in args.only:
        results = {}
        for mode in ("float32", "bf16", "soar"):
            command = [sys.executable, __file__, "--diffusers", args.diffusers, "--one", name, mode]
            run = subprocess.run(command, env=env, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(f"{name} {mode}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
            results[mode] = json.loads(run.stdout.splitlines()[-1])
        added, removed = changed_lines(args.diffusers, name)
        off = [f"{max(results[mode]['off']):.0e}" for mode in ("float32", "bf16")]
        ran = "yes" if results["soar"]["saved"] else "no"
        row = (SCRIPTS[name][0], f"{added}, {removed}", *off, ran)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
