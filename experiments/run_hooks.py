"""Run the recipes of recipes.md's "Trainers with hooks" in the code of those trainers.

    python -m experiments.run_hooks --diffsynth CHECKOUT --musubi CHECKOUT --sd_scripts CHECKOUT \\
        --ai_toolkit CHECKOUT --simpletuner CHECKOUT

Each CHECKOUT, of modelscope/DiffSynth-Studio, kohya-ss/musubi-tuner, kohya-ss/sd-scripts,
ostris/ai-toolkit or bghira/SimpleTuner, may be left out. The trainers' packages are not imported,
as they need a GPU's libraries: the functions from the batch to the loss are taken out of their
files, and the recipe is pasted where the page says. Real are these functions; a small SD3 or Wan
transformer with random weights, and all else that they touch, stand in for the rest. "Off" is the
relative difference of the trainer's own loss from the recipe's at lambda_aux = 0, on the same noise
and levels. Then SOAR runs with the recipe's settings. Prints rows of the page's last table.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import math
import random
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor

import soar
from experiments.run_recipes import HERE, blocks

PAGE = blocks((HERE / "recipes.md").read_text())
BATCH = 2
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


# --- Taking functions out of files ---


def cut(path: Path, *names: str, paste: tuple[str, str] | None = None, **known) -> SimpleNamespace:
    """Functions, classes or methods ("Class.method") of a file, with only these globals known to
    them. paste: (line, block): the block goes above the one place with that line, at its
    indentation."""
    source = path.read_text()
    if paste:
        anchor, block = paste
        lines = [line for line in source.splitlines(keepends=True) if line.strip() == anchor]
        if len(lines) != 1:
            raise ValueError(f"{path} has {len(lines)} lines {anchor!r}, expected 1")
        indent = lines[0][: -len(lines[0].lstrip())]
        source = source.replace(lines[0], textwrap.indent(block, indent) + lines[0])
    made = dict(known)
    tree = ast.parse(source)
    for name in names:
        body = tree.body
        for part in name.split("."):
            (node,) = [x for x in body if getattr(x, "name", None) == part]
            body = node.body
        node.decorator_list = []
        text = textwrap.dedent(ast.get_source_segment(source, node, padded=True))
        exec("from __future__ import annotations\n" + text, made)
    return SimpleNamespace(**{name.split(".")[-1]: made[name.split(".")[-1]] for name in names})


def module(name: str, **names) -> ModuleType:
    """A module of these names that `import` finds."""
    made = ModuleType(name)
    made.__dict__.update(names)
    sys.modules[name] = made
    return made


@contextlib.contextmanager
def blocks_see(z1: Tensor, lambda_aux: float | None):
    """What blocks import from soar.py: draws with the noise z1, and another default lambda_aux."""
    fields = [] if lambda_aux is None else [("lambda_aux", float, lambda_aux)]
    config = dataclasses.make_dataclass("SoarConfig", fields, bases=(soar.SoarConfig,), frozen=True)
    real = soar.SoarConfig, soar.draw
    soar.SoarConfig, soar.draw = config, lambda *x: real[1](*x)._replace(z1=z1.float())
    try:
        exec(PAGE["Trainers with hooks"][0], module("streamed").__dict__)
        yield
    finally:
        soar.SoarConfig, soar.draw = real


# --- Stand-ins ---


def sd3(dtype: torch.dtype) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).to(dtype)  # fmt: skip


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def accelerator(dtype: torch.dtype) -> SimpleNamespace:
    mixed = dtype != torch.float32
    return SimpleNamespace(
        backward=lambda loss: loss.backward(), process_index=0, device=CPU,
        autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=mixed),
    )  # fmt: skip


# --- The trainers. Each returns (noise, trainer's own loss, loss of the recipe), given a model's
# dtype; the latter two are functions without arguments, and the last one returns the model, too ---


def diffsynth(checkout: Path, dtype: torch.dtype) -> tuple[Tensor, Callable, Callable]:
    """FlowMatchSFTLoss, and its FlowMatchScheduler."""
    folder = checkout / "diffsynth" / "diffusion"
    own = cut(folder / "loss.py", "FlowMatchSFTLoss", torch=torch)
    spec = importlib.util.spec_from_file_location("flow_match", folder / "flow_match.py")
    flow_match = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flow_match)
    scheduler = flow_match.FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(1000, training=True)
    model = sd3(dtype)

    def model_fn(dit, latents, timestep, text, input_latents):
        pooled = text.new_ones(len(text), 8)
        call = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return dit(latents, timestep=timestep, return_dict=False, **call)[0]

    pipe = SimpleNamespace(
        scheduler=scheduler, torch_dtype=dtype, device=CPU, in_iteration_models=("dit",), dit=model,
        model_fn=lambda latents, **inputs: model_fn(latents=latents, **inputs),
    )  # fmt: skip
    latents = randn(1, 1, 16, 8, 8).to(dtype)
    text = {"text": randn(2, 1, 5, 8).to(dtype)}
    empty = {"text": randn(3, 1, 5, 8).to(dtype)}
    torch.manual_seed(5)
    torch.randint(0, 1000, (1,))  # the level, which is drawn first
    noise = torch.randn_like(latents)

    def ours():
        names = {}
        exec(PAGE["DiffSynth-Studio"][0], names)
        torch.manual_seed(5)
        return names["soar_sft_loss"](pipe, {"input_latents": latents}, text, empty), model

    def theirs():
        torch.manual_seed(5)
        return own.FlowMatchSFTLoss(pipe, input_latents=latents, **text)

    return noise, theirs, ours


def musubi(checkout: Path, dtype: torch.dtype) -> tuple[Tensor, Callable, Callable]:
    """WanNetworkTrainer's process_batch and all that it calls, in mode shift."""
    folder = checkout / "src" / "musubi_tuner"
    output = dataclasses.make_dataclass("DiTOutput", ["pred", "target"])
    known = {"torch": torch, "math": math, "DiTOutput": output}
    weights = cut(folder / "training" / "timesteps.py", "compute_loss_weighting_for_sd3", **known)
    names = ("process_batch", "compute_loss", "get_noisy_model_input_and_timesteps")
    names = [f"NetworkTrainer.{name}" for name in names]
    base = cut(folder / "training" / "trainer_base.py", *names, **known, **vars(weights))
    names = [f"WanNetworkTrainer.{name}" for name in ("call_dit", "_call_dit")]
    wan = cut(folder / "wan_train_network.py", *names, **known)
    options = {"i2v_training": False, "control_training": False, "high_low_training": False}
    options |= {"config": SimpleNamespace(v2_2=False, patch_size=(1, 2, 2))}
    trainer = type("WanNetworkTrainer", (), vars(base) | vars(wan) | options)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).to(dtype)  # fmt: skip

    def call(x, t, context, clip_fea, seq_len, y):
        text = {"encoder_hidden_states": torch.stack(context), "return_dict": False}
        return list(model(x, timestep=t, **text)[0])

    latents, noise = randn(1, BATCH, 16, 3, 4, 4).to(dtype), randn(4, BATCH, 16, 3, 4, 4).to(dtype)
    batch = {"timesteps": [0.9, 0.2], "t5": list(randn(2, BATCH, 5, 8))}
    args = SimpleNamespace(
        seed=None, weighting_scheme="none", timestep_sampling="shift", discrete_flow_shift=5.0,
        sigmoid_scale=1.0, gradient_checkpointing=False, min_timestep=None, max_timestep=None,
        preserve_distribution_shape=False,
    )  # fmt: skip
    rest = (args, accelerator(dtype), call, None, batch, latents, noise, None, dtype, dtype, None, 0)

    def ours():
        module("musubi_tuner")
        module("musubi_tuner.wan_train_network", WanNetworkTrainer=trainer)
        sys.modules["musubi_tuner"].wan_train_network = sys.modules["musubi_tuner.wan_train_network"]
        with TemporaryDirectory() as work, contextlib.chdir(work):
            save_file({"varlen_t5": randn(3, 5, 8)}, "empty_wan_te.safetensors")
            names = {"__name__": "recipe"}
            exec(PAGE["musubi-tuner"][0], names)
            loss, _ = names["SoarTrainer"]().process_batch(*rest)
        return loss, model

    return noise, lambda: trainer().process_batch(*rest)[0], ours


