"""Small random weights, laid out as huggingface_hub and torch.hub do; nothing is downloaded.

Two files have the names of other packages, open_clip and image-reward, which are written out here.
"""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from experiments.evaluate import scorers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = ["a photo of a red circle", "two blue squares and a sign"]
PUBLISHED = (scorers.ImageReward.VISION, scorers.ImageReward.TEXT)  # which `hub` replaces
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
VISION = BlipVisionConfig(**SIZES, num_attention_heads=2, image_size=224, layer_norm_eps=1e-6)
TEXT = BlipTextConfig(
    hidden_size=64,
    encoder_hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=1,
    vocab_size=40,
)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Norms near 1, matrices of gain 1, all else small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim == 1:
                x.copy_(0.1 * noise + (1 if "weight" in name else 0))
            elif x.ndim > 1:
                x.copy_(noise / x[0].numel() ** 0.5)
    return module.eval()


def clip_config(patch: int, act: str) -> CLIPConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "hidden_act": act, "projection_dim": 24}
    text = sizes | {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
    vision = sizes | {"image_size": 224, "patch_size": patch}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def save_clip(folder: Path, config: CLIPConfig) -> None:
    """What is on the hub beside a CLIP's weights."""
    config.save_pretrained(folder)
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz'\","
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


# --- The published names ------------------------------------------------------------------------

OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TIMM = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def named(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of modules under other names."""
    return {f"{name}.{key}": x for name, m in modules.items() for key, x in m.state_dict().items()}


def open_clip_tensors(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIP in the names of open_clip."""
    vision, text = model.vision_model, model.text_model
    made = {
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "text_projection": model.text_projection.weight.T,
        "logit_scale": model.logit_scale,
    }
    modules = {
        "visual.conv1": vision.embeddings.patch_embedding,
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
        "token_embedding": text.embeddings.token_embedding,
        "ln_final": text.final_layer_norm,
    }
    for start, tower in (("visual.", vision), ("", text)):
        for i, layer in enumerate(tower.encoder.layers):
            block, own = f"{start}transformer.resblocks.{i}.", layer.self_attn
            modules |= {block + x: layer.get_submodule(ours) for x, ours in OPEN_CLIP.items()}
            stacked = (own.q_proj, own.k_proj, own.v_proj)
            for kind in ("weight", "bias"):
                parts = [getattr(x, kind) for x in stacked]
                made[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return made | named(modules)


class Reward(nn.Module):
    """ImageReward of transformers' BLIP, before its mean and standard deviation."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.vision = transformers.BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = scorers.score_head(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        patches = self.vision(pixels).last_hidden_state
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = self.text(ids, mask, encoder_hidden_states=patches, is_decoder=False)
        return self.head(states.last_hidden_state[:, 0])[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """In the names of image-reward's class, with what it does not use."""
        visual, own = "blip.visual_encoder.", self.vision.embeddings
        modules = {f"{visual}patch_embed.proj": own.patch_embedding}
        modules |= {f"{visual}norm": self.vision.post_layernorm}
        modules |= {"blip.text_encoder": self.text, "mlp.layers": self.head}
        modules |= {"blip.vision_proj": nn.Linear(8, 8), "blip.text_proj": nn.Linear(8, 8)}
        for i, layer in enumerate(self.vision.encoder.layers):
            for name, ours in TIMM.items():
                modules[f"{visual}blocks.{i}.{name}"] = layer.get_submodule(ours)
        return named(modules) | {
            "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
            f"{visual}cls_token": own.class_embedding,
            f"{visual}pos_embed": own.position_embedding,
        }


# --- The hub ------------------------------------------------------------------------------------


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    """The folder or file of each source."""
    root, paths = tmp_path_factory.mktemp("hub"), {}
    for source in (scorers.PICKSCORE, scorers.CLIP_H, scorers.CLIP_L, scorers.BERT, *scorers.FILES):
        cached = root / "cache" / ("models--" + source.replace("/", "--"))
        folder = cached / "snapshots" / COMMIT
        for made in (cached / "refs", folder):
            made.mkdir(parents=True)
        (cached / "refs/main").write_text(COMMIT)
        (folder / "config.json").write_text('{"model_type": "clip"}')
        paths[source] = folder / scorers.FILES.get(source, "")
    paths[scorers.AESTHETIC] = root / "torch/hub/checkpoints" / scorers.AESTHETIC
    paths[scorers.AESTHETIC].parent.mkdir(parents=True)
    gelu, quick = clip_config(14, "gelu"), clip_config(32, "quick_gelu")
    for source, config in ((scorers.PICKSCORE, gelu), (scorers.CLIP_L, quick)):
        randomize(CLIPModel(config), 1).save_pretrained(paths[source])
        save_clip(paths[source], config)
    save_clip(paths[scorers.CLIP_H], gelu)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(PROMPTS).split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(paths[scorers.BERT])
    clip = open_clip_tensors(randomize(CLIPModel(gelu), 3))
    torch.save({"state_dict": clip}, paths[scorers.HPS])
    torch.save(randomize(Reward(VISION, TEXT), 4).tensors(), paths[scorers.IMAGE_REWARD])
    head = randomize(scorers.score_head(24), 5)
    torch.save(named({"layers": head}), paths[scorers.AESTHETIC])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("TORCH_HOME", str(root / "torch"))
        digest = hashlib.sha256(paths[scorers.AESTHETIC].read_bytes()).hexdigest()
        patch.setattr(scorers, "AESTHETIC_SHA256", digest)
        patch.setattr(scorers.ImageReward, "VISION", VISION)
        patch.setattr(scorers.ImageReward, "TEXT", TEXT)
        yield paths
