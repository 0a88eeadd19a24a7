"""Small images on disk for the tests of the data modules."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_hdit.data import load_images


FACES = Path(__file__).parents[1] / "src" / "diffusers_hdit" / "data" / "fluent_faces_64.png"


def noise_image(seed=0, size=(12, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder_of(tmp_path, *names, size=(12, 12)):
    for i, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, size).save(path)
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
    rows = {"image": [noise_image(i) for i in range(count)], **columns}
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


def damaged_png():
    """Whole but for its pixels: the checksum is right, the compressed stream is not."""
    buffer = io.BytesIO()
    noise_image().save(buffer, "PNG")
    content = buffer.getvalue()
    at = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[at - 4 : at])
    body = b"IDAT" + b"\xff" * length
    return content[:at] + body + struct.pack(">I", zlib.crc32(body)) + content[at + 8 + length :]


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
