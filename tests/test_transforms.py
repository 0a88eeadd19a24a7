"""Pixels of every kind of file, and what becomes of them: all on real files."""

import io
import itertools
import struct

import numpy as np
import pytest
import torch
from data_files import folder_of, load_one, noise_image
from PIL import Image

from diffusers_hdit.data import load_images, to_float, transforms


pytestmark = pytest.mark.usefixtures("own_cache")


# --- Modes and types


def test_transparency_goes_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]
    image = Image.fromarray(pixels)
    assert load_one(tmp_path, image)[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert load_one(tmp_path, image, in_channels=1)[:, 0].tolist() == [[76, 255, 127]]
    assert np.array_equal(load_one(tmp_path, image, in_channels=4).permute(1, 2, 0).numpy(), pixels)
    grey = Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")
    assert load_one(tmp_path, grey)[0].tolist() == [[9, 255]]


def test_palettes(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert load_one(tmp_path, image)[0, 0].tolist() == [10, 40, 70]
    assert load_one(tmp_path, image, save={"transparency": 1})[0, 0].tolist() == [10, 255, 70]
    translucent = load_one(tmp_path, image, save={"transparency": bytes([255, 0, 255])}, in_channels=4)
    assert translucent[3, 0].tolist() == [255, 0, 255]


def test_modes_of_colour(tmp_path):
    assert load_one(tmp_path, Image.new("L", (2, 2), 77)).unique().tolist() == [77]
    assert load_one(tmp_path, Image.new("L", (2, 2), 77), in_channels=1).shape == (1, 2, 2)
    assert load_one(tmp_path, Image.new("1", (2, 2), 1), in_channels=1).unique().tolist() == [255]
    assert load_one(tmp_path, Image.new("RGB", (2, 2)), in_channels=4)[:, 0, 0].tolist() == [0, 0, 0, 255]
    for channels in (2, 5, 0):
        with pytest.raises(ValueError, match=f"in_channels={channels}: .*1 .grey., 3 .RGB. or 4 .RGBA."):
            load_one(tmp_path, Image.new("L", (2, 2)), in_channels=channels)


def test_cmyk(tmp_path):
    for name, tolerance in (("c.tif", 0), ("c.jpg", 3)):
        found = load_one(tmp_path / name[-1], Image.new("CMYK", (8, 8), (255, 0, 0, 0)), name)
        assert (found[:, 0, 0].int() - torch.tensor([0, 255, 255])).abs().max() <= tolerance


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 300, 25700, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert load_one(tmp_path, image, name)[2].tolist() == [[0, 0, 1, 1, 1, 100, 255]], "RGB has 8 bits"
    kept = load_one(tmp_path, image, name, in_channels=1)
    assert kept.dtype == torch.uint16 and kept[0].tolist() == values.tolist()


def test_numbers_without_a_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], but go from 1.5 to 1.5"):
        load_one(tmp_path, Image.new("F", (4, 4), 1.5), "f.tif", in_channels=1)
    with pytest.raises(ValueError, match="1 of 1 images .*not within 16 bits"):
        load_one(tmp_path, Image.new("I", (4, 4), 70000), "f.tif")


def save_array(tmp_path, array, name="one.npy"):
    (tmp_path / "one").mkdir(exist_ok=True)
    np.save(tmp_path / "one" / name, array)
    return tmp_path / "one"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_arrays(tmp_path, dtype, channels):
    rng = np.random.default_rng(0)
    array = (
        rng.uniform(-1, 1, (6, 7, channels)) if np.dtype(dtype).kind == "f" else rng.integers(0, 200, (6, 7, channels))
    )
    array = array.astype(dtype)
    expected = torch.from_numpy(
        array.astype({"f": np.float32}.get(np.dtype(dtype).kind, np.dtype(dtype).newbyteorder("=")))
    )
    for i, layout in enumerate((array, array.transpose(2, 0, 1))):
        save_array(tmp_path, layout, f"{i}.npy")
    dataset = load_images(train_data_dir=tmp_path / "one", resolution=(6, 7), in_channels=channels)
    for i in range(2):
        assert dataset[i]["image"].dtype == expected.dtype
        assert torch.equal(dataset[i]["image"].float(), expected.permute(2, 0, 1).float())
    if channels == 1:
        save_array(tmp_path, array[:, :, 0], "2.npy")
        dataset = load_images(train_data_dir=tmp_path / "one", resolution=(6, 7), in_channels=1)
        assert torch.equal(dataset[2]["image"].float(), dataset[0]["image"].float())


def test_arrays_that_do_not_fit(tmp_path):
    folder = save_array(tmp_path, np.zeros((8, 9, 5), np.uint8))
    with pytest.raises(ValueError, match=r"in_channels=4, but 'one.npy' is an array of shape \(8, 9, 5\)"):
        load_images(train_data_dir=folder, resolution=8, in_channels=4)
    for wrong, message in (
        (np.zeros((8, 9), complex), "pixels of type complex128; save it as .npy: uint8, uint16 or float32"),
        (np.full((8, 9), -1), "integer pixels from -1 to -1, not within 16 bits"),
        (np.zeros((8, 9, 5, 2), np.uint8), r"has shape \(8, 9, 5, 2\)"),
        (np.full((8, 9), np.nan), "go from nan to nan"),
        (np.zeros((0, 9)), "the array is empty"),
    ):
        save_array(tmp_path, wrong)
        with pytest.raises(ValueError, match=f"1 of 1 images .*{message}"):
            load_images(train_data_dir=folder, resolution=8, in_channels=1)
    save_array(tmp_path, np.zeros((8, 9), np.float32))
    save_array(tmp_path, np.zeros((8, 9), np.uint16), "other.npy")
    with pytest.raises(ValueError, match="no common range: {'float32': 'one.npy', 'uint16': 'other.npy'}"):
        load_images(train_data_dir=folder, resolution=8, in_channels=1)


def test_8_and_16_bits_together(tmp_path):
    folder = save_array(tmp_path, np.full((8, 8), 65535, np.uint16))
    Image.new("L", (8, 8), 128).save(folder / "two.png")
    dataset = load_images(train_data_dir=folder, resolution=8, in_channels=1)
    assert [int(dataset[i]["image"].int().unique()) for i in range(2)] == [65535, 128 * 257]


def test_arrays_are_scaled_as_images_are(tmp_path):
    """Each channel by itself, in each type."""
    image = faint(size=(50, 40))
    reference = lanczos(np.asarray(image).astype(np.float64), (20, 25))
    array = np.asarray(image)
    for values, unit in (
        (array, 1),
        (array.astype(np.uint16) * 257, 257),
        ((array / 127.5 - 1).astype(np.float32), None),
    ):
        folder = save_array(tmp_path, np.concatenate([values, values], axis=2))
        found = load_images(train_data_dir=folder, resolution=(20, 25), in_channels=6)[0]["image"].double()
        found = ((found + 1) * 127.5 if unit is None else found / unit)[3:].permute(1, 2, 0).numpy()
        # Two roundings to whole numbers in 8 bits; 16 bits and floats keep what lies between.
        assert np.abs(found - reference).max() < (1.5 if unit == 1 else 1e-2)


def test_pages_of_a_tif_are_channels(tmp_path):
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        pages = rng.integers(0, 255, (5, 6, 7)).astype(dtype)
        images = [Image.fromarray(page) for page in pages]
        found = load_one(
            tmp_path, images[0], "p.tif", in_channels=5, save={"save_all": True, "append_images": images[1:]}
        )
        assert torch.equal(found.int(), torch.from_numpy(pages.astype(np.int32)))
    with pytest.raises(ValueError, match=r"in_channels=4, but 'p.tif' is an array of shape \(6, 7, 5\)"):
        load_images(train_data_dir=tmp_path / "one", resolution=(6, 7), in_channels=4)
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = load_one(tmp_path / "2", pages[0], "p.tif", save={"save_all": True, "append_images": pages[1:]})
    assert found[:, 0, 0].tolist() == [255, 0, 0], "of several images the first"


def test_pages_with_palettes_are_colours(tmp_path):
    pages = [noise_image(i).quantize(8) for i in range(3)]
    found = load_one(tmp_path, pages[0], "p.tif", save={"save_all": True, "append_images": pages[1:]})
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(pages[0].convert("RGB")))


