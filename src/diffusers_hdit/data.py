"""From "my images" to batches of uint8 tensors: sources, a reading check before any work, and an endless order.

    dataset = load_images(train_data_dir="flowers", label_column="label", resolution=64, cache_dir=None)
    order = ShuffledBatches(len(dataset), batch_size=32, seed=0, start=images_already_seen)
    for batch in DataLoader(dataset, batch_sampler=order, num_workers=4):
        images, labels = to_float(batch["image"]), batch["label"]          # (32, 3, 64, 64) in [-1, 1], (32,)

`ShuffledBatches` already divides the batches among processes: don't pass the loader through `accelerator.prepare`.
Shapes: C channels, H and W the resolution.
"""

import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from PIL import Image


EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_UNREADABLE = 0.01
MAX_INTEGER_LABEL = 100_000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# The EXIF orientation tag (274) -> what makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_images(
    *,
    train_data_dir=None,
    dataset_name=None,
    dataset_config_name=None,
    cache_dir=None,
    split="train",
    image_column="image",
    label_column=None,
    resolution,
    in_channels=3,
    center_crop=False,
) -> "ImageDataset":
    """Opens a source of images, having decoded every image in it once.

    Args:
        train_data_dir: a folder of images, searched recursively; or a `.png` sheet with a `.json` beside it: square
            cells in row order, and a list with one object (`{"label": ...}`) a cell.
        dataset_name: a Hugging Face dataset: a name on the Hub, or a local path (also of `Dataset.save_to_disk`).
        dataset_config_name, split, image_column: what to take from `dataset_name`.
        cache_dir: where the verdict of the check is kept, and given to `datasets.load_dataset`; None: their defaults
            (here `$XDG_CACHE_HOME/diffusers_hdit`, or `~/.cache/diffusers_hdit`).
        label_column: None gives images without labels. With a folder, any name makes its first-level sub-folders, in
            sorted order, the classes. Otherwise the column (in a sheet the key) of the labels: ClassLabels and
            integers from 0 keep their ids, strings are numbered in sorted order.
        resolution: an int, or (height, width).
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        center_crop: see [`ImageDataset`].

    Unreadable images are named in a warning and left out; images smaller than `resolution` are counted in one. Where
    several processes start together, let one go first (`accelerator.main_process_first()`): the others reuse its check.

    Raises:
        ValueError: arguments, columns or labels that don't fit, no images, or more than 1 % of them unreadable.
        FileNotFoundError: `train_data_dir` does not exist.
        ImportError: `dataset_name` without the `datasets` package.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError(f"give either train_data_dir or dataset_name; got {train_data_dir!r} and {dataset_name!r}.")
    if train_data_dir is None:
        source = _Rows(dataset_name, dataset_config_name, cache_dir, split, image_column, label_column)
    elif dataset_config_name is not None:
        raise ValueError(f"dataset_config_name={dataset_config_name!r} belongs to dataset_name, not train_data_dir.")
    elif not os.path.exists(train_data_dir):
        raise FileNotFoundError(f"train_data_dir {os.fspath(train_data_dir)!r} does not exist.")
    else:
        source = (_Folder if os.path.isdir(train_data_dir) else _Sheet)(os.fspath(train_data_dir), label_column)

    dataset = ImageDataset(source, resolution, in_channels=in_channels, center_crop=center_crop)
    sizes, errors = _check(source, cache_dir)
    if len(errors) > MAX_UNREADABLE * len(sizes):
        raise ValueError(
            f"{len(errors)} of {len(sizes)} images in {source.where} cannot be read; at most {MAX_UNREADABLE:.0%} may. "
            f"Repair or remove them: {_listed(errors, 5)}."
        )
    if errors:
        warnings.warn(f"{len(errors)} of {len(sizes)} images cannot be read and are skipped: {_listed(errors, 20)}.")
    dataset.skipped = list(errors)
    dataset.kept = [i for i, size in enumerate(sizes) if size]
    height, width = dataset.resolution
    small = sum(sizes[i][0] < width or sizes[i][1] < height for i in dataset.kept)
    if small:
        warnings.warn(f"{small} of {len(dataset)} images are smaller than {height}x{width} and will be enlarged.")
    return dataset


class ImageDataset(torch.utils.data.Dataset):
    """Images of one size; `load_images` builds it. Picklable, so that DataLoader workers can have it.

    `dataset[i]` is `{"image": uint8 (C, H, W), "label": int}`, "label" only where there are labels. An image is scaled
    to cover (H, W), antialiased, and cropped: always in the middle with `center_crop`; else at the place that
    `dataset[i, (y, x)]` names, from 0 (top, left) to 1; else at one drawn from torch's default generator, which
    DataLoader seeds in each worker.

    Attributes:
        resolution: (H, W).
        id2label: {id: name} for every class there is, or None without labels.
        skipped: names of the images that could not be read.
    """

    def __init__(self, source, resolution, in_channels=3, center_crop=False):
        size = tuple(resolution) if isinstance(resolution, (list, tuple)) else (resolution, resolution)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"resolution must be a positive int or (height, width) of such; got {resolution!r}.")
        if in_channels not in MODES:
            raise ValueError(f"in_channels={in_channels!r}: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels.")
        self.source, self.resolution, self.in_channels, self.center_crop = source, size, in_channels, center_crop
        self.id2label = source.id2label
        self.kept, self.skipped = list(range(len(source.names))), []

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        index, crop = index if isinstance(index, tuple) else (index, None)
        i = self.kept[index]
        try:
            image = self.source.read(i)
        except Exception as error:
            raise OSError(f"{self.source.names[i]!r} in {self.source.where} can no longer be read: {error}") from error
        item = {"image": self.transform(image, crop)}
        if self.id2label is not None:
            item["label"] = self.source.labels[i]
        return item

    def transform(self, image: Image.Image, crop: tuple[float, float] | None = None) -> torch.Tensor:
        """An image in mode L, RGB or RGBA -> uint8 (C, H, W). `crop`: as in `dataset[i, crop]`."""
        image = _to_mode(image, MODES[self.in_channels])
        (height, width), (w, h) = self.resolution, image.size
        scale = max(height / h, width / w)
        # In whole output pixels, so that an image that needs no scaling is cut out, not interpolated.
        spare_y, spare_x = max(0, h * width // w - height), max(0, w * height // h - width)
        if self.center_crop or not (spare_y or spare_x):
            crop = (0.5, 0.5)
        y, x = torch.rand(2).tolist() if crop is None else crop
        top, left = min(int(y * (spare_y + 1)), spare_y) / scale, min(int(x * (spare_x + 1)), spare_x) / scale
        # Resizing the box gives what resizing all and then cropping would, without the huge image that scaling a
        # very long one makes. Rounding may put its end just outside.
        box = (left, top, min(w, left + width / scale), min(h, top + height / scale))
        pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
        return torch.from_numpy(pixels.reshape(height, width, self.in_channels)).permute(2, 0, 1).contiguous()


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], same shape and device. TypeError for any other dtype."""
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float takes uint8 images; got {images.dtype}, which may be scaled already.")
    return images.to(torch.float32) / 127.5 - 1


