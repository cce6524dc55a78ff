"""The data of train.py: what is read, checked and refused, and what a step takes."""

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
from experiments.tests.common import raises, train_args
from experiments.tests.top.training import ends

WHITE = (255, 255, 255)
NAMES = [5, 2, 7, 0, 1, 6, 3, 4]  # of images by row: a table's order is its own
TEXTS = [f"picture {i}" for i in NAMES]


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
    """The message, with these words, of the ValueError that reading or checking it raises."""
    with raises(ValueError, *words) as caught:
        checked(dataset, **flags)
    return str(caught.value)


def noise_image(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (72, 40, 3), dtype=np.uint8))


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
    assert reference.captions() == TEXTS and len(reference) == 8
    pixels, caption = reference.read(1)
    middle = noise_image(2).resize((64, 64), Image.Resampling.LANCZOS, box=(0, 16, 40, 56))
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
    assert (pixels - expected).abs().max() < 1e-5 and caption == "picture 2"


@pytest.mark.parametrize("kind", ["bytes", "bytes and path", "name", "folder"])
def test_every_kind_of_table_gives_the_same_pairs(tmp_path, reference, kind):
    place = write_pairs(tmp_path / "a [b] *" / "{c}?")  # characters of patterns
    names = [f"{i}.png" for i in NAMES]
    content = [(place / name).read_bytes() for name in names]
    both = [{"bytes": x, "path": "nowhere.png"} for x in content]
    cells = {"bytes": content, "folder": content, "bytes and path": both, "name": names}
    columns = {"image": cells[kind], "text": TEXTS}
    table = datasets.Dataset.from_dict(columns)
    file = place / "test-0.parquet"
    table.to_parquet(file)
    if kind == "folder":
        (place / "metadata.jsonl").unlink()
        table.select(range(3)).to_parquet(place / "a[1].parquet")
        table.select(range(3, 8)).to_parquet(file)
    pairs = checked(place if kind == "folder" else file)
    assert pairs.digests == reference.digests and pairs.captions() == reference.captions()
    assert torch.equal(pairs.read(3)[0], reference.read(3)[0])


def test_name_that_is_no_local_path_is_a_hub_id(reference, monkeypatch):
    table, asked = reference.table, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *x, **y: asked.append((x, y)) or table)
    assert read("me/pictures").captions() == TEXTS
    assert asked == [(("me/pictures",), {"split": "train"})]


