"""SOAR in kohya-ss/musubi-tuner: run this in place of wan_train_network.py, with its arguments.

EMPTY is what wan_cache_text_encoder_outputs.py writes for an image whose caption is empty. Needs
soar.py and streamed.py beside it.
"""

import torch
from musubi_tuner import wan_train_network as script
from safetensors.torch import load_file
from streamed import streamed

from soar import SoarConfig

EMPTY = "empty_wan_te.safetensors"
config = SoarConfig(num_sampling_steps=50, guidance_scale=5.0, shift=5.0)


class SoarTrainer(script.WanNetworkTrainer):
    def process_batch(self, args, accelerator, transformer, network, batch, latents, noise,
                      noise_scheduler, dit_dtype, network_dtype, vae, global_step):
        if args.weighting_scheme in ("sigma_sqrt", "cosmap"):
            raise ValueError("give streamed the weights of --weighting_scheme, as weighting=")
        if not hasattr(self, "soar"):
            generator = torch.Generator(accelerator.device)
            generator.manual_seed((args.seed or 0) + accelerator.process_index)
            self.soar = generator, *load_file(EMPTY, device=str(accelerator.device)).values()
        generator, empty = self.soar
        _, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, batch["timesteps"], noise_scheduler, accelerator.device, dit_dtype
        )
        offset = 0 if args.timestep_sampling == "sigma" else 1

        def velocity(z, sigma, cond):
            call = (z, 1000 * sigma + offset, network_dtype)
            return self.call_dit(args, accelerator, transformer, latents, cond, noise, *call).pred

        sigmas = (timesteps.float() - offset) / 1000
        uncond = batch | {"t5": [empty] * len(latents)}
        call = (velocity, latents, sigmas, batch, uncond, config, generator)
        return streamed(accelerator.backward, *call), {}


script.WanNetworkTrainer = SoarTrainer
if __name__ == "__main__":
    script.main()
