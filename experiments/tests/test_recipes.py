"""Every code block of the README, evaluation.md and recipes.md runs, on small models of diffusers' classes.

    python -m experiments.tests.test_recipes        # writes the tables of recipes.md anew

A block is executed as it stands, among names that its trainer would have at that place. That trainer's own loss is
written here as the trainer has it, and that of the block with lambda_aux = 0 must equal it, with all gradients; the
block's rollout must be the first step of diffusers' pipeline.
"""

import dataclasses
import importlib.util
import inspect
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import soar
import train
from experiments import check_velocity as check_velocity_module
from experiments.check_velocity import check_velocity
from experiments.shapes import DATA, MAX_SEQUENCE_LENGTH, read_pairs
from experiments.tests.common import ROOT
from sample import encode_images, encode_prompts, load_pipeline, load_transformer

RECIPES = ROOT / "experiments" / "recipes.md"
BATCH = 2


def blocks(path: Path, *languages: str) -> dict[str, str]:
    """The code blocks of a file, by the heading they stand under, numbered from the second on."""
    found, heading = {}, ""
    for title, language, text in re.findall(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S):
        heading = title or heading
        if language in languages:
            number = sum(name.split(" #")[0] == f"{path.name}: {heading}" for name in found) + 1
            found[f"{path.name}: {heading}" + f" #{number}" * (number > 1)] = text
    return found


PAGES = (ROOT / "README.md", RECIPES, RECIPES.with_name("evaluation.md"))
PYTHON = {name: text for page in PAGES for name, text in blocks(page, "python", "py").items()}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def per_sample(sigma, like):
    return sigma.view(-1, *[1] * (like.ndim - 1))


# --- The trainers: names at the place where the loss is computed, their own loss, their pipeline ----------------------


class Trainer:
    """The names a block may use, with a small random model. own_loss(names, draws, sigma): the trainer's loss, from
    the block's random numbers. first_step(z1): diffusers' pipeline from z1 to its second noise level."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = self.build()
        for parameter in self.model.parameters():  # a fresh model has zeros here, which would hide mistakes
            if parameter.dim() < 2:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.names = {
            "math": math, "torch": torch, "transformer": self.model, "generator": rng(3), "weight_dtype": torch.float32,
            "accelerator": SimpleNamespace(backward=lambda loss: loss.backward()),
        } | self.given()  # fmt: skip


class SD3(Trainer):
    precondition = 0

    def build(self):
        return SD3Transformer2DModel(
            sample_size=8, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        )  # fmt: skip

    def given(self):
        cond, uncond = ([randn(i, BATCH, 5, 8), randn(i + 1, BATCH, 8)] for i in (10, 12))
        self.z0, self.scheduler = randn(1, BATCH, 16, 8, 8), FlowMatchEulerDiscreteScheduler(shift=3.0)
        keys = ("encoder_hidden_states", "pooled_projections")
        return {
            "model_input": self.z0, "noise_scheduler_copy": self.scheduler,
            "args": SimpleNamespace(precondition_outputs=self.precondition),
            "prompt_embeds": cond[0], "pooled_prompt_embeds": cond[1],
            "empty_embeds": uncond[0], "empty_pooled_embeds": uncond[1],
            # the README's blocks have these
            "device": "cpu", "seed": 0, "rank": 0,
            "z0": self.z0, "cond": dict(zip(keys, cond)), "uncond": dict(zip(keys, uncond)),
        }  # fmt: skip

    def own_loss(self, names, draws, sigma):
        """diffusers' train_dreambooth_sd3.py, at the scheduler's timestep that is nearest to sigma."""
        model_input, noise, scheduler = names["model_input"], draws.z1, self.scheduler
        indices = (scheduler.sigmas[None] - sigma[:, None]).abs().argmin(1)
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].flatten().view(-1, 1, 1, 1)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        model_pred = self.model(
            hidden_states=noisy_model_input,
            timestep=timesteps,
            encoder_hidden_states=names["prompt_embeds"],
            pooled_projections=names["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        if self.precondition:
            model_pred = model_pred * (-sigmas) + noisy_model_input
        target = model_input if self.precondition else noise - model_input
        loss = torch.mean(((model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1)
        return loss.mean()

    def first_step(self, z1):
        n = self.names
        pipe = StableDiffusion3Pipeline(self.model, self.scheduler, *[None] * 7)
        return pipeline_step(
            pipe, z1, prompt_embeds=n["prompt_embeds"], pooled_prompt_embeds=n["pooled_prompt_embeds"],
            negative_prompt_embeds=n["empty_embeds"], negative_pooled_prompt_embeds=n["empty_pooled_embeds"],
            guidance_scale=4.5, height=64, width=64,
        )  # fmt: skip


class PreconditionedSD3(SD3):
    precondition = 1


class Flux(Trainer):
    def build(self):
        return FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def given(self):
        self.latents = randn(1, BATCH, 16, 8, 8)
        self.z0 = FluxPipeline._pack_latents(self.latents, *self.latents.shape).float()  # the block's comment
        return {
            "model_input": self.latents, "z0": self.z0, "mu": calculate_shift(16),
            "args": SimpleNamespace(guidance_scale=1.0), "text_ids": torch.zeros(5, 3),
            "latent_image_ids": FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, "cpu", torch.float32),
            "prompt_embeds": randn(10, BATCH, 5, 8), "pooled_prompt_embeds": randn(11, BATCH, 8),
        }  # fmt: skip

    def own_loss(self, names, draws, sigma):
        """diffusers' train_dreambooth_flux.py."""
        model_input, sigmas, timesteps = self.latents, sigma.view(-1, 1, 1, 1), 1000 * sigma
        noise = FluxPipeline._unpack_latents(draws.z1, height=64, width=64, vae_scale_factor=8)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        packed_noisy_model_input = FluxPipeline._pack_latents(noisy_model_input, *model_input.shape)
        guidance = torch.tensor([names["args"].guidance_scale]).expand(model_input.shape[0])
        model_pred = self.model(
            hidden_states=packed_noisy_model_input,
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=names["pooled_prompt_embeds"],
            encoder_hidden_states=names["prompt_embeds"],
            txt_ids=names["text_ids"],
            img_ids=names["latent_image_ids"],
            return_dict=False,
        )[0]
        model_pred = FluxPipeline._unpack_latents(model_pred, height=64, width=64, vae_scale_factor=8)
        target = noise - model_input
        loss = torch.mean(((model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1)
        return loss.mean()

    def first_step(self, z1):
        n = self.names
        pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), *[None] * 5, self.model)
        return pipeline_step(
            pipe, z1, prompt_embeds=n["prompt_embeds"], pooled_prompt_embeds=n["pooled_prompt_embeds"],
            guidance_scale=3.5, height=64, width=64,
        )  # fmt: skip