@pytest.mark.parametrize("name", ["rows.jsonl", "0.txt", ".a.parquet", "train/metadata.jsonl"])
def test_what_is_no_table_is_refused_with_what_is_read(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("a")
    dataset = file if name == "rows.jsonl" else tmp_path
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
    columns["uint8"] = pyarrow.array(numbers, pyarrow.uint8())
    columns["decimal"] = [None, *map(Decimal, numbers[1:])]
    columns["other"] = [4.0] * 7 + [None]
    write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    for kind in ("uint8", "decimal"):
        assert checked(tmp_path / "x.parquet", min={kind: 3}).rows == [3, 4, 5, 6, 7]
        assert read(tmp_path / "x.parquet", min={kind: 3.5, "other": 4}).captions() == ["f", "g"]


# --- What is checked is what is trained ---


FAULTS = [
    (Path.unlink, "FileNotFoundError"),
    (lambda path: os.truncate(path, 4000), "truncated"),
    (lambda path: plain("I;16").save(path), "8 bits"),
    (lambda path: plain("F").save(path, format="TIFF"), "8 bits"),
    (lambda path: noise_image(0).save(path, icc_profile=b"no profile"), "profile"),
    (lambda path: noise_image(0).save(path, **GREY), "PyCMSError"),
    (lambda path: CYAN.save(path, format="TIFF", **SRGB), "PyCMSError"),
]


def test_rows_that_cannot_be_used_are_listed_and_left_out_when_told_so(tmp_path):
    folder, good = write_pairs(tmp_path / "x"), {"file_name": "7.png", "text": "a"}
    bad = [({"text": text}, "(7.png)", f"{text!r}, expected a text") for text in (None, " \t")]
    bad += [({"text": 3}, "(7.png)", "None, expected a text")]
    bad += [({"file_name": name}, f"({name})", "no image") for name in (None, "")]
    for i, (damage, word) in enumerate(FAULTS):
        damage(folder / f"{i}.png")
        bad.append(({"file_name": f"{i}.png"}, f"({i}.png)", word))
    write_rows(folder, [good, *(good | cells for cells, _, _ in bad), good])
    lines = refused(folder, "12 unusable", "--on_bad_row skip").splitlines()[1:13]
    for row, (line, (_, name, word)) in enumerate(zip(lines, bad), 1):
        assert line.startswith(f"  row {row} {name}") and word in line, (word, line)
    pairs = read(folder, on_bad_row="skip")
    assert "\n  row 12 (6.png)" in check(pairs)
    assert pairs.rows == [0, 13] and pairs.read(1)[1] == "a"
    write_rows(folder, 30 * [good | {"text": ""}])
    assert refused(folder, "30 unusable").count("\n  row ") == 20


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

    left = [digest for i, digest in enumerate(reference.digests) if i != 3]
    ended, printed = ends(2, act, tmp_path / "log")
    assert ended == [1, 1]
    for i, said in enumerate(printed):
        assert f"own {[i, 2 + i, 4 + i, 6 + i]} {reference.digests}" in said, said
        assert f"left {[0, 1, 2, 4, 5, 6, 7]} {left}" in said, said
        assert "1 unusable\n  row 3" in said, said


def test_image_that_changes_after_the_check_is_not_trained(tmp_path):
    folder = write_pairs(tmp_path / "x", [0, 1, 2])
    pairs = checked(folder)
    noise_image(99).save(folder / "0.png")
    (folder / "1.png").unlink()
    for row in range(2):
        with pytest.raises(ValueError, match=rf"row {row} \({row}.png\)"):
            pairs.read(row)
    assert pairs.read(2)[1] == "picture 2"


def test_digests_are_of_content_and_caption_and_count_what_is_repeated(tmp_path, reference):
    paths = [str(reference.folder / f"{i}.png") for i in NAMES]
    same = {"file_name": paths[1], "text": TEXTS[1]}
    rows = [same, {"file_name": paths[0], "text": "other"}, same | {"text": TEXTS[0]}, same]
    pairs = read(write_rows(tmp_path / "x", rows))
    assert check(pairs) == "4 of 4, 3 different, 0 unusable"
    second, *other, last = pairs.digests
    assert second == last == reference.digests[1]
    assert len({*other, *reference.digests}) == 10


# --- What a step takes ---


def batches(pairs: train.Pairs, rank: int = 0, start: int = 0, **flags) -> list[train.Batch]:
    """Those of a rank, for steps of 4 pairs, which one process takes in one forward by default."""
    flags = {"max_train_steps": 5, "num_rollout_paths": 2, "shared_noise": False} | flags
    args = train_args(output_dir="out", **flags)
    return list(train.read_batches(pairs, args, (4, 8, 8), rank, 4, start))


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
    for world_size, size, accumulated, threads in (1, 2, 2, 4), (2, 1, 2, 1), (1, 4, 1, 9):
        flags = {"train_batch_size": size, "gradient_accumulation_steps": accumulated}
        flags |= {"reader_threads": threads, "cond_dropout_rate": 0.5}
        assert samples(reference, world_size, **flags) == expected, flags
    assert samples(reference, cond_dropout_rate=0.5, start=3) == expected[12:]
    plain, other = samples(reference), samples(reference, seed=1)
    for step in range(1, 6):
        for row, sample in zip(train.step_indices(8, 4, 42, step), plain[4 * step - 4 :]):
            pixels = reference.read(row)[0].numpy().tobytes()
            assert sample[:2] == (TEXTS[row], pixels)
    drawn = [part for sample in (*plain, *other) for part in sample[2:]]
    assert len(set(drawn)) == len(drawn) == 40 * 8


def test_captions_are_dropped_at_their_rate_by_steps_and_seed(reference):
    dropped = []
    for seed in (1, 2):
        found = batches(reference, max_train_steps=25, seed=seed, cond_dropout_rate=0.25)
        dropped.append([text == "" for batch in found for text in batch.captions])
    assert dropped[0] != dropped[1]
    for found in dropped:
        assert 12 <= sum(found) <= 38 and found != found[:4] * 25  # 25 +- 4.3


def test_epoch_is_a_permutation_of_its_own():
    def epoch(first: int, seed: int) -> tuple[int, ...]:  # three steps of 3 rows of 10
        steps = [train.step_indices(10, 3, seed, first + i) for i in range(3)]
        return tuple(sum(steps, []))

    epochs = {epoch(1, 0), epoch(4, 0), epoch(7, 0), epoch(1, 1)}
    assert len(epochs) == 4 and all(len(set(x)) == 9 for x in epochs)
    assert set().union(*epochs) == set(range(10))


def test_threads_work_at_once_keep_the_order_take_no_more_than_told_and_raise():
    at_once, taken = threading.Barrier(3), []

    def work(i: int) -> float:
        at_once.wait(10)
        time.sleep(0.01 * (i % 2 == 0))
        return 1 / (9 - i)

    results = train.in_threads(work, (taken.append(i) or i for i in range(12)), threads=3, ahead=5)
    for i in range(9):
        assert next(results) == 1 / (9 - i)
        assert len(taken) == min(i + 6, 12)
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- Pixels ---


# A profile of ICC's version 2 for grey of gamma 1: header, white (D50), one tag.
GAMMA_1 = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)
HEADER = struct.pack(">I4sI", 144 + len(GAMMA_1), b"lcms", 0x02100000) + b"mntrGRAYXYZ "
HEADER += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
TAG = struct.pack(">I4sII", 1, b"kTRC", 144, len(GAMMA_1))
GREY = {"icc_profile": HEADER.ljust(128, b"\0") + TAG + GAMMA_1}
SRGB = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
BGR = SRGB["icc_profile"].replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ")
BGR = {"icc_profile": BGR.replace(b"?XYZ", b"bXYZ")}  # red and blue change places
LINEAR = (150, 150, 150)  # 255 (1.055 (77 / 255)^(1 / 2.4) - 0.055) = 149.6
HALF = {"extra": b"\xff\xe2\0\x10ICC_PROFILE\0\x01\x02"}  # part 1 of 2: Pillow drops it
TURNED, TEXT = Image.Exif(), PngImagePlugin.PngInfo()
TURNED[0x0112] = 6  # by 90 degrees
TEXT.add_text("workflow", "x" * 2**21, zip=True)
NOISE = noise_image(3)


