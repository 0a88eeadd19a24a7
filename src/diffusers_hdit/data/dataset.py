"""Turn "my images" into batches of tensors, endless and reproducible to the bit: the data part of a training script.

    dataset = load_images(train_data_dir="flowers", label_column="label", resolution=64)
    loader = make_loader(dataset, batch_size=32, seed=0, start=images_already_seen, num_workers=4)
    for batch in loader:
        images, labels = to_float(batch["image"]), batch["label"]          # (32, 3, 64, 64) in [-1, 1], (32,)

A batch is a dict: "image" (B, C, H, W) in uint8, or uint16 or float32 (see [`to_float`]); "label" (B,) int64, if there
are classes; "mapping_cond" (B, D) float32, normalised, if there are condition columns; "number" (B,) int64, the number of
the image in the run, see `sampler.py`; "index" (B,) int64, which image of the data set it is.
"""

import hashlib
import os
import warnings

import numpy as np
import torch

from .annotations import (
    check_statistics,
    compute_statistics,
    count_classes,
    describe_classes,
    normalise,
    read_conditions,
)
from .bucketing import Buckets, assign
from .folder_layout import listed
from .image_cache import make_cache
from .loader import make_loader
from .sampler import BucketBatchSampler, Item, ResumableBatchSampler, ShuffledBatchSampler
from .sources import HuggingFaceDataset, ImageFolder, ImageGrid, ImageSource
from .streaming import StreamedImages, open_stream
from .transforms import (
    CONVERT,
    DTYPES,
    MODES,
    Decoded,
    array_size,
    channel_layout,
    cover_size,
    crop_offset,
    dtype_for,
    locate_channels,
    prepare,
    scale,
    to_channels,
    to_float,
)  # fmt: skip
from .validation import check_images


__all__ = ["Buckets", "ImageDataset", "StreamedImages", "load_images", "make_loader", "to_float"]

# An image that covers its size with this many times its pixels, or more, is decoded anew for each crop.
LARGEST_CACHED = 4


