"""experiments/cost/step_cost.py: the ways to take a step agree, and what they cost is counted, not timed."""

import ast
import inspect
import json
import textwrap

import matplotlib.image
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from experiments.cost import step_cost
from experiments.cost.step_cost import WAYS, Allocated, Args, Bench, take_step
from sample import init_distributed

EAGER = [way for way in WAYS if not WAYS[way][2]]


@pytest.fixture
def device():
    _, _, device = init_distributed()
    yield device
    torch.distributed.destroy_process_group()


@pytest.fixture
def alone(monkeypatch):
    """No fresh processes, and what they were asked for."""
    asked = []
    fresh = {"seconds": 1.0, "first": 1.0, "memory": 8e9, "loss": 0.0}
    monkeypatch.setattr(step_cost, "run_one", lambda args, way, *rest, **env: asked.append((way, *rest)) or fresh)
    return asked


def test_table_compares_ways_and_counts_forward_units(tmp_path, alone, capsys):
    step_cost.main(Args(size="tiny", repeats=1, compiled=False, num_aux_points=1, output_dir=tmp_path))
    written = json.loads((tmp_path / "step_cost_table_tiny_cpu.json").read_text())
    assert {"date", "device", "versions", "command", "args"} <= written.keys()
    rows = written["table"]["ways"]
    assert list(rows) == EAGER == [x[0] for x in alone]
    units = {way: row["forward_units"] for way, row in rows.items()}
    assert units["SOAR"] == pytest.approx(2 * units["SFT"] + 1)
    assert units["published"] == pytest.approx(units["SOAR"] + 1)
    assert 2 < units["SFT"] < 3.5 and 0 < units["published, checkpointing"] - units["published"] < 3
    assert all(row["memory_gb"] == 8 and len(row["all_seconds"]) == 1 for row in rows.values())
    assert "| SOAR | " in capsys.readouterr().out


def calls_of(function) -> list[str]:
    """What a function calls, by the last part of its name, in the order of the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [x.func for x in ast.walk(tree) if isinstance(x, ast.Call)]
    calls.sort(key=lambda x: (x.end_lineno, x.end_col_offset))
    return [getattr(x, "attr", getattr(x, "id", None)) for x in calls]


def test_a_step_is_what_train_py_does_from_its_gradients_on():
    theirs = calls_of(train.training_step)
    step = [name for name in theirs[theirs.index("soar_terms") :] if name in ("soar_terms", "backward", "update")]
    assert step == ["soar_terms", "backward", "update"]
    ours = [name for name in calls_of(step_cost.soar) + calls_of(Bench.take) if name in step]
    assert ours == step


def test_ways_that_differ_are_refused():
    sums = torch.ones(len(train.METRICS), 2)
    sft, other, aux = torch.zeros_like(sums), sums.clone(), train.METRICS.index("aux")
    sft[train.METRICS.index("base") : aux] = 1
    other[aux] = 1.001
    step_cost.check_same({"SFT": {"sums": sft.tolist()}, "SOAR": {"sums": sums.tolist()}}, bf16=False)
    with pytest.raises(AssertionError, match="published differs"):
        rows = {"published": {"sums": other.tolist()}, "SOAR": {"sums": sums.tolist()}}
        step_cost.check_same(rows, bf16=False)


def test_published_schedule_holds_all_graphs_and_ours_one(device):
    bench = Bench(Args(size="tiny", side=32, batch_size=8), device)
    take_step(bench, "SFT")  # makes moments
    peaks = {}
    for way in EAGER:
        with Allocated() as allocated:
            take_step(bench, way)
        peaks[way] = allocated.peak
    assert peaks["SOAR"] < 1.2 * peaks["SFT"] and peaks["published"] > 5 * peaks["SFT"]
    assert peaks["SOAR"] < peaks["published, checkpointing"] < peaks["published"]


class Casts(TorchDispatchMode):
    """Counts casts of weights to bf16."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.count = {x.data_ptr() for x in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        to_bf16 = function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        self.count += to_bf16 and args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_cast_once_a_step_and_gradients_are_the_same_bit_by_bit(device, monkeypatch, checkpointing):
    bench, found, casts = Bench(Args(size="tiny", mixed_precision="bf16", num_aux_points=2), device), [], []
    gradients = lambda: [x.grad.clone() for x in bench.transformer.parameters()]  # noqa: E731
    monkeypatch.setattr(step_cost.train, "update", lambda *args: found.append(gradients()))
    for way in (step_cost.soar, step_cost.casting_each_time):
        with Casts(bench.transformer.parameters()) as counted:
            bench.take(way, checkpointing)
        bench.optimizer.zero_grad()
        casts.append(counted.count)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and any(x.any() for x in found[0])
    assert 20 < casts[0] <= len(found[0]) and casts[1] >= 4 * casts[0]


