"""Every code block of the README, evaluation.md, recipes.md and checks.md runs, on small models of diffusers' classes.

    python -m experiments.tests.port.test_recipes        # writes the tables of recipes.md and checks.md anew

A block is pasted as it stands into a stub of the trainer, which has only the names that the trainer has
at that place. With lambda_aux = 0 it must equal the stub's own loss; the rollout must be the first step
of diffusers' pipeline. The trainers' real code is run by `python -m experiments.port.run_recipes`.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import inspect
import math
import re
import shlex
import sys
import textwrap
import types
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
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.training_utils import compute_loss_weighting_for_sd3
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

import sample
import soar
import train
from experiments.port import check_velocity as check_velocity_module
from experiments.port.check_velocity import check_velocity
from experiments.port.run_recipes import blocks as blocks_by_heading
from experiments.port.run_recipes import edited
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, read_pairs
from experiments.tests.common import ROOT
from experiments.tests.port import test_check_port
from sample import encode_images, encode_prompts, load_pipeline, load_transformer

RECIPES = ROOT / "experiments/port/recipes.md"
CHECKS = RECIPES.with_name("checks.md")
FILES = RECIPES.with_name("recipes")
TABLES = {"shift": RECIPES, "adapters": CHECKS, "port": CHECKS}  # where they stand
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


PAGES = (ROOT / "README.md", RECIPES, CHECKS, ROOT / "experiments/evaluate/evaluation.md")
PYTHON = {name: text for page in PAGES for name, text in blocks(page, "python", "py").items()}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def per_sample(sigma, like):
    return sigma.view(-1, *[1] * (like.ndim - 1))


DIFFUSERS = "evaluation.md: From a checkpoint into diffusers"


# --- diffusers' scripts: a stub has the names that a script has at each place, and its own loss ---

STUB = '''
def main(args, accelerator, transformer, model_input, indices, noise_scheduler_copy, {names}):
    # Handle class prompt for prior-preservation.
    for epoch in range(1):
        for step in range(1):
            with accelerator.accumulate(transformer):
                # Sample noise that we'll add to the latents
                noise = torch.randn_like(model_input)
                bsz = model_input.shape[0]
                timesteps = noise_scheduler_copy.timesteps[indices]
                # Add noise according to flow matching.
                sigmas = noise_scheduler_copy.sigmas[indices].to(model_input.dtype)
                sigmas = sigmas.view(-1, *[1] * (model_input.ndim - 1))
                noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
{own}
                weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
                target = noise - model_input
                if getattr(args, "precondition_outputs", 0):
                    model_pred, target = model_pred * (-sigmas) + noisy_model_input, model_input
                error = weighting.float() * (model_pred.float() - target.float()) ** 2
                if args.with_prior_preservation:
                    error, error_prior = torch.chunk(error, 2, dim=0)
                loss = error.mean()
                if args.with_prior_preservation:
                    loss = loss + args.prior_loss_weight * error_prior.mean()
                accelerator.backward(loss)
            logs = {{"loss": loss.detach().item()}}
    return locals()
'''


class Script:
    """A small random model of the script's class; the names at the place of the loss; the script's
    own forward; first_step(z1): diffusers' pipeline from z1 to its second noise level."""

    shift = {"shift": 3.0}
    imports: dict = {}

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = self.build()
        for parameter in self.model.parameters():  # zeros of a fresh model would hide mistakes
            if parameter.dim() < 2:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.model.to(dtype)
        self.scheduler = FlowMatchEulerDiscreteScheduler(**self.shift)
        self.names = self.given()
        self.model_input = self.names.pop("model_input").to(dtype)

    def main(self, text, *, accelerator=None, **args):
        """The local names of the script's main, with the recipe pasted by `edited`."""
        defaults = {"weighting_scheme": "none", "with_prior_preservation": False, "seed": None}
        defaults |= {"prior_loss_weight": 0.5, "guidance_scale": 1.0, "offload": False}
        args = SimpleNamespace(**(defaults | {"precondition_outputs": 0} | args))
        module = {"math": math, "torch": torch} | self.imports
        module["compute_loss_weighting_for_sd3"] = compute_loss_weighting_for_sd3
        exec(compile(text, "script", "exec"), module)
        indices = torch.tensor([10, 950])  # a noisy and a clean level
        given = (accelerator or Plain(), self.model, self.model_input, indices, self.scheduler)
        torch.manual_seed(101)  # not model_input's: the target would be 0
        return module["main"](args, *given, **self.names)

    @classmethod
    def stub(cls):
        own = textwrap.indent(textwrap.dedent(cls.own).strip(), " " * 16)
        return STUB.format(names=", ".join(cls().names), own=own)


class Plain:
    """What a script calls of accelerate's Accelerator, on one process."""

    device, process_index = torch.device("cpu"), 0

    def __init__(self, steps: int = 1):
        self.steps = steps

    def accumulate(self, *_):
        return contextlib.nullcontext()

    def backward(self, loss):
        (loss / self.steps).backward()


class SD3(Script):
    own = """
        model_pred = transformer(
            hidden_states=noisy_model_input, timestep=timesteps,
            encoder_hidden_states=prompt_embeds, pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
    """
    heading = "Stable Diffusion 3"

    def build(self):
        return SD3Transformer2DModel(
            sample_size=8, in_channels=16, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
            pooled_projection_dim=8, pos_embed_max_size=8,
        )  # fmt: skip

    def given(self):
        self.empty = randn(12, 1, 5, 8), randn(13, 1, 8)
        dtype = self.model.dtype
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "prompt_embeds": randn(10, BATCH, 5, 8).to(dtype),
            "pooled_prompt_embeds": randn(11, BATCH, 8).to(dtype), "text_encoders": [], "tokenizers": [],
            "compute_text_embeddings": lambda prompt, *_: tuple(x.to(dtype) for x in self.empty),
        }  # fmt: skip

    def first_step(self, z1):
        n, (empty, pooled) = self.names, self.empty
        pipe = StableDiffusion3Pipeline(self.model, self.scheduler, *[None] * 7)
        return pipeline_step(
            pipe, z1, 40, prompt_embeds=n["prompt_embeds"],
            pooled_prompt_embeds=n["pooled_prompt_embeds"],
            negative_prompt_embeds=empty.expand(BATCH, -1, -1),
            negative_pooled_prompt_embeds=pooled.expand(BATCH, -1),
            guidance_scale=4.5, height=64, width=64,
        )  # fmt: skip


class Flux(Script):
    own = """
        guidance = torch.tensor([args.guidance_scale]).expand(bsz)
        model_pred = transformer(
            hidden_states=FluxPipeline._pack_latents(noisy_model_input, *model_input.shape),
            timestep=timesteps / 1000, guidance=guidance, pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds, txt_ids=text_ids, img_ids=latent_image_ids,
            return_dict=False,
        )[0]
        model_pred = FluxPipeline._unpack_latents(model_pred, 64, 64, vae_scale_factor=8)
    """
    heading, imports = "Flux.1", {"FluxPipeline": FluxPipeline}
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

    def build(self):
        return FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def given(self):
        dtype = self.model.dtype
        ids = FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, "cpu", dtype)
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "prompt_embeds": randn(10, BATCH, 5, 8).to(dtype),
            "pooled_prompt_embeds": randn(11, BATCH, 8).to(dtype), "text_ids": torch.zeros(5, 3),
            "latent_image_ids": ids,
        }  # fmt: skip

    def first_step(self, z1):
        n = self.names
        pipe = FluxPipeline(self.scheduler, *[None] * 5, self.model)
        return pipeline_step(
            pipe, z1, 28, prompt_embeds=n["prompt_embeds"], guidance_scale=3.5, height=64, width=64,
            pooled_prompt_embeds=n["pooled_prompt_embeds"],
        )  # fmt: skip


