"""Each metric's real class on small random weights in the files' real format; the table's numbers.

No weights are downloaded: folders and files take the place of the hub's, and once a hub cache is
laid out as huggingface_hub does it. The formulas that values are compared with stand here.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from experiments.evaluate import score, scorers
from experiments.evaluate.geneval import Column
from experiments.evaluate.scorers import AESTHETIC, BERT, CLIP_H, CLIP_L, HPS, IMAGE_REWARD, PICKSCORE
from experiments.tests.common import MODEL, launch

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red circle", "two blue squares and a sign"]
WIDTH = 32  # of the small CLIPs
DIM = 24  # of their embeddings


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours, as noise would not survive resizing."""
    small = torch.rand(3, 6, 6, generator=rng(seed))[None]
    pixels = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())


IMAGES = [picture(1, 64, 64), picture(2, 64, 64)]


# --- Small weights ------------------------------------------------------------------------------


def randomize(module: nn.Module, seed: int) -> nn.Module:
    generator = rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def clip_config(patch: int, act: str) -> CLIPConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "hidden_act": act, "projection_dim": DIM}
    text = sizes | {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
    vision = sizes | {"image_size": 224, "patch_size": patch}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


def save_clip(folder: Path, config: CLIPConfig, seed: int | None = None) -> None:
    """A CLIP as on the hub: weights (none without a seed), image processor, tokenizer."""
    config.save_pretrained(folder)
    if seed is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = randomize(CLIPModel(config), seed)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(100))
        model.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz'\","
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def open_clip_shapes(
    embed: int, vision: tuple[int, int, int, int], text: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP; vision: width, layers, patch, image size; text: width,
    layers, vocabulary."""
    width, layers, patch, size = vision
    text_width, text_layers, vocabulary = text
    shapes = {
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((size // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        "token_embedding.weight": (vocabulary, text_width),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    for name, n in norms.items():
        shapes |= {f"{name}.weight": (n,), f"{name}.bias": (n,)}
    for start, n, count in (("visual.", width, layers), ("", text_width, text_layers)):
        linear = {"attn.out_proj": (n, n), "mlp.c_fc": (4 * n, n), "mlp.c_proj": (n, 4 * n)}
        for i in range(count):
            block = f"{start}transformer.resblocks.{i}."
            shapes |= {f"{block}attn.in_proj_weight": (3 * n, n)}
            shapes |= {f"{block}attn.in_proj_bias": (3 * n,)}
            for name, (rows, columns) in linear.items():
                shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}{name}.weight": (n,), f"{block}{name}.bias": (n,)}
    return shapes


def image_reward_shapes(width: int, text: int, layers: int, words: int) -> dict[str, tuple]:
    """Names and shapes of image-reward 1.5's class, whose own are 1024, 768, 24 and 12, 30524."""
    vision, reads = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {
        f"{vision}cls_token": (1, 1, width),
        f"{vision}pos_embed": (1, 197, width),
        f"{vision}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{vision}patch_embed.proj.bias": (width,),
        f"{reads}embeddings.position_ids": (1, 512),
        f"{reads}embeddings.word_embeddings.weight": (words, text),
        f"{reads}embeddings.position_embeddings.weight": (512, text),
        "blip.vision_proj.weight": (256, width),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, text),
        "blip.text_proj.bias": (256,),
    }
    linear, norms = {}, {f"{vision}norm": width, f"{reads}embeddings.LayerNorm": text}
    for i in range(layers):
        block, layer = f"{vision}blocks.{i}.", f"{reads}encoder.layer.{i}."
        norms |= {f"{block}norm1": width, f"{block}norm2": width}
        linear |= {f"{block}attn.qkv": (3 * width, width), f"{block}attn.proj": (width, width)}
        linear |= {f"{block}mlp.fc1": (4 * width, width), f"{block}mlp.fc2": (width, 4 * width)}
        for kind, source in (("attention", text), ("crossattention", width)):
            linear |= {f"{layer}{kind}.self.query": (text, text)}
            linear |= {f"{layer}{kind}.self.{x}": (text, source) for x in ("key", "value")}
            linear |= {f"{layer}{kind}.output.dense": (text, text)}
            norms |= {f"{layer}{kind}.output.LayerNorm": text}
        linear |= {f"{layer}intermediate.dense": (4 * text, text)}
        linear |= {f"{layer}output.dense": (text, 4 * text)}
        norms |= {f"{layer}output.LayerNorm": text}
    linear |= head_shapes("mlp.layers.", text)
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name, n in norms.items():
        shapes |= {f"{name}.weight": (n,), f"{name}.bias": (n,)}
    return shapes


def head_shapes(start: str, width: int) -> dict[str, tuple[int, int]]:
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {f"{start}{layer}": shape for layer, shape in sizes.items()}