def test_tif_that_pil_cannot_read(tmp_path):
    """5 samples a pixel in one page: what microscopes write. The message says what to do."""
    entries = [(256, 4, 2), (257, 4, 2), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 5), (278, 4, 2), (279, 4, 20)]  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + b"\0" * 4
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "five.tif").write_bytes(tiff.ljust(200, b"\0") + bytes(20))
    with pytest.raises(
        ValueError, match=r"'five.tif' \(ValueError: PIL cannot read this kind of TIFF; save it as .npy"
    ):
        load_images(train_data_dir=tmp_path / "one", resolution=2, in_channels=5)
    with pytest.raises(ValueError, match="PIL cannot read this kind of TIFF"):
        transforms.decode(io.BytesIO((tmp_path / "one" / "five.tif").read_bytes()))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 255, (255, 0, 0), (0, 0, 255)
    # What the camera stores, from the meaning of the tag: where row 0 and column 0 of the file belong.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    found = load_one(
        tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, resolution=(16, 32), save={"exif": exif}
    )
    assert np.abs(found[:, 4::8, 4::8].permute(1, 2, 0).numpy().astype(int) - upright[4::8, 4::8]).max() < 24


@pytest.mark.parametrize("name, mode", [("a.png", "I;16"), ("a.tif", "I;16"), ("a.tif", "I;16B"), ("a.tif", "L")])
def test_orientation_of_other_modes(tmp_path, name, mode):
    upright = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100 // (1 if mode != "L" else 255)
    exif = Image.Exif()
    exif[274] = 6
    stored = np.ascontiguousarray(np.rot90(upright)).astype({"I;16B": ">u2", "L": "u1"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (20, 30), stored.tobytes())
    found = load_one(tmp_path, image, name, resolution=(20, 30), in_channels=1, save={"exif": exif})
    assert np.array_equal(found[0].numpy(), upright)


def test_broken_exif_does_not_cost_the_image(tmp_path):
    found = load_one(tmp_path, noise_image(), save={"exif": b"Exif\0\0nonsense"})
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(noise_image()))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = load_one(tmp_path, frames[0], "a.gif", save={"save_all": True, "append_images": frames[1:]})
    assert found[:, 0, 0].tolist() == [255, 0, 0]


