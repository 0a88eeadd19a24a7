"""Where images come from: folders, sheets of cells, Hugging Face datasets.

A source has `names`; `stamps` that change with the content; `where`, for messages; `identity` for the manifest of the
reading check (None: the check is not worth keeping); `content()`, bytes that are equal for equal sets of images,
wherever they lie; `labels` (N,) and `id2label`, or None; `conditions`, {column: N values}, or None; and
`read(i, enough)`, see [`pixels.decode`].
"""

import csv
import io
import json
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .annotations import number_labels
from .transforms import Decoded, decode


EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
METADATA = ("metadata.csv", "metadata.jsonl")
# The name by which Hugging Face's ImageFolder, too, calls the classes that are sub-folders.
FOLDER_LABEL = "label"


class Folder:
    """Image files below a folder, with what `metadata.csv` or `metadata.jsonl` files say of them."""

    def __init__(self, folder, label_column=None, condition_columns=None):
        self.where, self.folder = repr(folder), os.path.abspath(folder)
        self.identity = f"folder {os.path.realpath(folder)}"
        found = list(_walk(self.folder))
        parts = [p for p in found if p[-1].lower().endswith(EXTENSIONS)]
        if not parts:
            raise ValueError(f"no images in {self.where}: looked for {', '.join(EXTENSIONS)}, in sub-folders too.")
        # Names with "/" on every system: they are shown, stamped and compared.
        self.names = ["/".join(p) for p in parts]
        self.stamps = [_stamp(self._path(name)) for name in self.names]
        self.labels = self.id2label = self.conditions = None
        listings = ["/".join(p) for p in found if p[-1] in METADATA]
        if (label_column is not None or condition_columns) and listings:
            table = self._metadata(listings)
        else:
            table = {}
        if condition_columns:
            if not listings:
                raise ValueError(
                    f"condition_columns={list(condition_columns)} of a folder come from a metadata.csv or "
                    f"metadata.jsonl in it, with a column file_name; {self.where} has none."
                )
            self.conditions = {name: self._column(table, name, "condition_columns") for name in condition_columns}
        if label_column is not None:
            known = {key for row in table.values() for key in row}
            if label_column in known or (listings and label_column != FOLDER_LABEL):
                labels = self._column(table, label_column, "label_column")
                # What a csv says are texts; 10 is not to come before 9.
                if all(isinstance(v, str) and v.isdecimal() for v in labels):
                    labels = [int(v) for v in labels]
                self.labels, self.id2label = number_labels(labels)
            else:
                self.labels, self.id2label = number_labels(self._folder_labels(parts, label_column))

    def content(self) -> bytes:
        return repr([(name, size) for name, (size, _) in zip(self.names, self.stamps, strict=True)]).encode(
            "utf-8", "surrogatepass"
        )

    def read(self, i, enough=None) -> Decoded:
        return decode(self._path(self.names[i]), enough)

    def _path(self, name):
        return os.path.join(self.folder, *name.split("/"))

    def _folder_labels(self, parts, label_column):
        loose = [name for name, p in zip(self.names, parts, strict=True) if len(p) == 1]
        if loose:
            raise ValueError(
                f"label_column={label_column!r} takes the classes from the sub-folders of {self.where}, but "
                f"{len(loose)} of {len(parts)} images lie in none: {listed(loose, 5)}. "
                "Sort them into one folder for each class, list them in a metadata.csv, or leave label_column out."
            )
        return [p[0] for p in parts]

    def _metadata(self, listings) -> dict[str, dict]:
        """{name of an image: its row}."""
        table = {}
        for listing in listings:
            folder = listing.rpartition("/")[0]
            for row in _read_listing(self._path(listing)):
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{listing!r} in {self.where} needs a file_name in every row; got {row}.")
                name = "/".join(part for part in (folder, name.replace(os.sep, "/")) if part)
                name = "/".join(part for part in name.split("/") if part != ".")
                if name in table:
                    raise ValueError(f"{name!r} stands in two rows of the metadata in {self.where}.")
                table[name] = row
        unknown = sorted(set(table) - set(self.names))
        if unknown:
            raise ValueError(
                f"the metadata in {self.where} names {len(unknown)} images that are not there: {listed(unknown, 5)}."
            )
        return table

    def _column(self, table, column, flag):
        lacking = [name for name in self.names if column not in table.get(name, {})]
        if lacking:
            known = sorted({key for row in table.values() for key in row} - {"file_name"})
            raise ValueError(
                f"{flag}={column!r}: {len(lacking)} of {len(self.names)} images in {self.where} have no such entry in "
                f"the metadata, such as {listed(lacking, 3)}; its columns: {known}."
            )
        return [table[name][column] for name in self.names]


