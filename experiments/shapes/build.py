"""Makes the shapes world from seeds: its pairs and prompts, and a pretrained Stable Diffusion 3 pipeline.

    python -m experiments.shapes.build          # make everything in experiments/shapes/data from seeds

The classes are the real ones: a StableDiffusion3Pipeline whose transformer (3.0 M parameters), VAE and three
text encoders are small; the text encoders are random and frozen. WRONG_CAPTIONS of the captions it is pretrained on
belong to another scene, and in a short last phase LATE_WRONG_CAPTIONS, so that the base knows more than it obeys:
what SFT is for.
"""

import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from experiments.shapes.draw import (
    BROAD,
    COLORS,
    CURATED,
    DATA,
    HELD_OUT,
    MAX_SEQUENCE_LENGTH,
    NUMBERS,
    PAIRS,
    RELATIONS,
    SHAPES,
    SIZE,
    TAGS,
    aesthetic_score,
    example,
    make_metadata,
    render,
)
from sample import encode_prompts

WRONG_CAPTIONS, LATE_WRONG_CAPTIONS = 0.15, 0.7
CAPTION_DROPOUT = 0.1
SHIFT = 3.0


def vocabulary() -> list[str]:
    """Every word of every caption."""
    plurals = [s + ("es" if s.endswith("s") else "s") for s in SHAPES]
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return sorted({"a", "photo", "of", "and", *SHAPES, *plurals, *COLORS, *NUMBERS.values(), *relation_words})


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """Word-level tokenizers: two CLIP ones, whose BPE merges spell whole words, and a Unigram T5.

    The BPE trainer breaks ties in an order that changes from run to run, and with it CLIP's token numbers: another
    build's pipeline is as good as the committed one, but not the same bits."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.train_from_iterator(vocabulary(), BpeTrainer(
        vocab_size=10_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    ))  # fmt: skip
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    limit = {"model_max_length": MAX_SEQUENCE_LENGTH}
    clips = [CLIPTokenizer(vocab=trained["vocab"], merges=merges, **limit) for _ in range(2)]
    # T5TokenizerFast reloads only from a Unigram vocabulary.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *(("▁" + word, -1.0) for word in vocabulary())]
    return *clips, T5TokenizerFast(vocab=pieces, extra_ids=0, **limit)


@torch.no_grad()
def _spread(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    # The classes' own init is made for training: at std 0.02 a random encoder returns nearly the same vector
    # for every caption. Unit embeddings and variance-preserving layers keep words apart; T5's wide relative
    # bias makes its heads look at neighbours, so that a shape's embedding holds the colour next to it.
    for name, p in model.named_parameters():
        if p.ndim == 2:
            scale = 1.0 if "embed" in name or "shared" in name else p.shape[1] ** -0.5
            scale = 3.0 if "relative_attention_bias" in name else scale
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval().requires_grad_(False)


def build_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline around a trained VAE: frozen random text encoders and an untrained transformer."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizers()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_SEQUENCE_LENGTH, projection_dim=32,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer_3), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():  # the constructors draw from the global generator
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 8, patch_size=1, in_channels=16, num_layers=5, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128,
            pooled_projection_dim=64, out_channels=16, pos_embed_max_size=16, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )  # fmt: skip
        encoders = CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip), T5EncoderModel(t5)
    encoders = [_spread(encoder, generator) for encoder in encoders]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae,
        text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=encoders[2],
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def to_pixels(images: Iterable[Image.Image]) -> Tensor:
    """RGB images of one size -> (n, 3, height, width) uint8."""
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2).contiguous()


def train_vae(pixels: Tensor, steps: int, seed: int, batch: int = 16, lr: float = 2e-3) -> AutoencoderKL:
    """Train a 16-channel, 8x down-sampling autoencoder on (n, 3, 64, 64) uint8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8,
            sample_size=SIZE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    for step in (bar := tqdm(range(steps), desc="vae", mininterval=10)):
        x = pixels[torch.randint(len(pixels), (batch,), generator=generator)] / 127.5 - 1
        found = vae.encode(x).latent_dist
        y = vae.decode(found.sample(generator=generator)).sample
        # A weak KL term keeps latents smooth without blurring: edges are what the scorer reads.
        kl = 0.5 * (found.mean**2 + found.var - 1 - found.logvar).mean()
        loss = (x - y).abs().mean() + (x - y).square().mean() + 1e-3 * kl
        optimizer.param_groups[0]["lr"] = lr * min(
            (step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix(l1=f"{(x - y).abs().mean().item():.4f}", kl=f"{kl.item():.3f}")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """(n, 3, 64, 64) uint8 -> the posterior's mean and std, (n, 16, 8, 8) float32, before shift and scale."""
    chunks = tqdm(pixels.split(batch), desc="latents", mininterval=10)
    found = [vae.encode(x / 127.5 - 1).latent_dist for x in chunks]
    return torch.cat([x.mean for x in found]), torch.cat([x.std for x in found])


def _state(transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    named = dict(transformer.named_parameters())
    state = {f"weight.{name}": p.detach() for name, p in named.items()}
    return state | {f"{key}.{name}": v for name, p in named.items() for key, v in optimizer.state[p].items()}


@torch.no_grad()
def _restore(
    transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    for name, p in transformer.named_parameters():
        p.copy_(state[f"weight.{name}"])
        optimizer.state[p] = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}


def pretrain(
    pipe: StableDiffusion3Pipeline, mean: Tensor, std: Tensor | None, captions: list[str], steps: int, seed: int,
    checkpoint: Path, batch: int = 64, lr: float = 1e-3, compile: bool = False,
) -> None:  # fmt: skip
    """Train pipe.transformer in place by rectified flow.

        mean |v(z_sigma, sigma, c) - (z1 - z0)|^2,   t ~ logit-normal(0, 1),   sigma = 3 t / (1 + 2 t)

    Args:
        mean, std: (n, 16, 8, 8) float32 of the VAE's posterior, before shift and scale. z0 is a sample of it, or
            its mean where std is None.
        captions: n captions; CAPTION_DROPOUT of the draws see "" instead, for guidance.
        steps: optimizer steps of `batch` samples; the learning rate falls to 0 over the last quarter.
        checkpoint: written every 500 steps; where it exists, the run goes on from it, as if never stopped.
        compile: use torch.compile (needs a C++ compiler), 1.3 times as fast.
    """
    table = sorted({"", *captions})  # "" comes first
    embeds = encode_prompts(pipe, table, MAX_SEQUENCE_LENGTH)
    index = torch.tensor([table.index(c) for c in captions])
    generator = torch.Generator().manual_seed(seed)
    transformer, vae = pipe.transformer.train(), pipe.vae.config
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    first, average = 0, None
    if checkpoint.exists():
        state = load_file(checkpoint)
        generator.set_state(state["generator"])
        first = int(state["done"])
        _restore(transformer, optimizer, state)
    if compile:
        transformer.compile()
    for step in (
        bar := tqdm(range(first, steps), desc="transformer", initial=first, total=steps, mininterval=10)
    ):
        rows = torch.randint(len(mean), (batch,), generator=generator)
        keep = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        caption = index[rows] * keep
        z1 = torch.randn(batch, *mean.shape[1:], generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        z0 = mean[rows]
        if std is not None:
            z0 = z0 + std[rows] * torch.randn(z0.shape, generator=generator)
        z0 = (z0 - vae.shift_factor) * vae.scaling_factor
        s = sigma[:, None, None, None]
        cond = {key: x[caption] for key, x in embeds.items()}
        v = transformer((1 - s) * z0 + s * z1, timestep=1000 * sigma, return_dict=False, **cond)[0]
        loss = (v - (z1 - z0)).square().mean()
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, 1, (steps - step) / (steps / 4))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 500 == 0:
            state = _state(transformer, optimizer)
            state |= {"generator": generator.get_state(), "done": torch.tensor(step + 1)}
            save_file(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
    transformer.eval().requires_grad_(False)


def held_out_prompts(per_task: int = 100) -> list[dict]:
    """The metadata of prompts.jsonl: `per_task` draws of each task, in the order of TAGS."""
    tags = [tag for tag in TAGS for _ in range(per_task)]
    return [
        make_metadata(np.random.default_rng(HELD_OUT + i), tag, held_out=True) for i, tag in enumerate(tags)
    ]


def mislabel(captions: list[str], share: float, seed: int) -> list[str]:
    """The captions, of which about this share have changed places among themselves."""
    mixed, rng = np.array(captions), np.random.default_rng(seed)
    wrong = np.flatnonzero(rng.random(len(mixed)) < share)
    mixed[wrong] = mixed[rng.permutation(wrong)]
    return mixed.tolist()


def write_pairs(rows: list[dict], path: Path) -> None:
    """Write pairs {"image": {"bytes", "path"}, "text", "aesthetic"} to a parquet file, as datasets keeps images."""
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "aesthetic": datasets.Value("float64")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(path)


def write_data(out: Path, pairs: int) -> None:
    """Write the curated pairs out/train.parquet and the held-out out/prompts.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pairs):
        metadata, scene = example(CURATED + i)
        png = io.BytesIO()
        render(scene).save(png, format="PNG", optimize=True)
        image = {"bytes": png.getvalue(), "path": f"{i:05d}.png"}
        rows.append({"image": image, "text": metadata["prompt"], "aesthetic": aesthetic_score(scene)})
    write_pairs(rows, out / PAIRS.name)
    (out / "prompts.jsonl").write_text("".join(json.dumps(m) + "\n" for m in held_out_prompts()))


def build(
    out: Path = DATA, work: Path = Path("/tmp/shapes_build"), scenes: int = 32_000, pairs: int = 2_000,
    vae_steps: int = 1_500, steps: int = 6_000, late_steps: int = 400, seed: int = 0, compile: bool = False,
) -> None:  # fmt: skip
    """Make the data and the pipeline from seeds; what lies in `work` already is not made again."""
    write_data(out, pairs)
    examples = [example(BROAD + i) for i in tqdm(range(scenes), desc="scenes", mininterval=10)]
    captions = [metadata["prompt"] for metadata, _ in examples]
    pixels = to_pixels(render(scene) for _, scene in tqdm(examples, desc="drawing", mininterval=10))

    if not (work / "vae").exists():
        vae = train_vae(pixels, vae_steps, seed)
        latents, _ = posterior(vae, pixels[:2_000])
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        vae.save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)

    if (work / "pipeline").exists():  # a new one's tokens have other numbers, which its transformer would not know
        pipe = StableDiffusion3Pipeline.from_pretrained(work / "pipeline", vae=vae)
    else:
        pipe = build_pipeline(vae, seed)
        pipe.save_pretrained(work / "pipeline")
    mean, std = posterior(vae, pixels)
    if not (work / "transformer").exists():
        noisy = mislabel(captions, WRONG_CAPTIONS, seed)
        pretrain(pipe, mean, None, noisy, steps, seed, work / "pretrain.safetensors", compile=compile)
        pipe.transformer.save_pretrained(work / "transformer")
    pipe.transformer = SD3Transformer2DModel.from_pretrained(work / "transformer")
    noisy = mislabel(captions, LATE_WRONG_CAPTIONS, seed)
    pretrain(pipe, mean, std, noisy, late_steps, seed + 1, work / "late.safetensors", lr=5e-4, compile=compile)

    # Half precision on disk only: from_pretrained gives float32 back.
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(out / "model")


if __name__ == "__main__":
    tyro.cli(build)
