"""From "my images" to batches of tensors, endless and reproducible to the bit: the data part of a training script.

    dataset = load_images(train_data_dir="flowers", label_column="label", resolution=64)
    loader = make_loader(dataset, batch_size=32, seed=0, start=images_already_seen, num_workers=4)
    for batch in loader:
        images, labels = to_float(batch["image"]), batch["label"]          # (32, 3, 64, 64) in [-1, 1], (32,)

A batch is a dict: "image" (B, C, H, W) in uint8, or uint16 or float32 (see [`to_float`]); "label" (B,) int64, if there
are classes; "mapping_cond" (B, D) float32, normalised, if there are condition columns; "number" (B,) int64, the number of
the image in the run, see `order.py`; "index" (B,) int64, which image of the data set it is.

`make_loader` already divides the images among processes: don't pass the loader through `accelerator.prepare`.
"""

import atexit
import functools
import hashlib
import os
import signal
import warnings

import numpy as np
import torch

from . import annotations as columns
from . import transforms as pixels
from .bucketing import Buckets, assign
from .image_cache import ImageCache, check_wanted, make_cache
from .sampler import BucketedBatches, Item, NumberedBatches, ShuffledBatches, mixed_seed
from .sources import Folder, Rows, Sheet, listed
from .streaming import StreamedImages, open_stream
from .transforms import MODES, to_float
from .validation import check


__all__ = [
    "Buckets", "ImageDataset", "Item", "ShuffledBatches", "BucketedBatches", "StreamedImages", "load_images",
    "make_loader", "mixed_seed", "to_float",
]  # fmt: skip

MAX_UNREADABLE = 0.01
# An image that covers its size with this many times its pixels, or more, is decoded anew for each crop.
LARGEST_CACHED = 4