class Qwen(Trainer):
    def build(self):
        return QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def given(self):
        self.z0, mask = randn(1, BATCH, 16, 64), torch.ones(BATCH, 5, dtype=torch.bool)
        mask[0, 3:] = False
        return {
            "z0": self.z0, "mu": calculate_shift(16), "true_cfg_scale": 4.0, "img_shapes": [[(1, 4, 4)]] * BATCH,
            "prompt_embeds": randn(10, BATCH, 5, 8), "prompt_embeds_mask": mask,
            "negative_embeds": randn(11, BATCH, 5, 8), "negative_embeds_mask": mask.flip(0),
        }  # fmt: skip

    def own_loss(self, names, draws, sigma):
        """As diffusers' for Flux, on packed latents."""
        sigmas = sigma.view(-1, 1, 1)
        model_pred = self.model(
            hidden_states=(1.0 - sigmas) * self.z0 + sigmas * draws.z1,
            encoder_hidden_states=names["prompt_embeds"],
            encoder_hidden_states_mask=names["prompt_embeds_mask"],
            timestep=1000 * sigma / 1000,
            img_shapes=names["img_shapes"],
            return_dict=False,
        )[0]
        return F.mse_loss(model_pred, draws.z1 - self.z0)

    def first_step(self, z1):
        n = self.names
        pipe = QwenImagePipeline(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, self.model
        )
        return pipeline_step(
            pipe, z1, prompt_embeds=n["prompt_embeds"], prompt_embeds_mask=n["prompt_embeds_mask"],
            negative_prompt_embeds=n["negative_embeds"], negative_prompt_embeds_mask=n["negative_embeds_mask"],
            true_cfg_scale=4.0, height=64, width=64,
        )  # fmt: skip


class Wan(Trainer):
    def build(self):
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1,
            rope_max_seq_len=32,
        )  # fmt: skip

    def given(self):
        defaults = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
        config = SimpleNamespace(**{key: defaults[key].default for key in ("latents_mean", "latents_std")})
        mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        self.z0, self.scheduler = randn(1, BATCH, 16, 3, 4, 4), FlowMatchEulerDiscreteScheduler(shift=5.0)
        return {
            "latents": self.z0 * std + mean, "vae": SimpleNamespace(config=config), "flow_shift": 5.0,
            "prompt_embeds": randn(10, BATCH, 5, 8), "negative_embeds": randn(11, BATCH, 5, 8),
        }  # fmt: skip

    def own_loss(self, names, draws, sigma):
        """A plain flow-matching loop: noisy latents, timesteps up to 1000, noise - latents."""
        t = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - t) * self.z0 + t * draws.z1
        pred = self.model(noisy, timestep=sigma * 1000, encoder_hidden_states=names["prompt_embeds"]).sample
        return F.mse_loss(pred, draws.z1 - self.z0)

    def first_step(self, z1):
        pipe = WanPipeline(None, None, None, self.scheduler, self.model)
        return pipeline_step(
            pipe, z1, prompt_embeds=self.names["prompt_embeds"], negative_prompt_embeds=self.names["negative_embeds"],
            guidance_scale=5.0, height=32, width=32, num_frames=9,
        )  # fmt: skip


class ZImage(Trainer):
    def build(self):
        return ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        )  # fmt: skip

    def given(self):
        self.z0, self.scheduler = randn(1, BATCH, 16, 8, 8), FlowMatchEulerDiscreteScheduler(shift=3.0)
        return {
            "z0": self.z0, "scheduler": self.scheduler, "guidance_scale": 5.0,
            "prompt_embeds": [randn(10, 5, 8), randn(11, 3, 8)],
            "negative_embeds": [randn(12, 4, 8), randn(13, 2, 8)],
        }  # fmt: skip

    def own_loss(self, names, draws, sigma):
        """A flow-matching loop in Z-Image's own time and sign."""
        t = per_sample(1 - sigma, self.z0)
        x_t, target = (1 - t) * draws.z1 + t * self.z0, self.z0 - draws.z1
        pred = self.model([x.unsqueeze(1) for x in x_t], 1 - sigma, names["prompt_embeds"]).sample
        return F.mse_loss(torch.stack([x.squeeze(1) for x in pred]), target)

    def first_step(self, z1):
        n, pipe = self.names, ZImagePipeline(self.scheduler, None, None, None, self.model)
        return pipeline_step(
            pipe, z1, prompt_embeds=n["prompt_embeds"], negative_prompt_embeds=n["negative_embeds"],
            guidance_scale=5.0, height=64, width=64,
        )  # fmt: skip


