"""Augmentation against images given by formulas, drawn at the transformed places in float64."""

import math

import numpy as np
import pytest
import torch

from diffusers_hdit.training import augmentation as module
from diffusers_hdit.training.augmentation import augment


def generators(count, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def scene(x, y):
    """A smooth image of three channels at places in pixels from the centre (numpy, any shape)."""
    return np.stack(
        [
            0.8 * np.sin(0.31 * x + 0.17 * y + 0.4),
            0.5 * np.cos(0.23 * x - 0.35 * y) + 0.3 * np.sin(0.4 * y),
            np.exp(-((x - 3) ** 2 + (y + 2) ** 2) / 60) * 1.6 - 0.8,
        ]
    )


def places(height, width):
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    return x, y


def to_source(condition, x, y, height, width):
    """Where a point of the result comes from, step by step from the condition alone, the last change undone first."""
    x_flip, y_flip, log_scale, cos1, sin, stretch_x, stretch_y, move_x, move_y = condition
    x, y = x - move_x * width / 8, y - move_y * height / 8
    log_stretch = math.hypot(stretch_x, stretch_y)
    if log_stretch:
        # Along (cos phi, sin phi) the image gets longer by 2^(0.2 |N|), across it shorter.
        c, s = stretch_x / log_stretch, stretch_y / log_stretch
        along, across = c * x + s * y, -s * x + c * y
        along, across = along * 2 ** (-0.2 * log_stretch), across * 2 ** (0.2 * log_stretch)
        x, y = c * along - s * across, s * along + c * across
    c, s = cos1 + 1, sin
    x, y = c * x - s * y, s * x + c * y
    x, y = x * 2 ** (-0.2 * log_scale), y * 2 ** (-0.2 * log_scale)
    return (-x if x_flip else x), (-y if y_flip else y)


def inside(x, y, height, width, margin):
    return (np.abs(x) < width / 2 - margin) & (np.abs(y) < height / 2 - margin)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 2e-3)])
def test_pixels_against_the_formula_of_the_image(size, dtype, tolerance):
    """The tolerance is the cubic spline's own error on waves of 14 pixels."""
    x, y = places(*size)
    image = torch.from_numpy(scene(x, y)).to(dtype).expand(60, -1, -1, -1)
    result, condition = augment(image, 0.7, generators(60))
    assert result.dtype == dtype and result.shape == image.shape and condition.dtype == torch.float32
    worst, seen = 0.0, 0
    for one, c in zip(result.double().numpy(), condition.double().tolist(), strict=True):
        source_x, source_y = to_source(c, x, y, *size)
        # The mirrored border has a kink, which rings some pixels inwards.
        valid = inside(source_x, source_y, *size, margin=8)
        seen += valid.sum()
        worst = max(worst, np.abs(one - scene(source_x, source_y))[:, valid].max())
    assert seen > 60 * 0.3 * size[0] * size[1]
    print(f"largest error {worst:.1e}")
    assert worst < tolerance


def test_borders_are_mirrored():
    x, y = places(32, 32)
    wave = np.cos(2 * np.pi * (x + 16) / 32) * np.cos(np.pi * (y + 16) / 32)  # mirrored by itself at the pixels' edges
    image = torch.from_numpy(wave)[None, None].expand(40, -1, -1, -1)
    result, condition = augment(image, 0.8, generators(40, seed=1))
    worst = 0.0
    for one, c in zip(result[:, 0].numpy(), condition.double().tolist(), strict=True):
        source_x, source_y = to_source(c, x, y, 32, 32)
        expected = np.cos(2 * np.pi * (source_x + 16) / 32) * np.cos(np.pi * (source_y + 16) / 32)
        worst = max(worst, np.abs(one - expected).max())
    print(f"largest error {worst:.1e}")
    assert worst < 2e-3


def test_identity_and_flips_are_exact():
    image = torch.randn(400, 3, 8, 12)
    result, condition = augment(image, 0.3, generators(400))
    still = condition[:, 2:].eq(0).all(1)
    kinds = set()
    for before, after, c in zip(image[still], result[still], condition[still].tolist(), strict=True):
        kinds.add((c[0], c[1]))
        dims = [d for d, flip in ((2, c[0]), (1, c[1])) if flip]
        assert torch.equal(after, before.flip(dims))
    assert kinds == {(0, 0), (1, 0), (0, 1), (1, 1)}
    untouched, zeros = augment(image, 0.0, generators(400))
    assert torch.equal(untouched, image) and zeros.eq(0).all()


