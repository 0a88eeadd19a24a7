"""The configuration of a training run: one dataclass, from which flags, checks and resume rules derive.

To add a flag, add a field to `TrainingConfig`. `option` says what is allowed and what it means for a resumed run; the
parser, the checks of values from flags and files, and the comparison with a checkpoint follow from that.

Nothing here imports torch, so that a mistake on the command line is found at once.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from .. import presets
from ..evaluation import FEATURE_NETWORKS, METRICS
from ..utils.arguments import ArgumentParser


# The names of registries that import torch (`tests/test_training_config.py` compares them).
MODEL_TYPES = ("hdit", "dit", "unet")
NOISE_DENSITIES = ("cosine-interpolated", "cosine", "lognormal", "loguniform", "loglogistic")
LOSS_WEIGHTINGS = ("soft-min-snr", "min-snr", "snr", "karras")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb", "trackio")
# Modes of torch.compile that record CUDA graphs.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# Arguments of the network that a preset, which is for HDiT, gives to baselines too.
SHARED_MODEL_ARGUMENTS = ("sample_size", "in_channels", "out_channels", "num_classes", "augment_cond_dim")
# Settings under the names that earlier versions wrote into checkpoints and read from config files.
RENAMED = {"ema_lengths": "ema_sigma_rel"}


def option(
    default: Any = dataclasses.MISSING,
    help: str | None = None,
    *,
    group: str = "training",
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    resume: str | None = None,
    per_run: bool = False,
    parse: Callable | None = None,
    aliases: Sequence[str] = (),
    **flag: Any,
):
    """
    Describe a field of `TrainingConfig`.

    Args:
        default, help, group, choices: of the flag.
        at_least, above, at_most, below: bounds of each number.
        finite: whether inf is refused; nan always is.
        resume: "fixed" for a setting that a resumed run must keep; "fork" for one that a run in another folder, which
            starts from this run's checkpoint, may change; None for one that may change at any time.
        per_run: whether it belongs to a single run, so that rows of a study can't set it.
        parse: function that reads a flag's text, if its type does not.
        aliases: other names of the flag.
        flag: further arguments of `ArgumentParser.add_argument`.
    """
    metadata = {name: value for name, value in locals().items() if name not in ("default", "flag")} | {"flag": flag}
    if isinstance(default, (list, dict)):
        return field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def comma_separated(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def named_number(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    return name, float(number)


def levels(text: str) -> str:
    if text not in ("all", "none"):
        [int(level) for level in text.split(",")]
    return text


data = functools.partial(option, group="data")
saving = functools.partial(option, group="saving and monitoring")
hub = functools.partial(option, group="Hugging Face Hub")


@dataclass
class TrainingConfig:
    """
    Everything that a training run is told, checked when it is made.

    Raises:
        ValueError: for values of a wrong type or out of their domain, and for settings that exclude each other.
    """

    output_dir: str = option(None, "folder for the result; a run in it is resumed", group="general", per_run=True)
    config: str | None = option(None, "JSON file with any of these flags", group="general", per_run=True)
    preset: str | None = option(None, "model and training settings to start from", group="general",
                                choices=tuple(presets.names()))  # fmt: skip
    dry_run: bool = option(False, "print what would be done, and stop", group="general", per_run=True)

    model_type: str = option("hdit", "dit, unet: baselines to compare HDiT with", group="general", choices=MODEL_TYPES,
                             resume="fixed")  # fmt: skip
    task: str = option("generate", "upscale: super-resolution", group="general", choices=("generate", "upscale"),
                       resume="fixed")  # fmt: skip
    upscale_factor: int = option(4, "with --task upscale: --resolution divided by the size of the input",
                                 group="general", at_least=2, resume="fixed")  # fmt: skip
    max_conditioning_noise: float = option(0.5, "with --task upscale: highest noise level of the input", group="general",
                                           at_least=0, at_most=1, resume="fixed")  # fmt: skip
    model: dict = option({}, "arguments of the network; in config files only", group="files only")
    scheduler: dict = option({}, "sigma_min, sigma_max, sigma_data of the scheduler; in config files only",
                             group="files only")  # fmt: skip

    train_data_dir: str | None = data(None, "folder of images; its sub-folders are classes with --label_column",
                                      per_run=True)  # fmt: skip
    dataset_name: str | None = data(None, "a Hugging Face dataset (Hub or local folder), or fluent-faces, which comes "
                                    "with this package", per_run=True)  # fmt: skip
    dataset_config_name: str | None = data(None)
    split: str = data(
        "train", "of a data set, or of a folder with sub-folders such as train and test; all: every image"
    )
    streaming: bool = data(False, "read a --dataset_name as it arrives, without a copy on disk", resume="fork")
    cache_dir: str | None = data(None)
    image_column: str = data("image")
    label_column: str | None = data(None, "train with class labels from this column")
    class_folder_depth: int | None = data(None, "which sub-folders are the classes: 1 for the outermost, -1 for the one "
                                          "that an image is in; default: the innermost whose names differ")  # fmt: skip
    condition_columns: list[str] | None = data(None, "train with the numbers or vectors in these columns",
                                               parse=comma_separated)  # fmt: skip
    condition_statistics: dict | None = data(None, 'for streams, JSON file: {"mean": [...], "std": [...]}',
                                             parse=lambda path: read_json(path, "condition_statistics"), metavar="FILE")  # fmt: skip
    resolution: list[int] | None = data(None, "one number, or height and width; default: the model's sample_size",
                                        at_least=1)  # fmt: skip
    buckets: bool = data(False, "keep aspect ratios: train on sizes with about --resolution's pixels", resume="fork")
    center_crop: bool = data(False, "crop the centre instead of a random place", resume="fork")
    random_flip: bool = data(False, "mirror half of the images", resume="fork")
    augment_prob: float = data(0.0, "non-leaking augmentation: probability of each transform", at_least=0, at_most=1,
                               resume="fork")  # fmt: skip
    cache_images: str = data("auto", "keep decoded images in memory", choices=("auto", "yes", "no"))
    max_unreadable: float = data(0.01, "leave out unreadable images up to this share (below 1) or number (from 1)",
                                 at_least=0)  # fmt: skip
    dataloader_num_workers: int = data(0, at_least=0)

    train_batch_size: int = option(16, "images per step and device", at_least=1)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step; they multiply the batch", at_least=1)
    max_train_steps: int | None = option(
        None, "optimizer steps; overrides --num_train_epochs", at_least=1, per_run=True
    )
    num_train_epochs: int = option(100, at_least=1, per_run=True)
    learning_rate: float = option(5e-4, above=0, resume="fork")
    mapping_lr_scale: float = option(1 / 3, "learning rate of HDiT's mapping network, relative to --learning_rate",
                                     at_least=0, resume="fork")  # fmt: skip
    lr_scheduler: str = option("constant_with_warmup", choices=LR_SCHEDULERS, resume="fork")
    lr_warmup_steps: int = option(100, at_least=0, resume="fork")
    adam_beta1: float = option(0.9, at_least=0, below=1, resume="fork")
    adam_beta2: float = option(0.95, at_least=0, below=1, resume="fork")
    adam_weight_decay: float = option(0.01, at_least=0, resume="fork")
    adam_epsilon: float = option(1e-8, above=0, resume="fork")
    use_8bit_adam: bool = option(False, "optimizer states of 8 bits (bitsandbytes)", resume="fixed")
    max_grad_norm: float = option(1.0, "inf: no clipping", above=0, finite=False, resume="fork")
    ema_decay: list[float] = option([0.9999], "of the averaged weights; the first one's are saved and sampled",
                                    at_least=0, below=1, resume="fixed")  # fmt: skip
    ema_sigma_rel: list[float] = option([], "relative standard deviations of power-function averages (0.05 0.10)",
                                        above=0, below=12**-0.5, resume="fixed", nargs="*", aliases=["--ema_lengths"])  # fmt: skip
    ema_snapshot_steps: int | None = option(None, "save those for reconstruct_ema.py; default: --checkpointing_steps",
                                            at_least=1)  # fmt: skip
    noise_density: str = option("cosine-interpolated", choices=NOISE_DENSITIES, resume="fork")
    noise_density_params: dict = option({}, "mean=-1.2 ...", parse=named_number, metavar="NAME=NUMBER", nargs="+",
                                        resume="fork")  # fmt: skip
    loss_weighting: str = option("soft-min-snr", choices=LOSS_WEIGHTINGS, resume="fork")
    label_dropout: float = option(0.1, "share of conditions that are dropped, for classifier-free guidance", at_least=0,
                                  at_most=1, resume="fork")  # fmt: skip
    mixed_precision: str = option("auto", "auto: bf16 where it is fast", choices=("auto", "no", "bf16", "fp16"))
    force_fp16: bool = option(False, "insist on --mixed_precision fp16")
    allow_tf32: bool = option(True)
    gradient_checkpointing: str = option("none", "less memory, about a third more time: all levels, or some, such as 0,1 "
                                         "(0 is the outermost)", parse=levels, nargs="?", const="all",
                                         metavar="LEVELS")  # fmt: skip
    compile: str = option("none", "torch.compile the model; all modes but default replay CUDA graphs, on a GPU",
                          choices=("none", "default", *CUDA_GRAPHS), nargs="?", const="default")  # fmt: skip
    num_threads: int | None = option(None, "threads of each process on a CPU; default: PyTorch's, one for each core",
                                     at_least=1, per_run=True)  # fmt: skip
    seed: int = option(0, resume="fork", per_run=True)

    checkpointing_steps: int = saving(5000, at_least=1, per_run=True)
    checkpoints_total_limit: int | None = saving(3, "keep only the newest ones; 0: all", at_least=0, per_run=True)
    resume_from_checkpoint: str | None = saving(None, "a checkpoint folder; default, and 'latest': the newest in "
                                                "--output_dir", per_run=True)  # fmt: skip
    validation_steps: int = saving(5000, "steps between two grids of generated images", at_least=1, per_run=True)
    num_validation_images: int = saving(16, at_least=1, per_run=True)
    logging_steps: int = saving(10, at_least=1, per_run=True)
    metrics_every: int | None = saving(None, "steps between two comparisons of generated images with the training set",
                                       at_least=1)  # fmt: skip
    metrics: list[str] | None = saving(None, "which; default: those that the feature network has", choices=METRICS)
    metrics_images: int = saving(1000, "generated images for them", at_least=1)
    metrics_steps: int = saving(50, "inference steps for them", at_least=1)
    feature_network: str = saving("efficientnet-lite0", f"{', '.join(FEATURE_NETWORKS)}, or module:function")
    feature_weights: str | None = saving(None, "file (inception-v3), folder or name on the Hub (dinov2, clip); default: "
                                         "downloaded")  # fmt: skip
    report_to: str | None = saving(None, f"{', '.join(TRACKERS)}, several with commas, or none; default: tensorboard if "
                                   "installed", per_run=True)  # fmt: skip
    logging_dir: str = saving("logs", "inside the output folder")

    push_to_hub: bool = hub(False, "push the pipeline, in the background, at each validation", per_run=True)
    hub_model_id: str | None = hub(None, "USER/NAME; default: the name of the output folder")
    hub_token: str | None = hub(None, "default: the one of `hf auth login`, or HF_TOKEN")
    hub_private_repo: bool | None = hub(None, "make the repository a private one")

    def __post_init__(self):
        normalize(self)
        for f in dataclasses.fields(self):
            check_value(f, getattr(self, f.name))
        check_combinations(self)
        preset = presets.load(self.preset) if self.preset else {"model": {}, "scheduler": {}}
        model = preset["model"]
        if self.model_type != "hdit":
            model = {name: value for name, value in model.items() if name in SHARED_MODEL_ARGUMENTS}
        self.model = {"sample_size": 256, **model, **self.model}
        if self.resolution:
            self.model["sample_size"] = self.resolution[0] if len(self.resolution) == 1 else self.resolution
        self.scheduler = {
            "sigma_min": 0.01,
            "sigma_max": 160.0,
            "sigma_data": 0.5,
            **preset["scheduler"],
            **self.scheduler,
        }
        check_levels(self)

    @classmethod
    def from_sources(cls, flags: Mapping = {}, config: Mapping = {}) -> "TrainingConfig":  # noqa: B006
        """
        Merge settings: `flags` override the `config` file's, which override those of the preset that either names.

        Raises:
            ValueError: for unknown names, and as the class does.
        """
        config, flags = ({RENAMED.get(name, name): value for name, value in x.items()} for x in (config, flags))
        known = {f.name for f in dataclasses.fields(cls)} - {"config"}
        if unknown := sorted(set(config) - known):
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown keys: {', '.join(unknown)}.{hint} Allowed: {', '.join(sorted(known))}.")
        name = flags.get("preset", config.get("preset"))
        if name is not None and name not in presets.names():
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(presets.names())}.")
        training = presets.load(name)["training"] if name else {}
        return cls(**{**training, **config, **flags})

    @property
    def sigma_data(self) -> float:
        return self.scheduler["sigma_data"]

    @property
    def checkpointed_levels(self) -> list[int]:
        """The levels that `gradient_checkpointing` names; a baseline has one."""
        depth = len(self.model.get("depths", (2, 2, 4))) if self.model_type == "hdit" else 1
        if self.gradient_checkpointing in ("all", "none"):
            return list(range(depth)) if self.gradient_checkpointing == "all" else []
        return sorted({int(level) for level in self.gradient_checkpointing.split(",")})

    def to_dict(self) -> dict:
        """Return all settings but the token, as JSON data."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}


