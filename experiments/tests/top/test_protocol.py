"""What sample.py's images depend on, and the folders that hold them: compared, refused, locked."""

import errno
import fcntl
import os
import re
import shutil
from importlib.metadata import version

import huggingface_hub.constants
import pytest
from PIL import Image

import sample
from experiments.shapes.draw import MAX_SEQUENCE_LENGTH
from experiments.tests.top.sampling import (
    BASE,
    ONE,
    WEIGHTS,
    edit_json,
    edit_weights,
    planned,
    refused,
    scale_first,
)

ROWS = [{"prompt": ONE["prompt"]}]


# --- What is held ---------------------------------------------------------------------------------


def test_protocol_holds_what_images_depend_on(trained):
    protocol = planned(str(trained / "run"), num_inference_steps=3).protocol
    digests = [protocol.pop(key) for key in ("prompts", "pipeline", "transformer")]
    assert all(re.fullmatch("[0-9a-f]{64}", x) for x in digests) and len(set(digests)) == 3
    # SD3's: sigma(t) = 3 t / (1 + 2 t) at even steps from t = 1 to t = sigma(1 / 1000), then 0.
    assert protocol.pop("sigmas") == pytest.approx([1, 0.751121, 0.0089286, 0], abs=1e-6)
    place = (trained / "run/checkpoint-000007/transformer").resolve()
    assert protocol == {
        "from": {"pipeline": str(BASE), "transformer": str(place)}, "lora": None,
        "num_images_per_prompt": 1, "num_inference_steps": 3, "guidance_scale": 4.5, "height": 64,
        "width": 64, "seed": 3, "batch_size": 4, "mixed_precision": "no", "compile": False,
        "max_sequence_length": MAX_SEQUENCE_LENGTH, "torch": version("torch"),
        "diffusers": version("diffusers"), "transformers": version("transformers"),
    }  # fmt: skip
    base, lora = planned().protocol, planned(str(trained / "lora")).protocol
    assert base["from"] == {"pipeline": str(BASE), "transformer": "base"}
    assert base["lora"] is None and len(lora["lora"]) == 64
    assert base["transformer"] == lora["transformer"] != digests[2]
    assert base["pipeline"] == lora["pipeline"] == digests[1]


def test_pipeline_of_the_hub_is_told_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(BASE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    protocol = planned(pretrained_model_name_or_path="a/b").protocol
    assert protocol["pipeline"] == protocol["transformer"] == commit


def test_max_sequence_length_is_the_checkpoints_or_said_aloud(
    trained, tmp_path, capsys, monkeypatch
):
    newest, other = str(trained / "run"), tmp_path / "other"
    shutil.copytree(trained / "run/checkpoint-000007", other)
    edit_json(other / "trainer_state.json", settings={"max_sequence_length": 9})

    def lengths(*transformers: str, given: int | None) -> set[int]:
        flags = ONE | {"transformer": transformers, "max_sequence_length": given}
        jobs = sample.plan(sample.Args(output_dir=tmp_path, **flags), ROWS)
        return {job.protocol["max_sequence_length"] for job in jobs}

    assert lengths("base", given=None) == {77}
    assert lengths("base", newest, given=None) == {12}  # all are drawn with the same
    assert capsys.readouterr().out == ""
    assert lengths("base", newest, given=16) == {16}
    (warning,) = capsys.readouterr().out.splitlines()
    assert "warning" in warning and "16" in warning and "12" in warning
    monkeypatch.setenv("RANK", "1")
    assert lengths(newest, str(other), given=12) == {12}
    assert capsys.readouterr().out == ""  # one rank's word is enough
    with pytest.raises(ValueError, match="--max_sequence_length.*9, 12"):
        lengths(newest, str(other), given=None)


# --- Another protocol -----------------------------------------------------------------------------


def test_output_dir_of_another_protocol_is_refused_with_the_differences(tmp_path, no_model):
    job = planned(output_dir=tmp_path)
    sample.prepare(job, ROWS)
    sample.check_folder(tmp_path, job.protocol | {"from": "elsewhere"})  # accepts it
    words = (str(tmp_path), "guidance_scale: was 4.5, now 3.0", "seed: was 3, now 4")
    message = refused(tmp_path, *words, **ONE | {"guidance_scale": 3.0, "seed": 4})
    assert "height" not in message
    assert "seed" not in refused(tmp_path, "prompts: was", **ONE | {"prompt": "another"})


def test_output_dir_of_other_files_is_refused(tmp_path, no_model):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".DS_Store").touch()
    sample.check_folder(tmp_path, {})  # free: of a fresh disk and a file browser
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    refused(tmp_path, str(tmp_path), "protocol.json", **ONE)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "protocol.json")
    refused(tmp_path, str(tmp_path), "seed: was None, now 3", **ONE)  # by an older version


