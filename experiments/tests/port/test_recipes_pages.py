"""The code of the pages runs: recipes.md's blocks for any trainer, in a stub that has the names of
their place, the checkpoint of evaluation.md, and the commands; the tables are what is found.

    python -m experiments.tests.port.test_recipes_pages  # writes their tables

The rest of recipes.md: test_recipes_scripts.py and test_recipes_hooks.py.
"""

import inspect
import math
import re
import runpy
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
)  # fmt: skip
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

import sample
import soar
import train
from experiments.port.run_hooks import BATCH, called, randn
from experiments.port.run_recipes import DATA, FLUX, HERE, PAGE, QWEN, blocks
from experiments.tests.common import ROOT
from experiments.tests.port import test_check_port, test_check_velocity
from experiments.tests.port.test_recipes_hooks import COND, EMPTY, NOISE, SIGMAS, Z0, Net, errors
from experiments.tests.port.test_recipes_scripts import SCRIPTS

RECIPES, CHECKS = HERE / "recipes.md", HERE / "checks.md"
EVALUATION = ROOT / "experiments/evaluate/evaluation.md"


# --- Blocks of any trainer ---


@pytest.fixture
def any_trainer():
    """What a trainer of no name has."""
    return {
        "torch": torch, "device": "cpu", "seed": None, "rank": 0, "model": Net(), "latents": Z0,
        "encode": lambda prompts: EMPTY, "sample_levels": lambda n: SIGMAS, "cond": COND,
    }  # fmt: skip


def run(names: dict, *texts: str) -> None:
    for text in texts:
        exec(text, names)


def at_lambda_zero(names: dict, *texts: str, noise=NOISE):
    seen = called(lambda: run(names, *texts), noise, 0.0)
    assert len(seen.terms) == 1


def test_any_trainers_blocks_are_its_loss_at_lambda_zero_and_take_a_soar_step(any_trainer):
    n, graphs = any_trainer, []
    at_lambda_zero(n, *PAGE["Any trainer"])
    own = errors(lambda z, s: n["model"](z, 1000 * s, COND)).mean()
    torch.testing.assert_close(n["loss"], own.detach(), rtol=1e-6, atol=0)
    assert sum(x.grad is not None for x in n["model"].parameters()) > 10
    n["model"].register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    seen = called(lambda: run(n, *PAGE["Any trainer"]), NOISE)
    assert graphs == [True, False] + [True] * 6 and seen.guided
    assert n["loss"].item() == pytest.approx(sum(seen.terms), rel=1e-5)
    torch.testing.assert_close(soar.sigma_from_t(n["draws"].t), SIGMAS)  # its own levels


@pytest.mark.parametrize("sign, time, off", [(1, 1, False), (-1, 1, True), (1, 1e-3, True)])
def test_the_self_test_of_any_trainer_sees_its_adapter(sign, time, off, any_trainer, capsys):
    n, model = any_trainer, any_trainer["model"]
    run(n, *PAGE["Any trainer"])
    n |= {"noise": NOISE, "weighting": None}
    n["loss"] = errors(lambda z, s: model(z, 1000 * s, COND)).mean()
    n["velocity"] = lambda z, sigma, cond: sign * model(z, 1000 * time * sigma, cond)
    run(n, PAGE["The self-test"][0])
    ratio = float(re.search(r"ratio ([\d.]+)$", capsys.readouterr().out, re.M)[1])
    assert (abs(ratio - 1) > 1e-3) if off else (abs(ratio - 1) < 2e-6)


def test_the_held_out_error_is_the_base_term_on_fixed_noise_by_level():
    held_out_errors = runpy.run_path(HERE / "recipes/held_out.py")["held_out_errors"]
    pairs = [(Z0[i : i + 1], 2.0 + i) for i in range(BATCH)]
    found = held_out_errors(lambda z, sigma, cond: cond * z, pairs)
    for sigma, error in found.items():
        wrong = []
        for i, (z0, cond) in enumerate(pairs):
            z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(i))
            z = (1 - sigma) * z0.double() + sigma * z1
            wrong.append((cond * z - (z1 - z0)).square().mean())
        assert error == pytest.approx(torch.stack(wrong).mean().item(), rel=1e-5)
    assert len(found) == 5


