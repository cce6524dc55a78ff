"""check_velocity names what is wrong with an adapter: of the trained model of the shapes world, as
checks.md's table has it, and of models whose error is known."""

import re
import sys

import pytest
import torch
from diffusers import DDPMScheduler, SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

import soar
from experiments.port import check_velocity as module
from experiments.port.check_velocity import check_velocity
from experiments.port.run_hooks import randn
from experiments.port.run_recipes import HERE, blocks
from experiments.shapes.draw import DATA, MAX_SEQUENCE_LENGTH, read_pairs
from experiments.tests.port.test_check_port import rng
from sample import encode_images, encode_prompts, load_pipeline, load_transformer

DTYPES = (torch.float32, torch.bfloat16)


def per_sample(sigma, like):
    return sigma.view(-1, *[1] * (like.ndim - 1))


class World:
    """The trained model as model(z, time up to 1000, cond), and 8 of its images."""

    def __init__(self):
        name, cpu = str(DATA / "model"), torch.device("cpu")
        pipe = load_pipeline(name, torch.float32, cpu)
        self.transformer = load_transformer(name, None, torch.float32, cpu)
        rows = read_pairs().select(range(8))
        pixels = pipe.image_processor.preprocess(list(rows["image"]))
        self.z0 = encode_images(pipe, pixels, torch.zeros(8, 16, 8, 8))
        self.cond = encode_prompts(pipe, list(rows["text"]), MAX_SEQUENCE_LENGTH)
        self.uncond = encode_prompts(pipe, [""] * 8, MAX_SEQUENCE_LENGTH)
        self.vp = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod

    def model(self, z, time, cond):
        return self.transformer(z, timestep=time, return_dict=False, **cond)[0]

    def right(self, z, sigma, cond):
        return self.model(z, 1000 * sigma, cond)

    def sd15(self, x, sigma, cond):
        """What SD 1.5 would predict, had it learnt as much: the noise in a z0 + b z1, where a and b
        are those of its timestep."""
        kept = per_sample(self.vp[(1000 * sigma).long().clamp(0, 999)], x)
        a, b = kept.sqrt(), (1 - kept).sqrt()
        z, s = x / (a + b), b / (a + b)
        return z + (1 - s) * self.right(z, s.flatten(), cond)


def wrong_adapters(w: World) -> dict:
    """What is wrong: its velocity."""
    torch.manual_seed(0)
    fresh = SD3Transformer2DModel.from_config(w.transformer.config).eval()
    v, s = w.right, lambda sigma: per_sample(sigma, w.z0)
    guided = lambda z, t, c: soar.guided_velocity(v(z, t, w.uncond), v(z, t, c), 4.5)  # noqa: E731
    return {
        "none: it is right": v,
        "reversed sign": lambda z, t, c: -v(z, t, c),
        "reversed time": lambda z, t, c: v(z, 1 - t, c),
        "both, as for a model of data - noise": lambda z, t, c: -v(z, 1 - t, c),
        "`timestep=sigma`, where the model takes 1000 sigma": w.model,
        "`timestep=1000 * sigma`, where the model takes sigma": lambda z, t, c: v(z, 1000 * t, c),
        "a model that predicts noise": lambda z, t, c: z + (1 - s(t)) * v(z, t, c),
        "a model that predicts clean data": lambda z, t, c: z - s(t) * v(z, t, c),
        "a model that predicts noise on SD 1.5's path": w.sd15,
        "the same, in the recipe for noise": lambda z, t, c: (w.sd15(z, t, c) - z) / (1 - s(t)),
        "`cond` not handed on": lambda z, t, c: v(z, t, w.cond),
        "an untrained model": lambda z, t, c: fresh(z, timestep=1000 * t, **c).sample,
        "latents not scaled, as if by 0.18215": v,
        "latents not scaled, as if by 1.5305": v,
        "`[0]` forgotten": lambda z, t, c: (v(z, t, c),),
        "tokens not unpacked": lambda z, t, c: v(z, t, c).flatten(2).mT,
        "a guided velocity in place of the model's": guided,
        "prompts of other images": v,
    }


def message_of(call) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)


def adapters_table() -> str:
    w, config = World(), soar.SoarConfig()
    draws = soar.draw(w.z0.shape, config, rng())
    others = {f"latents not scaled, as if by {x}": {"z0": w.z0 / x} for x in (0.18215, 1.5305)}
    others["prompts of other images"] = {"cond": {key: x.roll(1, 0) for key, x in w.cond.items()}}
    rows = ["| mistake | caught by | message, or what is returned |", "| --- | --- | --- |"]
    for mistake, velocity in wrong_adapters(w).items():
        arguments = {"z0": w.z0, "cond": w.cond, "other_cond": w.uncond} | others.get(mistake, {})
        by = "" if mistake.startswith("none") else "nothing"
        try:
            found = f"{check_velocity(velocity, **arguments, generator=rng()):.2f}"
        except ValueError as error:
            found, by = str(error), "`check_velocity`"
            terms = soar.soar_terms(velocity, w.z0, draws, w.cond, w.uncond)
            if message_of(lambda: next(terms)):  # noqa: B023
                by += ", `soar_terms`"
        rows.append(f"| {mistake} | {by} | {found} |")
    call, listed = (w.right, w.z0, draws, w.cond), list(w.uncond.values())
    levels = torch.linspace(20, 980, 8)
    for mistake, made in {
        "`uncond` of another type than `cond` | `soar_terms`":
            lambda: next(soar.soar_terms(*call, listed, config)),
        "`uncond` not passed | `soar_terms`": lambda: next(soar.soar_terms(*call, config=config)),
        "levels up to 1000 | `with_levels`": lambda: soar.with_levels(draws, levels, config),
    }.items():  # fmt: skip
        rows.insert(-2, f"| {mistake} | {message_of(made)} |")
    return "\n".join(rows)


