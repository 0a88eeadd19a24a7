"""Sources, labels and conditions, the reading check, the cache and the loader, all on real files."""

import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import folder_of, manifests, picture, saved_rows, spoil
from PIL import Image

from diffusers_hdit.data import image_cache
from diffusers_hdit.data.dataset import Buckets, load_images, make_loader
from diffusers_hdit.data.sampler import Item
from diffusers_hdit.data.sources import cell_size


FACES = Path(__file__).parents[1] / "src" / "diffusers_hdit" / "data" / "fluent_faces_64.png"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


# --- Folders


def test_folder_without_labels(tmp_path):
    names = ["b.png", "a/z.bmp", "a/y.webp", "B.JPG", "é #%[1]\n.png", "a.gif", "c.tif", "d.jpeg", "e.tiff"]
    folder = folder_of(tmp_path, *names, ".hidden.png", ".git/x.png")
    (folder / "notes.txt").write_text("no image")
    dataset = load_images(train_data_dir=str(folder), resolution=12)
    assert dataset.source.names == ["B.JPG", "a/y.webp", "a/z.bmp"] + sorted(names[5:] + ["b.png", names[4]])
    assert len(dataset) == 9 and dataset.id2label is None and dataset.skipped == [] and dataset.resolution == (12, 12)
    assert list(dataset[0]) == ["image"]
    image = dataset[dataset.source.names.index("b.png")]["image"]
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 12)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(0)))
    assert torch.equal(dataset[-1]["image"], dataset[8]["image"])
    with pytest.raises(IndexError):
        dataset[9]


def test_names_that_are_not_unicode(tmp_path):
    folder = folder_of(tmp_path, "a.png")
    try:
        os.rename(os.fsencode(folder / "a.png"), os.fsencode(folder) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system has Unicode names only")
    assert len(load_images(train_data_dir=folder, resolution=12)) == 1
    [manifest] = manifests(tmp_path)
    written = manifest.stat().st_mtime_ns
    spoil(folder / os.fsdecode(b"\xff.png"))
    assert len(load_images(train_data_dir=folder, resolution=12)) == 1
    assert manifest.stat().st_mtime_ns == written


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{c}/{i}.png" for c in "cab" for i in (10, 9, 1)]
    one, other = folder_of(tmp_path / "1", *names), folder_of(tmp_path / "2", *reversed(names))
    found = [load_images(train_data_dir=folder, resolution=12).source.names for folder in (one, other)]
    assert found[0] == found[1] == sorted(names)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    folder = folder_of(tmp_path, "a/1.png")
    elsewhere = folder_of(tmp_path / "elsewhere", "2.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to(folder)
    assert load_images(train_data_dir=folder, resolution=12).source.names == ["a/1.png", "b/2.png"]


def test_folder_with_classes(tmp_path):
    folder = folder_of(tmp_path, "tulip/1.png", "rose/deep/down/2.png", "rose/1.png", "aster/5.png")
    dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
    assert dataset.id2label == {0: "aster", 1: "rose", 2: "tulip"}
    assert [dataset[i]["label"] for i in range(4)] == [0, 1, 1, 2]
    assert load_images(train_data_dir=folder, resolution=12).id2label is None


def test_classes_need_folders(tmp_path):
    folder = folder_of(tmp_path, "rose/1.png", "loose.png")
    with pytest.raises(ValueError, match=r"1 of 2 images lie in none: 'loose.png'"):
        load_images(train_data_dir=folder, label_column="label", resolution=12)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(train_data_dir=tmp_path / "nowhere", resolution=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in '.*empty': looked for \.png, \.jpg"):
        load_images(train_data_dir=tmp_path / "empty", resolution=8)
    for both in ({}, {"train_data_dir": tmp_path, "dataset_name": "x"}):
        with pytest.raises(ValueError, match="either train_data_dir or dataset_name"):
            load_images(resolution=8, **both)
    with pytest.raises(ValueError, match="dataset_config_name"):
        load_images(train_data_dir=tmp_path, dataset_config_name="x", resolution=8)


@pytest.mark.parametrize("resolution", [0, -4, (8,), (8, 0), 8.5, "8", None])
def test_bad_resolution(tmp_path, resolution):
    with pytest.raises(ValueError, match="resolution must be"):
        load_images(train_data_dir=folder_of(tmp_path, "a.png"), resolution=resolution)


# --- The sheet


def test_faces():
    entries = json.loads(FACES.with_suffix(".json").read_text())
    sheet = np.asarray(Image.open(FACES).convert("RGB"))
    dataset = load_images(train_data_dir=FACES, label_column="label", resolution=64)
    assert len(dataset) == 124 and len(dataset.id2label) == 13
    assert list(dataset.id2label.values()) == sorted(dataset.id2label.values())
    for i, entry in enumerate(entries):
        row, column = divmod(i, 16)
        cell = sheet[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        item = dataset[i]
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), cell), i
        assert dataset.id2label[item["label"]] == entry["label"]
        assert item["image"][:, :2, :2].min() >= 250, "the corners are white"
    assert "label" not in load_images(train_data_dir=FACES, resolution=32)[0]


@pytest.mark.parametrize(
    "width, height, count, cell",
    [(1024, 512, 124, 64), (60, 20, 3, 20), (60, 20, 2, 20), (20, 60, 3, 20), (30, 20, 6, 10), (7, 7, 1, 7)],
)
def test_cell_size(width, height, count, cell):
    assert cell_size(width, height, count, "sheet") == cell


def test_cell_size_is_the_only_one():
    """Brute force: no sheet has two cell sizes whose rows all hold an entry."""
    for width, height, count in itertools.product(range(1, 25), range(1, 25), range(1, 40)):
        fits = [
            cell
            for cell in range(1, 25)
            if width % cell == 0
            and height % cell == 0
            and width // cell * (height // cell - 1) < count <= width // cell * (height // cell)
        ]
        assert len(fits) <= 1
        if fits:
            assert cell_size(width, height, count, "sheet") == fits[0]
        else:
            with pytest.raises(ValueError, match="does not divide into rows of square cells"):
                cell_size(width, height, count, "sheet")


def test_bad_sheets(tmp_path):
    picture().save(tmp_path / "s.png")
    with pytest.raises(ValueError, match=r"neither a folder nor a .png sheet with '.*s\.json' beside it"):
        load_images(train_data_dir=tmp_path / "s.png", resolution=12)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of objects"):
        load_images(train_data_dir=tmp_path / "s.png", resolution=12)
    (tmp_path / "s.json").write_text('[{"caption": "x"}]')
    with pytest.raises(ValueError, match=r"lack 'label'; keys: \['caption'\]"):
        load_images(train_data_dir=tmp_path / "s.png", resolution=12, label_column="label")


# --- Hugging Face datasets


def test_class_labels_keep_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"flower": datasets.ClassLabel(names=["tulip", "aster", "unused"])}
    path = saved_rows(tmp_path, {"flower": [1, 0, 1]}, features)
    dataset = load_images(dataset_name=path, label_column="flower", resolution=12)
    assert dataset.id2label == {0: "tulip", 1: "aster", 2: "unused"}
    assert [dataset[i]["label"] for i in range(3)] == [1, 0, 1]
    for i in range(3):
        assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), np.asarray(picture(i)))
    assert list(load_images(dataset_name=str(path), resolution=12)[0]) == ["image"]
    missing = saved_rows(tmp_path, {"flower": [1, -1, 1]}, features, name="missing")
    with pytest.raises(ValueError, match="1 of 3 labels are of no class, such as -1"):
        load_images(dataset_name=missing, label_column="flower", resolution=12)


