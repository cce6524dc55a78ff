"""The recipes for diffusers' scripts, in a stub that has the names and the loss of each script.

The model and pipeline are diffusers' own, small. With lambda_aux = 0 the recipe must equal the
script's loss; its rollout must be the first step of the pipeline. The real scripts are run by
`python -m experiments.port.run_recipes`.
"""

import contextlib
import math
import re
import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)  # fmt: skip
from diffusers.training_utils import compute_loss_weighting_for_sd3

import soar
from experiments.port.run_hooks import BATCH, randn, sd3
from experiments.port.run_recipes import FLUX, QWEN, edited, small

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
ARGS = {"weighting_scheme": "none", "with_prior_preservation": False, "seed": None,
        "prior_loss_weight": 0.5, "guidance_scale": 1.0, "offload": False,
        "precondition_outputs": 0}  # fmt: skip
MODULE = {
    "math": math, "torch": torch, "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
    "FluxPipeline": FluxPipeline, "Flux2Pipeline": Flux2Pipeline,
    "QwenImagePipeline": QwenImagePipeline,
    "offload_models": lambda *_, **__: contextlib.nullcontext(),
    "concat_prompt_embedding_batches": lambda *pairs: tuple(torch.cat(x) for x in zip(*pairs)),
}  # fmt: skip


class Script:
    """The script's own forward; its model; given, the names at the place of the loss;
    first_step(z1): the pipeline from z1 to its second noise level."""

    shift, model, sizes = {"shift": 3.0}, "", {}

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        if self.model:
            self.model = small(self.model, **self.sizes)
        else:
            self.model = sd3(SD3Transformer2DModel, torch.float32)
        for parameter in self.model.parameters():  # zeros of a fresh model would hide mistakes
            if parameter.dim() < 2:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.model.to(dtype)
        self.scheduler = FlowMatchEulerDiscreteScheduler(**self.shift)
        self.names = self.given(dtype)
        self.model_input = self.names.pop("model_input").to(dtype)

    def main(self, text, **args):
        """The local names of the script's main, with the recipe pasted by `edited`."""
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), process_index=0, backward=torch.Tensor.backward,
            accumulate=lambda *_: contextlib.nullcontext(),
        )  # fmt: skip
        module = dict(MODULE)
        exec(text, module)
        indices = torch.tensor([10, 950])  # a noisy and a clean level
        given = (accelerator, self.model, self.model_input, indices, self.scheduler)
        torch.manual_seed(101)  # not model_input's: the target would be 0
        return module["main"](SimpleNamespace(**(ARGS | args)), *given, **self.names)

    @classmethod
    def edited(cls, *, self_test: bool) -> str:
        own = textwrap.indent(textwrap.dedent(cls.own).strip(), " " * 16)
        stub = STUB.format(names=", ".join(cls().names), own=own)
        return edited(stub, cls.heading, self_test=self_test)

    def step_of(self, pipe, z1, steps, **call):
        """The pipeline's latents and noise level after one step, with the script's text."""

        def stop(pipe, step, timestep, latents):
            pipe._interrupt = True
            return latents

        text = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
        call |= {name: self.names[name] for name in text if name in self.names}
        call |= {"num_inference_steps": steps, "latents": z1, "output_type": "latent"}
        pipe.set_progress_bar_config(disable=True)
        out = pipe(**call, height=64, width=64, callback_on_step_end=stop, return_dict=False)[0]
        return out, pipe.scheduler.sigmas[1].item()


class SD3(Script):
    own = """
        model_pred = transformer(
            hidden_states=noisy_model_input, timestep=timesteps,
            encoder_hidden_states=prompt_embeds, pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
    """
    heading = "Stable Diffusion 3"

    def given(self, dtype):
        self.empty = randn(12, 1, 5, 8).to(dtype), randn(13, 1, 8).to(dtype)
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "text_encoders": [], "tokenizers": [],
            "prompt_embeds": randn(10, BATCH, 5, 8).to(dtype),
            "pooled_prompt_embeds": randn(11, BATCH, 8).to(dtype),
            "compute_text_embeddings": lambda prompt, *_: self.empty,
        }  # fmt: skip

    def first_step(self, z1):
        empty, pooled = self.empty
        return self.step_of(
            StableDiffusion3Pipeline(self.model, self.scheduler, *[None] * 7), z1, 40,
            negative_prompt_embeds=empty.expand(BATCH, -1, -1), guidance_scale=4.5,
            negative_pooled_prompt_embeds=pooled.expand(BATCH, -1),
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
    heading, shift, model = "Flux.1", FLUX, "FluxTransformer2DModel"

    def given(self, dtype):
        ids = FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, "cpu", dtype)
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "latent_image_ids": ids,
            "prompt_embeds": randn(10, BATCH, 5, 64).to(dtype), "text_ids": torch.zeros(5, 3),
            "pooled_prompt_embeds": randn(11, BATCH, 32).to(dtype),
        }  # fmt: skip

    def first_step(self, z1):
        pipe = FluxPipeline(self.scheduler, *[None] * 5, self.model)
        return self.step_of(pipe, z1, 40, guidance_scale=3.5)


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
    heading, shift, model = "Flux.2", FLUX, "Flux2Transformer2DModel"

    def given(self, dtype):
        latents, text = randn(1, BATCH, 16, 4, 4), randn(10, BATCH, 5, 16).to(dtype)
        return {
            "model_input": latents, "prompt_embeds": text,
            "text_ids": Flux2Pipeline._prepare_text_ids(text),
            "model_input_ids": Flux2Pipeline._prepare_latent_ids(latents),
        }  # fmt: skip

    def first_step(self, z1):
        pipe = Flux2Pipeline(self.scheduler, None, None, None, self.model)
        return self.step_of(pipe, z1.mT.reshape(self.model_input.shape), 50, guidance_scale=4.0)


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
    heading, shift, model = "Qwen-Image", QWEN, "QwenImageTransformer2DModel"
    sizes = {"in_channels": 64, "out_channels": 16}

    def given(self, dtype):
        mask = torch.ones(BATCH, 5, dtype=torch.bool)
        mask[0, 3:] = False
        self.empty = randn(11, 1, 5, 16).to(dtype), torch.ones(1, 5, dtype=torch.bool)
        return {
            "model_input": randn(1, BATCH, 16, 1, 8, 8), "prompt_embeds_mask": mask,
            "prompt_embeds": randn(10, BATCH, 5, 16).to(dtype), "text_encoding_pipeline": None,
            "compute_text_embeddings": lambda prompt, pipeline: self.empty,
        }  # fmt: skip

    def first_step(self, z1):
        empty, mask = self.empty
        negative = {"negative_prompt_embeds": empty.expand(BATCH, -1, -1)}
        negative["negative_prompt_embeds_mask"] = mask.expand(BATCH, -1)
        pipe = QwenImagePipeline(self.scheduler, None, None, None, self.model)
        return self.step_of(pipe, z1, 50, true_cfg_scale=4.0, **negative)