def random_tensors(shapes: dict[str, tuple], seed: int) -> dict[str, torch.Tensor]:
    """Norms near 1, matrices of gain 1, all else small."""
    generator, tensors = rng(seed), {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            tensor = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            tensor = 0.1 * tensor + (1 if "weight" in name else 0)
        elif "head" in name or "layers" in name or len(shape) == 2:
            tensor = tensor / shape[-1] ** 0.5
        else:
            tensor = 0.2 * tensor
        tensors[name] = tensor
    return tensors


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, Path]:
    """The paths of all weights by id."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {x: folder / x.replace("/", "--") for x in (PICKSCORE, CLIP_H, CLIP_L, BERT)}
    gelu = clip_config(14, "gelu")
    save_clip(paths[PICKSCORE], gelu, 1)
    save_clip(paths[CLIP_H], gelu)
    save_clip(paths[CLIP_L], clip_config(32, "quick_gelu"), 2)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(PROMPTS).split()]
    paths[BERT].mkdir()
    (paths[BERT] / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizer.from_pretrained(paths[BERT]).save_pretrained(paths[BERT])
    paths |= {x: folder / name for x, name in scorers.FILES.items()}
    paths[AESTHETIC] = folder / AESTHETIC
    tensors = random_tensors(open_clip_shapes(DIM, (WIDTH, 2, 14, 224), (WIDTH, 2, 60)), 3)
    torch.save({"state_dict": {k: x.half() for k, x in tensors.items()}}, paths[HPS])
    torch.save(random_tensors(image_reward_shapes(128, 64, 2, 40), 4), paths[IMAGE_REWARD])
    head = {}
    for name, (rows, columns) in head_shapes("layers.", DIM).items():
        head |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    torch.save(random_tensors(head, 5), paths[AESTHETIC])
    return paths


@pytest.fixture(scope="module")
def flags(local) -> tuple[str, ...]:
    return tuple(f"{name}={path}" for name, path in local.items())


@torch.no_grad()
def values(kind: type, flags: tuple[str, ...], images=IMAGES, prompts=PROMPTS) -> torch.Tensor:
    return kind(scorers.Weights(flags), CPU)(images, prompts)


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert ours.shape == theirs.shape == (2,) and ours[0] != ours[1]
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# --- Models -------------------------------------------------------------------------------------


@torch.no_grad()
def test_pickscore_is_26_times_flow_grpo_s(local, flags):
    """logit_scale.exp() * (text @ image.T).diag() / 26, as flow_grpo/pickscore_scorer.py has it."""
    model = CLIPModel.from_pretrained(local[PICKSCORE]).eval()
    tokens = CLIPTokenizer.from_pretrained(local[CLIP_H])(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil.from_pretrained(local[CLIP_H])(IMAGES, return_tensors="pt")
    image = model.visual_projection(model.vision_model(**pixels).pooler_output)
    text = model.text_projection(model.text_model(**tokens).pooler_output)
    image = image / image.norm(p=2, dim=-1, keepdim=True)
    text = text / text.norm(p=2, dim=-1, keepdim=True)
    theirs = (model.logit_scale.exp() * (text @ image.T)).diag() / 26
    assert near(values(scorers.PickScore, flags), 26 * theirs)


@torch.no_grad()
def test_clipscore_is_the_cosine_with_bilinear_pixels(local, flags):
    """logits_per_image.diagonal() / 100. Pillow's filters round to whole grey levels, so pixels
    by its bilinear one give nearly our value; by its bicubic one, CLIP's usual, they do not."""
    noise = torch.randint(0, 256, (2, 64, 64, 3), generator=rng(9), dtype=torch.uint8)
    images = [Image.fromarray(x.numpy()) for x in noise]
    model = CLIPModel.from_pretrained(local[CLIP_L]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(local[CLIP_L])
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ours, off = values(scorers.ClipScore, flags, images), {}
    for name in ("BILINEAR", "BICUBIC"):
        resized = [image.resize((224, 224), Image.Resampling[name]) for image in images]
        pixels = CLIPImageProcessorPil(do_resize=False)(resized, return_tensors="pt")
        theirs = model(**pixels, **tokens).logits_per_image.diagonal() / 100
        off[name] = (ours - theirs).abs().max()
    assert ours.abs().max() <= 1 and ours[0] != ours[1]
    assert off["BILINEAR"] < 0.25 * off["BICUBIC"], off


@torch.no_grad()
def test_aesthetic_is_linear_in_the_normalized_embedding(local, flags):
    """Five matrices, no activation between them, on an embedding of length 1."""
    model = CLIPVisionModelWithProjection.from_pretrained(local[CLIP_L]).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(local[CLIP_L])(IMAGES, return_tensors="pt")
    x = model(**pixels).image_embeds
    x = x / x.norm(dim=-1, keepdim=True)
    head = torch.load(local[AESTHETIC], weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
    ours = values(scorers.Aesthetic, flags)
    assert near(ours, x[:, 0])
    assert torch.equal(ours, values(scorers.Aesthetic, flags, prompts=["a", "b"]))


def attend(q, k, v, heads: int, mask=None):
    split = [x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v)]
    made = F.scaled_dot_product_attention(*split, attn_mask=mask)
    return made.transpose(-2, -3).flatten(-2)


def linear(x, tensors, name):
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def norm(x, tensors, name, epsilon):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def open_clip_blocks(x, tensors, start, mask=None):
    for i in range(2):
        name = f"{start}transformer.resblocks.{i}."
        stacked = norm(x, tensors, f"{name}ln_1", 1e-5)
        weight, bias = tensors[f"{name}attn.in_proj_weight"], tensors[f"{name}attn.in_proj_bias"]
        q, k, v = F.linear(stacked, weight, bias).chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, 2, mask), tensors, f"{name}attn.out_proj")
        hidden = F.gelu(linear(norm(x, tensors, f"{name}ln_2", 1e-5), tensors, f"{name}mlp.c_fc"))
        x = x + linear(hidden, tensors, f"{name}mlp.c_proj")
    return x


def open_clip_cosine(tensors, pixels, tokens):
    """open_clip's CLIP, written from its tensors."""
    patches = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=14).flatten(2).mT
    first = tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + tensors["visual.positional_embedding"]
    x = open_clip_blocks(norm(x, tensors, "visual.ln_pre", 1e-5), tensors, "visual.")
    image = norm(x[:, 0], tensors, "visual.ln_post", 1e-5) @ tensors["visual.proj"]
    length = tokens.shape[1]
    x = tensors["token_embedding.weight"][tokens] + tensors["positional_embedding"][:length]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = norm(open_clip_blocks(x, tensors, "", mask), tensors, "ln_final", 1e-5)
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ tensors["text_projection"]
    return F.cosine_similarity(image, text)


@torch.no_grad()
def test_hpsv2_is_the_cosine_of_open_clip_s_model(local, flags):
    tensors = torch.load(local[HPS], weights_only=True)["state_dict"]
    tensors = {name: x.float() for name, x in tensors.items()}
    tokenizer = CLIPTokenizer.from_pretrained(local[CLIP_H])
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    whole = [picture(seed, 224, 224) for seed in (6, 7)]  # of the model's size: no resizing
    pixels = CLIPImageProcessorPil()(whole, return_tensors="pt")["pixel_values"]
    theirs = open_clip_cosine(tensors, pixels, tokens)
    assert near(values(scorers.Hpsv2, flags, images=whole), theirs)