class Sheet:
    """Square cells, in row order, of one image that stays decoded; a JSON list beside it has an entry for each."""

    def __init__(self, path, label_column=None, condition_columns=None):
        self.where, self.identity = repr(path), None
        listing = os.path.splitext(path)[0] + ".json"
        if not path.lower().endswith(".png") or not os.path.isfile(listing):
            raise ValueError(f"{self.where} is neither a folder nor a .png sheet with {listing!r} beside it.")
        with open(listing, encoding="utf-8") as file:
            entries = json.load(file)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{listing!r} must hold a list of objects, one for each cell of {self.where}.")
        wanted = [name for name in (label_column, *(condition_columns or ())) if name is not None]
        for column in wanted:
            lacking = sum(column not in entry for entry in entries)
            if lacking:
                raise ValueError(f"{lacking} entries of {listing!r} lack {column!r}; keys: {sorted(entries[0])}.")
        self.sheet = decode(path).pixels
        if not isinstance(self.sheet, Image.Image):
            raise ValueError(f"the sheet {self.where} must have 8 bits a channel.")
        self.cell = cell_size(*self.sheet.size, len(entries), self.where)
        self.names = [f"cell {i}" for i in range(len(entries))]
        self.stamps = [(0, 0)] * len(entries)
        self.labels, self.id2label = number_labels(
            None if label_column is None else [entry[label_column] for entry in entries]
        )
        self.conditions = {name: [entry[name] for entry in entries] for name in condition_columns or ()} or None

    def content(self) -> bytes:
        return self.sheet.tobytes()

    def read(self, i, enough=None) -> Decoded:
        row, column = divmod(i, self.sheet.width // self.cell)
        left, top = column * self.cell, row * self.cell
        return Decoded(self.sheet.crop((left, top, left + self.cell, top + self.cell)), (self.cell, self.cell))


class Rows:
    """Rows of a Hugging Face dataset, whose images are decoded here so that all sources treat them alike."""

    def __init__(self, name, config_name, cache_dir, split, image_column, label_column, condition_columns=None):
        datasets = require_datasets()
        self.where = repr(os.fspath(name))
        rows = _open_rows(os.fspath(name), config_name, cache_dir, split).with_format(None)
        check_columns(rows.features, self.where, image_column, label_column, condition_columns)
        if not len(rows):
            raise ValueError(f"no images in {self.where}: split {split!r} is empty.")
        self.identity = f"dataset {rows._fingerprint} {image_column}"
        self.names = [f"row {i}" for i in range(len(rows))]
        self.stamps = [(0, 0)] * len(rows)
        labels = rows[label_column][:] if label_column is not None else None
        class_names = getattr(rows.features.get(label_column), "names", None)
        self.labels, self.id2label = number_labels(labels, class_names)
        self.conditions = {column: rows[column][:] for column in condition_columns or ()} or None
        # Other columns are dropped: a row read brings them all along.
        self.column = image_column
        rows = rows.select_columns([image_column])
        self.is_array = is_array(rows.features[image_column])
        if not self.is_array:
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows.with_format("arrow")

    def content(self) -> bytes:
        """Of encoded images their lengths, which are read without the images; of files the names."""
        found = []
        if not self.is_array:
            import pyarrow.compute as pc

            for chunk in (chunk for table in self.rows.iter(1000) for chunk in table[self.column].chunks):
                lengths = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
                if None in lengths:
                    paths = pc.struct_field(chunk, "path").to_pylist()
                    lengths = [
                        os.path.basename(path or "") if length is None else length
                        for length, path in zip(lengths, paths, strict=True)
                    ]
                found += lengths
        return repr((str(self.rows.features), len(self.rows), found)).encode("utf-8", "surrogatepass")

    def read(self, i, enough=None) -> Decoded:
        value = self.rows[i][self.column][0]
        if self.is_array:
            value = value.as_py()
            feature = self.rows.features[self.column]
            return decode_value(None if value is None else np.asarray(value, getattr(feature, "dtype", None)), enough)
        return decode_value(value.as_py(), enough)


def require_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('dataset_name needs `datasets`: pip install "diffusers-hdit[train]"') from error
    return datasets


def is_array(feature) -> bool:
    return type(feature).__name__ in ("Array2D", "Array3D")


def check_columns(features, where, image_column, label_column, condition_columns) -> None:
    datasets = require_datasets()
    wanted = [("image_column", image_column), ("label_column", label_column)]
    wanted += [("condition_columns", column) for column in condition_columns or ()]
    for flag, column in wanted:
        if column is not None and column not in features:
            raise ValueError(f"{flag}={column!r} is not in {where}; its columns: {list(features)}.")
    feature = features[image_column]
    if isinstance(feature, datasets.Image) or is_array(feature):
        return
    if getattr(feature, "dtype", None) not in ("string", "binary"):
        raise ValueError(f"image_column={image_column!r} of {where} holds {feature}, not images.")


def decode_value(value, enough=None) -> Decoded:
    """An image as `datasets` has it undecoded, {"bytes", "path"}, or an array."""
    if value is None:
        raise ValueError("the row has no image")
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value)
        buffer.seek(0)
        return decode(buffer, enough)
    if value["bytes"] is not None:
        return decode(io.BytesIO(value["bytes"]), enough)
    if "://" not in value["path"]:
        return decode(value["path"], enough)
    import fsspec  # comes with datasets, for what is streamed from elsewhere

    with fsspec.open(value["path"], "rb") as file:
        return decode(io.BytesIO(file.read()), enough)


