"""Images per second of the loader alone, to see that it keeps up with a GPU.

    python benchmarks/data_loading.py [--photographs FILE ...] [--workers 1 2 4] [--rounds 5]

Writes JPEGs as they are in ImageNet, 500x375 pixels and about 110 kB, and some of 2000x1500, made from photographs (or
from the faces that come with the project), with grain added until the files have that size: decoding takes time for
bytes. Then it loads them at 256x256 with random crops, in three ways that take turns in every round:

    plain      decode all pixels, scale the whole image, crop, convert: what torchvision-like transforms do
    loader     `load_images` and `make_loader`: smaller decoding, only what the crop needs is scaled
    cached     the same from the second epoch on, with the images in memory

Several workers need as many cores. The figure to beat: `--gmac`, `--tflops` and `--efficiency` say how many images a
GPU takes, 3 times the multiply-accumulates of a forward pass an image, two operations each.
"""

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_hdit.data import load_images, make_loader


FACES = Path(__file__).parents[1] / "src" / "diffusers_hdit" / "data" / "fluent_faces_64.png"
# (width, height), bytes, share of --images: as in ImageNet, and from a camera.
KINDS = {"500x375": ((500, 375), 110_000, 1), "2000x1500": ((2000, 1500), 1_200_000, 0.2)}


def photographs(files: list[Path]) -> list[Image.Image]:
    """In the proportions of the images to be made."""
    if not files:
        sheet = Image.open(FACES).convert("RGB")
        return [sheet.crop((x, y, x + 256, y + 192)) for x in range(0, 768, 96) for y in range(0, 320, 96)]
    images = [Image.open(path).convert("RGB") for path in files]
    return [
        image.crop((left, 0, left + image.height * 4 // 3, image.height))
        for image in images
        for left in range(0, image.width - image.height * 4 // 3 + 1, image.height // 4)
    ]


def encode(photograph: Image.Image, size: tuple[int, int], wanted: int, seed: int) -> bytes:
    pixels = np.asarray(photograph.resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(seed).normal(size=pixels.shape).astype(np.float32)
    low, high, best = 0.0, 60.0, b""
    for _ in range(6):
        strength = (low + high) / 2
        buffer = io.BytesIO()
        noisy = np.clip(pixels + strength * grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        best = buffer.getvalue()
        low, high = (strength, high) if len(best) < wanted else (low, strength)
    return best


def write_images(folder: Path, sources: list[Image.Image], kind: str, count: int) -> float:
    """Mean bytes."""
    size, wanted, _ = KINDS[kind]
    folder.mkdir()
    different = min(count, 24)
    encoded = [encode(sources[i * len(sources) // different], size, wanted, i) for i in range(different)]
    for i in range(count):
        (folder / f"{i:05}.jpg").write_bytes(encoded[i % different])
    return statistics.mean(map(len, encoded))


class Plain(torch.utils.data.Dataset):
    """The images of a folder, the usual way."""

    def __init__(self, dataset):
        self.dataset, self.files = dataset, [dataset.source._path(name) for name in dataset.source.names]

    def __getitem__(self, item):
        image = Image.open(self.files[item.index]).convert("RGB")
        scale = 256 / min(image.size)
        size = [max(256, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
        top, left = (int(at * (side - 255)) for at, side in zip(item.crop, size[::-1], strict=True))
        image = image.crop((left, top, left + 256, top + 256))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return {"image": pixels, "number": item.number, "index": item.index}


def batches(dataset, source, batch_size, num_workers):
    loader = make_loader(source, batch_size=batch_size, seed=0, num_workers=num_workers)
    if dataset is not source:
        workers = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=loader.batch_sampler, num_workers=num_workers, **workers
        )
    return iter(loader)


def rate(iterator, count, batch_size) -> float:
    start = time.perf_counter()
    for _ in islice(iterator, count):
        pass
    return count * batch_size / (time.perf_counter() - start)


def measure(folder, num_workers, images, args) -> dict[str, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, cached = (load_images(train_data_dir=folder, resolution=256, cache_images=on) for on in (False, True))
    ways = {"plain": (Plain(plain), plain), "loader": (plain, plain), "cached": (cached, cached)}
    per_round = max(2 * num_workers, images // args.batch_size)
    rates = {name: [] for name in ways}
    for name in ways:
        # A new set of workers for each way, so that only one set is alive at a time.
        iterator = batches(*ways[name], args.batch_size, num_workers)
        # What was prepared ahead, and the first epoch of the cache, are not counted.
        rate(iterator, 4 * num_workers + 1 + (per_round if name == "cached" else 0), args.batch_size)
        ways[name] = iterator
        if num_workers:
            rates[name] = [rate(iterator, per_round, args.batch_size) for _ in range(args.rounds)]
            ways[name] = iterator = None
    if not num_workers:
        for _ in range(args.rounds):
            for name, iterator in ways.items():
                rates[name].append(rate(iterator, per_round, args.batch_size))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", default=[], help="images to make the JPEGs from")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: in this process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=320, help="a round, and in the folder")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--gmac", type=float, default=197.6, help="of a forward pass (imagenet-256)")
    parser.add_argument("--tflops", type=float, default=989, help="of the GPU at its peak (H200, bfloat16)")
    parser.add_argument("--efficiency", type=float, default=0.45, help="share of the peak that training reaches")
    args = parser.parse_args()
    torch.set_num_threads(1)
    needed = args.tflops * args.efficiency * 1e12 / (3 * 2 * args.gmac * 1e9)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Pillow {Image.__version__}")
    print(
        f"A GPU of {args.tflops:g} TFLOP/s at {args.efficiency:.0%} trains {args.gmac:g} GMAC at {needed:.0f} images/s"
    )
    sources = photographs(args.photographs)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        for kind in args.kinds:
            images = max(args.batch_size, int(args.images * KINDS[kind][2]))
            size = write_images(Path(scratch) / kind, sources, kind, images)
            print(f"\n{kind}, {size / 1000:.0f} kB -> 256x256; images/s, median (least to most)")
            for num_workers in args.workers:
                rates = measure(Path(scratch) / kind, num_workers, images, args)
                cells = [f"{k} {statistics.median(v):6.0f} ({min(v):.0f} to {max(v):.0f})" for k, v in rates.items()]
                middle = {name: statistics.median(values) for name, values in rates.items()}
                where = f"{num_workers} workers" if num_workers else "in this process"
                print(f"  {where:<16}{'   '.join(cells)}   loader/plain {middle['loader'] / middle['plain']:.2f}x")
                each = middle["loader"] / max(1, num_workers)
                print(f"  {'':<16}{each:.0f} a worker: {needed / each:.1f} workers keep up with the GPU")


if __name__ == "__main__":
    main()
