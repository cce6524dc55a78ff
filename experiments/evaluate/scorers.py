"""The paper's metrics as classes: each takes images and their prompts and returns one number each.

All models run in float32 through transformers. Weights come from the Hugging Face hub, or from
where Weights is told that they are. Pickled files are read with weights_only=True: tensors and
nothing else. Beside the CLIPs, two models are stored in the names of other packages, open_clip
(HPS v2.1) and image-reward; the tensors are renamed here, so that neither package is needed.
"""

import base64
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, at import

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
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


class Weights:
    """Finds weights by id: on the hub, or where --weights puts them."""

    def __init__(self, given: tuple[str, ...] = ()):
        """Raises ValueError: an entry is not ID=PATH of a known id; FileNotFoundError: no PATH."""
        known = (PICKSCORE, CLIP_H, CLIP_L, HPS, IMAGE_REWARD, BERT, AESTHETIC)
        self.local: dict[str, Path] = {}
        for entry in given:
            name, _, path = entry.partition("=")
            if name not in known or not path:
                ids = " ".join(known)
                raise ValueError(f"--weights {entry}: expected ID=PATH, ID one of {ids}")
            self.local[name] = Path(path)
            if not self.local[name].exists():
                raise FileNotFoundError(f"--weights {entry}: there is no {path}")

    def repository(self, name: str) -> str:
        """What from_pretrained takes: a directory, or the hub id."""
        return str(self.local.get(name, name))

    def file(self, name: str) -> Path:
        """The file of weights that come as one file."""
        if name in self.local:
            return self.local[name]
        if name == AESTHETIC:
            return download_head()
        return Path(hf_hub_download(name, FILES[name]))

    def identity(self, name: str) -> str:
        """The hub's commit, or the sha256 of files on this machine."""
        if name in self.local:
            return "sha256 " + digest_of(self.local[name])
        if name == AESTHETIC:
            return "sha256 " + AESTHETIC_SHA256
        found = hf_hub_download(name, FILES.get(name, "config.json"))
        return "commit " + Path(found).parent.name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A pickled file's tensors in float32. Raises ValueError: it holds something else."""
        path = self.file(name)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; each means no file of tensors
            raise ValueError(f"{path} is not a file of tensors: {error}") from None
        content = content.get("state_dict", content)
        return {key: tensor.float() for key, tensor in content.items()}


def download_head() -> Path:
    """The aesthetic head from its authors' repository, checked against its known sha256."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(AESTHETIC_URL, str(path), hash_prefix=AESTHETIC_SHA256)
    if digest_of(path) != AESTHETIC_SHA256:
        raise ValueError(f"{path} has another sha256 than {AESTHETIC_SHA256}: delete it")
    return path


@cache
def digest_of(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a directory's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(x for x in path.rglob("*") if x.is_file())
    lines = [f"{x.relative_to(path)} {digest_of(x)}" for x in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B,) of two (B, D)."""
    return F.cosine_similarity(a, b, dim=-1)


def embed_pair(model: CLIPModel, pixels: Tensor, tokens: dict) -> tuple[Tensor, Tensor]:
    """Image and text embeddings (B, D) of length 1."""
    device = model.device
    moved = {key: x.to(device) for key, x in tokens.items()}
    output = model(pixel_values=pixels.to(device), **moved)
    return output.image_embeds, output.text_embeds


class PickScore:
    """exp(logit_scale) times the cosine under PickScore's CLIP ViT-H, about 20 to 24.

    Source: flow_grpo/pickscore_scorer.py of yifan123/flow_grpo, whose value is this divided by 26.
    """

    SOURCES = (PICKSCORE, CLIP_H)

    def __init__(self, weights: Weights, device: torch.device):
        self.model = load_clip(CLIPModel, weights.repository(PICKSCORE)).eval().to(device)
        self.pixels = CLIPImageProcessorPil.from_pretrained(weights.repository(CLIP_H))
        self.tokenizer = CLIPTokenizer.from_pretrained(weights.repository(CLIP_H))

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = self.pixels(images, return_tensors="pt")["pixel_values"]
        tokens = tokenize(self.tokenizer, prompts)
        return self.model.logit_scale.exp() * cosine(*embed_pair(self.model, pixels, tokens))


