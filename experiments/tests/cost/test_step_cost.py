"""experiments.cost.step_cost and .memory: the ways to take a step agree; what they cost is counted,
not timed; the page's numbers are those of the results."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel

import train
from experiments.cost import memory, step_cost
from experiments.cost.rehearsal import empty_pipeline
from experiments.cost.step_cost import RESULTS, SIZES, WAYS, Args
from sample import ENCODERS

PAGE = (RESULTS.parent / "README.md").read_text()


def sizes(blocks: int | None) -> list[int]:
    pipe = empty_pipeline(blocks)
    names = ("transformer", "vae", *ENCODERS)
    return [sum(x.numel() for x in getattr(pipe, name).parameters()) for name in names]


def test_table_compares_ways_and_counts_units_and_graphs(tmp_path, monkeypatch, capsys):
    little = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    little |= {"joint_attention_dim": 256, "pooled_projection_dim": 192, "pos_embed_max_size": 16}
    monkeypatch.setitem(SIZES, "tiny", (SIZES["small"][0] | little, 16))
    step_cost.main(Args("table", "tiny", "cpu", 1, 8, 2, compiled=False, output_dir=tmp_path))
    written = json.loads((tmp_path / "step_cost_table_tiny_cpu.json").read_text())
    assert step_cost.as_table(written) in capsys.readouterr().out
    rows = written["ways"]
    assert list(rows) == [name for name, way in WAYS.items() if not way.compiled]
    sft, published, as_run, soar = (row["forward_units"] for row in rows.values())
    assert soar == pytest.approx(3 * sft + 1) and published == pytest.approx(soar + 1)
    assert 2 < sft < 3.5 and 0 < as_run - published < 4

    # The published schedule holds the graphs of N + 1 terms and of the rollout, ours one.
    sft, published, as_run, soar = (row["bytes"] for row in rows.values())
    assert soar < 1.2 * sft and published > 2 * sft and as_run < published


def test_ways_that_differ_are_refused():
    sums = torch.ones(len(train.METRICS), 2)
    sft, other, aux = torch.zeros_like(sums), sums.clone(), train.METRICS.index("aux")
    sft[train.METRICS.index("base") : aux] = 1
    other[aux] = 1.001
    step_cost.check_same({"SFT": sft, "SOAR": sums}, bf16=False)
    step_cost.check_same({"published": other, "SOAR": sums}, bf16=True)
    with pytest.raises(AssertionError, match="published differs"):
        step_cost.check_same({"published": other, "SOAR": sums}, bf16=False)


def test_sizes_operations_and_hours_are_the_pages():
    """The hub's files in 16 bits are 4.94 GB (0.45 of positions), 0.17, 0.25, 1.39 and 9.52."""
    found = sizes(None)
    assert found[0] == 2_243_171_520
    assert [round(2 * size / 1e9, 2) for size in found] == [4.49, 0.17, 0.25, 1.39, 9.52]
    with torch.device("meta"):
        small = SD3Transformer2DModel(**SIZES["small"][0]).num_parameters()
    assert small == pytest.approx(46e6, rel=0.01)
    made = json.loads((RESULTS / "step_cost_fit.json").read_text())
    tflop = memory.forward_flops()
    assert tflop == made["forward_tflop"]
    assert [round(x, 2) for x in tflop.values()] == [2.14, 0.83, 1.12]
    assert memory.hours(tflop) == made["hours"]
    for name, x in made["hours"].items():
        assert f"\n| {name} | {x:.2f} |\n" in PAGE


def test_tables_of_the_page_are_those_of_the_results():
    fit = json.loads((RESULTS / "step_cost_fit.json").read_text())
    table = json.loads((RESULTS / "step_cost_table_small_cpu.json").read_text())
    assert memory.as_table(fit["memory"]) in PAGE
    assert list(fit["memory"]) == list(memory.WAYS)
    assert step_cost.as_table(table) in PAGE
    assert list(table["ways"]) == list(WAYS)


def test_a_step_in_memory_reads_no_value_and_is_the_sum_of_its_parts():
    row = memory.measure(blocks=1)  # a value read raises
    assert row["moments"] == pytest.approx(2 * 4 * row["trained"], rel=0.01)
    assert row["gradients"] == 4 * row["trained"]
    names = ("weights", "gradients", "moments", "activations")
    assert sum(row[name] for name in names) == row["total"]
    without = memory.measure(encoders_on_cpu=True, blocks=1)
    encoders = 2 * sum(sizes(1)[2:])
    assert row["total"] - without["total"] == encoders


def test_layer_norms_are_in_float32_as_in_cudas_autocast():
    x = torch.ones(4, dtype=torch.bfloat16)
    with torch.autocast("cpu"), memory.cuda_autocast():
        assert torch.nn.functional.layer_norm(x, (4,)).dtype == torch.float32


def test_host_takes_what_threads_have_ready(tmp_path):
    step_cost.photographs(32, tmp_path / "photographs.parquet")
    pairs = train.Pairs(train.DataConfig(str(tmp_path / "photographs.parquet"), resolution=64))
    pairs.digests = [pairs.inspect(row)[0] for row in pairs.rows]
    assert 0 < step_cost.seconds_to_take(pairs, 32, 1) < 10


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"device": "cuda"}])
def test_bad_flags_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
        Args(**bad)