def names_where(**metadata: Any) -> tuple[str, ...]:
    """Return the names of the fields whose `option` says so, for instance `names_where(per_run=True)`."""
    fields = dataclasses.fields(TrainingConfig)
    return tuple(f.name for f in fields if all(f.metadata[key] == value for key, value in metadata.items()))


def default_of(name: str) -> Any:
    f = TrainingConfig.__dataclass_fields__[name]
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def make_parser(description: str | None = None) -> ArgumentParser:
    """Return a parser of all flags that has no defaults: what it finds are the flags that were given."""
    parser = ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {"general": parser}
    for f in dataclasses.fields(TrainingConfig):
        about = f.metadata
        if about["group"] == "files only":
            continue
        group = groups.get(about["group"]) or groups.setdefault(
            about["group"], parser.add_argument_group(about["group"])
        )
        base, many, _ = type_of(f)
        arguments = {"help": about["help"], "choices": about["choices"], **about["flag"]}
        if base is bool:
            arguments = {"help": about["help"], "action": argparse.BooleanOptionalAction}
        else:
            arguments["type"] = about["parse"] or (base if base in (int, float) else str)
            if many:
                arguments.setdefault("nargs", "+")
        if f.name == "output_dir":
            arguments["required"] = True
        group.add_argument(f"--{f.name}", *about["aliases"], dest=f.name, **arguments)
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> TrainingConfig:
    """
    Read flags, and the config file that they name.

    Raises:
        SystemExit: with status 2 for wrong ones, after one line that says what is wrong.
    """
    parser = make_parser(description)
    flags = vars(parser.parse_args(argv))
    try:
        config = read_json(flags["config"], "config") if "config" in flags else {}
    except ValueError as error:
        parser.error(str(error))
    try:
        return TrainingConfig.from_sources(flags, config)
    except ValueError as error:
        where = f"--config {flags['config']!r} has " if str(error).startswith("unknown keys") else ""
        parser.error(f"{where}{error}")