class ShuffledBatches(torch.utils.data.Sampler):
    """Endless batches of indices, a pure function of (seed, image number): the `batch_sampler` of a DataLoader.

    Image number c of the run (0, 1, 2, ... over all processes) is element c mod N of the permutation of epoch c div N,
    which is drawn from (seed, epoch). Each step takes the next `batch_size * world_size` numbers, and process `rank`
    the rank-th part of them, so the order does not depend on how many processes share it. Batches straddle epochs; no
    image is dropped or repeated within one.

    Args:
        num_images: N.
        batch_size: images a step in this process.
        start: images the run has seen already, over all processes; a resumed run continues from there.
        crops: yield `(index, (y, x))`, with y and x in [0, 1) drawn from (seed, image number), in place of indices.
            [`ImageDataset`] takes both; these random crops are the same after a resume, for any number of workers.

    Raises:
        ValueError: fewer images than a step takes, or a count or rank out of range.
    """

    def __init__(self, num_images, batch_size, seed, rank=0, world_size=1, start=0, crops=False):
        if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size} must be at least 1, start={start} at least 0 and "
                f"rank={rank} in 0..world_size-1 (world_size={world_size})."
            )
        if num_images < batch_size * world_size:
            raise ValueError(
                f"fewer images than a batch: {num_images} images, but {batch_size} in each of {world_size} processes "
                f"takes {batch_size * world_size}. Lower the batch size or add images."
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, int(seed)
        self.rank, self.world_size, self.start, self.crops = rank, world_size, start, crops

    def __iter__(self) -> Iterator[list]:
        epoch, order = -1, None
        first = self.start + self.rank * self.batch_size
        while True:
            batch = []
            for number in range(first, first + self.batch_size):
                if number // self.num_images != epoch:
                    epoch = number // self.num_images
                    order = self._permutation(epoch)
                index = int(order[number % self.num_images])
                batch.append((index, self._crop(number)) if self.crops else index)
            yield batch
            first += self.batch_size * self.world_size

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mixed_seed("epoch", self.seed, epoch))
        return torch.randperm(self.num_images, generator=generator)

    def _crop(self, number: int) -> tuple[float, float]:
        bits = mixed_seed("crop", self.seed, number)
        return (bits >> 32) / 2**32, bits % 2**32 / 2**32


