"""Streams of real parquet files: the order is exact whatever shares it, and whatever was known before."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from data_files import manifests
from PIL import Image

from diffusers_hdit.data import load_images, make_loader, streaming


datasets = pytest.importorskip("datasets")
LENGTHS = [5, 7, 3, 9, 6, 4, 8, 5]  # rows of the shards
TOTAL = sum(LENGTHS)
SPLITS = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Grey images whose level is the number of the row in all."""
    return write(tmp_path_factory.mktemp("files"))


def write(folder, lengths=LENGTHS, **spoiled):
    folder.mkdir(exist_ok=True)
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "count": datasets.Value("int32"),
        "name": datasets.Value("string"),
        "place": datasets.Sequence(datasets.Value("float32")),
    }
    first = 0
    for shard, length in enumerate(lengths):
        rows = range(first, first + length)
        columns = {
            "image": [spoiled.get(f"row_{i}", Image.new("RGB", (12, 12), (i, i, i))) for i in rows],
            "label": [i % 3 for i in rows],
            "count": [i % 5 for i in rows],
            "name": [str(i) for i in rows],
            "place": [[float(i), 1.0 - i] for i in rows],
        }
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        made.to_parquet(folder / f"train-{shard:05d}.parquet")
        first += length
    return folder


def open_files(files, **options):
    return load_images(**{"dataset_name": files, "streaming": True, "resolution": 12, "shuffle_buffer": 32, **options})


