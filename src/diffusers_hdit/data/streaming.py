"""Stream Hugging Face datasets in a shuffled order that can be resumed exactly.

What `datasets` does itself is not exact: the content of its shuffle buffer is lost on a resume, and its order depends on
the numbers of processes and of workers. Here the shards (files, or row groups of a parquet file) are dealt out to L lanes,
whatever the number of processes: shard v of the endless sequence of shuffled shards goes to lane v mod L. A lane reads
its shards one after the other in blocks of equal size, and shuffles each block with (seed, lane, number of the block). The
image with number n is element n div L of lane n mod L. So, where L is a multiple of the number of processes, each of them
reads lanes of its own and no other, the order depends only on the seed, L and the size of the blocks, and what a resumed
run has to skip follows from the number of images seen. It skips whole shards without reading them where their lengths are
known: every process writes down, in the cache folder, the lengths of shards that it has read to the end.

The process itself reads the files, in threads; DataLoader workers get encoded images and decode them.
"""

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..utils.seeding import permutation
from .annotations import check_statistics, normalise, read_conditions
from .folder_layout import listed
from .sampler import Item, ResumableBatchSampler, random_crop
from .sources import check_columns, decode_value, is_array, is_saved_to_disk, load_split, require_datasets
from .transforms import Decoded, dtype_for, locate_channels, prepare, to_channels
from .validation import manifest_path, write_manifest


# Each divides by many numbers of processes: the most that the shards suffice for is taken.
LANES = (48, 24, 12, 8, 6, 4, 3, 2, 1)
# An image's index is its shard times this plus its row in the shard.
INDICES_OF_A_SHARD = 2**40
# A share of unreadable images means something once so many were read.
MIN_IMAGES_FOR_SHARE = 200
READING_THREADS = 8