def mixed_seed(*parts) -> int:
    """64 well-mixed bits; unlike `hash()`, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


# --- Sources: `names`, `stamps` that change with the content, `labels` and `id2label`, `where` for messages,
#     `identity` for the manifest (None: the check is not worth keeping), and `read(i)`.


class _Folder:
    """Image files below a folder."""

    def __init__(self, folder, label_column):
        self.where, self.folder = repr(folder), os.path.abspath(folder)
        self.identity = f"folder {os.path.realpath(folder)}"
        parts = list(_walk(self.folder))
        if not parts:
            raise ValueError(f"no images in {self.where}: looked for {', '.join(EXTENSIONS)}, in sub-folders too.")
        # Names with "/" on every system: they are shown, stamped and compared.
        self.names = ["/".join(p) for p in parts]
        self.stamps = [_stamp(self._path(name)) for name in self.names]
        loose = [name for name, p in zip(self.names, parts, strict=True) if len(p) == 1]
        if label_column is not None and loose:
            raise ValueError(
                f"label_column={label_column!r} takes the classes from the sub-folders of {self.where}, but "
                f"{len(loose)} of {len(parts)} images lie in none: {_listed(loose, 5)}. "
                "Sort them into one folder for each class, or leave label_column out."
            )
        self.labels, self.id2label = _numbered([p[0] for p in parts] if label_column is not None else None)

    def _path(self, name):
        return os.path.join(self.folder, *name.split("/"))

    def read(self, i):
        return _decode(self._path(self.names[i]))


class _Sheet:
    """Square cells, in row order, of one image that stays decoded; a JSON list beside it has an entry for each."""

    def __init__(self, path, label_column):
        self.where, self.identity = repr(path), None
        listing = os.path.splitext(path)[0] + ".json"
        if not path.lower().endswith(".png") or not os.path.isfile(listing):
            raise ValueError(f"{self.where} is neither a folder nor a .png sheet with {listing!r} beside it.")
        with open(listing, encoding="utf-8") as file:
            entries = json.load(file)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{listing!r} must hold a list of objects, one for each cell of {self.where}.")
        if label_column is not None:
            lacking = sum(label_column not in entry for entry in entries)
            if lacking:
                raise ValueError(
                    f"{lacking} entries of {listing!r} lack {label_column!r}; keys: {sorted(entries[0])}."
                )
        self.sheet = _decode(path)
        self.cell = _cell_size(*self.sheet.size, len(entries), self.where)
        self.names = [f"cell {i}" for i in range(len(entries))]
        self.stamps = [(0, 0)] * len(entries)
        labels = [entry[label_column] for entry in entries] if label_column is not None else None
        self.labels, self.id2label = _numbered(labels)

    def read(self, i):
        row, column = divmod(i, self.sheet.width // self.cell)
        left, top = column * self.cell, row * self.cell
        return self.sheet.crop((left, top, left + self.cell, top + self.cell))


class _Rows:
    """Rows of a Hugging Face dataset, whose images are decoded here so that all sources treat them alike."""

    def __init__(self, name, config_name, cache_dir, split, image_column, label_column):
        try:
            import datasets
        except ImportError as error:
            raise ImportError('dataset_name needs `datasets`: pip install "diffusers-hdit[train]"') from error
        self.where = repr(os.fspath(name))
        rows = _open_rows(os.fspath(name), config_name, cache_dir, split).with_format(None)
        for flag, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and column not in rows.column_names:
                raise ValueError(f"{flag}={column!r} is not in {self.where}; its columns: {rows.column_names}.")
        feature = rows.features[image_column]
        if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("string", "binary"):
            raise ValueError(f"image_column={image_column!r} of {self.where} holds {feature}, not images.")
        if not len(rows):
            raise ValueError(f"no images in {self.where}: split {split!r} is empty.")
        self.identity = f"dataset {rows._fingerprint} {image_column}"
        self.names = [f"row {i}" for i in range(len(rows))]
        self.stamps = [(0, 0)] * len(rows)
        labels = rows[label_column][:] if label_column is not None else None
        class_names = getattr(rows.features.get(label_column), "names", None)
        self.labels, self.id2label = _numbered(labels, class_names)
        # Other columns are dropped: a row read brings them all along.
        self.column = image_column
        self.rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def read(self, i):
        image = self.rows[i][self.column]
        if image is None:
            raise ValueError("the row has no image")
        return _decode(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def _open_rows(name, config_name, cache_dir, split):
    import datasets

    is_saved_dict = os.path.isfile(os.path.join(name, "dataset_dict.json"))
    if not is_saved_dict and not os.path.isfile(os.path.join(name, "state.json")):
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    if config_name is not None:
        raise ValueError(f"dataset_config_name={config_name!r}: {name!r} was saved by save_to_disk and has none.")
    saved = datasets.load_from_disk(name)
    # A single dataset may not know which split it was; then it is taken as the default one.
    splits = saved if is_saved_dict else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"split={split!r} is not in {name!r}; its splits: {sorted(splits)}.")
    return splits[split]


def _walk(folder, parts=(), above=()) -> Iterator[tuple[str, ...]]:
    """Path parts of the image files below `folder`, sorted; links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*parts, entry.name), (*above, real))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield (*parts, entry.name)


