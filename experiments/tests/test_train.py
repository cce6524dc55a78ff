"""train.py on the small Stable Diffusion 3 pipeline of experiments/shapes_data."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
import tyro
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

import sample
import train
from experiments.shapes import DATA
from experiments.tests.common import MODEL, launch
from soar import SoarConfig

TRAIN = MODEL | {"dataset": str(DATA / "train"), "resolution": 64, "dataloader_num_workers": 0}


@pytest.fixture(autouse=True)
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same three steps at global batch 4, cut into 1 x 4, 2 x 2 and 1 x 2 x 2 accumulated."""
    folder = tmp_path_factory.mktemp("runs")
    flags = TRAIN | {"max_train_steps": 3, "checkpointing_steps": 2, "learning_rate": 1e-4, "num_rollout_paths": 2}
    flags |= {"num_aux_points": 1}
    for name, processes, batch, accumulation in (("1x4", 1, 4, 1), ("2x2", 2, 2, 1), ("1x2x2", 1, 2, 2)):
        split = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        done = launch(processes, "train.py", output_dir=folder / name, **split, **flags)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_losses_and_weights_do_not_depend_on_the_number_of_processes_or_the_accumulation(runs):
    base = SD3Transformer2DModel.from_pretrained(DATA / "model", subfolder="transformer").state_dict()
    reference = load_file(runs / "1x4/final/transformer/diffusion_pytorch_model.safetensors")
    assert max((reference[key] - base[key]).abs().max() for key in reference) > 1e-5  # it was trained
    assert len(losses(runs / "1x4")) == 3
    for name in ("2x2", "1x2x2"):
        for a, b in zip(losses(runs / "1x4"), losses(runs / name), strict=True):
            for key in ("step", "loss", "base", "aux", "grad_norm", "lr"):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (name, key)
        weights = load_file(runs / name / "final/transformer/diffusion_pytorch_model.safetensors")
        # Adam's first steps turn rounding of a gradient near 0 into a part of a whole step of 1e-4.
        assert max((weights[key] - reference[key]).abs().max() for key in weights) < 2e-5


def test_checkpoints_are_whole_diffusers_directories_and_final_is_the_last(runs):
    run = runs / "1x4"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-000002", "checkpoint-000003", "final", "metrics.jsonl",
    ]  # fmt: skip
    assert (run / "final").resolve() == (run / "checkpoint-000003").resolve()
    model = SD3Transformer2DModel.from_pretrained(run / "checkpoint-000002" / "transformer")
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("settings, forwards", [({}, [True, False] + [True] * 6), ({"lambda_aux": 0.0}, [True])])
def test_training_step_runs_one_plus_one_plus_six_forwards_and_sft_one(tmp_path, monkeypatch, settings, forwards):
    calls, original = [], SD3Transformer2DModel.forward

    def counting(self, hidden_states, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        assert len(hidden_states) == 2 and hidden_states.dtype == torch.float32
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    train.main(train.Args(output_dir=tmp_path / "run", train_batch_size=2, max_train_steps=1, **TRAIN, **settings))
    assert calls == forwards
    (line,) = losses(tmp_path / "run")
    if settings:
        assert line["loss"] == pytest.approx(line["base"]) and "aux" not in line
    else:
        assert line["loss"] == pytest.approx((line["base"] + 6 * line["aux"]) / 7)


def test_every_pair_is_seen_once_an_epoch_and_ranks_share_none():
    flags = TRAIN | {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 7}
    args, rows, world_size = train.Args(output_dir=Path("x"), **flags), 45, 2
    per_rank = [list(train.batch_rows(rows, args, rank, world_size)) for rank in range(world_size)]
    assert [len(batches) for batches in per_rank] == [21, 21]
    epochs = []
    for epoch in (0, 1):  # 3 global batches of 12 an epoch, 9 rows left over
        seen = [row for batches in per_rank for batch in batches[9 * epoch : 9 * epoch + 9] for row in batch]
        assert len(seen) == len(set(seen)) == 36 and set(seen) <= set(range(rows))
        epochs.append(seen)
    assert set(epochs[0]) != set(epochs[1])
    whole = dataclasses.replace(args, train_batch_size=12, gradient_accumulation_steps=1)
    (first, *_) = train.batch_rows(rows, whole, 0, 1)
    assert sorted(first) == sorted(row for batches in per_rank for batch in batches[:3] for row in batch)


def test_ranks_draw_different_noise_and_together_the_global_batchs():
    config = SoarConfig(num_rollout_paths=2, shared_noise=False)
    draws = train.draw((4, 3, 2, 2), config, sample.seeded(1, "step", 1))
    cpu = torch.device("cpu")
    first, second = (train.take(draws, slice(i, i + 2), cpu) for i in (0, 2))
    for axis, whole, a, b in zip((0, 0, 2, 1, 1), draws, first, second, strict=True):
        assert torch.equal(torch.cat([a, b], axis), whole) and not torch.equal(a, b)


def test_every_flag_is_read():
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(train))) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value) in ("args", "self.args")}
    names = {field.name for field in dataclasses.fields(train.Args)} - {f.name for f in dataclasses.fields(SoarConfig)}
    assert names - read == set()


def test_published_flags_are_aliases():
    words = "--dataset d --output_dir o --trajectory_length 3 --cfg_scale_sampling 2.5 --sde_rollout_type cps"
    args = tyro.cli(train.Args, args=words.split(), use_underscores=True)
    assert args.soar_config() == SoarConfig(num_aux_points=3, guidance_scale=2.5, sde_type="cps")
    defaults = tyro.cli(train.Args, args=["--dataset", "d", "--output_dir", "o"], use_underscores=True)
    assert defaults.soar_config() == SoarConfig()
    published = {"train_batch_size": 4, "max_train_steps": 5000, "learning_rate": 2e-5, "adam_weight_decay": 1e-2}
    published |= {"max_grad_norm": 1.0, "mixed_precision": "bf16", "max_sequence_length": 77, "seed": 42}
    assert {name: getattr(defaults, name) for name in published} == published


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"lambda_aux": -1.0}, "lambda_aux is -1.0"),
        ({"max_train_steps": 0}, "--max_train_steps is 0, expected more than 0"),
        ({"lr_warmup_steps": 5}, "--lr_warmup_steps is not read by --lr_scheduler constant"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        train.Args(dataset="d", output_dir=Path("o"), **bad)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            {"caption_column": "caption"},
            r"--caption_column caption: .* has the columns \['image', 'text', 'aesthetic'\]",
        ),
        ({"image_column": "text"}, "--image_column text of .* holds no images"),
        ({"resolution": 60}, "--resolution is 60, expected a multiple of 8 pixels"),
        ({"shift": 1.0}, "--shift is 1.0, but the pipeline samples with shift 3.0"),
        ({"train_batch_size": 4000}, "has 2000 pairs, a global batch takes 4000"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train.main(train.Args(output_dir=tmp_path / "run", **(TRAIN | bad)))
    assert not (tmp_path / "run").exists()


def test_output_dir_of_another_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is not empty"):
        train.main(train.Args(output_dir=tmp_path, **TRAIN))