@pytest.mark.parametrize("i", range(4))
def test_models_of_other_predictions_are_their_loss_at_lambda_zero(i, any_trainer):
    table = re.search(r"<!-- models: .*?-->\n(.*?)<!-- end -->", RECIPES.read_text(), re.S)[1]
    rows = table.splitlines()[2:]
    assert len(rows) == 4
    _, _, returned, weights, _ = re.split(r" ?\| ?", rows[i])
    weighting = eval(weights.strip("`"), {}) if weights else None
    model, s = any_trainer["model"], SIGMAS.view(-1, 1, 1, 1)

    def velocity(z, sigma, cond):
        return eval(returned.strip("`"), {"model": model, "s": s} | locals())

    config = soar.SoarConfig(shift=1.0, lambda_aux=0.0)
    draws = soar.draw(Z0.shape, config, torch.Generator())._replace(t=SIGMAS, z1=NOISE)
    loss = soar.soar_loss(velocity, Z0, draws, COND, None, config, weighting=weighting)
    prediction = model((1 - s) * Z0 + s * NOISE, 1 - SIGMAS if i < 2 else SIGMAS, COND)
    error = (prediction - (Z0 - NOISE, Z0, NOISE, Z0)[i]) ** 2  # what a row's model predicts
    if i == 1:  # a velocity's error, not that of clean data
        error = error / s**2
    torch.testing.assert_close(loss, error.mean(), rtol=1e-5, atol=0)


def test_known_region_is_clean_in_every_call_and_free_elements_alone_count(any_trainer):
    known = torch.zeros(BATCH, 1, 8, 8, dtype=torch.bool)
    known[0, :, :6], known[1, :, :, :3] = True, True
    part, seen, net = known.expand_as(Z0), [], any_trainer["model"]

    def model(z, sigma, cond):
        assert torch.equal(z[part], Z0[part])
        seen.append(net(z, sigma, cond))
        return seen[-1]

    n = any_trainer | {"known": known, "z0": Z0, "model": model}
    run(n, PAGE["Known regions"][0])
    config = soar.SoarConfig(num_aux_points=2)
    draws = soar.draw(Z0.shape, config, torch.Generator())
    arguments = (n["velocity"], Z0, draws, COND, COND * 0, config)
    base, *_ = soar.soar_terms(*arguments, weighting=n["weighting"])
    free = [~row for row in part]
    total = sum(
        F.mse_loss(seen[0][b][free[b]], (draws.z1 - Z0)[b][free[b]]) for b in range(BATCH)
    )
    torch.testing.assert_close(base.loss, total / (BATCH * 3), rtol=1e-4, atol=1e-6)


def test_wan_blocks_are_the_loss_and_keep_points_in_an_experts_range(any_trainer):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    config = {key: defaults[key].default for key in ("latents_mean", "latents_std")}
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in config.values())
    z0, noise = randn(1, BATCH, 16, 3, 4, 4), randn(4, BATCH, 16, 3, 4, 4)
    n = any_trainer | {"vae": SimpleNamespace(config=SimpleNamespace(**config))}
    n |= {"latents": z0 * std + mean, "transformer": model}
    first, second, points = PAGE["Wan"]
    before, inside = PAGE["Any trainer"]
    inside = inside.split("def velocity")[0] + second + "\n" + inside.split("cond)\n\n", 1)[1]
    at_lambda_zero(n, before, first, inside, noise=noise)
    s = SIGMAS.view(-1, 1, 1, 1, 1)
    v = model((1 - s) * z0 + s * noise, timestep=1000 * SIGMAS, encoder_hidden_states=COND).sample
    own = F.mse_loss(v, noise - z0)
    torch.testing.assert_close(n["loss"], own.detach(), rtol=1e-5, atol=0)

    draws = soar.draw(z0.shape, soar.SoarConfig(), torch.Generator())
    n["draws"] = draws._replace(t=torch.tensor([0.5, 0.05]))
    run(n, points)
    next_, u = n["sigma_next"], n["draws"].u
    assert (next_ + u * (1 - next_) <= 0.8751).all() and (u >= 0).all() and u.any()


def test_every_python_block_is_run():
    scripts = {cls.heading: 2 for cls in SCRIPTS} | {"diffusers' scripts": 2}
    others = {"Any trainer": 2, "The self-test": 1, "DDP": 1, "Known regions": 1, "Wan": 3}
    others |= {"ai-toolkit": 1, "SimpleTuner": 1, "OneTrainer": 2, "LTX-Video-Trainer": 1}
    others |= {"diffusion-pipe": 1, "flow_matching": 2}
    assert {name: len(found) for name, found in PAGE.items()} == scripts | others
    assert list(blocks(CHECKS.read_text())) == ["Is the adapter right?"]


# --- The shift ---

SCHEDULERS = {  # the published scheduler configs, the number of tokens
    "Stable Diffusion 3, any size": ({"shift": 3.0}, None),
    "Flux.1-dev, 1024 x 1024": (FLUX, 4096),
    "Qwen-Image, 1328 x 1328": (QWEN | {"shift_terminal": 0.02}, 6889),
    "Flux.2-dev, 1024 x 1024, 40 steps": (FLUX, 4096),
}


