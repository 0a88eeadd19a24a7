"""Where images come from: folders, grids of cells in one image, Hugging Face datasets, and what you add.

To add a data source, write a subclass of [`ImageSource`] and give it to `load_images`:

    class ZipSource(ImageSource):
        def __init__(self, path):
            self.location = repr(path)  # for messages
            self.archive = zipfile.ZipFile(path)
            self.names = sorted(name for name in self.archive.namelist() if name.endswith(".png"))
            self.labels, self.id2label = number_labels([name.split("/")[0] for name in self.names])  # if there are any

        def read(self, index, min_size=None):
            return decode(io.BytesIO(self.archive.read(self.names[index])), min_size)

    dataset = load_images(source=ZipSource("images.zip"), resolution=64)
"""

import io
import json
import os
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from .annotations import number_labels, number_untyped_labels
from .folder_layout import class_folders, listed, take_split
from .metadata import METADATA_FILES, read_metadata
from .transforms import Decoded, decode, decode_array


COMMON_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
# What Pillow recognises but cannot decode by itself, or what are documents, films and tables.
NOT_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
# Files that are expected beside images: a folder with such is not warned of.
SIDE_FILES = (
    "", ".txt", ".caption", ".md", ".rst", ".html", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml",
    ".log", ".py", ".ini", ".db",
)  # fmt: skip
# The name by which Hugging Face's ImageFolder, too, calls the classes that are sub-folders.
FOLDER_LABEL = "label"


class ImageSource:
    """
    Images that can be read in any order. A subclass sets `names` and writes `read`; the rest is optional.

    Attributes:
        names: of the N images, each unique: they are shown in messages.
        location: where the images are, for messages.
        labels, id2label: class ids (N,) int64 and {id: name}, see `annotations.number_labels`; or None.
        conditions: {column: N numbers or vectors}, or None.
        stamps: for each image (bytes, time of change in ns), which change with its content.
        cache_key: a string that names the source in the cache, so that images whose stamps have not changed are not
            decoded again to check them when it is opened the next time. None: they always are.
    """

    names: list[str]
    location = "the source"
    labels = id2label = conditions = cache_key = None

    @property
    def stamps(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self.names)

    def content(self) -> bytes:
        """Return bytes that are equal for equal sets of images, wherever these lie: a run is resumed with equal ones."""
        return repr(self.names).encode("utf-8", "surrogatepass")

    def read(self, index: int, min_size: tuple[int, int] | None = None) -> Decoded:
        """
        Decode an image; errors of any type say that it cannot be read.

        Args:
            index: 0 to N-1.
            min_size: (height, width) that the image will be scaled to cover, see [`transforms.decode`].
        """
        raise NotImplementedError