def test_integer_and_string_labels(tmp_path):
    path = saved_rows(tmp_path, {"n": [3, 0, 1], "s": ["oak", "ash", "oak"], "big": [7, 10**9, 1], "f": [0.5, 1, 2]})
    dataset = load_images(dataset_name=path, label_column="n", resolution=12)
    assert dataset.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert [dataset[i]["label"] for i in range(3)] == [3, 0, 1]
    dataset = load_images(dataset_name=path, label_column="s", resolution=12)
    assert dataset.id2label == {0: "ash", 1: "oak"}
    assert [dataset[i]["label"] for i in range(3)] == [1, 0, 1]
    with pytest.raises(ValueError, match="got 1000000000"):
        load_images(dataset_name=path, label_column="big", resolution=12)
    with pytest.raises(ValueError, match="such as 0.5"):
        load_images(dataset_name=path, label_column="f", resolution=12)


def test_missing_columns_and_splits(tmp_path):
    path = saved_rows(tmp_path, {"kind": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"image_column='img' is not in .*; its columns: \['image', 'kind'\]"):
        load_images(dataset_name=path, image_column="img", resolution=12)
    with pytest.raises(ValueError, match=r"label_column='label' is not in .*'kind'"):
        load_images(dataset_name=path, label_column="label", resolution=12)
    with pytest.raises(ValueError, match="holds .*int64.*, not images"):
        load_images(dataset_name=path, image_column="kind", resolution=12)
    with pytest.raises(ValueError, match=r"split='test' is not in .*; its splits: \['train'\]"):
        load_images(dataset_name=path, split="test", resolution=12)
    with pytest.raises(ValueError, match="dataset_config_name"):
        load_images(dataset_name=path, dataset_config_name="x", resolution=12)


def test_saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": 3, "validation": 2}
    made = {name: datasets.Dataset.from_dict({"image": [picture(i) for i in range(n)]}) for name, n in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    for name, n in parts.items():
        assert len(load_images(dataset_name=tmp_path / "saved", split=name, resolution=12)) == n
    with pytest.raises(ValueError, match=r"splits: \['train', 'validation'\]"):
        load_images(dataset_name=tmp_path / "saved", split="test", resolution=12)


def test_imagefolder(tmp_path):
    pytest.importorskip("datasets")
    folder = folder_of(tmp_path, *[f"{c}/{i}.png" for c in ("rose", "aster") for i in range(60)])
    options = {"cache_dir": str(tmp_path / "cache"), "resolution": 12, "label_column": "label"}
    dataset = load_images(dataset_name=str(folder), **options)
    assert len(dataset) == 120 and dataset.id2label == {0: "aster", 1: "rose"}
    assert len(list((tmp_path / "cache").glob("checked-*.json"))) == 1
    (folder / "rose" / "7.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 120 images cannot be read and are skipped: 'row 117'"):
        dataset = load_images(dataset_name=str(folder), **options)
    assert len(dataset) == 119 and dataset.skipped == ["row 117"]  # 7 is the 58th name in sorted order
    assert [dataset[i]["label"] for i in (59, 60, 118)] == [0, 1, 1]


def test_other_columns_are_not_read(tmp_path):
    """Else a second image column would be decoded with every row, and a broken one would stop the run."""
    broken = [{"bytes": b"no image", "path": None}] * 3
    datasets = pytest.importorskip("datasets")
    path = saved_rows(tmp_path, {"mask": broken}, {"mask": datasets.Image()})
    assert load_images(dataset_name=path, resolution=12)[2]["image"].shape == (3, 12, 12)


def test_second_start_trusts_a_checked_dataset(tmp_path):
    path = saved_rows(tmp_path, {})
    load_images(dataset_name=path, resolution=12)
    [manifest] = manifests(tmp_path)
    written = json.loads(manifest.read_text())
    written["images"][1][-2:] = [5, 5]  # an answer only the manifest can have given
    manifest.write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="1 of 3 images are smaller than 12x12"):
        load_images(dataset_name=path, resolution=12)


def test_rows_without_an_image(tmp_path):
    path = saved_rows(tmp_path, {"image": [picture(), None]}, {})
    with pytest.raises(ValueError, match=r"1 of 2 images in .*'row 1' \(ValueError: the row has no image\)"):
        load_images(dataset_name=path, resolution=12)


# --- Conditions, and what metadata files say


ROWS = {"a.png": (10.0, "rose", [1, 5]), "b/c.png": (20, "aster", [2, 7]), "b/d.png": (60, "rose", [3, 3.5])}


def write_metadata(folder, kind="csv", rows=None, inner=False):
    """One file for all, or one in each folder."""
    rows = ROWS if rows is None else rows
    for part in ("", "b/") if inner else ("",):
        lines = ["file_name,temperature,flower,place"] if kind == "csv" else []
        for name, (temperature, flower, place) in rows.items():
            if inner and (name.startswith("b/") != (part == "b/")):
                continue
            name = name.removeprefix(part)
            if kind == "csv":
                lines.append(f'{name},{temperature},{flower},"{place}"')
            else:
                entry = {"file_name": name, "temperature": temperature, "flower": flower, "place": place}
                lines.append(json.dumps(entry) + "\n")
        (folder / part / f"metadata.{kind}").write_text("\n".join(lines))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("inner", [False, True])
def test_metadata_of_a_folder(tmp_path, kind, inner):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder, kind, inner=inner)
    dataset = load_images(
        train_data_dir=folder, resolution=12, label_column="flower", condition_columns=["place", "temperature"]
    )
    assert dataset.id2label == {0: "aster", 1: "rose"} and [dataset[i]["label"] for i in range(3)] == [1, 0, 1]
    columns = dataset.condition_columns
    assert columns["names"] == ["place[0]", "place[1]", "temperature"]
    values = np.array([[1, 5, 10], [2, 7, 20], [3, 3.5, 60]])
    assert np.allclose(columns["mean"], values.mean(0)) and np.allclose(columns["std"], values.std(0))
    batch = next(iter(make_loader(dataset, batch_size=3, seed=0)))
    assert batch["mapping_cond"].shape == (3, 3) and batch["mapping_cond"].dtype == torch.float32
    expected = (values - values.mean(0)) / values.std(0)
    assert np.allclose(batch["mapping_cond"], expected[batch["index"]], atol=1e-6)
    assert "mapping_cond" not in load_images(train_data_dir=folder, resolution=12)[0]