def sd_scripts(checkout: Path, dtype: torch.dtype) -> tuple[Tensor, Callable, Callable]:
    """Sd3NetworkTrainer's process_batch and all that it calls."""
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    known = {"torch": torch, "math": math, "compute_density_for_timestep_sampling": density}
    names = ("get_noisy_model_input_and_timesteps", "compute_loss_weighting_for_sd3")
    utils = cut(checkout / "library" / "sd3_train_utils.py", *names, **known)
    losses = cut(
        checkout / "library" / "train_util.py", "conditional_loss", "get_huber_threshold_if_needed",
        torch=torch,
    )  # fmt: skip
    strategy = SimpleNamespace(
        concat_encodings=lambda lg, t5, pooled: (torch.cat([lg, t5], 1), pooled)
    )
    strategies = SimpleNamespace(
        TextEncodingStrategy=SimpleNamespace(get_strategy=lambda: strategy)
    )
    import typing

    base = cut(
        checkout / "train_network.py", "NetworkTrainer.process_batch", torch=torch, typing=typing,
        train_util=losses,
    )  # fmt: skip
    names = [f"Sd3NetworkTrainer.{x}" for x in ("get_noise_pred_and_target", "post_process_loss")]
    rest = {"sd3_train_utils": utils, "strategy_base": strategies}
    own = cut(checkout / "sd3_train_network.py", *names, torch=torch, **rest)
    empty = [randn(3, 1, 5, 8), torch.zeros(1, 0, 8), torch.ones(1, 8)]
    options = {"shift_scale_latents": lambda self, args, latents: latents}
    options |= {"sample_prompts_te_outputs": {"": [x.to(dtype) for x in empty]}}
    trainer = type("Sd3NetworkTrainer", (), vars(base) | vars(own) | options)
    model = sd3(dtype)

    def unet(z, t, context, y):
        call = {"encoder_hidden_states": context, "pooled_projections": y}
        return model(z, timestep=t, return_dict=False, **call)[0]

    latents = randn(1, BATCH, 16, 8, 8)
    text = [randn(2, BATCH, 5, 8), torch.zeros(BATCH, 0, 8), torch.ones(BATCH, 8)]
    outputs = [*(x.to(dtype) for x in text), None, None, None]
    batch = {"latents": latents, "text_encoder_outputs_list": outputs}
    batch |= {"loss_weights": torch.tensor([1.0, 3.0])}
    args = SimpleNamespace(
        seed=0, weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0, mode_scale=1.29,
        min_timestep=None, max_timestep=None, training_shift=3.0, gradient_checkpointing=False,
        apply_lg_attn_mask=False, apply_t5_attn_mask=False, loss_type="l2", masked_loss=False,
    )  # fmt: skip
    call = (batch, None, unet, None, None, None, dtype, dtype, accelerator(dtype), args, strategy, None)

    def step(kind):
        torch.manual_seed(5)
        return kind().process_batch(*call, train_text_encoder=False)

    def ours():
        module("sd3_train_network", Sd3NetworkTrainer=trainer)
        module("library", sd3_train_utils=utils, strategy_base=strategies)
        names = {"__name__": "recipe"}
        exec(PAGE["sd-scripts"][0], names)
        return step(names["SoarTrainer"]), model

    torch.manual_seed(5)
    return torch.randn_like(latents), partial(step, trainer), ours


