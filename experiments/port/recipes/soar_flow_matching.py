"""SOAR in facebookresearch/flow_matching, examples/image. One sum, as its loss scaler steps after
each backward. Needs soar.py beside it; the page says where it is called.
"""

import torch

from soar import SoarConfig, draw, soar_loss, with_levels


def soar_loss_of(model, samples, t, conditioning, generator, cfg_scale):
    """samples from -1 to 1; t as the trainer draws it: 1 at clean data."""
    # It samples with v + g (v - v_uncond). A batch whose labels are dropped has conditioning {},
    # so its rollout is unguided: cond is uncond.
    config = SoarConfig(num_sampling_steps=50, guidance_scale=1 + cfg_scale, shift=1.0)

    def velocity(z, sigma, cond):  # the model predicts data - noise
        with torch.autocast("cuda"):
            return -model(z, 1 - sigma, extra=cond)

    draws = with_levels(draw(samples.shape, config, generator), 1 - t, config)
    return soar_loss(velocity, samples, draws, conditioning, {}, config)
