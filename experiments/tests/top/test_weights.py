"""The weights that sample.py loads: checkpoints, transformers, LoRA files, encoders, the VAE."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import sample
from experiments.tests.common import raises
from experiments.tests.top.sampling import (
    BASE,
    CPU,
    WEIGHTS,
    base_transformer,
    edit_json,
    edit_weights,
    planned,
    write,
)
from experiments.tests.top.training import copy_base

# --- Transformers ---------------------------------------------------------------------------------


def test_run_stands_for_its_newest_checkpoint_by_exact_name(tmp_path):
    names = ["checkpoint-000005", "checkpoint-000010", "checkpoint-999999", "checkpoint-1000000"]
    other = ["checkpoint-5", "checkpoint-000011-good", "checkpoint-0000012", "checkpoint-٢000000"]
    for name in names + other:
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer/config.json").write_text("{}")
    (tmp_path / "checkpoint-4000000").write_text("no folder")
    assert [path.name for path in sample.checkpoints(tmp_path)] == names
    assert sample.checkpoints(tmp_path / "nowhere") == []
    for given, found in (("", names[-1]), (names[0], names[0])):
        weights, _ = sample.find_weights(str(tmp_path / given))
        assert weights == tmp_path / found / "transformer"


@pytest.mark.parametrize("beside", ["transformer/config.json", sample.LORA, "config.json"])
def test_folder_that_may_mean_two_is_refused_by_both_names(trained, tmp_path, beside):
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run" / beside
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    newest = tmp_path / "run/checkpoint-000007/transformer"
    other = file if beside == sample.LORA else file.parent
    with raises(ValueError, str(newest), f"{other} "):
        planned(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("in_channels", 4), ("out_channels", 8), ("joint_attention_dim", 32), ("patch_size", 2),
        ("pooled_projection_dim", 32), ("pos_embed_max_size", 8), ("_class_name", "FluxModel"),
    ],
)  # fmt: skip
def test_transformer_that_does_not_fit_is_refused_by_the_field(tmp_path, field, value):
    shutil.copy(BASE / "transformer/config.json", tmp_path)
    was = json.loads((tmp_path / "config.json").read_text())[field]
    edit_json(tmp_path / "config.json", **{field: value})
    fault = f"{tmp_path} .*its {field} is {value}, that of {BASE} is {was}$"
    with pytest.raises(ValueError, match=fault):
        planned(str(tmp_path))


# --- LoRA files -----------------------------------------------------------------------------------

RANKS = {
    "transformer_blocks.0.attn.to_q": 2,
    "transformer_blocks.1.attn.to_out.0": 3,
    "transformer_blocks.3.ff.net.0.proj": 4,
    "time_text_embed.text_embedder.linear_1": 1,
    "proj_out": 2,
}
ALPHA = 5
BLOCK, OUT = "transformer_blocks.0.attn.to_q", "proj_out"


@pytest.fixture(scope="module")
def matrices():
    """{module: (A, B)} for RANKS."""
    made, modules = {}, dict(base_transformer().named_modules())
    generator = torch.Generator().manual_seed(0)
    for name, rank in RANKS.items():
        a = torch.randn(rank, modules[name].in_features, generator=generator)
        b = torch.randn(modules[name].out_features, rank, generator=generator)
        made[name] = (a, b)
    return made


def named(matrices: dict, prefix: str = "", down: str = "lora_A", up: str = "lora_B") -> dict:
    """The tensors of a LoRA file: prefix, module, then down or up."""
    tensors = {}
    for name, (a, b) in matrices.items():
        tensors[f"{prefix}{name}.{down}.weight"] = a
        tensors[f"{prefix}{name}.{up}.weight"] = b
    return tensors


def settings(prefix: str = "", **values) -> str:
    """peft's settings of a LoRA, as text."""
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=list(RANKS), rank_pattern=RANKS)
    values = config.to_dict() | {"target_modules": list(RANKS)} | values
    return json.dumps({f"{prefix}{key}": value for key, value in values.items()})


