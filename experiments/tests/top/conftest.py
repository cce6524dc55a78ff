"""Fixtures of the tests of sample.py."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict

import sample
from experiments.shapes.draw import MAX_SEQUENCE_LENGTH
from experiments.tests.top.sampling import base_transformer


@pytest.fixture
def no_model(monkeypatch):
    """What is refused here is refused before a model is loaded."""
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as train.py writes it, whose newest checkpoint has other weights than the base's; a
    LoRA of the base."""
    folder = tmp_path_factory.mktemp("trained")
    model = base_transformer()
    for step in (5, 7):
        with torch.no_grad():
            model.proj_out.weight.mul_(1.1)
        checkpoint = folder / f"run/checkpoint-{step:06d}"
        model.save_pretrained(checkpoint / "transformer")
        state = {"step": step, "settings": {"max_sequence_length": MAX_SEQUENCE_LENGTH}}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    model = base_transformer()
    targets = ["to_q", "proj_out"]
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    model.add_adapter(config)
    StableDiffusion3Pipeline.save_lora_weights(
        folder / "lora",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder
