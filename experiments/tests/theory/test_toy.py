"""experiments.theory.toy."""

import json
import math
from dataclasses import replace

import pytest
import torch

from experiments.tests.common import ROOT
from experiments.theory import toy
from experiments.theory.toy import ARMS, CLASSES, EMPTY, MODE_STD, Args, Model, data, distance
from soar import SoarConfig, draw, soar_terms

TINY = Args(seeds=(0, 1), pretrain_steps=2, steps=1, batch_size=8, samples=16)


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
    """The exact velocity of two Gaussians per class, in closed form."""

    def velocity(z, sigma, classes):
        centers = (1 - sigma[:, None, None]) * toy.modes_of(classes)
        variance = (((1 - sigma) * MODE_STD) ** 2 + sigma**2)[:, None, None]
        off = z[:, None] - centers
        chance = torch.softmax(-(off**2).sum(2) / variance[..., 0] / 2, 1)[..., None]
        slope = (sigma - (1 - sigma) * MODE_STD**2)[:, None, None] / variance
        return (chance * (slope * off - toy.modes_of(classes))).sum(1)

    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(CLASSES).repeat_interleave(1000)
    reference, z1 = data(classes, generator), torch.randn(4000, 2, generator=generator)
    found = toy.measure(toy.sample(velocity, classes, 1.0, z1, 400), classes, reference)
    assert found["distance"] < 0.05 and found["balance"] > 0.45
    assert found["std"] == pytest.approx(1, abs=0.05)
    assert found["radius"] == pytest.approx(1, abs=0.02)
    wide = reference + MODE_STD * torch.randn(reference.shape, generator=generator)
    found = toy.measure(wide, classes, reference)
    assert found["std"] == pytest.approx(math.sqrt(2), abs=0.05)
    far = toy.measure(1.5 * reference, classes, reference)
    assert far["radius"] == pytest.approx(1.5) and far["distance"] > 0.3


def test_distance_of_a_shift_is_the_mean_of_its_projections():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shifted = distance(x, x + torch.tensor([0.3, 0.4]), directions=256)
    assert shifted == pytest.approx(0.5 * 2 / math.pi, rel=1e-3)
    assert distance(x, x.flip(0)) == 0


def test_expected_loss_and_gradient_depend_on_lambda_times_n_alone():
    """The loss of six points, lambda = 1, is the mean of six losses of one point each, lambda = 6;
    and so is its gradient. As the points have one law, expectations are equal."""
    torch.manual_seed(0)
    model, six, one = Model(), SoarConfig(), SoarConfig(num_aux_points=1, lambda_aux=6.0)
    z0, draws, classes = inputs_of(six, 64)
    empty = torch.full_like(classes, EMPTY)
    terms = soar_terms(model, z0, draws, classes, empty, six)
    all_points = gradients(model, [term.loss for term in terms])
    separate = [draws._replace(u=draws.u[:, n : n + 1]) for n in range(6)]
    losses = [[x.loss for x in soar_terms(model, z0, d, classes, empty, one)] for d in separate]
    values = torch.stack([sum(terms) for terms in losses])
    with torch.no_grad():
        whole = sum(x.loss for x in soar_terms(model, z0, draws, classes, empty, six))
    torch.testing.assert_close(values.mean(), whole)
    parts = torch.stack([gradients(model, terms) for terms in losses])
    torch.testing.assert_close(parts.mean(0), all_points, rtol=1e-4, atol=1e-6)
    assert (parts[0] - all_points).norm() > 0.01 * all_points.norm()  # what N = 1 pays: variance


def test_whole_steps_leave_out_the_points_of_t_below_one_step_and_nothing_else():
    arm = ARMS["k10_whole"]
    torch.manual_seed(0)
    model = Model()
    z0, draws, classes = inputs_of(arm.config)
    empty = torch.full_like(classes, EMPTY)
    whole = draws.t >= 0.1
    assert 0 < (~whole).sum() < 400
    terms = list(soar_terms(model, z0, draws, classes, empty, arm.config, normalizer=1.0))
    base, *points = (term.error for term in terms)
    expected = (base.sum() + sum(x[whole].sum() for x in points)) / (4000 + 6 * whole.sum())
    found = sum(toy.loss_terms(model, z0, draws, classes, arm))
    torch.testing.assert_close(found, expected)
    usual = sum(toy.loss_terms(model, z0, draws, classes, replace(arm, whole_steps=False)))
    assert not torch.isclose(found, usual, rtol=1e-4)


def test_every_t_is_at_least_one_step_up_where_the_arm_says_so():
    arm = ARMS["k10_t"]
    _, draws, _ = inputs_of(arm.config)
    t = arm.change(draws, arm.config).t
    assert t.min() > 0.1 and t.max() <= 1 and (t.diff() * draws.t.diff() >= 0).all()


def test_tiny_run_is_reproducible_and_writes_table_and_figure(tmp_path, capsys):
    args = replace(TINY, arms=("base", "sft", "soar", "n1_steps"), output_dir=tmp_path)
    toy.main(args)
    printed = capsys.readouterr().out
    first = json.loads((tmp_path / "toy.json").read_text())
    assert (tmp_path / "toy.png").is_file() and all(len(x) == 2 for x in first["arms"].values())
    assert first["arms"]["sft"] != first["arms"]["soar"] != first["arms"]["base"]
    toy.main(replace(args, arms=("soar", "sft")))  # an arm does not depend on the other ones
    again = json.loads((tmp_path / "toy.json").read_text())
    assert again["arms"]["soar"] == first["arms"]["soar"]
    toy.main(Args(show=tmp_path / "toy.json"))
    assert "| SOAR |" in capsys.readouterr().out and "| base |" in printed


def test_the_pages_tables_are_those_of_the_results():
    result = json.loads((ROOT / "experiments/theory/results/toy.json").read_text())
    page = (ROOT / "experiments/theory/optimum.md").read_text()
    assert result["settings"]["seeds"] == [0, 1, 2, 3, 4] and set(result["arms"]) == set(ARMS)
    assert toy.table(result) in page and toy.pairs(result) in page


@pytest.mark.parametrize("bad", [
    {"arms": ("sfd",)}, {"arms": ()}, {"steps": 0}, {"pretrain_steps": 0}, {"batch_size": 0},
    {"samples": 8}, {"seeds": ()},
])  # fmt: skip
def test_bad_flags_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
        Args(**bad)