def read_json(path: str, flag: str) -> dict:
    """
    Read a JSON object.

    Raises:
        ValueError: for a file that is not there, no JSON, or something else than an object.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--{flag} {path!r} is not a readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{flag} {path!r} must hold a JSON object ({{...}}), not {json.dumps(found)[:40]}.")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def type_of(f: dataclasses.Field) -> tuple[type, bool, bool]:
    """Return the type of a field's values, whether it is a list of them, and whether None is allowed."""
    annotation, optional = f.type, False
    if isinstance(annotation, types.UnionType):
        optional = True
        annotation = next(arg for arg in get_args(annotation) if arg is not types.NoneType)
    many = get_origin(annotation) is list
    return (get_args(annotation)[0] if many else annotation), many, optional


def normalize(config: TrainingConfig) -> None:
    """Bring what flags and config files write in different ways to one form."""
    for name in ("resolution", "ema_decay", "ema_sigma_rel"):
        value = getattr(config, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, [value])
    if isinstance(config.condition_columns, str):
        config.condition_columns = comma_separated(config.condition_columns)
    elif isinstance(config.condition_columns, list):
        nested = [x if isinstance(x, list) else [x] for x in config.condition_columns]
        config.condition_columns = [name for names in nested for name in names]
    params = config.noise_density_params
    if isinstance(params, list) and all(isinstance(pair, tuple) for pair in params):
        config.noise_density_params = dict(params)
    if isinstance(config.compile, bool):
        config.compile = "default" if config.compile else "none"
    checkpointing = config.gradient_checkpointing
    if isinstance(checkpointing, bool):
        config.gradient_checkpointing = "all" if checkpointing else "none"
    elif isinstance(checkpointing, list):
        config.gradient_checkpointing = ",".join(map(str, checkpointing))