def test_sizes_are_the_published_models():
    with FakeTensorMode():
        medium = SD3Transformer2DModel(**step_cost.config("sd3.5-medium"))
        z, cond = torch.randn(1, 16, 64, 64), torch.randn(1, 154, 4096)
        tflop = step_cost.flops(lambda: medium(z, cond, torch.randn(1, 2048), torch.ones(1))) / 1e12
    assert sum(x.numel() for x in medium.parameters()) == 2_243_171_520 and tflop == pytest.approx(2.14, abs=0.005)
    with torch.device("meta"):
        counts = [SD3Transformer2DModel(**step_cost.config(size)).num_parameters() for size in ("small", "sd3.5-large")]
    assert counts[0] == pytest.approx(46e6, rel=0.01) and counts[1] == pytest.approx(8.06e9, rel=0.01)


def test_fit_counts_gradients_casts_and_activations():
    flags = ((False, None), (True, None), (True, 4))
    whole, checkpointed, lora = (step_cost.peak_of_terms("tiny", 2, *x) for x in flags)
    assert whole["weights"] > 4 * whole["trained"] > 50 * lora["trained"] and lora["weights"] < whole["weights"]
    vae = step_cost.peak_of_vae(1, 8)
    assert vae["weights"] == 4 * 83_819_683 and vae["peak"] > 3 * 4 * 128 * 64 * 64
    assert 6 * whole["trained"] < checkpointed["peak"] < whole["peak"]
    assert lora["peak"] < checkpointed["peak"] - 4 * (whole["trained"] - lora["trained"]) + 2 * whole["trained"]


def test_memory_of_a_step_is_the_sum_of_its_parts():
    vae, text = {"weights": 7e9, "peak": 3e9}, {"parameters": 5e9}
    for peak, most in ((6e9, 6), (1e9, 4 * 0.5 + 3)):  # of the terms; of the VAE, beside the gradients
        found = step_cost.gigabytes({"weights": 2e9, "trained": 0.5e9, "peak": peak}, vae, text)
        assert found == pytest.approx({
            "weights_gb": 2, "moments_gb": 8 * 0.5, "gradients_bf16_weights_activations_gb": most,
            "encoders_vae_gb": 7 + 2 * 5, "total_gb": 2 + 4 + most + 17,
        })  # fmt: skip


def test_frozen_models_have_the_published_sizes_and_operations():
    few, more = step_cost.encoders(1), step_cost.encoders(4)
    assert few["parameters"] == 4_762_310_656 + 123_650_304 + 694_659_840  # of the published weights
    # 2 operations a weight and token, but for embeddings and CLIP's one projection, and the attention's small rest
    embeddings = 32_128 * 4096 + (49_408 + 77) * (768 + 1280)
    assert few["flop"] == pytest.approx(2 * 77 * (few["parameters"] - embeddings), rel=0.03)
    assert more["flop"] == 4 * few["flop"]
    assert step_cost.peak_of_vae(2, 8)["flop"] == 2 * step_cost.peak_of_vae(1, 8)["flop"]
    share = step_cost.shares(Args(), "sd3.5-medium", more, step_cost.peak_of_vae(4, 64))
    assert sum(share.values()) == pytest.approx(1) and share["transformer"] > 0.9


def test_growth_options_and_one_run_and_write(tmp_path, alone):
    flags = {"size": "tiny", "repeats": 1, "output_dir": tmp_path, "num_aux_points": 1, "clock": "cpu"}
    for what in ("growth", "options", "one", "host"):
        step_cost.main(Args(what=what, **flags))
    growth = json.loads((tmp_path / "step_cost_growth_tiny_cpu.json").read_text())["growth"]
    assert list(growth) == ["batch_size", "num_aux_points", "side", "processes"]
    assert alone == [("SOAR", 1), ("SOAR", 2)]
    tflop = [row["tflop"] for row in growth["batch_size"].values()]
    assert tflop[1] == pytest.approx(2 * tflop[0], rel=1e-3)
    assert matplotlib.image.imread(tmp_path / "step_cost.png").shape[1] > 1000
    assert len(json.loads((tmp_path / "step_cost_options_tiny_cpu.json").read_text())["options"]) == 7
    found = json.loads((tmp_path / "step_cost_host.json").read_text())["host"]
    assert found["rows_checked_per_second"] > 1
    assert 0 < found["images"]["32"]["taken"] and 0 < found["images"]["32"]["drawn"]


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"num_aux_points": -1}, {"device": "cuda", "clock": "cpu"}])
def test_bad_flags_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
        Args(**bad)
