"""SOAR in bghira/SimpleTuner. Needs soar.py and streamed.py beside it; the page says where it is
called.
"""

import torch
from streamed import streamed

from soar import SoarConfig

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


def soar_loss_of(trainer, batch):
    if getattr(trainer.config, "loss_type", "l2") != "l2":
        raise ValueError("SOAR is for loss_type l2")
    latents, model = batch["latents"], trainer.model
    if not hasattr(trainer, "soar_generator"):
        seed = (trainer.config.seed or 0) + trainer.accelerator.process_index
        trainer.soar_generator = torch.Generator(latents.device).manual_seed(seed)
    empty = batch["negative_encoder_hidden_states"]
    uncond = {
        "encoder_hidden_states": empty,
        "prompt_embeds": empty,
        "add_text_embeds": batch.get("negative_add_text_embeds"),
        "encoder_attention_mask": batch.get("negative_encoder_attention_mask"),
    }

    def velocity(z, sigma, cond):
        new = {"noisy_latents": z.to(latents.dtype), "sigmas": sigma.view(-1, *[1] * (z.ndim - 1))}
        new["timesteps"] = model.flow_matching_timesteps_from_sigmas(sigma)
        v = trainer.model_predict(prepared_batch={**batch, **cond, **new})["model_prediction"]
        return model.prediction_to_noiseward_flow(v)

    sigmas = batch["sigmas"].reshape(len(latents), -1)[:, 0]
    call = (velocity, latents, sigmas, {}, uncond, config, trainer.soar_generator)
    return streamed(trainer.accelerator.backward, *call)