OVER_RANK = {name: ALPHA / rank for name, rank in RANKS.items()}
# Prefix of the keys, settings, and the scale of each module.
FORMS = {
    "train.py's": ("transformer.", None, dict.fromkeys(RANKS, 1.0)),
    "half precision": ("", None, dict.fromkeys(RANKS, 1.0)),
    "settings": ("transformer.", settings("transformer."), OVER_RANK),
    "rslora": ("", settings(use_rslora=True), {x: ALPHA / math.sqrt(RANKS[x]) for x in RANKS}),
    "alpha pattern": ("", settings(alpha_pattern={BLOCK: 3}), OVER_RANK | {BLOCK: 3 / 2}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_of_a_lora_file_lands_with_its_scale(matrices, tmp_path, form):
    """Merged weight = W + (B A) scale, formed in float32, scale = alpha / r, or alpha / sqrt(r) for
    rslora; all other weights stay as they are. The model in bf16 is that, cast."""
    prefix, inside, scales = FORMS[form]
    if form == "half precision":
        matrices = {name: (a.half(), b.half()) for name, (a, b) in matrices.items()}
    file = write(named(matrices, prefix), tmp_path / "lora.safetensors", inside)
    expected = base_transformer().state_dict()
    for name, (a, b) in matrices.items():
        expected[f"{name}.weight"] += (b.float() @ a.float()) * scales[name]
    for dtype in (torch.float32, torch.bfloat16):
        merged = sample.load_transformer(str(BASE), file, dtype, CPU).state_dict()
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], x.to(dtype)) for name, x in expected.items())


def test_lora_is_an_adapter_of_the_files_exact_matrices_beside_frozen_weights(matrices, tmp_path):
    matrices = {name: x for name, x in matrices.items() if RANKS[name] == 2}
    file = write(named(matrices), tmp_path / "lora.safetensors")
    model = base_transformer().to(torch.bfloat16)
    sample.load_lora(model, file)
    found = {name: x for name, x in model.named_parameters() if x.requires_grad}
    expected = named(matrices, "", "lora_A.default", "lora_B.default")
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == torch.float32 and torch.equal(x, expected[name])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    assert model.active_adapters() == ["default"]


def test_lora_of_peft_is_refused_with_the_way_to_convert_it_which_works(tmp_path):
    config = LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, target_modules=["to_k"])
    model = get_peft_model(base_transformer(), config)
    model.save_pretrained(tmp_path)
    way = ("PeftModel.from_pretrained(transformer, ", "transformer.save_lora_adapter(")
    with raises(ValueError, *way):
        sample.load_lora(base_transformer(), tmp_path / "adapter_model.safetensors")
    transformer = base_transformer()
    PeftModel.from_pretrained(transformer, tmp_path)
    transformer.save_lora_adapter(tmp_path)
    ours = sample.load_transformer(str(BASE), tmp_path / sample.LORA, torch.float32, CPU)
    theirs = model.merge_and_unload().state_dict()
    torch.testing.assert_close(ours.state_dict(), theirs, rtol=0, atol=1e-5)


