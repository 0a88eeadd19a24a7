"""Sources, the reading check and the order of images, all on real files."""

import io
import itertools
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_hdit import data
from diffusers_hdit.data import ImageDataset, ShuffledBatches, load_images, to_float


FACES = Path(__file__).parents[1] / "examples" / "data" / "fluent_faces_64.png"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def picture(seed=0, size=(12, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder_of(tmp_path, *names, size=(12, 12)):
    for i, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, size).save(path)
    return tmp_path / "images"


def load_one(tmp_path, image, name="one.png", resolution=None, **options):
    """The tensor of one image saved to a folder of its own, at its own size unless told otherwise."""
    (tmp_path / "one").mkdir(parents=True, exist_ok=True)
    image.save(tmp_path / "one" / name, **options.pop("save", {}))
    size = resolution or (image.height, image.width)
    return load_images(train_data_dir=tmp_path / "one", resolution=size, **options)[0]["image"]


def manifests(tmp_path):
    return sorted((tmp_path / "xdg" / "diffusers_hdit").glob("*"))


def spoil(path):
    """Makes a file unreadable without changing its size or time."""
    stat = path.stat()
    path.write_bytes(b"\0" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


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
    assert data._cell_size(width, height, count, "sheet") == cell


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
            assert data._cell_size(width, height, count, "sheet") == fits[0]
        else:
            with pytest.raises(ValueError, match="does not divide into rows of square cells"):
                data._cell_size(width, height, count, "sheet")


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


def saved_rows(tmp_path, columns, features=None, count=3, name="saved"):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), **(features or {})}) if features is not None else None
    rows = {"image": [picture(i) for i in range(count)], **columns}
    path = tmp_path / name
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(path)
    return path


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


# --- Pixels


def test_transparency_goes_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]
    image = Image.fromarray(pixels)
    assert load_one(tmp_path, image)[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert load_one(tmp_path, image, in_channels=1)[:, 0].tolist() == [[76, 255, 127]]
    assert np.array_equal(load_one(tmp_path, image, in_channels=4).permute(1, 2, 0).numpy(), pixels)
    grey = Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")
    assert load_one(tmp_path, grey)[0].tolist() == [[9, 255]]


def test_palettes(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert load_one(tmp_path, image)[0, 0].tolist() == [10, 40, 70]
    assert load_one(tmp_path, image, save={"transparency": 1})[0, 0].tolist() == [10, 255, 70]
    translucent = load_one(tmp_path, image, save={"transparency": bytes([255, 0, 255])}, in_channels=4)
    assert translucent[3, 0].tolist() == [255, 0, 255]


def test_modes_of_colour(tmp_path):
    assert load_one(tmp_path, Image.new("L", (2, 2), 77)).unique().tolist() == [77]
    assert load_one(tmp_path, Image.new("L", (2, 2), 77), in_channels=1).shape == (1, 2, 2)
    assert load_one(tmp_path, Image.new("1", (2, 2), 1), in_channels=1).unique().tolist() == [255]
    assert load_one(tmp_path, Image.new("RGB", (2, 2)), in_channels=4)[:, 0, 0].tolist() == [0, 0, 0, 255]
    for channels in (2, 5, 0):
        with pytest.raises(ValueError, match=f"in_channels={channels}: .*1 .grey., 3 .RGB. or 4 .RGBA."):
            load_one(tmp_path, Image.new("L", (2, 2)), in_channels=channels)


def test_cmyk(tmp_path):
    for name, tolerance in (("c.tif", 0), ("c.jpg", 3)):
        found = load_one(tmp_path / name[-1], Image.new("CMYK", (8, 8), (255, 0, 0, 0)), name)
        assert (found[:, 0, 0].int() - torch.tensor([0, 255, 255])).abs().max() <= tolerance


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 300, 25700, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert load_one(tmp_path, image, name, in_channels=1)[0].tolist() == [[0, 0, 1, 1, 1, 100, 255]]
    assert load_one(tmp_path, image, name).shape == (3, 1, 7)


def test_numbers_without_a_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        load_one(tmp_path, Image.new("F", (4, 4), 0.5), "f.tif")
    with pytest.raises(ValueError, match="1 of 1 images .*not within 16 bits"):
        load_one(tmp_path, Image.new("I", (4, 4), 70000), "f.tif")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 255, (255, 0, 0), (0, 0, 255)
    # What the camera stores, from the meaning of the tag: where row 0 and column 0 of the file belong.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    found = load_one(
        tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, resolution=(16, 32), save={"exif": exif}
    )
    assert np.abs(found[:, 4::8, 4::8].permute(1, 2, 0).numpy().astype(int) - upright[4::8, 4::8]).max() < 24


def test_broken_exif_does_not_cost_the_image(tmp_path):
    found = load_one(tmp_path, picture(), save={"exif": b"Exif\0\0nonsense"})
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(picture()))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = load_one(tmp_path, frames[0], "a.gif", save={"save_all": True, "append_images": frames[1:]})
    assert found[:, 0, 0].tolist() == [255, 0, 0]