class Generic(SD3):
    """model(z, time, cond), time up to 1, with the names z0, cond, uncond."""

    first_step = None

    def given(self):
        def model(z, time, cond):
            return self.model(z, timestep=1000 * time, return_dict=False, **cond)[0]

        return super().given() | {"model": model}


class ReversedTime(Generic):
    def own_loss(self, names, draws, sigma):
        """rectified-flow-pytorch and flow_matching: x_t from noise at t = 0 to data at t = 1, and dx_t / dt."""
        x_0, x_1, t = draws.z1, self.z0, 1 - sigma
        x_t, dx_t = (1 - per_sample(t, x_1)) * x_0 + per_sample(t, x_1) * x_1, x_1 - x_0
        return torch.pow(names["model"](x_t, t, names["cond"]) - dx_t, 2).mean()


class Noise(Generic):
    def own_loss(self, names, draws, sigma):
        z = (1 - per_sample(sigma, self.z0)) * self.z0 + per_sample(sigma, self.z0) * draws.z1
        return F.mse_loss(names["model"](z, sigma, names["cond"]), draws.z1)


class CleanData(Generic):
    def own_loss(self, names, draws, sigma):
        z = (1 - per_sample(sigma, self.z0)) * self.z0 + per_sample(sigma, self.z0) * draws.z1
        return F.mse_loss(names["model"](z, sigma, names["cond"]), self.z0)


class KnownRegion(Generic):
    def given(self):
        known = torch.zeros(BATCH, 1, 8, 8, dtype=torch.bool)
        known[0, :, :6], known[1, :, :, :3] = True, True
        return super().given() | {"known": known}

    def own_loss(self, names, draws, sigma):
        """The mean over each sample's free elements of the error at noised free and clean known elements."""
        s, total = per_sample(sigma, self.z0), 0.0
        z = torch.where(names["known"], self.z0, (1 - s) * self.z0 + s * draws.z1)
        pred = names["model"](z, sigma, names["cond"])
        for b in range(BATCH):
            free = ~names["known"][b].expand(16, -1, -1)
            total += F.mse_loss(pred[b][free], (draws.z1 - self.z0)[b][free]) / BATCH
        return total


def pipeline_step(pipe, z1, **call):
    """Its latents and noise level after one of 40 steps."""

    def stop(pipe, step, timestep, latents):
        pipe._interrupt = True
        return latents

    options = {"num_inference_steps": 40, "latents": z1, "output_type": "latent", "callback_on_step_end": stop}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipe(**call, **options, return_dict=False)[0]
    return out, pipe.scheduler.sigmas[1].item()


TRAINERS = {  # the block: the trainers it is run in
    "README.md: The method": [SD3],
    "recipes.md: Stable Diffusion 3 and 3.5": [SD3, PreconditionedSD3],
    "recipes.md: Flux.1-dev": [Flux],
    "recipes.md: Qwen-Image": [Qwen],
    "recipes.md: Wan video": [Wan],
    "recipes.md: Time that runs the other way": [ReversedTime],
    "recipes.md: Time that runs the other way #2": [ZImage],
    "recipes.md: A model that predicts noise or clean data": [Noise],
    "recipes.md: A model that predicts noise or clean data #2": [CleanData],
    "recipes.md: Known regions": [KnownRegion],
}
DIFFUSERS = "evaluation.md: From a checkpoint into diffusers"
OTHERS = {DIFFUSERS, "recipes.md: SOAR in other trainers", "recipes.md: The shift"}  # with own tests
CASES = [pytest.param(block, cls, id=f"{block}, {cls.__name__}") for block, x in TRAINERS.items() for cls in x]


def run_block(text, trainer, monkeypatch, change=lambda draws: draws, **fields):
    """Executes a block, with other defaults of SoarConfig and with its draws changed; returns the arguments that it
    gave soar_terms, (velocity, z0, draws, cond, uncond, config), the terms, and the block's names."""
    arguments, terms, soar_terms, draw = [], [], soar.soar_terms, soar.draw
    fields = [(name, type(value), value) for name, value in fields.items()]
    config = dataclasses.make_dataclass("SoarConfig", fields, bases=(soar.SoarConfig,), frozen=True)

    def recorded_terms(*args, **kwargs):
        arguments.extend(args)
        for term in soar_terms(*args, **kwargs):
            terms.append(term)
            yield term

    names = dict(trainer.names, optimizer=SimpleNamespace(step=lambda: None, zero_grad=lambda: None))
    names["generator"].manual_seed(3)
    trainer.model.zero_grad()
    recorded = {"SoarConfig": config, "soar_terms": recorded_terms, "draw": lambda *args: change(draw(*args))}
    with monkeypatch.context() as patch:
        for name, value in recorded.items():
            patch.setattr(soar, name, value)
        exec(compile(text, "block", "exec"), names)
    return arguments, terms, names


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def on_the_grid(draws):
    """t at multiples of 1/1000, where diffusers' schedulers have their levels: noisy and clean ones."""
    return draws._replace(t=torch.tensor([0.99, 0.05]))