def test_the_pipeline_takes_the_conditions_by_name(tmp_path, make_model):
    from diffusers import EDMDPMSolverMultistepScheduler

    from diffusers_hdit import HDiTPipeline

    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    dataset = load_images(train_data_dir=folder, resolution=12, condition_columns=["temperature", "place"])
    pipeline = HDiTPipeline(
        make_model(mapping_cond_dim=3), EDMDPMSolverMultistepScheduler(), condition_columns=dataset.condition_columns
    )
    encoded = pipeline.encode_mapping_cond({"temperature": [10.0, 60], "place[0]": [1.0, 3], "place[1]": [5.0, 3.5]})
    assert torch.allclose(encoded, torch.stack([dataset[0]["mapping_cond"], dataset[2]["mapping_cond"]]), atol=1e-6)


def test_given_statistics(tmp_path):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    options = {"train_data_dir": folder, "resolution": 12, "condition_columns": ["temperature"]}
    given = {"mean": [20], "std": [10]}
    dataset = load_images(**options, condition_statistics=given)
    assert [dataset[i]["mapping_cond"].item() for i in range(3)] == [-1, 0, 4]
    again = load_images(**options, condition_statistics=dataset.condition_columns)
    assert again.condition_columns == {"names": ["temperature"], "mean": [20.0], "std": [10.0]}
    for wrong in (
        {"mean": [1, 2], "std": [1, 2]},
        {"mean": [1], "std": [0]},
        {"mean": [1]},
        {**given, "names": ["x"]},
    ):
        with pytest.raises(ValueError, match="condition_statistics"):
            load_images(**options, condition_statistics=wrong)
    with pytest.raises(ValueError, match="condition_statistics need condition_columns"):
        load_images(train_data_dir=folder, resolution=12, condition_statistics=given)
    with pytest.raises(ValueError, match="list of different names; got 'temperature'"):
        load_images(train_data_dir=folder, resolution=12, condition_columns="temperature")


