"""Is a velocity adapter right? A few forwards of a trained model tell, and name mistake and mend.

    generator = torch.Generator(z0.device).manual_seed(0)
    check_velocity(velocity, z0, cond, uncond, generator=generator)

A trained velocity is a conditional mean: no other function of (z, sigma, cond) is nearer to z1 - z0
on average. So an adapter is wrong where its negative, say, or its value at 1 - sigma is nearer. To
be copied beside soar.py: it needs nothing else.
"""

from typing import Any

import torch
from torch import Tensor

from soar import Velocity, correction_target, interpolate, sft_loss

LEAST_LEVELS = 8  # of sigma, that are tried
GIVEN = 1e-4  # an element of the velocity is given, not predicted, if it is nearer to the exact one
REVERSED = "time runs the other way"
TOO_LOW = "the model takes times up to 1000 and is given times up to 1"
TOO_HIGH = "the model takes times up to 1 and is given times up to 1000"
TIMES = {  # what is wrong where the adapter fits when it is called with this
    "sigma": ("", lambda s: s),
    "1000 * sigma": (TOO_LOW, lambda s: 1000 * s),
    "sigma / 1000": (TOO_HIGH, lambda s: s / 1000),
    "1 - sigma": (REVERSED, lambda s: 1 - s),
    "1000 * (1 - sigma)": (f"{REVERSED}, and up to 1000", lambda s: 1000 * (1 - s)),
    "(1 - sigma) / 1000": (f"{REVERSED}, and up to 1", lambda s: (1 - s) / 1000),
}
OUTPUTS = {  # what is wrong where this, made of what the adapter returns, fits
    "V": ("", lambda v, z, s: v),
    "-V": ("the sign is reversed", lambda v, z, s: -v),
    "(V - z) / (1 - sigma)": ("the model predicts noise", lambda v, z, s: (v - z) / (1 - s)),
    "(z - V) / sigma": ("the model predicts clean data", lambda v, z, s: (z - v) / s),
}


