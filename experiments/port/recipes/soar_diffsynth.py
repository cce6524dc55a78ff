"""SOAR in modelscope/DiffSynth-Studio: one sum, as the loss is made inside the module that DDP
wraps, and DeepSpeed is common. Its gradient checkpointing keeps the memory down. Needs soar.py
beside it.
"""

import functools

import torch

from soar import SoarConfig, draw, soar_loss, with_levels

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.0, shift=3.0)


@functools.cache
def generator(device):  # another one on each rank
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator(device).manual_seed(rank)


def soar_sft_loss(pipe, shared, cond, uncond):
    levels = shared.get("min_timestep_boundary", 0), shared.get("max_timestep_boundary", 1)
    given = {"first_frame_latents", "noise_scale"} & set(shared)
    if shared["cfg_scale"] == 1 or levels != (0, 1) or given:
        raise ValueError("this recipe is for a cfg_scale not 1, all levels, no given frame or "
                         "noise_scale")
    models = {name: getattr(pipe, name) for name in pipe.in_iteration_models}
    z0 = shared["input_latents"].float()
    times = pipe.scheduler.timesteps
    time = times[torch.randint(0, len(times), (1,))].to(pipe.torch_dtype)  # in bf16 a rounded one
    sigma = pipe.scheduler.sigmas[(times - time).abs().argmin()].view(1).to(z0)

    def velocity(z, sigma, text):
        inputs = shared | text | {"latents": z.to(pipe.torch_dtype)}
        return pipe.model_fn(**models, **inputs, timestep=(1000 * sigma).to(pipe.torch_dtype))

    def weighting(sigma):
        return pipe.scheduler.training_weight(1000 * sigma).reshape(1).to(sigma)

    draws = with_levels(draw(z0.shape, config, generator(z0.device)), sigma, config)
    return soar_loss(velocity, z0, draws, cond, uncond, config, weighting=weighting)
