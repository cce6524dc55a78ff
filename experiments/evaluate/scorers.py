"""The paper's metrics as classes: each takes images and their prompts and returns one number each.

All models run in float32 through transformers, with weights from the Hugging Face hub or its cache.
Pickled files are read with weights_only=True: tensors and nothing else. Beside the CLIPs, two
models are stored in the names of other packages, open_clip (HPS v2.1) and image-reward; the tensors
are renamed here, so that neither package is needed.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.models.blip.modeling_blip_text import BlipTextModel

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
HPS = "xswu/HPSv2"
IMAGE_REWARD = "THUDM/ImageReward"
BERT = "google-bert/bert-base-uncased"
AESTHETIC = "sac+logos+ava1-l14-linearMSE.pth"
FILES = {HPS: "HPS_v2.1_compressed.pt", IMAGE_REWARD: "ImageReward.pt"}
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


# --- Weights ------------------------------------------------------------------------------------


def locate(source: str) -> Path:
    """A file of source, in the hub's cache, else downloaded: its weights if they are one file."""
    if source != AESTHETIC:
        return Path(hf_hub_download(source, FILES.get(source, "config.json")))
    path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(AESTHETIC_URL, str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != AESTHETIC_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, not {AESTHETIC_SHA256}: delete it")
    return path


def identity(source: str) -> str:
    """Which weights these are: the hub's commit, or the file's sha256."""
    path = locate(source)
    if source == AESTHETIC:
        return f"{source} sha256 {AESTHETIC_SHA256}"
    return f"{source} commit {path.parent.name}"


def read_tensors(source: str) -> dict[str, Tensor]:
    """A pickled file's tensors in float32. Raises ValueError: it holds something else."""
    path = locate(source)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means no file of tensors
        raise ValueError(f"{path} is not a file of tensors: {error}") from None
    content = content.get("state_dict", content)
    return {key: tensor.float() for key, tensor in content.items()}


def load_clip(kind: type, source: str) -> nn.Module:
    """A CLIP of transformers in float32. Raises ValueError: names a tensor that source lacks."""
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, info = kind.from_pretrained(source, **options)
    if info["missing_keys"]:
        raise ValueError(f"{source} does not fit {kind.__name__}: no {min(info['missing_keys'])}")
    return model


# --- The metrics of models ----------------------------------------------------------------------
# Each class names in SOURCES what it reads; an instance takes B images (RGB) and their B prompts
# and returns B numbers.


def similarity(
    model: CLIPModel, pixels: Tensor, tokenizer: CLIPTokenizer, prompts: list[str]
) -> Tensor:
    """The cosine (B,) of the embeddings of B images and of their prompts, of at most 77 tokens."""
    options = {"padding": True, "truncation": True, "max_length": 77}
    tokens = tokenizer(prompts, return_tensors="pt", **options).to(model.device)
    output = model(pixel_values=pixels.to(model.device), **tokens)
    return F.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)


class PickScore:
    """exp(logit_scale) times the cosine under PickScore's CLIP ViT-H, about 20 to 24.

    Source: flow_grpo/pickscore_scorer.py of yifan123/flow_grpo, whose value is this divided by 26.
    """

    SOURCES = (PICKSCORE, CLIP_H)

    def __init__(self, device: torch.device):
        self.model = load_clip(CLIPModel, PICKSCORE).eval().to(device)
        self.pixels = CLIPImageProcessorPil.from_pretrained(CLIP_H)
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP_H)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = self.pixels(images, return_tensors="pt")["pixel_values"]
        cosine = similarity(self.model, pixels, self.tokenizer, prompts)
        return self.model.logit_scale.exp() * cosine


class ClipScore:
    """The cosine under OpenAI's CLIP ViT-L/14, about 0.2 to 0.4; not times 100, not cut at 0.

    Source: flow_grpo/clip_scorer.py of NVlabs/DiffusionNFT, also its resizing: bilinear, in float.
    """

    SOURCES = (CLIP_L,)

    def __init__(self, device: torch.device):
        self.model = load_clip(CLIPModel, CLIP_L).eval().to(device)
        self.size = self.model.config.vision_config.image_size
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP_L)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = [crop(resize(image, self.size, min, "bilinear"), self.size) for image in images]
        normal = normalize(torch.stack(pixels))
        return similarity(self.model, normal, self.tokenizer, prompts)


