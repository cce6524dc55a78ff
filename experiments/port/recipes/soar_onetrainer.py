"""SOAR in Nerogar/OneTrainer, Stable Diffusion 3. One sum: by default it reduces gradients in hooks
inside backward, where term by term would be wrong. Needs soar.py beside it; the page says where it
is called.
"""

import torch
from modules.util.enum.LossWeight import LossWeight

from soar import SoarConfig, draw, soar_loss, with_levels

SOAR = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


def soar_loss_of(setup, model, batch, config, generator, latents, timestep, cond):
    left_out = config.mae_strength, config.log_cosh_strength, config.huber_strength
    left_out += config.masked_training, config.offset_noise_weight
    left_out += config.perturbation_noise_weight, config.train_text_encoder_or_embedding()
    if any(left_out) or config.model_type.has_conditioning_image_input():
        raise ValueError("this recipe is for a mean squared error of the transformer, without "
                         "masks, other losses, other noise or a trained text encoder")
    if not hasattr(setup, "soar_empty"):
        model.materialize_only_text_encoders()
        with torch.no_grad():
            encoded = model.encode_text(
                text="",
                train_device=setup.train_device,
                text_encoder_1_layer_skip=config.text_encoder_layer_skip,
                text_encoder_2_layer_skip=config.text_encoder_2_layer_skip,
                text_encoder_3_layer_skip=config.text_encoder_3_layer_skip,
                apply_attention_mask=config.transformer.attention_mask,
            )
            setup.soar_empty = model.combine_text_encoder_output(*encoded)
        setup.setup_train_device(model, config)
    z0, dtype = latents.float(), model.train_dtype.torch_dtype()
    uncond = tuple(x.to(z0.device).expand(len(z0), *x.shape[1:]) for x in setup.soar_empty)

    def velocity(z, sigma, cond):  # its times run from 0 to 999, one below 1000 sigma
        text, pooled = (x.to(dtype) for x in cond)
        options = {"timestep": 1000 * sigma - 1, "return_dict": False}
        options |= {"encoder_hidden_states": text, "pooled_projections": pooled}
        return model.transformer(hidden_states=z.to(dtype), **options)[0]

    def weighting(sigma):
        scale = config.loss_scaler.get_scale(config.batch_size, config.gradient_accumulation_steps)
        by_level = sigma if config.loss_weight_fn == LossWeight.SIGMA else torch.ones_like(sigma)
        return config.mse_strength * scale * batch["loss_weight"].to(sigma) * by_level

    draws = with_levels(draw(z0.shape, SOAR, generator), (timestep + 1) / 1000, SOAR)
    return soar_loss(velocity, z0, draws, cond, uncond, SOAR, weighting=weighting)