class ClipScore:
    """The cosine under OpenAI's CLIP ViT-L/14, about 0.2 to 0.4; not times 100, not cut at 0.

    Source: flow_grpo/clip_scorer.py of NVlabs/DiffusionNFT, also its resizing: bilinear, in float.
    """

    SOURCES = (CLIP_L,)

    def __init__(self, weights: Weights, device: torch.device):
        source = weights.repository(CLIP_L)
        self.model = load_clip(CLIPModel, source).eval().to(device)
        self.size = self.model.config.vision_config.image_size
        self.tokenizer = CLIPTokenizer.from_pretrained(source)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = [crop(resize(image, self.size, min, "bilinear"), self.size) for image in images]
        tokens = tokenize(self.tokenizer, prompts)
        return cosine(*embed_pair(self.model, normalize(torch.stack(pixels)), tokens))


class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: linear layers on CLIP ViT-L/14's image embedding
    of length 1. The prompt plays no part.

    Source: simple_inference.py of christophschuhmann/improved-aesthetic-predictor; the embedding
    from transformers as in flow_grpo/aesthetic_scorer.py of yifan123/flow_grpo.
    """

    SOURCES = (CLIP_L, AESTHETIC)

    def __init__(self, weights: Weights, device: torch.device):
        source = weights.repository(CLIP_L)
        self.model = load_clip(CLIPVisionModelWithProjection, source).eval().to(device)
        self.pixels = CLIPImageProcessorPil.from_pretrained(source)
        self.head = score_head(self.model.config.projection_dim)
        load_exactly(self.head, weights.tensors(AESTHETIC), "layers.", weights.file(AESTHETIC))
        self.head.eval().to(device)

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

    def __init__(self, weights: Weights, device: torch.device):
        config = CLIPConfig.from_pretrained(weights.repository(CLIP_H))
        acts = {config.text_config.hidden_act, config.vision_config.hidden_act}
        if acts != {"gelu"}:
            raise ValueError(f"{weights.repository(CLIP_H)}: hidden_act is {acts}, expected gelu")
        self.size = config.vision_config.image_size
        self.model = CLIPModel(config)
        tensors = clip_from_open_clip(weights.tensors(HPS))
        load_exactly(self.model, tensors, "", weights.file(HPS))
        self.model.eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(weights.repository(CLIP_H))

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = [pad(resize(image, self.size, max, "bicubic"), self.size) for image in images]
        tokens = tokenize(self.tokenizer, prompts)
        return cosine(*embed_pair(self.model, normalize(torch.stack(pixels)), tokens))


class ImageReward:
    """ImageReward v1.0, about -2 to 2: BLIP's text encoder looks at the image, linear layers give
    the reward, which is brought to mean 0 and standard deviation 1 of the authors' data.

    Source: ImageReward/ImageReward.py of THUDM/ImageReward. The file holds BLIP's own tensors.
    """

    SOURCES = (IMAGE_REWARD, BERT)
    MEAN = 0.16717362830052426
    STD = 1.0333394966054072

    def __init__(self, weights: Weights, device: torch.device):
        tensors = weights.tensors(IMAGE_REWARD)
        vision, text, head = image_reward_parts(tensors)
        path = weights.file(IMAGE_REWARD)
        self.vision = load_blip(BlipVisionModel, blip_vision_config(vision), vision, path)
        self.text = load_blip(BlipTextModel, blip_text_config(text), text, path)
        self.head = score_head(self.text.config.hidden_size)
        load_exactly(self.head, head, "", path)
        for module in (self.vision, self.text, self.head):
            module.eval().to(device)
        self.pixels = CLIPImageProcessorPil()  # CLIP's means, bicubic to 224, as in the source
        self.tokenizer = BertTokenizer.from_pretrained(weights.repository(BERT))

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        device = self.vision.device
        pixels = self.pixels(images, return_tensors="pt")["pixel_values"]
        patches = self.vision(pixel_values=pixels.to(device)).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": 35}
        tokens = self.tokenizer(prompts, return_tensors="pt", **options)
        states = self.text(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(states[:, 0]).squeeze(-1) - self.MEAN) / self.STD


# --- Text in images -----------------------------------------------------------------------------


def quoted(prompt: str) -> str:
    """What is to be read: the prompt's first text in straight double quotes.

    Raises ValueError: there is none."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise ValueError(f"OCR needs a text in straight double quotes in each prompt: {prompt!r}")
    return parts[1]


