"""Convert what images come with: labels to class ids, and numbers or vectors to a normalised condition."""

import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .folder_layout import listed


MAX_INTEGER_LABEL = 100_000
# So many classes of one image each, and more than half of all: these may be names of images.
MANY_SINGLE_IMAGES = 5


# ----------------------------------------------------------------------------------------------------------------------
# Labels


def number_labels(labels: Sequence | None, class_names: Sequence[str] | None = None, what: str = "the labels"):
    """
    Convert labels to class ids.

    Args:
        labels: N texts, which are numbered in sorted order; or N integers from 0, which are class ids already.
        class_names: the names of all classes, where integers have such.
        what: the labels are called so in errors.

    Returns:
        (N,) int64 and {id: name}; (None, None) without labels.

    Raises:
        ValueError: labels of several types, below 0 or too large.
    """
    if labels is None:
        return None, None
    if class_names is None and all(isinstance(label, str) for label in labels):
        return _number_texts(labels, sorted(set(labels)))
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} of {len(labels)} labels are of no class, such as {wrong[0]!r}: "
            "labels must be all strings, or all integers from 0."
        )
    if class_names is None:
        if max(labels) > MAX_INTEGER_LABEL:
            raise ValueError(
                f"{what}: integer labels are class ids and go up to {MAX_INTEGER_LABEL}; got {max(labels)}. "
                "Number the classes from 0, or store them as strings."
            )
        class_names = [str(i) for i in range(max(labels) + 1)]
    elif max(labels) >= len(class_names):
        raise ValueError(f"{what}: {max(labels)} is of no class; the column names {len(class_names)} of them, from 0.")
    return np.asarray(labels, np.int64), dict(enumerate(class_names))


def number_untyped_labels(labels: Sequence, what: str = "the labels"):
    """
    Convert labels from a file whose texts may be numbers, see [`number_labels`].

    Texts stay texts, so that "01" and "1" are two classes and only those that occur are numbered; but if all of them
    are whole numbers, their order is that of the numbers, 9 before 10.

    Raises:
        ValueError: as [`number_labels`]; or all texts are numbers, and some are negative or no finite number.
    """
    classes = set(labels) if all(isinstance(label, str) for label in labels) else ()
    if not classes:
        return number_labels(labels, what=what)
    try:
        wrong = sorted(text for text in classes if not 0 <= float(text) < math.inf)
    except ValueError:
        wrong = []
    if wrong:
        raise ValueError(
            f"{what}: all are numbers, and {listed(wrong, 3)} cannot number a class. Label these images, remove them "
            "from the data set, or give the classes names."
        )
    whole = all(re.fullmatch("[0-9]{1,18}", text) for text in classes)
    return _number_texts(labels, sorted(classes, key=lambda text: (int(text), text) if whole else text))


def _number_texts(labels, class_names):
    ids = {name: i for i, name in enumerate(class_names)}
    return np.asarray([ids[label] for label in labels], np.int64), dict(enumerate(class_names))


def count_classes(labels: np.ndarray, id2label: dict[int, str]) -> dict[str, int]:
    """Return {name of a class: number of its images}, and warn of classes that seem to be a mistake."""
    counts = dict(zip(id2label.values(), np.bincount(labels, minlength=len(id2label)).tolist(), strict=True))
    empty = [name for name, count in counts.items() if not count]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(counts)} classes have no image: {listed(empty, 5)}. Integer labels are class ids, "
            "counted from 0; labels that are texts are numbered as they occur."
        )
    single = [name for name, count in counts.items() if count == 1]
    if len(single) >= MANY_SINGLE_IMAGES and 2 * len(single) > len(counts) - len(empty):
        warnings.warn(f"{len(single)} of {len(counts)} classes have one image only: {listed(single, 5)}.")
    plain = Counter(unicodedata.normalize("NFKC", name).casefold().strip() for name in counts)
    alike = [name for name in counts if plain[unicodedata.normalize("NFKC", name).casefold().strip()] > 1]
    if alike:
        warnings.warn(f"classes differ in nothing but case, spaces or the encoding of accents: {listed(alike, 6)}.")
    return counts