def test_statistics_of_the_condition():
    count, a = 20_000, 0.3
    condition, backward = module.draw_transforms(a, [torch.Generator().manual_seed(5)] * count, 64, 64)
    x_flip, y_flip, log_scale, cos1, sin, stretch_x, stretch_y, move_x, move_y = condition.T

    def near(value, expected, deviation):
        assert abs(value - expected) < 4 * deviation / math.sqrt(count), (value, expected)

    near(x_flip.mean(), 0.5, 0.5)
    near(y_flip.mean(), a / 2, 0.5)
    stretch = torch.hypot(stretch_x, stretch_y)
    for value in (log_scale, sin, stretch, move_x):
        near(value.ne(0).double().mean(), a, 0.5)
    assert torch.equal(move_x.ne(0), move_y.ne(0)), "one decision for both directions"
    for value in (log_scale, move_x, move_y):
        near(value.mean(), 0, math.sqrt(a))
        near(value.square().mean(), a, math.sqrt(3 * a))
    near(stretch.square().mean(), a, math.sqrt(3 * a))
    near((stretch_x * stretch_y).mean(), 0, math.sqrt(3 * a))
    angle = torch.atan2(sin, cos1 + 1)[sin.ne(0)] / (2 * math.pi) + 0.5
    counts = torch.histc(angle, 8, 0, 1) / len(angle)  # all the circle
    assert (counts - 1 / 8).abs().max() < 4 * math.sqrt(0.11 / len(angle))
    gates = torch.stack([y_flip.ne(0), log_scale.ne(0), sin.ne(0), stretch.ne(0), move_x.ne(0)]).double()
    assert (torch.corrcoef(gates) - torch.eye(5)).abs().max() < 4 / math.sqrt(count), "independent of each other"
    assert torch.linalg.det(backward[:, :2, :2]).abs().log2().add(0.4 * log_scale).abs().max() < 1e-12


def test_the_inverse_map_gives_the_image_back():
    x, y = places(64, 64)
    bump = np.exp(-(x**2 + y**2) / 80) * (1 + 0.2 * x)
    image = torch.from_numpy(np.stack([bump, -bump]))[None].expand(30, -1, -1, -1)
    _, backward = module.draw_transforms(0.9, generators(30, seed=3), 64, 64)
    there = module.resample(module.spline_coefficients(image), backward)
    back = module.resample(module.spline_coefficients(there), torch.linalg.inv(backward))
    corners = torch.tensor([[-10, -10, 1], [-10, 10, 1], [10, -10, 1], [10, 10, 1]], dtype=torch.float64).T
    kept = (torch.linalg.inv(backward) @ corners)[:, :2].abs().amax(
        (1, 2)
    ) < 28  # what left the image does not come back
    assert kept.sum() > 10
    assert (back - image)[kept][..., 22:42, 22:42].abs().max() < 2e-3


def test_any_split_of_the_batch_is_the_same():
    image = torch.randn(12, 3, 24, 16)
    together, condition = augment(image, 0.5, generators(12))
    parts = [augment(image[i:j], 0.5, generators(12)[i:j]) for i, j in ((0, 1), (1, 5), (5, 12))]
    assert torch.equal(torch.cat([part for part, _ in parts]), together)
    assert torch.equal(torch.cat([c for _, c in parts]), condition)
    generator = torch.Generator().manual_seed(9)
    whole = augment(image, 0.5, generator)
    generator.manual_seed(9)
    halves = [augment(half, 0.5, generator) for half in image.split(6)]
    assert torch.equal(torch.cat([half for half, _ in halves]), whole[0])
    assert len(augment(image[:0], 0.5, generator)[0]) == 0


def test_each_image_takes_as_many_draws_whatever_happens():
    states = []
    for probability in (0.0, 0.1, 1.0):
        generator = torch.Generator().manual_seed(2)
        augment(torch.zeros(3, 1, 8, 8), probability, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_smaller_images_do_not_alias():
    """A wave that the result can't hold vanishes; one that it can hold stays."""
    x, _ = places(64, 64)
    half = torch.tensor([[[1.9, 0, 0], [0, 1.9, 0], [0, 0, 1]]], dtype=torch.float64)
    for cycles, low, high in (
        (0.4, 0.0, 0.05),
        (0.1, 0.65, 0.75),
    ):  # a pixel of the image; 1.9 times that in the result
        wave = torch.from_numpy(np.cos(2 * np.pi * cycles * x))[None, None]
        small = module.resample_smaller(module.spline_coefficients(wave), half)[0, 0, 16:48, 20:44]
        assert low <= small.square().mean().sqrt() < high
        aliased = module.resample(module.spline_coefficients(wave), half)[0, 0, 16:48, 20:44]
        assert aliased.square().mean().sqrt() > 0.5


@pytest.mark.parametrize(
    ("image", "probability", "count", "message"),
    [
        (torch.zeros(2, 3, 8, 8), 1.2, 2, "between 0 and 1, not 1.2"),
        (torch.zeros(2, 3, 8, 8), 0.1, 3, "2 images need as many generators"),
        (torch.zeros(3, 8, 8), 0.1, 3, r"not \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0.1, 2, "torch.uint8"),
    ],
)
def test_bad_arguments(image, probability, count, message):
    with pytest.raises(ValueError, match=message):
        augment(image, probability, generators(count))
