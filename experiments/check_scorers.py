"""Whether scorers.py computes what the packages do whose files it reads, open_clip, image-reward.

    python -m experiments.check_scorers                    # makes an environment, in a temp folder
    python -m experiments.check_scorers --environment DIR  # keeps it there for the next time

There open_clip 3.3.0 and image-reward 1.5 make models with random weights, a small CLIP and
ImageReward in its own size (it has no other), score random images with them and save both. Here
scorers.py reads the files and scores the same images. HPS v2.1's images are resized there as
flow_grpo/hpsv2_scorer.py of NVlabs/DiffusionNFT does it, with torchvision. Also compared: the CLIP
tokens of prompts, with --prompts FILE those of each line of it. The environment takes 6 GB of disk
(torchvision needs a torch of its own), the models 4 GB of memory; no weights are downloaded.
"""

import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from transformers import CLIPConfig, CLIPTokenizer

from experiments import scorers
from experiments.open_elsewhere import make_environment, report, run
from sample import read_prompts

PINS = (
    "torch==2.14.1", "torchvision==0.29.1", "open_clip_torch==3.3.0", "transformers==4.55.4",
    "timm==1.0.31", "fairscale==0.4.13", "diffusers==0.33.1", "accelerate==1.4.0",
    "datasets==3.3.2",
)  # fmt: skip
ALONE = ("image-reward==1.5",)  # it asks for OpenAI's clip, which is not on PyPI
WIDTHS = {"vision": 160, "text": 128, "embed": 48, "layers": 3}
PROMPTS = ("a photo of a red bench", 'Two blue CIRCLES, "hello" & more; it\'s 7 o\'clock ' * 9)
REFERENCE = """
import json, sys, types
from pathlib import Path
sys.modules["clip"] = types.ModuleType("clip")  # image-reward imports it, for another metric
import numpy as np, open_clip, torch
import torchvision.transforms.functional as TF
from PIL import Image
from transformers import BertTokenizer
import ImageReward.models.BLIP.blip_pretrain as pretrain
from ImageReward.ImageReward import ImageReward

folder, widths, prompts, lines = Path(sys.argv[1]), *map(json.loads, sys.argv[2:5])
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)

def randomize(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()

images = []
for i, (width, height) in enumerate([(512, 512), (512, 384), (300, 431)]):
    pixels = torch.rand(height, width, 3, generator=generator)
    images.append(Image.fromarray((255 * pixels).byte().numpy()))
    images[i].save(folder / f"{i}.png")

tokenizer = open_clip.get_tokenizer("ViT-H-14")
layers, text = widths["layers"], widths["text"]
clip = randomize(open_clip.model.CLIP(
    widths["embed"],
    dict(image_size=224, layers=layers, width=widths["vision"], head_width=80, patch_size=14),
    dict(context_length=77, vocab_size=49408, width=text, heads=2, layers=layers),
    output_dict=True,
))
torch.save({"state_dict": clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
vocabulary = {names.get(word, word): i for word, i in tokenizer.encoder.items()}
merges = [" ".join(x) for x, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda x: x[1])]
(folder / "tokenizer.json").write_text(json.dumps([vocabulary, merges]))
mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

def hps(image, prompt):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    size = [round(n * 224 / max(x.shape[-2:])) for n in x.shape[-2:]]
    x = TF.resize(x, size, TF.InterpolationMode.BICUBIC)
    high, wide = 224 - size[0], 224 - size[1]
    x = TF.pad(x, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    out = clip(TF.normalize(x, mean, std), tokenizer([prompt]))
    return (out["image_features"] @ out["text_features"].T).item()

def tokens(line):
    ids = tokenizer([line])[0]
    return ids[: ids.argmax() + 1].tolist()

words = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red bench two blue hello more it s o".split()
(folder / "vocab.txt").write_text("\\n".join(words) + "\\n")
def bert():
    made = BertTokenizer(str(folder / "vocab.txt"))
    made.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return made
pretrain.init_tokenizer = bert  # its own is downloaded
config = dict(
    hidden_act="gelu", hidden_size=768, intermediate_size=3072, layer_norm_eps=1e-12,
    max_position_embeddings=512, num_attention_heads=12, num_hidden_layers=12, pad_token_id=0,
    add_type_embeddings=False, vocab_size=30524, encoder_width=768, add_cross_attention=True,
)
(folder / "med_config.json").write_text(json.dumps(config))
reward = randomize(ImageReward(str(folder / "med_config.json")))
with torch.no_grad():
    for p in reward.mlp.parameters():  # else its small weights would hide differences
        p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
torch.save(reward.state_dict(), folder / "ImageReward.pt")

with torch.no_grad():
    pairs = [(image, prompt) for image in images for prompt in prompts]
    answer = {"hpsv2": [hps(*pair) for pair in pairs]}
    answer["imagereward"] = [reward.score(prompt, image) for image, prompt in pairs]
    answer["tokens"] = [tokens(line) for line in lines]
(folder / "answer.json").write_text(json.dumps(answer))
"""


