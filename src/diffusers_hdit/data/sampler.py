"""Which image has which number in a run, and which process sees it when.

The images of a run, over all processes and epochs, are numbered 0, 1, 2, ... Which image of the data set has a number,
and what is drawn for it, are functions of (seed, number). An optimizer step takes the next G = batch_size * world_size
* micro_steps numbers, f to f + G - 1, and the j-th image of micro-step m on process r has the number

    f + j * world_size * micro_steps + m * world_size + r,

the way `diffusion.stratified_uniform` deals out noise levels. So neither the images of a step nor what is drawn for
them depend on how many processes and micro-steps share it.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Item(NamedTuple):
    """
    What a data set is asked for.

    Args:
        index: of the image in the data set.
        crop: (y, x) from 0 (top, left) to 1.
        number: of the image in the run.
        row: the image itself, where it comes from a stream.
    """

    index: int
    crop: tuple[float, float] | None = None
    number: int | None = None
    row: Any = None


def mixed_seed(*parts) -> int:
    """64 well-mixed bits; unlike `hash()`, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def drawn_crop(seed: int, number: int) -> tuple[float, float]:
    """(y, x) in [0, 1) of the image with this number."""
    bits = mixed_seed("crop", seed, number)
    return (bits >> 32) / 2**32, bits % 2**32 / 2**32


class NumberedBatches(torch.utils.data.Sampler):
    """
    Endless lists of `Item`, one for each micro-step: the `batch_sampler` of a DataLoader.

    Args:
        batch_size: images a micro-step in this process.
        start: images the run has seen already, over all processes; a resumed run continues from there.
        crops: draw a place for the crop of each image from (seed, number).

    Attributes:
        order: a string; runs whose orders are equal see the same images under the same numbers, so a run must be
            resumed with the same.
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
        stride, first = self.world_size * self.micro_steps, self.start + self.rank
        while True:
            for micro_step in range(self.micro_steps):
                begin = first + micro_step * self.world_size
                numbers = range(begin, begin + self.batch_size * stride, stride)
                yield [self.item(number) for number in numbers]
            first += self.global_batch

    def item(self, number: int) -> Item:
        crop = drawn_crop(self.seed, number) if self.crops else None
        return Item(self.index_of(number), crop, number)

    def index_of(self, number: int) -> int:
        raise NotImplementedError

    def _refuse_small(self, num_images: int) -> None:
        if num_images < self.global_batch:
            steps = f" and {self.micro_steps} micro-steps" if self.micro_steps > 1 else ""
            raise ValueError(
                f"fewer images than a batch: {num_images} images, but {self.batch_size} in each of {self.world_size} "
                f"processes{steps} takes {self.global_batch}. Lower the batch size or add images."
            )


class ShuffledBatches(NumberedBatches):
    """
    Image number n of the run is element n mod N of the permutation of epoch n div N, which is drawn from (seed, epoch).

    Steps straddle epochs; no image is dropped or repeated within one. The order does not depend on the global batch.

    Args:
        num_images: N.
        batch_size, seed, rank, world_size, micro_steps, start, crops: as in [`NumberedBatches`].

    Raises:
        ValueError: fewer images than a step takes, or a count or rank out of range.
    """

    def __init__(
        self, num_images, batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0, crops=True
    ):  # fmt: skip
        super().__init__(batch_size, seed, rank, world_size, micro_steps, start, crops)
        self._refuse_small(num_images)
        self.num_images = num_images
        self.order = f"shuffled, {num_images} images, seed {self.seed}"
        # Micro-steps of a step that straddles epochs go back and forth between two.
        self._permutation = functools.lru_cache(2)(functools.partial(permutation, num_images, "epoch", self.seed))

    def index_of(self, number):
        epoch, place = divmod(number, self.num_images)
        return int(self._permutation(epoch)[place])


class BucketedBatches(NumberedBatches):
    """
    All images of a global batch come from one bucket, so that they have one size, and all processes equal work.

    The images of a bucket with N_b of them form an endless sequence, permutation after permutation, each drawn from
    (seed, bucket, pass); its batch i is elements i * G to (i + 1) * G - 1. In epoch e come those batches of a bucket
    that end within its first (e + 1) * N_b elements and have not come before, so what does not fill a batch is carried
    over into the next epoch, and no image is ever dropped. Which bucket is next within an epoch is drawn from
    (seed, epoch). A bucket with fewer than G images repeats some within a batch, as rarely as its size demands;
    `Buckets(min_images=G)` has none.

    Args:
        buckets: (N,), the number of each image's bucket, from 0.
        batch_size, seed, rank, world_size, micro_steps, start, crops: as in [`NumberedBatches`].

    Raises:
        ValueError: as [`ShuffledBatches`], and if `start` is not a whole number of global batches, since the order
            depends on the size of these.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size, seed, rank=0, world_size=1, micro_steps=1, start=0, crops=True
    ):
        super().__init__(batch_size, seed, rank, world_size, micro_steps, start, crops)
        buckets = np.asarray(buckets)
        self._refuse_small(len(buckets))
        if start % self.global_batch:
            raise ValueError(
                f"start={start} is no multiple of the global batch {self.global_batch}: with buckets, a run is "
                "resumed with the global batch that it began with."
            )
        sizes = np.bincount(buckets)
        self.members = [np.flatnonzero(buckets == b) for b in range(len(sizes))]
        self.sizes = sizes
        self.order = (
            f"buckets of {', '.join(map(str, sizes.tolist()))} images, global batch {self.global_batch}, "
            f"seed {self.seed}"
        )
        self._permutation = functools.lru_cache(2 * len(sizes))(self._make_permutation)
        self._epoch = functools.lru_cache(2)(self._make_epoch)

    def index_of(self, number):
        step, place = divmod(number, self.global_batch)
        bucket, batch = self._batch(step)
        turn, element = divmod(batch * self.global_batch + place, int(self.sizes[bucket]))
        return int(self.members[bucket][self._permutation(bucket, turn)[element]])

    def _make_permutation(self, bucket, turn):
        return permutation(int(self.sizes[bucket]), "bucket", self.seed, (bucket, turn))

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Whole batches of each bucket before the epoch."""
        return epoch * self.sizes.astype(np.int64) // self.global_batch

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, batch of the bucket) of each batch of the epoch, in order."""
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
        at = step - int(self._batches_before(epoch).sum())
        return int(which[at]), int(batch[at])


def permutation(count: int, *parts) -> np.ndarray:
    """A permutation of 0..count-1, a function of the parts."""
    generator = torch.Generator().manual_seed(mixed_seed(*parts))
    return torch.randperm(count, generator=generator).numpy()