def sft_of(block, text, cls, monkeypatch):
    """Largest relative differences of loss and gradients between a block with lambda_aux = 0 and its trainer's loss."""
    trainer = cls()
    (_, _, draws, _, _, config), terms, names = run_block(text, trainer, monkeypatch, on_the_grid, lambda_aux=0.0)
    assert len(terms) == 1
    ours, loss = gradients(trainer.model), terms[0].loss
    trainer.model.zero_grad()
    own = trainer.own_loss(names, draws, soar.sigma_from_t(draws.t, config.shift))
    own.backward()
    theirs = gradients(trainer.model)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    scale = max(x.abs().max() for x in theirs.values())
    return abs(loss / own - 1).item(), (max((ours[key] - theirs[key]).abs().max() for key in ours) / scale).item()


# --- The blocks -------------------------------------------------------------------------------------------------------


def test_every_python_block_is_run_and_recipes_have_5_to_15_lines():
    assert set(PYTHON) == set(TRAINERS) | OTHERS, "give each new block a trainer in TRAINERS, or a test of its own"
    for name, text in PYTHON.items():
        lines = [line for line in text.splitlines() if line.strip()]
        assert name.startswith("README") or 5 <= len(lines) <= 15, (name, len(lines))
        assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("block, cls", CASES)
def test_block_is_its_trainers_own_loss_when_lambda_is_zero(block, cls, monkeypatch):
    loss, grads = sft_of(block, PYTHON[block], cls, monkeypatch)
    assert loss < 1e-5 and grads < 1e-4


MISTAKES = {  # the block, what is changed in it: the loss above must notice
    "sd3, time": ("recipes.md: Stable Diffusion 3 and 3.5", "1000 * sigma", "sigma"),
    "sd3, pooled": ("recipes.md: Stable Diffusion 3 and 3.5", ": pooled_prompt_embeds", ": empty_pooled_embeds"),
    "flux, time": ("recipes.md: Flux.1-dev", "timestep=sigma", "timestep=1000 * sigma"),
    "flux, guidance": ("recipes.md: Flux.1-dev", "args.guidance_scale", "3.5"),
    "qwen, mask": ("recipes.md: Qwen-Image", '"encoder_hidden_states_mask": prompt_embeds_mask', ""),
    "wan, mean": ("recipes.md: Wan video", "latents.float() - mean.to(latents.device)", "latents"),
    "reversed, sign": ("recipes.md: Time that runs the other way", "-model", "model"),
    "z-image, time": ("recipes.md: Time that runs the other way #2", "1 - sigma", "sigma"),
    "noise, weighting": ("recipes.md: A model that predicts noise or clean data", "e-3) ** 2", "e-3)"),
    "clean, sign": ("recipes.md: A model that predicts noise or clean data #2", "z - model", "z + model"),
    "known, input": ("recipes.md: Known regions", "torch.where(known, z0, z)", "z"),
    "known, normalisation": ("recipes.md: Known regions", "1 / free", "torch.ones_like(free)"),
    "known, target": ("recipes.md: Known regions", "correction_target(z, z0, sigma)", "torch.zeros_like(z)"),
}


