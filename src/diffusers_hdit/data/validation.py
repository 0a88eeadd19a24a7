"""Decode every image of a source once before any work starts, and remember what could be read."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..utils.files import default_cache_dir, write_atomically
from .transforms import DTYPES


# A JPEG's whole stream is read at any scale, so that the smallest finds what is missing or broken, too.
SMALLEST = (1, 1)
MANIFEST_VERSION = 3  # 3: palettes of TIFFs are applied


class ImageInfo(NamedTuple):
    """What is known of an image as it was found, whatever the model makes of it, so that it serves all settings."""

    content_type: str  # "image", or the dtype of an array: see `transforms.Decoded.content_type`
    shape: tuple[int, ...]  # of an array; (height, width) of an image


def check_images(source, cache_dir) -> tuple[list[ImageInfo | None], dict[str, str]]:
    """
    Decode each image that the manifest of an earlier check does not vouch for.

    Args:
        source: an [`ImageSource`].
        cache_dir: folder of the manifests; None: the default one.

    Returns:
        What is known of each image, None for unreadable ones, and {name: error} of these.
    """
    manifest = manifest_path("checked", source.cache_key, cache_dir) if source.cache_key else None
    known = _read_manifest(manifest, source.cache_key) if manifest else {}
    keys = [(name, *stamp) for name, stamp in zip(source.names, source.stamps, strict=True)]
    infos, errors = [known.get(key) for key in keys], {}
    unknown = [i for i, info in enumerate(infos) if info is None]
    for i, outcome in zip(unknown, _decode_all(source, unknown), strict=True):
        if isinstance(outcome, ImageInfo):
            infos[i] = outcome
        else:
            errors[source.names[i]] = outcome
    if manifest and len(errors) < len(unknown):
        # Only what could be read is remembered: an unreadable image may have been the disk's or a permission's fault.
        readable = [[*key, info.content_type, *info.shape] for key, info in zip(keys, infos, strict=True) if info]
        write_manifest(manifest, {"source": source.cache_key, "images": readable})
    return infos, errors


def _decode_all(source, indices) -> Iterator[ImageInfo | str]:
    """Yield what is known of each image, or its error."""

    def decode_one(i):
        try:
            decoded = source.read(i, SMALLEST)
            return ImageInfo(
                decoded.content_type, decoded.size if decoded.content_type == "image" else decoded.pixels.shape
            )
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
            return f"{type(error).__name__}: {error}"

    if not indices:
        return
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In blocks: a million waiting tasks take memory and would hold up an interrupt.
        blocks = (pool.map(decode_one, indices[start : start + 256]) for start in range(0, len(indices), 256))
        yield from tqdm(chain.from_iterable(blocks), "Checking images", len(indices), delay=2, leave=False)


def manifest_path(purpose: str, key: str, cache_dir) -> Path:
    """Return `PURPOSE-HASH.json` in the cache folder, for what is kept under this key."""
    digest = hashlib.sha256(f"{MANIFEST_VERSION} {key}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return default_cache_dir(cache_dir) / f"{purpose}-{digest}.json"


def _read_manifest(path, key) -> dict[tuple, ImageInfo]:
    """Return {(name, bytes, mtime_ns): info}; empty if there is no manifest, or none that can be trusted."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["source"] != key:
            return {}
        images = {
            (name, int(n), int(t)): ImageInfo(content_type, tuple(int(side) for side in shape))
            for name, n, t, content_type, *shape in manifest["images"]
        }
        content_types = ("image", *DTYPES)
        sound = all(
            i.content_type in content_types and len(i.shape) in (2, 3) and min(i.shape) > 0 for i in images.values()
        )
        return images if sound else {}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}


def write_manifest(path: Path, content) -> None:
    with contextlib.suppress(OSError):  # a full or read-only cache costs the next start its speed, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content))