def _stamp(path):
    try:
        stat = os.stat(path)
        return (stat.st_size, stat.st_mtime_ns)
    except OSError:  # a broken link; reading it will say so
        return (-1, -1)


def _cell_size(width, height, count, where):
    """The largest square that divides the sheet into `count` cells or more, none of the rows being empty.

    No other size leaves every row with an entry, so the answer is unique.
    """
    for columns in range(1, width + 1):
        cell = width // columns
        if width % columns == 0 and height % cell == 0 and columns * (height // cell) >= count:
            if columns * (height // cell - 1) < count:
                return cell
            break
    raise ValueError(f"{where} ({width}x{height}) does not divide into rows of square cells for {count} entries.")


def _numbered(labels, class_names=None):
    """Labels as found -> (ids, {id: name}), or (None, None) without labels."""
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
    return [int(label) for label in labels], dict(enumerate(class_names))


# --- Pixels


def _decode(file) -> Image.Image:
    """A path or binary file -> an upright image in mode L, RGB or RGBA, 8 bits a channel (a GIF's first frame)."""
    with Image.open(file) as image:
        image.load()
        try:
            orientation = image.getexif().get(274)
        except Exception:  # broken EXIF says nothing against the pixels
            orientation = None
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):
            image = _from_16_bits(image)
        if image.has_transparency_data:
            mode = "RGBA"
        else:
            mode = "L" if image.mode in ("1", "L") else "RGB"
        image = image.convert(mode)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _from_16_bits(image):
    """Grey of 16 bits, also where it comes as 32-bit integers: 0..65535 -> 0..255. PIL would clip it at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integer pixels from {values.min()} to {values.max()}, not within 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _to_mode(image, mode):
    if image.mode == "RGBA" and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


# --- The check before any work


def _check(source, cache_dir):
    """Decodes what no manifest vouches for -> ([(width, height) or None], {name: error} of the unreadable)."""
    manifest = _manifest_path(source.identity, cache_dir) if source.identity else None
    known = _read_manifest(manifest, source.identity) if manifest else {}
    keys = [(name, *stamp) for name, stamp in zip(source.names, source.stamps, strict=True)]
    sizes, errors = [known.get(key) for key in keys], {}
    todo = [i for i, size in enumerate(sizes) if size is None]
    for i, outcome in zip(todo, _decoded_sizes(source, todo), strict=True):
        if isinstance(outcome, tuple):
            sizes[i] = outcome
        else:
            errors[source.names[i]] = outcome
    if manifest and len(errors) < len(todo):
        # Only what could be read is remembered: an unreadable image may have been the disk's or a permission's fault.
        vouched = [[*key, *size] for key, size in zip(keys, sizes, strict=True) if size]
        _write_manifest(manifest, {"source": source.identity, "images": vouched})
    return sizes, errors


def _decoded_sizes(source, indices):
    def size_of(i):
        try:
            return source.read(i).size
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
            return f"{type(error).__name__}: {error}"

    if not indices:
        return
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In blocks: a million waiting tasks take memory and would hold up an interrupt.
        blocks = (pool.map(size_of, indices[start : start + 256]) for start in range(0, len(indices), 256))
        yield from tqdm(chain.from_iterable(blocks), "Checking images", len(indices), delay=2, leave=False)


def _manifest_path(identity, cache_dir):
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        cache_dir = os.path.join(base, "diffusers_hdit")
    key = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return os.path.join(cache_dir, f"checked-{key}.json")


def _read_manifest(path, identity):
    """{(name, bytes, mtime_ns): (width, height)}; empty if there is no manifest, or none that can be trusted."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["source"] != identity:
            return {}
        images = {(name, int(n), int(t)): (int(w), int(h)) for name, n, t, w, h in manifest["images"]}
        return images if all(min(size) > 0 for size in images.values()) else {}
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return {}


def _write_manifest(path, manifest):
    temporary = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(manifest, file)
        os.replace(temporary, path)
    except OSError:  # a full or read-only cache costs the next start its speed, nothing else
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


def _listed(names, limit):
    """The first names, with the errors if `names` is a dict of them, and how many more there are."""
    named = [f"{name!r} ({names[name]})" if isinstance(names, dict) else repr(name) for name in list(names)[:limit]]
    return ", ".join(named) + (f" and {len(names) - limit} more" if len(names) > limit else "")