@pytest.mark.parametrize("block, old, new", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_block_is_noticed(block, old, new, monkeypatch):
    assert PYTHON[block].count(old) == 1
    loss, grads = sft_of(block, PYTHON[block].replace(old, new), TRAINERS[block][-1], monkeypatch)
    assert max(loss, grads) > 1e-3


@pytest.mark.parametrize("block, cls", CASES)
def test_block_takes_a_soar_step_with_finite_gradients(block, cls, monkeypatch):
    trainer, calls = cls(), []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _, terms, _ = run_block(PYTHON[block], trainer, monkeypatch)
    rollout = 2 if cls is Qwen else 1
    assert calls == [True] + [False] * rollout + [True] * 6 and len(terms) == 7
    assert all(term.error.min() > 0 for term in terms)
    grads = list(gradients(trainer.model).values())
    assert all(x.isfinite().all() for x in grads)
    assert sum(bool(x.any()) for x in grads) > 0.8 * len(grads)  # the last block makes text nobody reads


def rollout_of(block, text, cls, monkeypatch):
    """Velocities of a block's rollout from pure noise, of the pipeline's first step, and of its unguided model."""
    trainer, states = cls(), []
    z1 = torch.randn(trainer.z0.shape, generator=rng(5))
    change = lambda d: d._replace(z1=z1, t=torch.ones(BATCH), u=torch.zeros_like(d.u))  # noqa: E731
    (velocity, *args, config), _, _ = run_block(text, trainer, monkeypatch, change, num_aux_points=1)

    def recorded(z, sigma, cond):
        states.append(z)
        return velocity(z, sigma, cond)

    list(soar.soar_terms(recorded, *args, config))
    sigma1 = soar.sigma_from_t(1 - 1 / config.num_sampling_steps, config.shift)
    latents, sigma1_pipeline = trainer.first_step(z1)
    with torch.no_grad():
        plain = velocity(z1, torch.ones(BATCH), args[2])
    # u = 0: the last state is where the rollout ended.
    return (states[-1] - z1) / (sigma1 - 1), (latents - z1) / (sigma1_pipeline - 1), plain


PIPELINES = (SD3, Flux, Qwen, Wan, ZImage)


@pytest.mark.parametrize("block, cls", [case for case in CASES if case.values[1] in PIPELINES])
def test_rollout_is_the_first_step_of_the_pipeline(block, cls, monkeypatch):
    ours, pipeline, plain = rollout_of(block, PYTHON[block], cls, monkeypatch)
    torch.testing.assert_close(ours, pipeline, rtol=1e-4, atol=1e-4)
    assert (pipeline - plain).abs().max() > 0.05  # guidance is more than the tolerance


ROLLOUT_MISTAKES = {  # the block, what is changed in it: the test above must notice
    "sd3, no uncond": ("recipes.md: Stable Diffusion 3 and 3.5", "cond, uncond, config, w", "cond, None, config, w"),
    "flux, guidance": ("recipes.md: Flux.1-dev", "3.5,", "1.5,"),
    "flux, w": ("recipes.md: Flux.1-dev", "guidance_scale=0.0", "guidance_scale=1.0"),
    "qwen, norm": ("recipes.md: Qwen-Image", " * (v.norm(dim=-1, keepdim=True) / ", " # "),
    "wan, sign": ("recipes.md: Wan video", "return transformer", "return -transformer"),
    "z-image, w": ("recipes.md: Time that runs the other way #2", "1 + guidance_scale", "guidance_scale"),
}


@pytest.mark.parametrize("block, old, new", ROLLOUT_MISTAKES.values(), ids=ROLLOUT_MISTAKES)
def test_a_mistake_in_a_rollout_is_noticed(block, old, new, monkeypatch):
    assert PYTHON[block].count(old) == 1
    ours, pipeline, _ = rollout_of(block, PYTHON[block].replace(old, new), TRAINERS[block][0], monkeypatch)
    assert (ours - pipeline).abs().max() > 0.01


@pytest.mark.parametrize("sde_type", soar.SDE_TYPES)
def test_known_region_is_clean_in_every_call_and_adds_nothing_to_the_loss(sde_type, monkeypatch):
    block, trainer, calls = "recipes.md: Known regions", KnownRegion(), []
    model, known, z0 = trainer.names["model"], trainer.names["known"].expand(BATCH, 16, 8, 8), trainer.z0

    def recorded(z, sigma, cond):
        assert torch.equal(z[known], z0[known])
        calls.append((z, sigma, torch.is_grad_enabled()))
        return model(z, sigma, cond)

    trainer.names["model"] = recorded
    settings = {"num_rollout_paths": 3, "num_aux_points": 2, "sde_type": sde_type}
    (_, _, draws, _, _, config), terms, names = run_block(PYTHON[block], trainer, monkeypatch, **settings)
    trained = [call[:2] for call in calls if call[2]]
    assert len(calls) == 8 and len(trained) == len(terms) == 7
    assert (draws.t > config.t_min + 1 / 40).all()  # every point counts
    total = 0.0
    ours = gradients(trainer.model)
    for i, ((z, sigma), term) in enumerate(zip(trained, terms)):
        v = model(z, sigma, names["cond"])
        target = (draws.z1 - z0) if i == 0 else (z - z0) / per_sample(sigma, z0)
        errors = torch.stack([F.mse_loss(v[b][~known[b]], target[b][~known[b]]) for b in range(BATCH)])
        torch.testing.assert_close(term.error / names["free"], errors.detach(), rtol=1e-4, atol=1e-6)
        total += errors.sum() / (7 * BATCH)
    torch.testing.assert_close(sum(term.loss for term in terms), total, rtol=1e-4, atol=1e-6)
    trainer.model.zero_grad()
    total.backward()
    for name, x in gradients(trainer.model).items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-5)


def test_known_regions_other_weighting_is_the_mean_over_the_batchs_free_elements(monkeypatch):
    block, trainer = "recipes.md: Known regions", KnownRegion()
    (weighting,) = re.findall(r"`weighting=(lambda sigma: \(1 / free.*?)`", RECIPES.read_text())
    text = PYTHON[block].replace("lambda sigma: 1 / free", weighting)
    assert text != PYTHON[block]
    (_, _, draws, *_, config), (term,), names = run_block(text, trainer, monkeypatch, lambda_aux=0.0)
    s = per_sample(soar.sigma_from_t(draws.t, config.shift), trainer.z0)
    known = names["known"].expand_as(trainer.z0)
    z = torch.where(known, trainer.z0, (1 - s) * trainer.z0 + s * draws.z1)
    pred = names["model"](z, s.flatten(), names["cond"])
    torch.testing.assert_close(term.loss, F.mse_loss(pred[~known], (draws.z1 - trainer.z0)[~known]))


def test_noise_prediction_is_bounded_up_to_pure_noise(monkeypatch):
    """Above sigma = 0.999 the term is the noise's error but for (1e-3 - (1 - sigma)) times the target."""
    change = lambda d: d._replace(t=torch.tensor([1.0, 0.9999]))  # noqa: E731
    trainer = Noise()
    text = PYTHON["recipes.md: A model that predicts noise or clean data"]
    args, (term,), names = run_block(text, trainer, monkeypatch, change, lambda_aux=0.0)
    draws, s = args[2], per_sample(term.sigma, trainer.z0)
    noise = names["model"]((1 - s) * trainer.z0 + s * draws.z1, term.sigma, names["cond"])
    shift = (1e-3 - (1 - s)) * (draws.z1 - trainer.z0)
    torch.testing.assert_close(term.loss, F.mse_loss(noise - shift, draws.z1), rtol=1e-4, atol=0)
    assert shift.abs().max() <= 1e-3 * (draws.z1 - trainer.z0).abs().max() * 1.001