class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: linear layers on CLIP ViT-L/14's image embedding
    of length 1. The prompt plays no part.

    Source: simple_inference.py of christophschuhmann/improved-aesthetic-predictor; the embedding
    from transformers as in flow_grpo/aesthetic_scorer.py of yifan123/flow_grpo.
    """

    SOURCES = (CLIP_L, AESTHETIC)

    def __init__(self, device: torch.device):
        self.model = load_clip(transformers.CLIPVisionModelWithProjection, CLIP_L).eval().to(device)
        self.pixels = CLIPImageProcessorPil.from_pretrained(CLIP_L)
        self.head = score_head(self.model.config.projection_dim)
        tensors = read_tensors(AESTHETIC)
        tensors = {key.removeprefix("layers."): tensor for key, tensor in tensors.items()}
        load_exactly(self.head, tensors, AESTHETIC)
        self.head.to(device)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = self.pixels(images, return_tensors="pt")["pixel_values"]
        embeds = self.model(pixel_values=pixels.to(self.model.device)).image_embeds
        return self.head(F.normalize(embeds, dim=-1)).squeeze(-1)


class Hpsv2:
    """The cosine under HPS v2.1's CLIP ViT-H-14, about 0.2 to 0.35.

    Source: hpsv2/img_score.py of tgxs002/HPSv2, and flow_grpo/hpsv2_scorer.py of
    NVlabs/DiffusionNFT, also its resizing: bicubic, in float. The file holds open_clip's tensors.
    open_clip's tokenizer straightens typographic quotes and decodes HTML, transformers' does not;
    DrawBench has neither.
    """

    SOURCES = (HPS, CLIP_H)

    def __init__(self, device: torch.device):
        config = transformers.CLIPConfig.from_pretrained(CLIP_H)
        self.size = config.vision_config.image_size
        self.model = CLIPModel(config)
        load_exactly(self.model, clip_from_open_clip(read_tensors(HPS)), HPS)
        self.model.eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP_H)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = [pad(resize(image, self.size, max, "bicubic"), self.size) for image in images]
        normal = normalize(torch.stack(pixels))
        return similarity(self.model, normal, self.tokenizer, prompts)


class ImageReward:
    """ImageReward v1.0, about -2 to 2: BLIP's text encoder looks at the image, linear layers give
    the reward, which is brought to mean 0 and standard deviation 1 of the authors' data.

    Source: ImageReward/ImageReward.py of THUDM/ImageReward. The file holds BLIP's own tensors.
    """

    SOURCES = (IMAGE_REWARD, BERT)
    MEAN = 0.16717362830052426
    STD = 1.0333394966054072
    VISION = transformers.BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        layer_norm_eps=1e-6,  # timm's
    )
    # All else is BERT base's
    TEXT = transformers.BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)

    def __init__(self, device: torch.device):
        self.vision = transformers.BlipVisionModel(self.VISION)
        self.text = BlipTextModel(self.TEXT, add_pooling_layer=False)
        self.head = score_head(self.TEXT.hidden_size)
        parts = image_reward_parts(read_tensors(IMAGE_REWARD))
        for module, tensors in zip((self.vision, self.text, self.head), parts):
            load_exactly(module, tensors, IMAGE_REWARD)
            module.eval().to(device)
        self.pixels = CLIPImageProcessorPil()  # CLIP's means, bicubic to 224, as in the source
        self.tokenizer = transformers.BertTokenizer.from_pretrained(BERT)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        device = self.vision.device
        pixels = self.pixels(images, return_tensors="pt")["pixel_values"]
        patches = self.vision(pixel_values=pixels.to(device)).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": 35}
        options["return_token_type_ids"] = False
        tokens = self.tokenizer(prompts, return_tensors="pt", **options).to(device)
        states = self.text(**tokens, encoder_hidden_states=patches, is_decoder=False)
        reward = self.head(states.last_hidden_state[:, 0]).squeeze(-1)
        return (reward - self.MEAN) / self.STD


# --- Their parts --------------------------------------------------------------------------------


def resize(image: Image.Image, size: int, side: Callable, mode: str) -> Tensor:
    """(3, h, w) in [0, 1]: the shorter (side=min) or longer (max) side is size pixels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    scale = size / side(pixels.shape[-2:])
    if side is min:  # torchvision rounds down here, and open_clip's resizing to the nearest
        shape = [max(size, int(n * scale)) for n in pixels.shape[-2:]]
    else:
        shape = [round(n * scale) for n in pixels.shape[-2:]]
    return F.interpolate(pixels, shape, mode=mode, antialias=True)[0]


def crop(pixels: Tensor, size: int) -> Tensor:
    """The middle (3, size, size)."""
    top, left = (round((n - size) / 2) for n in pixels.shape[-2:])
    return pixels[:, top : top + size, left : left + size]


def pad(pixels: Tensor, size: int) -> Tensor:
    """(3, size, size) with black around the image."""
    height, width = (size - n for n in pixels.shape[-2:])
    return F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalize(pixels: Tensor) -> Tensor:
    """By the mean and standard deviation of CLIP's data."""
    mean = torch.tensor(CLIPImageProcessorPil.image_mean).view(3, 1, 1)
    std = torch.tensor(CLIPImageProcessorPil.image_std).view(3, 1, 1)
    return (pixels - mean) / std


def score_head(width: int) -> nn.Sequential:
    """Embedding to score: linear layers without activations. The numbers between are dropout's."""
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    return nn.Sequential(OrderedDict((str(i), nn.Linear(*pair)) for i, pair in sizes.items()))


def load_exactly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raises ValueError: the tensors are not those of module."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{locate(source)} holds other weights than expected: {error}") from None


OPEN_CLIP = {  # open_clip's names, which the file has: transformers' names
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "ln_final.": "text_model.final_layer_norm.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".attn.in_proj_": ".self_attn.qkv_proj.",
}
BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def rename(key: str, names: dict[str, str]) -> str:
    """key with each of names replaced, in their order."""
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def clip_from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel's tensors from those of an open_clip CLIP with a ViT."""
    made = {}
    for key, tensor in tensors.items():
        name = rename(key, OPEN_CLIP)
        if ".qkv_proj." in name:  # open_clip stacks the three, transformers has them apart
            for letter, part in zip("qkv", tensor.chunk(3)):
                made[name.replace("qkv_proj", f"{letter}_proj")] = part
        else:
            made[name] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    return made


def image_reward_parts(tensors: dict[str, Tensor]) -> tuple[dict, dict, dict]:
    """What ImageReward uses of its file: image encoder, text encoder, head, in the names of
    transformers' BLIP. The projections and position_ids that the file also has play no part."""
    vision, text, head = {}, {}, {}
    for key, tensor in tensors.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            vision[rename(name, BLIP_VISION)] = tensor
        elif key.startswith("blip.text_encoder.") and not key.endswith(".position_ids"):
            text[key.removeprefix("blip.text_encoder.")] = tensor
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = tensor
    return vision, text, head