def load_images(
    *,
    train_data_dir=None,
    dataset_name=None,
    dataset_config_name=None,
    cache_dir=None,
    split="train",
    image_column="image",
    label_column=None,
    condition_columns=None,
    condition_statistics=None,
    num_classes=None,
    resolution,
    in_channels=3,
    center_crop=False,
    streaming=False,
    shuffle_buffer=2048,
    buckets=None,
    cache_images="auto",
) -> "ImageDataset | StreamedImages":
    """Opens a source of images, having decoded every image in it once (but for streams).

    Args:
        train_data_dir: a folder of images, searched recursively; or a `.png` sheet with a `.json` beside it: square
            cells in row order, and a list with one object (`{"label": ...}`) a cell.
        dataset_name: a Hugging Face dataset: a name on the Hub, or a local path (also of `Dataset.save_to_disk`).
        dataset_config_name, split, image_column: what to take from `dataset_name`.
        cache_dir: where the verdict of the check is kept, and given to `datasets.load_dataset`; None: their defaults
            (here `$XDG_CACHE_HOME/diffusers_hdit`, or `~/.cache/diffusers_hdit`).
        label_column: None gives images without labels. Of a folder, a column of the `metadata.csv` or
            `metadata.jsonl` files in it, which name each image relative to themselves in `file_name`; where they have
            none of that name, and it is "label", or where there are no such files, the first-level sub-folders in
            sorted order are the classes. Otherwise the column (in a sheet the key) of the labels: ClassLabels and
            integers from 0 keep their ids, strings are numbered in sorted order.
        condition_columns: names of columns (of a folder, in its metadata files) of numbers, or of vectors of one
            length, which make up the "mapping_cond" of the batches. They are normalised.
        condition_statistics: {"mean": [...], "std": [...]} to normalise them with, in place of those of these images.
        num_classes: only for integer labels of a stream, which nothing else says how many they are of.
        resolution: an int, or (height, width).
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or what the arrays have.
        center_crop: crop in the middle, not at a drawn place.
        streaming: read the dataset as it comes and keep nothing of it, see `stream.py`.
        shuffle_buffer: of a stream, how many images are shuffled at a time. Up to twice as many, encoded, are in memory
            (shared by the processes).
        buckets: [`Buckets`], to give each image the size of about as many pixels as `resolution` that suits its shape.
        cache_images: keep decoded images in memory, scaled but not yet cropped. "auto": if they fit in a quarter of
            what is free.

    Unreadable images are named in a warning and left out; images smaller than `resolution` are counted in one. Where
    several processes start together, let one go first (`accelerator.main_process_first()`): the others reuse its check.

    Raises:
        ValueError: arguments, columns or labels that don't fit, no images, or more than 1 % of them unreadable.
        FileNotFoundError: `train_data_dir` does not exist.
        ImportError: `dataset_name` without the `datasets` package.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError(f"give either train_data_dir or dataset_name; got {train_data_dir!r} and {dataset_name!r}.")
    resolution = _pair(resolution)
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f"in_channels={in_channels!r}: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels.")
    condition_columns = _checked_columns(condition_columns, condition_statistics)
    check_wanted(cache_images)
    if streaming:
        if train_data_dir is not None:
            raise ValueError("streaming reads a dataset_name; a train_data_dir is read as needed anyway.")
        if buckets is not None:
            raise ValueError(
                "buckets need the sizes of all images, which a stream does not tell. Leave out one of them."
            )
        return open_stream(
            dataset_name, dataset_config_name, cache_dir, split, image_column, label_column, condition_columns,
            condition_statistics=condition_statistics, num_classes=num_classes, resolution=resolution,
            in_channels=in_channels, center_crop=center_crop, shuffle_buffer=shuffle_buffer,
        )  # fmt: skip
    if num_classes is not None:
        raise ValueError(f"num_classes={num_classes} is for streams only: other sources tell their classes.")
    source = _open_source(
        train_data_dir, dataset_name, dataset_config_name, cache_dir, split, image_column, label_column,
        condition_columns,
    )  # fmt: skip
    # Decoding all images can take long: first what can be refused without.
    conditions = None if source.conditions is None else _read_conditions(source, condition_statistics)
    if buckets is not None:
        buckets.sizes(resolution)
    facts = _checked_facts(source, cache_dir)
    return ImageDataset(
        source, facts, resolution, in_channels=in_channels, center_crop=center_crop, conditions=conditions,
        condition_statistics=condition_statistics, buckets=buckets, cache_images=cache_images,
    )  # fmt: skip


class ImageDataset(torch.utils.data.Dataset):
    """Images that can be read in any order; `load_images` builds it. Picklable, so that workers can have it.

    `dataset[i]` is `{"image": (C, H, W), "label": int, "mapping_cond": (D,)}`, the last two where there are such. An
    image is scaled to cover (H, W), antialiased, and cropped: always in the middle with `center_crop`; else at the place
    that `dataset[i, (y, x)]` names, from 0 (top, left) to 1; else at one drawn from torch's default generator, which
    DataLoader seeds in each worker. `dataset[Item(...)]` adds "index" and "number".

    Attributes:
        resolution: (H, W); with buckets, what their sizes have about as many pixels as.
        sizes: (H, W) of each bucket; without buckets, the resolution alone.
        dtype: "uint8", "uint16" or "float32".
        id2label: {id: name} for every class there is, or None without labels.
        condition_columns: {"names", "mean", "std"}, an entry for each number of "mapping_cond", or None.
        skipped: names of the images that could not be read.
        identity: a string that is equal for equal sets of images, labels and conditions, wherever they lie.
        has_length: True. A stream's is False, and it has no `len`.
    """

    has_length = True

    def __init__(
        self, source, facts, resolution, in_channels=3, center_crop=False, conditions=None, condition_statistics=None,
        buckets=None, cache_images=False,
    ):  # fmt: skip
        self.source, self.resolution, self.in_channels, self.center_crop = source, resolution, in_channels, center_crop
        self.skipped = [name for name, fact in zip(source.names, facts, strict=True) if fact is None]
        self.kept = np.asarray([i for i, fact in enumerate(facts) if fact is not None], np.int64)
        facts = [facts[i] for i in self.kept]
        self.dtype, self.image_sizes = _common_form(source, self.kept, facts, in_channels)
        if buckets is None:
            self.sizes, self.buckets = [resolution], None
        else:
            self.sizes, self.buckets = assign(self.image_sizes, buckets.sizes(resolution), buckets.min_images)
        self._warn_of_small_images()
        self.id2label = source.id2label
        self.labels = None if source.labels is None else source.labels[self.kept]
        self.condition_columns = self.conditions = None
        if conditions is not None:
            values, entries = conditions
            self.condition_columns = _statistics(values[self.kept], entries, condition_statistics)
            self.conditions = columns.normalised(values[self.kept], self.condition_columns)
        self.identity = self._make_identity()
        self.cache = make_cache(self._cached_shapes, self.dtype, cache_images)

    def __len__(self):
        return len(self.kept)

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

    def batches(self, batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0) -> NumberedBatches:
        """The order of these images in a run, see `order.py`."""
        arguments = (batch_size, seed, rank, world_size, micro_steps, start, not self.center_crop)
        if self.buckets is None:
            return ShuffledBatches(len(self), *arguments)
        return BucketedBatches(self.buckets, *arguments)

    def size_of(self, index: int) -> tuple[int, int]:
        """(H, W) that an image is brought to."""
        return self.sizes[0 if self.buckets is None else self.buckets[index]]

    def _image(self, index, crop) -> torch.Tensor:
        size, target = tuple(self.image_sizes[index].tolist()), self.size_of(index)
        cover = pixels.cover_size(size, target)
        if self.center_crop or cover == target:
            crop = (0.5, 0.5)
        elif crop is None:
            crop = tuple(torch.rand(2).tolist())
        if self.cache is None or not self.cache.holds(index):
            return pixels.prepare(self._decoded(index, size, target), target, self.in_channels, self.dtype, crop)
        top, left = pixels.crop_place(cover, target, crop)
        whole = self.cache.get(index)
        if whole is None:
            decoded = self._decoded(index, size, target)
            window = (top, left, *target) if self.center_crop else (0, 0, *cover)
            channels = pixels.to_channels(decoded.pixels, self.in_channels, self.dtype)
            whole = pixels.scale(channels, size, target, window)
            self.cache.put(index, whole)
        if not self.center_crop:
            whole = whole[:, top : top + target[0], left : left + target[1]]
        return torch.from_numpy(whole.copy())

    def _decoded(self, index, size, target) -> pixels.Decoded:
        i = int(self.kept[index])
        try:
            decoded = self.source.read(i, target)
            found = _size_of(decoded, self.in_channels)
            decoded = decoded._replace(size=found)  # an array's channels may come first
            if found != size:
                raise ValueError(f"it has {found[0]}x{found[1]} pixels now, and had {size[0]}x{size[1]} at the start")
        except Exception as error:
            raise OSError(f"{self.source.names[i]!r} in {self.source.where} can no longer be read: {error}") from error
        return decoded

    def _cached_shapes(self) -> np.ndarray:
        """(N, 3): what is kept of each image."""
        shapes = np.empty((len(self), 3), np.int64)
        shapes[:, 0] = self.in_channels
        known = {}  # many images of a large set have one size
        for index, size in enumerate(map(tuple, self.image_sizes.tolist())):
            target = self.size_of(index)
            if (size, target) not in known:
                cover = target if self.center_crop else pixels.cover_size(size, target)
                fits = cover[0] * cover[1] <= LARGEST_CACHED * target[0] * target[1]
                known[size, target] = cover if fits else (0, 0)
            shapes[index, 1:] = known[size, target]
        return shapes

    def _make_identity(self) -> str:
        digest = hashlib.sha256(self.source.content())
        for array in (self.kept, self.labels, self.conditions):
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


def make_loader(
    dataset,
    *,
    batch_size,
    seed,
    rank=0,
    world_size=1,
    micro_steps=1,
    start=0,
    num_workers=0,
    pin_memory=False,
    prefetch_factor=4,
) -> torch.utils.data.DataLoader:
    """
    An endless DataLoader of this process's share: a batch for each micro-step, in the order of `order.py`.

    Its workers live as long as its one iterator; torch gives each of them one thread. `loader.batch_sampler.order` is a
    string that must be equal when the run is resumed.

    Args:
        dataset: from [`load_images`].
        batch_size: images a micro-step in this process.
        start: images the run has seen already, over all processes.
        num_workers: 0 decodes in this process, when a batch is asked for.
        prefetch_factor: batches that each worker prepares ahead.

    Raises:
        ValueError: fewer images than a step takes, a count or rank out of range, or, with buckets, a `start` within a
            global batch.
    """
    workers = {}
    if num_workers:
        workers = {"persistent_workers": True, "prefetch_factor": prefetch_factor}
        workers["worker_init_fn"] = _ignore_signals
        _end_workers_at_exit()
        if (
            isinstance(getattr(dataset, "cache", None), ImageCache)
            and "fork" in torch.multiprocessing.get_all_start_methods()
        ):
            workers["multiprocessing_context"] = "fork"  # no others share the cache
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=dataset.batches(batch_size, seed, rank, world_size, micro_steps, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        **workers,
    )


def _ignore_signals(worker: int) -> None:
    """A Ctrl-C, or a scheduler's SIGTERM, goes to all processes; the training process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache
