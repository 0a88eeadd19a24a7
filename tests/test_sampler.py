"""The order of images: who gets which number, and which image that is."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from diffusers_hdit import diffusion
from diffusers_hdit.data.bucketing import Buckets, assign
from diffusers_hdit.data.sampler import BucketBatchSampler, ShuffledBatchSampler


# (images of a micro-step in a process, processes, micro-steps): all divide a global batch of 8.
SPLITS = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2), (1, 4, 2)]
BUCKETS = np.repeat([0, 1, 2], [21, 9, 13])
KINDS = {"shuffled": (ShuffledBatchSampler, 43), "buckets": (BucketBatchSampler, BUCKETS)}


def steps(kind, count, split=(8, 1, 1), source=None, **options):
    """The first `count` global batches, each put together from what all processes and micro-steps get."""
    make, images = KINDS[kind]
    batch_size, world_size, micro_steps = split
    options = {"seed": 3, **options}
    ranks = [
        itertools.islice(
            make(
                images if source is None else source,
                batch_size,
                rank=r,
                world_size=world_size,
                micro_steps=micro_steps,
                **options,
            ),
            count * micro_steps,
        )
        for r in range(world_size)
    ]
    ranks = [list(rank) for rank in ranks]
    whole = []
    for k in range(count):
        parts = [item for rank in ranks for batch in rank[k * micro_steps : (k + 1) * micro_steps] for item in batch]
        whole.append(sorted(parts, key=lambda item: item.number))
    return whole


def indices(batches):
    return [item.index for batch in batches for item in batch]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("start", [0, 16, 8 * 1000])
def test_a_global_batch_does_not_depend_on_how_it_is_divided(kind, split, start):
    assert steps(kind, 20, split, start=start) == steps(kind, 20, start=start)


def test_who_gets_which_number():
    """As `diffusion.stratified_uniform` deals out noise levels: place 5 of a batch has the stratum 5, always."""
    for batch_size, world_size, micro_steps in SPLITS:
        for rank in range(world_size):
            order = ShuffledBatchSampler(43, batch_size, 0, rank, world_size, micro_steps, start=16)
            for micro_step, batch in enumerate(itertools.islice(order, micro_steps)):
                u = diffusion.stratified_uniform(batch_size, rank, world_size, micro_step, micro_steps)
                assert [item.number for item in batch] == [16 + int(8 * v) for v in u]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [0, 8, 16, 40, 48, 344, 8 * 1000])
def test_resumed_order_continues(kind, seen):
    whole = steps(kind, seen // 8 + 12)
    assert steps(kind, 12, start=seen) == whole[seen // 8 :]
    assert steps(kind, 12, (2, 2, 2), start=seen) == whole[seen // 8 :]


def test_a_shuffled_order_does_not_depend_on_the_batch():
    whole = steps("shuffled", 30)
    assert [item for batch in steps("shuffled", 10, (12, 2, 1)) for item in batch] == sum(whole, [])
    assert steps("shuffled", 1, start=5)[0] == sum(whole, [])[5:13]


def test_every_image_once_an_epoch():
    order = indices(steps("shuffled", 43))  # 8 epochs, batches straddling them
    epochs = [order[i : i + 43] for i in range(0, 8 * 43, 43)]
    assert all(sorted(epoch) == list(range(43)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8


def test_crops_belong_to_the_image_number():
    whole = [item for batch in steps("shuffled", 50) for item in batch]
    assert [item.number for item in whole] == list(range(400))
    assert all(item.crop is None for item in steps("shuffled", 1, crops=False)[0])
    places = torch.tensor([item.crop for item in whole])
    assert places.min() >= 0 and places.max() < 1
    # 400 uniform numbers: mean 1/2 with a deviation of 0.0144, of which 4 are allowed; none drawn twice.
    assert (places.mean(0) - 0.5).abs().max() < 0.058 and len(places.unique()) == 800


@pytest.mark.parametrize("kind", KINDS)
def test_iterating_again_starts_again(kind):
    make, images = KINDS[kind]
    order = make(images, 4, seed=0)
    assert list(itertools.islice(order, 6)) == list(itertools.islice(order, 6))


def test_seeds_and_epochs_are_mixed():
    first = {tuple(indices(steps("shuffled", 1, seed=s, start=43 * e))) for s in range(20) for e in range(20)}
    assert len(first) == 400, "no (seed, epoch) repeats another, such as (1, 0) and (0, 1)"


def test_order_is_frozen():
    """A checkpoint's place in the order is a number: another order would repeat and leave out images on a resume."""
    order = ShuffledBatchSampler(10, 5, seed=0)
    assert indices(itertools.islice(order, 2)) == [2, 8, 7, 3, 5, 0, 4, 6, 9, 1]
    assert next(iter(order))[1].crop == (0.10331573546864092, 0.5911078199278563)
    order = BucketBatchSampler([0] * 5 + [1] * 7, 4, seed=0)
    assert indices(itertools.islice(order, 4)) == [1, 2, 4, 0, 9, 5, 6, 11, 3, 0, 1, 3, 8, 7, 10, 10]


