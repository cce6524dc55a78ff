"""SOAR in Nerogar/OneTrainer, Stable Diffusion 3. One sum: by default it reduces gradients in hooks
inside backward, where term by term would be wrong. Needs soar.py beside it; the page says where it
is called. With noise, the trainer's own, it is the loss at lambda 0 on it, without a graph.
"""

from dataclasses import replace

import torch
from modules.util.enum.LossWeight import LossWeight

from soar import SoarConfig, draw, soar_loss, soar_terms, with_levels

SOAR = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


def check(config, batch):
    encoders = config.train_text_encoder_or_embedding, config.train_text_encoder_2_or_embedding
    encoders += (config.train_text_encoder_3_or_embedding,)
    in_hooks = config.optimizer.fused_back_pass or config.multi_gpu
    # Its offloading checkpoints re-entrantly: there hooks fire once a term, even in one sum, and
    # activations that earlier terms need are written over.
    refused = {
        "MAE strength": config.mae_strength,
        "log-cosh strength": config.log_cosh_strength,
        "Huber strength": config.huber_strength,
        "masked training": config.masked_training,
        "offset noise": config.offset_noise_weight,
        "perturbation noise": config.perturbation_noise_weight,
        "training of a text encoder": any(train() for train in encoders),
        "prior prediction": "PRIOR_PREDICTION" in map(str, batch["concept_type"]),
        "activation offloading": config.transformer.activation_offloading,
        "layer offloading with fused back pass or more than one GPU":
            config.transformer.offloading_enabled() and in_hooks,
        "a conditioning image": config.model_type.has_conditioning_image_input(),
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"soar_onetrainer: not with {what}")


def soar_loss_of(setup, model, batch, config, generator, latents, timestep, cond, noise=None):
    check(config, batch)
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
    if noise is not None:
        sft, draws = replace(SOAR, lambda_aux=0.0), draws._replace(z1=noise.float())
        with torch.no_grad():
            (term,) = soar_terms(velocity, z0, draws, cond, config=sft, weighting=weighting)
        return term.loss
    return soar_loss(velocity, z0, draws, cond, uncond, SOAR, weighting=weighting)