def load_images(
    *,
    train_data_dir: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    source: ImageSource | None = None,
    cache_dir: str | os.PathLike | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    class_folder_depth: int | None = None,
    condition_columns: list[str] | None = None,
    condition_statistics: dict | None = None,
    num_classes: int | None = None,
    resolution: int | tuple[int, int],
    in_channels: int = 3,
    center_crop: bool = False,
    streaming: bool = False,
    shuffle_buffer: int = 2048,
    buckets: Buckets | None = None,
    cache_images: bool | str = "auto",
    max_unreadable: float = 0.01,
) -> "ImageDataset | StreamedImages":
    """
    Open a source of images, and decode every image in it once to check it (but for streams).

    Args:
        train_data_dir: a folder of images, searched recursively; or a `.png` file with a `.json` file beside it: square
            cells in row order, and a list with one object (`{"label": ...}`) for each cell.
        dataset_name: a Hugging Face dataset: a name on the Hub, or a local path (also of `Dataset.save_to_disk`).
        dataset_config_name, image_column: what to take from `dataset_name`.
        source: an [`ImageSource`] of your own, in place of these.
        cache_dir: where the result of the check is kept, and given to `datasets.load_dataset`; None: their defaults
            (here `$XDG_CACHE_HOME/diffusers_hdit`, or `~/.cache/diffusers_hdit`).
        split: of a Hugging Face dataset, or of a folder with sub-folders such as `train` and `test`; "all" takes all
            images of a folder.
        label_column: None gives images without labels. Of a folder, a column of the `metadata.csv` or
            `metadata.jsonl` files in it, which name each image relative to themselves in `file_name`; where they have
            none of that name, and it is "label", or where there are no such files, the sub-folders in sorted order are
            the classes. Otherwise the column (of a grid the key) of the labels. ClassLabels and integers from 0 are
            class ids; texts, and all that a `.csv` file says, are numbered in sorted order.
        class_folder_depth: which sub-folders are the classes: 1 for the outermost (below that of the split), 2 for the
            next; -1 for the one that an image lies in. None: the innermost whose names differ.
        condition_columns: names of columns (of a folder, in its metadata files) of numbers, or of vectors of one
            length, which make up the "mapping_cond" of the batches. They are normalised.
        condition_statistics: {"mean": [...], "std": [...]} to normalise them with, in place of those of these images.
        num_classes: the number of classes of a stream whose labels are integers.
        resolution: height and width in pixels, an int or (height, width).
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or what the arrays have.
        center_crop: crop in the middle, not at a random place.
        streaming: read the dataset as it comes and keep nothing of it, see `streaming.py`.
        shuffle_buffer: how many images of a stream are shuffled at a time. Up to twice as many, encoded, are in memory
            (shared by the processes).
        buckets: [`Buckets`], to give each image the size of about as many pixels as `resolution` that suits its shape.
        cache_images: keep decoded images in memory, scaled but not yet cropped. "auto": if they fit in a quarter of
            the free memory.
        max_unreadable: leave out unreadable images, with a warning that names them, up to this share (below 1) or
            number (from 1) of them; 0 refuses any.

    Where several processes start together, let one go first (`accelerator.main_process_first()`): the others use the
    result of its check.

    Raises:
        ValueError: arguments, columns or labels that don't fit, no images, or too many of them unreadable.
        FileNotFoundError: `train_data_dir` does not exist.
        ImportError: `dataset_name` without the `datasets` package.
    """
    given = [name for name in (train_data_dir, dataset_name, source) if name is not None]
    if len(given) != 1:
        raise ValueError(
            f"give either train_data_dir or dataset_name (or a source); got {train_data_dir!r}, {dataset_name!r} and "
            f"{source!r}."
        )
    resolution = _pair(resolution)
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f"in_channels={in_channels!r}: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels.")
    if cache_images not in (True, False, "auto"):
        raise ValueError(f"cache_images must be True, False or 'auto'; got {cache_images!r}.")
    _check_max_unreadable(max_unreadable)
    condition_columns = _checked_columns(condition_columns, condition_statistics)
    if class_folder_depth is not None:
        _check_class_folder_depth(class_folder_depth, train_data_dir, label_column)
    if streaming:
        if dataset_name is None:
            raise ValueError("streaming reads a dataset_name; a train_data_dir is read as needed anyway.")
        if buckets is not None:
            raise ValueError(
                "buckets need the sizes of all images, which a stream does not tell. Leave out one of them."
            )
        return open_stream(
            dataset_name, dataset_config_name, cache_dir, split, image_column, label_column, condition_columns,
            condition_statistics=condition_statistics, num_classes=num_classes, resolution=resolution,
            in_channels=in_channels, center_crop=center_crop, shuffle_buffer=shuffle_buffer,
            max_unreadable=max_unreadable,
        )  # fmt: skip
    if num_classes is not None:
        raise ValueError(f"num_classes={num_classes} is for streams only: other sources tell their classes.")
    if dataset_name is not None:
        source = HuggingFaceDataset(
            dataset_name, dataset_config_name, cache_dir, split, image_column, label_column, condition_columns
        )
    elif dataset_config_name is not None:
        raise ValueError(f"dataset_config_name={dataset_config_name!r} belongs to dataset_name.")
    elif train_data_dir is not None:
        source = _open_files(train_data_dir, label_column, condition_columns, split, class_folder_depth)
    # Decoding all images can take long: first what can be refused without.
    conditions = None if source.conditions is None else _read_conditions(source, condition_statistics)
    if buckets is not None:
        buckets.sizes(resolution)
    infos = _check_readable(source, cache_dir, max_unreadable)
    return ImageDataset(
        source, infos, resolution, in_channels=in_channels, center_crop=center_crop, conditions=conditions,
        condition_statistics=condition_statistics, buckets=buckets, cache_images=cache_images,
    )  # fmt: skip


