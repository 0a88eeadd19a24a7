"""The check that all images can be read, and what is remembered of it."""

import os

import numpy as np
import pytest
from data_files import damaged_png, folder_of, manifests, noise_image, spoil

from diffusers_hdit.data import load_images


pytestmark = pytest.mark.usefixtures("own_cache")


def test_one_unreadable_image_is_skipped(tmp_path):
    folder = folder_of(tmp_path, *[f"{'ab'[i % 2]}/{i:03}.png" for i in range(150)])
    (folder / "b" / "077.png").write_bytes(b"this is no image")
    for _ in range(2):  # unreadable ones are tried, and named, at every start
        with pytest.warns(UserWarning, match=r"1 of 150 images cannot be read and are skipped: 'b/077.png' \(Unid"):
            dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
        assert len(dataset) == 149 and dataset.skipped == ["b/077.png"]
        assert [dataset[i]["label"] for i in range(149)] == [0] * 75 + [1] * 74
        found = dataset[75 + 38]["image"].permute(1, 2, 0).numpy()  # 079 has taken the place of 077
        assert np.array_equal(found, np.asarray(noise_image(79)))
    noise_image(77).save(folder / "b" / "077.png")
    assert len(load_images(train_data_dir=folder, resolution=12)) == 150


@pytest.mark.parametrize("harm", ["truncated", "damaged", "empty", "dangling"])
def test_too_many_unreadable_images(tmp_path, harm):
    folder = folder_of(tmp_path, *[f"{i}.jpg" for i in range(20)], size=(40, 40))
    for i in range(7):
        path = folder / f"{i}.jpg"
        content = path.read_bytes()
        path.unlink()
        if harm == "dangling":
            path.symlink_to(tmp_path / "gone.jpg")
        else:
            path.write_bytes({"truncated": content[:-300], "damaged": damaged_png(), "empty": b""}[harm])
    with pytest.raises(ValueError, match=r"7 of 20 images .*; at most 1% may\. .*'0\.jpg' \(\w+: .*and 2 more"):
        load_images(train_data_dir=folder, resolution=12)


def test_one_percent_is_the_limit(tmp_path):
    folder = folder_of(tmp_path, *[f"{i:03}.png" for i in range(100)])
    (folder / "000.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 100"):
        assert len(load_images(train_data_dir=folder, resolution=12)) == 99
    (folder / "099.png").unlink()
    with pytest.raises(ValueError, match="1 of 99"):
        load_images(train_data_dir=folder, resolution=12)


def test_second_start_does_not_decode(tmp_path, capsys):
    folder = folder_of(tmp_path, "a.png", "b.png")
    assert not manifests(tmp_path)
    load_images(train_data_dir=folder, resolution=12)
    assert len(manifests(tmp_path)) == 1, "one manifest, and no temporary file"
    spoil(folder / "b.png")
    dataset = load_images(train_data_dir=folder, resolution=8, in_channels=1)
    assert len(dataset) == 2
    with pytest.raises(OSError, match=r"'b.png' in .* can no longer be read"):
        dataset[1]
    assert capsys.readouterr().err == "", "no progress bar for a short check"


@pytest.mark.parametrize("manifest", ["missing", "stale", "broken", "wrong", "infinite", "nonsense", "other source"])
def test_manifest_that_says_nothing(tmp_path, manifest):
    folder = folder_of(tmp_path, "a.png", "b.png")
    load_images(train_data_dir=folder, resolution=12)
    [path] = manifests(tmp_path)
    content = path.read_text()
    spoil(folder / "b.png")
    if manifest == "missing":
        path.unlink()
    elif manifest == "stale":
        os.utime(folder / "b.png", ns=(0, 0))
    elif manifest == "broken":
        path.write_text(content[: len(content) // 2])
    elif manifest == "wrong":
        path.write_text(content.replace("12, 12]", "0, 12]"))
    elif manifest == "infinite":
        path.write_text(content.replace("12, 12]", "Infinity, 12]"))
    elif manifest == "nonsense":
        path.write_bytes(b"\xff\xfe[1, 2]")
    else:
        path.write_text(content.replace("folder ", "folder /another"))
    assert manifest in ("missing", "stale") or path.read_bytes() != content.encode()
    with pytest.raises(ValueError, match=r"1 of 2 images .*'b.png'"):
        load_images(train_data_dir=folder, resolution=12)


def test_only_what_changed_is_decoded_again(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    load_images(train_data_dir=folder, resolution=12)
    spoil(folder / "a.png")
    noise_image(5).save(folder / "c.png")
    assert len(load_images(train_data_dir=folder, resolution=12)) == 3


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = folder_of(tmp_path, "a.png")
    for _ in range(2):
        assert len(load_images(train_data_dir=folder, cache_dir=tmp_path / "file" / "cache", resolution=12)) == 1


def test_max_unreadable(tmp_path):
    folder = folder_of(tmp_path, *[f"{i:02}.png" for i in range(21)])
    for i in (3, 7):
        (folder / f"{i:02}.png").write_bytes(b"no image")
    options = {"train_data_dir": folder, "resolution": 12}
    for enough in (2, 2.0, 5, 0.1):
        with pytest.warns(
            UserWarning, match=r"2 of 21 images cannot be read and are skipped: '03.png' \(Unid.*'07.png'"
        ):
            dataset = load_images(**options, max_unreadable=enough)
        assert len(dataset) == 19 and dataset.skipped == ["03.png", "07.png"]
    for few, said in ((0, "0%"), (1, "1"), (0.09, "9%"), (0.015, "1.50%")):
        with pytest.raises(
            ValueError, match=f"2 of 21 images .* at most {said} may. .* raise max_unreadable: '03.png'"
        ):
            load_images(**options, max_unreadable=few)
    for wrong in (-1, 1.5, float("nan"), float("inf"), "5", None, True):
        with pytest.raises(ValueError, match="max_unreadable must be a share"):
            load_images(**options, max_unreadable=wrong)
    with pytest.raises(ValueError, match="1 of 1 images"):  # whatever is allowed
        load_images(train_data_dir=spoiled_folder(tmp_path), resolution=12, max_unreadable=5)


def spoiled_folder(tmp_path):
    folder = folder_of(tmp_path / "spoiled", "a.png")
    spoil(folder / "a.png")
    return folder
