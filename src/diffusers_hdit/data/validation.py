"""Decodes every image of a source before any work, and remembers what could be read."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from .transforms import DTYPES


# A JPEG's whole stream is read at any scale, so that what is missing or broken is found at the quickest too.
QUICKEST = (1, 1)
# Of the pixels as found, not as the model takes them, so that one verdict serves all settings: "image" or the dtype
# of an array (see `pixels.Decoded.kind`), then its shape, (height, width) for an image.
Facts = tuple[str, tuple[int, ...]]


def check(source, cache_dir) -> tuple[list[Facts | None], dict[str, str]]:
    """Decodes what no manifest vouches for -> facts of each image or None, {name: error} of the unreadable."""
    manifest = manifest_path(f"checked-{source.identity}", cache_dir) if source.identity else None
    known = _read_manifest(manifest, source.identity) if manifest else {}
    keys = [(name, *stamp) for name, stamp in zip(source.names, source.stamps, strict=True)]
    facts, errors = [known.get(key) for key in keys], {}
    todo = [i for i, fact in enumerate(facts) if fact is None]
    for i, outcome in zip(todo, _facts_of(source, todo), strict=True):
        if isinstance(outcome, tuple):
            facts[i] = outcome
        else:
            errors[source.names[i]] = outcome
    if manifest and len(errors) < len(todo):
        # Only what could be read is remembered: an unreadable image may have been the disk's or a permission's fault.
        vouched = [[*key, kind, *shape] for key, (kind, shape) in _readable(keys, facts)]
        write_json(manifest, {"source": source.identity, "images": vouched})
    return facts, errors


def _readable(keys, facts):
    return ((key, fact) for key, fact in zip(keys, facts, strict=True) if fact is not None)


def _facts_of(source, indices) -> Iterator[Facts | str]:
    def fact_of(i):
        try:
            decoded = source.read(i, QUICKEST)
            return (decoded.kind, decoded.size if decoded.kind == "image" else decoded.pixels.shape)
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
            return f"{type(error).__name__}: {error}"

    if not indices:
        return
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In blocks: a million waiting tasks take memory and would hold up an interrupt.
        blocks = (pool.map(fact_of, indices[start : start + 256]) for start in range(0, len(indices), 256))
        yield from tqdm(chain.from_iterable(blocks), "Checking images", len(indices), delay=2, leave=False)


def manifest_path(name, cache_dir):
    """`KIND-HASH.json` in the folder for such things, for a name `KIND-...`."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(base, "diffusers_hdit")
    kind, _, rest = name.partition("-")
    key = hashlib.sha256(f"2 {rest}".encode("utf-8", "surrogatepass")).hexdigest()[:32]  # 2: version of the format
    return os.path.join(cache_dir, f"{kind}-{key}.json")


def _read_manifest(path, identity) -> dict[tuple, Facts]:
    """{(name, bytes, mtime_ns): facts}; empty if there is no manifest, or none that can be trusted."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["source"] != identity:
            return {}
        images = {
            (name, int(n), int(t)): (str(kind), tuple(int(side) for side in shape))
            for name, n, t, kind, *shape in manifest["images"]
        }
        kinds = ("image", *DTYPES)
        sound = all(kind in kinds and len(shape) in (2, 3) and min(shape) > 0 for kind, shape in images.values())
        return images if sound else {}
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return {}


def write_json(path, content) -> None:
    temporary = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(temporary, path)
    except OSError:  # a full or read-only cache costs the next start its speed, nothing else
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
