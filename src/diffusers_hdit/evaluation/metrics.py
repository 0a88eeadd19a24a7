"""Distances between sets of images in the features of a network, by which trained models are compared.

A distance depends on the images, on the network, on the size and filter that the images were resized with, and on the
number of images; so results carry all of these (`evaluate`). "FID", "KID" and "Inception score" are names for the features
of Inception-v3 only, "CMMD" for those of CLIP: with any other network it is a Fréchet or a kernel distance.

All set functions take features `(N, D)` of any floating-point dtype and compute in float64.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..utils.files import atomic_path
from . import METRICS
from .feature_extractors import ClipImages, FeatureExtractor, InceptionV3, load_extractor


__all__ = [
    "METRICS", "FeatureExtractor", "cmmd", "cmmd_and_bias", "default_metrics", "evaluate", "frechet_distance",
    "frechet_floor", "inception_score", "kernel_distance", "kernel_distance_and_error", "load_adm_statistics",
    "load_extractor", "mean_and_covariance", "nearest_neighbors", "near_copies", "precision_recall", "save_adm_samples",
    "save_adm_statistics", "share_of_near_copies",
]  # fmt: skip

BLOCK = 1024  # rows of a distance or kernel matrix at a time


# ----------------------------------------------------------------------------------------------------------------------
# Distances between two sets of features


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """
    Return the unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)^3: the kernel distance of Bińkowski
    et al. 2018, "Demystifying MMD GANs", arXiv 1801.01401 (there with Inception features, "KID"). It is unbiased at any
    number of images, so it can be slightly below zero.

    Raises:
        ValueError: for fewer than two vectors in a set, or sets of different dimension.
    """
    return kernel_distance_and_error(x, y)[0]


def kernel_distance_and_error(x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """
    Return `kernel_distance` and its standard error from the choice of the images `x`: the jackknife's, from the distances
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
    """Return, for each `x`, the sum of its kernel with all `y`."""
    return torch.cat([cubed(block @ y.T / x.shape[1] + 1).sum(1) for block in x.split(BLOCK)])


def others_kernel_sums(x: Tensor) -> Tensor:
    """Return, for each `x`, the sum of its kernel with all other `x`."""
    return kernel_sums(x, x) - cubed(x.square().sum(1) / x.shape[1] + 1)


def cubed(z: Tensor) -> Tensor:
    return z * z * z  # many times as fast as z**3


CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def cmmd(x: Tensor, y: Tensor) -> float:
    """
    Return the squared maximum mean discrepancy with the Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, times
    1000, of CLIP's image embeddings of length 1: Jayasumana et al. 2024, "Rethinking FID", arXiv 2401.09603, section 4.
    As there, the mean is over all pairs, an image with itself too: never negative, and too large with few images.

    Raises:
        ValueError: for sets of different dimension.
    """
    return cmmd_and_bias(x, y)[0]


def cmmd_and_bias(x: Tensor, y: Tensor) -> tuple[float, float]:
    """
    Return `cmmd`, and by how much it is too large because each image is paired with itself too; the unbiased value is
    their difference. The bias is 1000 (1 - the mean kernel of two images of a set) / (their number), summed over both
    sets; for embeddings of length 1 about 10 (1 - their mean cosine) / (their number).
    """
    x, y = checked(x, y, at_least=2)
    within_x, within_y = mean_gaussian(x, x), mean_gaussian(y, y)
    bias = (1 - within_x) / (len(x) - 1) + (1 - within_y) / (len(y) - 1)
    return CMMD_SCALE * (within_x + within_y - 2 * mean_gaussian(x, y)), CMMD_SCALE * bias


def mean_gaussian(x: Tensor, y: Tensor) -> float:
    sums = [torch.exp(squared_distances(block, y) / (-2 * CMMD_SIGMA**2)).sum() for block in x.split(BLOCK)]
    return torch.stack(sums).sum().item() / (len(x) * len(y))