# --- Size and crop


def test_height_comes_first(tmp_path):
    image = picture(size=(48, 24))
    half = load_one(tmp_path, image, resolution=(12, 24))
    assert half.shape == (3, 12, 24)
    expected = np.asarray(image.resize((24, 12), Image.Resampling.LANCZOS))
    assert np.array_equal(half.permute(1, 2, 0).numpy(), expected)


def test_places_of_a_crop(tmp_path):
    image = picture(size=(48, 24))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    dataset = load_images(train_data_dir=folder_of(tmp_path, "a.png", size=(48, 24)), resolution=24)
    for x, left in ((0, 0), (0.5, 12), (1, 24), (0.999, 24)):
        assert torch.equal(dataset[0, (0.3, x)]["image"], pixels[:, :, left : left + 24])
    torch.manual_seed(0)
    drawn = torch.stack([dataset[0]["image"] for _ in range(60)])
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.stack([dataset[0]["image"] for _ in range(60)]))
    windows = [pixels[:, :, left : left + 24] for left in range(25)]
    places = {next(left for left, w in enumerate(windows) if torch.equal(w, image)) for image in drawn}
    assert len(places) > 12 and places <= set(range(25))

    centred = load_images(train_data_dir=tmp_path / "images", resolution=24, center_crop=True)
    before = torch.get_rng_state()
    for found in (centred[0], centred[0, (0, 0)]):
        assert torch.equal(found["image"], pixels[:, :, 12:36])
    square = load_images(train_data_dir=tmp_path / "images", resolution=(12, 24))
    assert square[0]["image"].shape == (3, 12, 24)
    assert torch.equal(torch.get_rng_state(), before), "no place to choose, no number drawn"


def test_scaled_crop_is_resize_then_crop(tmp_path):
    image = picture(size=(40, 90))
    found = load_one(tmp_path, image, resolution=20, center_crop=True)
    expected = np.asarray(image.resize((20, 45), Image.Resampling.LANCZOS))[13:33]  # (45 - 20 + 1) // 2
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_any_size_makes_the_resolution(tmp_path):
    """Rounding never puts the box outside the image, and a very long image takes no more memory than another."""
    dataset = ImageDataset(data._Folder(folder_of(tmp_path, "a.png"), None), (7, 13))
    for w, h in itertools.product((1, 2, 3, 7, 13, 29, 97), repeat=2):
        for crop in ((0, 0), (1, 1), (0.7, 0.2)):
            assert dataset.transform(Image.new("RGB", (w, h), "red"), crop)[0].unique().tolist() == [255]
    assert dataset.transform(Image.new("L", (1, 60000), 9)).unique().tolist() == [9]


def test_small_images_are_counted(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    picture(size=(16, 12)).save(folder / "c.png")
    for _ in range(2):  # the second time from the manifest
        with pytest.warns(UserWarning, match="2 of 3 images are smaller than 12x16 and will be enlarged"):
            load_images(train_data_dir=folder, resolution=(12, 16))


def test_to_float():
    scaled = to_float(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16))
    assert scaled.dtype == torch.float32 and scaled.shape == (1, 1, 16, 16)
    assert scaled.min() == -1 and scaled.max() == 1 and scaled.flatten().diff().min() > 0
    with pytest.raises(TypeError, match="float32"):
        to_float(scaled)


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