class ImageFolder(ImageSource):
    """
    Read the image files below a folder, with what its `metadata.csv` or `metadata.jsonl` files say of them.

    Args:
        folder: is searched recursively; links are followed. Hidden files are ignored.
        label_column: a column of the metadata, or "label" for the names of sub-folders, or None.
        condition_columns: columns of the metadata.
        split: which images to take where sub-folders are splits, see [`folder_layout.take_split`].
        class_folder_depth: which sub-folders are the classes, see [`folder_layout.class_folders`].

    Raises:
        ValueError: no images; metadata that cannot be read, or lacks a column or an image.
    """

    stamps = None

    def __init__(self, folder, label_column=None, condition_columns=None, split="train", class_folder_depth=None):
        self.location, self.folder = repr(folder), os.path.abspath(folder)
        self.cache_key = f"folder {os.path.realpath(folder)}"
        found = list(_walk(self.folder))
        extensions = image_extensions()
        paths = [path for path in found if _extension(path[-1]) in extensions]
        expected = extensions.union(SIDE_FILES)
        others = [path for path in found if _extension(path[-1]) not in expected]
        if others:
            warnings.warn(
                f"{len(others)} files in {self.location} are left out, because Pillow decodes no images of their types "
                f"here: {listed(['/'.join(path) for path in others], 5)}. Convert them to PNG if they are images."
            )
        if not paths:
            raise ValueError(
                f"no images in {self.location}: looked for {', '.join(COMMON_EXTENSIONS)} and what else Pillow decodes, "
                "in sub-folders too."
            )
        # Names with "/" on every system: they are shown, stamped and compared.
        all_names = ["/".join(path) for path in paths]
        taken, folders = take_split(paths, split, self.location)
        self.names = [all_names[i] for i in taken]
        self.stamps = [_stamp(self._path(name)) for name in self.names]
        listings = ["/".join(path) for path in found if path[-1].lower() in METADATA_FILES]
        table = {}
        if listings and (label_column is not None or condition_columns):
            table = self._read_table(listings, set(all_names))
        if condition_columns:
            if not listings:
                raise ValueError(
                    f"condition_columns={list(condition_columns)} of a folder come from a metadata.csv or "
                    f"metadata.jsonl in it, with a column file_name; {self.location} has none."
                )
            self.conditions = {name: self._column(table, name, "condition_columns") for name in condition_columns}
        if label_column is not None:
            self.labels, self.id2label = self._read_labels(
                label_column, table, folders, class_folder_depth, bool(listings)
            )

    def _read_labels(self, column, table, folders, class_folder_depth, has_metadata):
        """Return the labels in a column of the metadata, or else the sub-folders, as class ids and {id: name}."""
        known = {key for row in table.values() for key in row} - {"file_name"}
        if class_folder_depth is None:
            if column in known or (has_metadata and column != FOLDER_LABEL):
                labels = self._column(table, column, "label_column")
                return number_untyped_labels(labels, f"{column!r} of {self.location}")
            if known - set(self.conditions or ()):
                warnings.warn(
                    f"the metadata in {self.location} has no column {column!r} (its columns: {sorted(known)}): the "
                    "sub-folders are taken as classes."
                )
        return number_labels(class_folders(folders, class_folder_depth, self.names, self.location))

    def content(self) -> bytes:
        return repr([(name, size) for name, (size, _) in zip(self.names, self.stamps, strict=True)]).encode(
            "utf-8", "surrogatepass"
        )

    def read(self, index, min_size=None) -> Decoded:
        return decode(self._path(self.names[index]), min_size)

    def _path(self, name):
        return os.path.join(self.folder, *name.split("/"))

    def _read_table(self, listings, image_names) -> dict[str, dict]:
        """Return {name of an image: its row in the metadata}."""
        table = {}
        for listing in listings:
            folder = listing.rpartition("/")[0]
            for row in read_metadata(self._path(listing)):
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{listing!r} in {self.location} needs a file_name in every row; got {row}.")
                name = _join(folder, name)
                if name not in image_names:  # written on Windows, perhaps
                    name = _join(name.replace("\\", "/"))
                if name in table:
                    raise ValueError(f"{name!r} stands in two rows of the metadata in {self.location}.")
                table[name] = row
        unknown = sorted(set(table) - image_names)
        if unknown:
            raise ValueError(
                f"the metadata in {self.location} names {len(unknown)} images that are not there: {listed(unknown, 5)}."
            )
        return table

    def _column(self, table, column, flag):
        lacking = [name for name in self.names if column not in table.get(name, {})]
        if lacking:
            known = sorted({key for row in table.values() for key in row} - {"file_name"})
            raise ValueError(
                f"{flag}={column!r}: {len(lacking)} of {len(self.names)} images in {self.location} have no such entry "
                f"in the metadata, such as {listed(lacking, 3)}; its columns: {known}."
            )
        return [table[name][column] for name in self.names]


