"""The data of train.py: what is read, in which order, what is checked, what is refused."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import train
from experiments.tests.common import ROOT, train_args

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
    middle = Image.open(folder / "0.png").resize((64, 64), Image.Resampling.LANCZOS, (0, 16, 40, 56))
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


@pytest.mark.parametrize("names", [("bus", "train"), ("bus", "test"), ("a toy train", "dogs")])
def test_class_folders_are_read_whole_whatever_their_names(tmp_path, names):
    for k, name in enumerate(names):
        write_images(tmp_path / "data" / name, count=3, first=3 * k)
        for i in range(3 * k, 3 * k + 3):
            (tmp_path / "data" / name / f"{i}.txt").write_text(f"picture {i}")
    assert len(read(tmp_path / "data")) == 6


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
    report = read(folder).report
    assert "2 hidden images" in report and ".trash/10.png" in report
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
        types = {"uint8": pyarrow.uint8(), "decimal": pyarrow.decimal128(5, 1), "double": pyarrow.float64()}
        scores = pyarrow.array(numbers, types[kind])
        table = pyarrow.table(
            {"image": content, "text": [f"picture {i}" for i in range(8)], "score": scores}
        )
        dataset = folder / "rows.parquet"
        pyarrow.parquet.write_table(table, dataset)
    pairs = read(dataset, min=("score=3",))
    assert pairs.numbers == [3, 4, 5, 6, 7] and "3 left out by --min" in pairs.report
    assert captions(pairs)[0] == "picture 3" and captions(read(dataset, min=("score=3.5",)))[0] == "picture 5"


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


def rgb_profile(gamma: float, colorants: list[tuple[float, float, float]]) -> bytes:
    """A matrix profile of the ICC's version 2: XYZ (D50) of red, green and blue, one gamma."""
    xyz = [b"XYZ \0\0\0\0" + b"".join(map(fixed, x)) for x in [(0.9642, 1.0, 0.8249), *colorants]]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    names = ("wtpt", "rXYZ", "gXYZ", "bXYZ", "rTRC", "gTRC", "bTRC", "cprt", "desc")
    contents = [*xyz, curve, curve, curve, text, description]
    table, body, offset = b"", b"", 128 + 4 + 12 * len(names)
    for name, content in zip(names, contents):
        content += b"\0" * (-len(content) % 4)
        table += name.encode() + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    header += b"\0" * (128 - len(header))
    return header + struct.pack(">I", len(names)) + table + body


# Adobe RGB (1998): colorants under D50, gamma 563/256.
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]


@pytest.mark.parametrize("alpha", [None, 255, 0])
def test_adobe_rgb_becomes_srgb(tmp_path, alpha):
    color = (60, 160, 90) if alpha is None else (60, 160, 90, alpha)
    image = Image.new("RGB" if alpha is None else "RGBA", (8, 8), color)
    image.save(tmp_path / "x.png", icc_profile=rgb_profile(563 / 256, ADOBE))
    expected = WHITE if alpha == 0 else (0, 161, 85)
    assert np.abs(rgb_of(tmp_path / "x.png") - expected).max() <= 2


def test_grey_and_srgb_profiles_change_nothing_and_one_of_other_colours_is_refused(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise_image(0).save(tmp_path / "x.png", icc_profile=srgb)
    assert np.abs(rgb_of(tmp_path / "x.png") - np.asarray(noise_image(0)).astype(int)).max() <= 1
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png", icc_profile=srgb)
    assert np.abs(rgb_of(tmp_path / "grey.png") - 77).max() <= 1
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.tif", icc_profile=srgb)
    with pytest.raises(ValueError, match="RGB.*CMYK"):
        rgb_of(tmp_path / "x.tif")


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
