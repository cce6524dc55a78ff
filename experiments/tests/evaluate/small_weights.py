"""Small random weights in the published files' format, and the arithmetic of what wrote them.

The modules have the names and shapes of open_clip's CLIP and of image-reward's class, and are what
scorers.py is compared with. `hub` lays them out as huggingface_hub and torch.hub do.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from experiments.evaluate import scorers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = ["a photo of a red circle", "two blue squares and a sign"]
WIDTH = 32  # of the small CLIPs
DIM = 24  # of their embeddings


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


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


def head(width: int) -> nn.Sequential:
    """Linear layers 0, 2, 4, 6 and 7, with dropout between the first."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
        nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


# --- open_clip ----------------------------------------------------------------------------------


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        first, last = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=first, gelu=nn.GELU(), c_proj=last))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width: int, layers: int, heads: int) -> nn.Module:
    made = nn.Module()
    made.resblocks = nn.ModuleList([OpenClipBlock(width, heads) for _ in range(layers)])
    return made


class OpenClip(nn.Module):
    """vision and text: width, layers, heads."""

    def __init__(self, embed: int, vision: tuple, text: tuple, words: int):
        super().__init__()
        width, self.visual = vision[0], nn.Module()
        self.visual.class_embedding = parameter(width)
        self.visual.positional_embedding = parameter(257, width)
        self.visual.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = tower(*vision)
        self.visual.proj = parameter(width, embed)
        self.token_embedding = nn.Embedding(words, text[0])
        self.positional_embedding = parameter(77, text[0])
        self.transformer = tower(*text)
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = parameter(text[0], embed)
        self.logit_scale = parameter()

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """The cosine; pixels (B, 3, 224, 224)."""
        v, length = self.visual, tokens.shape[1]
        patches = v.conv1(pixels).flatten(2).mT
        first = v.class_embedding.expand(len(pixels), 1, -1)
        x = v.ln_pre(torch.cat([first, patches], 1) + v.positional_embedding)
        for block in v.transformer.resblocks:
            x = block(x)
        image = v.ln_post(x[:, 0]) @ v.proj
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.full((length, length), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        last = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
        return F.cosine_similarity(image, last @ self.text_projection)


# --- image-reward -------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads of 64."""
    split = [x.unflatten(-1, (-1, 64)).transpose(-2, -3) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(-2, -3).flatten(-2)


def linear_then_norm(n: int, width: int) -> nn.ModuleDict:
    parts = {"dense": nn.Linear(n, width), "LayerNorm": nn.LayerNorm(width, 1e-12)}
    return nn.ModuleDict(parts)


def attention(width: int, source: int) -> nn.ModuleDict:
    sizes = {"query": width, "key": source, "value": source}
    own = nn.ModuleDict({name: nn.Linear(n, width) for name, n in sizes.items()})
    return nn.ModuleDict({"self": own, "output": linear_then_norm(width, width)})


class BlipBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        sizes = {"qkv": (width, 3 * width), "proj": (width, width)}
        self.attn = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        sizes = {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BertLayer(nn.Module):
    def __init__(self, width: int, source: int):
        super().__init__()
        self.attention, self.crossattention = attention(width, width), attention(width, source)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = linear_then_norm(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        for part, seen in ((self.attention, mask), (self.crossattention, None)):
            context = patches if seen is None else x
            own, output = part["self"], part["output"]
            k, v = own["key"](context), own["value"](context)
            made = output["dense"](attend(own["query"](x), k, v, seen))
            x = output["LayerNorm"](x + made)
        made = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + made)


class ImageReward(nn.Module):
    """The published class's sizes: 1024 and 24 layers; text 768, 12 layers, 30524 words."""

    def __init__(self, width: int, layers: int, text: int, text_layers: int, words: int):
        super().__init__()
        vision, reads = nn.Module(), nn.Module()
        vision.cls_token, vision.pos_embed = parameter(1, 1, width), parameter(1, 197, width)
        vision.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        vision.blocks = nn.ModuleList([BlipBlock(width) for _ in range(layers)])
        vision.norm = nn.LayerNorm(width, 1e-6)
        reads.embeddings = nn.Module()
        reads.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        reads.embeddings.word_embeddings = nn.Embedding(words, text)
        reads.embeddings.position_embeddings = nn.Embedding(512, text)
        reads.embeddings.LayerNorm = nn.LayerNorm(text, 1e-12)
        reads.encoder = nn.Module()
        reads.encoder.layer = nn.ModuleList([BertLayer(text, width) for _ in range(text_layers)])
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder, self.blip.text_encoder = vision, reads
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(width, 256), nn.Linear(text, 256)
        self.mlp.layers = head(text)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        vision, reads = self.blip.visual_encoder, self.blip.text_encoder
        x = vision.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([vision.cls_token.expand(len(x), 1, -1), x], 1) + vision.pos_embed
        for block in vision.blocks:
            x = block(x)
        patches, embeddings = vision.norm(x), reads.embeddings
        positions = embeddings.position_embeddings(torch.arange(tokens.shape[1]))
        x = embeddings.LayerNorm(embeddings.word_embeddings(tokens) + positions)
        for layer in reads.encoder.layer:
            x = layer(x, mask.bool()[:, None, None], patches)
        return self.mlp.layers(x[:, 0])[:, 0]


# --- The hub ------------------------------------------------------------------------------------


def save_clip(folder: Path, patch: int, act: str, seed: int | None) -> None:
    """A CLIP as on the hub: weights (none without a seed), image processor, tokenizer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "hidden_act": act, "projection_dim": DIM}
    text = sizes | {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
    vision = sizes | {"image_size": 224, "patch_size": patch}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    config.save_pretrained(folder)
    if seed is not None:
        randomize(CLIPModel(config), seed).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz'\","
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def snapshot(cache: Path, source: str) -> Path:
    """The folder of a hub id in huggingface_hub's cache."""
    cached = cache / ("models--" + source.replace("/", "--"))
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(COMMIT)
    folder = cached / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    return folder


def save_vocabulary(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(PROMPTS).split()]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    """The folder or file of each source. Nothing is downloaded."""
    root = tmp_path_factory.mktemp("hub")
    ids = (scorers.PICKSCORE, scorers.CLIP_H, scorers.CLIP_L, scorers.BERT)
    paths = {source: snapshot(root / "cache", source) for source in (*ids, *scorers.FILES)}
    paths |= {x: paths[x] / file for x, file in scorers.FILES.items()}
    paths[scorers.AESTHETIC] = root / "torch/hub/checkpoints" / scorers.AESTHETIC
    paths[scorers.AESTHETIC].parent.mkdir(parents=True)
    save_clip(paths[scorers.PICKSCORE], 14, "gelu", 1)
    save_clip(paths[scorers.CLIP_H], 14, "gelu", None)
    save_clip(paths[scorers.CLIP_L], 32, "quick_gelu", 2)
    save_vocabulary(paths[scorers.BERT])
    clip = randomize(OpenClip(DIM, (WIDTH, 2, 2), (WIDTH, 2, 2), 60), 3).half()
    torch.save({"state_dict": clip.state_dict()}, paths[scorers.HPS])
    reward = randomize(ImageReward(128, 2, 64, 1, 40), 4)
    torch.save(reward.state_dict(), paths[scorers.IMAGE_REWARD])
    tensors = {f"layers.{key}": x for key, x in randomize(head(DIM), 5).state_dict().items()}
    torch.save(tensors, paths[scorers.AESTHETIC])
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    vision = sizes | {"num_attention_heads": 2, "image_size": 224, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 40}
    text |= {"num_attention_heads": 1, "encoder_hidden_size": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("TORCH_HOME", str(root / "torch"))
        digest = hashlib.sha256(paths[scorers.AESTHETIC].read_bytes()).hexdigest()
        patch.setattr(scorers, "AESTHETIC_SHA256", digest)
        patch.setattr(scorers.ImageReward, "VISION", BlipVisionConfig(**vision))
        patch.setattr(scorers.ImageReward, "TEXT", BlipTextConfig(**text))
        yield paths
