"""train.py's LoRA file where others read it: diffusers' pipeline, peft, ComfyUI's names; and what
experiments/evaluate/open_elsewhere.py, which needs an environment of its own, has in this one."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import train
from experiments.evaluate.open_elsewhere import DATA, FILE, as_downloaded, with_transformer
from experiments.shapes.sft_vs_soar import CPU, load_base
from experiments.tests.common import copy_pairs, train_args
from sample import load_transformer

MODEL = DATA / "model"


@torch.no_grad()
def velocity(model) -> torch.Tensor:
    """What a model says of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    return model(
        torch.randn(2, 16, 8, 8, generator=generator),
        timestep=torch.tensor([900.0, 200.0]),
        encoder_hidden_states=torch.randn(2, 24, 64, generator=generator),
        pooled_projections=torch.randn(2, 64, generator=generator),
        return_dict=False,
    )[0]


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """A checkpoint of train.py with --lora_rank 4."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"dataset": copy_pairs(range(4), folder / "pairs.parquet"), "learning_rate": 0.1}
    flags |= {"max_train_steps": 1, "train_batch_size": 1, "num_aux_points": 1, "lora_rank": 4}
    train.main(train_args(output_dir=folder / "out", **flags))
    return folder / "out/checkpoint-000001"


@pytest.fixture(scope="module")
def agrees(final):
    """Whether a model says what sample.py's merged one does: of W + B @ A (test_weights.py)."""
    expected = velocity(load_transformer(str(MODEL), final / FILE, torch.float32, CPU))
    assert (expected - velocity(load_base())).abs().max() > 0.1
    return lambda model: torch.allclose(velocity(model), expected, atol=1e-4)


def test_lora_file_loads_in_peft(final, agrees, tmp_path):
    """As an adapter folder, which is what Flow-GRPO's config.train.lora_path takes."""
    tensors = load_file(final / FILE).items()
    tensors = {key.replace("transformer.", "base_model.model.", 1): x for key, x in tensors}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(train.LORA_MODULES))
    config.save_pretrained(tmp_path)
    assert agrees(PeftModel.from_pretrained(load_base(), tmp_path))


def test_lora_file_has_comfyui_s_names_as_it_is(final):
    """ "transformer." + diffusers' name + .lora_A.weight and .lora_B.weight, and no alpha: scale 1.
    Source: model_lora_keys_unet in comfy/lora.py (17358c8), mmdit_to_diffusers in comfy/utils.py
    (09708ea), LoRAAdapter in comfy/weight_adapter/lora.py (0323d87) of Comfy-Org/ComfyUI."""
    modules = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"]
    modules += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    modules += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
    own = dict(load_base().named_modules())
    places = [f"transformer_blocks.{i}.{name}" for i in range(len(own)) for name in modules]
    names = [f"transformer.{x}.lora_{part}.weight" for x in places if x in own for part in "AB"]
    assert load_file(final / FILE).keys() == set(names)


def test_fused_and_unloaded_a_lora_is_saved_whole(final, agrees, tmp_path):
    """Saved without fusing, what comes back lacks the base's matrices: diffusers would draw them
    at random."""
    pipe = StableDiffusion3Pipeline.from_pretrained(MODEL)
    pipe.load_lora_weights(final, weight_name=FILE)
    assert agrees(pipe.transformer)
    pipe.transformer.save_pretrained(tmp_path / "unfused")
    kind, options = SD3Transformer2DModel, {"output_loading_info": True}
    _, info = kind.from_pretrained(tmp_path / "unfused", **options)
    assert "transformer_blocks.0.attn.to_q.weight" in info["missing_keys"]
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "fused")
    model, info = kind.from_pretrained(tmp_path / "fused", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert agrees(model.eval())


def test_a_copy_of_the_base_takes_another_transformer(tmp_path):
    base = as_downloaded(MODEL, tmp_path / "base")
    names = {x.name for x in (base / "tokenizer").iterdir()}
    assert names == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    model = load_base()
    model.proj_out.bias.data += 1
    model.save_pretrained(tmp_path / "transformer")
    folder = with_transformer(base, tmp_path / "transformer", tmp_path / "copy")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    assert torch.equal(pipe.transformer.proj_out.bias, model.proj_out.bias)
    before = StableDiffusion3Pipeline.from_pretrained(MODEL)
    prompts = [json.loads(x)["prompt"] for x in (DATA / "prompts.jsonl").open()][::50]
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        ours, theirs = (getattr(x, name)(prompts)["input_ids"] for x in (pipe, before))
        assert ours == theirs
