"""SOAR in Tencent-Hunyuan/UniRL: name FlowMatchSOAR in a recipe of its FlowMatchSFT for SD3. Needs
soar.py and streamed.py beside it.
"""

import torch
from streamed import streamed
from unirl.algorithms.base import AlgorithmStepResult, typed_conditions
from unirl.algorithms.sft import FlowMatchSFT
from unirl.types.primitives import Texts

from soar import SoarConfig

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


class FlowMatchSOAR(FlowMatchSFT):
    def __init__(self, *, pipeline, **options):
        super().__init__(pipeline=pipeline, **options)
        self.soar_text, self.soar_generator = pipeline.text_embed, None

    def compute_loss_and_backward(self, *, conditions, segment, advantages, training_progress,
                                  loss_scale):
        x0 = self._clean_latents(segment)
        if x0 is None:
            return AlgorithmStepResult(0.0, {}, 0, has_backward=False)
        if self.params.guidance_scale != 1:
            raise ValueError("params.guidance_scale must be 1: the rollout alone is guided")
        if self.soar_generator is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            self.soar_generator = torch.Generator(x0.device).manual_seed(rank)
        cond = typed_conditions(conditions, self.conditions_cls)
        with torch.no_grad():
            empty = self.soar_text.embed(Texts(texts=[""] * len(x0)))
        uncond = type(cond)(text=empty)

        def velocity(z, sigma, cond):
            call = {"sample": z, "sigma": sigma, "params": self.params}
            return self.stage.predict_noise_at_step(cond, **call)

        def backward(loss):
            (loss * loss_scale).backward()

        sigmas = self._draw_sigma(len(x0), x0.device, None)
        call = (velocity, x0, sigmas, cond, uncond, config, self.soar_generator)
        loss = streamed(backward, *call)
        backward(loss)
        metrics = {"soar": loss.item(), "sigma_mean": sigmas.mean().item()}
        return AlgorithmStepResult(loss.item(), metrics, len(x0), has_backward=True)
