"""Render perspective views of equirectangular panoramas at random angles: a data set that is not soon memorised.

    python examples/research/make_panorama_views.py --output_dir views --number 6000 --resolution 32 --seed 0

The panoramas that come with the project show 18 places. View i depends on the seed and i only: a larger --number starts
with the same views, and another seed gives other views of the same places, as a held-out set.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers_hdit.utils.files import atomic_path


PANORAMAS = Path(__file__).parents[1] / "data" / "panoramas"
EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg")
PITCH, FIELD_OF_VIEW = (-20.0, 20.0), (60.0, 100.0)  # degrees, the ranges of random angles


def view(panorama: Tensor, yaw: float, pitch: float, field_of_view: float, resolution: int) -> Tensor:
    """
    Return what a pinhole camera sees, `(C, resolution, resolution)`.

    Each pixel is the mean of rays that are nowhere further apart than half a pixel of the panorama.

    Args:
        panorama: equirectangular, `(C, H, W)`: 360° wide, 180° high, yaw 0 in its middle.
        yaw, pitch, field_of_view: degrees; the last over the whole width; pitch is positive upwards.
    """
    _, height, width = panorama.shape
    edge = math.tan(math.radians(field_of_view) / 2)
    # Rays are furthest apart, as angles, in the middle of the image.
    finest = 2 * math.degrees(2 * edge / resolution) * width / 360
    rays = max(2, math.ceil(finest))
    n = resolution * rays
    centres = (2 * torch.arange(n, dtype=torch.float32) + 1) / n - 1
    right, down = edge * centres[None, :].expand(n, n), edge * centres[:, None].expand(n, n)
    sine, cosine = math.sin(math.radians(pitch)), math.cos(math.radians(pitch))
    up, forward = sine - down * cosine, cosine + down * sine
    longitude = torch.atan2(right, forward) / math.pi + yaw / 180
    latitude = torch.atan2(up, torch.hypot(right, forward)) / (math.pi / 2)
    # A column of the other end on both sides: interpolation goes round.
    wrapped = torch.cat((panorama[..., -1:], panorama, panorama[..., :1]), dim=-1)
    longitude = (longitude + 1) % 2 - 1
    grid = torch.stack((longitude * width / (width + 2), -latitude), dim=-1)
    seen = F.grid_sample(wrapped[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(seen, rays)[0]


def find_panoramas(folder: Path) -> list[Path]:
    """
    Raises:
        ValueError: for a folder without images.
    """
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"there are no panoramas in {str(folder)!r}: looked for {', '.join(EXTENSIONS)}.")
    return paths


def make_views(panoramas: list[Path], output_dir: Path, number: int, resolution: int, seed: int) -> None:
    """Write `number` views, of the panoramas in turn."""
    images = []
    for path in panoramas:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    output_dir.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        angles = random.Random(f"{seed} {i}")
        yaw, pitch, field = angles.uniform(-180, 180), angles.uniform(*PITCH), angles.uniform(*FIELD_OF_VIEW)
        pixels = view(images[i % len(images)], yaw, pitch, field, resolution)
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        path = output_dir / f"{i:06d}-{panoramas[i % len(images)].stem}.png"
        with atomic_path(path) as partial:
            Image.fromarray(pixels).save(partial, format="PNG")


def prepare_folder(output_dir: Path, settings: dict) -> None:
    """
    Raises:
        ValueError: for a folder with something else in it than views of these settings.
    """
    about = output_dir / "views.json"
    known = json.loads(about.read_text()) if about.is_file() else None
    if known != settings and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"{str(output_dir)!r} holds {'views of other settings, ' + str(known) if known else 'something else'}: "
            "give another --output_dir. Nothing was changed."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(settings))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panoramas", default=str(PANORAMAS), help="folder of equirectangular images, 2:1")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--number", type=int, default=6000, help="of views")
    parser.add_argument("--resolution", type=int, default=32, help="pixels, of a square")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other views of the same places")
    args = parser.parse_args(argv)
    if args.number < 1 or args.resolution < 1:
        parser.error(f"--number and --resolution must be at least 1, got {args.number} and {args.resolution}.")
    panoramas = find_panoramas(args.panoramas)
    settings = {
        "panoramas": [path.name for path in panoramas],
        "number": args.number,
        "resolution": args.resolution,
        "seed": args.seed,
    }
    prepare_folder(Path(args.output_dir), settings)
    make_views(panoramas, Path(args.output_dir), args.number, args.resolution, args.seed)
    narrowest = min(Image.open(path).width for path in panoramas) * FIELD_OF_VIEW[0] / 360
    if args.resolution > narrowest:
        print(f"The panoramas have no more than {narrowest:.0f} pixels for the narrowest views: those are magnified.")
    print(f"Wrote {args.number} views of {len(panoramas)} places, {args.resolution}×{args.resolution} pixels.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
