"""experiments.theory.toy."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.tests.common import ROOT
from experiments.theory import toy
from experiments.theory.toy import ARMS, CLASSES, EMPTY, MODE_STD, Args, Model, data, distance
from soar import SoarConfig, draw, soar_terms

TINY = Args(
    ("base", "sft", "soar"), (0, 1), pretrain_steps=2, steps=1, batch_size=8, samples=4,
)  # fmt: skip


def inputs_of(config, size=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (size,), generator=generator)
    z0 = data(classes, generator)
    return z0, draw(z0.shape, config, generator), classes


def gradients(model, losses):
    model.zero_grad()
    sum(losses).backward()
    return torch.cat([x.grad.flatten() for x in model.parameters()])


def test_sampling_the_exact_velocity_gives_the_true_law_at_guidance_1_and_a_wider_one_does_not():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(CLASSES).repeat_interleave(1000)
    reference = data(classes, generator)
    z1 = torch.randn(4000, 2, generator=generator)
    samples = toy.sample(toy.true_velocity, classes, 1.0, z1, 200)
    apart, std, radius = toy.measure(samples, classes, reference)
    assert apart < 0.06 and std == pytest.approx(1, abs=0.05)
    assert radius == pytest.approx(1, abs=0.02)
    empty = torch.full_like(classes, EMPTY)
    samples = toy.sample(toy.true_velocity, empty, 1.0, z1, 200)
    assert distance(samples, reference) < 0.06 < distance(samples[:1000], reference[:1000])
    wide = reference + MODE_STD * torch.randn(reference.shape, generator=generator)
    assert toy.measure(wide, classes, reference)[1] == pytest.approx(math.sqrt(2), abs=0.05)
    apart, _, radius = toy.measure(1.5 * reference, classes, reference)
    assert radius == pytest.approx(1.5) and apart > 0.3


def test_distance_of_a_shift_is_the_mean_of_its_projections():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shifted = distance(x, x + torch.tensor([0.3, 0.4]), directions=256)
    assert shifted == pytest.approx(0.5 * 2 / math.pi, rel=1e-3)
    assert distance(x, x.flip(0)) == 0


def test_expected_loss_and_gradient_depend_on_lambda_times_n_alone():
    """The loss of six points, lambda = 1, is the mean of six losses of one point each, lambda = 6;
    and so is its gradient. As the points have one law, expectations are equal."""
    torch.manual_seed(0)
    model, six = Model(), SoarConfig()
    one = SoarConfig(num_aux_points=1, lambda_aux=6.0)
    z0, draws, classes = inputs_of(six, 64)
    empty = torch.full_like(classes, EMPTY)
    whole = [term.loss for term in soar_terms(model, z0, draws, classes, empty, six)]
    separate = [draws._replace(u=draws.u[:, n : n + 1]) for n in range(6)]
    losses = [[x.loss for x in soar_terms(model, z0, d, classes, empty, one)] for d in separate]
    values = torch.stack([sum(terms) for terms in losses])
    torch.testing.assert_close(values.mean(), sum(whole))
    parts = torch.stack([gradients(model, terms) for terms in losses])
    torch.testing.assert_close(parts.mean(0), gradients(model, whole), rtol=1e-4, atol=1e-6)


def test_errors_are_squared_distances_to_the_true_velocity_by_level_and_condition():
    off = lambda z, sigma, c: sigma[:, None] * (1 + (c == EMPTY)[:, None])  # noqa: E731
    model = lambda *x: toy.true_velocity(*x) + off(*x)  # noqa: E731
    expected = [[2 * level**2, 2 * (2 * level) ** 2] for level in toy.LEVELS]
    assert np.allclose(toy.errors(model, 0, TINY), expected, atol=1e-5)


def test_guidance_moves_away_from_the_empty_condition():
    """Of velocities 1 with a class and 0 without, guidance w leads from z1 to z1 - w."""

    def velocity(z, sigma, classes):
        return (classes != EMPTY)[:, None] * torch.ones_like(z)

    z1, classes = torch.zeros(CLASSES, 2), torch.arange(CLASSES)
    for w in (1.0, 3.0):
        torch.testing.assert_close(toy.sample(velocity, classes, w, z1), z1 - w)


def test_arms_of_equal_compute_take_as_many_steps_as_soars_500_pay_for(monkeypatch):
    taken = []

    def train(model, arm, steps, *_):
        taken.append(steps)
        return model

    monkeypatch.setattr(toy, "train", train)
    monkeypatch.setattr(toy, "evaluate", lambda *_: ([0.0] * 3, [[0.0] * 3]))
    monkeypatch.setattr(toy, "errors", lambda *_: [])
    toy.run(Args(arms=("soar", "n1_steps", "sft_steps"), seeds=(0, 1)))
    assert taken == 2 * [6000, 500, 500 * 22 // 7, 500 * 22 // 3]


def test_tiny_run_is_reproducible_and_writes_table_and_figure(tmp_path, capsys):
    args = replace(TINY, output_dir=tmp_path)
    toy.main(args)
    first = json.loads((tmp_path / "toy.json").read_text())
    assert (tmp_path / "toy.png").is_file() and len(first["soar"]) == 2
    assert first["sft"] != first["soar"] != first["base"]
    again = toy.run(replace(args, arms=("soar",)))  # an arm does not depend on the other ones
    assert again["soar"] == first["soar"]
    printed = capsys.readouterr().out
    assert all(x(first) in printed for x in (toy.table, toy.pairs, toy.errors_table))


def test_the_pages_tables_are_those_of_the_results():
    result = json.loads((ROOT / "experiments/theory/results/toy.json").read_text())
    page = (ROOT / "experiments/theory/optimum.md").read_text()
    assert result["settings"]["seeds"] == [0, 1, 2, 3, 4] and set(ARMS) <= set(result)
    assert all(x(result) in page for x in (toy.table, toy.pairs, toy.errors_table))
    nearest = {name: np.mean(result[name], 0)[:, 0].argmin() for name in ARMS}
    assert set(nearest.values()) == {0}  # all at guidance 1, as the page says


@pytest.mark.parametrize("bad", [{"arms": ("sfd",)}, {"steps": 0}, {"seeds": (1,)}])
def test_bad_flags_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
        Args(**bad)
