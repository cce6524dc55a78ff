"""The data of train.py: what is read, in which order, what is checked, what is refused."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import train
from experiments.tests.common import ROOT, fork, train_args

WHITE, HALF = (255, 255, 255), (255, 127, 127)


def read(dataset: Path, **flags) -> train.Pairs:
    """The pairs of a data set."""
    return train.Pairs(train_args(dataset=dataset, output_dir=dataset.parent / "out", **flags))


def refused(dataset: Path, *words: str, **flags) -> None:
    """Reading it raises ValueError, whose message has these words."""
    with pytest.raises(ValueError) as caught:
        read(dataset, **flags)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def noise_image(seed: int, size: tuple[int, int] = (40, 72)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int = 8, first: int = 0) -> list[Path]:
    """Images of noise that are not square."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(first, first + count)]
    for i, path in enumerate(paths, first):
        noise_image(i).save(path)
    return paths


def write_pairs(folder: Path, count: int = 8, first: int = 0) -> Path:
    """Such images with a metadata.jsonl."""
    rows = []
    for i, path in enumerate(write_images(folder, count, first), first):
        rows.append({"file_name": path.name, "text": f"picture {i}", "score": i / 2})
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_list(folder: Path, kind: str) -> Path:
    """The pairs of a folder as a list of paths."""
    rows = [{"image": f"{i}.png", "text": f"picture {i}"} for i in range(8)]
    if kind == "jsonl":
        return write_lines(folder / "rows.jsonl", rows)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    lines = ["image,text", *(f"{row['image']},{row['text']}" for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def captions(pairs: train.Pairs) -> list[str]:
    return [pairs[i, 1, 0][1] for i in range(len(pairs))]


# --- Kinds of data ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight pairs that no test changes."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def reference(folder) -> train.Pairs:
    return read(folder)


def same_pairs(pairs: train.Pairs, reference: train.Pairs) -> None:
    assert len(pairs) == 8 and pairs.digest == reference.digest
    for i in range(8):
        (image, text), (expected, _) = pairs[i, 1, 0], reference[i, 1, 0]
        assert torch.equal(image, expected) and text == f"picture {i}"


def test_folder_gives_its_pairs_in_order(folder, reference):
    assert captions(reference) == [f"picture {i}" for i in range(8)]
    box = (0, 16, 40, 56)  # the middle
    middle = Image.open(folder / "0.png").resize((64, 64), Image.Resampling.LANCZOS, box)
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
    assert (reference[0, 1, 0][0] - expected).abs().max() < 1e-5
    assert "8 of 8" in reference.report and "8 are smaller than 64 pixels" in reference.report


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_lists_of_paths_give_the_pairs_of_the_folder(tmp_path, reference, kind):
    folder = write_pairs(tmp_path / "pairs")
    same_pairs(read(write_list(folder, kind)), reference)


def test_tar_gives_the_pairs_of_the_folder(tmp_path, folder, reference):
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for i in range(8):
            (tmp_path / f"{i}.txt").write_text(f"picture {i}")
            tar.add(folder / f"{i}.png", f"{i}.png")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    pairs = read(tmp_path / "rows.tar", image_column="png", caption_column="txt")
    same_pairs(pairs, reference)


@pytest.mark.parametrize("kind", ["Image", "binary", "large_binary", "bytes", "bytes and path"])
def test_parquet_of_any_writer_gives_the_pairs_of_the_folder(tmp_path, folder, reference, kind):
    content = [(folder / f"{i}.png").read_bytes() for i in range(8)]
    text = [f"picture {i}" for i in range(8)]
    if kind == "Image":
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [{"bytes": x, "path": None} for x in content], "text": text}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    else:
        images = {
            "binary": pyarrow.array(content, pyarrow.binary()),
            "large_binary": pyarrow.array(content, pyarrow.large_binary()),
            "bytes": pyarrow.array([{"bytes": x} for x in content]),
            "bytes and path": pyarrow.array([{"bytes": x, "path": "x.png"} for x in content]),
        }
        table = pyarrow.table({"image": images[kind], "text": text})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    same_pairs(read(tmp_path / "rows.parquet"), reference)


def test_sidecars_give_the_pairs_of_the_folder(tmp_path, folder, reference):
    for i in range(8):
        shutil.copytree(folder, tmp_path / "x", dirs_exist_ok=True)
        (tmp_path / f"x/{i}.txt").write_text(f"picture {i}\n")
    (tmp_path / "x/metadata.jsonl").unlink()
    same_pairs(read(tmp_path / "x"), reference)
    (tmp_path / "x/3.txt").unlink()
    refused(tmp_path / "x", "1 of 8 rows", "row 3 (3.png)", "text")
    assert len(read(tmp_path / "x", on_bad_row="skip")) == 7
    rows = [{"file_name": "0.png", "text": "listed"}]
    write_lines(tmp_path / "x/metadata.jsonl", rows)  # wins over the sidecars
    pairs = read(tmp_path / "x")
    assert captions(pairs) == ["listed"] and "7 images without a row" in pairs.report


def test_sidecar_that_is_no_text_is_refused_by_name(tmp_path):
    write_images(tmp_path / "x", count=2)
    (tmp_path / "x/0.png").rename(tmp_path / "x/0.PNG")
    (tmp_path / "x/0.txt").write_bytes(b"\xef\xbb\xbfpicture 0")  # with a byte order mark
    (tmp_path / "x/1.txt").write_bytes(b"\xff\xfe\0")
    refused(tmp_path / "x", "1.txt")
    (tmp_path / "x/1.txt").write_text("")
    assert captions(read(tmp_path / "x", on_bad_row="skip")) == ["picture 0"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_file_of_any_kind_may_lie_above_its_images(tmp_path, kind):
    write_images(tmp_path / "x/a", count=2)
    write_images(tmp_path / "x/train", count=1, first=2)
    names, file = ["train/2.png", "a/0.png", "a/1.png"], tmp_path / f"x/metadata.{kind}"
    rows = [{"file_name": name, "text": f"of {name}"} for name in names]
    if kind == "jsonl":
        write_lines(file, rows)
    elif kind == "csv":
        lines = [f"{row['file_name']},{row['text']}" for row in rows]
        file.write_text("\n".join(["file_name,text", *lines]) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert captions(read(tmp_path / "x")) == ["of a/0.png", "of a/1.png", "of train/2.png"]
    rows[1]["file_name"] = "../elsewhere.png"
    noise_image(0).save(tmp_path / "elsewhere.png")
    if kind == "jsonl":
        write_lines(file, rows)
        refused(tmp_path / "x", "1 of 3 rows", "elsewhere.png, outside")


def test_name_that_is_no_local_path_is_a_hub_id(folder, monkeypatch):
    asked = []
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": (folder / "0.png").read_bytes(), "path": None}], "text": ["hi"]}

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict(rows, features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = {"dataset": "me/pictures", "output_dir": "out", "dataset_split": "validation"}
    assert captions(train.Pairs(train_args(**words))) == ["hi"]
    assert asked == [("me/pictures", "validation")]
    paths = datasets.Dataset.from_dict({"image": [str(folder / "0.png")], "text": ["hi"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: paths)
    with pytest.raises(ValueError, match="no images"):  # a stranger's paths are not followed
        train.Pairs(train_args(**words))


def test_images_without_captions_are_refused(tmp_path):
    write_images(tmp_path / "x")
    refused(tmp_path / "x", "no captions", "metadata.jsonl", "NAME.txt")


def test_paths_may_hold_the_characters_of_patterns(tmp_path, reference):
    folder = write_pairs(tmp_path / "a [b] *" / "{c}?")
    same_pairs(read(folder), reference)
    same_pairs(read(write_list(folder, "csv")), reference)
    table = pyarrow.table({"image": [(folder / "0.png").read_bytes()], "text": ["picture 0"]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    assert captions(read(folder / "rows.parquet")) == ["picture 0"]


def test_what_holds_no_rows_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    refused(tmp_path / "rows.jsonl", "rows.jsonl", "no rows")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "holds none of", "metadata.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    refused(tmp_path / "rows.txt", "rows.txt", ".jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png", "text": "a"}\n{"image": \n')
    refused(tmp_path / "bad.jsonl", "bad.jsonl", "line 2")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


# --- Order and splits ---

ORDER = """
import sys, train
from experiments.tests.common import train_args
pairs = train.Pairs(train_args(dataset=sys.argv[1], output_dir="out"))
print(pairs.digest, [pairs[i, 1, 0][1] for i in range(len(pairs))])
"""


def test_order_of_several_metadata_files_does_not_depend_on_the_hash_seed(tmp_path):
    for k, name in enumerate(("cars", "boats", "apples", "dogs")):
        write_pairs(tmp_path / "data" / name, count=3, first=3 * k)
    expected = [6, 7, 8, 3, 4, 5, 0, 1, 2, 10, 11, 9]  # by path, as text
    pairs = read(tmp_path / "data")
    assert captions(pairs) == [f"picture {i}" for i in expected]
    command = [sys.executable, "-c", ORDER, str(tmp_path / "data")]
    env = os.environ | {"PYTHONHASHSEED": "7", "HF_HOME": str(tmp_path / "home")}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == f"{pairs.digest} {captions(pairs)}", done.stderr[-2000:]


@pytest.mark.parametrize("layout", ["metadata", "sidecars"])
@pytest.mark.parametrize("names", [("bus", "train"), ("bus", "test"), ("a toy train", "dogs")])
def test_class_folders_are_read_whole_whatever_their_names(tmp_path, names, layout):
    for k, name in enumerate(names):
        folder = write_pairs(tmp_path / "data" / name, count=3, first=3 * k)
        if layout == "sidecars":
            (folder / "metadata.jsonl").unlink()
            for i in range(3 * k, 3 * k + 3):
                (folder / f"{i}.txt").write_text(f"picture {i}")
    pairs = read(tmp_path / "data")
    assert sorted(captions(pairs)) == [f"picture {i}" for i in range(6)]
    assert "left out: " not in pairs.report.replace("left out by", "")


def test_tars_of_a_folder_are_read_whole_whatever_their_names(tmp_path, folder):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("part-0", "train-extra", "test")):
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
        with tarfile.open(tmp_path / "data" / f"{name}.tar", "w") as tar:
            tar.add(folder / f"{i}.png", f"{i}.png")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    pairs = read(tmp_path / "data", image_column="png", caption_column="txt")
    assert captions(pairs) == ["picture 0", "picture 2", "picture 1"]  # by name
    (tmp_path / "data/x.parquet").touch()
    refused(tmp_path / "data", "several kinds", ".parquet, .tar")


@pytest.mark.parametrize("names", [("part-0", "train-extra"), ("test", "dev"), ("eval", "b")])
def test_tables_of_a_folder_are_read_whole_whatever_their_names(tmp_path, folder, names):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(names):
        rows = {"image": [(folder / f"{i}.png").read_bytes()], "text": [f"picture {i}"]}
        path = tmp_path / "data" / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    assert sorted(captions(read(tmp_path / "data"))) == ["picture 0", "picture 1"]


def test_split_folders_are_chosen_and_what_is_left_out_is_named(tmp_path):
    write_pairs(tmp_path / "data/train", count=4)
    write_pairs(tmp_path / "data/validation", count=2, first=4)
    pairs = read(tmp_path / "data")
    assert captions(pairs) == [f"picture {i}" for i in range(4)]
    assert "3 files of the split validation" in pairs.report
    other = read(tmp_path / "data", dataset_split="validation")
    assert captions(other) == ["picture 4", "picture 5"]
    refused(tmp_path / "data", "dev", "train, validation", dataset_split="dev")
    refused(tmp_path / "data/train", "dataset_split", "validation", dataset_split="validation")
    listed = write_lines(tmp_path / "rows.jsonl", [{"image": "data/train/0.png", "text": "a"}])
    refused(listed, "dataset_split", "validation", dataset_split="validation")


def test_shards_named_by_their_split_are_chosen(tmp_path, folder):
    (tmp_path / "data/data").mkdir(parents=True)
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    for i, name in enumerate(names):
        rows = {"image": [(folder / f"{i}.png").read_bytes()], "text": [f"picture {i}"]}
        path = tmp_path / "data/data" / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    pairs = read(tmp_path / "data")
    assert captions(pairs) == ["picture 0", "picture 1"]
    assert "1 files of the split test" in pairs.report


def test_hidden_images_and_images_without_a_row_are_counted(tmp_path):
    folder = write_pairs(tmp_path / "pairs", count=3)
    write_images(folder / ".trash", count=2, first=10)
    write_images(folder, count=1, first=20)
    (folder / "linked").symlink_to(write_images(tmp_path / "elsewhere", count=1)[0].parent)
    report = read(folder).report
    assert "3 hidden images or linked folders" in report and ".trash/10.png" in report
    assert "1 images without a row" in report and "20.png" in report


def test_output_dir_inside_the_data_is_no_data(tmp_path):
    write_images(tmp_path / "x", count=3)
    for i in range(3):
        (tmp_path / f"x/{i}.txt").write_text(f"picture {i}")
    args = train_args(dataset=tmp_path / "x", output_dir=tmp_path / "x/runs/out")
    before = train.Pairs(args)
    write_images(tmp_path / "x/runs/out", count=1)  # a validation image
    after = train.Pairs(args)
    assert len(after) == 3 and after.digest == before.digest and "without" not in after.report


# --- Rows that cannot be used ---


def damage(folder: Path, i: int, fault: str) -> None:
    path = folder / f"{i}.png"
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "zero bytes":
        path.write_bytes(b"")
    elif fault == "directory":
        path.mkdir()
    elif fault == "bomb":
        Image.new("1", (14000, 7000)).save(path)
    elif fault == "outside":
        (folder.parent / "elsewhere.png").write_bytes(data)
        path.symlink_to(folder.parent / "elsewhere.png")
    elif fault == "32 bits":
        Image.fromarray(np.zeros((8, 8), np.int32)).save(path, format="TIFF")
    elif fault == "profile":
        noise_image(0).save(path, icc_profile=b"no profile")


FAULTS = {
    "truncated": "row 2 (2.png)",
    "zero bytes": "UnidentifiedImageError",
    "directory": "IsADirectoryError",
    "bomb": "DecompressionBombWarning",
    "outside": "elsewhere.png, outside",
    "32 bits": "32 bits",
    "missing": "FileNotFoundError",
    "profile": "ICC colour profile",
}


@pytest.mark.parametrize("layout", ["folder", "jsonl", "csv"])
@pytest.mark.parametrize("fault", FAULTS)
def test_image_that_cannot_be_used_is_listed_and_left_out_when_told_so(tmp_path, fault, layout):
    folder = write_pairs(tmp_path / "pairs")
    dataset = folder if layout == "folder" else write_list(folder, layout)
    damage(folder, 2, fault)
    refused(dataset, "1 of 8 rows", "row 2 (2.png)", FAULTS[fault], "--on_bad_row skip")
    pairs = read(dataset, on_bad_row="skip")
    assert pairs.numbers == [0, 1, 3, 4, 5, 6, 7] and "row 2 (2.png)" in pairs.report
    assert captions(pairs)[2] == "picture 3"


@pytest.mark.parametrize(
    "caption, word", [(None, "None"), ("", "''"), (" \t", "\\t"), ("long " * 20000, "100000")]
)
def test_caption_that_cannot_be_used_is_listed_with_its_row(tmp_path, caption, word):
    folder = write_pairs(tmp_path / "pairs")
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(8)]
    rows[2]["text"] = caption
    write_lines(folder / "metadata.jsonl", rows)
    refused(folder, "1 of 8 rows", "row 2 (2.png)", word)
    assert len(read(folder, on_bad_row="skip")) == 7


def test_captions_that_are_numbers_are_listed_up_to_twenty(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 30)
    with pytest.raises(ValueError, match="30 of 30 rows") as caught:
        read(folder, caption_column="score")
    assert str(caught.value).count("\n  row ") == 20 and "9.5" in str(caught.value)


def test_columns_that_do_not_fit_are_refused_by_name(folder, tmp_path):
    refused(folder, "--caption_column caption", "'text'", caption_column="caption")
    refused(folder, "--image_column score", "no images", image_column="score")
    refused(folder, "--min size", "'text'", min=("size=3",))
    refused(folder, "--min text", "no numbers", min=("text=3",))
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": 3}]
    mixed = write_pairs(tmp_path / "mixed", 2)
    write_lines(mixed / "metadata.jsonl", rows)
    refused(mixed, "metadata.jsonl", "text")
    (mixed / "rows.csv").write_text("image,text\n0.png,a,b\n")
    refused(mixed / "rows.csv", "rows.csv", "row 1")


# --- What is checked is what is trained ---


@pytest.mark.parametrize("layout", ["folder", "jsonl", "csv", "json", "sidecars"])
def test_checks_are_kept_until_an_image_is_removed_put_back_or_replaced(tmp_path, capfd, layout):
    folder = write_pairs(tmp_path / "pairs")
    dataset = folder if layout in ("folder", "sidecars") else write_list(folder, layout)
    if layout == "sidecars":
        (folder / "metadata.jsonl").unlink()
        for i in range(8):
            (folder / f"{i}.txt").write_text(f"picture {i}")
    before = read(dataset)
    assert "checking rows" in capfd.readouterr().err
    assert read(dataset).digest == before.digest
    assert "checking rows" not in capfd.readouterr().err
    kept = (folder / "3.png").read_bytes()
    if layout != "sidecars":  # an image that is gone from a folder of those is no row
        (folder / "3.png").unlink()
        refused(dataset, "1 of 8 rows", "row 3 (3.png)")
        (folder / "3.png").write_bytes(kept)
        assert read(dataset).digest == before.digest
    noise_image(99).save(folder / "3.png")
    after = read(dataset)
    assert after.digest != before.digest
    assert not torch.equal(after[3, 1, 0][0], before[2, 1, 0][0])
    with pytest.raises(RuntimeError, match="3.png has changed"):
        before[3, 1, 0]
    (folder / "3.png").unlink()
    with pytest.raises(RuntimeError, match="3.png has changed"):
        after[3, 1, 0]


@pytest.mark.parametrize("inside", [True, False])
def test_parquet_that_changes_is_read_and_checked_again(tmp_path, inside):
    paths = write_images(tmp_path, count=4)

    def write(paths: list[Path]) -> None:
        cells = [{"bytes": x.read_bytes() if inside else None, "path": x.name} for x in paths]
        table = pyarrow.table({"image": cells, "text": list("abcd")})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")

    write(paths)
    before = read(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet").digest == before.digest
    if inside:
        write(paths[::-1])
    else:
        for path in paths:
            noise_image(99).save(path)
    after = read(tmp_path / "rows.parquet")
    assert after.digest != before.digest and captions(after) == list("abcd")
    if not inside:
        paths[2].unlink()
        refused(tmp_path / "rows.parquet", "1 of 4 rows", "row 2 (2.png)")


def test_digest_is_of_pixels_captions_and_their_order(tmp_path, folder, reference):
    rows = [{"image": str(folder / f"{i}.png"), "text": f"picture {i}"} for i in range(8)]
    found = {reference.digest}
    for changed in (rows, rows[::-1], [rows[0] | {"text": "other"}, *rows[1:]], rows[1:]):
        found.add(read(write_lines(folder / "rows.jsonl", changed)).digest)
    (folder / "rows.jsonl").unlink()
    assert len(found) == 4  # the first is the folder's own


@pytest.mark.parametrize("fault", ["none", "fewer", "other pixels"])
def test_nodes_with_data_of_their_own_must_see_the_same(tmp_path, fault):
    folders = [write_pairs(tmp_path / name) for name in ("a", "b")]
    if fault == "fewer":
        damage(folders[1], 2, "missing")
    elif fault == "other pixels":
        noise_image(99).save(folders[1] / "2.png")

    def load() -> None:
        rank, _, _ = train.init_distributed()
        hosts = torch.distributed.new_group(backend="gloo")
        flags = {"dataset": folders[rank], "output_dir": "out", "train_batch_size": 1}
        train.load_pairs(train_args(on_bad_row="skip", **flags), hosts)

    ranks = fork(2, load, tmp_path / "log")
    for rank in ranks:
        rank.join(60)
    said = (tmp_path / "log.0").read_text()
    expected = [0, 0] if fault == "none" else [1, 1]
    assert [rank.exitcode for rank in ranks] == expected, said
    if fault != "none":
        counts = "8 and 7 pairs" if fault == "fewer" else "8 and 8 pairs"
        assert "ranks 0 and 1" in said and counts in said


def test_kill_9_during_the_row_check_leaves_no_process(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    noise_image(0, (1500, 1500)).save(folder / "0.png", compress_level=1)
    for i in range(1, 600):
        os.link(folder / "0.png", folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": "a"} for i in range(600)]
    write_lines(folder / "metadata.jsonl", rows)
    (process,) = fork(1, lambda: read(folder), tmp_path / "log")
    parent, workers = psutil.Process(process.pid), []
    expected = min(2, len(os.sched_getaffinity(0)))
    while len(workers) < expected:
        assert process.is_alive(), (tmp_path / "log.0").read_text()
        time.sleep(0.02)
        workers = parent.children()
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


@pytest.mark.parametrize("kind", ["uint8", "decimal", "double", "csv"])
def test_rows_are_kept_by_numbers_of_any_type(tmp_path, kind):
    folder = write_pairs(tmp_path / "pairs")
    numbers = [None, 0, 1, 3, 3, 4, 5, 250]
    content = [(folder / f"{i}.png").read_bytes() for i in range(8)]
    if kind == "csv":
        lines = [f"{i}.png,picture {i},{'' if x is None else x}" for i, x in enumerate(numbers)]
        dataset = folder / "rows.csv"
        dataset.write_text("\n".join(["image,text,score", *lines]) + "\n")
    else:
        if kind == "decimal":
            numbers = [None if x is None else Decimal(x) for x in numbers]
        types = {"uint8": pyarrow.uint8(), "double": pyarrow.float64()}
        types["decimal"] = pyarrow.decimal128(5, 1)
        scores = pyarrow.array(numbers, types[kind])
        table = pyarrow.table(
            {"image": content, "text": [f"picture {i}" for i in range(8)], "score": scores}
        )
        dataset = folder / "rows.parquet"
        pyarrow.parquet.write_table(table, dataset)
    pairs = read(dataset, min=("score=3",))
    assert pairs.numbers == [3, 4, 5, 6, 7] and "3 left out by --min" in pairs.report
    assert captions(pairs)[0] == "picture 3"
    assert captions(read(dataset, min=("score=3.5",)))[0] == "picture 5"
    assert captions(read(dataset, min=("score=3", "score=250")))[0] == "picture 7"


def test_dropped_captions_are_a_function_of_seed_step_and_sample(folder):
    pairs = read(folder, cond_dropout_rate=0.5)
    keys = [(0, step, i) for step in range(1, 9) for i in range(8)]
    drawn = [pairs[key][1] for key in keys]
    assert drawn == [pairs[key][1] for key in keys] and set(drawn) == {"", "picture 0"}
    assert 16 <= drawn.count("") <= 48
    other = read(folder, cond_dropout_rate=0.5, seed=1)
    assert drawn != [other[key][1] for key in keys]


# --- Pixels ---


def rgb_of(path: Path) -> np.ndarray:
    image = train.read_image({"bytes": None, "path": str(path)}, None)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "name, image, expected",
    [
        ("RGBA", Image.new("RGBA", (8, 8), (255, 0, 0, 128)), HALF),
        ("LA", Image.new("LA", (8, 8), (0, 0)), WHITE),
        ("L", Image.new("L", (8, 8), 77), (77, 77, 77)),
        ("P", Image.new("P", (8, 8), 0), WHITE),
        ("CMYK", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
        ("1", Image.new("1", (8, 8), 1), WHITE),
        ("I;16", Image.fromarray(np.full((8, 8), 40000, np.uint16)), (156, 156, 156)),
    ],
)
def test_image_of_any_mode_becomes_rgb_on_white(tmp_path, name, image, expected):
    options = {"transparency": 0} if name == "P" else {}
    image.save(tmp_path / "x", format="TIFF" if name in ("CMYK", "I;16") else "PNG", **options)
    rgb = rgb_of(tmp_path / "x")
    assert rgb.shape == (8, 8, 3) and np.abs(rgb - expected).max() <= 1


def test_image_is_turned_as_its_exif_says(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[:, None], 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.convert("RGB").save(tmp_path / "x", format="PNG", exif=exif)
    rgb = rgb_of(tmp_path / "x")
    assert rgb.shape == (16, 8, 3) and (rgb[0, :, 0] == np.arange(210, -1, -30)).all()


def fixed(x: float) -> bytes:
    """ICC's s15Fixed16Number."""
    return struct.pack(">i", round(x * 65536))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def icc_profile(kind: bytes, space: bytes, connection: bytes, tags: dict[str, bytes]) -> bytes:
    """A profile of ICC's version 2 with these tags; the white is D50."""
    white = b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    description = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    tags = {"wtpt": b"XYZ \0\0\0\0" + white, "cprt": b"text\0\0\0\0none\0", **tags}
    tags["desc"] = description
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        place = offset + len(body)
        table += name.encode() + struct.pack(">II", place, len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4sI", offset + len(body), b"lcms", 0x02100000)
    header += kind + space + connection + b"\0" * 12 + b"acsp" + b"\0" * 28 + white
    header += b"\0" * (128 - len(header))
    return header + struct.pack(">I", len(tags)) + table + body


def rgb_profile(gamma: float, colorants: list[tuple[float, float, float]]) -> bytes:
    """A screen of one gamma and of these XYZ of red, green and blue."""
    tags = {}
    for name, xyz in zip("rgb", colorants):
        tags[f"{name}XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))
        tags[f"{name}TRC"] = curve(gamma)
    return icc_profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return icc_profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": curve(gamma)})


def cmyk_profile(colors: dict[tuple, tuple[int, int, int]]) -> bytes:
    """A printer whose inks, (C, M, Y, K) of 0 or 1, give these L, a + 128, b + 128, or else black;
    a table of 2 points per ink with ICC's type lut8."""
    identity = bytes(range(256))
    matrix = b"".join(fixed(x) for x in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    corners = [tuple(map(int, f"{i:04b}")) for i in range(16)]
    points = b"".join(bytes(colors.get(corner, (0, 128, 128))) for corner in corners)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + 4 * identity + points + 3 * identity
    return icc_profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": lut})


# Adobe RGB (1998): colorants under D50, gamma 563/256.
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]


@pytest.mark.parametrize("alpha", [None, 255, 0])
def test_adobe_rgb_becomes_srgb(tmp_path, alpha):
    color = (60, 160, 90) if alpha is None else (60, 160, 90, alpha)
    image = Image.new("RGB" if alpha is None else "RGBA", (8, 8), color)
    image.save(tmp_path / "x.png", icc_profile=rgb_profile(563 / 256, ADOBE))
    expected = WHITE if alpha == 0 else (0, 161, 85)
    assert np.abs(rgb_of(tmp_path / "x.png") - expected).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_a_linear_profile_becomes_srgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 77 * 257, np.uint16))
    else:
        image = Image.new(mode, (8, 8), 77 if mode == "L" else (77, 255))
    image.save(tmp_path / "x.png", icc_profile=grey_profile(1.0))
    expected = 255 * (1.055 * (77 / 255) ** (1 / 2.4) - 0.055)  # 149.6
    assert np.abs(rgb_of(tmp_path / "x.png") - expected).max() <= 1


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_srgb_by_its_profile(tmp_path, kind):
    image = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (8, 0, 16, 8))
    red = (138, 209, 198)  # sRGB's in Lab
    profile = cmyk_profile({(1, 0, 0, 0): red, (0, 0, 0, 0): (255, 128, 128)})
    image.save(tmp_path / "x", kind, icc_profile=profile)
    rgb = rgb_of(tmp_path / "x")
    assert np.abs(rgb[:, :8] - (255, 0, 0)).max() <= 6 and np.abs(rgb[:, 8:] - 255).max() <= 2


def test_srgb_profile_changes_nothing_and_one_of_other_channels_is_refused(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise_image(0).save(tmp_path / "x.png", icc_profile=srgb)
    noise = np.asarray(noise_image(0)).astype(int)
    assert np.abs(rgb_of(tmp_path / "x.png") - noise).max() <= 1
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png", icc_profile=srgb)
    assert np.abs(rgb_of(tmp_path / "grey.png") - 77).max() <= 1
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.tif", icc_profile=srgb)
    noise_image(0).save(tmp_path / "y.tif", icc_profile=cmyk_profile({}))
    noise_image(0).save(tmp_path / "z.tif", icc_profile=grey_profile(1.0))  # would lose its colours
    for name, words in (("x", "RGB.*CMYK"), ("y", "CMYK.*RGB"), ("z", "for L.*RGB")):
        with pytest.raises(ValueError, match=words):
            rgb_of(tmp_path / f"{name}.tif")


def test_png_with_a_long_text_chunk_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2**21, zip=True)
    noise_image(5).save(tmp_path / "x.png", pnginfo=info)
    assert (rgb_of(tmp_path / "x.png") == np.asarray(noise_image(5))).all()


def test_bytes_and_files_give_the_same_image(tmp_path):
    noise_image(1).save(tmp_path / "x.png")
    buffer = io.BytesIO((tmp_path / "x.png").read_bytes())
    image = train.read_image({"bytes": buffer.getvalue(), "path": None}, None)
    assert (np.asarray(image) == rgb_of(tmp_path / "x.png")).all()