# --- Size and crop


def test_height_comes_first(tmp_path):
    image = noise_image(size=(48, 24))
    half = load_one(tmp_path, image, resolution=(12, 24))
    assert half.shape == (3, 12, 24)
    expected = np.asarray(image.resize((24, 12), Image.Resampling.LANCZOS))
    assert np.array_equal(half.permute(1, 2, 0).numpy(), expected)


def test_places_of_a_crop(tmp_path):
    image = noise_image(size=(48, 24))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    dataset = load_images(train_data_dir=folder_of(tmp_path, "a.png", size=(48, 24)), resolution=24)
    for x, left in ((0, 0), (0.5, 12), (1, 24), (0.999, 24)):
        assert torch.equal(dataset[0, (0.3, x)]["image"], pixels[:, :, left : left + 24])
    torch.manual_seed(0)
    drawn = torch.stack([dataset[0]["image"] for _ in range(60)])
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.stack([dataset[0]["image"] for _ in range(60)]))
    windows = [pixels[:, :, left : left + 24] for left in range(25)]
    places = {next(left for left, w in enumerate(windows) if torch.equal(w, image)) for image in drawn}
    assert len(places) > 12 and places <= set(range(25))

    centred = load_images(train_data_dir=tmp_path / "images", resolution=24, center_crop=True)
    before = torch.get_rng_state()
    for found in (centred[0], centred[0, (0, 0)]):
        assert torch.equal(found["image"], pixels[:, :, 12:36])
    square = load_images(train_data_dir=tmp_path / "images", resolution=(12, 24))
    assert square[0]["image"].shape == (3, 12, 24)
    assert torch.equal(torch.get_rng_state(), before), "no place to choose, no number drawn"