class StreamedImages(torch.utils.data.Dataset):
    """
    Images of a stream; `load_images(streaming=True)` builds it. It has no length, and no order but its sampler's.

    An image that can't be read is replaced by its neighbour in the micro-batch, with a warning; if more than
    `max_unreadable` can't be, an error ends the run. Only in this does an image depend on how a step is divided.

    Attributes:
        resolution, dtype, id2label, condition_columns: as of `ImageDataset`.
        identity: a string that is equal for equal names of columns, number of shards and first image.
        fingerprint, class_counts: None, since they are not known before the last row.
        has_length: False.
        num_shards: files or row groups, which can be read independently.
    """

    has_length = False
    fingerprint = class_counts = None

    def __init__(
        self, rows, location, image_column, label_column, condition_columns, *, condition_statistics, num_classes,
        resolution, in_channels, center_crop, shuffle_buffer, cache_dir, max_unreadable,
    ):  # fmt: skip
        self.rows, self.location, self.image_column, self.label_column = rows, location, image_column, label_column
        self.resolution, self.in_channels, self.center_crop = resolution, in_channels, center_crop
        self.condition_names, self.shuffle_buffer, self.cache_dir = condition_columns, shuffle_buffer, cache_dir
        self.num_shards, self.max_unreadable = rows.num_shards, max_unreadable
        self.id2label = _stream_classes(rows.features, label_column, num_classes, location)
        try:
            first = next(iter(rows))
        except StopIteration:
            raise ValueError(f"no images in {location}.") from None
        self.condition_columns = None
        if condition_columns:
            found = {column: [first[column]] for column in condition_columns}
            _, entries = read_conditions(found, ["the first row"], location)
            self.condition_columns = check_statistics(condition_statistics, entries)
        self.dtype = self._dtype_of_first(first)
        self.check_row(first)
        described = (str(rows.features), self.num_shards, image_column, label_column, condition_columns)
        content = first[image_column]
        content = content["bytes"] or content["path"] if isinstance(content, dict) else content
        self.identity = hashlib.sha256(repr((described, content)).encode("utf-8", "surrogatepass")).hexdigest()
        self.read_images = self.unreadable = 0

    def class_summary(self, limit: int = 20) -> str | None:
        """Return a line with the names of the first classes, for the summary of a run."""
        return self.id2label and f"{len(self.id2label)} classes: {listed(list(self.id2label.values()), limit)}"

    def batch_sampler(self, *args, **options) -> "StreamBatchSampler":
        """Return the sampler of a run on this stream; the arguments are those of [`ResumableBatchSampler`]."""
        return StreamBatchSampler(self, *args, crops=not self.center_crop, **options)

    def check_row(self, row: dict) -> tuple:
        """Return (image as stored, class id or None, normalised condition or None) of a row."""
        label = vector = None
        if self.label_column is not None:
            label = row[self.label_column]
            if not isinstance(label, int) or not 0 <= label < len(self.id2label):
                raise ValueError(
                    f"label_column={self.label_column!r} of {self.location} holds {label!r}, which is none of the "
                    f"classes 0 to {len(self.id2label) - 1}."
                )
        if self.condition_columns is not None:
            found = {column: [row[column]] for column in self.condition_names}
            values, entries = read_conditions(found, ["a row"], self.location)
            if entries != self.condition_columns["names"]:
                raise ValueError(f"the condition columns of {self.location} are {entries} in one row, others before.")
            vector = normalise(values[0], self.condition_columns)
        return row[self.image_column], label, vector

    def __getitem__(self, item: Item) -> dict:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[Item]) -> list[dict]:
        """Return a micro-batch; DataLoader's workers call this."""
        found, errors = [], []
        for item in items:
            try:
                found.append(self._read(item))
            except MemoryError:
                raise
            except Exception as error:
                found.append(None)
                shard, row = divmod(item.index, INDICES_OF_A_SHARD)
                errors.append(f"row {row} of shard {shard} ({type(error).__name__}: {error})")
        self.read_images, self.unreadable = self.read_images + len(items), self.unreadable + len(errors)
        if errors:
            if self._too_many_unreadable() or len(errors) == len(items):
                allowed = self.max_unreadable if self.max_unreadable >= 1 else f"{self.max_unreadable:.0%}"
                raise OSError(
                    f"{self.unreadable} of {self.read_images} images of {self.location} cannot be read; at most "
                    f"{allowed} may. The last: {errors[-1]}."
                )
            warnings.warn(f"images of {self.location} cannot be read and are replaced by others: {'; '.join(errors)}.")
        good = [i for i, one in enumerate(found) if one is not None]
        nearest = [min(good, key=lambda other: (abs(other - i), other)) for i in range(len(items))]
        return [{**found[i], "number": item.number} for i, item in zip(nearest, items, strict=True)]

    def _too_many_unreadable(self) -> bool:
        if self.max_unreadable == 0 or self.max_unreadable >= 1:
            return self.unreadable > self.max_unreadable
        return self.read_images >= MIN_IMAGES_FOR_SHARE and self.unreadable > self.max_unreadable * self.read_images

    def _read(self, item: Item) -> dict:
        image, label, vector = item.row
        decoded = self._decode(image, self.resolution)
        if self._dtype(decoded) != self.dtype:
            raise ValueError(f"it has pixels of {self._dtype(decoded)}, the first image has {self.dtype}")
        crop = (0.5, 0.5) if item.crop is None else item.crop
        found = {"image": prepare(decoded, self.resolution, self.in_channels, self.dtype, crop), "index": item.index}
        if label is not None:
            found["label"] = label
        if vector is not None:
            found["mapping_cond"] = torch.from_numpy(vector)
        return found

    def _decode(self, value, min_size=None) -> Decoded:
        decoded = decode_value(value, self.rows.features[self.image_column], min_size)
        return locate_channels(decoded, self.in_channels)

    def _dtype(self, decoded) -> str:
        return dtype_for(decoded.content_type, np.shape(decoded.pixels), self.in_channels)

    def _dtype_of_first(self, row) -> str:
        try:
            decoded = self._decode(row[self.image_column])
            to_channels(decoded.pixels, self.in_channels, self._dtype(decoded))
        except KeyError:
            raise ValueError(f"in_channels={self.in_channels}: images have 1 (grey), 3 (RGB) or 4 (RGBA).") from None
        except Exception as error:
            raise ValueError(f"the first image of {self.location} cannot be read: {error}") from error
        return self._dtype(decoded)