ROW = torch.ones(2, 128)
# Changed tensors, settings, and what the message names.
REFUSED = {
    "empty": (None, None, ["no LoRA"]),
    "B missing": ({f"{BLOCK}.lora_B.weight": None}, None, [f"{BLOCK}.lora_B.weight is missing"]),
    "A missing": ({f"{OUT}.lora_A.weight": None}, None, [f"{OUT}.lora_A.weight is missing"]),
    "no such block": ({"transformer_blocks.9.attn.to_q.lora_A.weight": ROW}, None, ["blocks.9"]),
    "adapter's name": ({f"{BLOCK}.lora_A.other.weight": ROW}, None, [f"{BLOCK}.lora_A.other"]),
    "bias": ({f"{BLOCK}.lora_B.bias": ROW[0]}, None, ["lora_B.bias"]),
    "kohya's": (
        {f"{BLOCK}.lora_down.weight": ROW}, None,
        ["kohya's", "transformer.MODULE.lora_A.weight", "lora_up times alpha / rank"],
    ),
    "DoRA": ({}, settings(use_dora=True), ["use_dora"]),
    "another start": ({}, settings(init_lora_weights="pissa"), ["init_lora_weights=pissa"]),
    "alpha that is a text": ({}, settings(lora_alpha="5"), []),
    "both prefixes": ({f"transformer.{BLOCK}.lora_A.weight": ROW}, None, []),
    "A too wide": ({f"{BLOCK}.lora_A.weight": torch.ones(2, 256)}, None, [BLOCK, "256"]),
    "rank 0": (
        {f"{OUT}.lora_A.weight": ROW[:0], f"{OUT}.lora_B.weight": torch.ones(16, 0)}, None,
        ["positive"],
    ),
    "no matrix": ({f"{BLOCK}.lora_A.weight": torch.tensor(1.0)}, None, [BLOCK]),
    "settings that are not JSON": ({}, "{", []),
    "torn": ({}, None, []),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_lora_file_of_which_a_tensor_has_no_place_is_refused_by_name(matrices, tmp_path, case):
    edit, inside, words = REFUSED[case]
    tensors = {} if edit is None else named(matrices) | edit
    tensors = {key: x for key, x in tensors.items() if x is not None}
    file = write(tensors, tmp_path / "lora.safetensors", inside)
    if case == "torn":
        os.truncate(file, 5000)
    with raises(ValueError, str(file), *words):
        sample.load_lora(base_transformer(), file)


# --- Encoders and VAE ----------------------------------------------------------------------------


def edited_base(folder: Path, part: str, **changed: torch.Tensor | None) -> str:
    """The base pipeline with changed tensors in one part; None takes one out."""

    def edit(tensors):
        tensors |= changed
        for name in [name for name, x in changed.items() if x is None]:
            del tensors[name]

    edit_weights(copy_base(folder) / part, edit)
    return str(folder)


@pytest.mark.parametrize("value", [None, torch.ones(2, 2), "left over"])
@pytest.mark.parametrize(
    "part, name",
    [
        ("text_encoder_2", "text_projection.weight"),
        ("text_encoder_3", "shared.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("transformer", "proj_out.bias"),
    ],
)
def test_weights_missing_left_over_or_of_another_shape_are_named(tmp_path, part, name, value):
    if isinstance(value, str):
        name, value = "encoder.what.weight", torch.ones(2)
    base = edited_base(tmp_path / "base", part, **{name: value})
    said = name.replace("shared", "(shared|embed_tokens)")  # two names of one tensor
    with pytest.raises(ValueError, match=f"{base}/{part}.*{said}"):
        if part == "transformer":
            sample.load_transformer(base, None, torch.float32, CPU)
        sample.load_pipeline(base, torch.float32, CPU)


def test_text_encoder_files_of_other_sound_forms_are_read(tmp_path):
    """position_ids as in old CLIP files; T5's embedding by its other name, beside a decoder."""
    ids = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    clip = edited_base(tmp_path / "clip", "text_encoder", **ids)
    sample.load_pipeline(clip, torch.float32, CPU)
    stored = load_file(BASE / "text_encoder_3/model.safetensors")["shared.weight"]
    changed = {"shared.weight": None, "encoder.embed_tokens.weight": stored}
    changed["decoder.final_layer_norm.weight"] = torch.ones(64)
    t5 = edited_base(tmp_path / "t5", "text_encoder_3", **changed)
    pipe = sample.load_pipeline(t5, torch.float32, CPU)
    assert torch.equal(pipe.text_encoder_3.shared.weight, stored)


def test_vae_keeps_its_float32_weights_in_bf16():
    pipe = sample.load_pipeline(str(BASE), torch.bfloat16, CPU)
    weights = load_file(BASE / "vae" / WEIGHTS)
    for name, x in pipe.vae.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, weights[name].float())
    assert pipe.text_encoder_3.dtype == torch.bfloat16
