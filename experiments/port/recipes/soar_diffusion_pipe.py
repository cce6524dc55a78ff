"""SOAR in tdrussell/diffusion-pipe, Stable Diffusion 3, with pipeline_stages = 1. The engine calls
backward once, so it is one sum. Needs soar.py beside it; the page says where it is named.
"""

import torch
from models.sd3 import SD3Pipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

from soar import SoarConfig, draw, soar_loss, with_levels

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


class SoarPipeline(SD3Pipeline):
    checkpointable_layers = []  # SoarLayer does it: the engine's would see one layer only
    empty = {}

    def get_call_text_encoder_fn(self, text_encoder):
        encode = super().get_call_text_encoder_fn(text_encoder)
        with torch.no_grad():
            self.empty = self.empty | encode([""], [False])
        return encode

    def prepare_inputs(self, inputs, timestep_quantile=None):
        if inputs["mask"] is not None or {"huber_delta", "smooth_l1_beta"} & set(self.config):
            raise ValueError("this recipe is for a mean squared error without masks")
        z0 = inputs["latents"].float()
        empty = {key: x.to(z0).expand(len(z0), *x.shape[1:]) for key, x in self.empty.items()}
        features, label = super().prepare_inputs(inputs, timestep_quantile)
        (_, _, *uncond), _ = super().prepare_inputs(inputs | empty)
        return (*features, z0, *uncond), label

    def to_layers(self):
        return [SoarLayer(super().to_layers(), self.config["activation_checkpointing"])]

    def get_loss_fn(self):
        own = super().get_loss_fn()
        return lambda output, label: output if output.ndim == 0 else own(output, label)


class SoarLayer(nn.Module):
    def __init__(self, layers, checkpointing):
        super().__init__()
        self.layers, self.checkpointing = nn.ModuleList(layers), checkpointing
        self.generator = None

    def predict(self, x):
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x

    def forward(self, inputs):
        noisy, timestep, text, pooled, z0, empty, empty_pooled = inputs
        if not torch.is_grad_enabled():  # evaluation: the trainer's own loss
            return self.predict((noisy, timestep, text, pooled))
        if self.generator is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            self.generator = torch.Generator(z0.device).manual_seed(rank)

        def velocity(z, sigma, cond):
            return self.predict((z.detach(), 1000 * sigma, *cond))  # it sets requires_grad

        draws = with_levels(draw(z0.shape, config, self.generator), timestep / 1000, config)
        return soar_loss(velocity, z0, draws, (text, pooled), (empty, empty_pooled), config)