def test_hpsv2_has_a_place_for_each_of_vit_h_14_s_686_tensors():
    """Names and shapes; on the meta device, so without memory."""
    shapes = open_clip_shapes(1024, (1280, 32, 14, 224), (1024, 24, 49408))
    assert len(shapes) == 686
    with torch.device("meta"):
        made = scorers.clip_from_open_clip({x: torch.empty(s) for x, s in shapes.items()})
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
        text |= {"num_attention_heads": 16, "hidden_act": "gelu"}
        vision |= {"num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
        own = CLIPModel(config).state_dict()
    assert {x: t.shape for x, t in made.items()} == {x: t.shape for x, t in own.items()}


def blip_image(tensors, pixels):
    """BLIP's image encoder, written from its tensors; width 128, so 2 heads."""
    start = "blip.visual_encoder."
    weight, bias = (tensors[f"{start}patch_embed.proj.{x}"] for x in ("weight", "bias"))
    x = F.conv2d(pixels, weight, bias, stride=16).flatten(2).mT
    x = torch.cat([tensors[f"{start}cls_token"].expand(len(x), 1, -1), x], 1)
    x = x + tensors[f"{start}pos_embed"]
    for i in range(2):
        name = f"{start}blocks.{i}."
        qkv = linear(norm(x, tensors, f"{name}norm1", 1e-6), tensors, f"{name}attn.qkv")
        x = x + linear(attend(*qkv.chunk(3, dim=-1), 2), tensors, f"{name}attn.proj")
        hidden = F.gelu(linear(norm(x, tensors, f"{name}norm2", 1e-6), tensors, f"{name}mlp.fc1"))
        x = x + linear(hidden, tensors, f"{name}mlp.fc2")
    return norm(x, tensors, f"{start}norm", 1e-6)


def blip_text(tensors, tokens, mask, patches):
    """BLIP's text encoder, a BERT with attention to the image; width 64, so 1 head."""
    start = "blip.text_encoder."
    x = tensors[f"{start}embeddings.word_embeddings.weight"][tokens]
    x = x + tensors[f"{start}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x, tensors, f"{start}embeddings.LayerNorm", 1e-12)
    for i in range(2):
        name = f"{start}encoder.layer.{i}."
        for kind, source, seen in (("attention", x, mask), ("crossattention", patches, None)):
            context = x if kind == "attention" else source
            q = linear(x, tensors, f"{name}{kind}.self.query")
            k, v = (linear(context, tensors, f"{name}{kind}.self.{y}") for y in ("key", "value"))
            made = linear(attend(q, k, v, 1, seen), tensors, f"{name}{kind}.output.dense")
            x = norm(x + made, tensors, f"{name}{kind}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(x, tensors, f"{name}intermediate.dense"))
        made = linear(hidden, tensors, f"{name}output.dense")
        x = norm(x + made, tensors, f"{name}output.LayerNorm", 1e-12)
    return x[:, 0]


@torch.no_grad()
def test_imagereward_is_blip_s_reward(local, flags):
    """(mlp(first token) - 0.1672) / 1.0333, the text being cut or padded to 35 tokens."""
    tensors = torch.load(local[IMAGE_REWARD], weights_only=True)
    prompts = [PROMPTS[0], " ".join([PROMPTS[1]] * 9)]
    tokens = BertTokenizer.from_pretrained(local[BERT])(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens["attention_mask"].sum(1).tolist() == [8, 35]
    pixels = CLIPImageProcessorPil()(IMAGES, return_tensors="pt")["pixel_values"]
    mask = tokens["attention_mask"].bool()[:, None, None]
    x = blip_text(tensors, tokens["input_ids"], mask, blip_image(tensors, pixels))
    for layer in (0, 2, 4, 6, 7):
        x = linear(x, tensors, f"mlp.layers.{layer}")
    theirs = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert near(values(scorers.ImageReward, flags, prompts=prompts), theirs)


def test_each_model_s_values_do_not_depend_on_the_batch(flags):
    for kind in score.MODEL_BASED.values():
        both = values(kind, flags)
        alone = [values(kind, flags, [x], [y]) for x, y in zip(IMAGES, PROMPTS)]
        assert torch.allclose(both, torch.cat(alone), atol=1e-4), kind


@pytest.mark.parametrize("width, height", [(64, 64), (300, 200), (200, 300), (900, 500)])
def test_resizing_is_pillow_s_to_its_rounding(width, height):
    """bilinear and bicubic with antialiasing, the short or the long side to 224. Pillow rounds
    twice, by half a level, and bicubic's weights, of magnitudes 1.25 in all, spread the first."""
    image = picture(8, width, height)
    for side, mode, name in ((min, "bilinear", "BILINEAR"), (max, "bicubic", "BICUBIC")):
        ours = scorers.resize(image, 224, side, mode)
        assert side(ours.shape[1:]) == 224
        theirs = image.resize(ours.shape[:0:-1], Image.Resampling[name])
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
        assert (ours.clamp(0, 1) - theirs).abs().max() <= 1.15 / 255
    made = scorers.pad(scorers.resize(image, 224, max, "bicubic"), 224)
    assert made.shape == scorers.crop(scorers.resize(image, 224, min, "bilinear"), 224).shape
    if width == 300:  # black above and below
        assert not made[:, :37].any() and not made[:, -38:].any() and made[:, 38:-38].any()


# --- Weights ------------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_refused_by_name(local, flags, tmp_path):
    head = torch.load(local[AESTHETIC], weights_only=True)
    other = tmp_path / "head.pth"
    kept = [x for x in flags if not x.startswith(AESTHETIC)]
    for change, named in (
        (head | {"layers.7.weight": torch.zeros(2, 16)}, "7.weight"),
        ({x: t for x, t in head.items() if "layers.4" not in x}, "4.weight"),
        (head | {"layers.1.weight": torch.zeros(3)}, "1.weight"),
    ):
        torch.save(change, other)
        with pytest.raises(ValueError, match=named) as error:
            values(scorers.Aesthetic, (*kept, f"{AESTHETIC}={other}"))
        assert str(other) in str(error.value)


def test_pickled_code_is_not_run(local, flags, tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": {"logit_scale": Harm()}}, tmp_path / "HPS.pt")
    kept = [x for x in flags if not x.startswith(HPS)]
    with pytest.raises(ValueError, match="HPS.pt"):
        values(scorers.Hpsv2, (*kept, f"{HPS}={tmp_path / 'HPS.pt'}"))
    assert not (tmp_path / "harm").exists()


def test_a_clip_that_lacks_a_tensor_is_refused_by_name(local, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(local[CLIP_L]).save_pretrained(tmp_path)
    clip_config(32, "quick_gelu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="logit_scale"):
        values(scorers.ClipScore, (f"{CLIP_L}={tmp_path}",))


def test_weights_flag_names_what_is_wrong(tmp_path):
    for entry in ("no/such=/tmp", f"{CLIP_L}=", CLIP_L):
        with pytest.raises(ValueError, match="expected ID=PATH") as error:
            scorers.Weights((entry,))
        assert entry in str(error.value)
    with pytest.raises(FileNotFoundError, match="gone"):
        scorers.Weights((f"{CLIP_L}={tmp_path / 'gone'}",))


# --- Text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, target, reward",
    [
        ("Hello World", "hello world", 1),
        ("xx helloworld yy", "Hello World", 1),  # stands in what was found
        ("hellp world", "hello world", 0.9),  # 1 of 10 letters
        ("", "stop", 0),
        ("a quite different long text", "stop", 0),  # more edits than letters
        ("st", "stop", 0.5),
    ],
)
def test_text_reward_is_flow_grpo_s(found, target, reward):
    """1 - min(edits, length) / length without spaces and case."""
    prompt = f'a sign with "{target}" and "another text"'
    assert scorers.text_reward(found, prompt) == pytest.approx(reward)


def rendered(text: str) -> Image.Image:
    image = Image.new("RGB", (320, 128), (240, 230, 200))
    ImageDraw.Draw(image).text((20, 40), text, font=ImageFont.load_default(36), fill=(20, 20, 120))
    return image


def test_rapidocr_reads_rendered_prompts():
    read = scorers.OcrRapid()
    prompts = [f'a sign that says "{x}"' for x in ("Open 24 hours", "STOP", "Hello World")]
    images = [rendered("Open 24 hours"), rendered("STEP"), Image.new("RGB", (128, 128))]
    assert read(images, prompts) == [1.0, 0.75, 0.0]
    assert read.pool._max_workers == len(os.sched_getaffinity(0))


PADDLE = '''
import sys
print("paddle prints this")
class PaddleOCR:
    def __init__(self, **flags):
        wanted = dict(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
        assert flags == wanted, flags
    def ocr(self, image, cls):
        print("and this")
        assert cls is False and image.dtype == "uint8" and image.ndim == 3
        if image.max() == 0:
            return [None]
        if image[0, 0, 0] == 77:
            sys.exit("paddle broke")
        return [[[[0, 0], ("Open 24", 0.9)], [[0, 0], ("noise", 0.0)], [[0, 0], (" hours", 0.5)]]]
'''


@pytest.fixture
def paddle(tmp_path) -> Path:
    """The Python of an environment whose paddleocr is a stand-in with 2.9.1's calls."""
    folder = tmp_path / "site"
    for name in ("paddleocr", "paddlepaddle"):
        info = folder / f"{name}-2.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (folder / "paddleocr.py").write_text(PADDLE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_ocr_reads_through_another_environment_s_paddleocr(paddle):
    read = scorers.Ocr(paddle)
    prompts = ['"open 24 hours"', '"open 24 noise"', '"stop"']
    images = [rendered("a"), rendered("a"), Image.new("RGB", (8, 8))]
    assert read(images, prompts) == [1.0, pytest.approx(1 - 4 / 11), 0.0]
    with pytest.raises(RuntimeError, match="PaddleOCR ended with 1"):
        read([Image.new("RGB", (8, 8), (77, 0, 0))], prompts)
    read.close()
    assert "paddleocr 2.0" in scorers.Ocr.versions(paddle)
    with pytest.raises(RuntimeError, match="has no paddleocr"):
        scorers.Ocr.versions(Path(sys.executable))


# --- Folders and the table ----------------------------------------------------------------------


PROTOCOL = {"pipeline": "p", "lora": None, "shift": 3.0, "sigmas": [1.0, 0.5], "seed": 42}
PROTOCOL |= {"num_inference_steps": 40, "guidance_scale": 4.5, "height": 512, "width": 512}
PROTOCOL |= {"max_sequence_length": 77, "mixed_precision": "bf16", "torch": "2.14.1"}


def make_folder(
    path: Path, prompts: list[str], images: int = 2, look: int = 0, rows: tuple = (), **protocol
) -> Path:
    """A finished folder of sample.py with random images, each from weights of its own; rows: the
    lines of the prompt file, if these hold more than the prompts."""
    lines = []
    path.mkdir(parents=True, exist_ok=True)
    own = {"from": {"transformer": path.name}, "transformer": path.name}
    (path / "protocol.json").write_text(json.dumps(own | PROTOCOL | protocol))
    for i, prompt in enumerate(prompts):
        for j in range(images):
            file = f"{i:05d}/samples/{j:05d}.png"
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            picture(100 * look + 10 * i + j, 32, 32).save(path / file)
            line = {"file": file, "prompt": prompt, "prompt_index": i, "image_index": j}
            lines.append(json.dumps(line | {"seed": 42}) + "\n")
        row = rows[i] if rows else {"prompt": prompt}
        (path / f"{i:05d}/metadata.jsonl").write_text(json.dumps(row) + "\n")
    (path / "samples.jsonl").write_text("".join(lines))
    return path


def run(*folders: Path, capsys=None, **fields) -> str:
    score.main(score.Args(folders=folders, device="cpu", **fields))
    return capsys.readouterr().out if capsys else ""


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def counted(monkeypatch) -> list[str]:
    """The prompts of all images that the aesthetic model is given from here on."""
    seen, call = [], scorers.Aesthetic.__call__

    def counting(self, images, prompts):
        seen.extend(prompts)
        return call(self, images, prompts)

    monkeypatch.setattr(scorers.Aesthetic, "__call__", counting)
    return seen


def test_mean_error_and_paired_difference(tmp_path, flags, capsys):
    """Means over prompts, errors over prompts, differences image by image."""
    prompts = ["a red circle", "a blue square", "two circles"]
    folders = [make_folder(tmp_path / name, prompts, 2, i) for i, name in enumerate("ab")]
    out = run(*folders, metrics=("aesthetic",), weights=flags, capsys=capsys)
    a, b = (np.array([x["aesthetic"] for x in lines_of(f)]).reshape(3, 2) for f in folders)
    for got, per_image in (("metrics", b), ("minus", b - a)):
        summary = json.loads((folders[1] / "scores.json").read_text())[got]
        summary = summary.get("metrics", summary)["aesthetic"]
        per_prompt = per_image.mean(1)
        assert summary["mean"] == pytest.approx(per_prompt.mean())
        error = per_prompt.std(ddof=1) / 3**0.5
        assert summary["standard_error"] == pytest.approx(error)
        assert f"{per_prompt.mean():.3f} ({error:.3f})" in out
    assert "minus" not in json.loads((folders[0] / "scores.json").read_text())


def test_a_prompt_given_five_times_is_one_prompt():
    """As in DiffusionNFT's file of DrawBench, drawn with one image for each line."""
    values, none = np.random.default_rng(0).normal(size=10), np.full(10, "")
    listed = score.mean_and_error(Column(values, np.array(["a", "b"]).repeat(5), none))
    spread = np.std([values[:5].mean(), values[5:].mean()], ddof=1) / 2**0.5
    assert listed == pytest.approx((values.mean(), spread))
    assert math.isnan(score.mean_and_error(Column(values, np.full(10, "a"), none))[1])


def test_the_error_of_uneven_repeats_is_the_spread_over_draws_of_prompts():
    """1,500 sets of 60 prompts, 1 or 5 images of each, a prompt's images being alike."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(1500):
        counts = generator.choice([1, 5], 60)
        values = (generator.normal(size=60) + (counts == 5)).repeat(counts)
        names = np.arange(60).astype(str).repeat(counts)
        mean, error = score.mean_and_error(Column(values, names, np.full(len(values), "")))
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)


def test_resume_computes_what_is_missing_and_nothing_else(tmp_path, flags, monkeypatch):
    folder = make_folder(tmp_path / "a", ["red", "blue", "green"])
    run(folder, metrics=("aesthetic",), weights=flags)
    before = (folder / "scores.jsonl").read_text()
    seen = counted(monkeypatch)
    run(folder, metrics=("aesthetic",), weights=flags)
    assert not seen and (folder / "scores.jsonl").read_text() == before
    rows = lines_of(folder)
    del rows[2]["aesthetic"]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, metrics=("aesthetic",), weights=flags, batch_size=1)
    assert seen == ["blue"]
    after = [x["aesthetic"] for x in lines_of(folder)]
    was = [json.loads(x)["aesthetic"] for x in before.splitlines()]
    assert after == pytest.approx(was, abs=1e-5)


def test_python_s_numbers_are_kept_as_they_are(tmp_path):
    """0.1 is not 0.10000000149, its float32."""
    folder = score.Folder(make_folder(tmp_path / "a", ["red", "blue"]))
    score.fill(folder, "ocr", folder.rows, lambda images, prompts: [0.1] * len(images), 3)
    assert {line["ocr"] for line in lines_of(folder.path)} == {0.1}


def test_a_killed_run_keeps_what_it_saved(tmp_path, flags, monkeypatch):
    folder = make_folder(tmp_path / "a", ["red", "blue", "green"])
    monkeypatch.setattr(score, "SAVE_EVERY", 0)
    call, calls = scorers.Aesthetic.__call__, []

    def dies(self, images, prompts):
        calls.extend(prompts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, images, prompts)

    options = {"metrics": ("aesthetic",), "weights": flags, "batch_size": 1}
    with monkeypatch.context() as patch:
        patch.setattr(scorers.Aesthetic, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **options)
    assert sum("aesthetic" in x for x in lines_of(folder)) == 3
    assert "metrics" not in json.loads((folder / "scores.json").read_text())
    seen = counted(monkeypatch)
    run(folder, **options)
    assert seen == ["blue", "green", "green"]


def test_other_images_and_weights_are_scored_anew(tmp_path, flags, local, monkeypatch, capsys):
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    run(folder, metrics=("aesthetic",), weights=flags)
    seen = counted(monkeypatch)
    picture(999, 32, 32).save(folder / "00001/samples/00000.png")
    out = run(folder, metrics=("aesthetic",), weights=flags, capsys=capsys)
    assert seen == ["blue"] and "1 images" in out and str(folder) in out
    head = torch.load(local[AESTHETIC], weights_only=True)
    torch.save({name: 2 * x for name, x in head.items()}, tmp_path / "head.pth")
    kept = [x for x in flags if not x.startswith(AESTHETIC)]
    other = (*kept, f"{AESTHETIC}={tmp_path / 'head.pth'}")
    was = lines_of(folder)
    out = run(folder, metrics=("aesthetic",), weights=other, capsys=capsys)
    assert len(seen) == 5 and "aesthetic is computed anew" in out
    assert all(a["aesthetic"] != b["aesthetic"] for a, b in zip(was, lines_of(folder)))


def test_scores_never_stand_under_other_weights_whenever_a_run_dies(tmp_path, flags, monkeypatch):
    """Dies at each write in turn; afterwards each score in the folder is by the weights named."""
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    save, stamp = score.save_whole, {}

    def model(value):
        return lambda *_: lambda images, prompts: [value] * len(images)

    def go(value):
        monkeypatch.setattr(scorers.OcrRapid, "versions", lambda: f"weights {value}")
        monkeypatch.setattr(score, "OcrRapid", type("Stub", (), {
            "versions": staticmethod(lambda: f"weights {value}"),
            "__new__": lambda cls: model(value)(),
        }))  # fmt: skip
        run(folder, metrics=("ocr_rapid",))

    make_folder(folder, ['"red"', '"blue"'])
    go(1)
    for death in range(6):
        stamp["left"] = death

        def dying(text, path):
            if stamp["left"] == 0:
                raise OSError("disk full")
            stamp["left"] -= 1
            save(text, path)

        with monkeypatch.context() as patch:
            patch.setattr(score, "save_whole", dying)
            with pytest.raises(OSError, match="disk full"):
                go(2)
        named = json.loads((folder / "scores.json").read_text())["scorers"]["ocr_rapid"]
        found = {row["ocr_rapid"] for row in lines_of(folder) if "ocr_rapid" in row}
        assert found <= {float(named.split()[1])}
        go(1)
        assert [row["ocr_rapid"] for row in lines_of(folder)] == [1.0] * 4


def test_folders_that_cannot_be_scored_are_refused_by_name(tmp_path, flags):
    good = make_folder(tmp_path / "good", ["red", "blue"])
    empty = tmp_path / "empty"
    empty.mkdir()
    holes = make_folder(tmp_path / "holes", ["red", "blue"])
    (holes / "00001/samples/00001.png").unlink()
    other = make_folder(tmp_path / "other", ["red", "green"])
    more = make_folder(tmp_path / "more", ["red", "blue"], 3)
    broken = make_folder(tmp_path / "broken", ["red", "blue"])
    (broken / "00000/samples/00000.png").write_bytes(b"no image")
    for bad, named in (
        (empty, "samples.jsonl"), (holes, "00001/samples/00001.png"), (other, "different prompts"),
        (more, "different prompts"), (broken, "00000/samples/00000.png"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named) as error:
            run(good, bad, metrics=("aesthetic",), weights=flags)
        assert str(bad) in str(error.value)
    half = make_folder(tmp_path / "half", ['a "red" sign', "a blue sign"])
    with pytest.raises(ValueError, match="straight double quotes.*blue"):
        run(half, metrics=("aesthetic", "ocr_rapid"), weights=flags)
    assert not (half / "scores.jsonl").exists()  # refused before anything was computed
    with pytest.raises(ValueError, match="twice"):
        run(good, tmp_path / "." / "good")
    with pytest.raises(SystemExit, match="^error: .*empty has no samples.jsonl"):
        score.command([str(good), str(empty)])


def test_files_among_the_folders_are_passed_over(tmp_path, flags, capsys):
    """As by the shell's output/images/*, where sample.py's compare.png lies."""
    folders = [make_folder(tmp_path / x, ["red", "blue"], look=i) for i, x in enumerate("ab")]
    (tmp_path / "compare.png").write_bytes(b"")
    given = [str(x) for x in sorted(tmp_path.iterdir())]
    options = ["--metrics", "aesthetic", "--device", "cpu", "--weights", *flags]
    score.command([*given, *options])
    assert f"{folders[0]} | {folders[1]} | minus the first |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least one FOLDER"):
        run(tmp_path / "compare.png")


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"guidance_scale": 1.0}, "guidance_scale 1.0 for 4.5"),
        ({"sigmas": [1.0] * 99, "num_inference_steps": 4}, "sigmas, num_inference_steps 4 for 40"),
        ({"seed": 1, "torch": "2.9.0"}, "seed 1 for 42, torch 2.9.0 for 2.14.1"),
        ({"height": 64}, "height 64 for 512"),
        ({"unheard_of": 1}, "unheard_of 1 for None"),
    ],
)
def test_folders_of_other_protocols_are_compared_only_by_a_flag(
    changed, named, tmp_path, flags, capsys
):
    """What differs beyond the weights stands under the table and in scores.json."""
    a = make_folder(tmp_path / "a", ["red", "blue"])
    b = make_folder(tmp_path / "b", ["red", "blue"], look=1, **changed)
    options = {"metrics": ("aesthetic",), "weights": flags}
    with pytest.raises(ValueError, match=f"{named}. --across_protocols") as error:
        run(a, b, **options)
    assert str(a) in str(error.value) and str(b) in str(error.value)
    assert not (b / "scores.jsonl").exists()
    out = run(a, b, across_protocols=True, capsys=capsys, **options)
    assert out.splitlines()[-1] == f"{b} differs by more than weights: {named}."
    minus = json.loads((b / "scores.json").read_text())["minus"]
    assert minus["unlike"] == {x: [PROTOCOL.get(x), changed[x]] for x in changed}


def test_the_table_says_under_which_protocol_and_names_other_packages(tmp_path, flags, capsys):
    a = make_folder(tmp_path / "a", ["red", "blue"])
    b = make_folder(tmp_path / "b", ["red", "blue"], look=1, torch="2.9.0")
    out = run(a, b, metrics=("aesthetic",), weights=flags, capsys=capsys)
    footer = "guidance_scale 4.5, num_inference_steps 40, height 512, width 512, "
    footer += "max_sequence_length 77, seed 42, mixed_precision bf16. Our scorers: float32."
    assert footer in out and f"{b} differs by more than weights: torch 2.9.0 for 2.14.1." in out
    assert "differs" not in run(a, metrics=("aesthetic",), weights=flags, capsys=capsys)
    (b / "protocol.json").unlink()
    with pytest.raises(ValueError, match="b has no protocol.json"):
        run(a, b, metrics=("aesthetic",), weights=flags)


def test_a_set_that_is_not_the_paper_s_gets_no_difference_from_it(tmp_path, flags, capsys):
    """200 prompts, 5 images of each, 40 steps, guidance 4.5 and 512 pixels are."""
    prompts = [f"prompt {i}" for i in range(200)]
    whole = np.arange(1000) / 1000
    own = PROTOCOL
    for size, protocol, why in (
        ("200 x 5", own, ""),
        ("200 x 4", own, "prompts x images 200 x 4, there 200 x 5"),
        ("199 x 5", own, "prompts x images 199 x 5, there 200 x 5"),
        ("200 prompts, 999 images", own, "prompts x images 200 prompts, 999 images, there 200 x 5"),
        ("200 x 5", own | {"guidance_scale": 1.0}, "guidance_scale 1.0, there 4.5"),
        ("200 x 5", own | {"num_inference_steps": 10}, "num_inference_steps 10, there 40"),
    ):
        n = {"200 x 4": 800, "199 x 5": 995, "200 prompts, 999 images": 999}.get(size, 1000)
        names = np.array(prompts).repeat(n // 200 if n == 800 else 5)[:n]
        row = score.compare("pickscore", [Column(whole[:n], names, np.full(n, ""))])
        notes: list[str] = []
        cells = score.against_paper(row, 3, protocol, notes)
        assert row.size == size and cells[:3] == ["22.34", "22.71", "22.86"]
        if why:
            expected = [f"pickscore is not set against the paper's base: {why}."]
            assert cells[3] == "" and notes == expected
        else:
            assert cells[3] == f"{whole.mean() - 22.34:+.3f}" and not notes
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    options = {"metrics": ("aesthetic",), "weights": flags, "capsys": capsys}
    out = run(folder, check_base=True, **options)
    assert "| aesthetic | 2 x 2 |" in out and "5.36 | 5.35 | 5.46 |  |" in out
    assert "2 x 2, there 200 x 5" in out
    assert json.loads((folder / "scores.json").read_text())["metrics"]["aesthetic"]["of"] == "2 x 2"


def offline(monkeypatch, cache: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_missing_weights_are_named_all_at_once_with_the_flag(tmp_path, flags, monkeypatch):
    """Before any model is loaded; also those of which the cache has the config alone."""
    offline(monkeypatch, tmp_path / "cache")
    folder = make_folder(tmp_path / "a", ["red", "blue"])
    kept = [x for x in flags if x.startswith((CLIP_L, AESTHETIC))]
    words = ["--metrics", "aesthetic", "pickscore", "imagereward", "--weights", *kept]
    named = f"hub: {PICKSCORE}, {CLIP_H}, {IMAGE_REWARD}, {BERT}. .*--weights ID=PATH"
    with pytest.raises(SystemExit, match=named):
        score.command([str(folder), *words])
    assert not (folder / "scores.jsonl").exists()
    for name in (PICKSCORE, CLIP_H):
        cached = tmp_path / "cache" / ("models--" + name.replace("/", "--"))
        (cached / "snapshots/0123").mkdir(parents=True)
        (cached / "snapshots/0123/config.json").write_text('{"model_type": "clip"}')
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("0123")
    with pytest.raises(SystemExit, match=f"pickscore needs {PICKSCORE}.*--weights ID=PATH"):
        score.command([str(folder), "--metrics", "pickscore"])


# --- GenEval ------------------------------------------------------------------------------------

TASKS = {"a bench": "single_object", "a cat": "single_object"}
TASKS |= {"two dogs": "counting", "two cats": "counting"}


def write_results(folder: Path, verdicts: list[bool], start: str = "/elsewhere/images") -> None:
    """As evaluation/evaluate_images.py of djghosh13/geneval writes it, in another order."""
    lines = []
    for row, correct in zip(score.read_lines(folder / "samples.jsonl"), verdicts, strict=True):
        result = {"filename": f"{start}/{row['file']}", "tag": TASKS[row["prompt"]]}
        result |= {"prompt": row["prompt"], "correct": correct, "reason": "", "details": "{}"}
        lines.append(json.dumps(result).replace("/", "\\/") + "\n")
    (folder / "results.jsonl").write_text("".join(reversed(lines)))


def test_geneval_is_the_official_overall_score_where_prompts_repeat_unevenly(tmp_path, capsys):
    """summary_scores.py: the mean over tasks of the share of correct images. Its mean over prompts
    first, a difference of 0.1 here, would be another number."""
    prompts = ["a bench"] * 4 + ["a cat"] + ["two dogs"] * 2 + ["two cats"] * 3
    folders = [make_folder(tmp_path / x, prompts, 1) for x in "ab"]
    first = [True, True, True, False, False, True, False, False, False, False]
    write_results(folders[0], first)
    write_results(folders[1], [True] * 10)
    out = run(*folders, metrics=("geneval",), check_base=True, capsys=capsys)
    single, counting = 3 / 5, 1 / 5
    metrics = json.loads((folders[0] / "scores.json").read_text())["metrics"]
    means = {x: metrics[x]["mean"] for x in metrics}
    expected = {"geneval": (single + counting) / 2}
    expected |= {"geneval single_object": single, "geneval counting": counting}
    assert means == pytest.approx(expected)
    sizes = [metrics[x]["of"] for x in expected]
    assert sizes == ["4 prompts, 10 images, 2 tasks", "2 prompts, 5 images", "2 prompts, 5 images"]
    # Of each prompt: the correct images less what they would be at the task's mean
    off = [[3 - 4 * single, 0 - single], [1 - 2 * counting, 0 - 3 * counting]]
    variances = [2 * np.sum(np.square(x)) / 5**2 for x in off]
    errors = [metrics[x]["standard_error"] for x in expected]
    assert errors == pytest.approx([sum(variances) ** 0.5 / 2, *np.sqrt(variances)])
    row = next(line for line in out.splitlines() if line.startswith("| geneval |"))
    assert row.endswith("| 0.63 | 0.7 | 0.78 |  |") and f"{1 - expected['geneval']:+.3f}" in row
    assert "4 prompts, 10 images, 2 tasks, there 553 x 4, 6 tasks" in out


def test_geneval_of_one_folder_leaves_the_other_s_cells_empty(tmp_path, flags, capsys):
    """results.jsonl is read where it is, whatever --metrics names."""
    folders = [make_folder(tmp_path / x, list(TASKS), 1) for x in "ab"]
    write_results(folders[1], [True, False, True, True])
    out = run(*folders, metrics=("aesthetic",), weights=flags, capsys=capsys)
    row = next(line for line in out.splitlines() if line.startswith("| geneval |"))
    assert row.startswith("| geneval | 4 x 1, 2 tasks |  | 0.750 (") and row.endswith("|  |")
    scorers_of = [json.loads((x / "scores.json").read_text())["scorers"] for x in folders]
    assert "geneval" in scorers_of[1] and "geneval" not in scorers_of[0]
    (folders[1] / "results.jsonl").unlink()
    assert "| geneval" not in run(*folders, metrics=("aesthetic",), weights=flags, capsys=capsys)
    assert not any("geneval" in line for line in lines_of(folders[1]))


def test_geneval_of_other_tasks_is_not_paired(tmp_path):
    """The same image, called counting in one folder and single_object in the other."""
    folders = [make_folder(tmp_path / x, list(TASKS), 1) for x in "ab"]
    for folder in folders:
        write_results(folder, [True, False, True, True])
    text = (folders[1] / "results.jsonl").read_text()
    (folders[1] / "results.jsonl").write_text(text.replace('"counting"', '"single_object"', 1))
    run(*folders, metrics=("geneval",))
    summary = json.loads((folders[1] / "scores.json").read_text())
    assert summary["minus"]["metrics"] == {} and summary["metrics"].keys() > {"geneval counting"}


def test_geneval_of_other_images_or_prompts_is_refused(tmp_path):
    folder = make_folder(tmp_path / "a", list(TASKS), 1)
    with pytest.raises(ValueError, match="no results.jsonl"):
        run(folder, metrics=("geneval",))
    write_results(folder, [True] * 4)
    text = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(text.replace("a cat", "a dog"))
    with pytest.raises(ValueError, match="00001/samples/00000.png is of another prompt"):
        run(folder, metrics=("geneval",))
    (folder / "results.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="not of this folder's images"):
        run(folder, metrics=("geneval",))


ATOMS = (
    {"prompt": "a green cat", "atom_count": 3, "skills": ["count", "attribute", "object"]},
    {"prompt": "two red pigs and a car", "atom_count": 5, "skills": ["count", "object", "count"]},
    {"prompt": "six cows", "atom_count": 3, "skills": ["count", "object"]},
)
LISTS = [[0.5, 0.25, 1.0], [0.1, 0.9, 0.0], [0.3, 0.8]]


def geneval2_folder(path: Path, images: int = 1, rows=ATOMS, **options) -> Path:
    return make_folder(path, [row["prompt"] for row in rows], images, rows=rows, **options)


def test_geneval2_is_soft_tifa_in_all_by_atom_skill_and_number_of_atoms(tmp_path, capsys):
    """Of 100: the mean over prompts of the geometric mean over atoms, and of the mean; single
    atoms of a skill; a difference is paired by prompt."""
    folders = [geneval2_folder(tmp_path / x, look=i) for i, x in enumerate("ab")]
    (folders[0] / "score_lists.json").write_text(json.dumps(LISTS))
    better = [[0.5, 0.5, 1.0], *LISTS[1:]]
    (folders[1] / "score_lists.json").write_text(json.dumps(better))
    out = run(*folders, metrics=("geneval2",), capsys=capsys)
    metrics = json.loads((folders[0] / "scores.json").read_text())["metrics"]
    geometric = [100 * 0.125 ** (1 / 3), 0, 100 * 0.24**0.5]
    means = {x: metrics[x]["mean"] for x in metrics}
    assert means == pytest.approx({
        "geneval2": np.mean(geometric),
        "geneval2 by atom": 100 * np.mean([1.75 / 3, 1.0 / 3, 1.1 / 2]),
        "geneval2 count": 100 * np.mean([0.5, 0.1, 0.0, 0.3]),
        "geneval2 attribute": 25,
        "geneval2 object": 100 * np.mean([1, 0.9, 0.8]),
        "geneval2 3 atoms": np.mean(geometric[::2]),
        "geneval2 5 atoms": 0,
    })  # fmt: skip
    error = np.std(geometric, ddof=1) / 3**0.5
    assert metrics["geneval2"]["standard_error"] == pytest.approx(error)
    sizes = [metrics[f"geneval2{x}"]["of"] for x in ("", " by atom", " count", " 3 atoms")]
    assert sizes == ["3 x 1", "3 x 1", "3 prompts, 4 atoms", "2 x 1"]
    minus = json.loads((folders[1] / "scores.json").read_text())["minus"]["metrics"]
    assert minus["geneval2 attribute"]["mean"] == pytest.approx(25)
    assert minus["geneval2 object"]["mean"] == 0
    assert "one figure was found, 22, with guidance 4.5" in out
    assert [line["geneval2"] for line in lines_of(folders[0])] == pytest.approx(geometric)


def test_geneval2_writes_what_evaluation_reads_and_says_how_to_run_it(tmp_path):
    """{prompt: file}, files by whole paths, for every folder without results."""
    folders = [geneval2_folder(tmp_path / x) for x in "ab"]
    with pytest.raises(ValueError, match="--image_filepath_data") as error:
        run(*folders, metrics=("geneval2",))
    for folder in folders:
        paths = json.loads((folder / "geneval2_paths.json").read_text())
        files = [str(folder / f"{i:05d}/samples/00000.png") for i in range(3)]
        assert paths == dict(zip([row["prompt"] for row in ATOMS], files))
        assert f"--output_file {folder / 'score_lists.json'}" in str(error.value)


def test_geneval2_refuses_several_images_other_prompts_and_other_lists(tmp_path):
    for folder, named in (
        (geneval2_folder(tmp_path / "two", 2), "2 images of 'a green cat'.*per_prompt 1"),
        (make_folder(tmp_path / "other", ["a", "b"], 1), "00000/metadata.jsonl has no skills"),
    ):
        with pytest.raises(ValueError, match=named):
            run(folder, metrics=("geneval2",))
        assert not (folder / "geneval2_paths.json").exists()
    folder = geneval2_folder(tmp_path / "a")
    for lists, named in (
        (LISTS[:2], "is of 2 prompts, .* of 3"),
        (LISTS[::-1], "list of 'a green cat' has 2 numbers for 3 atoms"),
        ([[0.5, 0.25, float("nan")], *LISTS[1:]], "has nan, no probability"),
        ([[1, 0, 1], [0, 0, 0], [1, 1]], "has 1, no probability: give --method soft_tifa_gm"),
        ([[0.5, 0.25, -0.5], *LISTS[1:]], "has -0.5, no probability"),
    ):
        (folder / "score_lists.json").write_text(json.dumps(lists))
        with pytest.raises(ValueError, match=named):
            run(folder, metrics=("geneval2",))
    (folder / "score_lists.json").write_text("[[0.5,")
    with pytest.raises(ValueError, match="score_lists.json: not JSON"):
        run(folder, metrics=("geneval2",))


# --- All of it ----------------------------------------------------------------------------------


def test_a_folder_of_the_shapes_world_goes_through_every_metric(tmp_path, flags, paddle, capsys):
    """sample.py draws lines of GenEval 2's form from two transformers; one command scores both."""
    prompts = [{"prompt": x, "tag": "colors"} for x in ('a red circle "on"', 'a blue square "off"')]
    prompts = [row | {"atom_count": 2, "skills": ["object", "attribute"]} for row in prompts]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    model = MODEL["pretrained_model_name_or_path"]
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": 1}
    other = Path(model, "transformer")
    done = launch(
        1, "sample.py", "--transformer", "base", str(other),
        prompts=file, output_dir=tmp_path / "out", **MODEL, **sizes,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    given = sorted((tmp_path / "out").iterdir())
    folders = [x for x in given if x.is_dir()]
    assert len(folders) == 2 and tmp_path / "out/compare.png" in given
    for folder in folders:
        lines = score.read_lines(folder / "samples.jsonl")
        results = [{"filename": f"x/{x['file']}", "tag": "colors", "correct": True} for x in lines]
        results = [r | {"prompt": x["prompt"]} for r, x in zip(results, lines)]
        text = "".join(json.dumps(result) + "\n" for result in results)
        (folder / "results.jsonl").write_text(text)
        (folder / "score_lists.json").write_text("[[0.5, 0.75], [1.0, 0.25]]")
    metrics = (*score.MODEL_BASED, "ocr", "ocr_rapid")
    options = {"weights": flags, "ocr_python": paddle, "check_base": True, "capsys": capsys}
    out = run(*given, metrics=metrics, **options)
    for folder in folders:
        assert len(lines_of(folder)) == 2
        for line in lines_of(folder):
            assert all(math.isfinite(line[name]) for name in (*metrics, *score.READ))
        summary = json.loads((folder / "scores.json").read_text())
        assert {*metrics, *score.READ, "geneval colors"} < summary["metrics"].keys()
        assert summary["images"] == summary["prompts"] == 2
    minus = json.loads((folders[1] / "scores.json").read_text())["minus"]["metrics"]
    assert all(minus[name]["mean"] == 0 for name in metrics)  # two names of one transformer
    for name in metrics:
        row = next(line for line in out.splitlines() if line.startswith(f"| {name} | 2 x 1 |"))
        _, *published = score.PUBLISHED.get(name, ("", "", "", ""))
        assert f"| {' | '.join(map(str, published))} |  |" in row
    assert "guidance_scale 4.5, num_inference_steps 2, height 64" in out


def test_the_command_reads_the_hub_s_cache(tmp_path, local, monkeypatch, capsys):
    """Without --weights the ids of the hub are read, here from a cache that is laid out as
    huggingface_hub lays it out; scores.json names the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in (PICKSCORE, CLIP_H, HPS, IMAGE_REWARD, BERT):
        cached = tmp_path / "cache" / ("models--" + name.replace("/", "--"))
        snapshot = cached / "snapshots" / commit
        if local[name].is_dir():
            shutil.copytree(local[name], snapshot)
        else:
            snapshot.mkdir(parents=True)
            shutil.copy(local[name], snapshot)
        (snapshot / "config.json").touch()
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(commit)
    folder = make_folder(tmp_path / "a", PROMPTS)
    offline(monkeypatch, tmp_path / "cache")
    score.command([str(folder), "--metrics", "pickscore", "hpsv2", "imagereward"])
    out, err = capsys.readouterr()
    assert "| pickscore |" in out and "pickscore of" in err
    identity = json.loads((folder / "scores.json").read_text())["scorers"]["pickscore"]
    assert identity == f"{PICKSCORE} commit {commit}; {CLIP_H} commit {commit}"
