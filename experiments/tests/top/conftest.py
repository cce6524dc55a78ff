"""Fixtures of the tests of sample.py and train.py."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict

import sample
import train
from experiments.shapes.draw import MAX_SEQUENCE_LENGTH
from experiments.tests.common import copy_pairs, train_args
from experiments.tests.top.sampling import base_transformer
from experiments.tests.top.training import SHORT, THREE, ends, run


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


@pytest.fixture(autouse=True)
def as_before():
    """A run in this process leaves no process group, and the signals as they were."""
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    """Seven pairs: with batches of 4, 3 or 2 the last one is smaller."""
    return copy_pairs(range(100, 107), tmp_path_factory.mktemp("held out") / "pairs.parquet")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("a photo of a red circle\na photo of a blue square\na photo of two stars\n")
    return file


@pytest.fixture(scope="session")
def runs(tmp_path_factory, prompts, held_out) -> Path:
    """The same five steps at global batch 4: 1 x 4, also without validation and with a line every
    two steps; 1 x 2 x 2 accumulated; 3 steps of 2 x 2 by two ranks, gone on with 1 x 4."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"max_train_steps": 5, "checkpointing_steps": 3}
    drawn = {"validation_prompts": prompts, "validation_steps": 3, "held_out": held_out}
    two = train_args(output_dir=folder / "2x2", **SHORT | drawn | THREE)
    ended, said = ends(2, lambda: train.main(two), folder / "log")
    assert ended == [0, 0], said
    run(folder / "1x4", train_batch_size=4, **flags, **drawn)
    run(folder / "1x4, plain", train_batch_size=4, **flags | {"logging_steps": 2})
    run(folder / "1x2x2", train_batch_size=2, gradient_accumulation_steps=2, **flags)
    shutil.copytree(folder / "2x2", folder / "2x2, 1x4", symlinks=True)
    run(folder / "2x2, 1x4", train_batch_size=4, **flags)
    return folder
