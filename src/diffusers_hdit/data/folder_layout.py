"""Find out what the folders of a data set mean: splits, such as train/ and test/, and classes."""

import re
import warnings
from collections import Counter


# The words and separators of Hugging Face's ImageFolder.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = re.compile("[-._ 0-9]+")

Path = tuple[str, ...]  # names of folders from the outermost on, then of the file


def split_of(folder: str) -> str | None:
    """Return which split the name of a folder stands for ("train2017" -> "train"), or None."""
    words = SEPARATORS.split(folder.lower())
    return next((split for split, names in SPLITS.items() if any(word in names for word in words)), None)


def take_split(paths: list[Path], split: str, location: str) -> tuple[list[int], list[Path]]:
    """
    Select the images of a split where folders are splits, as in `train/cat/1.png` or `cat/train/1.png`.

    Folders of one level are splits if they stand for two different ones, or if all images lie in the one asked for: a
    class may be called "train", but hardly another one "test". Without such folders all images are taken.

    Args:
        paths: of all images.
        split: "train", "validation", "test", or "all": take all images, and regard no folder as a split.
        location: of the data set, for messages.

    Returns:
        Which images are taken, and the folders that each of these lies in, other than that of the split.

    Raises:
        ValueError: there are splits, but not this one.
    """
    level, splits = (None, {}) if split == "all" else _find_splits(paths, split)
    if level is None:
        if split not in ("train", "all"):
            raise ValueError(f"split={split!r}: {location} has no folder of this split, such as {split}/.")
        return list(range(len(paths))), [path[:-1] for path in paths]
    found = [splits.get(path[level]) if len(path) > level + 1 else None for path in paths]
    taken = [i for i, one in enumerate(found) if one == split]
    if not taken:
        raise ValueError(
            f"split={split!r} is not in {location}; the splits that its folders stand for: "
            f"{sorted(set(found) - {None})}. 'all' takes all images."
        )
    if len(taken) < len(paths):
        others = Counter(
            f"{path[level]}/" if len(path) > level + 1 else "no folder of a split"
            for path, one in zip(paths, found, strict=True)
            if one != split
        )
        warnings.warn(
            f"split={split!r} takes {len(taken)} of {len(paths)} images in {location} and leaves out those in "
            f"{listed([f'{name} ({count})' for name, count in others.most_common()], 5)}. split='all' takes all."
        )
    return taken, [paths[i][:level] + paths[i][level + 1 : -1] for i in taken]


def _find_splits(paths, wanted) -> tuple[int | None, dict[str, str | None]]:
    """Return the level whose folders are splits, and {name of a folder: split}."""
    for level in range(max(map(len, paths)) - 1):
        splits = {name: split_of(name) for name in {path[level] for path in paths if len(path) > level + 1}}
        found = set(splits.values()) - {None}
        complete = None not in splits.values() and all(len(path) > level + 1 for path in paths)
        if len(found) > 1 or (complete and wanted in found):
            return level, splits
    return None, {}


def class_folders(folders: list[Path], depth: int | None, names: list[str], location: str) -> list[str]:
    """
    Return for each image the name of the folder that is its class.

    Args:
        folders: that each image lies in, the outermost first.
        depth: 1 is the outermost folder, 2 the next; -1 the one that the image lies in, -2 the one around it. None
            takes the innermost whose names differ if all images lie equally deep, else the outermost whose names
            differ, and warns where that leaves a choice.
        names: of the images, for messages; so is `location`, of the data set.

    Raises:
        ValueError: images do not lie that deep; they are named.
    """
    needed = 1 if depth is None else abs(depth)
    shallow = [name for name, folder in zip(names, folders, strict=True) if len(folder) < needed]
    if shallow:
        raise ValueError(
            f"the classes are to be the {'sub-folders' if needed == 1 else f'folders at depth {depth}'} of {location}, "
            f"but {len(shallow)} of {len(names)} images lie in none: {listed(shallow, 5)}. Sort them into one folder "
            "for each class, list them in a metadata.csv, or leave label_column out."
        )
    if depth is not None:
        return [folder[depth - 1 if depth > 0 else depth] for folder in folders]
    depths = sorted({len(folder) for folder in folders})
    found = {level + 1: sorted({folder[level] for folder in folders}) for level in range(depths[0])}
    choices = [level for level, classes in found.items() if len(classes) > 1] or [1]
    chosen = choices[0] if len(depths) > 1 else choices[-1]
    found[-1] = sorted({folder[-1] for folder in folders})
    numbers = (*choices, *([-1] if len(depths) > 1 else []))
    others = [f"{n} for {listed(found[n], 3)}" for n in numbers if found[n] != found[chosen]]
    if others:
        warnings.warn(
            f"the images in {location} lie {' or '.join(map(str, depths))} folders deep. The classes are the folders at "
            f"depth {chosen}, {listed(found[chosen], 3)}; class_folder_depth takes others: {'; '.join(others)}."
        )
    return [folder[chosen - 1] for folder in folders]


def listed(names, limit: int) -> str:
    """Return the first names, with the errors if `names` is a dict of them, and how many more there are."""
    named = [f"{name!r} ({names[name]})" if isinstance(names, dict) else repr(name) for name in list(names)[:limit]]
    return ", ".join(named) + (f" and {len(names) - limit} more" if len(names) > limit else "")