class Flux2(Script):
    own = """
        guidance = torch.full([1], args.guidance_scale).expand(bsz)
        model_pred = transformer(
            hidden_states=Flux2Pipeline._pack_latents(noisy_model_input),
            timestep=timesteps / 1000, guidance=guidance, encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids, img_ids=model_input_ids, return_dict=False,
        )[0]
        model_pred = Flux2Pipeline._unpack_latents_with_ids(model_pred, model_input_ids)
    """
    heading, imports, shift = "Flux.2", {"Flux2Pipeline": Flux2Pipeline}, Flux.shift

    def build(self):
        return Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=8, timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
        )  # fmt: skip

    def given(self):
        latents, text = randn(1, BATCH, 16, 4, 4), randn(10, BATCH, 5, 8).to(self.model.dtype)
        return {
            "model_input": latents, "prompt_embeds": text,
            "text_ids": Flux2Pipeline._prepare_text_ids(text),
            "model_input_ids": Flux2Pipeline._prepare_latent_ids(latents),
        }  # fmt: skip

    def first_step(self, z1):
        """As the pipeline's loop, whose text encoder cannot be left out."""
        n, mu = self.names, compute_empirical_mu(16, 50)
        retrieve_timesteps(self.scheduler, 50, "cpu", sigmas=np.linspace(1.0, 1 / 50, 50), mu=mu)
        t = self.scheduler.timesteps[0]
        with torch.no_grad():
            v = self.model(
                hidden_states=z1, timestep=t.expand(BATCH) / 1000, guidance=torch.full((BATCH,), 4.0),
                encoder_hidden_states=n["prompt_embeds"], txt_ids=n["text_ids"],
                img_ids=n["model_input_ids"], return_dict=False,
            )[0]  # fmt: skip
        return self.scheduler.step(v, t, z1, return_dict=False)[0], self.scheduler.sigmas[1].item()


def concat_prompt_embedding_batches(*pairs):
    """The Qwen-Image script's own, for prompts of one length."""
    return tuple(torch.cat(x) for x in zip(*pairs))


def offload_models(*_, **__):
    return contextlib.nullcontext()


class Qwen(Script):
    own = """
        img_shapes = [(1, model_input.shape[3] // 2, model_input.shape[4] // 2)] * bsz
        packed = QwenImagePipeline._pack_latents(
            noisy_model_input.permute(0, 2, 1, 3, 4), bsz, model_input.shape[1], 8, 8
        )
        model_pred = transformer(
            hidden_states=packed, encoder_hidden_states=prompt_embeds,
            encoder_hidden_states_mask=prompt_embeds_mask, timestep=timesteps / 1000,
            img_shapes=img_shapes, return_dict=False,
        )[0]
        model_pred = QwenImagePipeline._unpack_latents(model_pred, 64, 64, 8)
        del img_shapes
    """
    heading, imports = "Qwen-Image", {
        "QwenImagePipeline": QwenImagePipeline, "offload_models": offload_models,
        "concat_prompt_embedding_batches": concat_prompt_embedding_batches,
    }  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}

    def build(self):
        return QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def given(self):
        dtype, mask = self.model.dtype, torch.ones(BATCH, 5, dtype=torch.bool)
        mask[0, 3:] = False
        self.empty = randn(11, 1, 5, 8).to(dtype), torch.ones(1, 5, dtype=torch.bool)
        return {
            "model_input": randn(1, BATCH, 16, 1, 8, 8), "prompt_embeds": randn(10, BATCH, 5, 8).to(dtype),
            "prompt_embeds_mask": mask, "text_encoding_pipeline": None,
            "compute_text_embeddings": lambda prompt, pipeline: self.empty,
        }  # fmt: skip

    def first_step(self, z1):
        n, (empty, mask) = self.names, self.empty
        pipe = QwenImagePipeline(self.scheduler, None, None, None, self.model)
        return pipeline_step(
            pipe, z1, 50, prompt_embeds=n["prompt_embeds"], true_cfg_scale=4.0, height=64, width=64,
            prompt_embeds_mask=n["prompt_embeds_mask"],
            negative_prompt_embeds=empty.expand(BATCH, -1, -1),
            negative_prompt_embeds_mask=mask.expand(BATCH, -1),
        )  # fmt: skip


class ZImage(Script):
    own = """
        model_pred = transformer(
            list(noisy_model_input.unsqueeze(2).unbind(dim=0)), (1000 - timesteps) / 1000,
            prompt_embeds, return_dict=False,
        )[0]
        model_pred = -torch.stack(model_pred, dim=0).squeeze(2)
    """
    heading, imports = "Z-Image", {"offload_models": offload_models}

    def build(self):
        return ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
            axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
        )  # fmt: skip

    def given(self):
        dtype = next(self.model.parameters()).dtype
        self.empty = [randn(12, 4, 8).to(dtype)]
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "text_encoding_pipeline": None,
            "prompt_embeds": [randn(10, 5, 8).to(dtype), randn(11, 3, 8).to(dtype)],
            "compute_text_embeddings": lambda prompt, pipeline: self.empty,
        }  # fmt: skip

    def first_step(self, z1):
        pipe = ZImagePipeline(self.scheduler, None, None, None, self.model)
        return pipeline_step(
            pipe, z1, 50, prompt_embeds=self.names["prompt_embeds"], guidance_scale=5.0,
            negative_prompt_embeds=self.empty * BATCH, height=64, width=64,
        )  # fmt: skip


