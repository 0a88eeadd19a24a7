"""Studies as data: JSON files whose rows change one thing in a training, read and checked before any work.

    {"title": "...", "base": "base.json", "budget": {"images": 20000}, "rows": {"lerp": {}, "add": {"model": {"skip": "add"}}}}

A row is what it changes in the base's "training", a configuration of `examples/train_hdit.py` ("model" and "scheduler" key
by key); besides, "seeds", if they are not the base's, and "paper", the paper's figure. The first row is the one that the
others are compared with. `budget` is equal for all rows: images, or floating-point operations of training.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from diffusers_hdit.evaluation.metrics import load_extractor
from diffusers_hdit.evaluation.profiler import profile_network
from diffusers_hdit.models.modeling_hdit import HDiTModel
from diffusers_hdit.models.networks import NETWORKS
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.saving import make_scheduler


# What the base must have, with the type of each. Shares are of the training's steps.
EVALUATION = {
    "loss_at": list,  # shares at which the held-out loss is taken
    "distances_at": list,  # shares at which images are drawn and compared
    "images": int,  # that are drawn
    "num_inference_steps": int,
    "loss_images": int,  # held-out ones, each at all noise levels
    "noise_levels": int,
    "feature_network": str,
    "network_resolution": int,
    "seed": int,
}
DATA = {"resolution": int, "views": int, "held_out_views": int}
STUDY_KEYS = {"title", "question", "base", "budget", "rows", "seeds"}
# These are the same for every run, and none of a row's business.
NOT_FOR_ROWS = ("output_dir", "train_data_dir", "dataset_name", "seed", "max_train_steps", "num_train_epochs",
                "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_validation_images",
                "logging_steps", "report_to", "push_to_hub", "resume_from_checkpoint", "dry_run", "config")  # fmt: skip

# These would make numbers that can't be compared, or fail only after the training; with what to do instead.
REFUSED = {
    "gradient_accumulation_steps": "images and operations are counted by train_batch_size, so set that instead",
    "metrics_every": 'leave it out: "distances_at" in the base\'s "evaluation" says when to compare images',
    "label_column": "leave it out: studies compare networks without classes",
    "condition_columns": "leave it out: studies compare networks without conditions",
    "task": "leave it out: studies compare networks that draw from noise",
}
SIGMA_DATA = 0.5  # what the held-out loss is taken with


@dataclass
class Row:
    """One line of a study. `training` is complete but for seed and folders; `identity` is equal for equal trainings."""

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
    Args:
        data_identity: of the images, where they are not the views that the base describes; part of a row's identity.
        seeds: in place of those that the files name.

    Raises:
        ValueError: for a file that is no study, and for a row that the training or the network refuses; naming the row.
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
    for part, kinds in (("data", DATA), ("evaluation", EVALUATION)):
        wrong = sorted(set(base[part]) ^ set(kinds))
        wrong += [key for key, kind in kinds.items() if key in base[part] and type(base[part][key]) is not kind]
        if wrong:
            raise ValueError(
                f'"{part}" in the base of {path} needs just {", ".join(kinds)}; wrong: {", ".join(wrong)}.'
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
        raise ValueError(f"{', '.join(refused)} can't be set: the study says it for all rows.")
    args = parsed(settings)
    check_comparable(args)
    parameters, macs = cost(args)
    # Backward costs twice as much as forward; a multiply-accumulate is two operations.
    flops_per_image = 2 * macs * (3 + extra_passes(args))
    parts = parts_of(evaluation)
    wanted = budget.get("images") or budget["flops"] / flops_per_image
    steps = int(wanted / args.train_batch_size / parts) * parts
    if steps < parts:
        raise ValueError(f"the budget {budget} is less than {parts} steps of {args.train_batch_size} images.")
    identity = hashlib.sha256(
        json.dumps([different_from_default(args), steps, data_identity], sort_keys=True).encode()
    ).hexdigest()[:12]
    paper = None if paper is None else str(paper)
    batch = args.train_batch_size
    return Row(name, settings, seeds, steps, batch, parameters, macs, flops_per_image, identity, paper)


def check_comparable(args: argparse.Namespace) -> None:
    defaults = parse_args(["--output_dir", "unused", "--train_data_dir", "unused"])
    for name, remedy in REFUSED.items():
        if getattr(args, name) != getattr(defaults, name):
            raise ValueError(f"{name} can't be {getattr(args, name)!r} in a study: {remedy}.")
    if (args.scheduler or {}).get("sigma_data", SIGMA_DATA) != SIGMA_DATA:
        raise ValueError(
            f"sigma_data of the scheduler can't be {args.scheduler['sigma_data']} in a study: the held-out loss is taken "
            f"with {SIGMA_DATA}; leave it out."
        )


def check_size(row: Row, resolution: int) -> None:
    """All rows see and draw images of one size."""
    size = row.training["model"].get("sample_size", resolution)
    if {*(size if isinstance(size, (list, tuple)) else [size])} != {resolution}:
        raise ValueError(
            f'sample_size of the model is {size}, and "resolution" of the base\'s "data" {resolution}: make them equal.'
        )


def merged(base: dict, change: dict) -> dict:
    """`change` over `base`; objects ("model", "scheduler") key by key, but for a model of another type."""
    if change.get("model_type", base.get("model_type")) != base.get("model_type"):
        base = {key: value for key, value in base.items() if key != "model"}
    both = {
        key: {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in change.items()
    }
    return {**base, **both}


def parts_of(evaluation: dict) -> int:
    """Into how many equal parts the shares divide a training."""
    shares = evaluation["loss_at"] + evaluation["distances_at"]
    return math.lcm(*(Fraction(share).limit_denominator(1000).denominator for share in shares))


def parsed(settings: dict) -> argparse.Namespace:
    """As the training script reads them, checked as it checks them."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        path.write_text(json.dumps(settings))
        try:
            with contextlib.redirect_stderr(said):
                return parse_args(["--config", str(path), "--output_dir", "unused", "--train_data_dir", "unused"])
        except SystemExit as error:
            message = said.getvalue().strip().rpartition("error: ")[2].replace(repr(str(path)), "of the row")
            raise ValueError(message) from error