@pytest.mark.parametrize(
    "column, rows, message",
    [
        ("temperature", {"b/c.png": ("nan", "x", [1, 2])}, r"'temperature': 1 of 3 rows have no finite .*'b/c.png' \('nan'\)"),
        ("temperature", {"b/c.png": ("", "x", [1, 2])}, r"'temperature': 1 of 3 images .* no such entry .*'b/c.png'; its"),
        ("flower", {}, r"'flower': 3 of 3 rows have no finite number .*'a.png' \('rose'\)"),
        ("temperature", {name: (5, "x", [1, 2]) for name in ROWS}, "'temperature' is 5 in all 3 images: leave it out"),
        ("place", {"a.png": (1, "x", [1])}, r"'place' has vectors of 1 to 2 numbers \(the shortest: 'a.png'\)"),
        ("place", {"a.png": (1, "x", [1, None])}, r"'place': 1 of 3 rows .*'a.png' \("),
        ("pressure", {}, r"'pressure': 3 of 3 images .*; its columns: \['flower', 'place', 'temperature'\]"),
    ],
)  # fmt: skip
def test_bad_conditions(tmp_path, column, rows, message):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder, rows={**ROWS, **rows})
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=folder, resolution=12, condition_columns=[column])


@pytest.mark.parametrize(
    "options",
    [{"condition_columns": ["flower"]}, {"buckets": Buckets(64, 64)}, {"cache_images": "x"}, {"label_column": "x"}],
)
def test_what_can_be_refused_without_decoding_is(tmp_path, options):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    with pytest.raises(ValueError):
        load_images(train_data_dir=folder, resolution=12, **options)
    assert not manifests(tmp_path)


def test_bad_metadata(tmp_path):
    folder = folder_of(tmp_path, *ROWS)
    options = {"train_data_dir": folder, "resolution": 12}
    with pytest.raises(ValueError, match=r"come from a metadata.csv or metadata.jsonl .*; .* has none"):
        load_images(**options, condition_columns=["t"])
    write_metadata(folder, rows={**ROWS, "gone.png": (1, "x", [1, 2])})
    with pytest.raises(ValueError, match="names 1 images that are not there: 'gone.png'"):
        load_images(**options, label_column="flower")
    write_metadata(folder, rows={"a.png": ROWS["a.png"]})
    with pytest.raises(ValueError, match=r"label_column='flower': 2 of 3 images .* such as 'b/c.png', 'b/d.png'"):
        load_images(**options, label_column="flower")
    with pytest.raises(ValueError, match="label_column='flowr': 3 of 3 images"):
        load_images(**options, label_column="flowr")
    write_metadata(folder)
    write_metadata(folder, "jsonl")
    with pytest.raises(ValueError, match="'a.png' stands in two rows"):
        load_images(**options, label_column="flower")
    (folder / "metadata.jsonl").write_text("[1, 2]")
    with pytest.raises(ValueError, match="line 1 must be a JSON object"):
        load_images(**options, label_column="flower")
    (folder / "metadata.jsonl").write_text("nonsense")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        load_images(**options, label_column="flower")