def _end_workers_at_exit() -> None:
    atexit.register(_end_workers)


def _end_workers() -> None:
    """After an error, whose traceback keeps the loader, Python sends its children a SIGTERM, which they ignore, and waits."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report that they were killed
    for child in torch.multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _open_source(
    train_data_dir, dataset_name, dataset_config_name, cache_dir, split, image_column, label_column, condition_columns
):
    if train_data_dir is None:
        return Rows(dataset_name, dataset_config_name, cache_dir, split, image_column, label_column, condition_columns)
    if dataset_config_name is not None:
        raise ValueError(f"dataset_config_name={dataset_config_name!r} belongs to dataset_name, not train_data_dir.")
    if not os.path.exists(train_data_dir):
        raise FileNotFoundError(f"train_data_dir {os.fspath(train_data_dir)!r} does not exist.")
    kind = Folder if os.path.isdir(train_data_dir) else Sheet
    return kind(os.fspath(train_data_dir), label_column, condition_columns)


def _read_conditions(source, given) -> tuple[np.ndarray, list[str]]:
    """All values (N, D) and their names; the texts that they were are dropped, since workers need not have them."""
    values, entries = columns.read_conditions(source.conditions, source.names)
    source.conditions = None
    _statistics(values, entries, given)
    return values, entries


def _statistics(values, entries, given) -> dict[str, list]:
    return columns.statistics(values, entries) if given is None else columns.check_statistics(given, entries)


def _checked_facts(source, cache_dir):
    """What is known of each image, None of the few that can't be read."""
    facts, errors = check(source, cache_dir)
    if len(errors) > MAX_UNREADABLE * len(facts):
        raise ValueError(
            f"{len(errors)} of {len(facts)} images in {source.where} cannot be read; at most {MAX_UNREADABLE:.0%} may. "
            f"Repair or remove them: {listed(errors, 5)}."
        )
    if errors:
        warnings.warn(f"{len(errors)} of {len(facts)} images cannot be read and are skipped: {listed(errors, 20)}.")
    return facts