def pipeline_step(pipe, z1, steps, **call):
    """Its latents and noise level after one step."""

    def stop(pipe, step, timestep, latents):
        pipe._interrupt = True
        return latents

    options = {"num_inference_steps": steps, "latents": z1, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipe(**call, **options, callback_on_step_end=stop, return_dict=False)[0]
    return out, pipe.scheduler.sigmas[1].item()


SCRIPTS = (SD3, Flux, Flux2, Qwen, ZImage)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ratio_of(cls, capsys, text=None, dtype=torch.float32, **args):
    """What the self-test prints: SOAR at lambda 0 over the script's loss."""
    text = edited(cls.stub(), cls.heading, self_test=True) if text is None else text
    cls(dtype).main(text, **args)
    return float(re.search(r"ratio ([\d.]+)$", capsys.readouterr().out, re.M)[1])


@pytest.mark.parametrize("cls", SCRIPTS)
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("prior", [False, True])
def test_self_test_finds_the_scripts_loss_to_1e_6(cls, scheme, prior, capsys):
    for precondition in {0, int(cls is SD3)}:
        args = {"weighting_scheme": scheme, "with_prior_preservation": prior}
        args |= {"precondition_outputs": precondition}
        assert abs(ratio_of(cls, capsys, **args) - 1) < 2e-6


@pytest.mark.parametrize("cls", SCRIPTS)
def test_self_test_in_bf16_is_near(cls, capsys):
    assert abs(ratio_of(cls, capsys, dtype=torch.bfloat16) - 1) < 0.02


MISTAKES = {  # the model, what is changed in its recipe: the self-test must notice
    "sd3, time": (SD3, "timestep=1000 * sigma", "timestep=sigma"),
    "sd3, pooled": (SD3, ": pooled_prompt_embeds", ": torch.zeros(2, 8)"),
    "flux, time": (Flux, "timestep=sigma", "timestep=1000 * sigma"),
    "flux, guidance": (Flux, "(len(z0),), args.guidance_scale", "(len(z0),), 3.5"),
    "flux2, guidance": (Flux2, "(len(z0),), args.guidance_scale", "(len(z0),), 4.0"),
    "qwen, mask": (Qwen, '"encoder_hidden_states_mask": cond[1]', '"encoder_hidden_states_mask": None'),
    "z-image, time": (ZImage, "transformer(x, 1 - sigma", "transformer(x, sigma"),
    "z-image, sign": (ZImage, "return -torch", "return torch"),
}  # fmt: skip


@pytest.mark.parametrize("cls, old, new", MISTAKES.values(), ids=MISTAKES)
def test_self_test_notices_a_mistake(cls, old, new, capsys):
    text = edited(cls.stub(), cls.heading, self_test=True)
    assert text.count(old) == 1
    assert abs(ratio_of(cls, capsys, text.replace(old, new)) - 1) > 1e-5


def soar_run(cls, monkeypatch, text=None, change=lambda draws: draws, script=None, **args):
    """The script with SOAR in place of its loss: itself, its names, soar_terms' arguments."""
    script, calls, soar_terms, draw = script or cls(), [], soar.soar_terms, soar.draw

    def recorded(*given, **options):
        calls.append(given)
        return soar_terms(*given, **options)

    monkeypatch.setattr(soar, "soar_terms", recorded)
    monkeypatch.setattr(soar, "draw", lambda *x: change(draw(*x)))
    text = edited(cls.stub(), cls.heading, self_test=False) if text is None else text
    names = script.main(text, **args)
    monkeypatch.undo()
    return script, names, calls[0]


@pytest.mark.parametrize("cls", SCRIPTS)
def test_recipe_takes_a_soar_step_of_the_scripts_levels(cls, monkeypatch):
    calls, script = [], cls()
    script.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    script, names, (_, _, draws, _, _, config) = soar_run(cls, monkeypatch, script=script)
    rollout = 2 if cls is Qwen else 1
    assert calls == [True] + [False] * rollout + [True] * 6
    levels = soar.sigma_from_t(draws.t, config.shift)
    torch.testing.assert_close(1000 * levels, names["timesteps"])
    assert math.isfinite(names["logs"]["loss"])
    grads = list(gradients(script.model).values())
    assert all(x.isfinite().all() for x in grads)
    assert sum(bool(x.any()) for x in grads) > 0.8 * len(grads)


def rollout_of(cls, monkeypatch, text=None):
    """Velocities of the recipe's rollout from noise, and of the pipeline's first step."""
    z1 = randn(5, *soar_run(cls, monkeypatch)[2][1].shape)
    change = lambda d: d._replace(z1=z1, u=torch.zeros_like(d.u))  # noqa: E731
    script, _, (velocity, z0, draws, cond, uncond, config) = soar_run(cls, monkeypatch, text, change)
    states = []

    def recorded(z, sigma, cond):
        states.append(z)
        return velocity(z, sigma, cond)

    draws = draws._replace(t=torch.ones(BATCH))
    list(soar.soar_terms(recorded, z0, draws, cond, uncond, config))
    sigma = soar.sigma_from_t(1 - 1 / config.num_sampling_steps, config.shift)
    latents, sigma_pipeline = script.first_step(z1)
    # u = 0: the last state is where the rollout ended
    return (states[-1] - z1) / (sigma - 1), (latents - z1) / (sigma_pipeline - 1)


@pytest.mark.parametrize("cls", SCRIPTS)
def test_rollout_is_the_first_step_of_the_pipeline(cls, monkeypatch):
    ours, pipeline = rollout_of(cls, monkeypatch)
    torch.testing.assert_close(ours, pipeline, rtol=1e-4, atol=1e-4)


ROLLOUT_MISTAKES = {
    "sd3, uncond": (SD3, "cond, uncond, config", "cond, cond, config"),
    "flux, guidance": (Flux, "(len(z0),), 3.5", "(len(z0),), 1.5"),
    "flux2, guidance": (Flux2, "(len(z0),), 4.0", "(len(z0),), 1.5"),
    "flux, w": (Flux, "guidance_scale=0.0", "guidance_scale=1.0"),
    "qwen, norm": (Qwen, " * (v.norm(dim=-1, keepdim=True) / ", " # "),
    "z-image, w": (ZImage, "1 + 5.0", "5.0"),
}


@pytest.mark.parametrize("cls, old, new", ROLLOUT_MISTAKES.values(), ids=ROLLOUT_MISTAKES)
def test_a_mistake_in_a_rollout_is_noticed(cls, old, new, monkeypatch):
    text = edited(cls.stub(), cls.heading, self_test=False)
    assert text.count(old) == 1
    ours, pipeline = rollout_of(cls, monkeypatch, text.replace(old, new))
    assert (ours - pipeline).abs().max() > 0.01


def test_a_recipe_without_uncond_raises(monkeypatch):
    text = edited(SD3.stub(), SD3.heading, self_test=False).replace("cond, uncond, config", "cond, config=config")
    with pytest.raises(ValueError, match="pass uncond, or guidance_scale=1"):
        soar_run(SD3, monkeypatch, text)


def test_lora_and_accumulation_give_gradients_of_the_adapters_alone(monkeypatch):
    half = {}
    for steps in (1, 2):
        script = SD3()
        script.model.requires_grad_(False)
        torch.manual_seed(2)
        script.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        soar_run(SD3, monkeypatch, script=script, accelerator=Plain(steps))
        half[steps] = gradients(script.model)
    assert half[1] and all("lora" in name for name in half[1])
    for name, x in half[1].items():
        assert x.any()
        torch.testing.assert_close(half[2][name], x / 2)


# --- Blocks of any trainer: pasted into a function that has the names of its place ---

PAGE = blocks_by_heading(RECIPES.read_text())


def sd3_model(z, time, cond, dtype=torch.float32):
    return sd3_model.net(z, timestep=time, encoder_hidden_states=cond, return_dict=False,
                         pooled_projections=torch.ones(BATCH, 8, dtype=dtype))[0]  # fmt: skip


@pytest.fixture
def lambda_zero(monkeypatch):
    """SoarConfig of every block has lambda_aux = 0, and its draws are kept."""
    fields = [("lambda_aux", float, 0.0)]
    config = dataclasses.make_dataclass("SoarConfig", fields, bases=(soar.SoarConfig,), frozen=True)
    kept, draw = [], soar.draw

    class Kept(soar.Draws):
        def _replace(self, **changed):
            kept.append(super()._replace(**changed))
            return kept[-1]

    monkeypatch.setattr(soar, "SoarConfig", config)
    monkeypatch.setattr(soar, "draw", lambda *x: Kept(*draw(*x)))
    return kept


def flow_loss(model, z0, draws, cond, shift, *, sign=1.0, time=lambda sigma: 1000 * sigma):
    """A trainer's own: noisy latents, the model at their time, noise - latents."""
    sigma = soar.sigma_from_t(draws.t, shift)
    noisy = (1 - per_sample(sigma, z0)) * z0 + per_sample(sigma, z0) * draws.z1
    return F.mse_loss(sign * model(noisy, time(sigma), cond), draws.z1 - z0)


@pytest.fixture
def any_trainer():
    """What a trainer of no name has, with a small SD3 model."""
    sd3_model.net = SD3().model
    return {
        "torch": torch, "device": "cpu", "seed": None, "rank": 0, "model": sd3_model,
        "encode": lambda prompts: randn(12, 1, 5, 8), "latents": randn(1, BATCH, 16, 8, 8),
        "sample_levels": lambda n: torch.tensor([0.9, 0.2]), "cond": randn(10, BATCH, 5, 8),
    }  # fmt: skip


def test_any_trainers_blocks_are_its_loss_at_lambda_zero(any_trainer, lambda_zero):
    n = any_trainer
    for block in PAGE["Any trainer"]:
        exec(block, n)
    own = flow_loss(sd3_model, n["latents"], lambda_zero[-1], n["cond"], 3.0)
    torch.testing.assert_close(n["loss"], own.detach(), rtol=1e-6, atol=0)
    assert len(gradients(sd3_model.net)) > 10


@pytest.mark.parametrize("sign, time, off", [(1, 1, False), (-1, 1, True), (1, 1e-3, True)])
def test_the_self_test_of_any_trainer_sees_its_adapter(sign, time, off, any_trainer, capsys):
    n, model = any_trainer, any_trainer["model"]
    for block in PAGE["Any trainer"]:
        exec(block, n)
    z0, sigmas, n["noise"] = n["z0"], n["sigmas"], randn(5, *n["z0"].shape)
    noisy = (1 - per_sample(sigmas, z0)) * z0 + per_sample(sigmas, z0) * n["noise"]
    n["loss"] = F.mse_loss(model(noisy, 1000 * sigmas, n["cond"]), n["noise"] - z0)
    n["velocity"] = lambda z, sigma, cond: sign * model(z, 1000 * time * sigma, cond)
    exec(PAGE["The self-test"][0], n)
    ratio = float(re.search(r"ratio ([\d.]+)$", capsys.readouterr().out, re.M)[1])
    assert (abs(ratio - 1) > 1e-3) if off else (abs(ratio - 1) < 2e-6)


def test_levels_from_0_to_1000_are_refused(any_trainer):
    any_trainer["sample_levels"] = lambda n: torch.tensor([900.0, 200.0])
    with pytest.raises(ValueError, match="200 to 900"):
        for block in PAGE["Any trainer"]:
            exec(block, any_trainer)


def test_any_trainers_blocks_take_a_soar_step(any_trainer):
    calls = []
    sd3_model.net.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for block in PAGE["Any trainer"]:
        exec(block, any_trainer)
    assert calls == [True, False] + [True] * 6 and any_trainer["loss"] > 0
    levels = soar.sigma_from_t(any_trainer["draws"].t)
    torch.testing.assert_close(levels, torch.tensor([0.9, 0.2]))


OTHERS = (  # a row of the page's table: the trainer's own error, of its prediction at (noisy, sigma)
    lambda p, z0, z1: p - (z0 - z1),
    lambda p, z0, z1: p - z0,
    lambda p, z0, z1: p - z1,
    lambda p, z0, z1: p - z0,
)
MODELS = re.search(r"<!-- models: .*?-->\n(.*?)<!-- end -->", RECIPES.read_text(), re.S)[1].splitlines()[2:]


def test_each_row_on_models_is_tried():
    assert len(MODELS) == len(OTHERS)


@pytest.mark.parametrize("i", range(len(OTHERS)))
def test_models_of_other_predictions_are_their_loss_at_lambda_zero(i, any_trainer, lambda_zero):
    z0, cond, model = (any_trainer[x] for x in ("latents", "cond", "model"))
    _, _, returned, weights, _ = re.split(r" ?\| ?", MODELS[i])
    weighting = eval(weights.strip("`"), {}) if weights else None

    def velocity(z, sigma, cond):
        names = {"model": model, "z": z, "sigma": sigma, "cond": cond, "s": per_sample(sigma, z)}
        return eval(returned.strip("`"), names)

    config = soar.SoarConfig(shift=1.0)
    draws = soar.draw(z0.shape, config, rng())._replace(t=torch.tensor([0.9, 0.2]))
    (term,) = soar.soar_terms(velocity, z0, draws, cond, None, config, weighting=weighting)
    s = per_sample(draws.t, z0)
    time = 1 - draws.t if i < 2 else draws.t
    prediction = sd3_model((1 - s) * z0 + s * draws.z1, time, cond)
    error = OTHERS[i](prediction, z0, draws.z1) ** 2
    if i == 1:  # a velocity's error, not that of clean data: what lucidrains' loss compares
        error = error / s**2
    torch.testing.assert_close(term.loss, error.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sde_type", soar.SDE_TYPES)
def test_known_region_is_clean_in_every_call_and_free_elements_alone_count(sde_type, any_trainer):
    known = torch.zeros(BATCH, 1, 8, 8, dtype=torch.bool)
    known[0, :, :6], known[1, :, :, :3] = True, True
    z0, seen = any_trainer["latents"], []
    part = known.expand_as(z0)

    def model(z, sigma, cond):
        assert torch.equal(z[part], z0[part])
        seen.append(sd3_model(z, sigma, cond))
        return seen[-1]

    n = any_trainer | {"known": known, "z0": z0, "model": model}
    exec(PAGE["Known regions"][0], n)
    config = soar.SoarConfig(num_rollout_paths=2, num_aux_points=2, sde_type=sde_type)
    draws = soar.draw(z0.shape, config, rng())
    arguments = (n["velocity"], z0, draws, n["cond"], n["cond"] * 0, config)
    base, *_ = soar.soar_terms(*arguments, weighting=n["weighting"])
    total = 0.0
    for b in range(BATCH):
        free = ~part[b]
        total += F.mse_loss(seen[0][b][free], (draws.z1 - z0)[b][free])
    normalizer = soar.loss_normalizer(draws.t, config)
    torch.testing.assert_close(base.loss, total / normalizer, rtol=1e-4, atol=1e-6)


def wan_model():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def test_wan_blocks_are_the_loss_and_keep_points_in_an_experts_range(any_trainer, lambda_zero):
    defaults = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
    config = {key: defaults[key].default for key in ("latents_mean", "latents_std")}
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in config.values())
    z0, model = randn(1, BATCH, 16, 3, 4, 4), wan_model()
    n = any_trainer | {"vae": SimpleNamespace(config=SimpleNamespace(**config))}
    n |= {"latents": z0 * std + mean, "transformer": model}
    first, second, u = PAGE["Wan"]
    before, inside = PAGE["Any trainer"]
    exec(before, n)
    exec(first, n)
    exec(inside.split("def velocity")[0] + second + "\n" + inside.split("cond)\n\n", 1)[1], n)
    call = lambda z, t, cond: model(z, timestep=t, encoder_hidden_states=cond).sample  # noqa: E731
    own = flow_loss(call, z0, lambda_zero[-1], n["cond"], 5.0)
    torch.testing.assert_close(n["loss"], own.detach(), rtol=1e-5, atol=0)

    n["draws"] = n["draws"]._replace(t=torch.tensor([0.5, 0.05]), u=torch.rand_like(n["draws"].u))
    exec(u, n)
    next_, u = n["sigma_next"], n["draws"].u
    assert (next_ + u * (1 - next_) <= 0.8751).all() and (u >= 0).all() and u.any()


def test_every_python_block_is_run():
    scripts = {cls.heading: 2 for cls in SCRIPTS} | {"diffusers' scripts": 2, "Their self-test": 1}
    others = {"Any trainer": 2, "The self-test": 1, "DDP": 1, "Known regions": 1, "Wan": 3}
    others |= {"ai-toolkit": 1, "SimpleTuner": 1, "OneTrainer": 2, "LTX-Video-Trainer": 1}
    others |= {"diffusion-pipe": 1, "flow_matching": 2}
    assert {name: len(found) for name, found in PAGE.items()} == scripts | others
    assert list(blocks(CHECKS, "python")) == ["checks.md: Is the adapter right?"]


# --- Trainers with hooks: a stub of what each trainer's method has, or is called with ---


def recipe(monkeypatch, name, **modules):
    """A file of recipes/, imported anew; modules, by their path with __ for a dot, are the trainer's."""
    for path, names in modules.items():
        path = path.replace("__", ".")
        for package in [path[: x.start()] for x in re.finditer(r"\.", path)]:
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
        module = types.ModuleType(path)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, path, module)
    module = types.ModuleType(name)
    exec((FILES / f"{name}.py").read_text(), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def hook(monkeypatch, any_trainer):
    recipe(monkeypatch, "streamed")
    return any_trainer | {"patch": monkeypatch}


def backward_of(model):
    """Its gradients summed over the calls, as a trainer's accelerator makes them."""
    return SimpleNamespace(
        backward=lambda loss: loss.backward(), process_index=0, device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )  # fmt: skip


def test_streamed_gives_the_whole_loss_and_gradients(hook):
    config, z0 = soar.SoarConfig(), hook["latents"]
    found = []
    velocity = lambda z, s, c: sd3_model(z, 1000 * s, c)  # noqa: E731
    sigmas = torch.tensor([0.9, 0.2])
    call = (velocity, z0, sigmas, hook["cond"], hook["cond"] * 0, config, rng())
    loss = sys.modules["streamed"].streamed(lambda x: x.backward(), *call)
    loss.backward()
    found.append((loss.detach(), gradients(sd3_model.net)))
    sd3_model.net.zero_grad()
    draws = soar.with_levels(soar.draw(z0.shape, config, rng()), sigmas, config)
    loss = soar.soar_loss(velocity, z0, draws, hook["cond"], hook["cond"] * 0, config)
    loss.backward()
    found.append((loss.detach(), gradients(sd3_model.net)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backward, factor", [
    (lambda loss: (2**16 * loss / 4).backward(), 1),
    (lambda loss: (2**16 * loss).backward(), 4),  # without the division
    (lambda loss: (loss / 4).backward(), 2**-16),  # without the scale
])  # fmt: skip
def test_whole_sees_a_backward_that_does_less_than_the_trainers_and_lambda_zero_does_not(backward, factor, hook):
    velocity = lambda z, s, c: sd3_model(z, 1000 * s, c)  # noqa: E731
    streamed = sys.modules["streamed"]

    def norm(form, lambda_aux):
        """Of the gradients of a trainer with a GradScaler and four micro-batches."""
        sd3_model.net.zero_grad()
        config = soar.SoarConfig(lambda_aux=lambda_aux)
        call = (velocity, hook["latents"], torch.tensor([0.9, 0.2]), hook["cond"], hook["cond"] * 0)
        loss = form(backward, *call, config, rng())
        (2**16 * loss / 4).backward()
        return sum(x.square().sum() for x in gradients(sd3_model.net).values()).sqrt() / 2**16

    assert norm(streamed.streamed, 0.0) == norm(streamed.whole, 0.0)
    ratio = norm(streamed.streamed, 1.0) / norm(streamed.whole, 1.0)
    assert (ratio > 2) if factor > 1 else (ratio < 0.7) if factor < 1 else (abs(ratio - 1) < 1e-4)


@pytest.mark.parametrize("form", ["streamed", "sum"])
def test_hook_and_sum_in_bf16_with_lora_and_accumulation(form, hook):
    """Gradients of the adapters alone, halved over two micro-batches, and near float32's."""
    made = {}
    for steps, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.bfloat16)):
        net = sd3_model.net = SD3().model.requires_grad_(False)
        torch.manual_seed(2)
        net.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        net.to(dtype)
        velocity = lambda z, s, c: sd3_model(z.to(dtype), 1000 * s, c, dtype)  # noqa: B023, E731
        cond, latents = hook["cond"].to(dtype), hook["latents"].to(dtype)
        rest = (cond, cond * 0, soar.SoarConfig())
        backward, sigmas = Plain(steps).backward, torch.tensor([0.9, 0.2])
        if form == "streamed":
            loss = sys.modules["streamed"].streamed(backward, velocity, latents, sigmas, *rest, rng())
        else:
            draws = soar.with_levels(soar.draw(latents.shape, rest[-1], rng()), sigmas, rest[-1])
            loss = soar.soar_loss(velocity, latents.float(), draws, *rest)
        backward(loss)
        made[steps, dtype] = loss.item(), gradients(net)
    loss, whole = made[1, torch.float32]
    assert whole and all("lora" in name and x.any() for name, x in whole.items())
    for name, x in made[2, torch.float32][1].items():
        torch.testing.assert_close(x, whole[name] / 2)
    near, rounded = made[1, torch.bfloat16]
    assert near == pytest.approx(loss, rel=0.01) and near != loss and set(rounded) == set(whole)