class ImageGrid(ImageSource):
    """
    Cut one image into square cells, in row order; it stays decoded in memory.

    Args:
        path: of a `.png` file with a `.json` file of the same name beside it: a list with an object for each cell.
        label_column, condition_columns: keys of these objects.

    Raises:
        ValueError: there is no such `.json` file, it lacks a key, or the cells are not square.
    """

    def __init__(self, path, label_column=None, condition_columns=None):
        self.location = repr(path)
        listing = os.path.splitext(path)[0] + ".json"
        if not path.lower().endswith(".png") or not os.path.isfile(listing):
            raise ValueError(f"{self.location} is neither a folder nor a .png sheet with {listing!r} beside it.")
        with open(listing, "rb") as file:
            try:
                entries = json.loads(file.read())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{listing!r} is no JSON: {error}") from error
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{listing!r} must hold a list of objects, one for each cell of {self.location}.")
        wanted = [name for name in (label_column, *(condition_columns or ())) if name is not None]
        for column in wanted:
            lacking = sum(column not in entry for entry in entries)
            if lacking:
                raise ValueError(f"{lacking} entries of {listing!r} lack {column!r}; keys: {sorted(entries[0])}.")
        self.image = decode(path).pixels
        if not isinstance(self.image, Image.Image):
            raise ValueError(f"the sheet {self.location} must have 8 bits a channel.")
        self.cell = cell_size(*self.image.size, len(entries), self.location)
        self.names = [f"cell {i}" for i in range(len(entries))]
        self.labels, self.id2label = number_labels(
            None if label_column is None else [entry[label_column] for entry in entries],
            what=f"{label_column!r} of {self.location}",
        )
        self.conditions = {name: [entry[name] for entry in entries] for name in condition_columns or ()} or None

    def content(self) -> bytes:
        return self.image.tobytes()

    def read(self, index, min_size=None) -> Decoded:
        row, column = divmod(index, self.image.width // self.cell)
        left, top = column * self.cell, row * self.cell
        return Decoded(self.image.crop((left, top, left + self.cell, top + self.cell)), (self.cell, self.cell))


class HuggingFaceDataset(ImageSource):
    """
    Read the rows of a Hugging Face dataset, decoding their images as those of all other sources.

    Args:
        name, config_name, cache_dir, split: as of `datasets.load_dataset`; `name` may also be a folder that
            `Dataset.save_to_disk` wrote.
        image_column: of images (files or bytes), or of arrays.
        label_column: of integers, `ClassLabel`s or texts; or None.
        condition_columns: of numbers or vectors.

    Raises:
        ValueError: a column or split is not there, or the split is empty.
        ImportError: `datasets` is not installed.
    """

    def __init__(self, name, config_name, cache_dir, split, image_column, label_column, condition_columns=None):
        datasets = require_datasets()
        name = os.fspath(name)
        self.location = repr(name)
        if is_saved_to_disk(name):
            rows = _load_saved(name, config_name, split)
        else:
            rows = load_split(name, config_name, split=split, cache_dir=cache_dir)
        rows = rows.with_format(None)
        check_columns(rows.features, self.location, image_column, label_column, condition_columns)
        if not len(rows):
            raise ValueError(f"no images in {self.location}: split {split!r} is empty.")
        self.cache_key = f"dataset {rows._fingerprint} {image_column}"
        self.names = [f"row {i}" for i in range(len(rows))]
        labels = rows[label_column][:] if label_column is not None else None
        class_names = getattr(rows.features.get(label_column), "names", None)
        self.labels, self.id2label = number_labels(labels, class_names, f"{label_column!r} of {self.location}")
        self.conditions = {column: rows[column][:] for column in condition_columns or ()} or None
        # Other columns are dropped: a row read brings them all along.
        self.column = image_column
        rows = rows.select_columns([image_column])
        self.is_array = is_array(rows.features[image_column])
        if not self.is_array:
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows.with_format("arrow")

    def content(self) -> bytes:
        """Describe encoded images by their lengths, which are found without reading them, and files by their names."""
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

    def read(self, index, min_size=None) -> Decoded:
        value = self.rows[index][self.column][0].as_py()
        return decode_value(value, self.rows.features[self.column], min_size)


def require_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('dataset_name needs `datasets`: pip install "diffusers-hdit[train]"') from error
    return datasets


def load_split(name, config_name, split, **options):
    """Call `datasets.load_dataset`; a ValueError lists the splits if this one is not there."""
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, **options)
    except ValueError as error:
        try:
            splits = datasets.get_dataset_split_names(name, config_name)
        except Exception:  # it is something else that is wrong
            raise error from None
        if split.partition("[")[0] in (*splits, "all"):
            raise
        raise ValueError(f"split={split!r} is not in {name!r}; its splits: {sorted(splits)}.") from error