def changes(before: dict, after: dict) -> set[str]:
    """The keys of a protocol that differ, but for the places."""
    return {key for key in before if before[key] != after[key]} - {"from"}


def test_other_weights_in_the_same_path_are_told_from_equal_ones_elsewhere(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    shutil.copytree(trained / "run/checkpoint-000007", tmp_path / "b")
    shutil.copytree(trained / "lora", tmp_path / "b/lora")
    run, lora = tmp_path / "a/run", tmp_path / "a/lora" / sample.LORA
    for given, elsewhere, weights, key in (
        (run, ("b", "b/transformer"), run / "checkpoint-000007/transformer", "transformer"),
        (lora, ("b/lora",), lora.parent, "lora"),
    ):
        was = planned(str(given)).protocol
        for place in elsewhere:  # b/transformer is without the state beside it
            equal = planned(str(tmp_path / place)).protocol
            assert changes(was, equal) == set()
            assert equal["from"]["transformer"].startswith(str(tmp_path / place))
        edit_weights(weights, scale_first)
        assert changes(was, planned(str(given)).protocol) == {key}


def test_settings_of_the_transformer_are_part_of_what_images_depend_on(trained, tmp_path):
    folder = tmp_path / ".cache/transformer"
    shutil.copytree(trained / "run/checkpoint-000007/transformer", folder)
    was = sample.digest(trained / "run/checkpoint-000007/transformer")
    edit_json(folder / "config.json", _name_or_path="elsewhere")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/config-checkpoint.json").write_text("{}")
    (folder / "README.md").write_text("Notes.\n")
    assert sample.digest(folder) == was
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert sample.digest(folder) != was
    (folder / "other.safetensors").rename(folder / WEIGHTS)
    edit_json(folder / "config.json", qk_norm=None)
    assert sample.digest(folder) != was


@pytest.mark.parametrize(
    "path, edit, keys",
    [
        ("transformer", None, {"transformer"}),
        ("text_encoder_3", None, {"pipeline"}),
        ("tokenizer_2/tokenizer.json", {"normalizer": None}, {"pipeline"}),
        ("scheduler/scheduler_config.json", {"shift": 2.0}, {"pipeline", "sigmas"}),
        ("model_index.json", {"text_encoder_3": [None, None]}, {"pipeline"}),
    ],
)
def test_parts_of_a_local_base_that_are_overwritten_are_told_apart(tmp_path, path, edit, keys):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    shutil.copytree(BASE / "vae", base / "another")  # a folder that is no part of it
    copy = planned(pretrained_model_name_or_path=str(base)).protocol
    assert changes(planned().protocol, copy) == set()
    if edit is None:
        edit_weights(base / path, scale_first)
    else:
        edit_json(base / path, **edit)
    assert changes(copy, planned(pretrained_model_name_or_path=str(base)).protocol) == keys


# --- Folders --------------------------------------------------------------------------------------


def test_transformers_folder_has_a_name_wherever_the_run_starts(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained / "run/checkpoint-000007/transformer")
    names = {"..": "checkpoint-000007", ".": "transformer", "../transformer": "transformer"}
    names[str(trained / "run")] = "-".join((trained / "run").parts[1:])
    for given, name in names.items():
        args = sample.Args(output_dir=tmp_path, transformer=("base", given), **ONE)
        folders = [job.folder for job in sample.plan(args, ROWS)]
        assert folders == [tmp_path / "base", tmp_path / name]
    args = sample.Args(output_dir=tmp_path, transformer=("base", "base"), **ONE)
    with pytest.raises(ValueError, match="base.*one folder"):
        sample.plan(args, ROWS)


@pytest.mark.parametrize("content", [Image.new("RGB", (8, 8)), "new"])
def test_save_whole_leaves_the_old_file_where_writing_fails(tmp_path, monkeypatch, content):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        sample.save_whole(content, tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_folder_on_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with sample.locked(tmp_path):
        printed = capsys.readouterr().out
    assert "warning" in printed and str(tmp_path) in printed
