"""The data of train.py: what is read, in which order, what is checked, what is refused, what a step takes."""

import io
import json
import os
import struct
import threading
import time
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageCms, PngImagePlugin
from pyarrow.parquet import write_table

import train
from experiments.tests.common import fork, train_args

WHITE = (255, 255, 255)
NAMES = [5, 2, 7, 0, 1, 6, 3, 4]  # of images by row: a table's order is its own


def read(dataset: Path | str, **flags) -> train.Pairs:
    return train.Pairs(train_args(dataset=dataset, output_dir="out", **flags).data)


def check(pairs: train.Pairs) -> str:
    train.init_distributed()
    try:
        return pairs.check(dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def checked(dataset: Path, **flags) -> train.Pairs:
    pairs = read(dataset, **flags)
    check(pairs)
    return pairs


def refused(dataset: Path, *words: str, **flags) -> str:
    """Reading or checking it raises ValueError, whose message has these words."""
    with pytest.raises(ValueError) as caught:
        checked(dataset, **flags)
    message = str(caught.value)
    assert all(word in message for word in words), (words, message)
    return message


def noise_image(seed: int, size: tuple[int, int] = (40, 72)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_pairs(folder: Path, names: list[int] = NAMES) -> Path:
    """Images of noise that are not square, and their table."""
    write_rows(folder, [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in names])
    for i in names:
        noise_image(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> train.Pairs:
    """Eight pairs that no test changes."""
    return checked(write_pairs(tmp_path_factory.mktemp("data") / "pairs"))


# --- What is read ---


def test_folder_gives_its_pairs_in_the_order_of_its_table(reference):
    assert reference.captions() == [f"picture {i}" for i in NAMES] and len(reference) == 8
    pixels, caption = reference.read(1)
    middle = noise_image(2).resize((64, 64), Image.Resampling.LANCZOS, box=(0, 16, 40, 56))
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
    assert (pixels - expected).abs().max() < 1e-5 and caption == "picture 2"


KINDS = ["binary", "large_binary", "bytes", "bytes and path", "name", "path", "embedded", "folder", "metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_pairs(tmp_path, reference, kind):
    dataset = place = write_pairs(tmp_path / "a [b] *" / "{c}?")  # characters of patterns
    paths, text = [place / f"{i}.png" for i in NAMES], [f"picture {i}" for i in NAMES]
    content = [path.read_bytes() for path in paths]
    if kind == "metadata":
        write_rows(place, [{"file_name": str(path), "text": y} for path, y in zip(paths, text)])
    elif kind == "folder":
        (place / "metadata.jsonl").unlink()
        for name, rows in ("a[1]", slice(0, 3)), ("test-0", slice(3, 4)), ("train-0", slice(4, 8)):
            table = pyarrow.table({"image": content[rows], "text": text[rows]})
            write_table(table, place / f"{name}.parquet")
    else:
        images = {
            "binary": pyarrow.array(content),
            "large_binary": pyarrow.array(content, pyarrow.large_binary()),
            "bytes": [{"bytes": x} for x in content],
            "bytes and path": [{"bytes": x, "path": "nowhere.png"} for x in content],
            "name": [path.name for path in paths],
            "path": list(map(str, paths)),
            "embedded": list(map(str, paths)),
        }
        table = datasets.Dataset(pyarrow.table({"image": images[kind], "text": text}))
        if kind == "embedded":
            table = table.cast_column("image", datasets.Image()).with_format("arrow")
            table = table.map(datasets.table.embed_table_storage, batched=True)
            (place / "0.png").unlink()
        dataset = place / "rows.parquet"
        table.to_parquet(dataset)
    pairs = checked(dataset)
    assert pairs.digests == reference.digests and pairs.captions() == reference.captions()
    assert torch.equal(pairs.read(3)[0], reference.read(3)[0])


def test_name_that_is_no_local_path_is_a_hub_id(reference, monkeypatch):
    table, asked = reference.table, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *x, **y: asked.append((x, y)) or table)
    assert read("me/pictures").captions() == [f"picture {i}" for i in NAMES]
    assert asked == [(("me/pictures",), {"split": "train"})]


@pytest.mark.parametrize("name", ["x/0.txt", "csv", "json", "jsonl", "tar", "arrow", "x/train/metadata.jsonl", "x/.a"])
def test_what_is_no_table_is_refused_with_what_is_read(tmp_path, name):
    file = tmp_path / (name if "/" in name else f"rows.{name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a")
    dataset = tmp_path / "x" if "/" in name else file
    refused(dataset, str(dataset), "metadata.jsonl", ".parquet", "hub id", "README, Data")


def test_tables_and_columns_that_do_not_fit_are_refused_by_name(tmp_path, reference):
    folder = write_rows(tmp_path / "x", [{"file_name": "0.png", "text": "a"}])
    for line, word in ("{", "line 2"), ('{"file_name": "0.png", "text": {"a": 1}}', ""):
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line)
        refused(folder, str(folder), word)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    refused(reference.folder, "caption", "'text'", caption_column="caption")
    refused(reference.folder, "size", "'text'", min={"size": 3})
    refused(reference.folder, "--min text", "no numbers", min={"text": 3})
    refused(reference.folder, "its image is", "expected a text", caption_column="image")
    write_table(pyarrow.table({"image": [3], "text": ["a"]}), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "--image_column", "int64")
    refused(tmp_path / "x.parquet", "png", "'image'", image_column="png")


def test_rows_are_kept_by_numbers_of_any_type(tmp_path, reference):
    numbers = [None, 0, 1, 3, 3, 4, 5, 250]
    columns = {"image": [(reference.folder / "0.png").read_bytes()] * 8, "text": list("abcdefgh")}
    columns |= {str(kind): pyarrow.array(numbers, kind) for kind in (pyarrow.uint8(), pyarrow.float64())}
    columns |= {"decimal": [None, *map(Decimal, numbers[1:])], "other": [4.0] * 7 + [None]}
    write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    for kind in ("uint8", "double", "decimal"):
        assert checked(tmp_path / "x.parquet", min={kind: 3}).rows == [3, 4, 5, 6, 7]
        assert read(tmp_path / "x.parquet", min={kind: 3.5, "other": 4}).captions() == ["f", "g"]


# --- Rows that cannot be used ---


FAULTS = [
    (Path.unlink, "FileNotFoundError"),
    (lambda path: os.truncate(path, 4000), "truncated"),
    (lambda path: path.write_text("no image"), "UnidentifiedImageError"),
    (lambda path: Image.new("I;16", (8, 8)).save(path), "8 bits"),
    (lambda path: Image.new("I", (8, 8)).save(path, format="TIFF"), "8 bits"),
    (lambda path: Image.new("F", (8, 8)).save(path, format="TIFF"), "8 bits"),
    (lambda path: noise_image(0).save(path, icc_profile=b"no profile"), "profile"),
]


def test_rows_that_cannot_be_used_are_listed_and_left_out_when_told_so(tmp_path):
    folder, good = write_pairs(tmp_path / "x"), {"file_name": "7.png", "text": "a"}
    bad = [({"text": text}, "(7.png)", f"{text!r}, expected a text") for text in (None, "", " \t")]
    bad += [({"text": 3}, "(7.png)", "None, expected a text")]
    bad += [({"file_name": name}, f"({name})", "no image") for name in (None, "")]
    for i, (damage, word) in enumerate(FAULTS):
        damage(folder / f"{i}.png")
        bad.append(({"file_name": f"{i}.png"}, f"({i}.png)", word))
    write_rows(folder, [good, *(good | cells for cells, _, _ in bad), good])
    lines = refused(folder, "13 unusable", "--on_bad_row skip").splitlines()[1:14]
    for row, (line, (_, name, word)) in enumerate(zip(lines, bad), 1):
        assert line.startswith(f"  row {row} {name}") and word in line, (word, line)
    pairs = read(folder, on_bad_row="skip")
    assert "\n  row 13 (6.png)" in check(pairs) and pairs.rows == [0, 14] and pairs.read(1)[1] == "a"
    write_rows(folder, 30 * [good | {"text": ""}])
    assert refused(folder, "30 unusable").count("\n  row ") == 20


# --- What is checked is what is trained ---


def test_ranks_share_the_rows_and_agree_on_what_is_bad(tmp_path, reference):
    folders = [write_pairs(tmp_path / name) for name in ("rank 0", "rank 1")]

    def act() -> None:
        rank, _, _ = train.init_distributed()
        hosts = dist.new_group(backend="gloo")
        pairs, own = read(folders[rank]), []
        inspect = pairs.inspect
        pairs.inspect = lambda row: own.append(row) or inspect(row)
        pairs.check(hosts)
        print("own", sorted(own), pairs.digests)
        (folders[1] / f"{NAMES[3]}.png").unlink(missing_ok=True)  # of a row that rank 1 checks
        pairs = read(folders[rank], on_bad_row="skip")
        pairs.check(hosts)
        print("left", pairs.rows, pairs.digests)
        read(folders[rank]).check(hosts)

    ranks = fork(2, act, tmp_path / "log")
    for rank in ranks:
        rank.join(60)
    left = [digest for i, digest in enumerate(reference.digests) if i != 3]
    for i, rank in enumerate(ranks):
        said = (tmp_path / f"log.{i}").read_text()
        assert f"own {[i, 2 + i, 4 + i, 6 + i]} {reference.digests}" in said, said
        assert f"left {[0, 1, 2, 4, 5, 6, 7]} {left}" in said, said
        assert rank.exitcode == 1 and "1 unusable\n  row 3" in said, said


def test_image_that_changes_after_the_check_is_not_trained(tmp_path):
    folder = write_pairs(tmp_path / "x", [0, 1, 2, 3])
    pairs = checked(folder)
    noise_image(99).save(folder / "0.png")
    os.truncate(folder / "1.png", 4000)
    (folder / "2.png").unlink()
    for row in range(3):
        with pytest.raises(ValueError, match=rf"row {row} \({row}.png\)"):
            pairs.read(row)
    assert pairs.read(3)[1] == "picture 3"


def test_digests_are_of_content_and_caption_in_the_tables_order(tmp_path, reference):
    rows = [{"file_name": str(reference.folder / f"{i}.png"), "text": f"picture {i}"} for i in NAMES]
    changed = [rows[1], rows[0] | {"text": "other"}, rows[0] | {"file_name": rows[1]["file_name"]}]
    second, *other = checked(write_rows(tmp_path / "x", changed)).digests
    assert second == reference.digests[1] and len({*other, *reference.digests}) == 10


# --- What a step takes ---


def batches(pairs: train.Pairs, rank: int = 0, start: int = 0, **flags) -> list[train.Batch]:
    """Those of a rank, for steps of 4 pairs: one process takes them in one forward, if not told otherwise."""
    flags = {"max_train_steps": 5, "num_rollout_paths": 2, "shared_noise": False} | flags
    return list(train.read_batches(pairs, train_args(output_dir="out", **flags), (4, 8, 8), rank, 4, start))


def samples(pairs: train.Pairs, world_size: int = 1, **flags) -> list[tuple]:
    """All that the batches of the ranks hold, sample by sample."""
    ranks, found = [batches(pairs, rank, **flags) for rank in range(world_size)], []
    for batch in (batch for micro in zip(*ranks, strict=True) for batch in micro):
        z1, t, u, path_noise, path_z1 = batch.draws
        parts = (batch.pixels, batch.vae_noise, z1, t, *u.movedim(2, 1), *path_noise, *path_z1)
        for i, text in enumerate(batch.captions):
            found.append((text, *(part[i].numpy().tobytes() for part in parts)))
    return found


def test_each_sample_is_a_function_of_seed_step_and_its_place_in_the_global_batch(reference):
    expected = samples(reference, cond_dropout_rate=0.5)
    for world_size, size, accumulated, threads in (1, 2, 2, 4), (2, 2, 1, 4), (2, 1, 2, 1), (1, 4, 1, 9):
        flags = {"train_batch_size": size, "gradient_accumulation_steps": accumulated, "reader_threads": threads}
        assert samples(reference, world_size, cond_dropout_rate=0.5, **flags) == expected, flags
    assert samples(reference, cond_dropout_rate=0.5, start=3) == expected[12:]
    plain, other = samples(reference), samples(reference, seed=1)
    for step in range(1, 6):
        for row, sample in zip(train.step_indices(8, 4, 42, step), plain[4 * step - 4 :]):
            assert sample[:2] == (f"picture {NAMES[row]}", reference.read(row)[0].numpy().tobytes())
    drawn = [part for sample in (*plain, *other) for part in sample[2:]]
    assert len(set(drawn)) == len(drawn) == 40 * 8


def test_captions_are_dropped_at_their_rate_by_steps_and_seed(reference):
    dropped = []
    for seed in (1, 2):
        found = batches(reference, max_train_steps=50, seed=seed, cond_dropout_rate=0.25)
        dropped.append([text == "" for batch in found for text in batch.captions])
    assert all(30 <= sum(x) <= 70 for x in dropped) and dropped[0] != dropped[1]  # 50 +- 6 of 200


def test_number_of_auxiliary_points_changes_no_other_number(reference):
    for one, other in zip(batches(reference, num_aux_points=2), batches(reference, num_aux_points=5), strict=True):
        assert torch.equal(one.vae_noise, other.vae_noise)
        assert torch.equal(one.draws.z1, other.draws.z1) and torch.equal(one.draws.t, other.draws.t)


def test_epoch_is_a_permutation_of_its_own():
    epochs = []
    for first, seed in (1, 0), (4, 0), (7, 0), (1, 1):  # three steps of 3 rows of 10
        epochs.append([row for step in range(first, first + 3) for row in train.step_indices(10, 3, seed, step)])
        assert len(set(epochs[-1])) == 9
    assert len(set(map(tuple, epochs))) == 4 and set(sum(epochs, [])) == set(range(10))


def test_threads_work_at_once_keep_the_order_take_no_more_than_told_and_raise():
    at_once, taken = threading.Barrier(3), []

    def work(i: int) -> float:
        at_once.wait(10)
        time.sleep(0.01 * (i % 2 == 0))
        return 1 / (9 - i)

    results = train.in_threads(work, (taken.append(i) or i for i in range(12)), threads=3, ahead=5)
    for i in range(9):
        assert next(results) == 1 / (9 - i) and len(taken) == min(i + 6, 12)
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- Pixels ---


def fixed(*numbers: float) -> bytes:
    """ICC's s15Fixed16Numbers."""
    return b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[str, bytes]) -> bytes:
    """A profile of ICC's version 2 with these tags; the white is D50."""
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", offset + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4sI", offset + len(body), b"lcms", 0x02100000) + kind + space + connection
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)
    return header + b"\0" * (128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def cmyk_profile(colors: dict[tuple, tuple[int, int, int]]) -> bytes:
    """A printer whose inks, (C, M, Y, K) of 0 or 1, give these L, a + 128, b + 128, or else black; a table of 2 points
    per ink with ICC's type lut8."""
    corners = [tuple(map(int, f"{i:04b}")) for i in range(16)]
    points = b"".join(bytes(colors.get(corner, (0, 128, 128))) for corner in corners)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += 4 * bytes(range(256)) + points + 3 * bytes(range(256))
    return profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": lut})


# Adobe RGB (1998): gamma 563/256, XYZ of red, green and blue under D50.
ADOBE = {f"{x}TRC": curve(563 / 256) for x in "rgb"}
ADOBE["rXYZ"] = b"XYZ \0\0\0\0" + fixed(0.60974, 0.31111, 0.01947)
ADOBE["gXYZ"] = b"XYZ \0\0\0\0" + fixed(0.20528, 0.62567, 0.06087)
ADOBE["bXYZ"] = b"XYZ \0\0\0\0" + fixed(0.14919, 0.06322, 0.74457)
ADOBE = {"icc_profile": profile(b"mntr", b"RGB ", b"XYZ ", ADOBE)}
GREY = {"icc_profile": profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": curve(1.0)})}
INKS = {"icc_profile": cmyk_profile({(1, 0, 0, 0): (138, 209, 198), (0, 0, 0, 0): (255, 128, 128)})}  # red and white
SRGB = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
LINEAR = [255 * (1.055 * (77 / 255) ** (1 / 2.4) - 0.055)] * 3  # 149.6
CYAN = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
TURNED, TEXT = Image.Exif(), PngImagePlugin.PngInfo()
TURNED[0x0112] = 6  # by 90 degrees
TEXT.add_text("workflow", "x" * 2**21, zip=True)
RAMP = np.arange(0, 240, 30, dtype=np.uint8)


def plain(mode: str, *color: int) -> Image.Image:
    return Image.new(mode, (8, 8), color if len(color) > 1 else color[0])


@pytest.mark.parametrize(
    "image, kind, options, expected, tolerance",
    [
        (plain("RGBA", 255, 0, 0, 128), "PNG", {}, (255, 127, 127), 1),
        (plain("LA", 0, 0), "PNG", {}, WHITE, 0),
        (plain("L", 77), "PNG", {}, (77, 77, 77), 0),
        (plain("P", 0), "PNG", {"transparency": 0}, WHITE, 0),
        (plain("1", 1), "PNG", {}, WHITE, 0),
        (CYAN, "TIFF", {}, (0, 255, 255), 1),
        (plain("RGB", 60, 160, 90), "PNG", ADOBE, (0, 161, 85), 2),
        (plain("RGBA", 60, 160, 90, 255), "PNG", ADOBE, (0, 161, 85), 2),
        (plain("RGBA", 60, 160, 90, 0), "PNG", ADOBE, WHITE, 2),
        (plain("L", 77), "PNG", GREY, LINEAR, 1),
        (plain("LA", 77, 255), "PNG", GREY, LINEAR, 1),
        (CYAN, "TIFF", INKS, (255, 0, 0), 6),
        (CYAN, "JPEG", INKS, (255, 0, 0), 6),
        (plain("CMYK", 0, 0, 0, 0), "JPEG", INKS, WHITE, 2),
        (noise_image(0), "PNG", SRGB, noise_image(0), 1),
        (plain("L", 77), "PNG", SRGB, (77, 77, 77), 1),
        (Image.fromarray(RAMP[:, None].repeat(16, 1)), "PNG", {"exif": TURNED}, RAMP[None, ::-1, None], 0),
        (noise_image(5), "PNG", {"pnginfo": TEXT}, noise_image(5), 0),
    ],
)
def test_image_of_any_kind_becomes_srgb_on_white(image, kind, options, expected, tolerance):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    decoded = train.decode(buffer.getvalue())
    assert decoded.mode == "RGB" and decoded.size == (image.size[::-1] if "exif" in options else image.size)
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(expected)).max() <= tolerance


@pytest.mark.parametrize("image, options", [(CYAN, SRGB), (noise_image(0), INKS), (noise_image(0), GREY)])
def test_profile_of_other_channels_is_refused(image, options):
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    with pytest.raises((ValueError, ImageCms.PyCMSError)):
        train.decode(buffer.getvalue())


def test_different_rows_are_counted(tmp_path):
    folder = write_pairs(tmp_path / "x", [0, 1, 2, 0, 0])
    assert check(read(folder)) == "5 of 5, 3 different, 0 unusable"