def make_network(args: argparse.Namespace) -> nn.Module:
    return NETWORKS[args.model_type](**args.model)


def cost(args: argparse.Namespace) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image's forward pass; the network is made without its weights."""
    make_scheduler(args.scheduler)
    profile = profile_network(NETWORKS[args.model_type], dict(args.model))
    return profile.parameters, profile.macs


def extra_passes(args: argparse.Namespace) -> float:
    """Forward passes of a training step besides its own: self-conditioning's first one."""
    return 1.0 if args.model.get("self_conditioning") else 0.0


def different_from_default(args: argparse.Namespace) -> dict:
    """What makes a training this one, whether a file spells the defaults out or leaves them out."""
    defaults = vars(parse_args(["--output_dir", "unused", "--train_data_dir", "unused"]))
    left_out = {*NOT_FOR_ROWS, "model", "checkpointed_levels", "preset"}
    settings = {key: value for key, value in vars(args).items() if key not in left_out and value != defaults.get(key)}
    if type(make_network_on_meta(args)) is HDiTModel:
        signature = inspect.signature(HDiTModel.__init__).parameters
        model = {key: value for key, value in as_json(args.model).items() if value != as_json(signature[key].default)}
    else:
        model = args.model
    return as_json({**settings, "model": model})


def make_network_on_meta(args: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        return make_network(args)


def as_json(value):
    return json.loads(json.dumps(value))


def check_features(evaluation: dict):
    """The feature network of an evaluation. Raises ImportError or ValueError if it is not there."""
    return load_extractor(evaluation["feature_network"], evaluation["network_resolution"])