def test_metadata_and_folders_of_classes(tmp_path):
    """`label` still means the sub-folders, as in Hugging Face's ImageFolder, unless the metadata has such a column."""
    folder = folder_of(tmp_path, "x/1.png", "y/2.png")
    (folder / "metadata.csv").write_text("file_name,t\nx/1.png,1\n./y/2.png,2\n")
    dataset = load_images(train_data_dir=folder, resolution=12, label_column="label", condition_columns=["t"])
    assert dataset.id2label == {0: "x", 1: "y"} and dataset.condition_columns["mean"] == [1.5]
    (folder / "metadata.csv").write_text("file_name,label\nx/1.png,10\ny/2.png,9\n")
    dataset = load_images(train_data_dir=folder, resolution=12, label_column="label")
    assert [dataset[i]["label"] for i in range(2)] == [10, 9] and len(dataset.id2label) == 11


def test_conditions_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "t": [1.0, 2, 6],
        "n": [3, 0, 0],
        "v": [[1.0, 0], [0, 1], [0, 0]],
        "s": ["a", "b", "c"],
        "gap": [1, None, 2],
    }
    features = {
        "t": datasets.Value("float64"), "n": datasets.Value("int8"), "v": datasets.Sequence(datasets.Value("float32"), 2),
        "s": datasets.Value("string"), "gap": datasets.Value("float32"),
    }  # fmt: skip
    path = saved_rows(tmp_path, columns, features)
    dataset = load_images(dataset_name=path, resolution=12, condition_columns=["t", "n", "v"])
    assert dataset.condition_columns["names"] == ["t", "n", "v[0]", "v[1]"]
    assert dataset.condition_columns["mean"] == pytest.approx([3, 1, 1 / 3, 1 / 3])
    normal = torch.stack([dataset[i]["mapping_cond"] for i in range(3)])
    assert normal.mean(0).abs().max() < 1e-6 and (normal.std(0, correction=0) - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"'gap': 1 of 3 rows .*: 'row 1' \(None\)"):
        load_images(dataset_name=path, resolution=12, condition_columns=["gap"])
    with pytest.raises(ValueError, match="condition_columns='x' is not in"):
        load_images(dataset_name=path, resolution=12, condition_columns=["x"])


def test_statistics_are_of_the_images_that_can_be_read(tmp_path):
    names = [f"{i:03}.png" for i in range(100)]
    folder = folder_of(tmp_path, *names)
    lines = [f"{name},{1e6 if i == 50 else i % 2}" for i, name in enumerate(names)]
    (folder / "metadata.csv").write_text("file_name,t\n" + "\n".join(lines))
    (folder / "050.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 100"):
        dataset = load_images(train_data_dir=folder, resolution=12, condition_columns=["t"])
    assert dataset.condition_columns["mean"] == [pytest.approx(50 / 99)]
    assert dataset[98]["mapping_cond"] > 0 and len(dataset) == 99


# --- Arrays in Hugging Face datasets


def test_arrays_in_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    arrays = np.random.default_rng(0).integers(0, 60000, (3, 5, 8, 9)).astype(np.uint16)
    kinds = datasets.Features({"image": datasets.Array3D((5, 8, 9), "uint16")})
    datasets.Dataset.from_dict({"image": arrays}, features=kinds).save_to_disk(tmp_path / "saved")
    dataset = load_images(dataset_name=tmp_path / "saved", resolution=(8, 9), in_channels=5)
    assert dataset.dtype == "uint16"
    assert all(np.array_equal(dataset[i]["image"].numpy(), arrays[i]) for i in range(3))
    buffer = io.BytesIO()
    np.save(buffer, arrays[0])
    datasets.Dataset.from_dict({"image": [buffer.getvalue()]}).save_to_disk(tmp_path / "bytes")
    dataset = load_images(dataset_name=tmp_path / "bytes", resolution=(8, 9), in_channels=5)
    assert np.array_equal(dataset[0]["image"].numpy(), arrays[0])


# --- The reading check


def test_one_unreadable_image_is_skipped(tmp_path):
    folder = folder_of(tmp_path, *[f"{'ab'[i % 2]}/{i:03}.png" for i in range(150)])
    (folder / "b" / "077.png").write_bytes(b"this is no image")
    for _ in range(2):  # unreadable ones are tried, and named, at every start
        with pytest.warns(UserWarning, match=r"1 of 150 images cannot be read and are skipped: 'b/077.png' \(Unid"):
            dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
        assert len(dataset) == 149 and dataset.skipped == ["b/077.png"]
        assert [dataset[i]["label"] for i in range(149)] == [0] * 75 + [1] * 74
        found = dataset[75 + 38]["image"].permute(1, 2, 0).numpy()  # 079 has taken the place of 077
        assert np.array_equal(found, np.asarray(picture(79)))
    picture(77).save(folder / "b" / "077.png")
    assert len(load_images(train_data_dir=folder, resolution=12)) == 150