class Embeds:
    """In place of ai-toolkit's PromptEmbeds: what train_single_accumulation does with them."""

    def __init__(self, text_embeds: Tensor):
        self.text_embeds = text_embeds

    def to(self, *args, **kwargs) -> "Embeds":
        return Embeds(self.text_embeds.to(*args, **kwargs))

    def detach(self) -> "Embeds":
        return Embeds(self.text_embeds.detach())


def concat(parts: list[Embeds]) -> Embeds:
    return Embeds(torch.cat([x.text_embeds for x in parts]))


def ai_toolkit(checkout: Path, dtype: torch.dtype) -> tuple[Tensor, Callable, Callable]:
    """SDTrainer's train_single_accumulation, calculate_loss and predict_noise, with a mask and a
    row's weight."""
    file = checkout / "extensions_built_in" / "sd_trainer" / "SDTrainer.py"
    config = cut(checkout / "toolkit" / "config_modules.py", "EMAConfig", "TrainConfig")
    blank = cut(checkout / "toolkit" / "stable_diffusion_model.py", "BlankNetwork", torch=torch)
    kinds = ("CustomAdapter", "IPAdapter", "T2IAdapter", "ClipVisionAdapter", "ReferenceAdapter")
    known = {name: type(name, (), {}) for name in (*kinds, "ControlNetModel")}
    known |= {"torch": torch, "F": torch.nn.functional, "random": random, "math": math}
    known |= {"get_torch_dtype": lambda name: DTYPES[name], "concat_prompt_embeds": concat}
    known |= {"BlankNetwork": blank.BlankNetwork, "print_acc": print}
    names = ("train_single_accumulation", "calculate_loss", "predict_noise", "after_unet_predict")
    names = [f"SDTrainer.{name}" for name in names]
    anchor = "elif self.train_config.loss_type == 'mean_flow':"
    model = sd3(dtype)
    latents, noise = randn(1, BATCH, 16, 8, 8).to(dtype), randn(4, BATCH, 16, 8, 8).to(dtype)
    timesteps = torch.tensor([900.0, 200.0])
    level = (timesteps / 1000).view(-1, 1, 1, 1).to(dtype)
    noisy = (1 - level) * latents + level * noise
    text, empty = (Embeds(randn(seed, rows, 5, 8)) for seed, rows in ((2, BATCH), (3, 1)))

    def predict(latents, conditional_embeddings, timestep, **options):
        embeds = conditional_embeddings.text_embeds
        call = {"encoder_hidden_states": embeds, "pooled_projections": embeds.new_ones(BATCH, 8)}
        return model(latents, timestep=timestep, return_dict=False, **call)[0]

    sd = SimpleNamespace(
        vae=SimpleNamespace(dtype=None), vae_torch_dtype=None, te_torch_dtype=None,
        text_encoder=SimpleNamespace(dtype=None, eval=lambda: None), is_xl=False,
        do_masked_loss=True, encode_control_in_text_embeddings=False, predict_noise=predict,
        encode_prompt=lambda *prompts, **options: text, prediction_type="flow", x0_pred=False,
        condition_noisy_latents=lambda noisy, batch: noisy, is_flow_matching=True,
        scale_loss=lambda loss: loss,
    )  # fmt: skip
    item = SimpleNamespace(is_reg=False, prior_reg=False)
    batch = SimpleNamespace(
        latents=latents, file_items=[item] * BATCH, control_tensor=None, clip_image_tensor=None,
        clip_image_embeds=None, mask_tensor=torch.rand(BATCH, 1, 8, 8).round() + 0.5,
        unconditional_latents=None, extra_values=None, prompt_embeds=None, audio_target=None,
        get_network_weight_list=lambda: [1.0] * BATCH, get_is_reg_list=lambda: [False] * BATCH,
        loss_multiplier_list=[1.0] * BATCH, audio_pred=None, sigmas=None,
    )  # fmt: skip

    class Timer:
        """self.timer: two calls, and a context of each name."""

        start = stop = staticmethod(lambda name: None)

        def __call__(self, name):
            return contextlib.nullcontext()

    def step(loss_type, paste=None):
        methods = cut(file, *names, paste=paste, **known)
        name = next(name for name, x in DTYPES.items() if x == dtype)
        settings = {"dtype": name, "loss_type": loss_type, "noise_scheduler": "flowmatch"}
        options = dict(
            train_config=config.TrainConfig(**settings), accelerator=accelerator(dtype), sd=sd,
            device_torch=CPU, timer=Timer(), adapter=None, assistant_adapter=None, network=None,
            embedding=None, adapter_config=None, decorator=None, dfe=None, do_long_prompts=False,
            do_prior_prediction=False, do_guided_loss=False, is_caching_text_embeddings=False,
            _clip_image_embeds_unconditional=None, unconditional_embeds=empty, snr_gos=None,
            negative_prompt_pool=None, model_config=None, additional_logs={},
            preprocess_batch=lambda batch: batch, before_unet_predict=lambda: None,
            process_general_training_batch=lambda batch: (
                noisy, noise, timesteps, [""] * BATCH, None
            ),
        )  # fmt: skip
        trainer = type("SDTrainer", (), vars(methods))()
        trainer.__dict__.update(options)
        return trainer.train_single_accumulation(batch)

    recipe = (anchor, PAGE["ai-toolkit"][0])
    return noise, partial(step, "mse"), lambda: (step("soar", recipe), model)