def check_value(f: dataclasses.Field, value: Any) -> None:
    """Raise ValueError unless a value has the type, the choices and the domain of its field."""
    base, many, optional = type_of(f)
    if value is None and (optional or f.name == "output_dir"):
        return
    wanted = {int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}.get(base, "a text")
    allowed = {float: (int, float)}.get(base, base)
    values = value if many and isinstance(value, list) else [value]
    if not all(isinstance(v, allowed) and (base is bool or not isinstance(v, bool)) for v in values):
        raise ValueError(f"{f.name} must be {wanted}, got {value!r}.")
    about = f.metadata
    if about["choices"] is not None and not set(values) <= set(about["choices"]):
        raise ValueError(f"{f.name} must be one of {', '.join(map(str, about['choices']))}; got {value!r}.")
    if base in (int, float):
        for v in values:
            if math.isnan(v) or (about["finite"] and math.isinf(v)):
                raise ValueError(f"{f.name} must be a finite number, got {value!r}.")
            if not in_domain(v, about):
                infinite = "" if about["finite"] else " (inf is allowed)"
                raise ValueError(f"{f.name} must {domain_of(about)}{infinite}, got {value!r}.")
    if f.name == "ema_decay" and not value:
        raise ValueError("ema_decay is empty; give at least one number, for instance 0.9999.")
    if f.name == "resolution" and len(value) not in (1, 2):
        raise ValueError(f"resolution must be one number, or height and width; got {value}.")
    if f.name == "gradient_checkpointing":
        try:
            levels(value)
        except ValueError:
            raise ValueError(
                f"gradient_checkpointing must be all, none or levels such as 0,1; got {value!r}."
            ) from None
    if base is dict and f.name in ("noise_density_params", "scheduler"):
        check_numbers(f.name, value)