def shift_table() -> str:
    """The shift, as the recipes have it, and the 40 levels that the pipeline steps through: ours
    are the same but for SD3's spacing and Qwen-Image's stretch."""
    rows = ["| scheduler | shift | largest difference |", "| --- | --- | --- |"]
    for name, (config, tokens) in SCHEDULERS.items():
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        shift, given, c = scheduler.config.shift, {}, scheduler.config
        if c.use_dynamic_shifting:
            lengths = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
            mu = calculate_shift(tokens, *lengths)
            if name.startswith("Flux.2"):
                mu = compute_empirical_mu(tokens, 40)
            shift, given = math.exp(mu), {"sigmas": np.linspace(1.0, 1 / 40, 40), "mu": mu}
        retrieve_timesteps(scheduler, 40, "cpu", **given)
        theirs = scheduler.sigmas[:-1].double()
        ours = soar.sigma_from_t(1 - torch.arange(40, dtype=torch.float64) / 40, shift)
        rows.append(f"| {name} | {shift:.3f} | {(theirs - ours).abs().max().item():.3f} |")
        if name.startswith("Stable Diffusion 3"):  # to the sigma of its last timestep, shifted
            t = torch.linspace(1, soar.sigma_from_t(1e-3, shift), 40, dtype=torch.float64)
            ours = soar.sigma_from_t(t, shift)
        if "shift_terminal" in config:
            ours = 1 - (1 - ours) * (1 - 0.02) / (1 - ours[-1])
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    return "\n".join(rows)


# --- The tables ---

TABLES = {  # where each stands, and what finds it
    "shift": (RECIPES, shift_table),
    "adapters": (CHECKS, test_check_velocity.adapters_table),
    "port": (CHECKS, test_check_port.table),
}


def same_up_to_digits(left: str, right: str) -> bool:
    """Equal texts, and numbers within 0.02 or 2 %: their last digits differ by kind of CPU."""
    number = r"\d+\.\d+"
    pairs = zip(map(float, re.findall(number, left)), map(float, re.findall(number, right)))
    close = all(math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in pairs)
    return close and re.sub(number, "x", left) == re.sub(number, "x", right)


def parts_of(name: str) -> list[str]:
    """The table's page: before, the table, after."""
    pattern = rf"(?<=<!-- table: {name} -->\n)(.*?)(?=\n<!-- end -->)"
    return re.split(pattern, TABLES[name][0].read_text(), maxsplit=1, flags=re.S)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_is_found(name):
    found = TABLES[name][1]()
    text = "python -m experiments.tests.port.test_recipes_pages writes it anew"
    assert same_up_to_digits(parts_of(name)[1], found), f"table {name}: {text}\n{found}"


# --- Other pages ---


def test_the_block_that_takes_a_checkpoint_into_diffusers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer")
    model.proj_out.bias.data += 0.5
    model.save_pretrained("output/soar/checkpoint-005000/transformer")
    text = blocks(EVALUATION.read_text())["From a checkpoint into diffusers"][0]
    hub_id = "stabilityai/stable-diffusion-3.5-medium"
    for there, here in ((hub_id, str(DATA / "model")), ("512", "64"), ('"cuda"', '"cpu"')):
        assert there in text
        text = text.replace(there, here)
    names = {}
    exec(text, names)
    assert names["image"].size == (64, 64) and np.asarray(names["image"]).std() > 5
    saved = StableDiffusion3Pipeline.from_pretrained("output/soar/pipeline", dtype=torch.float32)
    assert torch.equal(saved.transformer.proj_out.bias, model.proj_out.bias.bfloat16().float())


def test_commands_in_the_pages_have_flags_that_exist():
    parse_sample = lambda x: tyro.cli(sample.Args, args=x, use_underscores=True)  # noqa: E731
    parsers = {"train.py": train.parse, "sample.py": parse_sample}
    found = 0
    pages = "".join(path.read_text() for path in (ROOT / "README.md", RECIPES, CHECKS, EVALUATION))
    for text in re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```$", pages, re.M | re.S):
        for command in re.split(r"&&|\n", text.replace("\\\n", " ")):
            words = shlex.split(command, comments=True)
            for script, parse in parsers.items():
                if script in words and "..." not in words:
                    parse(words[words.index(script) + 1 :])
                    found += 1
    assert found >= 3


def main() -> None:
    for name, (page, table) in TABLES.items():
        before, _, after = parts_of(name)
        page.write_text(before + table() + after)


if __name__ == "__main__":
    main()