def musubi(monkeypatch, tmp_path, offset):
    """musubi_tuner.wan_train_network: its trainer, called at 1000 sigma + 1 but in mode sigma."""
    model = wan_model()

    class WanNetworkTrainer:
        def get_noisy_model_input_and_timesteps(self, args, noise, latents, *_):
            return None, 1000 * torch.tensor([0.9, 0.2]) + offset

        def call_dit(self, args, accelerator, transformer, latents, batch, noise, noisy, timesteps, dtype):
            text = torch.stack(batch["t5"])
            pred = transformer(noisy, timestep=timesteps, encoder_hidden_states=text).sample
            return SimpleNamespace(pred=pred, target=noise - latents)

    script = types.ModuleType("musubi_tuner.wan_train_network")
    script.WanNetworkTrainer = WanNetworkTrainer
    package = types.ModuleType("musubi_tuner")
    package.wan_train_network = script
    monkeypatch.setitem(sys.modules, "musubi_tuner", package)
    monkeypatch.setitem(sys.modules, "musubi_tuner.wan_train_network", script)
    monkeypatch.chdir(tmp_path)
    save_file({"varlen_t5_float32": randn(12, 5, 8)}, "empty_wan_te.safetensors")
    names = vars(recipe(monkeypatch, "soar_musubi"))
    mode = "shift" if offset else "sigma"
    args = SimpleNamespace(seed=None, weighting_scheme="none", timestep_sampling=mode)
    latents, batch = randn(1, BATCH, 16, 3, 4, 4), {"timesteps": None, "t5": list(randn(10, BATCH, 5, 8))}
    call = (args, backward_of(model), model, None, batch, latents, randn(3, *latents.shape))
    return names["SoarTrainer"]().process_batch(*call, None, torch.float32, torch.float32, None, 0), (
        lambda draws: flow_loss(
            lambda z, t, c: model(z, timestep=t, encoder_hidden_states=c).sample, latents, draws,
            torch.stack(batch["t5"]), 5.0, time=lambda s: 1000 * s + offset,
        )
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0, 1])
def test_musubi_block_is_its_loss_at_lambda_zero(offset, lambda_zero, hook, monkeypatch, tmp_path):
    (loss, metrics), own = musubi(monkeypatch, tmp_path, offset)
    assert metrics == {}
    torch.testing.assert_close(loss, own(lambda_zero[-1]), rtol=1e-5, atol=0)


