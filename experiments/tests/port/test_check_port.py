"""check_port passes right ports for every bound and shift, and names each mistake of a table: it
is part of checks.md, and test_recipes_pages.py holds it against what is found."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import soar
from experiments.port.check_port import CONFIGS, check_port

# As someone may write it who has read the paper and not soar.py.
PORT = '''
def port(velocity, z0, z1, t, cond, uncond, config):
    level = lambda t: config.shift * t / (1 + (config.shift - 1) * t)
    expand = lambda sigma: sigma.view(-1, 1, 1, 1)
    sigma = level(t)
    sigma_next = level((t - 1 / config.num_sampling_steps).clamp(min=config.t_min))
    sigma_upper = (sigma * config.sigma_upper_ratio).clamp(max=1)
    z = (1 - expand(sigma)) * z0 + expand(sigma) * z1
    with torch.no_grad():
        v_cond = velocity(z, sigma, cond)
        v_uncond = velocity(z, sigma, uncond)
        v_cfg = v_uncond + config.guidance_scale * (v_cond - v_uncond)
        z_hat = z + expand(sigma_next - sigma) * v_cfg
    for n in range(config.num_aux_points):
        u = torch.rand(len(t), generator=rng)
        sigma_aux = sigma_next + u * (sigma_upper - sigma_next)
        alpha = expand((sigma_aux - sigma_next) / (1 - sigma_next))
        z_aux = (1 - alpha) * z_hat + alpha * z1
        target = (z_aux - z0) / expand(sigma_aux)
        v_aux = velocity(z_aux, sigma_aux, cond)
        yield z_aux, sigma_aux, target
'''

MISTAKES = {  # in words: what is changed in the port
    "mixed toward the bound, labelled as if toward z1 (a public fork)": (
        "/ (1 - sigma_next)", "/ (sigma_upper - sigma_next)"),
    "the model's timestep rounded to a table of 1000": (
        "sigma_aux, cond)", "(1000 * sigma_aux).round() / 1000, cond)"),
    "the label rounded to that table": (
        "yield z_aux, sigma_aux", "yield z_aux, (1000 * sigma_aux).floor() / 1000"),
    "fresh noise": ("alpha * z1", "alpha * torch.randn(z1.shape, generator=rng)"),
    "guidance on the trained branch": (
        "sigma_aux, cond)", "sigma_aux, cond) + velocity(z_aux, sigma_aux, uncond)"),
    "`v_cond` and `v_uncond` swapped": ("v_uncond + config", "v_cond - config"),
    "guidance added to `v_cond`": ("v_cfg = v_uncond", "v_cfg = v_cond"),
    "an unguided rollout": ("* v_cfg", "* v_cond"),
    "no rollout": ("* v_cfg", "* (z1 - z0)"),
    "`sigma` and `sigma_next` swapped in the step": ("sigma_next - sigma)", "sigma - sigma_next)"),
    "alpha from `sigma`": ("sigma_next) / (1 - sigma_next)", "sigma) / (1 - sigma)"),
    "alpha not divided": (" / (1 - sigma_next)", ""),
    "`v`'s sign reversed in the step": ("* v_cfg", "* -v_cfg"),
    "a step of 1 / K in sigma": (
        "level((t - 1 / config.num_sampling_steps).clamp(min=config.t_min))",
        "(sigma - 1 / config.num_sampling_steps).clamp(min=0)"),
    "two steps": ("(t - 1 / config", "(t - 2 / config"),
    "a floor of 0": (".clamp(min=config.t_min)", ".clamp(min=0)"),
    "another number of steps": ("config.num_sampling_steps", "30"),
    "the clean end not kept": (".clamp(min=config.t_min)", ""),
    "the bound not kept": ("u * (sigma_upper", "u * (1"),
    "a target in bf16": (
        "(z_aux - z0) / expand(sigma_aux)",
        "((z_aux.bfloat16() - z0.bfloat16()) / expand(sigma_aux).bfloat16()).float()"),
    "states in bf16": ("(1 - alpha) * z_hat + alpha * z1",
                       "((1 - alpha) * z_hat + alpha * z1).bfloat16().float()"),
    "divided by `sigma_next`": ("z0) / expand(sigma_aux)", "z0) / expand(sigma_next)"),
    "SFT's target": ("(z_aux - z0) / expand(sigma_aux)", "z1 - z0"),
    "the target's sign reversed": ("(z_aux - z0) /", "(z0 - z_aux) /"),
    "the rollout with a graph": ("torch.no_grad()", "torch.enable_grad()"),
    "levels up to 1000": ("yield z_aux, sigma_aux", "yield z_aux, 1000 * sigma_aux"),
    "`velocity` given times up to 1000": ("sigma_aux, cond)", "1000 * sigma_aux, cond)"),
    "labels in t": ("yield z_aux, sigma_aux",
                    "yield z_aux, sigma_aux / (config.shift - (config.shift - 1) * sigma_aux)"),
    "time runs the other way": ("yield z_aux, sigma_aux", "yield z_aux, 1 - sigma_aux"),
}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*change: str):
    """PORT, with the first text made the second."""
    names = {"torch": torch, "rng": rng(1)}
    exec(PORT.replace(*change), names)
    return names["port"]


def soar_itself(velocity, z0, z1, t, cond, uncond, config):
    """soar_terms as a port: its states are those the model is called with, its targets follow from
    two models."""
    draws = soar.draw(z0.shape, config, rng(2))._replace(z1=z1, t=t)
    model = mock.Mock(side_effect=velocity)
    terms = list(soar.soar_terms(model, z0, draws, cond, uncond, config))
    states = [call.args[:2] for call in model.call_args_list[1 - len(terms) :]]
    assert len(states) == config.num_aux_points
    return [(z, sigma, soar.correction_target(z, z0, sigma)) for z, sigma in states]


BATCHED = ("""        v_cond = velocity(z, sigma, cond)
        v_uncond = velocity(z, sigma, uncond)