SPLITS = 10  # of the Inception score


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> tuple[float, float]:
    """
    Return mean and standard deviation, over `splits` splits of the images in random order, of the exponential of the mean
    KL divergence of an image's class distribution from the split's: Salimans et al. 2016, arXiv 1606.03498, section 4. It
    does not depend on real images; with few images per split it is too low.

    Args:
        logits: `(N, classes)` of the generated images.

    Raises:
        ValueError: for fewer images than splits.
    """
    (logits,) = checked(logits, at_least=splits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits[order.to(logits.device)].log_softmax(1).tensor_split(splits):
        marginal = part.exp().mean(0).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def mean_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and unbiased covariance `(D, D)` in float64."""
    (x,) = checked(x, at_least=2)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> float:
    """
    Return |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): Dowson and Landau 1982; Heusel et al. 2017, arXiv
    1706.08500, equation 6. The trace of the root is the sum of the roots of the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which is
    symmetric, so that singular covariances (fewer images than features) need no correction.

    With few images it is too large (`frechet_floor` shows the scale): compare only at equal numbers of images.

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
    Return the Fréchet distance between two disjoint random sets of m real images each, and m: half of the images, at most
    `images`. It would be zero without the bias of small sets. It is no lower bound for a model, whose distance is of other
    numbers of images: that of a perfect model with larger sets is below it.
    """
    m = min(images, len(reference) // 2)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed)).to(reference.device)
    one, other = (mean_and_covariance(reference[order[i * m : (i + 1) * m]]) for i in (0, 1))
    return frechet_distance(*one, *other), m


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """
    Return improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2): the share of
    generated images that are no farther from some real image than its k-th nearest real one, and the share of real images
    that are as near to some generated one. Both depend on the numbers of images, which should be equal.

    Raises:
        ValueError: for k or fewer vectors in a set.
    """
    generated, real = checked(generated, real, at_least=k + 1)
    return covered(generated, real, k), covered(real, generated, k)


def covered(x: Tensor, y: Tensor, k: int) -> float:
    """Return the share of `x` inside the union of balls around `y` that reach to the k-th nearest other point of `y`."""
    # With itself a point is its own nearest, at zero: the k-th other one is number k + 1.
    radii = torch.cat([squared_distances(block, y).kthvalue(k + 1, dim=1).values for block in y.split(BLOCK)])
    inside = [(squared_distances(block, y) <= radii).any(1) for block in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def nearest_neighbors(generated: Tensor, real: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    """Return the indices of the k nearest real images of each generated one, and their distances, both `(N, k)`."""
    generated, real = checked(generated, real, at_least=1)
    if len(real) < max(2, k):
        raise ValueError(f"at least {max(2, k)} real images are needed, got {len(real)}.")
    found = [squared_distances(block, real).topk(k, largest=False) for block in generated.split(BLOCK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).sqrt()


def near_copies(distances: Tensor, ratio: float = 1 / 3) -> Tensor:
    """
    Return, for ascending distances `(N, 2 or more)` to the nearest real images, whether the first is below `ratio` times
    the second: the criterion of Gu et al. 2023, "On Memorization in Diffusion Models", arXiv 2310.02664 (there between
    pixels). Copies of an image that is in the real set twice are found only if they are exact.
    """
    return (distances[:, 0] < ratio * distances[:, 1]) | (distances[:, 0] == 0)


def share_of_near_copies(generated: Tensor, real: Tensor, ratio: float = 1 / 3) -> float:
    """Return the share of generated images that are `near_copies` of a real one."""
    return near_copies(nearest_neighbors(generated, real)[1], ratio).double().mean().item()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return `(N, M)` of float64 `(N, D)` and `(M, D)`; equal vectors have exactly zero."""
    distances = torch.addmm(y.square().sum(1) + x.square().sum(1, keepdim=True), x, y.T, alpha=-2)
    # What rounding leaves of a difference of equal vectors: a few units in the last place of the squares.
    noise = 8 * torch.finfo(x.dtype).eps * (y.square().sum(1) + x.square().sum(1, keepdim=True))
    return torch.where(distances <= noise, 0.0, distances)


