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
LITTLE = {"num_hidden_layers": 1, "num_attention_heads": 1}
VISION = BlipVisionConfig(**LITTLE, hidden_size=128, image_size=224, layer_norm_eps=1e-6)
TEXT = BlipTextConfig(**LITTLE, hidden_size=64, encoder_hidden_size=128)


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


OPEN_CLIP = {  # transformers' names: open_clip's
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
TIMM = {
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
}


def named(module: nn.Module, start: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Its tensors, each key with what names has replaced."""
    made = {}
    for key, x in module.state_dict().items():
        for own, published in names.items():
            key = key.replace(own, published)
        made[start + key] = x
    return made


def open_clip_tensors(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIP in the names of open_clip."""
    made = named(model, "", OPEN_CLIP)
    for name in ("visual.proj", "text_projection"):
        made[name] = made[name].T
    for name in [x for x in made if "q_proj" in x]:
        parts = [made.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        made[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return made


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
        made = named(self.vision, "blip.visual_encoder.", TIMM)
        made |= named(self.text, "blip.text_encoder.", {})
        made |= named(self.head, "mlp.layers.", {})
        for name in ("blip.vision_proj.", "blip.text_proj."):
            made |= named(nn.Linear(8, 8), name, {})
        return made | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}


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
    torch.save(named(head, "layers.", {}), paths[scorers.AESTHETIC])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("TORCH_HOME", str(root / "torch"))
        digest = hashlib.sha256(paths[scorers.AESTHETIC].read_bytes()).hexdigest()
        patch.setattr(scorers, "AESTHETIC_SHA256", digest)
        patch.setattr(scorers.ImageReward, "VISION", VISION)
        patch.setattr(scorers.ImageReward, "TEXT", TEXT)
        yield paths
