"""Each metric's class against its formula; the files' names and weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers import CLIPVisionModelWithProjection as CLIPVision

from experiments.evaluate import scorers
from experiments.evaluate.scorers import AESTHETIC, BERT, CLIP_H, CLIP_L, PICKSCORE
from experiments.tests.evaluate import small_weights as small
from experiments.tests.evaluate.folders import picture
from experiments.tests.evaluate.small_weights import PROMPTS

IMAGES = [picture(1, 64, 64), picture(2, 64, 64)]
WIDE, TALL = picture(3, 420, 380), picture(4, 380, 420)


@torch.no_grad()
def values(kind: type, images=IMAGES, prompts=PROMPTS) -> torch.Tensor:
    return kind(torch.device("cpu"))(images, prompts)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert ours.shape == theirs.shape == (2,) and ours[0] != ours[1]
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def pixels_of(images: list, **options) -> torch.Tensor:
    return CLIPImageProcessorPil(**options)(images, return_tensors="pt")["pixel_values"]


def resized(image: Image.Image, height: int, width: int, mode: str) -> torch.Tensor:
    """(3, height, width) in [0, 1], in float as torchvision resizes; Pillow rounds."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True)[0]


@torch.no_grad()
def cosine(model: CLIPModel, images: torch.Tensor, tokenizer: Path) -> torch.Tensor:
    tokenize = CLIPTokenizer.from_pretrained(tokenizer)
    output = model(pixel_values=images, **tokenize(PROMPTS, padding=True, return_tensors="pt"))
    return (output.image_embeds * output.text_embeds).sum(-1)  # both of length 1


def test_pickscore_is_26_times_flow_grpo_s(hub):
    """logit_scale.exp() * cosine / 26, as flow_grpo/pickscore_scorer.py has it."""
    model = CLIPModel.from_pretrained(hub[PICKSCORE]).eval()
    theirs = model.logit_scale.exp() * cosine(model, pixels_of(IMAGES), hub[CLIP_H]) / 26
    assert near(values(scorers.PickScore), 26 * theirs)


def test_clipscore_is_the_cosine_with_the_middle_of_bilinear_pixels(hub):
    """The short side is of 224 pixels, of the long one's 247.6 the fraction is cut off."""
    model = CLIPModel.from_pretrained(hub[CLIP_L]).eval()
    wide = resized(WIDE, 224, 247, "bilinear")[:, :, 12:236]
    tall = resized(TALL, 247, 224, "bilinear")[:, 12:236]
    theirs = cosine(model, pixels_of([wide, tall], do_resize=False, do_rescale=False), hub[CLIP_L])
    assert near(values(scorers.ClipScore, [WIDE, TALL]), theirs)


@torch.no_grad()
def test_aesthetic_is_linear_in_the_normalized_embedding(hub):
    """Five matrices, no activation between them, on an embedding of length 1."""
    model = CLIPVision.from_pretrained(hub[CLIP_L]).eval()
    x = model(pixel_values=pixels_of(IMAGES)).image_embeds
    x = x / x.norm(dim=-1, keepdim=True)
    tensors = torch.load(hub[AESTHETIC], weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{layer}.weight"].T + tensors[f"layers.{layer}.bias"]
    assert near(values(scorers.Aesthetic), x[:, 0])


def test_hpsv2_is_the_cosine_with_the_long_side_of_224(hub):
    """Bicubic; the other one's 202.7 pixels are rounded, and there is black around them."""
    model = small.randomize(CLIPModel(small.clip_config(14, "gelu")), 3)
    wide = F.pad(resized(WIDE, 203, 224, "bicubic"), (0, 0, 10, 11))
    tall = F.pad(resized(TALL, 224, 203, "bicubic"), (10, 11))
    theirs = cosine(model, pixels_of([wide, tall], do_resize=False, do_rescale=False), hub[CLIP_H])
    assert near(values(scorers.Hpsv2, [WIDE, TALL]), theirs)


@torch.no_grad()
def test_imagereward_is_blip_s_reward(hub):
    """(mlp(first token) - 0.1672) / 1.0333, the text being cut or padded to 35 tokens."""
    model = small.randomize(small.Reward(small.VISION, small.TEXT), 4)
    prompts = [PROMPTS[0], " ".join([PROMPTS[1]] * 9)]
    tokens = BertTokenizer.from_pretrained(hub[BERT])(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens["attention_mask"].sum(1).tolist() == [8, 35]
    theirs = (model(pixels_of(IMAGES), tokens) - 0.16717362830052426) / 1.0333394966054072
    assert near(values(scorers.ImageReward, prompts=prompts), theirs)


def test_each_tensor_of_the_published_files_has_a_place():
    """Names and shapes; on the meta device, so without memory."""
    sizes = {"num_attention_heads": 16, "hidden_act": "gelu"}
    text = sizes | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = sizes | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision |= {"patch_size": 14}
    with torch.device("meta"):
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
        clip, reward = CLIPModel(config), small.Reward(*small.PUBLISHED)
        published = small.open_clip_tensors(clip)
        assert len(published) == 686 and len(reward.tensors()) == 625
        pairs = [(scorers.clip_from_open_clip(published), clip)]
        modules = (reward.vision, reward.text, reward.head)
        pairs += zip(scorers.image_reward_parts(reward.tensors()), modules)
    for made, module in pairs:
        own = module.state_dict()
        assert {x: t.shape for x, t in made.items()} == {x: t.shape for x, t in own.items()}

    vision, text = small.PUBLISHED  # what shapes do not tell
    assert (vision.num_attention_heads, text.num_attention_heads) == (16, 12)
    assert (vision.hidden_size, text.hidden_size, text.encoder_hidden_size) == (1024, 768, 1024)
    assert (vision.intermediate_size, text.intermediate_size) == (4096, 3072)
    assert (vision.image_size, vision.patch_size, text.vocab_size) == (224, 16, 30524)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert vision.hidden_act == text.hidden_act == "gelu"


def test_a_file_that_does_not_fit_is_refused_by_name(hub, tmp_path, monkeypatch):
    other = tmp_path / "other.pt"
    monkeypatch.setattr(scorers, "locate", lambda source: other)
    tensors = torch.load(hub[AESTHETIC], weights_only=True)
    for change, named in (
        (tensors | {"layers.7.weight": torch.zeros(2, 16)}, "7.weight"),
        ({x: t for x, t in tensors.items() if "layers.4" not in x}, "4.weight"),
        (tensors | {"layers.1.weight": torch.zeros(3)}, "1.weight"),
    ):
        torch.save(change, other)
        with pytest.raises(ValueError, match=f"{other}.*(\n.*)*{named}"):
            values(scorers.Aesthetic)


def test_pickled_code_is_not_run(hub, tmp_path, monkeypatch):
    other = tmp_path / "other.pt"
    monkeypatch.setattr(scorers, "locate", lambda source: other)

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": {"logit_scale": Harm()}}, other)
    with pytest.raises(ValueError, match=str(other)):
        values(scorers.Hpsv2)
    assert not (tmp_path / "harm").exists()


def test_a_clip_that_lacks_a_tensor_is_refused_by_name(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "CLIP_L", str(tmp_path))
    CLIPVision.from_pretrained(hub[CLIP_L]).save_pretrained(tmp_path)
    CLIPConfig.from_pretrained(hub[CLIP_L]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="logit_scale"):
        values(scorers.ClipScore)


def test_an_aesthetic_head_of_another_digest_is_refused(hub, monkeypatch):
    monkeypatch.setattr(scorers, "AESTHETIC_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"linearMSE.pth has sha256.*{'0' * 64}"):
        scorers.identity(AESTHETIC)