def checked(*sets: Tensor, at_least: int) -> list[Tensor]:
    """Return the sets in float64, after a check of their shapes and numbers."""
    for z in sets:
        if z.ndim != 2 or z.shape[1] != sets[0].shape[1]:
            raise ValueError(f"sets of features are (N, D) with one D, got {[tuple(z.shape) for z in sets]}.")
        if len(z) < at_least:
            raise ValueError(f"at least {at_least} images are needed in each set, got {[len(z) for z in sets]}.")
    return [z.double() for z in sets]


# ----------------------------------------------------------------------------------------------------------------------
# Files of the ADM evaluation suite (github.com/openai/guided-diffusion/tree/main/evaluations)


def save_adm_statistics(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """Write an .npz with `mu` and `sigma`, as in ADM's reference batches (without `mu_s`, `sigma_s`: spatial features)."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(file, mu=mean.double().cpu().numpy(), sigma=covariance.double().cpu().numpy())


def load_adm_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """
    Read mean `(D,)` and covariance `(D, D)` from an .npz with `mu` and `sigma`. They are comparable only with features of
    the same network: ADM's own are Inception-v3's.

    Raises:
        OSError: if the file can't be opened.
        ValueError: for a file without them, or one that holds something else.
    """
    with open(path, "rb") as opened:
        try:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an .npz with mu and sigma")
            names = ", ".join(file.files) or "nothing"
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError(f"has {names}, but no mu and sigma")
            mean, covariance = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
        except Exception as error:  # NumPy raises errors of many classes for damaged files
            raise ValueError(f"{str(path)!r} is no file of statistics: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{str(path)!r} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; (D,) and (D, D) are needed."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{str(path)!r} has statistics that are not finite.")
    return mean, covariance


def save_adm_samples(path: Path, images: Tensor) -> None:
    """Write uint8 images `(N, 3, H, W)` as `arr_0` `(N, H, W, 3)`: a batch of samples for ADM's evaluator."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"ADM's evaluator takes uint8 RGB images, not {images.dtype} {tuple(images.shape)}.")
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).contiguous().cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Metrics by name


# Metrics that only features of this network have; the others are of any network.
OF_NETWORK = {"fid": InceptionV3, "kid": InceptionV3, "inception_score": InceptionV3, "cmmd": ClipImages}
NETWORK_NAMES = {InceptionV3: "inception-v3", ClipImages: "clip"}
OTHER_NAME = {"fid": "frechet_distance", "kid": "kernel_distance"}
OF_STATISTICS = ("fid", "frechet_distance")  # metrics that need no more than mean and covariance of the real images


def default_metrics(extractor: FeatureExtractor) -> list[str]:
    """Return the metrics that are computed by default, under the names for this network's features."""
    always = ["precision", "recall", "near_copies"]
    for network, names in ((InceptionV3, ["fid", "kid", "inception_score"]), (ClipImages, ["cmmd"])):
        if isinstance(extractor.network, network):
            return [*names, *always]
    return ["kernel_distance", "frechet_distance", *always]