def test_bad_orders():
    with pytest.raises(ValueError, match="fewer images than a batch: 7 images, but 4 in each of 2 processes takes 8"):
        ShuffledBatchSampler(7, 4, seed=0, world_size=2)
    with pytest.raises(ValueError, match="4 in each of 1 processes and 2 micro-steps takes 8"):
        BucketBatchSampler([0] * 7, 4, seed=0, micro_steps=2)
    assert len(next(iter(ShuffledBatchSampler(8, 4, seed=0, world_size=2)))) == 4
    wrong = ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"start": -1}, {"world_size": 0})
    for options in (*wrong, {"micro_steps": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ShuffledBatchSampler(**{"num_images": 7, "batch_size": 2, "seed": 0, **options})
    with pytest.raises(ValueError, match="start=12 is no multiple of the global batch 8"):
        BucketBatchSampler(BUCKETS, 8, seed=0, start=12)


def test_orders_have_different_names():
    names = {
        ShuffledBatchSampler(43, 8, 0).fingerprint,
        ShuffledBatchSampler(43, 8, 1).fingerprint,
        ShuffledBatchSampler(44, 8, 0).fingerprint,
        BucketBatchSampler(BUCKETS, 8, 0).fingerprint,
        BucketBatchSampler(BUCKETS, 4, 0).fingerprint,
        BucketBatchSampler(BUCKETS[1:], 8, 0).fingerprint,
    }
    assert len(names) == 6
    assert BucketBatchSampler(BUCKETS, 2, 0, world_size=2, micro_steps=2).fingerprint in names
    assert ShuffledBatchSampler(43, 4, 0).fingerprint in names, "it depends on no batch"


# --- Buckets


def test_a_step_has_one_bucket_and_no_image_is_lost():
    batches = steps("buckets", 43 * 8)  # 64 epochs
    assert all(len({int(BUCKETS[item.index]) for item in batch}) == 1 for batch in batches)
    order = indices(batches)
    for bucket, size in enumerate([21, 9, 13]):
        members = [index for index in order if BUCKETS[index] == bucket]
        turns = [members[i : i + size] for i in range(0, len(members) - size + 1, size)]
        assert all(len(set(turn)) == size for turn in turns), "each image once in each pass of its bucket"
        assert len(set(map(tuple, turns))) == len(turns)
    counts = Counter(order)
    assert max(counts.values()) - min(counts.values()) <= 1 and min(counts.values()) == 64


def test_what_does_not_fill_a_batch_is_carried_over():
    """After e epochs a bucket has given all whole batches of its images so far: it lags by less than one batch."""
    order = BucketBatchSampler(BUCKETS, 8, seed=0)
    for epoch in range(1, 40):
        total = sum(epoch * size // 8 for size in (21, 9, 13))
        seen = Counter(int(BUCKETS[item.index]) for batch in itertools.islice(order, total) for item in batch)
        assert [seen[b] for b in range(3)] == [epoch * size // 8 * 8 for size in (21, 9, 13)]


def test_buckets_are_mixed():
    sequence = [int(BUCKETS[batch[0].index]) for batch in steps("buckets", 200)]
    changes = sum(a != b for a, b in itertools.pairwise(sequence))
    # Random batches of shares 21, 9 and 13 of 43 change with probability 0.63: 125 of 199, deviation 7.
    assert changes > 97


def test_a_bucket_smaller_than_the_batch():
    batches = steps("buckets", 100, source=np.repeat([0, 1], [40, 3]))
    small = [indices([batch]) for batch in batches if batch[0].index >= 40]
    assert len(small) == int(100 * 3 / 43)
    assert all(max(Counter(batch).values()) - min(Counter(batch).values()) <= 2 for batch in small)
    only_empty = steps("buckets", 4, source=np.repeat([1, 3], [8, 8]))
    assert sorted(set(indices(only_empty))) == list(range(16)), "buckets without images are none"


@pytest.mark.parametrize("resolution, divisor, min_side", [((256, 256), 16, 64), ((64, 96), (8, 16), 32)])
def test_sizes_of_buckets(resolution, divisor, min_side):
    buckets = Buckets(divisor, min_side)
    sizes, pixels = buckets.sizes(resolution), resolution[0] * resolution[1]
    assert resolution in sizes and len(set(sizes)) == len(sizes) > 3
    for height, width in sizes:
        assert height % buckets.divisor[0] == 0 and width % buckets.divisor[1] == 0 and min(height, width) >= min_side
        assert abs(height * width / pixels - 1) <= 1 / 8 and max(height / width, width / height) <= 2
    if resolution == (256, 256):
        assert {(w, h) for h, w in sizes} == set(sizes), "upright and lying alike"


def test_bad_buckets():
    with pytest.raises(ValueError, match="divisor must be a positive int or .*; got 0"):
        Buckets(0)
    with pytest.raises(ValueError, match="max_aspect=0.5"):
        Buckets(16, max_aspect=0.5)
    with pytest.raises(
        ValueError, match=r"no size of about 64x64 pixels has sides .* \(48, 48\), at least \(64, 64\)"
    ):
        Buckets(48, 64).sizes((64, 64))


def test_images_get_the_size_that_suits_their_shape():
    candidates = [(4, 8), (5, 6), (6, 5), (8, 4)]
    sizes = np.array([[100, 210], [50, 49], [300, 100], [500, 600], [50, 51]])
    assert assign(sizes, candidates)[0] == candidates
    assert assign(sizes, candidates)[1].tolist() == [0, 2, 3, 1, 1]
    # A size of too few images is given up, the rarest first; these go to the next best.
    used, bucket = assign(np.concatenate([sizes, sizes[[2, 2]]]), candidates, min_images=2)
    assert [used[b] for b in bucket] == [(5, 6), (5, 6), (8, 4), (5, 6), (5, 6), (8, 4), (8, 4)]
    assert assign(sizes, candidates, min_images=9)[1].tolist() == [0] * 5, "one is left in any case"
