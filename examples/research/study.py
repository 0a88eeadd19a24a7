"""Studies as data: JSON files whose rows change one thing in a training configuration, checked before any work.

    {"title": "...", "base": "base.json", "budget": {"images": 20000}, "rows": {"lerp": {}, "add": {"model": {"skip": "add"}}}}

A row names what it changes in the base's "training", which has the keys of `TrainingConfig` ("model" and "scheduler" are
merged key by key); also "seeds", if they are not the base's, and "paper", the paper's figure. The other rows are compared
with the first one. `budget` is equal for all rows: images, or floating-point operations of training.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from diffusers_hdit.evaluation.metrics import load_extractor
from diffusers_hdit.evaluation.profiler import profile_network
from diffusers_hdit.models.modeling_hdit import HDiTModel
from diffusers_hdit.models.networks import NETWORKS
from diffusers_hdit.training.config import TrainingConfig, default_of, names_where
from diffusers_hdit.training.trainer import check_network


# What the base must have, with the type of each. Shares are of the training's steps.
EVALUATION = {
    "loss_at": list,  # shares at which the held-out loss is taken
    "distances_at": list,  # shares at which images are generated and compared
    "images": int,  # generated ones
    "num_inference_steps": int,
    "loss_images": int,  # held-out ones, each at all noise levels
    "noise_levels": int,
    "feature_network": str,
    "network_resolution": int,
    "seed": int,
}
DATA = {"resolution": int, "views": int, "held_out_views": int}
STUDY_KEYS = {"title", "question", "base", "budget", "rows", "seeds"}
# The study sets these for every run.
NOT_FOR_ROWS = names_where(per_run=True)

# Settings that would make results incomparable, or fail only after the training; with what to do instead.
REFUSED = {
    "gradient_accumulation_steps": "images and operations are counted by train_batch_size, so set that instead",
    "metrics_every": 'leave it out: "distances_at" in the base\'s "evaluation" says when to compare images',
    "label_column": "leave it out: studies compare networks without classes",
    "condition_columns": "leave it out: studies compare networks without conditions",
    "task": "leave it out: studies compare networks that generate from noise",
}
SIGMA_DATA = 0.5  # of the held-out loss


@dataclass
class Row:
    """One line of a study. `training` has all but seed and folders; `identity` is equal for equal trainings."""

    name: str
    training: dict
    seeds: list[int]
    steps: int
    batch: int
    parameters: int
    macs: int  # of one image's forward pass
    flops_per_image: float  # of training
    identity: str
    paper: str | None = None

    @property
    def images(self) -> int:
        return self.steps * self.batch

    @property
    def flops(self) -> float:
        return self.images * self.flops_per_image


@dataclass
class Study:
    name: str
    title: str
    question: str
    budget: dict
    rows: list[Row]
    data: dict
    evaluation: dict


def read_study(path: Path, data_identity: str = "", seeds: Sequence[int] | None = None) -> Study:
    """
    Read a study and check each of its rows.

    Args:
        data_identity: of the images, if they are not the views that the base describes; part of a row's identity.
        seeds: in place of those that the files name.

    Raises:
        ValueError: for a file that is no study, and for a row that the training or the network refuses; the message names the row.
    """
    path = Path(path)
    study = read_json(path)
    unknown = sorted(set(study) - STUDY_KEYS)
    if unknown or not isinstance(study.get("rows"), dict) or not study["rows"] or "base" not in study:
        raise ValueError(
            f'{path} is no study: it needs "base" and at least one of "rows", and may have '
            f"{', '.join(sorted(STUDY_KEYS))}; it has {', '.join(study) or 'nothing'}."
        )
    base = study["base"] if isinstance(study["base"], dict) else read_json(path.parent / study["base"])
    data, evaluation = checked_base(base, path)
    budget = checked_budget(study.get("budget", base["budget"]), path)
    data_identity = data_identity or json.dumps(data, sort_keys=True)
    rows = []
    for name, change in study["rows"].items():
        try:
            row_seeds = seeds or change.get("seeds") or study.get("seeds") or base["seeds"]
            rows.append(make_row(name, change, base["training"], budget, evaluation, list(row_seeds), data_identity))
            check_size(rows[-1], data["resolution"])
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, row {name!r}: {error}") from error
    return Study(path.stem, study.get("title", path.stem), study.get("question", ""), budget, rows, data, evaluation)


def read_json(path: Path) -> dict:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found


def checked_base(base: dict, path: Path) -> tuple[dict, dict]:
    lacking = sorted({"training", "budget", "seeds", "data", "evaluation"} - set(base))
    if lacking:
        raise ValueError(f"the base of {path} lacks {', '.join(lacking)}.")
    for name, types in (("data", DATA), ("evaluation", EVALUATION)):
        wrong = sorted(set(base[name]) ^ set(types))
        wrong += [key for key, wanted in types.items() if key in base[name] and type(base[name][key]) is not wanted]
        if wrong:
            raise ValueError(
                f'"{name}" in the base of {path} needs just {", ".join(types)}; wrong: {", ".join(wrong)}.'
            )
    evaluation = base["evaluation"]
    shares = evaluation["loss_at"] + evaluation["distances_at"]
    if not all(0 < share <= 1 for share in shares) or 1 not in evaluation["loss_at"]:
        raise ValueError(
            f"loss_at and distances_at in the base of {path} are shares up to 1, loss_at with 1: {shares}."
        )
    return base["data"], evaluation


def checked_budget(budget: dict, path: Path) -> dict:
    known = isinstance(budget, dict) and len(budget) == 1 and set(budget) <= {"images", "flops"}
    if not known or not isinstance(next(iter(budget.values())), (int, float)) or next(iter(budget.values())) <= 0:
        raise ValueError(f'the budget of {path} is {{"images": N}} or {{"flops": X}}, over 0; got {budget!r}.')
    return budget


def make_row(name, change: dict, training: dict, budget, evaluation, seeds, data_identity: str) -> Row:
    change = dict(change)
    paper = change.pop("paper", None)
    change.pop("seeds", None)
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one; got {seeds}.")
    settings = merged(training, change)
    if refused := sorted(set(settings) & set(NOT_FOR_ROWS)):
        raise ValueError(f"{', '.join(refused)} can't be set: the study sets it for all rows.")
    config = training_config(settings)
    check_comparable(config)
    parameters, macs = cost(config)
    # The backward pass costs twice as much as the forward one; a multiply-accumulate is two operations.
    flops_per_image = 2 * macs * (3 + extra_passes(config))
    segments, batch = segments_of(evaluation), config.train_batch_size
    wanted = budget.get("images") or budget["flops"] / flops_per_image
    steps = int(wanted / batch / segments) * segments
    if steps < segments:
        raise ValueError(f"the budget {budget} is less than {segments} steps of {batch} images.")
    identity = hashlib.sha256(
        json.dumps([different_from_default(config), steps, data_identity], sort_keys=True).encode()
    ).hexdigest()[:12]
    paper = None if paper is None else str(paper)
    return Row(name, settings, seeds, steps, batch, parameters, macs, flops_per_image, identity, paper)


def check_comparable(config: TrainingConfig) -> None:
    """Raise ValueError for settings whose results could not be compared with the other rows'."""
    for name, remedy in REFUSED.items():
        if getattr(config, name) != default_of(name):
            raise ValueError(f"{name} can't be {getattr(config, name)!r} in a study: {remedy}.")
    if config.sigma_data != SIGMA_DATA:
        raise ValueError(
            f"sigma_data of the scheduler can't be {config.sigma_data} in a study: the held-out loss is taken with "
            f"{SIGMA_DATA}; leave it out."
        )