class ZImage(Script):
    own = """
        model_pred = transformer(
            list(noisy_model_input.unsqueeze(2).unbind(dim=0)), (1000 - timesteps) / 1000,
            prompt_embeds, return_dict=False,
        )[0]
        model_pred = -torch.stack(model_pred, dim=0).squeeze(2)
    """
    heading, model = "Z-Image", "ZImageTransformer2DModel"

    def given(self, dtype):
        self.empty = [randn(12, 4, 16).to(dtype)]
        return {
            "model_input": randn(1, BATCH, 16, 8, 8), "text_encoding_pipeline": None,
            "prompt_embeds": [randn(10, 5, 16).to(dtype), randn(11, 3, 16).to(dtype)],
            "compute_text_embeddings": lambda prompt, pipeline: self.empty,
        }  # fmt: skip

    def first_step(self, z1):
        pipe = ZImagePipeline(self.scheduler, None, None, None, self.model)
        negative = self.empty * BATCH
        return self.step_of(pipe, z1, 50, guidance_scale=5.0, negative_prompt_embeds=negative)


SCRIPTS = (SD3, Flux, Flux2, Qwen, ZImage)


def ratio_of(cls, capsys, dtype=torch.float32, **args):
    """What the self-test prints: SOAR at lambda 0 over the script's loss."""
    cls(dtype).main(cls.edited(self_test=True), **args)
    return float(re.search(r"ratio ([\d.]+)$", capsys.readouterr().out, re.M)[1])


@pytest.mark.parametrize("cls", SCRIPTS)
def test_self_test_finds_the_scripts_loss_to_1e_6_and_in_bf16_is_near(cls, capsys):
    for scheme, prior in (("none", False), ("sigma_sqrt", True), ("cosmap", False)):
        args = {"weighting_scheme": scheme, "with_prior_preservation": prior}
        for precondition in {0, int(cls is SD3)}:
            ratio = ratio_of(cls, capsys, precondition_outputs=precondition, **args)
            assert abs(ratio - 1) < 2e-6, args
    assert abs(ratio_of(cls, capsys, dtype=torch.bfloat16) - 1) < 0.02


@pytest.mark.parametrize("cls", SCRIPTS)
def test_recipe_takes_a_soar_step_whose_rollout_is_the_pipelines_first(cls):
    script, graphs = cls(), []
    script.model.register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    with mock.patch.object(soar, "soar_terms", wraps=soar.soar_terms) as terms:
        names = script.main(cls.edited(self_test=False))
    velocity, z0, draws, cond, uncond, config = terms.call_args.args
    rollout = 2 if cls is Qwen else 1
    assert graphs == [True] + [False] * rollout + [True] * 6
    levels = soar.sigma_from_t(draws.t, config.shift)
    torch.testing.assert_close(1000 * levels, names["timesteps"])
    assert math.isfinite(names["logs"]["loss"])
    grads = [x.grad for x in script.model.parameters() if x.grad is not None]
    assert all(x.isfinite().all() for x in grads)
    assert sum(bool(x.any()) for x in grads) > 0.8 * len(grads)

    # From noise; u = 0: the last state is where the rollout ended.
    z1, recorded = randn(5, *z0.shape), mock.Mock(side_effect=velocity)
    draws = draws._replace(z1=z1, t=torch.ones(BATCH), u=torch.zeros_like(draws.u))
    list(soar.soar_terms(recorded, z0, draws, cond, uncond, config))
    state = recorded.call_args.args[0]
    sigma = soar.sigma_from_t(1 - 1 / config.num_sampling_steps, config.shift)
    latents, sigma_pipeline = script.first_step(z1)
    if cls is not SD3:  # whose levels are spaced otherwise
        assert sigma == pytest.approx(sigma_pipeline, rel=1e-5)
    ours, pipeline = (state - z1) / (sigma - 1), (latents - z1) / (sigma_pipeline - 1)
    torch.testing.assert_close(ours, pipeline, rtol=1e-4, atol=1e-4)