def damaged_png():
    """Whole but for its pixels: the checksum is right, the compressed stream is not."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    content = buffer.getvalue()
    at = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[at - 4 : at])
    body = b"IDAT" + b"\xff" * length
    return content[:at] + body + struct.pack(">I", zlib.crc32(body)) + content[at + 8 + length :]


@pytest.mark.parametrize("harm", ["truncated", "damaged", "empty", "dangling"])
def test_too_many_unreadable_images(tmp_path, harm):
    folder = folder_of(tmp_path, *[f"{i}.jpg" for i in range(20)], size=(40, 40))
    for i in range(7):
        path = folder / f"{i}.jpg"
        content = path.read_bytes()
        path.unlink()
        if harm == "dangling":
            path.symlink_to(tmp_path / "gone.jpg")
        else:
            path.write_bytes({"truncated": content[:-300], "damaged": damaged_png(), "empty": b""}[harm])
    with pytest.raises(ValueError, match=r"7 of 20 images .*; at most 1% may\. .*'0\.jpg' \(\w+: .*and 2 more"):
        load_images(train_data_dir=folder, resolution=12)


def test_one_percent_is_the_limit(tmp_path):
    folder = folder_of(tmp_path, *[f"{i:03}.png" for i in range(100)])
    (folder / "000.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 100"):
        assert len(load_images(train_data_dir=folder, resolution=12)) == 99
    (folder / "099.png").unlink()
    with pytest.raises(ValueError, match="1 of 99"):
        load_images(train_data_dir=folder, resolution=12)


def test_second_start_does_not_decode(tmp_path, capsys):
    folder = folder_of(tmp_path, "a.png", "b.png")
    assert not manifests(tmp_path)
    load_images(train_data_dir=folder, resolution=12)
    assert len(manifests(tmp_path)) == 1, "one manifest, and no temporary file"
    spoil(folder / "b.png")
    dataset = load_images(train_data_dir=folder, resolution=8, in_channels=1)
    assert len(dataset) == 2
    with pytest.raises(OSError, match=r"'b.png' in .* can no longer be read"):
        dataset[1]
    assert capsys.readouterr().err == "", "no progress bar for a short check"


@pytest.mark.parametrize("manifest", ["missing", "stale", "broken", "wrong", "infinite", "nonsense", "other source"])
def test_manifest_that_says_nothing(tmp_path, manifest):
    folder = folder_of(tmp_path, "a.png", "b.png")
    load_images(train_data_dir=folder, resolution=12)
    [path] = manifests(tmp_path)
    content = path.read_text()
    spoil(folder / "b.png")
    if manifest == "missing":
        path.unlink()
    elif manifest == "stale":
        os.utime(folder / "b.png", ns=(0, 0))
    elif manifest == "broken":
        path.write_text(content[: len(content) // 2])
    elif manifest == "wrong":
        path.write_text(content.replace("12, 12]", "0, 12]"))
    elif manifest == "infinite":
        path.write_text(content.replace("12, 12]", "Infinity, 12]"))
    elif manifest == "nonsense":
        path.write_bytes(b"\xff\xfe[1, 2]")
    else:
        path.write_text(content.replace("folder ", "folder /another"))
    assert manifest in ("missing", "stale") or path.read_bytes() != content.encode()
    with pytest.raises(ValueError, match=r"1 of 2 images .*'b.png'"):
        load_images(train_data_dir=folder, resolution=12)


def test_only_what_changed_is_decoded_again(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    load_images(train_data_dir=folder, resolution=12)
    spoil(folder / "a.png")
    picture(5).save(folder / "c.png")
    assert len(load_images(train_data_dir=folder, resolution=12)) == 3


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = folder_of(tmp_path, "a.png")
    for _ in range(2):
        assert len(load_images(train_data_dir=folder, cache_dir=tmp_path / "file" / "cache", resolution=12)) == 1


# --- What a run must keep


def test_identity(tmp_path):
    folder = folder_of(tmp_path, *[f"{'xy'[i % 2]}/{i:03}.png" for i in range(120)])
    options = {"train_data_dir": folder, "resolution": 12}
    first = load_images(**options).identity
    assert load_images(**{**options, "resolution": 8}, cache_images=False).identity == first
    assert load_images(**options, label_column="label").identity != first
    moved = folder.rename(tmp_path / "moved")
    assert load_images(**{**options, "train_data_dir": moved}).identity == first, "wherever it lies"
    for change in (
        lambda: spoil(moved / "y" / "007.png"),
        lambda: (moved / "y" / "007.png").unlink(),
        lambda: picture(7, (13, 12)).save(moved / "y" / "007.png"),
    ):
        change()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_images(**{**options, "train_data_dir": moved}, cache_dir=tmp_path / "another").identity
        assert found != first
    (moved / "y" / "007.png").unlink()
    picture(7).save(moved / "y" / "007.png")
    assert load_images(**{**options, "train_data_dir": moved}).identity == first


def test_identity_of_labels_and_conditions(tmp_path):
    folder, found = folder_of(tmp_path, "1.png", "2.png", "3.png"), set()
    for values in ([0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 2]):
        lines = [f"{i + 1}.png,{value}" for i, value in enumerate(values)]
        (folder / "metadata.csv").write_text("file_name,v\n" + "\n".join(lines))
        for options in ({"label_column": "v"}, {"condition_columns": ["v"]}):
            found.add(load_images(train_data_dir=folder, resolution=12, **options).identity)
    assert len(found) == 8


def test_identity_of_datasets(tmp_path):
    paths = [
        saved_rows(tmp_path, {"n": [1, 2, 3]}),
        saved_rows(tmp_path, {"n": [1, 2, 3]}, name="copy"),
        saved_rows(tmp_path, {"n": [1, 2, 3, 4]}, count=4, name="more"),
        saved_rows(tmp_path, {"n": [1, 2, 3], "image": [picture(i, (13, 12)) for i in range(3)]}, name="other"),
    ]
    found = [load_images(dataset_name=path, resolution=12).identity for path in paths]
    assert found[0] == found[1] and len(set(found)) == 3
    assert load_images(dataset_name=paths[0], label_column="n", resolution=12).identity != found[0]


# --- The loader


SPLITS = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)]


def global_batches(dataset, steps, split=(8, 1, 1), **options):
    """{number: (index, image, label)} of the first steps, over all processes."""
    batch_size, world_size, micro_steps = split
    found = {}
    for rank in range(world_size):
        loader = make_loader(
            dataset,
            batch_size=batch_size,
            seed=5,
            rank=rank,
            world_size=world_size,
            micro_steps=micro_steps,
            **options,
        )
        for batch in itertools.islice(loader, steps * micro_steps):
            assert all(batch[key].dtype == torch.int64 for key in ("label", "number", "index"))
            assert batch["image"].is_contiguous() and len(batch["image"]) == batch_size
            rows = zip(batch["number"], batch["index"], batch["image"], batch["label"], strict=True)
            found.update({int(number): (int(index), image, int(label)) for number, index, image, label in rows})
    return found


def equal(one, other):
    assert one.keys() == other.keys()
    for number in one:
        (index, image, label), (index_2, image_2, label_2) = one[number], other[number]
        assert (index, label) == (index_2, label_2) and torch.equal(image, image_2)


def mixed_folder(tmp_path):
    """22 pictures of many shapes in two classes."""
    shapes = [(40, 20), (20, 40), (30, 30), (33, 24), (70, 30)]
    for i in range(22):
        path = tmp_path / "mixed" / "xy"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, shapes[i % 5]).save(path)
    return tmp_path / "mixed"


def open_mixed(tmp_path, **options):
    options = {"train_data_dir": tmp_path / "mixed", "label_column": "label", "resolution": 16, **options}
    return load_images(**options)


@pytest.mark.parametrize("buckets", [None, Buckets(4, 8)])
def test_a_global_batch_does_not_depend_on_how_it_is_divided(tmp_path, buckets):
    mixed_folder(tmp_path)
    dataset = open_mixed(tmp_path, buckets=buckets)
    whole = global_batches(dataset, 6)
    assert sorted(whole) == list(range(48))
    for split in SPLITS[1:]:
        equal(global_batches(dataset, 6, split), whole)
    resumed = global_batches(dataset, 3, (2, 2, 2), start=24)  # the second epoch begins at 22
    equal(resumed, {number: row for number, row in whole.items() if number >= 24})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(tmp_path, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    mixed_folder(tmp_path)
    dataset = open_mixed(tmp_path, buckets=Buckets(4, 8), cache_images=method == "fork")
    if method == "spawn":
        loader = make_loader(dataset, batch_size=8, seed=5, num_workers=2)
        loader.multiprocessing_context = method
        found = {
            int(n): image
            for batch in itertools.islice(loader, 4)
            for n, image in zip(batch["number"], batch["image"], strict=True)
        }
        for number, (_, image, _) in global_batches(dataset, 4).items():
            assert torch.equal(found[number], image)
    else:
        equal(global_batches(dataset, 8, (4, 2, 1), num_workers=2), global_batches(dataset, 8))


def test_an_error_ends_the_workers_too(tmp_path):
    mixed_folder(tmp_path)
    program = f"""