def simpletuner(checkout: Path, dtype: torch.dtype) -> tuple[Tensor, Callable, Callable]:
    """Trainer._compute_model_prediction_loss and model_predict, and the model's own loss."""
    import enum

    helpers = checkout / "simpletuner" / "helpers"
    kinds = ("FLOW_MATCHING", "EPSILON", "V_PREDICTION", "SAMPLE")
    prediction = enum.Enum("PredictionTypes", kinds)
    known = {"torch": torch, "F": torch.nn.functional, "PredictionTypes": prediction}
    known |= {"random": random, "logger": None, "compute_snr": None}
    names = ["loss", "get_prediction_target", "flow_matching_target", "get_flow_matching_target"]
    names += ["prediction_to_noiseward_flow", "noiseward_flow_to_prediction"]
    names += ["flow_matching_timesteps_from_sigmas", "flow_matching_target_direction"]
    file = helpers / "models" / "common.py"
    methods = cut(file, *(f"ModelFoundation.{name}" for name in names), **known)
    mixin = cut(file.with_name("xm_mixin.py"), "ExplorativeModelingMixin.loss_with_logs")
    net = sd3(dtype)

    def predict(prepared_batch):
        b = prepared_batch
        text = b["encoder_hidden_states"]
        call = {"encoder_hidden_states": text, "pooled_projections": text.new_ones(BATCH, 8)}
        v = net(b["noisy_latents"], timestep=b["timesteps"], return_dict=False, **call)[0]
        return {"model_prediction": v}

    options = dict(
        PREDICTION_TYPE=prediction.FLOW_MATCHING, config=SimpleNamespace(loss_type="l2"),
        uses_noise_schedule=lambda self: True, noise_schedule=None, diff2flow_bridge=None,
        model_predict=lambda self, prepared_batch: predict(prepared_batch),
        auxiliary_loss=lambda self, prepared_batch, model_output, loss: (loss, None),
    )  # fmt: skip
    model = type("Model", (), vars(methods) | vars(mixin) | options)()
    latents, noise = randn(1, BATCH, 16, 8, 8).to(dtype), randn(4, BATCH, 16, 8, 8).to(dtype)
    sigmas = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1)
    batch = {"latents": latents, "noise": noise, "sigmas": sigmas}
    batch |= {"noisy_latents": ((1 - sigmas) * latents + sigmas * noise).to(dtype)}
    batch |= {"timesteps": 1000 * sigmas.flatten(), "add_text_embeds": None}
    text, empty = (randn(seed, BATCH, 5, 8).to(dtype) for seed in (2, 3))
    batch |= {"encoder_hidden_states": text, "negative_encoder_hidden_states": empty}
    trainer_file = helpers / "training" / "trainer.py"
    anchor = "model_pred = self.model_predict("
    names = [f"Trainer.{name}" for name in ("_compute_model_prediction_loss", "model_predict")]
    options = dict(
        config=SimpleNamespace(
            seed=None, loss_type="l2", disable_accelerator=False, controlnet=False,
            distillation_method=None,
        ),
        accelerator=accelerator(dtype), model=model, _tlora_active=False,
        noise_scheduler=SimpleNamespace(config=SimpleNamespace(prediction_type="flow")),
    )  # fmt: skip
    known |= {"apply_scheduled_sampling_rollout": lambda model, batch, *rest: batch}
    known |= {"mark_cudagraph_step_begin": lambda config: None}

    def step(paste=None):
        trainer = type("Trainer", (), vars(cut(trainer_file, *names, paste=paste, **known)))()
        trainer.__dict__.update(options)
        return trainer._compute_model_prediction_loss(dict(batch))[0]

    recipe = (anchor, PAGE["SimpleTuner"][0])
    return noise, step, lambda: (step(recipe), net)