def test_musubi_block_takes_a_soar_step(hook, monkeypatch, tmp_path):
    (loss, _), _ = musubi(monkeypatch, tmp_path, 1)
    loss.backward()
    assert loss.isfinite()


def ai_toolkit(hook, mask, condition=lambda z, batch: z, **settings):
    """SDTrainer's method, at the place of its chain of losses, with the names that are there."""
    recipe(hook["patch"], "soar_ai_toolkit")
    block = textwrap.indent(PAGE["ai-toolkit"][0], "    ")
    text = (
        "def loss_of(self, timesteps, conditional_embeds, batch, pred_kwargs, mask_multiplier,"
        " loss_multiplier, noise):\n    if False:\n        pass\n" + block + "    return loss\n"
    )
    names = {"torch": torch, "concat_prompt_embeds": torch.cat}
    exec(text, names)

    class Trainer:
        train_config = SimpleNamespace(**{
            "loss_type": "soar", "timestep_type": "sigmoid", "linear_timesteps": False,
            "linear_timesteps2": False, "do_guidance_loss": False, "diff_output_preservation": False,
            "blank_prompt_preservation": False, **settings,
        })  # fmt: skip
        sd = SimpleNamespace(condition_noisy_latents=condition)
        accelerator, device_torch = backward_of(None), "cpu"
        unconditional_embeds = randn(12, 1, 5, 8)

        def predict_noise(self, noisy_latents, timesteps=1, conditional_embeds=None,
                          unconditional_embeds=None, batch=None, is_primary_pred=False):
            return sd3_model(noisy_latents, timesteps, conditional_embeds)

    batch = SimpleNamespace(latents=hook["latents"])
    timesteps = torch.tensor([900.0, 200.0])
    return names["loss_of"](Trainer(), timesteps, hook["cond"], batch, {}, mask, torch.ones(2, 1, 1, 1), None)


def test_ai_toolkit_block_is_its_loss_at_lambda_zero_with_its_mask(lambda_zero, hook):
    mask = 2 * torch.rand(BATCH, 1, 8, 8, generator=rng(4))
    loss = ai_toolkit(hook, mask)
    sigma = soar.sigma_from_t(lambda_zero[-1].t)
    z0, z1 = hook["latents"], lambda_zero[-1].z1
    s = per_sample(sigma, z0)
    pred = sd3_model((1 - s) * z0 + s * z1, 1000 * sigma, hook["cond"])
    torch.testing.assert_close(loss, ((pred - (z1 - z0)) ** 2 * mask).mean(), rtol=1e-5, atol=0)


def test_ai_toolkit_block_takes_a_soar_step(hook):
    loss = ai_toolkit(hook, 1.0)
    loss.backward()
    assert loss.isfinite()


def test_ai_toolkit_block_gives_the_model_conditioned_latents(hook):
    plain = ai_toolkit(hook, 1.0)
    conditioned = ai_toolkit(hook, 1.0, condition=lambda z, batch: z + 1)
    assert (conditioned - plain).abs() > 0.01 * plain


@pytest.mark.parametrize("setting", ["linear_timesteps2", "do_guidance_loss", "blank_prompt_preservation"])
def test_ai_toolkit_block_refuses_a_loss_that_it_would_leave_out(setting, hook):
    with pytest.raises(ValueError, match="guidance"):
        ai_toolkit(hook, 1.0, **{setting: True})


def simple_tuner(hook, masked):
    """Trainer._compute_model_prediction_loss of SimpleTuner, and the model that it calls."""
    recipe(hook["patch"], "soar_simpletuner")
    text = "def loss_of(self, prepared_batch):\n" + textwrap.indent(PAGE["SimpleTuner"][0], "    ")
    names = {"torch": torch}
    exec(text, names)
    cond, empty = hook["cond"], hook["cond"] * 0

    class Trainer:
        config, accelerator = SimpleNamespace(seed=None, loss_type="l2"), backward_of(None)
        model = SimpleNamespace(
            flow_matching_timesteps_from_sigmas=lambda sigmas: 1000 * sigmas,
            prediction_to_noiseward_flow=lambda v: v,
        )

        def model_predict(self, prepared_batch):
            b = prepared_batch
            masked.append(b["encoder_attention_mask"])
            v = sd3_model(b["noisy_latents"], b["timesteps"], b["encoder_hidden_states"])
            return {"model_prediction": v}

    batch = {"latents": hook["latents"], "encoder_hidden_states": cond, "add_text_embeds": None}
    batch |= {"negative_encoder_hidden_states": empty, "sigmas": torch.tensor([0.9, 0.2])}
    batch |= {"encoder_attention_mask": "prompt's", "negative_encoder_attention_mask": "empty's"}
    return names["loss_of"](Trainer(), batch)


