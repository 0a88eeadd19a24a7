"""Folders, grids of cells and Hugging Face datasets, all on real files."""

import io
import itertools
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from data_files import FACES, folder_of, manifests, noise_image, saved_rows, spoil
from PIL import Image, features

from diffusers_hdit.data import ImageSource, load_images, make_loader
from diffusers_hdit.data.annotations import number_labels
from diffusers_hdit.data.sources import cell_size
from diffusers_hdit.data.transforms import decode


pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(noise_image(0)))
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
    noise_image().save(tmp_path / "s.png")
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
        assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), np.asarray(noise_image(i)))
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
    made = {
        name: datasets.Dataset.from_dict({"image": [noise_image(i) for i in range(n)]}) for name, n in parts.items()
    }
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
    path = saved_rows(tmp_path, {"image": [noise_image(), None]}, {})
    with pytest.raises(ValueError, match=r"1 of 2 images in .*'row 1' \(ValueError: the row has no image\)"):
        load_images(dataset_name=path, resolution=12)


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


# --- Splits and classes among folders


def classes(folder, **options):
    """Return {name of a class: number of images}."""
    return load_images(**{"train_data_dir": folder, "label_column": "label", "resolution": 12, **options}).class_counts


@pytest.mark.parametrize(
    "names",
    [
        ["train/{}/1.png", "train/{}/2.png", "test/{}/3.png", "validation/{}/4.png"],
        ["Train2017/{}/1.png", "Train2017/{}/2.png", "val2017/{}/3.png"],
        ["{}/train/1.png", "{}/train/2.png", "{}/test/3.png"],
        ["images/train/{}/1.png", "images/train/{}/2.png", "images/dev/{}/3.png", "extra/4.png"],
    ],
)
def test_only_the_images_of_the_split_are_taken(tmp_path, names):
    names = [name.format(animal) for name in names for animal in ("cat", "dog")]
    folder = folder_of(tmp_path, *dict.fromkeys(names))
    with pytest.warns(UserWarning, match="split='train' takes 4 of .* and leaves out those in '"):
        assert classes(folder) == {"cat": 2, "dog": 2}
    with pytest.warns(UserWarning, match="split='train' takes 4 of"):
        assert len(load_images(train_data_dir=folder, resolution=12)) == 4, "without labels, too"
    everything = load_images(train_data_dir=folder, resolution=12, split="all")
    assert len(everything) == len(set(names))


def test_the_classes_are_those_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = folder_of(tmp_path, *[f"{split}/{c}/{split}.png" for split in ("train", "eval") for c in ("cat", "dog")])
    options = {"data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    for split, theirs in (("train", "train"), ("test", "test")):
        rows = datasets.load_dataset("imagefolder", split=theirs, **options)
        with pytest.warns(UserWarning, match="leaves out"):
            found = load_images(train_data_dir=folder, split=split, label_column="label", resolution=12)
        assert list(found.id2label.values()) == rows.features["label"].names and len(found) == len(rows)


def test_a_train_folder_alone(tmp_path, recwarn):
    folder = folder_of(tmp_path, "train/cat/1.png", "train/dog/1.png")
    assert classes(folder) == {"cat": 1, "dog": 1}
    assert load_images(train_data_dir=folder, resolution=12).source.names == ["train/cat/1.png", "train/dog/1.png"]
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"split='test': .* has no folder of this split, such as test/"):
        classes(folder, split="test")


def test_a_class_may_be_called_train(tmp_path, recwarn):
    folder = folder_of(tmp_path, "car/1.png", "train/1.png", "plane/1.png")
    assert classes(folder) == {"car": 1, "plane": 1, "train": 1} and not recwarn.list


def test_a_split_that_is_not_there(tmp_path):
    folder = folder_of(tmp_path, "val/cat/1.png", "test/cat/1.png")
    with pytest.raises(ValueError, match=r"split='train' is not in .*: \['test', 'validation'\]"):
        classes(folder)
    assert classes(folder_of(tmp_path / "2", "test/1.png", "test/2.png")) == {"test": 2}, "one folder, and no choice"
    with pytest.raises(ValueError, match="split='test' and class_folder_depth=None: .* is not a folder"):
        load_images(train_data_dir=FACES, split="test", resolution=12)


def test_the_inner_folder_is_the_class(tmp_path):
    folder = folder_of(tmp_path, "animals/cat/1.png", "animals/dog/1.png", "plants/tree/1.png")
    with pytest.warns(
        UserWarning, match=r"2 folders deep.*depth 2, 'cat', 'dog', 'tree'; .*: 1 for 'animals', 'plants'\."
    ):
        assert classes(folder) == {"cat": 1, "dog": 1, "tree": 1}
    assert classes(folder, class_folder_depth=1) == {"animals": 2, "plants": 1}
    assert classes(folder, class_folder_depth=-2) == {"animals": 2, "plants": 1}
    assert classes(folder, class_folder_depth=-1) == classes(folder, class_folder_depth=2)
    with pytest.raises(ValueError, match="are to be the folders at depth 3 of .*, but 3 of 3 images lie in none"):
        classes(folder, class_folder_depth=3)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="class_folder_depth must be"):
            classes(folder, class_folder_depth=wrong)
    with pytest.raises(ValueError, match="needs a label_column"):
        load_images(train_data_dir=folder, class_folder_depth=1, resolution=12)


