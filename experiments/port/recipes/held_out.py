"""The error on pairs that are not trained on, by level of noise. Needs soar.py beside it."""

import torch

from soar import sft_loss

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)  # sigma


@torch.no_grad()
def held_out_errors(velocity, pairs):
    """{sigma: mean error}. velocity: as for soar_terms, of the model in eval mode; pairs: a list of
    z0 (1, ...), a clean latent, and its cond. The noise of a pair is a function of its place."""
    sums = dict.fromkeys(LEVELS, 0.0)
    for i, (z0, cond) in enumerate(pairs):
        z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(i)).to(z0.device)
        for level in LEVELS:
            sigma = torch.full((1,), level, device=z0.device)
            sums[level] += sft_loss(velocity, z0.float(), z1, sigma, cond).item()
    return {level: total / len(pairs) for level, total in sums.items()}
