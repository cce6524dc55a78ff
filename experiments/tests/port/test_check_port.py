"""check_port passes right ports for every bound and shift, and refuses each mistake of a table.

The table is part of checks.md, which test_check_velocity.py keeps.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import soar
from experiments.port.check_port import check_port

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

MISTAKES = {  # in words: what is changed in the port, and what the message must name
    "mixed toward the bound, labelled as if toward z1 (a public fork)": (
        "(1 - sigma_next))\n        z_aux", "(sigma_upper - sigma_next))\n        z_aux",
        "alpha is divided by sigma_upper - sigma_next"),
    "the model's timestep rounded to a table of 1000": (
        "velocity(z_aux, sigma_aux,", "velocity(z_aux, (1000 * sigma_aux).round() / 1000,",
        "velocity is called .* table"),
    "the label rounded to that table": (
        "yield z_aux, sigma_aux", "yield z_aux, (1000 * sigma_aux).floor() / 1000",
        "labelled .* table"),
    "fresh noise": (
        "alpha * z1", "alpha * torch.randn(z1.shape, generator=rng)", "fresh noise"),
    "guidance on the trained branch": (
        "cond)\n        yield", "cond) + velocity(z_aux, sigma_aux, uncond)\n        yield",
        "guidance belongs to the rollout"),
    "`v_cond` and `v_uncond` swapped": (
        "v_uncond + config.guidance_scale * (v_cond - v_uncond)",
        "v_cond + config.guidance_scale * (v_uncond - v_cond)", "swapped"),
    "guidance added to `v_cond`": ("v_cfg = v_uncond", "v_cfg = v_cond", "added to v_cond"),
    "an unguided rollout": ("* v_cfg", "* v_cond", "not guided"),
    "no rollout": ("* v_cfg", "* (z1 - z0)", "no rollout"),
    "`sigma` and `sigma_next` swapped in the step": (
        "sigma_next - sigma) *", "sigma - sigma_next) *", "goes up, not down"),
    "alpha from `sigma`": (
        "(sigma_aux - sigma_next) / (1 - sigma_next)", "(sigma_aux - sigma) / (1 - sigma)",
        "alpha must be"),
    "alpha not divided": (
        "(sigma_aux - sigma_next) / (1 - sigma_next)", "sigma_aux - sigma_next",
        "alpha must be"),
    "`v`'s sign reversed in the step": ("* v_cfg", "* -v_cfg", "v's sign reversed"),
    "a step of 1 / K in sigma": (
        "level((t - 1 / config.num_sampling_steps).clamp(min=config.t_min))",
        "(sigma - 1 / config.num_sampling_steps).clamp(min=0)",
        "rollout ends"),
    "two steps": ("(t - 1 / config", "(t - 2 / config", "rollout ends"),
    "a floor of 0": (".clamp(min=config.t_min)", ".clamp(min=0)", "rollout ends"),
    "another number of steps": ("config.num_sampling_steps", "30", "rollout ends"),
    "the clean end not kept": (".clamp(min=config.t_min)", "", "rollout ends"),
    "the bound not kept": ("sigma_aux = sigma_next + u * (sigma_upper - sigma_next)",
                           "sigma_aux = sigma_next + u * (1 - sigma_next)", "expected within"),
    "a target in bf16": (
        "(z_aux - z0) / expand(sigma_aux)",
        "((z_aux.bfloat16() - z0.bfloat16()) / expand(sigma_aux).bfloat16()).float()",
        "targets .* half precision"),
    "states in bf16": ("z_aux = (1 - alpha) * z_hat + alpha * z1",
                       "z_aux = ((1 - alpha) * z_hat + alpha * z1).bfloat16().float()",
                       "states .* half precision"),
    "divided by `sigma_next`": ("z0) / expand(sigma_aux)", "z0) / expand(sigma_next)",
                                "divide by the level of the point"),
    "SFT's target": ("(z_aux - z0) / expand(sigma_aux)", "z1 - z0", "as in SFT"),
    "the target's sign reversed": ("(z_aux - z0) /", "(z0 - z_aux) /",
                                   "divide by the level of the point"),
    "the rollout with a graph": ("torch.no_grad()", "torch.enable_grad()", "graph"),
    "levels up to 1000": ("yield z_aux, sigma_aux", "yield z_aux, 1000 * sigma_aux",
                          "noise levels from 0 to 1"),
    "`velocity` given times up to 1000": (
        "velocity(z_aux, sigma_aux, cond)", "velocity(z_aux, 1000 * sigma_aux, cond)",
        "takes sigma in"),
    "labels in t": ("yield z_aux, sigma_aux",
                    "yield z_aux, sigma_aux / (config.shift - (config.shift - 1) * sigma_aux)",
                    "without its shift"),
    "time runs the other way": ("yield z_aux, sigma_aux", "yield z_aux, 1 - sigma_aux",
                                "counts from the noise"),
}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(text: str):
    names = {"torch": torch, "rng": rng(1)}
    exec(text, names)
    return names["port"]


def soar_itself(velocity, z0, z1, t, cond, uncond, config):
    """soar_terms as a port: its states are those the model is called with, its targets follow from
    two models."""
    draws = soar.draw(z0.shape, config, rng(2))._replace(z1=z1, t=t)
    calls = []

    def recorded(z, sigma, c):
        v = velocity(z, sigma, c)
        calls.append((z, sigma))
        return v

    terms = list(soar.soar_terms(recorded, z0, draws, cond, uncond, config))
    aux = calls[-config.num_aux_points:]
    assert len(terms) == 1 + len(aux)
    return [(z, sigma, soar.correction_target(z, z0, sigma)) for z, sigma in aux]


def message_of(port) -> str:
    with pytest.raises(ValueError) as caught:
        check_port(port, generator=rng())
    return str(caught.value)


BATCHED = ("""        v_cond = velocity(z, sigma, cond)
        v_uncond = velocity(z, sigma, uncond)