# --- DataLoader


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(tmp_path, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    folder = folder_of(tmp_path, *[f"{'ab'[i % 2]}/{i}.png" for i in range(8)], size=(20, 12))
    dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
    order = ShuffledBatches(8, 3, seed=1, crops=True)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order, num_workers=2, multiprocessing_context=method)
    for batch, expected in zip(itertools.islice(loader, 4), order, strict=False):
        assert batch["image"].shape == (3, 3, 12, 12) and batch["image"].dtype == torch.uint8
        assert batch["label"].dtype == torch.int64
        for image, label, index in zip(batch["image"], batch["label"], expected, strict=True):
            assert torch.equal(image, dataset[index]["image"]) and label == dataset[index]["label"]


def test_sources_can_be_pickled(tmp_path):
    pytest.importorskip("datasets")
    for dataset in (
        load_images(train_data_dir=FACES, label_column="label", resolution=64),
        load_images(dataset_name=saved_rows(tmp_path, {}), resolution=12),
    ):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[1]["image"], dataset[1]["image"]) and copy.id2label == dataset.id2label


# --- The order


def numbers(count, **options):
    """The first `count` batches of one process."""
    return list(itertools.islice(ShuffledBatches(**options), count))


def global_order(steps, world_size, batch_size, **options):
    ranks = [
        numbers(steps, rank=r, world_size=world_size, batch_size=batch_size, **options) for r in range(world_size)
    ]
    return [index for step in zip(*ranks, strict=True) for batch in step for index in batch]


def test_every_image_once_an_epoch():
    order = global_order(21, 1, 5, num_images=21, seed=3)  # 105 images: 5 epochs, batches straddling them
    epochs = [order[i : i + 21] for i in range(0, 105, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert all(isinstance(index, int) for index in order)


def test_order_does_not_depend_on_the_number_of_processes():
    options = {"num_images": 21, "seed": 3}
    one = global_order(30, 1, 8, **options)
    assert one == global_order(30, 2, 4, **options) == global_order(30, 4, 2, **options)


@pytest.mark.parametrize("seen", [0, 8, 16, 24, 21, 5, 8 * 1000])
def test_resumed_order_continues(seen):
    options = {"num_images": 21, "seed": 3}
    whole = global_order(seen // 8 + 10, 1, 8, **options)
    assert global_order(9, 1, 8, start=seen, **options) == whole[seen : seen + 72]
    assert global_order(9, 2, 4, start=seen, **options) == whole[seen : seen + 72]


def test_crops_belong_to_the_image_number():
    options = {"num_images": 40, "seed": 3, "crops": True}
    whole = global_order(50, 1, 8, **options)
    assert whole[80:120] == global_order(5, 2, 4, start=80, **options)
    assert [index for index, _ in whole] == global_order(50, 1, 8, num_images=40, seed=3)
    places = torch.tensor([crop for _, crop in whole])
    assert places.min() >= 0 and places.max() < 1
    # 400 uniform numbers: mean 1/2 with a deviation of 0.0144, of which 4 are allowed; none drawn twice.
    assert (places.mean(0) - 0.5).abs().max() < 0.058 and len(places.unique()) == 800


def test_iterating_again_starts_again():
    order = ShuffledBatches(10, 4, seed=0)
    assert list(itertools.islice(order, 6)) == list(itertools.islice(order, 6))


def test_seeds_and_epochs_are_mixed():
    first = {
        tuple(numbers(1, num_images=50, batch_size=50, seed=seed, start=50 * e)[0])
        for seed in range(20)
        for e in range(20)
    }
    assert len(first) == 400, "no (seed, epoch) repeats another, such as (1, 0) and (0, 1)"


def test_order_is_frozen():
    """A checkpoint's place in the order is a number: another order would repeat and leave out images on a resume."""
    assert numbers(2, num_images=10, batch_size=5, seed=0) == [[2, 8, 7, 3, 5], [0, 4, 6, 9, 1]]


def test_bad_orders():
    with pytest.raises(ValueError, match="fewer images than a batch: 7 images, but 4 in each of 2 processes takes 8"):
        ShuffledBatches(7, 4, seed=0, world_size=2)
    assert len(numbers(1, num_images=8, batch_size=4, seed=0, world_size=2)[0]) == 4
    for wrong in ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"start": -1}, {"world_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ShuffledBatches(**{"num_images": 7, "batch_size": 2, "seed": 0, **wrong})