def check_size(row: Row, resolution: int) -> None:
    """Raise ValueError for a row with images of another size than the others."""
    size = row.training["model"].get("sample_size", resolution)
    if {*(size if isinstance(size, (list, tuple)) else [size])} != {resolution}:
        raise ValueError(
            f'sample_size of the model is {size}, and "resolution" of the base\'s "data" {resolution}: make them equal.'
        )


def merged(base: dict, change: dict) -> dict:
    """Return `base` with the changes; objects ("model", "scheduler") are merged key by key, but a model of another type replaces it."""
    if change.get("model_type", base.get("model_type")) != base.get("model_type"):
        base = {key: value for key, value in base.items() if key != "model"}
    both = {
        key: {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in change.items()
    }
    return {**base, **both}


def segments_of(evaluation: dict) -> int:
    """Return into how many equal segments the shares divide a training."""
    shares = evaluation["loss_at"] + evaluation["distances_at"]
    return math.lcm(*(Fraction(share).limit_denominator(1000).denominator for share in shares))


def training_config(settings: dict) -> TrainingConfig:
    """
    Return the configuration of a training with these settings, but for its data and folder.

    Raises:
        ValueError: for settings that the training or the network refuses.
    """
    config = TrainingConfig.from_sources(config=settings)
    check_network(config)
    return config


def cost(config: TrainingConfig) -> tuple[int, int]:
    """Return the parameters, and the multiply-accumulates of one image's forward pass."""
    profile = profile_network(NETWORKS[config.model_type], dict(config.model))
    return profile.parameters, profile.macs


def extra_passes(config: TrainingConfig) -> float:
    """Return the forward passes of a training step besides its own: the first estimate of self-conditioning."""
    return 1.0 if config.model.get("self_conditioning") else 0.0


def different_from_default(config: TrainingConfig) -> dict:
    """Return the settings that identify a training, whether a file spells defaults out or leaves them out."""
    defaults, left_out = TrainingConfig().to_dict(), {*NOT_FOR_ROWS, "model", "preset"}
    settings = {
        name: value for name, value in config.to_dict().items() if name not in left_out and value != defaults[name]
    }
    model = as_json(config.model)
    if NETWORKS[config.model_type] is HDiTModel:
        signature = inspect.signature(HDiTModel.__init__).parameters
        model = {name: value for name, value in model.items() if value != as_json(signature[name].default)}
    return as_json({**settings, "model": model})


def as_json(value):
    return json.loads(json.dumps(value))


def load_features(evaluation: dict):
    """Load the feature network of an evaluation; raises ImportError or ValueError if it is not there."""
    return load_extractor(evaluation["feature_network"], evaluation["network_resolution"])
