"""Batch samplers whose order can be resumed exactly and does not depend on how a step is divided among processes.

The images of a run, over all processes and epochs, are numbered 0, 1, 2, ... Which image of the data set has a number,
and the random numbers used for it, are functions of (seed, number). An optimizer step takes the next
G = batch_size * world_size * micro_steps numbers, f to f + G - 1, and the j-th image of micro-step m on process r has
the number

    f + j * world_size * micro_steps + m * world_size + r,

the way `diffusion.stratified_uniform` deals out noise levels.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.seeding import mixed_seed, permutation


class Item(NamedTuple):
    """
    What a batch sampler asks a data set for.

    Args:
        index: which image of the data set.
        crop: place of the crop, (y, x) from 0 (top, left) to 1.
        number: the image's number in the run.
        row: the encoded image itself, where it comes from a stream.
    """

    index: int
    crop: tuple[float, float] | None = None
    number: int | None = None
    row: Any = None


def random_crop(seed: int, number: int) -> tuple[float, float]:
    """Return the place (y, x), in [0, 1), of the random crop of the image with this number."""
    bits = mixed_seed("crop", seed, number)
    return (bits >> 32) / 2**32, bits % 2**32 / 2**32


class ResumableBatchSampler(torch.utils.data.Sampler):
    """
    Yield endless lists of [`Item`], one list for each micro-step: the `batch_sampler` of a DataLoader.

    Args:
        batch_size: images of a micro-step in this process.
        seed: an int; equal seeds give equal orders.
        rank, world_size: which process this is, and of how many.
        micro_steps: gradient accumulation steps.
        start: images the run has seen already, over all processes; a resumed run continues from there.
        crops: give each image a random place for its crop, a function of (seed, number).

    Attributes:
        fingerprint: a string. Samplers with equal fingerprints give the same images the same numbers, so that a run
            must be resumed with an equal one.

    Raises:
        ValueError: a count or the rank is out of range.
    """

    def __init__(self, batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0, crops=True):
        if batch_size < 1 or micro_steps < 1 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size} and micro_steps={micro_steps} must be at least 1, start={start} at least 0 "
                f"and rank={rank} in 0..world_size-1 (world_size={world_size})."
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, int(seed), rank, world_size
        self.micro_steps, self.start, self.crops = micro_steps, start, crops
        self.global_batch = batch_size * world_size * micro_steps

    def __iter__(self) -> Iterator[list[Item]]:
        first = self.start + self.rank
        while True:
            yield from ([self.item(number) for number in numbers] for numbers in self._micro_batches(first))
            first += self.global_batch

    def _micro_batches(self, first: int) -> list[range]:
        """Return the numbers of this process's images in each micro-step of the step that begins with `first`."""
        stride = self.world_size * self.micro_steps
        begins = range(first, first + stride, self.world_size)
        return [range(begin, begin + self.batch_size * stride, stride) for begin in begins]

    def item(self, number: int) -> Item:
        return Item(self.index_of(number), random_crop(self.seed, number) if self.crops else None, number)

    def index_of(self, number: int) -> int:
        """Return which image of the data set has this number."""
        raise NotImplementedError

    def _require_images(self, num_images: int) -> None:
        if num_images < self.global_batch:
            steps = f" and {self.micro_steps} micro-steps" if self.micro_steps > 1 else ""
            raise ValueError(
                f"fewer images than a batch: {num_images} images, but {self.batch_size} in each of {self.world_size} "
                f"processes{steps} takes {self.global_batch}. Lower the batch size or add images."
            )


class ShuffledBatchSampler(ResumableBatchSampler):
    """
    Shuffle each epoch: image n of the run is element n mod N of a permutation that depends on (seed, n div N).

    Steps straddle epochs; no image is dropped or repeated within one. The order does not depend on the global batch.

    Args:
        num_images: N.
        **options: of [`ResumableBatchSampler`].

    Raises:
        ValueError: fewer images than a step takes, or a count or rank out of range.
    """

    def __init__(self, num_images: int, *args, **options):
        super().__init__(*args, **options)
        self._require_images(num_images)
        self.num_images = num_images
        self.fingerprint = f"shuffled, {num_images} images, seed {self.seed}"
        # Micro-steps of a step that straddles epochs go back and forth between two.
        self._permutation = functools.lru_cache(2)(functools.partial(permutation, num_images, "epoch", self.seed))

    def index_of(self, number):
        epoch, place = divmod(number, self.num_images)
        return int(self._permutation(epoch)[place])


class BucketBatchSampler(ResumableBatchSampler):
    """
    Take all images of a global batch from one bucket, so that they have one size and all processes have equal work.

    The images of a bucket with N_b of them form an endless sequence of permutations, each a function of (seed, bucket,
    pass); its batch i is elements i * G to (i + 1) * G - 1. Epoch e has those batches of a bucket that end within its
    first (e + 1) * N_b elements and were in no epoch before: what does not fill a batch is carried over into the next
    epoch, and no image is ever dropped. The order of the buckets within an epoch is a function of (seed, epoch). A
    bucket with fewer than G images repeats some within a batch, as rarely as its size demands; `Buckets(min_images=G)`
    avoids such.

    Args:
        buckets: (N,), the number of each image's bucket, from 0.
        **options: of [`ResumableBatchSampler`].

    Raises:
        ValueError: as [`ShuffledBatchSampler`], and if `start` is not a whole number of global batches, since the
            order depends on their size.
    """

    def __init__(self, buckets: Sequence[int], *args, **options):
        super().__init__(*args, **options)
        buckets = np.asarray(buckets)
        self._require_images(len(buckets))
        if self.start % self.global_batch:
            raise ValueError(
                f"start={self.start} is no multiple of the global batch {self.global_batch}: with buckets, a run is "
                "resumed with the global batch that it began with."
            )
        self.sizes = np.bincount(buckets)
        self.members = [np.flatnonzero(buckets == b) for b in range(len(self.sizes))]
        counts = ", ".join(map(str, self.sizes.tolist()))
        self.fingerprint = f"buckets of {counts} images, global batch {self.global_batch}, seed {self.seed}"
        self._permutation = functools.lru_cache(2 * len(self.sizes))(self._make_permutation)
        self._epoch = functools.lru_cache(2)(self._make_epoch)

    def index_of(self, number):
        step, place = divmod(number, self.global_batch)
        bucket, batch = self._batch(step)
        turn, element = divmod(batch * self.global_batch + place, int(self.sizes[bucket]))
        return int(self.members[bucket][self._permutation(bucket, turn)[element]])

    def _make_permutation(self, bucket, turn):
        return permutation(int(self.sizes[bucket]), "bucket", self.seed, (bucket, turn))

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Return how many whole batches of each bucket come before the epoch."""
        return epoch * self.sizes.astype(np.int64) // self.global_batch

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (bucket, batch of the bucket) of each batch of the epoch, in order."""
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        which = np.repeat(np.arange(len(before)), after - before)
        which = which[permutation(len(which), "epoch of buckets", self.seed, epoch)]
        batch = np.empty_like(which)
        for bucket in range(len(before)):
            batch[which == bucket] = np.arange(before[bucket], after[bucket])
        return which, batch

    def _batch(self, step: int) -> tuple[int, int]:
        # An epoch begins, at the latest, after as many batches as its predecessors have images for.
        epoch = step * self.global_batch // int(self.sizes.sum())
        while self._batches_before(epoch + 1).sum() <= step:
            epoch += 1
        which, batch = self._epoch(epoch)
        place = step - int(self._batches_before(epoch).sum())
        return int(which[place]), int(batch[place])