def open_stream(
    name, config_name, cache_dir, split, image_column, label_column, condition_columns, *, shuffle_buffer,
    condition_statistics, **options,
) -> StreamedImages:  # fmt: skip
    """Open a stream; the arguments are those of `load_images`."""
    datasets = require_datasets()
    name = os.fspath(name)
    if is_saved_to_disk(name):
        raise ValueError(
            f"streaming: {name!r} was saved by save_to_disk and is read from the disk as needed anyway. Leave it out."
        )
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1.")
    if condition_columns and condition_statistics is None:
        raise ValueError(
            f"condition_columns={condition_columns} of a stream need condition_statistics, their means and deviations: "
            "these are not known before the last row."
        )
    rows = load_split(name, config_name, split=split, streaming=True, cache_dir=cache_dir)
    if not (hasattr(rows, "shard") and hasattr(rows, "num_shards")):
        raise ImportError(f"streaming needs a newer `datasets` than {datasets.__version__}: pip install -U datasets")
    if rows.features is None:
        raise ValueError(f"streaming: {name!r} does not say what its columns hold. Save it as parquet.")
    check_columns(rows.features, repr(name), image_column, label_column, condition_columns)
    wanted = [column for column in (image_column, label_column, *(condition_columns or ())) if column is not None]
    rows = rows.select_columns(list(dict.fromkeys(wanted)))
    if not is_array(rows.features[image_column]):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    if rows.num_shards < LANES[0] and hasattr(rows, "reshard"):
        rows = rows.reshard()  # by row groups, where there are such: more shards mix better
    return StreamedImages(
        rows, repr(name), image_column, label_column, condition_columns, cache_dir=cache_dir,
        shuffle_buffer=shuffle_buffer, condition_statistics=condition_statistics, **options,
    )  # fmt: skip


def _stream_classes(features, label_column, num_classes, location) -> dict[int, str] | None:
    if label_column is None:
        if num_classes is not None:
            raise ValueError(f"num_classes={num_classes} needs a label_column.")
        return None
    feature = features[label_column]
    names = getattr(feature, "names", None)
    if names is not None:
        if num_classes not in (None, len(names)):
            raise ValueError(
                f"num_classes={num_classes}, but {label_column!r} of {location} has {len(names)} classes."
            )
        return dict(enumerate(names))
    dtype = str(getattr(feature, "dtype", feature))
    if not dtype.startswith(("int", "uint")):
        raise ValueError(
            f"label_column={label_column!r} of {location} holds {dtype}, which can't be numbered before the last row is "
            "read. Make it a ClassLabel (`Dataset.class_encode_column`), or leave out streaming."
        )
    if num_classes is None or num_classes < 1:
        raise ValueError(
            f"label_column={label_column!r} of {location} holds integers; say of how many classes with num_classes, "
            f"which is {num_classes}."
        )
    return {i: str(i) for i in range(num_classes)}


def number_of_lanes(num_shards: int, world_size: int) -> int:
    """
    Return how many lanes there are: a multiple of `world_size`, and equal for as many values of it as possible.

    Raises:
        ValueError: there are more processes than shards.
    """
    if world_size > num_shards:
        raise ValueError(
            f"streaming: {num_shards} shards (files or row groups) can't be shared by {world_size} processes. Save the "
            "dataset in more files, or leave out streaming."
        )
    return next((n for n in LANES if n <= num_shards and n % world_size == 0), world_size)


class StreamBatchSampler(ResumableBatchSampler):
    """
    Order the images of a stream. Each `Item` carries its encoded image, so that workers only decode.

    Args:
        dataset: a [`StreamedImages`].
        **options: of [`ResumableBatchSampler`].

    Raises:
        ValueError: more processes than shards, or a count or rank out of range.
    """

    def __init__(self, dataset: StreamedImages, *args, **options):
        super().__init__(*args, **options)
        self.dataset = dataset
        self.lanes = number_of_lanes(dataset.num_shards, self.world_size)
        self.block = max(1, dataset.shuffle_buffer // self.lanes)
        self.fingerprint = (
            f"stream of {dataset.num_shards} shards in {self.lanes} lanes, blocks of {self.block}, seed {self.seed}"
        )

    def __iter__(self) -> Iterator[list[Item]]:
        shards = _Shards(self.dataset, self.seed)
        first, lanes = self.start + self.rank, {}
        pool = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="stream")
        try:
            for number in range(first, first + self.lanes, self.world_size):
                position, lane = divmod(number, self.lanes)
                lanes[lane] = _Lane(shards, lane, self.lanes, self.block, position, pool)
            while True:
                # A lane only goes forward, but micro-steps take its images in turns: get those of a whole step.
                numbers = range(first, first + self.global_batch, self.world_size)
                items = {number: self._item(number, *next(lanes[number % self.lanes])) for number in numbers}
                yield from ([items.pop(number) for number in batch] for batch in self._micro_batches(first))
                first += self.global_batch
        finally:
            # What is being read ahead is not needed any more, and there is no point in waiting for a slow network.
            pool.shutdown(wait=False, cancel_futures=True)

    def _item(self, number, index, row) -> Item:
        return Item(index, random_crop(self.seed, number) if self.crops else None, number, row)