def plain(mode: str, color: tuple[int, ...] | int = 0) -> Image.Image:
    return Image.new(mode, (8, 8), color)


CYAN = plain("CMYK", (255, 0, 0, 0))


@pytest.mark.parametrize(
    "image, kind, options, expected, tolerance",
    [
        (plain("RGBA", (255, 0, 0, 128)), "PNG", {}, (255, 127, 127), 1),
        (plain("P"), "PNG", {"transparency": 0}, WHITE, 0),
        (CYAN, "JPEG", {}, (0, 255, 255), 1),
        (plain("RGB", (60, 160, 90)), "PNG", BGR, (90, 160, 60), 1),
        (plain("RGBA", (60, 160, 90, 0)), "PNG", BGR, WHITE, 0),
        (plain("LA", (77, 255)), "PNG", GREY, LINEAR, 1),
        (plain("L", 77), "PNG", SRGB, (77, 77, 77), 1),
        (NOISE, "PNG", {"exif": TURNED}, NOISE.transpose(Image.Transpose.ROTATE_270), 0),
        (NOISE, "PNG", {"pnginfo": TEXT}, NOISE, 0),
        (plain("RGB", (60, 160, 90)), "JPEG", HALF, (60, 160, 90), 3),
    ],
)
def test_image_of_any_kind_becomes_srgb_on_white(image, kind, options, expected, tolerance):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    decoded = train.decode(buffer.getvalue())
    assert decoded.mode == "RGB"
    difference = np.asarray(decoded).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= tolerance
