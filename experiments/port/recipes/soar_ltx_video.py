"""SOAR in Lightricks/LTX-Video-Trainer, without reference videos; a given first frame is kept.
Needs soar.py and streamed.py beside it; the page says where it is called.
"""

import math

import torch
from ltxv_trainer.ltxv_utils import encode_prompt
from ltxv_trainer.timestep_samplers import ShiftedLogitNormalTimestepSampler as Sampler
from streamed import streamed

from soar import SoarConfig, correction_target


def soar_loss_of(trainer, batch, prepared, model_inputs):
    z0, known = batch["latents"]["latents"].float(), prepared.conditioning_mask
    if prepared.latents.shape != z0.shape:
        raise ValueError("this recipe is for conditioning mode none, without reference videos")
    sampled = trainer._config.validation
    if not hasattr(trainer, "soar"):
        generator = torch.Generator(z0.device)
        generator.manual_seed(trainer._config.seed + trainer._accelerator.process_index)
        with torch.no_grad():  # uncond is what you sample with: here a negative prompt
            call = (trainer._tokenizer, trainer._text_encoder, sampled.negative_prompt)
            trainer.soar = generator, encode_prompt(*call)
    generator, negative = trainer.soar
    cond = {"encoder_hidden_states": prepared.prompt_embeds}
    cond |= {"encoder_attention_mask": prepared.prompt_attention_mask}
    uncond = {
        name: negative[key].to(like).expand(len(z0), *like.shape[1:])
        for (name, like), key in zip(cond.items(), ("prompt_embeds", "prompt_attention_mask"))
    }
    config = SoarConfig(
        num_sampling_steps=max(40, sampled.inference_steps),
        guidance_scale=sampled.guidance_scale,
        shift=math.exp(Sampler._get_shift_for_sequence_length(z0.shape[1])),
    )
    given, free = known.unsqueeze(-1), 1 - known.float().mean(1)

    def velocity(z, sigma, cond):  # given tokens are clean, at time 0; their error is 0
        new = {"hidden_states": torch.where(given, z0, z).to(prepared.latents.dtype)}
        new["timestep"] = torch.where(known, 0, 1000 * sigma.unsqueeze(1))
        v = trainer._transformer(**(model_inputs | cond | new))[0]
        return torch.where(given, correction_target(z, z0, sigma), v.float())

    call = (velocity, z0, prepared.sigmas.flatten(), cond, uncond, config, generator)
    return streamed(trainer._accelerator.backward, *call, weighting=lambda sigma: 1 / free)