def test_folders_that_all_classes_have(tmp_path, recwarn):
    """As in Tiny ImageNet: train/n01443537/images/1.JPEG."""
    folder = folder_of(tmp_path, "train/n01/images/1.png", "train/n02/images/1.png")
    assert classes(folder) == {"n01": 1, "n02": 1}
    folder = folder_of(tmp_path / "2", "dataset/cat/1.png", "dataset/dog/1.png")
    assert classes(folder) == {"cat": 1, "dog": 1} and not recwarn.list


def test_folders_of_several_depths(tmp_path):
    folder = folder_of(tmp_path, "cat/1.png", "dog/young/1.png")
    with pytest.warns(UserWarning, match="1 or 2 folders deep. The classes are .* depth 1, 'cat', 'dog'; .*: -1 for"):
        assert classes(folder) == {"cat": 1, "dog": 1}
    assert classes(folder, class_folder_depth=-1) == {"cat": 1, "young": 1}


# --- Types of files


def test_whatever_pillow_opens_is_an_image(tmp_path, recwarn):
    names = ["a.png", "b.jfif", "c.jpe", "d.ppm", "e.tga", "f.PCX"]
    image = noise_image()
    (tmp_path / "images").mkdir()
    for name in names:
        image.save(tmp_path / "images" / name, "JPEG" if name[2:] in ("jfif", "jpe") else None)
    for name, module in (("g.avif", "avif"), ("h.jp2", "jpg_2000")):
        if features.check(module):
            image.save(tmp_path / "images" / name)
            names.append(name)
    assert load_images(train_data_dir=tmp_path / "images", resolution=12).source.names == names
    assert not recwarn.list


def test_files_that_are_left_out_are_named(tmp_path):
    folder = folder_of(tmp_path, "a.png")
    for i in range(6):
        (folder / f"{i}.heic").write_bytes(b"ftypheic")
    for name in ("film.mp4", "a.txt", "a.json", "LICENSE", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="7 files in .* are left out, .*: '0.heic', '1.heic', .* and 2 more") as found:
        load_images(train_data_dir=folder, resolution=12)
    assert len(found) == 1


# --- Hugging Face datasets that say little


def test_structs_of_bytes_and_path_are_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    noise_image().save(buffer, "PNG")
    folder = folder_of(tmp_path, "a.png")
    for number, rows in enumerate(
        (
            [{"bytes": buffer.getvalue(), "path": None}, {"bytes": None, "path": str(folder / "a.png")}],
            [{"bytes": buffer.getvalue()}],
            [{"path": str(folder / "a.png")}],
        )
    ):
        made = datasets.Dataset.from_dict({"image": rows, "label": ["a"] * len(rows)})
        assert not isinstance(made.features["image"], datasets.Image)
        made.save_to_disk(tmp_path / f"saved-{number}")
        dataset = load_images(dataset_name=tmp_path / f"saved-{number}", resolution=12, label_column="label")
        for i in range(len(rows)):
            assert np.array_equal(dataset[i]["image"].permute(1, 2, 0).numpy(), np.asarray(noise_image()))
    datasets.Dataset.from_dict({"image": [{"bytes": 1, "path": "x"}]}).save_to_disk(tmp_path / "other")
    (tmp_path / "rows").mkdir()
    made.to_parquet(tmp_path / "rows" / "train.parquet")
    stream = load_images(dataset_name=tmp_path / "rows", resolution=12, streaming=True)
    assert next(iter(make_loader(stream, batch_size=1, seed=0)))["image"].shape == (1, 3, 12, 12)
    with pytest.raises(ValueError, match="image_column='image' of .* holds .*, not images"):
        load_images(dataset_name=tmp_path / "other", resolution=12)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_a_train_split(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"image": [noise_image(i) for i in range(3)]}, features=datasets.Features({"image": datasets.Image()})
    )
    (tmp_path / "rows").mkdir()
    made.to_parquet(tmp_path / "rows" / "test-0.parquet")
    made.to_parquet(tmp_path / "rows" / "validation-0.parquet")
    options = {
        "dataset_name": tmp_path / "rows",
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 12,
        "streaming": streaming,
    }
    with pytest.raises(ValueError, match=r"split='train' is not in .*rows'; its splits: \['test', 'validation'\]"):
        load_images(**options)
    dataset = load_images(**options, split="test")
    assert next(iter(make_loader(dataset, batch_size=3, seed=0)))["image"].shape == (3, 3, 12, 12)


# --- A source of one's own


class ZipSource(ImageSource):
    """The example at the top of `sources.py`."""

    def __init__(self, path):
        self.location = repr(str(path))
        self.archive = zipfile.ZipFile(path)
        self.names = sorted(name for name in self.archive.namelist() if name.endswith(".png"))
        self.labels, self.id2label = number_labels([name.split("/")[0] for name in self.names])

    def read(self, index, min_size=None):
        return decode(io.BytesIO(self.archive.read(self.names[index])), min_size)


def test_a_source_of_ones_own(tmp_path):
    folder = folder_of(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    dataset = load_images(source=ZipSource(tmp_path / "images.zip"), resolution=12)
    assert dataset.class_counts == {"cat": 1, "dog": 2} and dataset.fingerprint and dataset.identity
    batch = next(iter(make_loader(dataset, batch_size=3, seed=0)))
    for image, index in zip(batch["image"], batch["index"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(noise_image(int(index))))
    with pytest.raises(ValueError, match="either train_data_dir or dataset_name"):
        load_images(source=ZipSource(tmp_path / "images.zip"), train_data_dir=folder, resolution=12)