def _pair(resolution) -> tuple[int, int]:
    size = tuple(resolution) if isinstance(resolution, (list, tuple)) else (resolution, resolution)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"resolution must be a positive int or (height, width) of such; got {resolution!r}.")
    return size


def _checked_columns(names, statistics) -> list[str] | None:
    if not names:
        if statistics is not None:
            raise ValueError("condition_statistics need condition_columns, whose statistics they are.")
        return None
    if isinstance(names, str) or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"condition_columns must be a list of different names; got {names!r}.")
    return list(names)


def _size_of(decoded, channels) -> tuple[int, int]:
    if decoded.kind == "image":
        return tuple(decoded.size)
    layout = pixels.channel_layout(decoded.pixels.shape, channels)
    return pixels.array_size(decoded.pixels.shape, layout or "last")


def _common_form(source, kept, facts, channels) -> tuple[str, np.ndarray]:
    """The dtype that all images can have, and their sizes (N, 2), height and width."""
    dtypes, sizes = {}, np.empty((len(facts), 2), np.int64)
    for row, (i, (kind, shape)) in enumerate(zip(kept, facts, strict=True)):
        layout = "grey" if kind == "image" else pixels.channel_layout(shape, channels)
        if kind == "image" and channels not in MODES:
            raise ValueError(
                f"in_channels={channels}: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels, such as "
                f"{source.names[i]!r}. For {channels}, {pixels.CONVERT}."
            )
        if layout is None or (layout == "grey" and kind == "float32" and channels != 1):
            raise ValueError(
                f"in_channels={channels}, but {source.names[i]!r} is an array of shape {shape}; "
                "(height, width, channels), (channels, height, width) or, for one, (height, width) would fit."
            )
        dtypes.setdefault(pixels.dtype_for(kind, shape, channels), source.names[i])
        sizes[row] = pixels.array_size(shape, layout)
    if "float32" in dtypes and len(dtypes) > 1:
        raise ValueError(
            f"the images in {source.where} have no common range: {dtypes}. Save them in one type: float32 is "
            "[-1, 1], uint8 0..255, uint16 0..65535."
        )
    return max(dtypes, key=pixels.DTYPES.index), sizes
