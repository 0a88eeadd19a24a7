"""Non-leaking augmentation: geometric changes of training images, of which the network is told, so that it does not
generate changed images when it is told of none.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364, appendix F.2
and table 6. About the centre of the image, in pixels, x to the right and y down, an image point goes through

    translate(N_x W/8, N_y H/8) · rotate(phi) stretch(2^(0.2 |N|), 2^(-0.2 |N|)) rotate(-phi) · rotate(-theta)
        · scale(2^(0.2 N)) · y-flip · x-flip

(the x-flip first; theta and phi uniform over the circle). Each is there with probability a, and a flip that is there
flips half of the time; the x-flip is always there. NVIDIA's EDM code (training/augment.py) composes in this order too.

Where this differs: the stretch takes |N|. The paper's condition (N cos(phi), N sin(phi)) is the same for (-N, phi + pi),
which shrinks where (N, phi) stretches, so the network could not tell which it was. With |N| it can, and neither the
stretches nor the conditions change in distribution, for phi is uniform. The reference implementation (k-diffusion,
augmentation.py) turns about the upper left corner, by angles from 0 to pi only, and applies the inverse map.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


SCALE = ANISOTROPY = 2**0.2
TRANSLATION = 1 / 8
AUGMENT_COND_DIM = 9

UNIFORM_DRAWS, NORMAL_DRAWS = 9, 4  # of each image

CACHED_PIXELS = 2**14


def augment(
    image: Tensor, probability: float, generators: Sequence[torch.Generator] | torch.Generator
) -> tuple[Tensor, Tensor]:
    """
    Change the images, each by random numbers of its own.

    The composed map is resampled once with cubic splines, the borders reflected; images that get smaller in some direction
    are sampled at twice the size and low-passed, against aliasing. An image without any change, or with flips
    only, keeps its values bit for bit. Splines overshoot at edges, and values are not clamped.

    Args:
        image: `(B, C, H, W)` in [-1, 1], float32 (or float64), on any device.
        probability: a of each transformation but the x-flip; at 0 nothing is changed, x-flips included.
        generators: one CPU generator for each image, or one for all. Each image takes the same number of draws whatever
            comes out, so that what happens to it does not depend on the batch.

    Returns:
        The images, and the condition for the network: `(B, 9)` float32, [x-flip, y-flip, log-scale draw, cos(theta) - 1,
        sin(theta), |N| cos(phi), |N| sin(phi), N_x, N_y] with N the stretch's draw; zeros where nothing was done.

    Raises:
        ValueError: for a probability outside [0, 1], another number of generators, an image of another shape or dtype.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of an augmentation lies between 0 and 1, not {probability}.")
    if image.ndim != 4 or image.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are (B, C, H, W) and float32, not {tuple(image.shape)} and {image.dtype}.")
    if isinstance(generators, torch.Generator):
        generators = [generators] * len(image)
    if len(generators) != len(image):
        raise ValueError(f"{len(image)} images need as many generators, or one for all, not {len(generators)}.")
    condition, backward = draw_transforms(probability, generators, *image.shape[2:])
    flips = condition[:, :2].bool()
    moved = condition[:, 2:].any(1)
    # The largest step in the image for a step of a pixel in the result: above 1, detail gets lost.
    shrunk = moved & (torch.linalg.matrix_norm(backward[:, :2, :2], ord=2) > 1 + 1e-6)
    result = image
    if flips.any() or moved.any():
        result = image.clone()
    for chosen, dims in (((flips == torch.tensor(f)).all(1) & ~moved, d) for f, d in FLIPS.items()):
        index = to_device(image.device, chosen.nonzero().flatten())
        if len(index):
            result[index] = image[index].flip(dims)
    for chosen, render in ((moved & ~shrunk, resample), (shrunk, resample_smaller)):
        index = chosen.nonzero().flatten()
        # On a CPU a few at a time, so that what lies between the steps stays in its cache.
        at_once = (
            max(1, CACHED_PIXELS // (image.shape[2] * image.shape[3])) if image.device.type == "cpu" else len(image)
        )
        for part in index.split(at_once) if len(index) else ():
            matrices = to_device(image.device, backward[part].to(image.dtype))
            part = to_device(image.device, part)
            result[part] = render(spline_coefficients(image[part]), matrices)
    return result, to_device(image.device, condition.float())


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Moved without making the device wait, which copying from pageable memory would."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


FLIPS = {(True, False): (3,), (False, True): (2,), (True, True): (2, 3)}


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def draw_transforms(
    probability: float, generators: Sequence[torch.Generator], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """
    The condition `(B, 9)`, and the map from points of the result to points of the image `(B, 3, 3)`, homogeneous, in
    pixels from the centre; both float64 on the CPU.
    """
    if len(generators) == 0:
        return torch.zeros(0, AUGMENT_COND_DIM, dtype=torch.float64), torch.zeros(0, 3, 3, dtype=torch.float64)
    draws = [
        (
            torch.rand(UNIFORM_DRAWS, generator=generator, dtype=torch.float64),
            torch.randn(NORMAL_DRAWS, generator=generator, dtype=torch.float64),
        )
        for generator in generators
    ]
    uniform = torch.stack([u for u, _ in draws]).T
    normal = torch.stack([n for _, n in draws]).T
    do_flip, do_scale, do_rotate, do_stretch, do_translate = (uniform[:5] < probability).double()
    x_flip = (uniform[5] < 0.5).double() * (probability > 0)
    y_flip = (uniform[6] < 0.5) * do_flip
    theta = (2 * uniform[7] - 1) * math.pi * do_rotate
    phi = (2 * uniform[8] - 1) * math.pi * do_stretch
    log_scale, log_stretch = normal[0] * do_scale, normal[1].abs() * do_stretch
    x, y = normal[2:] * do_translate
    condition = torch.stack(
        [
            x_flip,
            y_flip,
            log_scale,
            theta.cos() - 1,
            theta.sin(),
            log_stretch * phi.cos(),
            log_stretch * phi.sin(),
            x,
            y,
        ],
        dim=1,
    )
    backward = [
        scaling(1 - 2 * x_flip, 1 - 2 * y_flip),
        scaling(SCALE**-log_scale, SCALE**-log_scale),
        rotation(theta),
        rotation(phi),
        scaling(ANISOTROPY**-log_stretch, ANISOTROPY**log_stretch),
        rotation(-phi),
        translation(-TRANSLATION * width * x, -TRANSLATION * height * y),
    ]
    return condition, functools.reduce(torch.matmul, backward)


def matrix(rows: Sequence[Sequence]) -> Tensor:
    """`(B, 3, 3)` from rows of numbers and `(B,)` tensors."""
    like = next(x for row in rows for x in row if isinstance(x, Tensor))
    return torch.stack([torch.stack([x + torch.zeros_like(like) for x in row], dim=-1) for row in rows], dim=-2)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def rotation(angle: Tensor) -> Tensor:
    return matrix([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])


def translation(x: Tensor, y: Tensor) -> Tensor:
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]])


