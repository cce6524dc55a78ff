"""SOAR in kohya-ss/sd-scripts, SD3's LoRA: run this in place of sd3_train_network.py, with its
arguments and without --fused_backward_pass. With cached text encoder outputs, "" is encoded if
--sample_prompts has a prompt without a negative one. Needs soar.py and streamed.py beside it.
"""

import sd3_train_network as script
import torch
from library import sd3_train_utils, strategy_base
from streamed import streamed

from soar import SoarConfig

config = SoarConfig(num_sampling_steps=40, guidance_scale=4.5, shift=3.0)


class SoarTrainer(script.Sd3NetworkTrainer):
    def get_noise_pred_and_target(self, args, accelerator, noise_scheduler, latents, batch,
                                  text_encoder_conds, unet, network, weight_dtype, train_unet,
                                  is_train=True):
        if not is_train:  # validation: the trainer's own loss
            call = (args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet)
            call += (network, weight_dtype, train_unet)
            return super().get_noise_pred_and_target(*call, is_train=False)
        masks = args.masked_loss or batch.get("alpha_masks") is not None
        if args.loss_type != "l2" or masks or "custom_attributes" in batch:
            raise ValueError("this recipe is for --loss_type l2, without masks or preservation")
        if not hasattr(self, "soar_generator"):
            self.soar_generator = torch.Generator(accelerator.device)
            self.soar_generator.manual_seed(args.seed + accelerator.process_index)
        noise = torch.randn_like(latents)
        levels = (args, latents, noise, accelerator.device, weight_dtype)
        _, timesteps, _ = sd3_train_utils.get_noisy_model_input_and_timesteps(*levels)
        strategy = strategy_base.TextEncodingStrategy.get_strategy()

        def text(conds):  # context, pooled
            lg_out, t5_out, lg_pooled = (x.to(latents.device) for x in conds[:3])
            return strategy.concat_encodings(lg_out, t5_out, lg_pooled)

        def velocity(z, sigma, cond):
            z = z.detach().requires_grad_(args.gradient_checkpointing)
            with accelerator.autocast():
                return unet(z, (1000 * sigma).to(weight_dtype), context=cond[0], y=cond[1])

        def weighting(sigma):  # the script compares clean latents
            w = sd3_train_utils.compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
            return w * sigma**2 * batch["loss_weights"].to(sigma)

        cond, empty = text(text_encoder_conds), text(self.sample_prompts_te_outputs[""])
        uncond = tuple(x.expand(len(latents), *x.shape[1:]) for x in empty)
        call = (velocity, latents, timesteps / 1000, cond, uncond, config, self.soar_generator)
        self.soar_loss = streamed(accelerator.backward, *call, weighting=weighting)
        return latents, latents, timesteps, None  # their loss is 0; the next method gives ours

    def post_process_loss(self, loss, args, timesteps, noise_scheduler):
        return self.__dict__.pop("soar_loss", loss)


if __name__ == "__main__":
    parser = script.setup_parser()
    args = script.train_util.read_config_from_file(parser.parse_args(), parser)
    SoarTrainer().train(args)
