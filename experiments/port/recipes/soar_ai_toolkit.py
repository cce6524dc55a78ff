"""SOAR in ostris/ai-toolkit, for the models of its SDTrainer. Needs soar.py and streamed.py beside
it; the page says where it is called.
"""

import torch
from streamed import streamed

from soar import SoarConfig, correction_target

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.0, shift=3.0)


def soar_loss_of(trainer, batch, timesteps, cond, uncond, mask, multiplier, pred_kwargs):
    t = trainer.train_config
    left_out = t.linear_timesteps, t.linear_timesteps2, t.do_guidance_loss
    left_out += t.diff_output_preservation, t.blank_prompt_preservation
    if t.timestep_type == "weighted" or any(left_out):
        raise ValueError("loss_type soar has no weights by timestep, guidance loss or preservation")
    if not hasattr(trainer, "soar_generator"):
        rank = trainer.accelerator.process_index
        trainer.soar_generator = torch.Generator(trainer.device_torch).manual_seed(rank)
    z0 = batch.latents.float()
    mask = torch.as_tensor(mask, device=z0.device).float()

    def velocity(z, sigma, cond):
        x = trainer.sd.condition_noisy_latents(z, batch)
        v = trainer.predict_noise(x, 1000 * sigma, cond, batch=batch, **pred_kwargs)
        c = correction_target(z, z0, sigma)
        return c + mask.sqrt() * (v.float() - c)

    def backward(loss):  # what the trainer does to the loss that it gets back
        trainer.accelerator.backward(loss * multiplier.mean())

    call = (velocity, z0, timesteps / 1000, cond, uncond, config, trainer.soar_generator)
    return streamed(backward, *call)