def _open_rows(name, config_name, cache_dir, split):
    import datasets

    if not is_saved_to_disk(name):
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    if config_name is not None:
        raise ValueError(f"dataset_config_name={config_name!r}: {name!r} was saved by save_to_disk and has none.")
    saved = datasets.load_from_disk(name)
    # A single dataset may not know which split it was; then it is taken as the default one.
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"split={split!r} is not in {name!r}; its splits: {sorted(splits)}.")
    return splits[split]


def is_saved_to_disk(name) -> bool:
    return any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))


def _walk(folder, parts=(), above=()) -> Iterator[tuple[str, ...]]:
    """Path parts of the files below `folder`, sorted; links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*parts, entry.name), (*above, real))
        else:
            yield (*parts, entry.name)


def _stamp(path):
    try:
        stat = os.stat(path)
        return (stat.st_size, stat.st_mtime_ns)
    except OSError:  # a broken link; reading it will say so
        return (-1, -1)


def _read_listing(path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".csv"):
            for row in csv.DictReader(file):
                row.pop(None, None)  # cells beyond the header's
                yield {key: value for key, value in row.items() if value not in (None, "")}
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path!r}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path!r}, line {number} must be a JSON object; got {line.strip()[:80]!r}.")
            yield {key: value for key, value in row.items() if value is not None}


def cell_size(width, height, count, where):
    """The largest square that divides the sheet into `count` cells or more, none of the rows being empty.

    No other size leaves every row with an entry, so the answer is unique.
    """
    for columns in range(1, width + 1):
        cell = width // columns
        if width % columns == 0 and height % cell == 0 and columns * (height // cell) >= count:
            if columns * (height // cell - 1) < count:
                return cell
            break
    raise ValueError(f"{where} ({width}x{height}) does not divide into rows of square cells for {count} entries.")


def listed(names, limit):
    """The first names, with the errors if `names` is a dict of them, and how many more there are."""
    named = [f"{name!r} ({names[name]})" if isinstance(names, dict) else repr(name) for name in list(names)[:limit]]
    return ", ".join(named) + (f" and {len(names) - limit} more" if len(names) > limit else "")