def test_the_block_that_checks_an_adapter_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "check_velocity", module)
    world = World()
    names = {"velocity": world.right, "generator": rng()}
    names |= {"z0": world.z0, "cond": world.cond, "uncond": world.uncond}
    (block,) = blocks((HERE / "checks.md").read_text())["Is the adapter right?"]
    exec(block, names)
    assert capsys.readouterr().out == f"the adapter fits: relative error {names['error']:.2f}\n"
    assert 0.05 < names["error"] < 0.2


def exact_velocity(mean, spread):
    """Of z0 = mean + spread n: the conditional mean of z1 - z0."""

    def exact(z, sigma, cond):
        s = per_sample(sigma, z)
        x = (z.float() - (1 - s) * cond) / (s**2 + ((1 - s) * spread) ** 2)
        return (s - (1 - s) * spread**2) * x - cond

    return exact


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.1, 1.0), st.booleans(),
       st.sampled_from(DTYPES))  # fmt: skip
def test_of_an_exact_model_what_was_turned_is_named(seed, batch, spread, reverse, dtype):
    mean = randn(seed, batch, 256)
    exact = exact_velocity(mean, spread)
    z0 = (mean + spread * randn(seed + 1, batch, 256)).to(dtype)
    if reverse:
        with pytest.raises(ValueError, match=r"-velocity\(z, 1 - sigma, cond\) has .* time runs"):
            check_velocity(lambda z, s, c: -exact(z, 1 - s, c), z0, mean, generator=rng(seed + 2))
        return
    found = check_velocity(exact, z0, mean, -mean, generator=rng(seed + 2))
    sigma = torch.linspace(0.1, 0.9, 1000)
    noise = spread**2 / (sigma**2 + ((1 - sigma) * spread) ** 2)  # variance of z1 - z0 given z
    # |z1 - z0|^2 is 2 + spread^2 in the mean; both are means over at least 2,048 numbers.
    assert found == pytest.approx(noise.mean().item() / (2 + spread**2), rel=0.25)
    with pytest.raises(ValueError, match="the same values for cond and other_cond: the model"):
        check_velocity(lambda z, s, c: exact(z, s, mean), z0, mean, -mean, generator=rng(seed + 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0.0, 0.25, 0.9])
def test_a_reversed_sign_is_refused_whatever_part_is_given(part, dtype):
    """As the recipe for known regions has it; the error is that of the free elements."""
    mean, known = randn(0, 8, 400), torch.arange(400) < 400 * part
    z0, exact = (mean + 0.5 * randn(1, 8, 400)).to(dtype), exact_velocity(mean, 0.5)

    def velocity(sign):
        def turned(z, sigma, cond):
            target = soar.correction_target(z, z0, sigma)
            return torch.where(known, target, sign * exact(z, sigma, cond))

        return turned

    found = check_velocity(velocity(1), z0, mean, generator=rng(2))
    free = check_velocity(exact, z0[:, ~known], mean[:, ~known], generator=rng(2))
    assert found == pytest.approx(free, rel=0.2)
    with pytest.raises(ValueError, match=r"-velocity\(z, sigma, cond\) has .* sign is reversed"):
        check_velocity(velocity(-1), z0, mean, generator=rng(2))


def test_global_random_state_gradients_and_conditioning_are_left_alone():
    cond, z0, seen = object(), randn(0, 3, 64), []
    weight = torch.ones((), requires_grad=True)

    def velocity(z, sigma, c):
        assert c is cond and not torch.is_grad_enabled()
        assert z.dtype == z0.dtype and sigma.shape == (3,)
        seen.append(sigma)
        return weight * (z * 2 - 0.5)

    state = torch.get_rng_state()
    message = message_of(lambda: check_velocity(velocity, z0, cond, generator=rng(1)))
    assert message == message_of(lambda: check_velocity(velocity, z0, cond, generator=rng(1)))
    assert torch.equal(torch.get_rng_state(), state) and weight.grad is None
    assert re.match(r"velocity\(z, sigma", message)
    assert len(seen) == 2 * 3 * 7  # 3 rounds of 3 levels, 7 forwards each
    levels = torch.cat(seen[0:21:7])
    assert len(levels.unique()) == 9 and levels.min() > 0.1 and levels.max() < 0.9
