"""What images come with: labels as class numbers, and numbers or vectors as a normalised condition."""

import json
import math
from collections.abc import Sequence

import numpy as np


MAX_INTEGER_LABEL = 100_000


def number_labels(labels: Sequence | None, class_names: Sequence[str] | None = None):
    """
    Labels as found -> class numbers (N,) int64 and {id: name}, or (None, None) without labels.

    Strings are numbered in sorted order; integers from 0, and those that `class_names` names, stay as they are.
    """
    if labels is None:
        return None, None
    if class_names is None and all(isinstance(label, str) for label in labels):
        class_names = sorted(set(labels))
        ids = {name: i for i, name in enumerate(class_names)}
        labels = [ids[label] for label in labels]
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(labels)} labels are of no class, such as {wrong[0]!r}: "
            "labels must be all strings, or all integers from 0."
        )
    if class_names is None:
        if max(labels) > MAX_INTEGER_LABEL:
            raise ValueError(
                f"integer labels are class ids and go up to {MAX_INTEGER_LABEL}; got {max(labels)}. "
                "Number the classes from 0, or store them as strings."
            )
        class_names = [str(i) for i in range(max(labels) + 1)]
    elif max(labels) >= len(class_names):
        raise ValueError(f"label {max(labels)} is of no class: the column names {len(class_names)} of them, from 0.")
    return np.asarray(labels, np.int64), dict(enumerate(class_names))


def as_vector(value) -> list[float]:
    """A number, a list of numbers, or text that says one of these; ValueError for anything else and for NaN."""
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


def read_conditions(columns: dict[str, Sequence], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """
    Columns of numbers or of vectors of one length -> (N, D) float64 and D names.

    Args:
        columns: {name: N values}.
        names: what each of the N rows is called in errors.

    Returns:
        The values, and the column's name for a number; `v[0]`, `v[1]`, ... for a column v of vectors.

    Raises:
        ValueError: for missing, non-finite or non-numeric values and vectors of several lengths.
    """
    blocks, entries = [], []
    for column, values in columns.items():
        rows, wrong = [], []
        for name, value in zip(names, values, strict=True):
            try:
                rows.append(as_vector(value))
            except (ValueError, TypeError):
                wrong.append(f"{name!r} ({value!r})")
        if wrong:
            raise ValueError(
                f"condition column {column!r}: {len(wrong)} of {len(names)} rows have no finite number or list of "
                f"numbers: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Repair or remove these rows."
            )
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            short = next(n for n, row in zip(names, rows, strict=True) if len(row) == lengths[0])
            raise ValueError(
                f"condition column {column!r} has vectors of {lengths[0]} to {lengths[-1]} numbers (the shortest: "
                f"{short!r}); all must have one length."
            )
        blocks.append(np.asarray(rows, np.float64))
        is_number = lengths == [1] and not isinstance(values[0], (list, tuple))
        entries += [column] if is_number else [f"{column}[{i}]" for i in range(lengths[0])]
    return np.concatenate(blocks, axis=1), entries


def statistics(values: np.ndarray, names: Sequence[str]) -> dict[str, list]:
    """
    {"names", "mean", "std"} of conditions (N, D), as `HDiTPipeline` keeps them.

    Raises:
        ValueError: for a condition that is the same everywhere, which nothing can be learnt from.
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
    """Statistics that somebody gives, in the order of `names`; ValueError if they do not fit."""
    if not isinstance(given, dict) or set(given) - {"names"} != {"mean", "std"}:
        raise ValueError(f'condition_statistics must be {{"mean": [...], "std": [...]}}; got {given!r}.')
    mean, std = ([float(v) for v in given[key]] for key in ("mean", "std"))
    if list(given.get("names", names)) != list(names) or not len(mean) == len(std) == len(names):
        raise ValueError(f"condition_statistics must have an entry for each of {list(names)}; got {given!r}.")
    if not all(math.isfinite(m) for m in mean) or not all(s > 0 and math.isfinite(s) for s in std):
        raise ValueError(f"condition_statistics: means must be finite and deviations positive; got {given!r}.")
    return {"names": list(names), "mean": mean, "std": std}


def normalised(values: np.ndarray, statistics: dict[str, list]) -> np.ndarray:
    """(N, D) or (D,) float32 of mean 0 and deviation 1."""
    return ((values - np.asarray(statistics["mean"])) / np.asarray(statistics["std"])).astype(np.float32)