def test_what_recipes_say_of_variance_preserving_levels_and_the_clean_end():
    sd15 = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[-1]
    a, b = sd15.sqrt(), (1 - sd15).sqrt()
    (last,) = re.findall(r"SD 1.5's levels end at sigma = ([\d.]+)", RECIPES.read_text())
    assert float(last) == pytest.approx((b / (a + b)).item(), abs=5e-4)
    (clean,) = re.findall(r"`sigma_from_t\(t_min, shift\)`,\s+([\d.]+) by default", RECIPES.read_text())
    assert float(clean) == pytest.approx(soar.sigma_from_t(soar.SoarConfig().t_min), rel=5e-3)


# --- The shift --------------------------------------------------------------------------------------------------------

FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0}
QWEN = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
SCHEDULERS = {  # the published scheduler configs, the number of tokens
    "Stable Diffusion 3, any size": ({"shift": 3.0}, None),
    "Flux.1-dev, 512 x 512": (FLUX, 1024),
    "Flux.1-dev, 1024 x 1024": (FLUX, 4096),
    "Qwen-Image, 1328 x 1328": (QWEN | {"shift_terminal": 0.02}, 6889),
    "Qwen-Image without shift_terminal": (QWEN, 6889),
}


def run_shift(config, tokens, sigma=None):
    """The shift block's names, for a scheduler of this config."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    names = {"math": math, "pipe": SimpleNamespace(scheduler=scheduler), "num_tokens": tokens or 1, "generator": rng()}
    names |= {"z0": torch.zeros(3, 2), "trainer_sigma": torch.tensor([0.1, 0.5, 1.0]) if sigma is None else sigma}
    exec(PYTHON["recipes.md: The shift"], names)
    return names


def pipeline_sigmas(names):
    """The 40 levels that the pipeline of this scheduler steps through, without the final 0."""
    scheduler = names["pipe"].scheduler
    given = {"sigmas": np.linspace(1.0, 1 / 40, 40), "mu": names["mu"]} if scheduler.config.use_dynamic_shifting else {}
    retrieve_timesteps(scheduler, 40, "cpu", **given)
    return scheduler.sigmas[:-1]


def shift_table() -> str:
    rows = ["| scheduler | shift | largest difference |", "| --- | --- | --- |"]
    for name, (config, tokens) in SCHEDULERS.items():
        names = run_shift(config, tokens)
        ours = soar.sigma_from_t(1 - torch.arange(40) / 40, names["config"].shift)
        difference = (pipeline_sigmas(names) - ours).abs().max().item()
        rows.append(f"| {name} | {names['config'].shift:.3f} | {difference:.3f} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_shift_gives_the_pipelines_noise_levels(name):
    config, tokens = SCHEDULERS[name]
    names = run_shift(config, tokens)
    shift, scheduler = names["config"].shift, names["pipe"].scheduler
    theirs, t = pipeline_sigmas(names), 1 - torch.arange(40, dtype=torch.float64) / 40
    if tokens is None:  # its own spacing
        t = torch.linspace(1, scheduler.sigma_min, 40, dtype=torch.float64)
    ours = soar.sigma_from_t(t, shift)
    if config.get("shift_terminal"):  # its stretch, of ours
        ours = 1 - (1 - ours) * (1 - 0.02) / (1 - ours[-1])
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-6, atol=1e-7)


def test_shift_block_keeps_a_trainers_own_noise_levels():
    sigma = torch.tensor([0.2, 0.7, 1.0])
    names = run_shift(FLUX, 4096, sigma)
    levels = soar.sigma_from_t(names["draws"].t, names["config"].shift)
    torch.testing.assert_close(levels, sigma)
    assert run_shift(FLUX, 4096, torch.zeros(3))["draws"].t.tolist() == pytest.approx([names["config"].t_min] * 3)


# --- check_velocity ---------------------------------------------------------------------------------------------------


class World:
    """The trained model of the shapes world as model(z, time up to 1000, cond), and 8 of its images."""

    def __init__(self):
        name, cpu = str(DATA / "model"), torch.device("cpu")
        pipe = load_pipeline(name, torch.float32, cpu)
        self.transformer = load_transformer(name, None, torch.float32, cpu)
        rows = read_pairs().select(range(8))
        images = [np.array(image) for image in rows["image"]]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        self.z0 = encode_images(pipe, pixels, torch.zeros(8, 16, 8, 8))
        self.cond = encode_prompts(pipe, list(rows["text"]), MAX_SEQUENCE_LENGTH)
        self.uncond = encode_prompts(pipe, [""] * 8, MAX_SEQUENCE_LENGTH)
        sd15 = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        self.vp = sd15.sqrt(), (1 - sd15).sqrt()

    def model(self, z, time, cond):
        return self.transformer(z, timestep=time, return_dict=False, **cond)[0]

    def right(self, z, sigma, cond):
        return self.model(z, 1000 * sigma, cond)

    def sd15(self, x, timestep, cond):
        """What SD 1.5 would predict, had it learnt as much: the noise in a z0 + b z1, a and b those of its timestep."""
        a, b = (per_sample(table[timestep.long().clamp(0, 999)], x) for table in self.vp)
        z, s = x / (a + b), b / (a + b)
        return z + (1 - s) * self.right(z, s.flatten(), cond)


@pytest.fixture(scope="module")
def world():
    return World()


def wrong_adapters(w: World) -> dict:
    """What is wrong: (velocity, other arguments of check_velocity)."""
    s = lambda sigma: per_sample(sigma, w.z0)  # noqa: E731
    torch.manual_seed(0)
    fresh = SD3Transformer2DModel.from_config(w.transformer.config).eval()
    other = {key: x.roll(1, 0) for key, x in w.cond.items()}
    return {
        "none: it is right": (w.right, {}),
        "reversed sign": (lambda z, t, c: -w.right(z, t, c), {}),
        "reversed time": (lambda z, t, c: w.right(z, 1 - t, c), {}),
        "both, as for a model of data - noise": (lambda z, t, c: -w.right(z, 1 - t, c), {}),
        "`timestep=sigma`, where the model takes 1000 sigma": (lambda z, t, c: w.model(z, t, c), {}),
        "`timestep=1000 * sigma`, where the model takes sigma": (lambda z, t, c: w.right(z, 1000 * t, c), {}),
        "a model that predicts noise": (lambda z, t, c: z + (1 - s(t)) * w.right(z, t, c), {}),
        "a model that predicts clean data": (lambda z, t, c: z - s(t) * w.right(z, t, c), {}),
        "a model that predicts noise on SD 1.5's path": (lambda z, t, c: w.sd15(z, 1000 * t, c), {}),
        "the same, in the recipe for noise": (lambda z, t, c: (w.sd15(z, 1000 * t, c) - z) / (1 - s(t)), {}),
        "`cond` not handed on": (lambda z, t, c: w.right(z, t, w.cond), {}),
        "an untrained model": (lambda z, t, c: fresh(z, timestep=1000 * t, return_dict=False, **c)[0], {}),
        "latents not scaled, as if by 0.18215": (w.right, {"z0": w.z0 / 0.18215}),
        "`[0]` forgotten": (lambda z, t, c: w.transformer(z, timestep=1000 * t, return_dict=False, **c), {}),
        "tokens not unpacked": (lambda z, t, c: w.right(z, t, c).flatten(2).mT, {}),
        "a guided velocity in place of the model's": (
            lambda z, t, c: soar.guided_velocity(w.right(z, t, w.uncond), w.right(z, t, c), 4.5), {}
        ),
        "prompts of other images": (w.right, {"cond": other}),
    }  # fmt: skip


def adapters_table(w: World) -> str:
    rows = ["| mistake | caught by | message, or what is returned |", "| --- | --- | --- |"]
    for mistake, (velocity, change) in wrong_adapters(w).items():
        arguments = {"z0": w.z0, "cond": w.cond, "other_cond": w.uncond} | change
        try:
            message = f"{check_velocity(velocity, **arguments, generator=rng()):.2f}"
            by = "" if mistake.startswith("none") else "nothing"
        except ValueError as error:
            message, by = str(error), "`check_velocity`"
            try:
                next(soar.soar_terms(velocity, w.z0, soar.draw(w.z0.shape, soar.SoarConfig(), rng()), w.cond, w.uncond))
            except ValueError:
                by = "`check_velocity`, `soar_terms`"
        rows.append(f"| {mistake} | {by} | {message} |")
    config, calls = soar.SoarConfig(), []
    draws = soar.draw(w.z0.shape, config, rng())
    try:
        list(soar.soar_terms(w.right, w.z0, draws, w.cond, list(w.uncond.values()), config))
    except ValueError as error:
        rows.insert(-2, f"| `uncond` of another type than `cond` | `soar_terms` | {error} |")
    with torch.no_grad():
        list(soar.soar_terms(lambda *x: calls.append(x) or x[0], w.z0, draws, w.cond, None, config))
    rows.append(f"| `uncond` not passed | nothing | unguided rollouts: {len(calls)} forwards a step in place of 8 |")
    return "\n".join(rows)


def same_up_to_digits(left: str, right: str) -> bool:
    """Equal texts, and numbers within 0.02 or 2 %: they differ in the last digit from one kind of CPU to another."""
    number = r"\d+\.\d+"
    pairs = zip(map(float, re.findall(number, left)), map(float, re.findall(number, right)))
    return re.sub(number, "x", left) == re.sub(number, "x", right) and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in pairs
    )


def table_of(name: str) -> str:
    return re.search(rf"<!-- table: {name} -->\n(.*?)\n?<!-- end -->", RECIPES.read_text(), re.S)[1]


def test_tables_are_what_is_found(world):
    for name, found in {"shift": shift_table(), "adapters": adapters_table(world)}.items():
        written = table_of(name)
        refresh = "python -m experiments.tests.test_recipes writes it anew"
        assert same_up_to_digits(written, found), f"table {name} of recipes.md is not this; {refresh}:\n{found}"


def test_the_block_that_checks_an_adapter_runs(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "check_velocity", check_velocity_module)
    names = {"transformer": world.transformer, "velocity": world.right, "generator": rng()}
    names |= {"z0": world.z0, "cond": world.cond, "uncond": world.uncond}
    exec(PYTHON["recipes.md: SOAR in other trainers"], names)
    world.transformer.eval()
    assert capsys.readouterr().out == f"the adapter fits: relative error {names['error']:.2f}\n"
    assert 0.05 < names["error"] < 0.2


@pytest.mark.parametrize(
    "mistake, mend",
    {
        "both, as for a model of data - noise": "-velocity(z, 1 - sigma, cond)",
        "`timestep=sigma`, where the model takes 1000 sigma": "velocity(z, 1000 * sigma, cond)",
    }.items(),
)
def test_one_image_is_enough_to_name_the_mend_that_undoes_a_mistake(world, mistake, mend):
    cond = {key: x[1:2] for key, x in world.cond.items()}
    with pytest.raises(ValueError, match=rf", {re.escape(mend)} has 0\.[01]\d: "):
        check_velocity(wrong_adapters(world)[mistake][0], world.z0[1:2], cond, generator=rng())


DTYPES = (torch.float32, torch.bfloat16)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.1, 1.0), st.booleans(), st.sampled_from(DTYPES))
def test_check_velocity_on_an_exact_model_names_what_was_turned(seed, batch, spread, reverse, dtype):
    """z0 = cond + spread * n: the conditional mean of z1 - z0 is known, and so is its error."""
    mean = randn(seed, batch, 256)
    z0 = (mean + spread * randn(seed + 1, batch, 256)).to(dtype)

    def exact(z, sigma, cond):
        s = per_sample(sigma, z)
        x = (z.float() - (1 - s) * cond) / (s**2 + ((1 - s) * spread) ** 2)
        return (s - (1 - s) * spread**2) * x - cond

    def given(z, sigma, cond):
        return -exact(z, 1 - sigma, cond) if reverse else exact(z, sigma, cond)

    if reverse:
        with pytest.raises(ValueError, match=r"-velocity\(z, 1 - sigma, cond\) has .* sign .* and time runs the other"):
            check_velocity(given, z0, mean, generator=rng(seed + 2))
    else:
        found = check_velocity(given, z0, mean, -mean, generator=rng(seed + 2))
        sigma = torch.linspace(0.1, 0.9, 1000)
        noise = spread**2 / (sigma**2 + ((1 - sigma) * spread) ** 2)  # variance of z1 - z0 given z
        # |z1 - z0|^2 is 2 + spread^2 in the mean; both are means over at least 2,048 numbers.
        assert found == pytest.approx(noise.mean().item() / (2 + spread**2), rel=0.25)
        with pytest.raises(ValueError, match="the same values for cond and other_cond: the model ignores"):
            check_velocity(lambda z, sigma, cond: given(z, sigma, mean), z0, mean, -mean, generator=rng(seed + 2))


def test_check_velocity_leaves_global_random_state_gradients_and_conditioning_alone():
    cond, z0, seen = object(), randn(0, 3, 64), []
    weight = torch.ones((), requires_grad=True)

    def velocity(z, sigma, c):
        assert c is cond and not torch.is_grad_enabled() and z.dtype == z0.dtype and sigma.shape == (3,)
        seen.append(sigma)
        return weight * (z * 2 - 0.5)

    state = torch.get_rng_state()
    for _ in range(2):
        try:
            check_velocity(velocity, z0, cond, generator=rng(1))
        except ValueError as error:
            message = str(error)
    assert torch.equal(torch.get_rng_state(), state) and weight.grad is None and message.startswith("velocity(z, sigma")
    assert len(seen) == 2 * 3 * 7  # 3 rounds of 3 levels, 7 forwards each
    assert all(torch.equal(a, b) for a, b in zip(seen[:21], seen[21:]))
    levels = torch.cat(seen[0:21:7])
    assert len(levels.unique()) == 9 and levels.min() > 0.1 and levels.max() < 0.9


def test_a_rank_needs_no_normalizer_when_there_is_one_path():
    config = soar.SoarConfig(num_aux_points=5, lambda_aux=0.5)
    for t in (torch.tensor([0.001, 0.5]), torch.tensor([1.0, 0.9])):
        assert soar.loss_normalizer(t, config) == 2 * (1 + 0.5 * 5)


# --- Shell blocks -----------------------------------------------------------------------------------------------------


def test_the_block_that_takes_a_checkpoint_into_diffusers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer")
    model.proj_out.bias.data += 0.5
    model.save_pretrained("output/soar/final/transformer")
    text, names = PYTHON[DIFFUSERS], {}
    hub_id = "stabilityai/stable-diffusion-3.5-medium"
    assert text.count(hub_id) == 1
    for there, here in ((hub_id, str(DATA / "model")), ("512", "64"), ('"cuda"', '"cpu"')):
        assert there in text
        text = text.replace(there, here)
    exec(text, names)
    assert names["image"].size == (64, 64) and np.asarray(names["image"]).std() > 5
    saved = StableDiffusion3Pipeline.from_pretrained("output/soar/pipeline", dtype=torch.float32).transformer
    assert torch.equal(saved.proj_out.bias, model.proj_out.bias.bfloat16().float())


def test_commands_in_the_pages_have_flags_that_exist():
    found = 0
    for text in [text for page in PAGES for text in blocks(page, "bash", "sh", "shell").values()]:
        for command in re.split(r"&&|\n", text.replace("\\\n", " ")):
            words = shlex.split(command, comments=True)
            for script, module in (("train.py", train), ("sample.py", sample)):
                if script in words:
                    tyro.cli(module.Args, args=words[words.index(script) + 1 :], use_underscores=True)
                    found += 1
            if "-m" in words and not words[0].startswith("python3"):
                assert importlib.util.find_spec(words[words.index("-m") + 1])
    assert found >= 3


def main() -> None:
    text = RECIPES.read_text()
    for name, table in {"shift": shift_table(), "adapters": adapters_table(World())}.items():
        text = text.replace(f"<!-- table: {name} -->\n{table_of(name)}", f"<!-- table: {name} -->\n{table}\n", 1)
        text = text.replace("\n\n<!-- end -->", "\n<!-- end -->")
    RECIPES.write_text(text)


if __name__ == "__main__":
    main()