def _relative_errors(
    velocity: Velocity, z0: Tensor, cond: Any, other_cond: Any, generator: torch.Generator
) -> tuple[dict[tuple[str, str], float], float]:
    """Relative error of each (time, output); relative square of what changes with other_cond."""
    errors = {(time, output): 0.0 for time in TIMES for output in OUTPUTS}
    errors |= {("VP", "V"): 0.0, ("VP", "noise"): 0.0}
    size, change = 0.0, 0.0
    rounds = -(-LEAST_LEVELS // len(z0))
    for i in range(rounds):
        z1 = torch.randn(z0.shape, generator=generator, device=generator.device).to(z0)
        place = torch.arange(len(z0), device=z0.device) + (i + 0.5) / rounds
        sigma = 0.1 + 0.8 * place / len(z0)
        z = interpolate(z0, z1, sigma)
        s = sigma.view(-1, *[1] * (z0.ndim - 1))
        given = None

        def error(v):
            if given is not None:
                v = torch.where(given, z1.float() - z0.float(), v)
            mean = sft_loss(lambda *_: v, z0, z1, sigma, cond).mean()
            return mean.nan_to_num(torch.inf, torch.inf).item()

        for time, (_, at) in TIMES.items():
            v = velocity(z.to(z0.dtype), at(sigma), cond)
            if given is None:
                error(v)  # sft_loss checks it
                # A known region comes back exact, whatever the model does elsewhere: left out.
                given = (v - correction_target(z.to(z0.dtype), z0, sigma)).abs() < GIVEN
                given &= ~given.all()
            for output, (_, made) in OUTPUTS.items():
                errors[time, output] += error(made(v, z, s))
            if time == "sigma" and other_cond is not None:
                other = velocity(z.to(z0.dtype), sigma, other_cond)
                moved = (other.float() - v.float()).square().sum() / v.float().square().sum()
                change += moved.item() / rounds

        # A state of the straight path, scaled like this, is one of a variance-preserving path. The
        # velocity, from noise that is predicted there: the adapter may return that noise, or have
        # made a velocity of it already.
        scaled = z / (s**2 + (1 - s) ** 2).sqrt()
        v = velocity(scaled.to(z0.dtype), sigma, cond)
        errors["VP", "noise"] += error((v - z) / (1 - s))
        errors["VP", "V"] += error(v + (scaled - z) / (1 - s))
        size += error(torch.zeros_like(z))
    return {key: x / size for key, x in errors.items()}, change


@torch.no_grad()
def check_velocity(
    velocity: Velocity, z0: Tensor, cond: Any, other_cond: Any = None, *, generator: torch.Generator
) -> float:
    """Relative error |v - (z1 - z0)|^2 / |z1 - z0|^2 of a trained model's adapter, over sigma from
    0.1 to 0.9.

    Args:
        velocity: as soar_terms takes it, of a *trained* model in eval mode. It is called at times
            far outside [0, 1] too; an adapter that looks times up in a table may raise an error of
            its own there.
        z0: (B, ...) clean latents like those of the model's training. A level of sigma is tried for
            each, and at least 8 in all, each with 7 forwards.
        cond, other_cond: z0's conditioning, and any other one, such as uncond, to see that the
            model heeds it (None: not checked; else an eighth forward). Passed on untouched.
        generator: of the noise z1.
    Returns:
        The relative error: 0 is exact, 1 is that of a velocity that is always 0. A guided velocity,
        or prompts of other images, make it larger and raise nothing: compare it with the model's
        training loss over |z1 - z0|^2. Elements that come back exact, as given frames do, count in
        neither.
    Raises:
        ValueError: the velocity at another time, negated, or taken for a prediction of noise or
            clean data, fits better by a tenth: says which. Or z0 is not scaled; the model was
            trained on a variance-preserving path; nothing fits, all errors being above 0.9;
            other_cond gives the same velocity. Or as soar.sft_loss.
    Source: the flow-matching loss is least at the conditional mean, arXiv 2209.03003, section 2.
    """
    errors, change = _relative_errors(velocity, z0, cond, other_cond, generator)
    given = errors["sigma", "V"]
    time, output = min(errors, key=errors.get)
    least = errors[time, output]
    found = f"velocity(z, sigma, cond) has the relative error {given:.2f}"

    spread = z0.float().std().item()
    if not 0.8 < spread < 1.25:
        scaled, _ = _relative_errors(velocity, z0 / spread, cond, None, generator)
        unit = min(scaled.values())
        if unit < 0.7 * least:
            raise ValueError(
                f"z0 has the standard deviation {spread:.2f} and the relative error {least:.2f}; "
                f"divided by {spread:.2f} it has {unit:.2f}: shift and scale latents as the "
                "model's pipeline does before it decodes them, the other way round"
            )
    if min(given, least) > 0.9:
        raise ValueError(
            f"{found}, and nothing made of it fits z0 better: is the model trained, and on such "
            "data?"
        )
    if least < 0.9 * given and time == "VP":
        raise ValueError(
            f"{found}, noise predicted from z / sqrt(sigma^2 + (1 - sigma)^2) has {least:.2f}: the "
            "model was trained on a variance-preserving path (SD 1.5, SDXL); soar.py is for the "
            "straight path and cannot train it"
        )
    if least < 0.9 * given:
        mend = output.replace("V", f"velocity(z, {time}, cond)")
        wrong = " and ".join(filter(None, (OUTPUTS[output][0], TIMES[time][0])))
        wrong += "; let the adapter return the latter"
        raise ValueError(f"{found}, {mend} has {least:.2f}: {wrong}")
    if change < 1e-6 and other_cond is not None:
        raise ValueError(
            f"{found}, and the same values for cond and other_cond: the model ignores its "
            "conditioning, or are cond and other_cond the same?"
        )
    return given
