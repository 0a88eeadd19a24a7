"""Small pictures on disk for the tests of the data modules."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusers_hdit.data.dataset import load_images


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


def saved_rows(tmp_path, columns, features=None, count=3, name="saved"):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), **(features or {})}) if features is not None else None
    rows = {"image": [picture(i) for i in range(count)], **columns}
    path = tmp_path / name
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(path)
    return path


def manifests(tmp_path):
    return sorted((tmp_path / "xdg" / "diffusers_hdit").glob("*"))


def spoil(path):
    """Makes a file unreadable without changing its size or time."""
    stat = path.stat()
    path.write_bytes(b"\0" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