class _Shards:
    """Keep the endless order of a stream's shards, and the lengths of those that were read to the end."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed, self.count = dataset, seed, dataset.num_shards
        self.permutation = functools.lru_cache(64)(lambda epoch: permutation(self.count, "shards", seed, epoch))
        self.path = manifest_path("stream", dataset.identity, dataset.cache_dir)
        self.lock = threading.Lock()
        self.lengths = self._read_lengths()

    def number(self, visit: int) -> int:
        epoch, place = divmod(visit, self.count)
        return int(self.permutation(epoch)[place])

    def rows(self, shard: int, skip: int) -> Iterator[tuple[int, tuple]]:
        """Yield (index, row) from the row `skip` of the shard on; at its end, write down its length."""
        length = 0
        for length, row in enumerate(self.dataset.rows.shard(num_shards=self.count, index=shard), 1):
            if length > skip:
                yield shard * INDICES_OF_A_SHARD + length - 1, self.dataset.check_row(row)
        with self.lock:
            if self.lengths.get(shard) != length:
                self.lengths[shard] = length
                # Other processes write theirs.
                self.lengths = {**self._read_lengths(), **self.lengths}
                write_manifest(self.path, {"lengths": sorted(self.lengths.items())})

    def _read_lengths(self) -> dict[int, int]:
        try:
            with open(self.path, encoding="utf-8") as file:
                found = {int(shard): int(length) for shard, length in json.load(file)["lengths"]}
            return found if all(0 <= s < self.count and n >= 0 for s, n in found.items()) else {}
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return {}


class _Lane:
    """Iterate endlessly over the (index, row) of one lane; the next block is read while one is used."""

    def __init__(self, shards, lane, lanes, block, position, pool):
        self.shards, self.lane, self.lanes, self.size, self.pool = shards, lane, lanes, block, pool
        self.block, self.place = divmod(position, block)
        self.source = self._rows(self.block * block)
        self.rows = None
        self.coming = pool.submit(self._read_block, self.block)

    def __next__(self):
        if self.rows is None:
            self.rows = self.coming.result()
            self.coming = self.pool.submit(self._read_block, self.block + 1)
        row, self.rows[self.place] = self.rows[self.place], None
        self.place += 1
        if self.place == self.size:
            self.block, self.place, self.rows = self.block + 1, 0, None
        return row

    def _read_block(self, number):
        rows = [next(self.source) for _ in range(self.size)]
        order = permutation(self.size, "block", self.shards.seed, (self.lane, number))
        return [rows[i] for i in order]

    def _rows(self, skip: int) -> Iterator[tuple[int, tuple]]:
        """Yield all rows of the lane from row `skip` on."""
        visit, empty = self.lane, 0
        while True:
            shard = self.shards.number(visit)
            known = self.shards.lengths.get(shard)
            if known is None or skip < known:
                length = 0
                # While the length is not known, how far the skipping goes is not either.
                for index, row in self.shards.rows(shard, skip):
                    length = index % INDICES_OF_A_SHARD + 1
                    yield index, row
                known = self.shards.lengths[shard]
                skip = max(0, skip - known) if length == 0 else 0
            else:
                skip -= known
            empty = 0 if known else empty + 1
            if empty > 2 * self.shards.count:
                raise ValueError(f"no images in {self.shards.dataset.location}.")
            visit += self.lanes