TRAINERS = {  # option: heading of the page, function, lines changed beside the block, driver
    "diffsynth": ("DiffSynth-Studio", "FlowMatchSFTLoss", 1, diffsynth),
    "musubi": ("musubi-tuner", "process_batch", 0, musubi),
    "ai_toolkit": ("ai-toolkit", "train_single_accumulation", 0, ai_toolkit),
    "simpletuner": ("SimpleTuner", "_compute_model_prediction_loss", 1, simpletuner),
    "sd_scripts": ("sd-scripts", "process_batch", 0, sd_scripts),
}


def measure(make: Callable, checkout: Path) -> tuple[dict[str, float], bool]:
    """Off by dtype; whether SOAR ran: seven terms, a finite loss, gradients in the model."""
    off = {}
    for name, dtype in DTYPES.items():
        noise, theirs, ours = make(checkout, dtype)
        with blocks_see(noise, 0.0):
            left, (right, _) = theirs(), ours()
        off[name] = abs(right.item() / left.item() - 1)
    noise, theirs, ours = make(checkout, torch.float32)
    with blocks_see(noise, None):
        loss, model = ours()
        if loss.requires_grad:
            loss.backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    ran = bool(loss.isfinite()) and any(bool(x.any()) for x in grads)
    return off, ran and loss.item() != theirs().item()


def main() -> None:
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in TRAINERS:
        parser.add_argument(f"--{name}", type=Path)
    args = vars(parser.parse_args())
    for name, (heading, function, changed, make) in TRAINERS.items():
        if args[name] is None:
            continue
        off, ran = measure(make, args[name])
        added = sum(block.count("\n") for block in PAGE[heading]) + changed
        cells = [f"{heading}, `{function}`", f"{added}, {changed}"]
        cells += [f"{x:.0e}" for x in off.values()] + ["yes" if ran else "no"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
