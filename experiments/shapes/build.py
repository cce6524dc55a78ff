"""Makes the shapes world from seeds: its pairs and prompts, and a pretrained pipeline.

    python -m experiments.shapes.build     # all of experiments/shapes/data, in an hour

A StableDiffusion3Pipeline whose transformer (3.0 M parameters), VAE and text encoders are small;
the encoders are random and frozen. WRONG_CAPTIONS of the captions it is pretrained on belong to
another scene, in a short last phase LATE_WRONG_CAPTIONS: the base knows more than it obeys.
"""

import io
import json
import math
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

from experiments.shapes import draw
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, PAIRS, SIZE
from sample import encode_prompts

WRONG_CAPTIONS, LATE_WRONG_CAPTIONS = 0.15, 0.7
CAPTION_DROPOUT = 0.1
SHIFT = 3.0


# --- Pairs and prompts ---


def write_data(out: Path, pairs: int) -> None:
    """Write the curated pairs out/train.parquet and the held-out out/prompts.jsonl, 100 a task."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pairs):
        metadata, scene = draw.example(draw.CURATED + i)
        png = io.BytesIO()
        draw.render(scene).save(png, format="PNG", optimize=True)
        image = {"bytes": png.getvalue(), "path": f"{i:05d}.png"}
        score = draw.aesthetic_score(scene)
        rows.append({"image": image, "text": metadata["prompt"], "aesthetic": score})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(out / PAIRS.name)
    lines = []
    for i in range(600):
        rng = np.random.default_rng(draw.HELD_OUT + i)
        metadata = draw.make_metadata(rng, draw.TAGS[i // 100], held_out=True)
        lines.append(json.dumps(metadata) + "\n")
    (out / "prompts.jsonl").write_text("".join(lines))


def mislabel(captions: list[str], share: float, seed: int) -> list[str]:
    """The captions, of which about this share have changed places among themselves."""
    mixed, rng = np.array(captions), np.random.default_rng(seed)
    wrong = np.flatnonzero(rng.random(len(mixed)) < share)
    mixed[wrong] = mixed[rng.permutation(wrong)]
    return mixed.tolist()


def drawn(first: int, count: int) -> tuple[Tensor, list[str]]:
    """Examples from this seed on: pixels (n, 3, SIZE, SIZE) uint8 and captions."""
    examples = [draw.example(first + i) for i in tqdm(range(count), "scenes", mininterval=10)]
    pixels = np.stack([np.asarray(draw.render(scene)) for _, scene in examples])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return pixels, [metadata["prompt"] for metadata, _ in examples]


# --- The pipeline ---


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """Word-level tokenizers: two CLIP ones, whose BPE merges spell whole words, and a Unigram T5.

    The BPE trainer breaks ties in an order that changes from run to run, and with it CLIP's token
    numbers: another build's pipeline is as good as the committed one, but not the same bits."""
    words = {"a", "photo", "of", "and", *draw.SHAPES, *draw.COLORS, *draw.NUMBERS.values()}
    words |= {draw.plural(shape) for shape in draw.SHAPES}
    words = sorted(words.union(*(relation.split() for relation in draw.RELATIONS)))
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(
        vocab_size=10_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    bpe.train_from_iterator(words, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    limit = {"model_max_length": MAX_SEQUENCE_LENGTH}
    clips = [CLIPTokenizer(vocab=trained["vocab"], merges=merges, **limit) for _ in range(2)]
    # T5TokenizerFast reloads only from a Unigram vocabulary.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    return *clips, T5TokenizerFast(vocab=pieces, extra_ids=0, **limit)


@torch.no_grad()
def spread(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    # At their own init's std of 0.02 random encoders return nearly the same for every caption. Unit
    # embeddings and variance-preserving layers keep words apart; T5's wide relative bias makes its
    # heads look at neighbours, so that a shape's embedding holds the colour next to it.
    for name, p in model.named_parameters():
        if p.ndim == 2:
            scale = 1.0 if "embed" in name or "shared" in name else p.shape[1] ** -0.5
            scale = 3.0 if "relative_attention_bias" in name else scale
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval().requires_grad_(False)


def text_encoders(clip: CLIPTokenizer, t5: T5TokenizerFast, generator: torch.Generator) -> list:
    config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_SEQUENCE_LENGTH, projection_dim=32,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    return [spread(encoder, generator) for encoder in (*encoders, T5EncoderModel(t5_config))]


def build_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """A trained VAE, frozen random text encoders and an untrained transformer."""
    tokenizers = build_tokenizers()
    with torch.random.fork_rng():  # the constructors draw from the global generator
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 8, patch_size=1, in_channels=16, out_channels=16, num_layers=5,
            attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=16,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        encoders = text_encoders(*tokenizers[1:], torch.Generator().manual_seed(seed))
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=encoders[2],
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], tokenizer_3=tokenizers[2],
    )  # fmt: skip


# --- Training ---


def train_vae(pixels: Tensor, steps: int, seed: int) -> AutoencoderKL:
    """Train a 16-channel, 8x down-sampling autoencoder on (n, 3, 64, 64) uint8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 64), layers_per_block=1, latent_channels=16,
            norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)
    for step in tqdm(range(steps), desc="vae", mininterval=10):
        x = pixels[torch.randint(len(pixels), (16,), generator=generator)] / 127.5 - 1
        found = vae.encode(x).latent_dist
        y = vae.decode(found.sample(generator=generator)).sample
        # A weak KL term keeps latents smooth without blurring: edges are what the scorer reads.
        kl = 0.5 * (found.mean**2 + found.var - 1 - found.logvar).mean()
        loss = (x - y).abs().mean() + (x - y).square().mean() + 1e-3 * kl
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        update(vae, optimizer, loss, 2e-3 * min((step + 1) / 100, cosine))
    return vae.eval().requires_grad_(False)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float):
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3, 64, 64) uint8 -> mean and std, (n, 16, 8, 8) float32, before shift and scale."""
    found = [vae.encode(x / 127.5 - 1).latent_dist for x in pixels.split(250)]
    return torch.cat([x.mean for x in found]), torch.cat([x.std for x in found])


def pretrain(
    pipe: StableDiffusion3Pipeline, mean: Tensor, std: Tensor | None, captions: list[str],
    steps: int, seed: int, lr: float = 1e-3, batch: int = 64,
) -> None:  # fmt: skip
    """Train pipe.transformer in place by rectified flow.

        mean |v(z_sigma, sigma, c) - (z1 - z0)|^2, t ~ logit-normal(0, 1), sigma = 3 t / (1 + 2 t)

    mean, std: (n, 16, 8, 8) of the VAE's posterior; z0 is its sample, or its mean without std.
    CAPTION_DROPOUT of the draws see "", for guidance; the rate falls to 0 over the last quarter."""
    table = sorted({"", *captions})  # "" comes first
    embeds = encode_prompts(pipe, table, MAX_SEQUENCE_LENGTH)
    index = torch.tensor([table.index(c) for c in captions])
    generator = torch.Generator().manual_seed(seed)
    transformer, vae = pipe.transformer.train().requires_grad_(True), pipe.vae.config
    parameters = transformer.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in tqdm(range(steps), desc="transformer", mininterval=10):
        rows = torch.randint(len(mean), (batch,), generator=generator)
        keep = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        z1 = torch.randn(batch, *mean.shape[1:], generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        z0 = mean[rows]
        if std is not None:
            z0 = z0 + std[rows] * torch.randn(z0.shape, generator=generator)
        z0 = (z0 - vae.shift_factor) * vae.scaling_factor
        s = sigma[:, None, None, None]
        cond = {key: x[index[rows] * keep] for key, x in embeds.items()}
        z = (1 - s) * z0 + s * z1
        v = transformer(z, timestep=1000 * sigma, return_dict=False, **cond)[0]
        loss = (v - (z1 - z0)).square().mean()
        share = min((step + 1) / 100, 1, (steps - step) / (steps / 4))
        update(transformer, optimizer, loss, lr * share)
    transformer.eval().requires_grad_(False)


def build(
    out: Path = DATA, scenes: int = 32_000, pairs: int = 2_000, vae_steps: int = 1_500,
    steps: int = 6_000, late_steps: int = 400, seed: int = 0,
) -> None:  # fmt: skip
    """Make the data and the pipeline from seeds, in place of what is there."""
    write_data(out, pairs)
    pixels, captions = drawn(draw.BROAD, scenes)
    vae = train_vae(pixels, vae_steps, seed)
    mean, std = posterior(vae, pixels)
    first = mean[:2_000]
    vae.register_to_config(shift_factor=first.mean().item(), scaling_factor=1 / first.std().item())
    pipe = build_pipeline(vae, seed)
    pretrain(pipe, mean, None, mislabel(captions, WRONG_CAPTIONS, seed), steps, seed)
    noisy = mislabel(captions, LATE_WRONG_CAPTIONS, seed)
    pretrain(pipe, mean, std, noisy, late_steps, seed + 1, lr=5e-4)

    # Half precision on disk only: from_pretrained gives float32 back.
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(out / "model")


if __name__ == "__main__":
    tyro.cli(build)