from diffusers_hdit.data import load_images, make_loader
def train():
    loader = make_loader(load_images(train_data_dir={str(tmp_path)!r}, resolution=8), batch_size=2, seed=0, num_workers=1)
    batches = iter(loader)
    next(batches)
    raise RuntimeError("out of memory")
if __name__ == "__main__":
    train()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: out of memory"), done.stderr


def test_buckets(tmp_path):
    """All images of a step have one size, which suits their shape."""
    mixed_folder(tmp_path)
    dataset = open_mixed(tmp_path, buckets=Buckets(4, 8))
    assert set(dataset.sizes) <= set(Buckets(4, 8).sizes((16, 16))) and len(dataset.sizes) == 3
    seen = set()
    for batch in itertools.islice(make_loader(dataset, batch_size=4, seed=0), 12):
        shape = tuple(batch["image"].shape[2:])
        seen.add(shape)
        for index in batch["index"].tolist():
            assert dataset.size_of(index) == shape
            height, width = dataset.image_sizes[index]
            best = min(dataset.sizes, key=lambda size: abs(np.log(size[0] / size[1] / (height / width))))
            assert best == shape
    assert seen == set(dataset.sizes)
    options = {"train_data_dir": tmp_path / "mixed", "resolution": 16}
    few = load_images(**options, buckets=Buckets(4, 8, min_images=8))
    assert min(np.bincount(few.buckets)) >= 8
    with pytest.raises(ValueError, match="buckets: no size"):
        load_images(**options, buckets=Buckets(64, 64))
    with pytest.raises(ValueError, match="buckets need the sizes of all images"):
        load_images(dataset_name="x", streaming=True, resolution=16, buckets=Buckets(4))


