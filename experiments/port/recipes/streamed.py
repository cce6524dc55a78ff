"""For trainers that call backward on what a method of theirs returned.

`streamed` back-propagates all terms but the last itself, and returns the whole loss with the last
one's graph, so one graph is in memory. Copy it beside soar.py.

backward must do all that the trainer does to the loss it gets back, before and in its own backward:
divide by the accumulation steps, scale by a GradScaler. Clipping and the step come after. `whole`
takes the same arguments and leaves all of the backward to the trainer, with all graphs in memory.
So, from the same seed, the gradients' norm at the first step must be the same with either:

    from streamed import whole as streamed
"""

from soar import draw, soar_loss, soar_terms, with_levels


def streamed(backward, velocity, latents, sigmas, cond, uncond, config, generator, **options):
    z0 = latents.float()
    draws = with_levels(draw(z0.shape, config, generator), sigmas, config)
    points = config.num_rollout_paths * config.num_aux_points if config.lambda_aux > 0 else 0
    total = 0.0
    for i, term in enumerate(soar_terms(velocity, z0, draws, cond, uncond, config, **options)):
        if i < points:
            backward(term.loss)
        total = total + term.loss.detach()
    return term.loss + (total - term.loss.detach())


def whole(_, velocity, latents, sigmas, cond, uncond, config, generator, **options):
    z0 = latents.float()
    draws = with_levels(draw(z0.shape, config, generator), sigmas, config)
    return soar_loss(velocity, z0, draws, cond, uncond, config, **options)
