"""Aspect-ratio buckets: sizes of about the same number of pixels for images of mixed shapes."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Buckets:
    """
    Describe the sizes that images may be resized to.

    Args:
        divisor: height and width, in pixels, are multiples of it; an int or (height, width).
        min_side: the smallest height and width in pixels; an int or (height, width).
        max_aspect: the largest ratio of the longer to the shorter side.
        min_images: a size that suits fewer images is dropped, and these get the next best.

    Raises:
        ValueError: an argument is out of range.
    """

    divisor: int | tuple[int, int]
    min_side: int | tuple[int, int] = 1
    max_aspect: float = 2.0
    min_images: int = 1

    def __post_init__(self):
        for name in ("divisor", "min_side"):
            value = getattr(self, name)
            pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
            if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
                raise ValueError(f"buckets: {name} must be a positive int or (height, width) of such; got {value!r}.")
            object.__setattr__(self, name, pair)
        if not self.max_aspect >= 1 or self.min_images < 1:
            raise ValueError(
                f"buckets: max_aspect={self.max_aspect} and min_images={self.min_images} must be at least 1."
            )

    def sizes(self, resolution: tuple[int, int]) -> list[tuple[int, int]]:
        """
        Return all (height, width) whose number of pixels is within an eighth of that of `resolution`.

        Raises:
            ValueError: there is none.
        """
        pixels = math.prod(resolution)
        found = set()
        # The shorter side sets the longer one, so that there are the same sizes upright and lying.
        for shorter, longer in ((0, 1), (1, 0)):
            step = self.divisor[shorter]
            for side in range(-(-self.min_side[shorter] // step) * step, math.isqrt(pixels) + 1, step):
                other = max(1, round(pixels / side / self.divisor[longer])) * self.divisor[longer]
                size = (side, other) if shorter == 0 else (other, side)
                fits = other >= self.min_side[longer] and max(side, other) <= self.max_aspect * min(side, other)
                if fits and abs(side * other / pixels - 1) <= 1 / 8:
                    found.add(size)
        if not found:
            raise ValueError(
                f"buckets: no size of about {resolution[0]}x{resolution[1]} pixels has sides that are multiples of "
                f"{self.divisor}, at least {self.min_side}, and a ratio of at most {self.max_aspect}."
            )
        return sorted(found)


def assign(sizes: np.ndarray, candidates: list[tuple[int, int]], min_images: int = 1):
    """
    Assign each image the candidate size whose aspect ratio is nearest to its own.

    Args:
        sizes: (N, 2), height and width of the images in pixels.
        candidates: (height, width) of each bucket.
        min_images: drop candidates that fewer images get.

    Returns:
        The candidates in use, in their order, and (N,) int64: the number of each image's bucket among them.
    """
    aspects = np.log(sizes[:, 0] / sizes[:, 1])
    kept = list(range(len(candidates)))
    while True:
        ratios = np.array([math.log(candidates[i][0] / candidates[i][1]) for i in kept])
        best = np.empty(len(aspects), np.int64)
        for start in range(0, len(aspects), 1 << 16):  # of a million images and fifty sizes, not all at once
            part = slice(start, start + (1 << 16))
            best[part] = np.abs(aspects[part, None] - ratios).argmin(1)
        counts = Counter(best.tolist())
        unused = [i for i in range(len(kept)) if not counts[i]]
        small = [i for i in range(len(kept)) if 0 < counts[i] < min_images]
        if not small or len(kept) == 1:
            break
        # One at a time, the smallest first: the images it gives away may make another large enough.
        dropped = {*unused, min(small, key=lambda i: (counts[i], i))}
        kept = [bucket for i, bucket in enumerate(kept) if i not in dropped]
    used = [i for i in range(len(kept)) if counts[i]]
    renumbered = np.full(len(kept), -1)
    renumbered[used] = range(len(used))
    return [candidates[kept[i]] for i in used], renumbered[best]