def test_simple_tuner_block_is_its_loss_at_lambda_zero(lambda_zero, hook):
    loss, logs, diffusion, aux, distill = simple_tuner(hook, [])
    own = flow_loss(sd3_model, hook["latents"], lambda_zero[-1], hook["cond"], 3.0)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)
    assert (logs, aux, distill) == ({}, None, {}) and not diffusion.requires_grad


def test_simple_tuner_block_takes_a_soar_step(hook):
    masked = []
    loss = simple_tuner(hook, masked)[0]
    loss.backward()
    assert loss.isfinite() and masked == ["prompt's", "empty's"] + ["prompt's"] * 6


def sd_scripts(hook, monkeypatch, **more):
    """sd3_train_network's trainer, between its parent's process_batch and post_process_loss."""
    script, library = types.ModuleType("sd3_train_network"), types.ModuleType("library")
    script.Sd3NetworkTrainer = type("Sd3NetworkTrainer", (), {"sample_prompts_te_outputs": {
        "": [hook["cond"][:1] * 0, torch.zeros(1, 0, 8), torch.zeros(1, 8)]}})  # fmt: skip
    levels = lambda args, latents, *_: (None, torch.tensor([900.0, 200.0]), None)  # noqa: E731
    library.sd3_train_utils = SimpleNamespace(
        get_noisy_model_input_and_timesteps=levels,
        compute_loss_weighting_for_sd3=lambda weighting_scheme, sigmas=None: torch.ones_like(sigmas),
    )
    strategy = SimpleNamespace(concat_encodings=lambda lg, t5, pooled: (torch.cat([lg, t5], 1), pooled))
    strategies = SimpleNamespace(get_strategy=lambda: strategy)
    library.strategy_base = SimpleNamespace(TextEncodingStrategy=strategies)
    monkeypatch.setitem(sys.modules, "sd3_train_network", script)
    monkeypatch.setitem(sys.modules, "library", library)
    names = vars(recipe(monkeypatch, "soar_sd_scripts"))
    args = SimpleNamespace(loss_type="l2", masked_loss=False, seed=0, weighting_scheme="none",
                           gradient_checkpointing=False)  # fmt: skip
    batch = {"loss_weights": torch.tensor([1.0, 3.0])} | more
    conds = [hook["cond"], torch.zeros(BATCH, 0, 8), torch.zeros(BATCH, 8), None, None, None]
    unet = lambda z, t, context, y: sd3_model(z, t, context)  # noqa: E731
    trainer = names["SoarTrainer"]()
    call = (args, backward_of(None), None, hook["latents"], batch, conds, unet, None)
    pred, target, *_ = trainer.get_noise_pred_and_target(*call, torch.float32, True)
    loss = F.mse_loss(pred, target, reduction="none").mean([1, 2, 3]) * batch["loss_weights"]
    return trainer.post_process_loss(loss, args, None, None).mean()


def test_sd_scripts_block_is_its_loss_at_lambda_zero(lambda_zero, hook, monkeypatch):
    loss = sd_scripts(hook, monkeypatch)
    draws, z0 = lambda_zero[-1], hook["latents"]
    sigma = soar.sigma_from_t(draws.t)
    s = per_sample(sigma, z0)
    noisy = (1 - s) * z0 + s * draws.z1
    clean = sd3_model(noisy, 1000 * sigma, hook["cond"]) * -s + noisy
    error = ((clean - z0) ** 2).mean([1, 2, 3]) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(loss, error.mean(), rtol=1e-4, atol=0)


def test_sd_scripts_block_takes_a_soar_step(hook, monkeypatch):
    loss = sd_scripts(hook, monkeypatch)
    loss.backward()
    assert loss.isfinite()


def test_sd_scripts_block_refuses_a_mask(hook, monkeypatch):
    with pytest.raises(ValueError, match="masks"):
        sd_scripts(hook, monkeypatch, alpha_masks=torch.ones(BATCH, 8, 8))


def diffsynth(hook, **more):
    """What DiffSynth-Studio's task_to_loss gives a loss, and what of the pipeline it uses."""
    names = vars(recipe(hook["patch"], "soar_diffsynth"))

    def model_fn(dit, latents, timestep, prompt_emb, use_gradient_checkpointing, **kwargs):
        return dit(latents, timestep, prompt_emb)

    sigmas = soar.sigma_from_t(torch.linspace(1, 0.001, 1000), 3.0)
    scheduler = SimpleNamespace(sigmas=sigmas, training_weight=lambda t: 1 + t.sum() / 1000)
    scheduler.timesteps = 1000 * sigmas
    pipe = SimpleNamespace(in_iteration_models=("dit",), torch_dtype=torch.float32, device="cpu")
    pipe.dit, pipe.model_fn, pipe.scheduler = small_model, model_fn, scheduler
    shared = {"input_latents": hook["latents"][:1], "use_gradient_checkpointing": True, "cfg_scale": 2}
    shared |= more
    text = {"prompt_emb": hook["cond"][:1]}
    return names["soar_sft_loss"](pipe, shared, text, {"prompt_emb": text["prompt_emb"] * 0})


def small_model(z, time, cond):
    return sd3_model.net(z, timestep=time, encoder_hidden_states=cond, return_dict=False,
                         pooled_projections=torch.ones(1, 8))[0]  # fmt: skip


def test_diffsynth_block_is_its_loss_at_lambda_zero(lambda_zero, hook):
    loss = diffsynth(hook)
    draws = lambda_zero[-1]
    own = flow_loss(small_model, hook["latents"][:1], draws, hook["cond"][:1], 3.0)
    weight = 1 + soar.sigma_from_t(draws.t).item()
    torch.testing.assert_close(loss, weight * own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["cfg_scale", "min_timestep_boundary", "first_frame_latents"])
def test_diffsynth_block_refuses_what_it_would_get_wrong(name, hook):
    with pytest.raises(ValueError, match="cfg_scale"):
        diffsynth(hook, **{name: 1})


def test_diffsynth_block_takes_a_soar_step(hook):
    loss = diffsynth(hook)
    loss.backward()
    assert loss.isfinite() and len(gradients(sd3_model.net)) > 10


def onetrainer_part(offload=False, activations=False):
    names = {"attention_mask": False, "offloading_enabled": lambda: offload, "activation_offloading": activations}
    return SimpleNamespace(**names)


def onetrainer(hook, transformer=None, kind="STANDARD", **settings):
    """BaseStableDiffusion3Setup.predict at the place of the page's block, then calculate_loss."""
    level_weights = SimpleNamespace(SIGMA="sigma", CONSTANT="constant")
    recipe(hook["patch"], "soar_onetrainer", modules__util__enum__LossWeight={"LossWeight": level_weights})
    names = "self, model, batch, config, generator, scaled_latent_image, timestep, text_encoder_output"
    predict, loss = (textwrap.indent(x, "    ") for x in PAGE["OneTrainer"])
    text = f"def predict({names}, pooled_text_encoder_output):\n{predict}    return {{'own': True}}\n"
    functions = {"torch": torch}
    exec(f"{text}def calculate_loss(data):\n{loss}    return data['own']\n", functions)
    z0, cond = hook["latents"], hook["cond"]
    net = lambda hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict: (  # noqa: E731
        sd3_model(hidden_states, timestep, encoder_hidden_states),)
    model = SimpleNamespace(
        transformer=net, train_dtype=SimpleNamespace(torch_dtype=lambda: torch.float32),
        materialize_only_text_encoders=lambda: None,
        encode_text=lambda text, **x: (randn(12, 1, 5, 8), randn(13, 1, 8)),
        combine_text_encoder_output=lambda *x: x,
    )  # fmt: skip
    scaler = SimpleNamespace(get_scale=lambda batch, steps: batch * steps)
    config = SimpleNamespace(**{
        "mae_strength": 0, "log_cosh_strength": 0, "huber_strength": 0, "masked_training": False,
        "offset_noise_weight": 0.0, "perturbation_noise_weight": 0.0, "mse_strength": 0.5,
        "train_text_encoder_or_embedding": lambda: False, "loss_weight_fn": "sigma", "loss_scaler": scaler,
        "model_type": SimpleNamespace(has_conditioning_image_input=lambda: False), "batch_size": 2,
        "train_text_encoder_2_or_embedding": lambda: False, "train_text_encoder_3_or_embedding": lambda: False,
        "optimizer": SimpleNamespace(fused_back_pass=True), "multi_gpu": False,
        "gradient_accumulation_steps": 3, "transformer": transformer or onetrainer_part(),
        "text_encoder_layer_skip": 0, "text_encoder_2_layer_skip": 0, "text_encoder_3_layer_skip": 0, **settings,
    })  # fmt: skip
    setup = SimpleNamespace(train_device="cpu", setup_train_device=lambda *x: None)
    batch = {"loss_weight": torch.tensor([1.0, 3.0]), "concept_type": [kind] * 2}
    call = (setup, model, batch, config, rng(), z0, torch.tensor([899, 199]), cond, randn(14, BATCH, 8))
    return functions["calculate_loss"](functions["predict"](*call))