def faint(size):
    """Without what Lanczos would carry beyond white or black: PIL cuts it off between the two directions, too."""
    return Image.fromarray(np.asarray(noise_image(size=size)) // 3 + 85)


def lanczos(image, size):
    """(H, W, C) float64 -> size, straight from the definition: Turkowski 1990, a sinc windowed by a sinc, 3 lobes."""
    for axis, n in enumerate(size):
        have = image.shape[axis]
        ratio = have / n
        centres, pixels_at = (np.arange(n)[:, None] + 0.5) * ratio, np.arange(have)[None] + 0.5
        x = (pixels_at - centres) / max(1, ratio)
        weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return np.clip(image, 0, 255)


@pytest.mark.parametrize("size, target", [((40, 90), (20, 20)), ((33, 30), (66, 60)), ((90, 40), (45, 20))])
def test_scaling_is_lanczos(tmp_path, size, target):
    image = faint(size=size[::-1])
    found = load_one(tmp_path, image, resolution=target, center_crop=True).permute(1, 2, 0).numpy()
    cover = transforms.cover_size(size, target)
    top, left = transforms.crop_offset(cover, target, (0.5, 0.5))
    expected = lanczos(np.asarray(image).astype(np.float64), cover)[top : top + target[0], left : left + target[1]]
    # Pixels are rounded between the two directions, by at most 0.5, and at the end; weights sum up to 1.5 at most.
    assert np.abs(found - expected).max() < 1.3 and np.abs(found - expected).mean() < 0.5


def test_a_window_of_the_whole_is_the_window(tmp_path):
    """To the last bit, up or down, in one step or with halvings; else the cache would change pixels."""
    rng, checked = np.random.default_rng(0), 0
    while checked < 40:
        size, target = tuple(rng.integers(20, 1200, 2).tolist()), tuple(rng.integers(8, 90, 2).tolist())
        cover = transforms.cover_size(size, target)
        if cover[0] * cover[1] > 4 * target[0] * target[1]:
            continue
        image = noise_image(checked, size[::-1])
        whole = transforms.scale(image, size, target, (0, 0, *cover))
        top, left = transforms.crop_offset(cover, target, tuple(rng.random(2)))
        window = transforms.scale(image, size, target, (top, left, *target))
        assert np.array_equal(window, whole[:, top : top + target[0], left : left + target[1]]), (size, target)
        checked += 1


def test_large_images_are_decoded_smaller(tmp_path):
    """A JPEG by its decoder, others by a box filter; both leave it twice too large for Lanczos, and hardly show."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (25, 40, 3), dtype=np.uint8))
    smooth = smooth.resize((800, 500), Image.Resampling.BICUBIC)
    expected = lanczos(np.asarray(smooth).astype(np.float64), (50, 80))
    for name in ("a.jpg", "a.png"):
        path = tmp_path / name
        smooth.save(path, quality=95, subsampling=0)
        decoded = transforms.decode(path, (50, 80))
        assert decoded.size == (500, 800)
        assert decoded.pixels.size == ((200, 125) if name == "a.jpg" else (800, 500))
        found = transforms.prepare(decoded, (50, 80), 3, "uint8", (0, 0)).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() < 8 and np.abs(found - expected).mean() < 1


def test_orientation_and_smaller_decoding(tmp_path):
    image = Image.new("RGB", (801, 403), "red")
    image.paste("blue", (0, 0, 400, 403))
    exif = Image.Exif()
    exif[274] = 6  # to be rotated clockwise: blue on top
    image.save(tmp_path / "a.jpg", exif=exif)
    decoded = transforms.decode(tmp_path / "a.jpg", (80, 40))
    assert decoded.size == (801, 403) and decoded.pixels.size == (101, 201)
    found = transforms.prepare(decoded, (80, 40), 3, "uint8", (0, 0))
    assert (found[2, 5] > 245).all() and (found[0, -5] > 245).all()


def test_any_size_makes_the_resolution():
    """Rounding never puts the box outside the image, and a very long image takes no more memory than another."""
    for h, w in itertools.product((1, 2, 3, 7, 13, 29, 97), repeat=2):
        for crop in ((0, 0), (1, 1), (0.7, 0.2)):
            decoded = transforms.Decoded(Image.new("RGB", (w, h), "red"), (h, w))
            found = transforms.prepare(decoded, (7, 13), 3, "uint8", crop)
            assert found.shape == (3, 7, 13) and found[0].unique().tolist() == [255]
    decoded = transforms.Decoded(Image.new("L", (1, 60000), 9), (60000, 1))
    assert transforms.prepare(decoded, (7, 13), 3, "uint8", (0.5, 0.5)).unique().tolist() == [9]


def test_small_images_are_counted(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    noise_image(size=(16, 12)).save(folder / "c.png")
    for _ in range(2):  # the second time from the manifest
        with pytest.warns(UserWarning, match="2 of 3 images are smaller than 12x16 and will be enlarged"):
            load_images(train_data_dir=folder, resolution=(12, 16))


def test_to_float():
    scaled = to_float(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16))
    assert scaled.dtype == torch.float32 and scaled.shape == (1, 1, 16, 16)
    assert scaled.min() == -1 and scaled.max() == 1 and scaled.flatten().diff().min() > 0
    assert to_float(scaled) is scaled, "float arrays are in [-1, 1] from the start"
    scaled = to_float(torch.arange(65536).to(torch.uint16))
    assert scaled.min() == -1 and scaled.max() == 1 and scaled.diff().min() > 0
    with pytest.raises(TypeError, match="float64"):
        to_float(scaled.double())