class ImageDataset(torch.utils.data.Dataset):
    """
    Images that can be read in any order; `load_images` builds it. It can be pickled, so that workers can have it.

    `dataset[i]` is `{"image": (C, H, W), "label": int, "mapping_cond": (D,)}`, the last two where there are such. An
    image is scaled to cover (H, W), antialiased, and cropped: always in the middle with `center_crop`; else at the place
    of `dataset[i, (y, x)]`, from 0 (top, left) to 1; else at a random one from torch's default generator, which
    DataLoader seeds in each worker. `dataset[Item(...)]` adds "index" and "number".

    Attributes:
        resolution: (H, W); with buckets, their sizes have about as many pixels.
        sizes: (H, W) of each bucket; without buckets, the resolution alone.
        image_sizes: (N, 2) int64, height and width of the images as they are in the files.
        dtype: "uint8", "uint16" or "float32".
        labels, id2label: (N,) int64, and {id: name} of all classes; None without labels.
        class_counts: {name: number of images}, or None without labels.
        conditions, condition_columns: (N, D) float32, and {"names", "mean", "std"} with D entries each; or None.
        skipped: names of the images that could not be read.
        identity: a string that is equal for equal sets of images, labels and conditions, wherever they are. A run
            must be resumed with an equal one.
        fingerprint: a string for caches of what is computed from these images (not of their resolution or crop): it
            also changes when a file is written again. It is found without reading an image.
        has_length: True. A stream's is False, and it has no `len`.
    """

    has_length = True

    def __init__(
        self, source, infos, resolution, in_channels=3, center_crop=False, conditions=None, condition_statistics=None,
        buckets=None, cache_images=False,
    ):  # fmt: skip
        self.source, self.resolution, self.in_channels, self.center_crop = source, resolution, in_channels, center_crop
        self.skipped = [name for name, info in zip(source.names, infos, strict=True) if info is None]
        self.readable = np.asarray([i for i, info in enumerate(infos) if info is not None], np.int64)
        infos = [infos[i] for i in self.readable]
        self.dtype, self.image_sizes = _common_type(source, self.readable, infos, in_channels)
        if buckets is None:
            self.sizes, self.buckets = [resolution], None
        else:
            self.sizes, self.buckets = assign(self.image_sizes, buckets.sizes(resolution), buckets.min_images)
        self._warn_of_small_images()
        self.id2label = source.id2label
        self.labels = None if source.labels is None else np.asarray(source.labels)[self.readable]
        self.class_counts = None if self.labels is None else count_classes(self.labels, self.id2label)
        self.condition_columns = self.conditions = None
        if conditions is not None:
            values, entries = conditions
            values = values[self.readable]
            self.condition_columns = _statistics(values, entries, condition_statistics)
            self.conditions = normalise(values, self.condition_columns)
        self.identity = self._make_identity()
        self.cache = make_cache(self._cached_shapes, self.dtype, cache_images)

    @property
    def fingerprint(self) -> str:
        stamps = (self.identity, self.source.cache_key, self.source.stamps)
        return hashlib.sha256(repr(stamps).encode("utf-8", "surrogatepass")).hexdigest()

    def class_summary(self, limit: int = 20) -> str | None:
        """Return a line with the classes and their numbers of images, for the summary of a run."""
        return self.class_counts and describe_classes(self.class_counts, limit)

    def __len__(self):
        return len(self.readable)

    def __getitem__(self, item):
        item = Item(*item) if isinstance(item, tuple) else Item(item)
        index = range(len(self))[item.index]
        found = {"image": self._image(index, item.crop)}
        if self.labels is not None:
            found["label"] = int(self.labels[index])
        if self.conditions is not None:
            found["mapping_cond"] = torch.from_numpy(self.conditions[index])
        if item.number is not None:
            found.update(number=item.number, index=index)
        return found

    def batch_sampler(self, *args, **options) -> ResumableBatchSampler:
        """Return the sampler of a run on these images; the arguments are those of [`ResumableBatchSampler`]."""
        options["crops"] = not self.center_crop
        if self.buckets is None:
            return ShuffledBatchSampler(len(self), *args, **options)
        return BucketBatchSampler(self.buckets, *args, **options)

    def size_of(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image in a batch."""
        return self.sizes[0 if self.buckets is None else self.buckets[index]]

    def _image(self, index, crop) -> torch.Tensor:
        size, target = tuple(self.image_sizes[index].tolist()), self.size_of(index)
        cover = cover_size(size, target)
        if self.center_crop or cover == target:
            crop = (0.5, 0.5)
        elif crop is None:
            crop = tuple(torch.rand(2).tolist())
        if self.cache is None or not self.cache.holds(index):
            return prepare(self._decode(index, size, target), target, self.in_channels, self.dtype, crop)
        top, left = crop_offset(cover, target, crop)
        whole = self.cache.get(index)
        if whole is None:
            decoded = self._decode(index, size, target)
            window = (top, left, *target) if self.center_crop else (0, 0, *cover)
            whole = scale(to_channels(decoded.pixels, self.in_channels, self.dtype), size, target, window)
            self.cache.put(index, whole)
        if not self.center_crop:
            whole = whole[:, top : top + target[0], left : left + target[1]]
        return torch.from_numpy(whole.copy())

    def _decode(self, index, size, target) -> Decoded:
        i = int(self.readable[index])
        try:
            decoded = locate_channels(self.source.read(i, target), self.in_channels)
            (height, width), found = size, decoded.size
            if tuple(found) != size:
                raise ValueError(f"it has {found[0]}x{found[1]} pixels now, and had {height}x{width} at the start")
        except Exception as error:
            name = self.source.names[i]
            raise OSError(f"{name!r} in {self.source.location} can no longer be read: {error}") from error
        return decoded

    def _cached_shapes(self) -> np.ndarray:
        """Return the shape (C, H, W) that is cached of each image, (N, 3)."""
        shapes = np.empty((len(self), 3), np.int64)
        shapes[:, 0] = self.in_channels
        known = {}  # many images of a large set have one size
        for index, size in enumerate(map(tuple, self.image_sizes.tolist())):
            target = self.size_of(index)
            if (size, target) not in known:
                cover = target if self.center_crop else cover_size(size, target)
                fits = cover[0] * cover[1] <= LARGEST_CACHED * target[0] * target[1]
                known[size, target] = cover if fits else (0, 0)
            shapes[index, 1:] = known[size, target]
        return shapes

    def _make_identity(self) -> str:
        digest = hashlib.sha256(self.source.content())
        for array in (self.readable, self.labels, self.conditions):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        digest.update(repr(self.condition_columns).encode("utf-8", "surrogatepass"))
        digest.update(repr(self.id2label).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _warn_of_small_images(self) -> None:
        targets = np.asarray(self.sizes)[0 if self.buckets is None else self.buckets]
        small = int((self.image_sizes < targets).any(axis=1).sum())
        if small:
            what = "their bucket" if self.buckets is not None else f"{self.resolution[0]}x{self.resolution[1]}"
            warnings.warn(f"{small} of {len(self)} images are smaller than {what} and will be enlarged.")


def _open_files(train_data_dir, label_column, condition_columns, split, class_folder_depth) -> ImageSource:
    path = os.fspath(train_data_dir)
    if not os.path.exists(path):
        raise FileNotFoundError(f"train_data_dir {path!r} does not exist.")
    if os.path.isdir(path):
        return ImageFolder(path, label_column, condition_columns, split, class_folder_depth)
    if split not in ("train", "all") or class_folder_depth is not None:
        raise ValueError(f"split={split!r} and class_folder_depth={class_folder_depth}: {path!r} is not a folder.")
    return ImageGrid(path, label_column, condition_columns)


def _read_conditions(source, given) -> tuple[np.ndarray, list[str]]:
    """Return all values (N, D) and their names; the source's texts are dropped, since workers need not have them."""
    values, entries = read_conditions(source.conditions, source.names, source.location)
    source.conditions = None
    _statistics(values, entries, given)
    return values, entries


def _statistics(values, entries, given) -> dict[str, list]:
    return compute_statistics(values, entries) if given is None else check_statistics(given, entries)


def _check_readable(source, cache_dir, max_unreadable):
    """Return what is known of each image, None for the few that can't be read."""
    infos, errors = check_images(source, cache_dir)
    if len(errors) > max_unreadable * (1 if max_unreadable >= 1 else len(infos)) or len(errors) == len(infos):
        allowed = f"{max_unreadable:.2g}" if max_unreadable >= 1 else f"{max_unreadable:.2%}".replace(".00", "")
        raise ValueError(
            f"{len(errors)} of {len(infos)} images in {source.location} cannot be read; at most {allowed} may. Repair "
            f"or remove them, or raise max_unreadable: {listed(errors, 5)}."
        )
    if errors:
        warnings.warn(f"{len(errors)} of {len(infos)} images cannot be read and are skipped: {listed(errors, 20)}.")
    return infos


def _pair(resolution) -> tuple[int, int]:
    size = tuple(resolution) if isinstance(resolution, (list, tuple)) else (resolution, resolution)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"resolution must be a positive int or (height, width) of such; got {resolution!r}.")
    return size