""", """        both = torch.cat([z, z]), torch.cat([sigma, sigma]), torch.cat([uncond, cond])
        v_uncond, v_cond = velocity(*both).chunk(2)
""")  # fmt: skip
IN_BF16 = ("velocity(z_aux, ", "velocity(z_aux.bfloat16(), ")
NOT_CALLED = ("        v_aux = velocity(z_aux, sigma_aux, cond)\n", "")


@pytest.mark.parametrize("change", [("", ""), BATCHED, IN_BF16, NOT_CALLED])
def test_a_right_port_passes(change):
    assert change[0] in PORT
    assert check_port(made(PORT.replace(*change) if change[0] else PORT), generator=rng()) < 5e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), shift=st.floats(0.3, 12.0), steps=st.integers(2, 200),
    w=st.floats(0.0, 9.0), ratio=st.floats(1.0, 4.0) | st.just(float("inf")),
    points=st.integers(1, 7),
)  # fmt: skip
def test_a_right_port_passes_for_every_bound_and_shift(seed, shift, steps, w, ratio, points):
    config = soar.SoarConfig(shift=shift, num_sampling_steps=steps, guidance_scale=w,
                             sigma_upper_ratio=ratio, num_aux_points=points)  # fmt: skip
    for port in (made(PORT), soar_itself):
        assert check_port(port, [config], generator=rng(seed)) < 1e-4


@pytest.mark.parametrize("old, new, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(old, new, named):
    assert PORT.count(old) == 1
    assert re.search(named, message_of(made(PORT.replace(old, new))))


def test_a_port_without_a_bound_is_told_which_configs_to_give():
    port = made(PORT.replace("sigma * config.sigma_upper_ratio", "sigma / sigma"))
    assert check_port(port, [soar.SoarConfig()], generator=rng()) < 5e-6
    with pytest.raises(ValueError, match=r"configs=\[SoarConfig\(\)\]"):
        check_port(port, generator=rng())


def table() -> str:
    rows = ["| mistake | message |", "| --- | --- |"]
    for mistake, (old, new, _) in MISTAKES.items():
        rows.append(f"| {mistake} | {message_of(made(PORT.replace(old, new)))} |")
    return "\n".join(rows)