def describe_classes(counts: dict[str, int], limit: int = 20) -> str:
    """Return "3 classes: cat (10), dog (12), owl (9)", with `limit` of them at most."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:limit])
    return f"{len(counts):,} classes: {shown}" + (f" and {len(counts) - limit:,} more" if len(counts) > limit else "")


# ----------------------------------------------------------------------------------------------------------------------
# Conditions


def as_vector(value) -> list[float]:
    """Return a number, a list of numbers, or text that says one of these, as a list; ValueError if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = float(value)  # such as 1. or +3, or the ValueError that says what is wrong
    values = value.tolist() if hasattr(value, "tolist") else value
    values = values if isinstance(values, list) else [values]
    if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"{value!r} is no number and no list of numbers")
    return [float(v) for v in values]


def read_conditions(
    columns: dict[str, Sequence], names: Sequence[str], location: str = "the source"
) -> tuple[np.ndarray, list[str]]:
    """
    Read columns of numbers, or of vectors of one length each.

    Args:
        columns: {name: N values}.
        names: what each of the N rows is called in errors, and `location` the data set.

    Returns:
        (N, D) float64, and D names: the column's for a number; `v[0]`, `v[1]`, ... for a column v of vectors.

    Raises:
        ValueError: missing, non-finite or non-numeric values, and vectors of several lengths.
    """
    blocks, entries = [], []
    for column, values in columns.items():
        rows, wrong = [], []
        for name, value in zip(names, values, strict=True):
            try:
                rows.append(as_vector(value))
            except (ValueError, TypeError, OverflowError, RecursionError):
                wrong.append(f"{name!r} ({value!r})")
        if wrong:
            raise ValueError(
                f"condition column {column!r} of {location}: {len(wrong)} of {len(names)} rows have no finite number or list of "
                f"numbers: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Repair or remove these rows."
            )
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            short = next(n for n, row in zip(names, rows, strict=True) if len(row) == lengths[0])
            raise ValueError(
                f"condition column {column!r} of {location} has vectors of {lengths[0]} to {lengths[-1]} numbers (the shortest: "
                f"{short!r}); all must have one length."
            )
        blocks.append(np.asarray(rows, np.float64))
        is_number = lengths == [1] and not isinstance(values[0], (list, tuple))
        entries += [column] if is_number else [f"{column}[{i}]" for i in range(lengths[0])]
    return np.concatenate(blocks, axis=1), entries


def compute_statistics(values: np.ndarray, names: Sequence[str]) -> dict[str, list]:
    """
    Return {"names", "mean", "std"} of conditions (N, D), as `HDiTPipeline` keeps them.

    Raises:
        ValueError: a condition is the same everywhere, so that nothing can be learnt from it.
    """
    mean, std = values.mean(0), values.std(0)
    constant = [names[i] for i in range(len(names)) if not std[i] > 1e-9 * max(1.0, abs(mean[i]))]
    if constant:
        raise ValueError(
            f"condition column {constant[0]!r} is {values[0][list(names).index(constant[0])]:g} in all "
            f"{len(values)} images: leave it out."
        )
    return {"names": list(names), "mean": mean.tolist(), "std": std.tolist()}


def check_statistics(given: dict, names: Sequence[str]) -> dict[str, list]:
    """Return the statistics that a user gave, completed by `names`; ValueError if they do not fit."""
    try:
        if set(given) - {"names"} != {"mean", "std"}:
            raise TypeError
        mean, std = ([float(v) for v in given[key]] for key in ("mean", "std"))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f'condition_statistics must be {{"mean": [...], "std": [...]}}, lists of numbers; got {given!r}.'
        ) from None
    if list(given.get("names", names)) != list(names) or not len(mean) == len(std) == len(names):
        raise ValueError(f"condition_statistics must have an entry for each of {list(names)}; got {given!r}.")
    if not all(math.isfinite(m) for m in mean) or not all(s > 0 and math.isfinite(s) for s in std):
        raise ValueError(f"condition_statistics: means must be finite and deviations positive; got {given!r}.")
    return {"names": list(names), "mean": mean, "std": std}


def normalise(values: np.ndarray, statistics: dict[str, list]) -> np.ndarray:
    """Shift and scale conditions (N, D) or (D,) to mean 0 and standard deviation 1, float32."""
    return ((values - np.asarray(statistics["mean"])) / np.asarray(statistics["std"])).astype(np.float32)