def check_numbers(name: str, values: Mapping) -> None:
    """Raise ValueError unless the parameters of the noise density, and the scheduler's sigmas, are finite numbers."""
    for key, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (name == "noise_density_params" or key.startswith("sigma_")) and not number:
            if key != "sigma_schedule":
                raise ValueError(f"{name}: {key} must be a number, got {value!r}.")
        elif number and not math.isfinite(value):
            raise ValueError(f"{name}: {key} must be a finite number, got {value!r}.")
        if key in ("sigma_min", "sigma_max", "sigma_data") and value <= 0:
            raise ValueError(f"{name}: {key} must be over 0, got {value!r}.")


def in_domain(value: float, about: Mapping) -> bool:
    lowest, above, highest, below = (about[name] for name in ("at_least", "above", "at_most", "below"))
    return (
        (lowest is None or value >= lowest)
        and (above is None or value > above)
        and (highest is None or value <= highest)
        and (below is None or value < below)
    )


def domain_of(about: Mapping) -> str:
    lowest, above, highest, below = (about[name] for name in ("at_least", "above", "at_most", "below"))
    if lowest is not None and highest is not None:
        return f"be from {lowest:g} to {highest:g}"
    if lowest is not None and below is not None:
        return f"be from {lowest:g} to below {below:g}"
    if above is not None and below is not None:
        return f"be between {above:g} and {below:.4f}, both excluded"
    if above is not None:
        return f"be over {above:g}"
    return "not be negative" if lowest == 0 else f"be at least {lowest:g}"


