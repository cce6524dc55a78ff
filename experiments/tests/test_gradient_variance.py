"""experiments.gradient_variance."""

import json

import numpy as np
import pytest
import torch

from experiments import gradient_variance
from experiments.gradient_variance import Args, squared_distances, stratify, variance
from experiments.tests.common import small_world
from sample import seeded
from soar import SoarConfig, draw


def test_stratified_levels_lie_one_in_each_part_and_stay_uniform_in_it():
    draws = draw((500, 2), SoarConfig(num_aux_points=4, num_rollout_paths=2), seeded("test"))
    u = stratify(draws).u
    assert u.shape == (2, 4, 500) and torch.equal((4 * u).floor(), torch.arange(4.0)[:, None].expand(2, 4, 500))
    torch.testing.assert_close(4 * u % 1, draws.u, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(stratify(draws)[:2], draws[:2]))


def test_variance_is_the_sum_of_the_parameters_sample_variances():
    gradients = torch.randn(9, 5, generator=seeded("test")) * torch.arange(1, 6) + 100
    distances = squared_distances(gradients)
    assert variance(distances) == pytest.approx(gradients.double().var(0).sum().item(), rel=1e-5)
    rows = np.array([0, 3, 3, 7])
    pairs = [(0, 3), (0, 3), (0, 7), (3, 7), (3, 7)]  # 3 with itself is none
    expected = np.mean([((gradients[i] - gradients[j]) ** 2).sum().item() for i, j in pairs]) / 2
    assert variance(distances, rows) == pytest.approx(expected, rel=1e-4)


def test_holding_all_but_the_levels_leaves_less_variance(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_variance, "load_world", lambda path: small_world(tmp_path / "data"))
    gradient_variance.main(Args(num_aux_points=2, batch_size=2, repeats=8, output_dir=tmp_path))
    written = json.loads((tmp_path / "gradient_variance_n2.json").read_text())
    for name in ("independent", "stratified"):
        assert 0 < written["levels"][name] < written["all"][name]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in (written["all"], written["levels"]))


def test_the_same_loss_is_compared_by_the_variance_of_gradients_of_one_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_variance, "load_world", lambda path: small_world(tmp_path / "data"))
    gradient_variance.main(Args(same_loss=(1, 2), batch_size=2, repeats=8, output_dir=tmp_path))
    rows = json.loads((tmp_path / "gradient_variance_same_loss.json").read_text())["N"]
    assert [row["units"] for row in rows.values()] == [7, 10]
    assert rows["2"]["ratio"] == rows["2"]["low"] == rows["2"]["high"] == 1
    assert rows["1"]["low"] <= rows["1"]["ratio"] <= rows["1"]["high"]
    assert rows["1"]["variance"] > rows["2"]["variance"] > 0


@pytest.mark.parametrize("bad", [{"num_aux_points": 0}, {"batch_size": 0}, {"repeats": 7}, {"same_loss": (1,)}])
def test_bad_flags_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
        Args(**bad)
