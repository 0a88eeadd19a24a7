"""Hugging Face datasets that are read as they come, in an order that can be resumed exactly.

What `datasets` does itself is not exact: the content of its shuffle buffer is lost on a resume, and its order depends on
the numbers of processes and of workers. Here the shards (files, or row groups of a parquet file) are dealt out to L lanes,
whatever the number of processes: shard v of the endless sequence of shuffled shards goes to lane v mod L. A lane reads
its shards one after the other in blocks of equal size, and shuffles each block with (seed, lane, number of the block). The
image with number n is element n div L of lane n mod L. So, where L is a multiple of the number of processes, each of them
reads lanes of its own and no other, the order depends on seed, L and the size of the blocks only, and what a resumed run
has to skip follows from the number of images seen. It skips whole shards without reading them where their lengths are
known, which every process notes, in the cache folder, of shards that it has come to the end of.

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

from . import annotations as columns
from . import transforms as pixels
from .sampler import Item, NumberedBatches, drawn_crop, permutation
from .sources import check_columns, decode_value, is_array, is_saved_to_disk, require_datasets
from .validation import manifest_path, write_json


# Each divides by many numbers of processes: the most that the shards suffice for is taken.
LANES = (48, 24, 12, 8, 6, 4, 3, 2, 1)
# Which image of which shard, in one number.
INDICES_OF_A_SHARD = 2**40
MAX_UNREADABLE, MEANINGFUL = 0.01, 200
READING_THREADS = 8


class StreamedImages(torch.utils.data.Dataset):
    """Images of a stream; `load_images(streaming=True)` builds it. It has no length and no order but that of `batches`.

    An image that can't be read is replaced by its neighbour in the micro-batch, with a warning; if more than 1 % can't
    be, an error ends the run. Only here does an image depend on how a step is divided.

    Attributes:
        resolution, dtype, id2label, condition_columns: as of `ImageDataset`.
        identity: a string that is equal for equal names of columns, number of shards and first image.
        has_length: False.
        num_shards: parts that can be read by themselves.
    """

    has_length = False

    def __init__(
        self, rows, where, image_column, label_column, condition_columns, *, condition_statistics, num_classes,
        resolution, in_channels, center_crop, shuffle_buffer, cache_dir,
    ):  # fmt: skip
        self.rows, self.where, self.image_column, self.label_column = rows, where, image_column, label_column
        self.resolution, self.in_channels, self.center_crop = resolution, in_channels, center_crop
        self.condition_names, self.shuffle_buffer, self.cache_dir = condition_columns, shuffle_buffer, cache_dir
        self.num_shards = rows.num_shards
        self.id2label = _stream_labels(rows.features, label_column, num_classes, where)
        try:
            first = next(iter(rows))
        except StopIteration:
            raise ValueError(f"no images in {where}.") from None
        self.condition_columns = None
        if condition_columns:
            found = {column: [first[column]] for column in condition_columns}
            _, entries = columns.read_conditions(found, ["the first row"])
            self.condition_columns = columns.check_statistics(condition_statistics, entries)
        self.dtype = self._dtype_of(first)
        self.row_of(first)
        described = (str(rows.features), self.num_shards, image_column, label_column, condition_columns)
        content = first[image_column]
        content = content["bytes"] or content["path"] if isinstance(content, dict) else content
        self.identity = hashlib.sha256(repr((described, content)).encode("utf-8", "surrogatepass")).hexdigest()
        self.read_images = self.unreadable = 0

    def batches(self, batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0) -> "StreamedBatches":
        return StreamedBatches(self, batch_size, seed, rank, world_size, micro_steps, start, not self.center_crop)

    def row_of(self, row: dict) -> tuple:
        """(image as stored, class number or None, normalised condition or None), checked."""
        label = None
        if self.label_column is not None:
            label = row[self.label_column]
            if not isinstance(label, int) or not 0 <= label < len(self.id2label):
                raise ValueError(
                    f"label_column={self.label_column!r} of {self.where} holds {label!r}, which is none of the classes "
                    f"0 to {len(self.id2label) - 1}."
                )
        vector = None
        if self.condition_columns is not None:
            found = {column: [row[column]] for column in self.condition_names}
            values, entries = columns.read_conditions(found, [f"a row of {self.where}"])
            if entries != self.condition_columns["names"]:
                raise ValueError(f"the condition columns of {self.where} are {entries} in one row, others before.")
            vector = columns.normalised(values[0], self.condition_columns)
        return row[self.image_column], label, vector

    def __getitem__(self, item: Item) -> dict:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[Item]) -> list[dict]:
        """What DataLoader asks of a worker: a micro-batch at once."""
        found, errors = [], []
        for item in items:
            try:
                found.append(self._read(item))
            except MemoryError:
                raise
            except Exception as error:
                found.append(None)
                errors.append(f"row {item.index % INDICES_OF_A_SHARD} of shard {item.index // INDICES_OF_A_SHARD} "
                              f"({type(error).__name__}: {error})")  # fmt: skip
        self.read_images, self.unreadable = self.read_images + len(items), self.unreadable + len(errors)
        if errors:
            too_many = self.read_images >= MEANINGFUL and self.unreadable > MAX_UNREADABLE * self.read_images
            if too_many or len(errors) == len(items):
                raise OSError(
                    f"{self.unreadable} of {self.read_images} images of {self.where} cannot be read; at most "
                    f"{MAX_UNREADABLE:.0%} may. The last: {errors[-1]}."
                )
            warnings.warn(f"images of {self.where} cannot be read and are replaced by others: {'; '.join(errors)}.")
        good = [i for i, one in enumerate(found) if one is not None]
        whole = []
        for i, item in enumerate(items):
            one = found[i] or found[min(good, key=lambda other: (abs(other - i), other))]
            whole.append({**one, "number": item.number})
        return whole

    def _read(self, item: Item) -> dict:
        image, label, vector = item.row
        decoded = self._decode(image, self.resolution)
        if self._dtype(decoded) != self.dtype:
            raise ValueError(f"it has pixels of {self._dtype(decoded)}, the first image has {self.dtype}")
        crop = (0.5, 0.5) if item.crop is None else item.crop
        tensor = pixels.prepare(decoded, self.resolution, self.in_channels, self.dtype, crop)
        found = {"image": tensor, "index": item.index}
        if label is not None:
            found["label"] = label
        if vector is not None:
            found["mapping_cond"] = torch.from_numpy(vector)
        return found

    def _decode(self, value, enough=None) -> pixels.Decoded:
        feature = self.rows.features[self.image_column]
        if is_array(feature) and value is not None:
            value = np.asarray(value, feature.dtype)
        decoded = decode_value(value, enough)
        if decoded.kind != "image":
            layout = pixels.channel_layout(decoded.pixels.shape, self.in_channels)
            if layout is not None:
                return decoded._replace(size=pixels.array_size(decoded.pixels.shape, layout))
        return decoded

    def _dtype(self, decoded) -> str:
        return pixels.dtype_for(decoded.kind, np.shape(decoded.pixels), self.in_channels)

    def _dtype_of(self, first) -> str:
        try:
            decoded = self._decode(first[self.image_column])
            dtype = self._dtype(decoded)
            pixels.to_channels(decoded.pixels, self.in_channels, dtype)
        except KeyError:
            raise ValueError(f"in_channels={self.in_channels}: images have 1 (grey), 3 (RGB) or 4 (RGBA).") from None
        except Exception as error:
            raise ValueError(f"the first image of {self.where} cannot be read: {error}") from error
        return dtype


def open_stream(
    name, config_name, cache_dir, split, image_column, label_column, condition_columns, *, shuffle_buffer,
    condition_statistics, **options,
) -> StreamedImages:  # fmt: skip
    """See `load_images`, whose arguments these are."""
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
    rows = datasets.load_dataset(name, config_name, split=split, streaming=True, cache_dir=cache_dir)
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


def _stream_labels(features, label_column, num_classes, where) -> dict[int, str] | None:
    if label_column is None:
        if num_classes is not None:
            raise ValueError(f"num_classes={num_classes} needs a label_column.")
        return None
    feature = features[label_column]
    names = getattr(feature, "names", None)
    if names is not None:
        if num_classes not in (None, len(names)):
            raise ValueError(f"num_classes={num_classes}, but {label_column!r} of {where} has {len(names)} classes.")
        return dict(enumerate(names))
    dtype = str(getattr(feature, "dtype", feature))
    if not dtype.startswith(("int", "uint")):
        raise ValueError(
            f"label_column={label_column!r} of {where} holds {dtype}, which can't be numbered before the last row is "
            "read. Make it a ClassLabel (`Dataset.class_encode_column`), or leave out streaming."
        )
    if num_classes is None or num_classes < 1:
        raise ValueError(
            f"label_column={label_column!r} of {where} holds integers; say of how many classes with num_classes, "
            f"which is {num_classes}."
        )
    return {i: str(i) for i in range(num_classes)}


def number_of_lanes(num_shards: int, world_size: int) -> int:
    """
    A multiple of `world_size`, and the same for as many values of it as possible.

    Raises:
        ValueError: for more processes than shards.
    """
    if world_size > num_shards:
        raise ValueError(
            f"streaming: {num_shards} shards (files or row groups) can't be shared by {world_size} processes. Save the "
            "dataset in more files, or leave out streaming."
        )
    return next((n for n in LANES if n <= num_shards and n % world_size == 0), world_size)


class StreamedBatches(NumberedBatches):
    """
    The order of a stream. Each `Item` carries its encoded image, so that workers only decode.

    Args:
        dataset: a [`StreamedImages`].
        batch_size, seed, rank, world_size, micro_steps, start, crops: as in [`NumberedBatches`].

    Raises:
        ValueError: more processes than shards, or a count or rank out of range.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0, crops=True):
        super().__init__(batch_size, seed, rank, world_size, micro_steps, start, crops)
        self.dataset = dataset
        self.lanes = number_of_lanes(dataset.num_shards, world_size)
        self.block = max(1, dataset.shuffle_buffer // self.lanes)
        self.order = (
            f"stream of {dataset.num_shards} shards in {self.lanes} lanes, blocks of {self.block}, seed {self.seed}"
        )

    def __iter__(self) -> Iterator[list[Item]]:
        shards = _Shards(self.dataset, self.seed)
        stride, first = self.world_size * self.micro_steps, self.start + self.rank
        lanes = {}
        pool = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="stream")
        try:
            for number in range(first, first + self.lanes, self.world_size):
                position, lane = divmod(number, self.lanes)
                lanes[lane] = _Lane(shards, lane, self.lanes, self.block, position, pool)
            while True:
                # A lane goes forward only, but micro-steps take its images in turns: get those of a whole step.
                numbers = range(first, first + self.global_batch, self.world_size)
                items = {number: self._item(number, *next(lanes[number % self.lanes])) for number in numbers}
                for micro_step in range(self.micro_steps):
                    begin = first + micro_step * self.world_size
                    yield [items.pop(number) for number in range(begin, begin + self.batch_size * stride, stride)]
                first += self.global_batch
        finally:
            # What is being read ahead is not needed any more, and a slow network is not to be waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def _item(self, number, index, row) -> Item:
        return Item(index, drawn_crop(self.seed, number) if self.crops else None, number, row)