def text_reward(found: str, prompt: str) -> float:
    """1 - edits / length of the quoted text, spaces and case apart; 1 if it stands in what was
    found, never below 0. Source: OcrScorer, flow_grpo/ocr.py of yifan123/flow_grpo."""
    target = quoted(prompt).replace(" ", "").lower()
    found = found.replace(" ", "").lower()
    if target in found:
        return 1.0
    return 1 - min(Levenshtein.distance(found, target), len(target)) / len(target)


# Standard input: an image file in base64 on each line; standard output: "ready", then the text in
# each, as JSON. Called as flow_grpo/ocr.py of yifan123/flow_grpo calls it.
PADDLE_READER = """
import base64, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what paddle prints must not mix with the answers
import numpy as np
from paddleocr import PaddleOCR
from PIL import Image

engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
print(json.dumps("ready"), file=answers, flush=True)
for line in sys.stdin:
    image = Image.open(io.BytesIO(base64.b64decode(line))).convert("RGB")
    lines = engine.ocr(np.array(image), cls=False)[0] or []
    text = "".join(words for _, (words, confidence) in lines if confidence > 0)
    print(json.dumps(text), file=answers, flush=True)
"""


class Ocr:
    """The paper's OCR, 0 to 1: PaddleOCR 2.9.1's English models on the CPU, as OcrScorer of
    flow_grpo/ocr.py (yifan123/flow_grpo) calls them. They run in an environment of their own,
    whose packages do not agree with ours: PADDLE_READER there reads what we send.
    """

    def __init__(self, python: Path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(python), "-c", PADDLE_READER], **pipes)
        self.answer()  # it has loaded its models

    @staticmethod
    def versions(python: Path) -> str:
        """The identity of its weights. Raises RuntimeError: paddleocr is not installed there."""
        code = (
            "from importlib.metadata import version as v; "
            "print('paddleocr', v('paddleocr'), 'paddlepaddle', v('paddlepaddle'))"
        )
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"--metrics ocr: {python} has no paddleocr and paddlepaddle; give --ocr_python "
                "the Python of an environment that has, as experiments/evaluate/evaluation.md says"
            )
        return done.stdout.strip()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"PaddleOCR ended with {self.process.wait()}, see above")
        return json.loads(line)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        rewards = []
        for image, prompt in zip(images, prompts):
            png = io.BytesIO()
            image.save(png, format="PNG", compress_level=1)
            self.process.stdin.write(base64.b64encode(png.getvalue()).decode() + "\n")
            self.process.stdin.flush()
            rewards.append(text_reward(self.answer(), prompt))
        return rewards

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class OcrRapid:
    """OCR, 0 to 1, with the formula of Ocr and other models: rapidocr's, which are in its package,
    so that it runs anywhere. Not comparable with the paper's number. An image takes about 0.3
    seconds of a core, 1 second if it is full of text; each core reads one.
    """

    def __init__(self):
        from rapidocr import RapidOCR  # here: it and onnxruntime serve this metric alone

        params = {"Global.log_level": "critical", "Global.use_cls": False}
        # More threads to an image take more time in all
        self.engine = RapidOCR(params=params | {"EngineConfig.onnxruntime.intra_op_num_threads": 1})
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    @staticmethod
    def versions() -> str:
        """The identity of its weights, which are in the package."""
        try:
            return f"rapidocr {version('rapidocr')}"
        except PackageNotFoundError:
            message = "--metrics ocr_rapid: pip install -r experiments/requirements.txt"
            raise RuntimeError(message) from None

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        arrays = [np.array(image)[:, :, ::-1] for image in images]  # BGR
        found = ["".join(made.txts or ()) for made in self.pool.map(self.engine, arrays)]
        return [text_reward(text, prompt) for text, prompt in zip(found, prompts)]