@pytest.mark.parametrize("options", [{}, {"center_crop": True}, {"buckets": Buckets(4, 8)}, {"in_channels": 1}])
def test_the_cache_changes_nothing(tmp_path, options):
    mixed_folder(tmp_path)
    without, cached = (open_mixed(tmp_path, cache_images=on, **options) for on in (False, True))
    assert without.cache is None and cached.cache.nbytes > 0
    expected = global_batches(without, 12)
    for _ in range(2):
        equal(global_batches(cached, 12), expected)
    assert cached.cache.filled.any()


def test_cached_images_are_not_read_again(tmp_path):
    folder = mixed_folder(tmp_path)
    dataset = open_mixed(tmp_path)
    assert dataset.cache is not None, "so few fit in memory"
    expected = global_batches(dataset, 6, num_workers=2)
    assert all(dataset.cache.holds(i) for i in range(22)) and dataset.cache.filled.all()
    for path in folder.glob("*/*.png"):
        spoil(path)
    found = global_batches(dataset, 6)
    equal(found, expected)
    for index in range(22):
        dataset[index]["image"].zero_()  # what is handed out is no part of the cache
    equal(global_batches(dataset, 6), expected)


def test_very_long_images_are_not_cached(tmp_path):
    folder = folder_of(tmp_path, "a.png", size=(100, 12))
    dataset = load_images(train_data_dir=folder, resolution=12, cache_images=True)
    assert not dataset.cache.holds(0)
    centred = load_images(train_data_dir=folder, resolution=12, cache_images=True, center_crop=True)
    assert centred.cache.holds(0)
    assert torch.equal(dataset[0, (0.5, 0.5)]["image"], centred[0]["image"])


def test_a_cache_that_does_not_fit(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "a.png", "b.png")
    options = {"train_data_dir": folder, "resolution": 12}
    need = 2 * 3 * 12 * 12
    monkeypatch.setattr(image_cache, "available_memory", lambda: need * 4)
    assert load_images(**options).cache is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert load_images(**options).cache is None
    assert load_images(**options, cache_images=True).cache.nbytes == need
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="cache_images: the decoded images take .* GiB, but 80%"):
        load_images(**options, cache_images=True)
    with pytest.raises(ValueError, match="cache_images must be True, False or 'auto'"):
        load_images(**options, cache_images="yes")


def test_memory_that_is_free():
    assert 0 < image_cache.available_memory() < 2**50


def test_a_file_that_changes_during_the_run(tmp_path):
    folder = folder_of(tmp_path, "a.png")
    dataset = load_images(train_data_dir=folder, resolution=12)
    picture(size=(30, 12)).save(folder / "a.png")
    with pytest.raises(OSError, match="'a.png' .* can no longer be read: it has 12x30 pixels now, and had 12x12"):
        dataset[0]


def test_an_item_names_itself(tmp_path):
    dataset = load_images(train_data_dir=folder_of(tmp_path, "a.png", "b.png"), resolution=12)
    assert {**dataset[Item(-1, number=7)], "image": None} == {"image": None, "number": 7, "index": 1}


def test_sources_can_be_pickled(tmp_path):
    pytest.importorskip("datasets")
    for dataset in (
        load_images(train_data_dir=FACES, label_column="label", resolution=64),
        load_images(dataset_name=saved_rows(tmp_path, {}), resolution=12),
    ):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[1]["image"], dataset[1]["image"]) and copy.id2label == dataset.id2label