""", """        both = torch.cat([z, z]), torch.cat([sigma, sigma]), torch.cat([uncond, cond])
        v_uncond, v_cond = velocity(*both).chunk(2)
""")  # fmt: skip
IN_BF16 = ("velocity(z_aux, ", "velocity(z_aux.bfloat16(), ")
NOT_CALLED = ("        v_aux = velocity(z_aux, sigma_aux, cond)\n", "")
UNBOUND = ("sigma * config.sigma_upper_ratio", "sigma / sigma")


@pytest.mark.parametrize("change", [("", ""), BATCHED, IN_BF16, NOT_CALLED, UNBOUND])
def test_a_right_port_passes(change):
    assert change[0] in PORT
    configs = [soar.SoarConfig()] if change is UNBOUND else CONFIGS
    assert check_port(made(*change), configs, generator=rng()) < 5e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), shift=st.floats(0.3, 12.0), steps=st.integers(2, 200),
    w=st.floats(0.0, 9.0), ratio=st.floats(1.0, 4.0) | st.just(float("inf")),
    points=st.integers(1, 7),
)  # fmt: skip
def test_a_right_port_passes_for_every_bound_and_shift(seed, shift, steps, w, ratio, points):
    config = soar.SoarConfig(shift=shift, num_sampling_steps=steps, guidance_scale=w,
                             sigma_upper_ratio=ratio, num_aux_points=points)  # fmt: skip
    for port in (made("", ""), soar_itself):
        assert check_port(port, [config], generator=rng(seed)) < 1e-4


def table() -> str:
    rows = ["| mistake | message |", "| --- | --- |"]
    for mistake, (old, new) in MISTAKES.items():
        assert PORT.count(old) == 1, mistake
        with pytest.raises(ValueError) as caught:
            check_port(made(old, new), generator=rng())
        rows.append(f"| {mistake} | {caught.value} |")
    return "\n".join(rows)