def check_metrics(
    metrics: Sequence[str], extractor: FeatureExtractor, of_statistics: bool = False, images: int | None = None
) -> None:
    """
    Check that metrics can be computed.

    Raises:
        ValueError: for an unknown metric, one whose name is for another network's features, with `of_statistics` one that
            needs the real images, or one that needs more than `images` generated images.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}.")
    for name in metrics:
        needed = OF_NETWORK.get(name)
        if needed is not None and not isinstance(extractor.network, needed):
            instead = f"; of other features it is called {OTHER_NAME[name]}" if name in OTHER_NAME else ""
            raise ValueError(
                f"{name} is a metric of the feature network {NETWORK_NAMES[needed]}, got {extractor.name}{instead}."
            )
        if of_statistics and name not in OF_STATISTICS:
            raise ValueError(f"{name} needs the real images; of their statistics alone: {', '.join(OF_STATISTICS)}.")
        if name == "inception_score" and images is not None and images < SPLITS:
            raise ValueError(
                f"inception_score needs at least {SPLITS} generated images, one for each of its splits, got {images}: "
                "generate more, or choose other metrics."
            )


def evaluate(
    generated: Tensor,
    real: Tensor | None,
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> list[dict[str, object]]:
    """
    Compute metrics of generated against real features.

    Each is returned as a dict with `name`, `value` and all that the value depends on: `feature_network`, `feature_weights`
    (a hash of them), `images`, `real_images`, `network_resolution`, `resize_filter`. Model cards take this list. Kernel
    distances have a `standard_error`; what is too large or too low with few images, or depends on their number, says so in
    `bias`, and Fréchet distances have a `floor`: the distance between two disjoint sets of `floor_images` real images each
    (generated ones where only statistics of the real ones are given).

    Args:
        real: features, or None with `statistics`.
        statistics: mean and covariance of other real images, which suffice for `fid` and `frechet_distance`.

    Raises:
        ValueError: for a metric that is unknown, of another network, or needs more than statistics; or too few images.
    """
    if (real is None) == (statistics is None):
        raise ValueError("give the features of the real images, or their statistics.")
    check_metrics(metrics, extractor, of_statistics=real is None)
    about = {
        "feature_network": extractor.name,
        "feature_weights": extractor.weights_digest,
        "images": len(generated),
        "real_images": None if real is None else len(real),
        "network_resolution": extractor.resolution or "as generated",
        "resize_filter": extractor.resizing,
    }
    computed: dict[str, dict] = {}
    for name in metrics:
        if name in ("precision", "recall") and name not in computed:
            computed |= precision_and_recall_with_bias(generated, real)
        elif name in ("fid", "frechet_distance"):
            computed[name] = frechet_with_floor(generated, real, statistics)
        elif name not in computed:
            computed[name] = COMPUTED[name](generated, real, extractor)
    return [{"name": name, **computed[name], **about} for name in metrics]


def frechet_with_floor(generated: Tensor, real: Tensor | None, statistics: tuple[Tensor, Tensor] | None) -> dict:
    target = mean_and_covariance(real) if statistics is None else statistics
    found = {
        "value": frechet_distance(*mean_and_covariance(generated), *target),
        "bias": "too large with few images; comparable at equal numbers of images only",
    }
    halved = generated if real is None else real
    if len(halved) >= 4:
        found["floor"], found["floor_images"] = frechet_floor(halved, len(generated))
        found["floor_of"] = "generated images" if real is None else "real images"
    return found


def precision_and_recall_with_bias(generated: Tensor, real: Tensor) -> dict[str, dict]:
    bias = "depends on the numbers of images, which should be equal; comparable at the same numbers only"
    both = precision_recall(generated, real)
    return {name: {"value": value, "bias": bias} for name, value in zip(("precision", "recall"), both, strict=True)}


def kernel_with_error(generated: Tensor, real: Tensor, extractor: FeatureExtractor) -> dict:
    return dict(zip(("value", "standard_error"), kernel_distance_and_error(generated, real), strict=True))


def inception_score_with_deviation(generated: Tensor, real: Tensor, extractor: FeatureExtractor) -> dict:
    value, deviation = inception_score(extractor.network.logits(generated))
    bias = "too low with few images; comparable at equal numbers of images only"
    return {"value": value, "standard_deviation": deviation, "splits": SPLITS, "bias": bias}


def cmmd_with_bias(generated: Tensor, real: Tensor, extractor: FeatureExtractor) -> dict:
    value, bias = cmmd_and_bias(generated, real)
    return {"value": value, "bias": f"too large by {bias:.3g} with these numbers of images"}


COMPUTED: dict[str, Callable[[Tensor, Tensor, FeatureExtractor], dict]] = {
    "kid": kernel_with_error,
    "kernel_distance": kernel_with_error,
    "inception_score": inception_score_with_deviation,
    "cmmd": cmmd_with_bias,
    "near_copies": lambda generated, real, extractor: {"value": share_of_near_copies(generated, real)},
}