class _Shards:
    """The shards of a stream: their endless order, their rows, and the lengths of those that were read to the end."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed, self.count = dataset, seed, dataset.num_shards
        self.permutation = functools.lru_cache(64)(lambda epoch: permutation(self.count, "shards", seed, epoch))
        self.path = manifest_path(f"stream-{dataset.identity}", dataset.cache_dir)
        self.lock = threading.Lock()
        self.lengths = self._read_lengths()

    def number(self, visit: int) -> int:
        epoch, place = divmod(visit, self.count)
        return int(self.permutation(epoch)[place])

    def rows(self, shard: int, skip: int) -> Iterator[tuple[int, tuple]]:
        """(index, row) from the row `skip` of the shard on; to the end, its length is noted."""
        length = 0
        for length, row in enumerate(self.dataset.rows.shard(num_shards=self.count, index=shard), 1):
            if length > skip:
                yield shard * INDICES_OF_A_SHARD + length - 1, self.dataset.row_of(row)
        with self.lock:
            if self.lengths.get(shard) != length:
                self.lengths[shard] = length
                # Other processes note theirs.
                self.lengths = {**self._read_lengths(), **self.lengths}
                write_json(self.path, {"lengths": sorted(self.lengths.items())})

    def _read_lengths(self) -> dict[int, int]:
        try:
            with open(self.path, encoding="utf-8") as file:
                found = {int(shard): int(length) for shard, length in json.load(file)["lengths"]}
            return found if all(0 <= s < self.count and n >= 0 for s, n in found.items()) else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}


class _Lane:
    """Endless (index, row) of one lane, from an element on; the next block is read while one is used."""

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
        """All rows of the lane from row `skip` on."""
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
                raise ValueError(f"no images in {self.shards.dataset.where}.")
            visit += self.lanes
