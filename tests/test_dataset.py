"""What a run must keep of its images, their cache, and its loader."""

import itertools
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from data_files import FACES, folder_of, noise_image, saved_rows, spoil

from diffusers_hdit.data import Buckets, image_cache, load_images, make_loader
from diffusers_hdit.data.sampler import Item


pytestmark = pytest.mark.usefixtures("own_cache")


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
        lambda: noise_image(7, (13, 12)).save(moved / "y" / "007.png"),
    ):
        change()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_images(**{**options, "train_data_dir": moved}, cache_dir=tmp_path / "another").identity
        assert found != first
    (moved / "y" / "007.png").unlink()
    noise_image(7).save(moved / "y" / "007.png")
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
        saved_rows(tmp_path, {"n": [1, 2, 3], "image": [noise_image(i, (13, 12)) for i in range(3)]}, name="other"),
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
    """22 images of many shapes in two classes."""
    shapes = [(40, 20), (20, 40), (30, 30), (33, 24), (70, 30)]
    for i in range(22):
        path = tmp_path / "mixed" / "xy"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, shapes[i % 5]).save(path)
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
    noise_image(size=(30, 12)).save(folder / "a.png")
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


def test_fingerprint_reads_no_image(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    options = {"train_data_dir": folder, "resolution": 12}
    dataset = load_images(**options)
    spoil(folder / "a.png")
    again = load_images(**options, center_crop=True)
    assert again.fingerprint == dataset.fingerprint, "the file's name, size and time are the same"
    os.utime(folder / "a.png", ns=(0, 0))
    noise_image(0).save(folder / "a.png")
    changed = load_images(**options)
    assert changed.identity == dataset.identity and changed.fingerprint != dataset.fingerprint
    path = saved_rows(tmp_path, {})
    assert (
        load_images(dataset_name=path, resolution=12).fingerprint
        == load_images(dataset_name=path, resolution=8).fingerprint
    )
