"""Networks by name: real classes with random weights, saved and loaded by path; what they see, and what is refused."""

import importlib.util

import pytest
import torch
from torch import nn

from diffusers_hdit.evaluation import feature_extractors, metrics


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (6, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------------
# Inception-v3


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of the right state dict, with random values."""
    if not importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    make = feature_extractors.torch_fidelity_inception()
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:  # it can't be made without weights: make it with none loaded
        patch.setitem(make.__init__.__globals__, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(make, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(make("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return metrics.load_extractor("inception-v3", weights=inception_file)


def test_inception_by_path(inception, inception_file, images):
    make = feature_extractors.torch_fidelity_inception()
    theirs = make("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)).eval()
    with torch.no_grad():
        pooled, logits = theirs(images)
    found = inception(images)
    assert found.shape == (6, 2048) and torch.equal(found, pooled)
    torch.testing.assert_close(inception.network.logits(found).float(), logits, rtol=1e-4, atol=1e-5)
    assert (inception.name, inception.resolution) == ("inception-v3", 299)
    assert inception.resizing == "bilinear as in TensorFlow 1, not antialiased"
    clean = metrics.load_extractor("inception-v3", resize_filter="bicubic", weights=inception_file)
    assert not torch.equal(clean(images), found) and clean.fingerprint != inception.fingerprint
    assert clean.weights_digest == inception.weights_digest


def test_inception_results(inception, images):
    """The names, and that they are the distances of these features."""
    drawn, real = (
        inception.features([images]),
        inception.features([images.flip(0)[1:], images[:, :, :10].repeat(1, 1, 2, 1)]),
    )
    drawn = torch.cat([drawn, real[:6] + 0.01])
    assert metrics.default_metrics(inception)[:3] == ["fid", "kid", "inception_score"]
    by_name = {
        result["name"]: result
        for result in metrics.evaluate(drawn, real, ["fid", "kid", "inception_score", "frechet_distance"], inception)
    }
    statistics = (*metrics.mean_and_covariance(drawn), *metrics.mean_and_covariance(real))
    assert by_name["fid"]["value"] == by_name["frechet_distance"]["value"] == metrics.frechet_distance(*statistics)
    assert by_name["kid"]["value"] == metrics.kernel_distance(drawn, real) and by_name["kid"]["standard_error"] >= 0
    assert by_name["inception_score"]["value"] == metrics.inception_score(inception.network.logits(drawn))[0]
    assert "few images" in by_name["fid"]["bias"] and by_name["fid"]["floor_images"] == 5
    assert by_name["fid"]["feature_weights"] == inception.weights_digest


def test_inception_refusals(inception_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="299×299 pixels, not 224"):
        metrics.load_extractor("inception-v3", 224, weights=inception_file)
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pth"):
        metrics.load_extractor("inception-v3", weights=tmp_path / "nothing.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name in ("other.pth", "broken.pth"):
        with pytest.raises(ValueError, match="is not a state dict of torch-fidelity's Inception-v3"):
            metrics.load_extractor("inception-v3", weights=tmp_path / name)


def test_inception_without_a_way_to_fetch_it(inception_file, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="could not be downloaded .*--feature_weights FILE"):
        metrics.load_extractor("inception-v3")


def test_inception_without_its_package(monkeypatch):
    monkeypatch.setattr(feature_extractors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--no-deps torch-fidelity"):
        metrics.load_extractor("inception-v3")


# ----------------------------------------------------------------------------------------------------------------------
# transformers


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("dinov2") / "tiny-dinov2"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**TOWER, patch_size=14, mlp_ratio=2)
    transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, resample=3
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(0)
    vision = {**TOWER, "patch_size": 7, "intermediate_size": 64}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 99,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)  # the whole model, as on the Hub: its text part is left out
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, resample=2
    ).save_pretrained(folder)
    return folder


def normalized(images):
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_dinov2(dinov2, images):
    transformers = pytest.importorskip("transformers")
    extractor = metrics.load_extractor("dinov2", weights=dinov2)
    assert (extractor.name, extractor.resolution, extractor.resize_filter) == ("dinov2 (tiny-dinov2)", 28, "bicubic")
    # Of the network's own size nothing is resized: its inputs are the image processor's, its output the class token.
    exact = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(dinov2)
    inputs = processor(list(exact), return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(normalized(exact), inputs, rtol=1e-5, atol=1e-5)
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(exact), expected, rtol=1e-4, atol=1e-5)
    assert extractor(images).shape == (6, 32)
    assert metrics.load_extractor("dinov2", 56, "bilinear", weights=dinov2)(images).shape == (6, 32)
    assert metrics.default_metrics(extractor)[:2] == ["kernel_distance", "frechet_distance"]


def test_clip(clip, images):
    transformers = pytest.importorskip("transformers")
    extractor = metrics.load_extractor("clip", weights=clip)
    assert (extractor.name, extractor.resolution, extractor.resize_filter) == ("clip (tiny-clip)", 28, "bilinear")
    exact = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=normalized(exact)).pooler_output
        expected = model.visual_projection(pooled)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(extractor(exact), expected, rtol=1e-4, atol=1e-5)
    found = extractor.features([images])
    (result, *_) = metrics.evaluate(found[:4], found, metrics.default_metrics(extractor), extractor)
    assert result["name"] == "cmmd" and result["value"] == metrics.cmmd(found[:4], found)
    with pytest.raises(ValueError, match="28 pixels a side, not 56"):
        metrics.load_extractor("clip", 56, weights=clip)


def test_weights_of_another_model(clip, dinov2, tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="a model of type clip; dinov2 is"):
        metrics.load_extractor("dinov2", weights=clip)
    with pytest.raises(OSError, match="--feature_weights DIR"):
        metrics.load_extractor("clip", weights=tmp_path / "nothing")
    # A DINOv2 that is not all there would be filled up with random numbers.
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    state = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    transformers.AutoImageProcessor.from_pretrained(dinov2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks .* of the weights of dinov2"):
        metrics.load_extractor("dinov2", weights=tmp_path)
    with pytest.raises(ValueError, match="brings its own"):
        metrics.load_extractor("test_metrics:make_pixels", weights=dinov2)


def test_loading_leaves_the_random_state_alone(dinov2):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    metrics.load_extractor("dinov2", weights=dinov2)
    metrics.load_extractor("test_feature_networks:random_network")
    assert torch.equal(torch.random.get_rng_state(), before)


def random_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