def _load_saved(name, config_name, split):
    import datasets

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


def is_array(feature) -> bool:
    return type(feature).__name__ in ("Array2D", "Array3D")


def check_columns(features, location, image_column, label_column, condition_columns) -> None:
    """Raise a ValueError for a column of a Hugging Face dataset that is not there, or that holds no images."""
    datasets = require_datasets()
    wanted = [("image_column", image_column), ("label_column", label_column)]
    wanted += [("condition_columns", column) for column in condition_columns or ()]
    for flag, column in wanted:
        if column is not None and column not in features:
            raise ValueError(f"{flag}={column!r} is not in {location}; its columns: {list(features)}.")
    feature = features[image_column]
    if isinstance(feature, datasets.Image) or is_array(feature):
        return
    if isinstance(feature, dict):  # as images are stored, but without saying so
        parts = {name: getattr(part, "dtype", None) for name, part in feature.items()}
        if parts.keys() <= {"bytes", "path"} and parts.get("bytes", "binary") in ("binary", "large_binary"):
            return
    if getattr(feature, "dtype", None) not in ("string", "binary", "large_string", "large_binary"):
        raise ValueError(f"image_column={image_column!r} of {location} holds {feature}, not images.")


def decode_value(value, feature, min_size=None) -> Decoded:
    """Decode what a row has of an image: {"bytes", "path"}, or an array, which its feature is the type of."""
    if value is None:
        raise ValueError("the row has no image")
    if is_array(feature):
        return decode_array(np.asarray(value, feature.dtype))
    if value["bytes"] is not None:
        return decode(io.BytesIO(value["bytes"]), min_size)
    if "://" not in value["path"]:
        return decode(value["path"], min_size)
    import fsspec  # comes with datasets, for what is streamed from elsewhere

    with fsspec.open(value["path"], "rb") as file:
        return decode(io.BytesIO(file.read()), min_size)


def image_extensions() -> set[str]:
    """Return the extensions, in lower case, of the files that can be read: .npy, and those of Pillow and its plugins."""
    formats = Image.registered_extensions()
    return {
        *COMMON_EXTENSIONS,
        *(name for name, kind in formats.items() if kind in Image.OPEN and kind not in NOT_IMAGES),
    }


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(folder, parts=(), above=()) -> Iterator[tuple[str, ...]]:
    """Yield the path parts of the files below `folder`, sorted; links are followed, but not in circles."""
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


def _join(*paths: str) -> str:
    """Join paths with "/", and leave out what names no folder."""
    return "/".join(part for part in "/".join(paths).split("/") if part not in ("", "."))


def _stamp(path):
    try:
        stat = os.stat(path)
        return (stat.st_size, stat.st_mtime_ns)
    except OSError:  # a broken link; reading it will say so
        return (-1, -1)


def cell_size(width, height, count, location):
    """
    Return the largest square that divides the image into `count` cells or more, none of the rows being empty.

    No other size leaves every row with an entry, so the answer is unique.
    """
    for columns in range(1, width + 1):
        cell = width // columns
        if width % columns == 0 and height % cell == 0 and columns * (height // cell) >= count:
            if columns * (height // cell - 1) < count:
                return cell
            break
    raise ValueError(f"{location} ({width}x{height}) does not divide into rows of square cells for {count} entries.")