def _check_max_unreadable(value) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not (0 <= value < 1 or (value >= 1 and value == value // 1)):
        raise ValueError(
            f"max_unreadable must be a share of all images, from 0 to below 1, or a number of images; got {value!r}."
        )


def _check_class_folder_depth(depth, train_data_dir, label_column) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth == 0:
        raise ValueError(f"class_folder_depth must be 1, 2, ... or -1, -2, ...; got {depth!r}.")
    if train_data_dir is None or label_column is None:
        raise ValueError(
            f"class_folder_depth={depth} chooses the classes of a train_data_dir; it needs a label_column, such as "
            "'label'."
        )


def _checked_columns(names, statistics) -> list[str] | None:
    if not names:
        if statistics is not None:
            raise ValueError("condition_statistics need condition_columns, whose statistics they are.")
        return None
    if isinstance(names, str) or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"condition_columns must be a list of different names; got {names!r}.")
    return list(names)


def _common_type(source, readable, infos, channels) -> tuple[str, np.ndarray]:
    """Return the dtype that all images can have, and their sizes (N, 2), height and width."""
    dtypes, sizes = {}, np.empty((len(infos), 2), np.int64)
    for row, (i, (kind, shape)) in enumerate(zip(readable, infos, strict=True)):
        layout = "grey" if kind == "image" else channel_layout(shape, channels)
        if kind == "image" and channels not in MODES:
            raise ValueError(
                f"in_channels={channels}: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels, such as "
                f"{source.names[i]!r}. For {channels}, {CONVERT}."
            )
        if layout is None or (layout == "grey" and kind == "float32" and channels != 1):
            raise ValueError(
                f"in_channels={channels}, but {source.names[i]!r} is an array of shape {shape}; "
                "(height, width, channels), (channels, height, width) or, for one, (height, width) would fit."
            )
        dtypes.setdefault(dtype_for(kind, shape, channels), source.names[i])
        sizes[row] = array_size(shape, layout)
    if "float32" in dtypes and len(dtypes) > 1:
        raise ValueError(
            f"the images in {source.location} have no common range: {dtypes}. Save them in one type: float32 is "
            "[-1, 1], uint8 0..255, uint16 0..65535."
        )
    return max(dtypes, key=DTYPES.index), sizes