def numbered(dataset, count, split=(8, 1, 1), num_workers=0, **options):
    """{number: level} of the first `count` steps, over all processes."""
    batch_size, world_size, micro_steps = split
    found = {}
    for rank in range(world_size):
        loader = make_loader(
            dataset, batch_size=batch_size, seed=1, rank=rank, world_size=world_size, micro_steps=micro_steps,
            num_workers=num_workers, **options,
        )  # fmt: skip
        for batch in itertools.islice(loader, count * micro_steps):
            found.update(zip(batch["number"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
    return found


def test_batches(files):
    dataset = open_files(
        files, label_column="label", condition_columns=["count", "place"],
        condition_statistics={"mean": [2, 0, 0], "std": [1, 10, 10]},
    )  # fmt: skip
    assert dataset.id2label == {0: "a", 1: "b", 2: "c"} and not dataset.has_length and dataset.num_shards == 8
    assert dataset.condition_columns["names"] == ["count", "place[0]", "place[1]"]
    batch = next(iter(make_loader(dataset, batch_size=4, seed=1, start=8)))
    rows = batch["image"][:, 0, 0, 0].tolist()
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 12, 12)
    assert batch["label"].tolist() == [i % 3 for i in rows] and batch["number"].tolist() == [8, 9, 10, 11]
    expected = torch.tensor([[i % 5 - 2, i / 10, (1 - i) / 10] for i in rows])
    assert batch["mapping_cond"].dtype == torch.float32 and torch.allclose(batch["mapping_cond"], expected)
    starts = np.cumsum([0, *LENGTHS])
    shard, place = batch["index"] // streaming.INDICES_OF_A_SHARD, batch["index"] % streaming.INDICES_OF_A_SHARD
    assert [int(starts[s] + p) for s, p in zip(shard, place, strict=True)] == rows


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_order_does_not_depend_on_who_shares_it(files, split):
    dataset = open_files(files)
    one = numbered(dataset, 12)
    assert numbered(dataset, 12, split) == one
    assert sorted(one) == list(range(96))


@pytest.mark.parametrize("known", ["nothing", "lengths", "nonsense"])
@pytest.mark.parametrize("seen", [8, 24, 56, 320, 1600])
def test_resume(files, tmp_path, seen, known):
    dataset = open_files(files, cache_dir=tmp_path / "first")
    whole = numbered(dataset, seen // 8 + 6)
    expected = {number: level for number, level in whole.items() if number >= seen}
    other = tmp_path / ("first" if known == "lengths" else "other")
    dataset = open_files(files, cache_dir=other)
    if known == "nonsense":
        other.mkdir(exist_ok=True)
        streaming._Shards(dataset, 1)
        (other / f"{next((tmp_path / 'first').glob('stream-*')).name}").write_text('{"lengths": [[99, 1]]}')
    assert numbered(dataset, 6, start=seen) == expected
    assert numbered(dataset, 6, (2, 2, 2), start=seen) == expected


def test_skipping_reads_no_shard_whose_length_is_known(files, monkeypatch):
    dataset = open_files(files)
    numbered(dataset, 200)
    dataset, read = open_files(files), []
    rows = streaming._Shards.rows
    monkeypatch.setattr(
        streaming._Shards, "rows", lambda self, shard, skip: read.append(skip) or rows(self, shard, skip)
    )
    next(iter(make_loader(dataset, batch_size=8, seed=1, start=1600)))
    # Each of 8 lanes reads a block of 4, and the next: shards of 3 to 9 rows.
    assert len(read) <= 8 * 5


def test_workers_change_nothing(files):
    dataset = open_files(files)
    assert numbered(dataset, 10, (4, 2, 1), num_workers=2) == numbered(dataset, 10, (4, 2, 1))


def test_all_images_come_equally_often(files):
    found = Counter(numbered(open_files(files), 40 * TOTAL // 8).values())
    assert sorted(found) == list(range(TOTAL))
    # Each of 8 lanes may be a shard ahead of or behind the others.
    assert max(found.values()) - min(found.values()) <= 12


def test_the_order_is_shuffled(files):
    levels = list(numbered(open_files(files, shuffle_buffer=400), 6).values())
    first, second = levels[:TOTAL], levels[TOTAL:]
    assert first != sorted(first) and first[: len(second)] != second
    other = [
        batch["image"][:, 0, 0, 0].tolist()
        for batch in itertools.islice(make_loader(open_files(files), batch_size=8, seed=2), 6)
    ]
    assert sum(other, []) != levels[:48]


def test_crops_are_of_the_number(tmp_path):
    wide = Image.fromarray(np.arange(48, dtype=np.uint8)[None].repeat(12, 0))
    folder = write(tmp_path / "wide", [4, 4], **{f"row_{i}": wide for i in range(8)})
    dataset = open_files(folder)
    whole, resumed = numbered(dataset, 6), numbered(dataset, 2, (2, 2, 2), start=32)
    assert resumed == {number: whole[number] for number in resumed} and len(set(whole.values())) > 10
    assert set(numbered(open_files(folder, center_crop=True), 2).values()) == {18}


def test_lanes():
    assert [streaming.number_of_lanes(1000, w) for w in (1, 2, 3, 4, 6, 8, 16, 24, 48)] == [48] * 9
    assert [streaming.number_of_lanes(1000, w) for w in (5, 7, 32, 64, 1000)] == [5, 7, 32, 64, 1000]
    assert [streaming.number_of_lanes(8, w) for w in (1, 2, 4, 8)] == [8] * 4
    assert streaming.number_of_lanes(8, 3) == 6 and streaming.number_of_lanes(1, 1) == 1
    with pytest.raises(ValueError, match="8 shards .* can't be shared by 9 processes"):
        streaming.number_of_lanes(8, 9)


def test_what_a_run_must_keep_is_in_its_name(files):
    dataset = open_files(files)
    orders = {
        dataset.batch_sampler(batch_size, seed=1, world_size=world_size, micro_steps=micro_steps).fingerprint
        for batch_size, world_size, micro_steps in SPLITS
    }
    assert len(orders) == 1
    other = open_files(files, shuffle_buffer=64).batch_sampler(8, seed=1).fingerprint
    assert other not in orders and dataset.batch_sampler(8, seed=1, world_size=3).fingerprint not in orders
    assert open_files(files).identity == dataset.identity != open_files(files, label_column="label").identity


def test_row_groups_are_shards(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (12, 12), (i, i, i)) for i in range(20)]})
    rows.to_parquet(tmp_path / "one.parquet", batch_size=5)
    dataset = open_files(tmp_path)
    assert dataset.num_shards == 4
    assert len(set(numbered(dataset, 5, (2, 4, 1)).values())) > 15


def test_labels(files):
    with pytest.raises(ValueError, match="holds string, which can't be numbered before the last row"):
        open_files(files, label_column="name")
    with pytest.raises(ValueError, match="holds integers; say of how many classes with num_classes"):
        open_files(files, label_column="count")
    assert open_files(files, label_column="count", num_classes=5).id2label == {i: str(i) for i in range(5)}
    with pytest.raises(ValueError, match="num_classes=4, but 'label' of .* has 3 classes"):
        open_files(files, label_column="label", num_classes=4)
    dataset = open_files(files, label_column="count", num_classes=3)
    with pytest.raises(ValueError, match="label_column='count' of .* holds [34], which is none of the classes 0 to 2"):
        numbered(dataset, 5)


def test_bad_streams(files, tmp_path):
    with pytest.raises(ValueError, match="need condition_statistics"):
        open_files(files, condition_columns=["count"])
    with pytest.raises(ValueError, match=r"an entry for each of \['place\[0\]', 'place\[1\]'\]"):
        open_files(files, condition_columns=["place"], condition_statistics={"mean": [0], "std": [1]})
    with pytest.raises(ValueError, match="image_column='photo' is not in .*; its columns: "):
        open_files(files, image_column="photo")
    with pytest.raises(ValueError, match="streaming reads a dataset_name"):
        load_images(train_data_dir=files, streaming=True, resolution=12)
    with pytest.raises(ValueError, match="in_channels=2"):
        open_files(files, in_channels=2)
    with pytest.raises(ValueError, match="shuffle_buffer=0"):
        open_files(files, shuffle_buffer=0)
    datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="was saved by save_to_disk"):
        open_files(tmp_path / "saved")
    broken = write(tmp_path / "broken", [3], row_0={"bytes": b"no image", "path": None})
    with pytest.raises(ValueError, match="the first image of .* cannot be read"):
        open_files(broken)


def test_unreadable_images_are_replaced_and_counted(tmp_path):
    broken = {"bytes": b"no image", "path": None}
    dataset = open_files(write(tmp_path / "one", LENGTHS, row_9=broken), label_column="label")
    loader = make_loader(dataset, batch_size=8, seed=1)
    with pytest.warns(UserWarning, match=r"replaced by others: row 4 of shard 1 \(UnidentifiedImageError"):
        for batch in itertools.islice(loader, 6):
            levels = batch["image"][:, 0, 0, 0].tolist()
            assert 9 not in levels and batch["label"].tolist() == [level % 3 for level in levels]
            assert len(batch["number"].unique()) == 8
    with pytest.warns(UserWarning), pytest.raises(OSError, match=r"of 2\d\d images .* at most 1% may"):
        for _ in itertools.islice(loader, 100):
            pass


def test_no_files_are_left_behind(files, tmp_path):
    numbered(open_files(files), 20)
    assert [path.name.partition("-")[0] for path in manifests(tmp_path)] == ["stream"]


def test_max_unreadable(tmp_path):
    broken = {"bytes": b"no image", "path": None}
    files = write(tmp_path / "two", [24], row_9=broken, row_17=broken)
    for allowed in (2, 0.2):
        with pytest.warns(UserWarning, match="replaced by others"):
            numbered(open_files(files, max_unreadable=allowed), 3)
    with pytest.raises(OSError, match="1 of 8 images .* cannot be read; at most 0% may"):
        numbered(open_files(files, max_unreadable=0), 3)
    with pytest.warns(UserWarning), pytest.raises(OSError, match="2 of .* cannot be read; at most 1 may"):
        numbered(open_files(files, max_unreadable=1), 3)