# ----------------------------------------------------------------------------------------------------------------------
# Resampling


def spline_coefficients(image: Tensor) -> Tensor:
    """
    Return the coefficients of the cubic B-spline through the pixels of images `(B, C, H, W)` that are mirrored at their
    borders. The inverse of the filter (1, 4, 1)/6 is sqrt(3) z^|k| with z = sqrt(3) - 2 (Unser 1999, "Splines: a perfect
    fit for signal and image processing"); it is cut off below the precision of the image.
    """
    z = math.sqrt(3) - 2
    radius = math.ceil(math.log(torch.finfo(image.dtype).eps / 4) / math.log(-z))
    offsets = torch.arange(-radius, radius + 1, device=image.device)
    taps = math.sqrt(3) * z ** offsets.abs().to(image.dtype)
    for _ in range(2):
        length = image.shape[-1]
        index = torch.arange(-radius, length + radius, device=image.device) % (2 * length)
        mirrored = torch.minimum(index, 2 * length - 1 - index)
        image = correlate(image.contiguous().index_select(-1, mirrored), taps).mT
    return image.contiguous()


BLOCK = 32


def correlate(rows: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    """
    sum_k taps[k] rows[..., stride j + k] for all j that fit, as products of blocks with a banded matrix: for one channel
    that is several times as fast as a convolution on CPUs.
    """
    count = (rows.shape[-1] - len(taps)) // stride + 1
    width = stride * (BLOCK - 1) + len(taps)
    blocks = math.ceil(count / BLOCK)
    rows = F.pad(rows, (0, max(0, stride * BLOCK * (blocks - 1) + width - rows.shape[-1])))
    band = taps.new_zeros(width, BLOCK)
    for j in range(BLOCK):
        band[stride * j : stride * j + len(taps), j] = taps
    result = rows.unfold(-1, width, stride * BLOCK).reshape(-1, width) @ band
    return result.view(*rows.shape[:-1], -1)[..., :count]


def resample(coefficients: Tensor, backward: Tensor, factor: int = 1, margin: int = 0) -> Tensor:
    """
    The spline at the points that the pixels of the result come from.

    Args:
        coefficients: `(B, C, H, W)`.
        backward: `(B, 3, 3)`, from a point of the result to one of the image, in pixels from the centre.
        factor: pixels to a pixel of the result, in each direction.
        margin: pixels of the result's size more on each side.

    Returns:
        `(B, C, factor (H + 2 margin), factor (W + 2 margin))`.
    """
    height, width = coefficients.shape[2:]
    options = {"dtype": coefficients.dtype, "device": coefficients.device}
    y, x = (
        (torch.arange(factor * (n + 2 * margin), **options) + 0.5) / factor - margin - n / 2 for n in (height, width)
    )
    # (B, rows, 1) + (B, 1, columns): places in the image, the first pixel's centre at 0.
    row, column = (
        backward[:, i, 0, None, None] * x + backward[:, i, 1, None, None] * y[:, None] + backward[:, i, 2, None, None]
        for i in (1, 0)
    )
    rows = linear_pairs(row + (height - 1) / 2)
    columns = linear_pairs(column + (width - 1) / 2)
    total = 0
    for row_place, row_weight in rows:
        for column_place, column_weight in columns:
            grid = torch.stack(((2 * column_place + 1) / width - 1, (2 * row_place + 1) / height - 1), dim=-1)
            value = F.grid_sample(coefficients, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
            total = total + (row_weight * column_weight)[:, None] * value
    return total


def linear_pairs(place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """
    Two (places, weights) at which linear interpolation of the coefficients gives the cubic B-spline's sum of four: a
    pair of neighbours with weights a and b is a + b times the linear interpolation at b/(a + b) between them (Sigg and
    Hadwiger 2005, "Fast third-order texture filtering").
    """
    first = place.floor()
    t = place - first
    a, b, d = (1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, t**3 / 6
    left = a + b
    return [(first - 1 + b / left, left), (first + 1 + d / (1 - left), 1 - left)]


LANCZOS_LOBES = 3


def resample_smaller(coefficients: Tensor, backward: Tensor) -> Tensor:
    """`resample` at twice the size, then a Lanczos low-pass to the result's pixels: no aliasing down to half the size."""
    fine = resample(coefficients, backward, factor=2, margin=LANCZOS_LOBES)
    offsets = (torch.arange(4 * LANCZOS_LOBES, dtype=torch.float64) + 0.5) / 2 - LANCZOS_LOBES
    taps = torch.sinc(offsets) * torch.sinc(offsets / LANCZOS_LOBES)
    taps = to_device(fine.device, (taps / taps.sum()).to(fine.dtype))
    for _ in range(2):
        # Over each pixel's centre as many taps to the left as to the right: the first fine pixel is one too many.
        fine = correlate(fine[..., 1:], taps, stride=2).mT
    return fine