# --- Their parts --------------------------------------------------------------------------------


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, L), L at most 77."""
    options = {"padding": True, "truncation": True, "max_length": 77}
    tokens = tokenizer(prompts, return_tensors="pt", **options)
    return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def resize(image: Image.Image, size: int, side: Callable, mode: str) -> Tensor:
    """(3, h, w) in [0, 1]: the shorter (side=min) or longer (max) side is size pixels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    scale = size / side(pixels.shape[-2:])
    if side is min:  # torchvision rounds down here, and open_clip's resizing to the nearest
        shape = [max(size, int(n * scale)) for n in pixels.shape[-2:]]
    else:
        shape = [round(n * scale) for n in pixels.shape[-2:]]
    if shape == list(pixels.shape[-2:]):
        return pixels[0]
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
    """Embedding to score: linear layers 0, 2, 4, 6, 7 without activations; 1, 3, 5 are dropout."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def load_exactly(module: nn.Module, tensors: dict, prefix: str, path: Path) -> None:
    """Load tensors named prefix + module's names. Raises ValueError: some do not fit."""
    try:
        stripped = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        module.load_state_dict(stripped, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} holds other weights than expected: {error}") from None


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
    "logit_scale": "logit_scale",
}
OPEN_CLIP_BLOCK = {
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
}
BLIP_VISION_BLOCK = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def rename(key: str, starts: dict[str, str], inner: dict[str, str]) -> str:
    """key with the first of starts that it begins with replaced, then each of inner."""
    start = next((x for x in starts if key.startswith(x)), "")
    key = starts.get(start, "") + key.removeprefix(start)
    for old, new in inner.items():
        key = key.replace(old, new)
    return key


def clip_from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel's tensors from those of an open_clip CLIP with a ViT."""
    made = {}
    for key, tensor in tensors.items():
        name = rename(key, OPEN_CLIP, OPEN_CLIP_BLOCK)
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
            vision[rename(name, BLIP_VISION, BLIP_VISION_BLOCK)] = tensor
        elif key.startswith("blip.text_encoder.") and not key.endswith(".position_ids"):
            text[key.removeprefix("blip.text_encoder.")] = tensor
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = tensor
    return vision, text, head


def count_layers(tensors: dict[str, Tensor], part: str) -> int:
    return len({key.split(".")[2] for key in tensors if key.startswith(part)})


def blip_vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    """BLIP's image encoder: heads of 64, patches of 16, epsilon 1e-6 (timm's), 224 pixels."""
    width = len(tensors["post_layernorm.weight"])
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=count_layers(tensors, "encoder.layers."),
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )


def blip_text_config(tensors: dict[str, Tensor]) -> BlipTextConfig:
    """BLIP's text encoder, a BERT that also attends to the image: heads of 64."""
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    key = "encoder.layer.0.crossattention.self.key.weight"
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors[key].shape[1],
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=count_layers(tensors, "encoder.layer."),
        num_attention_heads=width // 64,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )


def load_blip(kind: type, config, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """A BLIP encoder of transformers with these tensors."""
    extra = {"add_pooling_layer": False} if kind is BlipTextModel else {}
    model = kind(config, **extra)
    load_exactly(model, tensors, "", path)
    return model