def check_combinations(c: TrainingConfig) -> None:
    """Raise ValueError for settings that need, or exclude, each other."""
    changed = {f.name for f in dataclasses.fields(c) if getattr(c, f.name) != default_of(f.name)}
    hub_flags = [name for name in ("hub_model_id", "hub_token", "hub_private_repo") if getattr(c, name)]
    metrics_flags = [
        name
        for name in ("metrics", "metrics_images", "metrics_steps", "feature_network", "feature_weights")
        if name in changed
    ]
    upscale_flags = [name for name in ("upscale_factor", "max_conditioning_noise") if name in changed]
    trackers = [] if c.report_to in (None, "none") else c.report_to.split(",")
    unknown_trackers = sorted(set(trackers) - set(TRACKERS))
    repeated = [name for name in ("streaming", "buckets") if getattr(c, name)]
    # Each rule: whether it is broken, and what to do.
    rules = [
        (
            (c.train_data_dir is None) == (c.dataset_name is None) and c.output_dir is not None,
            "give either --train_data_dir or --dataset_name.",
        ),
        (hub_flags and not c.push_to_hub, f"--{(hub_flags or [''])[0]} does nothing without --push_to_hub."),
        (
            c.augment_prob and c.random_flip,
            "--augment_prob mirrors half of the images already, and tells the model: leave --random_flip out.",
        ),
        (
            c.ema_snapshot_steps and not c.ema_sigma_rel,
            "--ema_snapshot_steps saves snapshots of the averages that --ema_sigma_rel names; name some.",
        ),
        (
            upscale_flags and c.task != "upscale",
            f"--{(upscale_flags or [''])[0]} does nothing without --task upscale.",
        ),
        (
            c.model_type != "hdit" and "mapping_lr_scale" in changed,
            f"--mapping_lr_scale is for HDiT's mapping network, which --model_type {c.model_type} does not have.",
        ),
        (
            c.model_type == "dit" and c.buckets,
            "--buckets needs a network that takes several sizes; --model_type dit takes one square size.",
        ),
        (
            c.compile in CUDA_GRAPHS and c.gradient_accumulation_steps > 1,
            f"--compile {c.compile} replays CUDA graphs, which reuse the memory of one batch's gradients for the next "
            "batch: with --gradient_accumulation_steps, use --compile default.",
        ),
        (
            c.condition_statistics and not c.condition_columns,
            "--condition_statistics are those of --condition_columns; name these.",
        ),
        (c.streaming and c.dataset_name is None, "--streaming reads a --dataset_name."),
        (
            c.streaming and c.max_train_steps is None,
            "--streaming needs --max_train_steps: a stream does not tell how long an epoch is.",
        ),
        (
            c.streaming and c.buckets,
            "--buckets needs to know all images' sizes beforehand, which --streaming does not.",
        ),
        (
            c.mixed_precision == "fp16" and not c.force_fp16,
            "--mixed_precision fp16: numbers over 65,504 are infinite in float16, and training then skips steps or "
            "diverges. Use bf16, which has the range of float32, or no; or insist with --force_fp16.",
        ),
        (
            c.force_fp16 and c.mixed_precision != "fp16",
            "--force_fp16 does nothing without --mixed_precision fp16.",
        ),
        (
            metrics_flags and not c.metrics_every,
            f"--{(metrics_flags or [''])[0]} does nothing without --metrics_every.",
        ),
        (
            c.metrics_every and c.metrics_images < 4,
            f"metrics_images must be at least 4, got {c.metrics_images}.",
        ),
        (
            c.metrics_every and repeated,
            f"--metrics_every reads the set again and again, at one size: leave --{(repeated or [''])[0]} out, or run "
            "evaluate_hdit.py afterwards.",
        ),
        (
            c.metrics_every and c.task == "upscale",
            "--metrics_every compares images generated from noise, not those of --task upscale.",
        ),
        (
            unknown_trackers,
            f"report_to must be of {', '.join(TRACKERS)}, or none; got {', '.join(unknown_trackers)}.",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise ValueError(message)


def check_levels(c: TrainingConfig) -> None:
    """Raise ValueError for gradient checkpointing of levels that the network does not have."""
    if c.gradient_checkpointing in ("all", "none"):
        return
    named, depths = c.checkpointed_levels, c.model.get("depths", (2, 2, 4))
    if c.model_type != "hdit":
        raise ValueError(
            f"gradient_checkpointing names levels {named}, which only HDiT has; without them it is for all blocks of a "
            f"{c.model_type}."
        )
    if not set(named) <= set(range(len(depths))):
        raise ValueError(f"gradient_checkpointing names levels {named}; there are 0 to {len(depths) - 1}.")