def test_onetrainer_block_is_its_loss_at_lambda_zero_with_its_weights_and_times(lambda_zero, hook):
    loss = onetrainer(hook)
    draws, z0, sigma = lambda_zero[-1], hook["latents"], torch.tensor([0.9, 0.2])
    s = per_sample(sigma, z0)
    pred = sd3_model((1 - s) * z0 + s * draws.z1, torch.tensor([899.0, 199.0]), hook["cond"])
    error = ((pred - (draws.z1 - z0)) ** 2).mean([1, 2, 3])
    own = 0.5 * 6 * error * torch.tensor([1.0, 3.0]) * sigma
    torch.testing.assert_close(loss, own.mean(), rtol=1e-4, atol=0)


def test_onetrainer_block_takes_a_soar_step_and_leaves_validation_alone(hook):
    onetrainer(hook).backward()
    assert len(gradients(sd3_model.net)) > 10
    with torch.no_grad():
        assert onetrainer(hook) is True
    refused = {
        "masked": {"masked_training": True},
        "text encoder": {"train_text_encoder_3_or_embedding": lambda: True},
        "prior prediction": {"kind": "PRIOR_PREDICTION"},
        "activation offloading": {"transformer": onetrainer_part(activations=True)},
        "layer offloading": {"transformer": onetrainer_part(offload=True)},
    }
    for what, settings in refused.items():
        with pytest.raises(ValueError, match=what):
            onetrainer(hook, **settings)


def ltx_video(hook, known):
    """LtxvTrainer._training_step from the page's block on; tokens are (B, 64, 16)."""
    encode = {"encode_prompt": lambda *x: {"prompt_embeds": randn(12, 1, 5, 8), "prompt_attention_mask": mask[:1]}}
    sampler = SimpleNamespace(_get_shift_for_sequence_length=lambda tokens: tokens / 64)
    recipe(hook["patch"], "soar_ltx_video", ltxv_trainer__ltxv_utils=encode,
           ltxv_trainer__timestep_samplers={"ShiftedLogitNormalTimestepSampler": sampler})  # fmt: skip
    block = textwrap.indent(PAGE["LTX-Video-Trainer"][0], "    ")
    functions = {}
    exec(f"def step(self, batch, training_batch, model_inputs):\n{block}", functions)
    z0, mask = hook["latents"].flatten(2).mT, torch.ones(BATCH, 5, dtype=torch.bool)

    def transformer(hidden_states, timestep, encoder_hidden_states, **rest):
        image = hidden_states.mT.reshape(hook["latents"].shape)
        assert not timestep[known].any() and torch.equal(hidden_states[known], z0[known])
        return (sd3_model(image, timestep[:, -1], encoder_hidden_states).flatten(2).mT,)

    sampled = SimpleNamespace(negative_prompt="blurry", inference_steps=30, guidance_scale=3.5)
    trainer = SimpleNamespace(
        _config=SimpleNamespace(validation=sampled, seed=1), _accelerator=backward_of(None), _tokenizer=None,
        _text_encoder=None, _transformer=transformer,
    )  # fmt: skip
    prepared = SimpleNamespace(
        latents=z0, conditioning_mask=known, prompt_embeds=hook["cond"], prompt_attention_mask=mask,
        sigmas=torch.tensor([0.9, 0.2]).view(-1, 1, 1),
    )  # fmt: skip
    return functions["step"](trainer, {"latents": {"latents": z0}}, prepared, {"return_dict": False})


@pytest.mark.parametrize("given", [0, 16])
def test_ltx_block_is_its_loss_at_lambda_zero_with_given_frames(given, lambda_zero, hook):
    known = torch.zeros(BATCH, 64, dtype=torch.bool)
    known[:, :given] = True
    loss = ltx_video(hook, known)
    z0, z1, s = hook["latents"].flatten(2).mT, lambda_zero[-1].z1, torch.tensor([0.9, 0.2]).view(-1, 1, 1)
    noisy = torch.where(known.unsqueeze(-1), z0, (1 - s) * z0 + s * z1)
    pred = sd3_model(noisy.mT.reshape(hook["latents"].shape), 1000 * s.flatten(), hook["cond"]).flatten(2).mT
    own = ((pred - (z1 - z0)) ** 2)[:, given:].mean()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)


def test_ltx_block_takes_a_soar_step(hook):
    ltx_video(hook, torch.zeros(BATCH, 64, dtype=torch.bool)).backward()
    assert len(gradients(sd3_model.net)) > 10


def diffusion_pipe(hook):
    """SD3Pipeline in DeepSpeed's engine: prepare_inputs, one layer, the loss of its output."""

    class SD3Pipeline:
        config = {"activation_checkpointing": True}

        def get_call_text_encoder_fn(self, encoder):
            return lambda captions, is_video: {"text": randn(12, 1, 5, 8), "pooled": randn(13, 1, 8)}

        def prepare_inputs(self, inputs, timestep_quantile=None):
            noise, t = torch.randn(inputs["latents"].shape), torch.tensor([0.9, 0.2])
            s = per_sample(t, noise)
            noisy = (1 - s) * inputs["latents"] + s * noise
            return (noisy, 1000 * t, inputs["text"], inputs["pooled"]), (noise - inputs["latents"], inputs["mask"])

        def to_layers(self):
            class Layer(torch.nn.Module):
                def forward(self, x):
                    return sd3_model(x[0], x[1], x[2])

            return [Layer()]

        def get_loss_fn(self):
            return lambda output, label: F.mse_loss(output, label[0])

    module = recipe(hook["patch"], "soar_diffusion_pipe", models__sd3={"SD3Pipeline": SD3Pipeline})
    hook["patch"].setattr(module.SoarPipeline, "__init__", lambda self, config: None)
    pipe = eval(PAGE["diffusion-pipe"][0], {"config": None})
    pipe.get_call_text_encoder_fn(None)
    inputs = {"latents": hook["latents"], "text": hook["cond"], "pooled": randn(14, BATCH, 8), "mask": None}
    features, label = pipe.prepare_inputs(inputs)
    (layer,) = pipe.to_layers()
    return pipe.get_loss_fn()(layer(features), label), label[0] + hook["latents"]


def test_diffusion_pipe_block_is_its_loss_at_lambda_zero_and_its_own_in_evaluation(lambda_zero, hook):
    loss, _ = diffusion_pipe(hook)
    own = flow_loss(sd3_model, hook["latents"], lambda_zero[-1], hook["cond"], 3.0)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)
    with torch.no_grad():
        loss, noise = diffusion_pipe(hook)
    own = flow_loss(sd3_model, hook["latents"], lambda_zero[-1]._replace(z1=noise), hook["cond"], 3.0)
    torch.testing.assert_close(loss, own.detach(), rtol=1e-5, atol=0)


def test_diffusion_pipe_block_takes_a_soar_step(hook):
    diffusion_pipe(hook)[0].backward()
    assert len(gradients(sd3_model.net)) > 10