@dataclass(frozen=True)
class Args:
    environment: Path | None = None
    """Where to make the environment, or find the one that an earlier run made there; by default a
    temporary folder."""
    prompts: Path | None = None
    """A prompt file as of sample.py, for the comparison of tokens."""


def save_clip_parts(folder: Path) -> Path:
    """The small CLIP's config and tokenizer as transformers reads them."""
    vocabulary, merges = json.loads((folder / "tokenizer.json").read_text())
    merges = [tuple(pair.split(" ")) for pair in merges]
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder / "clip")
    sizes = {"num_attention_heads": 2, "num_hidden_layers": WIDTHS["layers"], "hidden_act": "gelu"}
    text = sizes | {"hidden_size": WIDTHS["text"], "intermediate_size": 4 * WIDTHS["text"]}
    vision = sizes | {"hidden_size": WIDTHS["vision"], "intermediate_size": 4 * WIDTHS["vision"]}
    vision |= {"patch_size": 14, "image_size": 224}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTHS["embed"])
    config.save_pretrained(folder / "clip")
    return folder / "clip"


@torch.no_grad()
def check_values(name: str, kind: type, weights: scorers.Weights, folder: Path, theirs) -> bool:
    """Ours equal theirs to 1e-5, which are not all the same."""
    images = [Image.open(folder / f"{i}.png").convert("RGB") for i in range(3)]
    pairs = [(image, prompt) for image in images for prompt in PROMPTS]
    scorer = kind(weights, torch.device("cpu"))
    ours = torch.cat([scorer([image], [prompt]) for image, prompt in pairs])
    theirs = torch.tensor(theirs)
    apart = (ours - theirs).abs().max().item()
    spread = (theirs.max() - theirs.min()).item()
    text = f"{name}: {len(pairs)} values, at most {apart:.1e} apart, spread over {spread:.2f}"
    return report(apart < 1e-5 < 1e-3 < spread, text)


def check_tokens(tokenizer: CLIPTokenizer, lines: list[str], theirs: list[list[int]]) -> bool:
    options = {"truncation": True, "max_length": 77}
    other = []
    for line, tokens in zip(lines, theirs):
        if tokenizer(line, **options)["input_ids"] != tokens:
            other.append(line)
    example = f", such as {other[0]!r}" if other else ""
    return report(not other, f"tokens: {len(other)} of {len(lines)} prompts differ{example}")


def main(args: Args) -> None:
    lines = list(PROMPTS)
    if args.prompts:
        lines = sorted({row["prompt"] for row in read_prompts(args.prompts)})
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = make_environment((args.environment or work / "env").absolute(), PINS, ALONE)
        words = [json.dumps(x) for x in (WIDTHS, PROMPTS, lines)]
        done = run([python, "-c", REFERENCE, work, *words])
        if done.returncode:
            sys.exit(f"{python}: {done.stderr[-3000:]}")
        answer = json.loads((work / "answer.json").read_text())
        (work / "bert").mkdir()
        (work / "vocab.txt").rename(work / "bert/vocab.txt")
        clip = save_clip_parts(work)
        paths = {scorers.HPS: work / scorers.FILES[scorers.HPS], scorers.CLIP_H: clip}
        paths[scorers.IMAGE_REWARD] = work / scorers.FILES[scorers.IMAGE_REWARD]
        paths[scorers.BERT] = work / "bert"
        weights = scorers.Weights(tuple(f"{name}={path}" for name, path in paths.items()))
        kinds = {"hpsv2": scorers.Hpsv2, "imagereward": scorers.ImageReward}
        passed = [check_values(x, kinds[x], weights, work, answer[x]) for x in kinds]
        passed.append(check_tokens(CLIPTokenizer.from_pretrained(clip), lines, answer["tokens"]))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