def unirl(hook, scale=1.0):
    result = collections.namedtuple("AlgorithmStepResult", "loss metrics num_steps has_backward")
    cond = collections.namedtuple("Conditions", "text")

    class FlowMatchSFT:
        conditions_cls, params = None, SimpleNamespace(guidance_scale=1.0)

        def __init__(self, pipeline):
            stage = lambda cond, sample, sigma, params: sd3_model(sample, 1000 * sigma, cond.text)  # noqa: E731
            self.stage = SimpleNamespace(predict_noise_at_step=stage)

        def _clean_latents(self, segment):
            return segment

        def _draw_sigma(self, batch, device, generator):
            return torch.tensor([0.9, 0.2])

    base = {"AlgorithmStepResult": result, "typed_conditions": lambda x, _: x}
    module = recipe(hook["patch"], "soar_unirl", unirl__algorithms__base=base,
                    unirl__algorithms__sft={"FlowMatchSFT": FlowMatchSFT},
                    unirl__types__primitives={"Texts": lambda texts: texts})  # fmt: skip
    text = SimpleNamespace(embed=lambda texts: randn(12, 1, 5, 8).expand(len(texts), -1, -1))
    algorithm = module.FlowMatchSOAR(pipeline=SimpleNamespace(text_embed=text))
    call = {"conditions": cond(hook["cond"]), "segment": hook["latents"], "advantages": None}
    return algorithm.compute_loss_and_backward(**call, training_progress=0.0, loss_scale=scale)


def test_unirl_class_is_its_loss_at_lambda_zero(lambda_zero, hook):
    loss = unirl(hook).loss
    own = flow_loss(sd3_model, hook["latents"], lambda_zero[-1], hook["cond"], 3.0)
    assert loss == pytest.approx(own.item(), rel=1e-5)


def test_unirl_class_takes_a_soar_step_and_scales_every_term(hook):
    found = []
    for scale in (1.0, 0.25):
        sd3_model.net.zero_grad()
        assert unirl(hook, scale).has_backward
        found.append(gradients(sd3_model.net))
    assert len(found[0]) > 10
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x / 4)


def flow_matching(hook, conditioning):
    recipe(hook["patch"], "soar_flow_matching")
    before, inside = PAGE["flow_matching"]
    names = {"torch": torch, "device": "cpu", "t": torch.tensor([0.1, 0.8]), "samples": hook["latents"]}
    names |= {"conditioning": conditioning, "args": SimpleNamespace(cfg_scale=1.5), "calls": []}

    def model(x, t, extra):
        names["calls"].append(extra)
        return sd3_model(x, t, extra.get("label", hook["cond"] * 0))

    names["model"] = model
    exec(before + inside, names)
    return names["loss"], names["calls"]


def test_flow_matching_block_is_its_loss_at_lambda_zero(lambda_zero, hook):
    loss, _ = flow_matching(hook, {"label": hook["cond"]})
    z1, z0, t = lambda_zero[-1].z1, hook["latents"], per_sample(torch.tensor([0.1, 0.8]), hook["latents"])
    own = F.mse_loss(sd3_model((1 - t) * z1 + t * z0, t.flatten(), hook["cond"]), z0 - z1)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)


def test_flow_matching_block_takes_a_soar_step(hook):
    cond = {"label": hook["cond"]}
    loss, calls = flow_matching(hook, cond)
    loss.backward()
    assert loss.isfinite() and calls[-8:] == [cond, {}] + [cond] * 6


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


def shift_of(config, tokens):
    """The scheduler and its shift, as the recipes have it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    c = scheduler.config
    if not c.use_dynamic_shifting:
        return scheduler, c.shift, None
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    return scheduler, math.exp(mu), mu


def flux2_levels(tokens, steps):
    mu = compute_empirical_mu(tokens, steps)
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return math.exp(mu), scheduler.sigmas[:-1]


def pipeline_sigmas(scheduler, mu):
    """The 40 levels that the pipeline of this scheduler steps through, without the final 0."""
    given = {} if mu is None else {"sigmas": np.linspace(1.0, 1 / 40, 40), "mu": mu}
    retrieve_timesteps(scheduler, 40, "cpu", **given)
    return scheduler.sigmas[:-1]


def shift_table() -> str:
    rows = ["| scheduler | shift | largest difference |", "| --- | --- | --- |"]
    found = {}
    for name, (config, tokens) in SCHEDULERS.items():
        scheduler, shift, mu = shift_of(config, tokens)
        found[name] = shift, pipeline_sigmas(scheduler, mu)
    found["Flux.2-dev, 1024 x 1024, 40 steps"] = flux2_levels(4096, 40)
    for name, (shift, theirs) in found.items():
        ours = soar.sigma_from_t(1 - torch.arange(40) / 40, shift)
        rows.append(f"| {name} | {shift:.3f} | {(theirs - ours).abs().max().item():.3f} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_shift_gives_the_pipelines_noise_levels(name):
    config, tokens = SCHEDULERS[name]
    scheduler, shift, mu = shift_of(config, tokens)
    theirs, t = pipeline_sigmas(scheduler, mu), 1 - torch.arange(40, dtype=torch.float64) / 40
    if tokens is None:  # its own spacing
        t = torch.linspace(1, scheduler.sigma_min, 40, dtype=torch.float64)
    ours = soar.sigma_from_t(t, shift)
    if config.get("shift_terminal"):  # its stretch, of ours
        ours = 1 - (1 - ours) * (1 - 0.02) / (1 - ours[-1])
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-6, atol=1e-7)


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
    config = soar.SoarConfig()
    draws = soar.draw(w.z0.shape, config, rng())
    try:
        list(soar.soar_terms(w.right, w.z0, draws, w.cond, list(w.uncond.values()), config))
    except ValueError as error:
        rows.insert(-2, f"| `uncond` of another type than `cond` | `soar_terms` | {error} |")
    try:
        list(soar.soar_terms(w.right, w.z0, draws, w.cond, config=config))
    except ValueError as error:
        rows.insert(-2, f"| `uncond` not passed | `soar_terms` | {error} |")
    try:
        soar.with_levels(draws, torch.linspace(20, 980, 8), config)
    except ValueError as error:
        rows.insert(-2, f"| levels up to 1000 | `with_levels` | {error} |")
    return "\n".join(rows)


def same_up_to_digits(left: str, right: str) -> bool:
    """Equal texts, and numbers within 0.02 or 2 %: they differ in the last digit from one kind of CPU to another."""
    number = r"\d+\.\d+"
    pairs = zip(map(float, re.findall(number, left)), map(float, re.findall(number, right)))
    return re.sub(number, "x", left) == re.sub(number, "x", right) and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in pairs
    )


def table_of(name: str) -> str:
    page = TABLES[name].read_text()
    return re.search(rf"<!-- table: {name} -->\n(.*?)\n?<!-- end -->", page, re.S)[1]


def test_tables_are_what_is_found(world):
    tables = {"shift": shift_table(), "adapters": adapters_table(world), "port": test_check_port.table()}
    for name, found in tables.items():
        written = table_of(name)
        refresh = "python -m experiments.tests.port.test_recipes writes it anew"
        page = TABLES[name].name
        assert same_up_to_digits(written, found), f"table {name} of {page} is not this; {refresh}:\n{found}"


def test_the_block_that_checks_an_adapter_runs(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "check_velocity", check_velocity_module)
    names = {"transformer": world.transformer, "velocity": world.right, "generator": rng()}
    names |= {"z0": world.z0, "cond": world.cond, "uncond": world.uncond}
    exec(PYTHON["checks.md: Is the adapter right?"], names)
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
    model.save_pretrained("output/soar/checkpoint-005000/transformer")
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
            if "train.py" in words and "..." not in words:
                train.parse(words[words.index("train.py") + 1 :])
                found += 1
            if "sample.py" in words:
                tyro.cli(sample.Args, args=words[words.index("sample.py") + 1 :], use_underscores=True)
                found += 1
            if "-m" in words and not words[0].startswith("python3"):
                assert importlib.util.find_spec(words[words.index("-m") + 1])
    assert found >= 3


def main() -> None:
    tables = {"shift": shift_table(), "adapters": adapters_table(World())}
    tables["port"] = test_check_port.table()
    for name, table in tables.items():
        text = TABLES[name].read_text()
        start = f"<!-- table: {name} -->\n"
        text = text.replace(start + table_of(name), start + table + "\n", 1)
        TABLES[name].write_text(text.replace("\n\n<!-- end -->", "\n<!-- end -->"))


if __name__ == "__main__":
    main()
