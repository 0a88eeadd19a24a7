"""The flags of `examples/train_hdit.py`: flags over the config file over the preset, checked before any work."""

import argparse
import inspect
import json
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType

from .. import diffusion, presets
from ..evaluation import feature_extractors as feature_networks
from ..evaluation import metrics
from ..models.networks import NETWORKS, SHARED_ARGUMENTS
from ..pipelines.upscaling import conditioning_channels


POSITIVE = ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs",
            "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "num_validation_images",
            "logging_steps", "ema_snapshot_steps", "metrics_every", "metrics_images", "metrics_steps")  # fmt: skip
SHARES = ("label_dropout", "augment_prob", "max_conditioning_noise")
# What a run is drawn and computed from, besides model and data: a run that goes on must keep to them.
SETTINGS = ("seed", "learning_rate", "mapping_lr_scale", "lr_scheduler", "adam_beta1", "adam_beta2", "adam_epsilon",
            "adam_weight_decay", "use_8bit_adam", "ema_decay", "ema_lengths", "random_flip", "center_crop",
            "augment_prob", "label_dropout", "noise_density", "noise_density_params", "loss_weighting", "buckets",
            "streaming", "task", "model_type", "upscale_factor", "max_conditioning_noise", "max_grad_norm", "lr_warmup_steps")  # fmt: skip
OF_METRICS = ("metrics", "metrics_images", "metrics_steps", "feature_network", "feature_weights")
# Modes of torch.compile with CUDA graphs.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
TRACKERS = ("tensorboard", "wandb", "trackio")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="JSON file with any of these flags")
    add("--preset", choices=presets.names(), help="model and training settings to start from")
    add("--output_dir", required=True, help="folder for the result; a run in it goes on")
    add("--dry_run", action=yes_no, default=False, help="say what would be done, and end")

    add("--model_type", choices=list(NETWORKS), default="hdit", help="dit, unet: baselines to compare HDiT with")
    add("--task", choices=["generate", "upscale"], default="generate", help="upscale: super-resolution")
    add("--upscale_factor", type=int, default=4, help="of --task upscale: --resolution by the size of its input")
    add("--max_conditioning_noise", type=float, default=0.5, help="of --task upscale: most noise on its input")

    data = parser.add_argument_group("data").add_argument
    data("--train_data_dir", help="folder of images; its sub-folders are the classes if --label_column is given")
    data("--dataset_name", help="a Hugging Face dataset (Hub or local folder), or fluent-faces, which comes with this")
    data("--dataset_config_name")
    data("--streaming", action=yes_no, default=False, help="read a --dataset_name as it comes, without a copy on disk")
    data("--cache_dir")
    data("--image_column", default="image")
    data("--label_column", help="train with class labels from this column")
    data("--condition_columns", nargs="+", type=names, help="train with the numbers or vectors in these columns")
    data(
        "--condition_statistics", type=json_data, metavar="FILE", help='of a stream\'s, {"mean": [...], "std": [...]}'
    )
    data("--resolution", type=int, nargs="+", help="one number, or height and width; default: the model's sample_size")
    data("--buckets", action=yes_no, default=False, help="keep aspect ratios: sizes of about --resolution's pixels")
    data("--center_crop", action=yes_no, default=False, help="crop the middle instead of a random place")
    data("--random_flip", action=yes_no, default=False, help="mirror half of the images")
    data("--augment_prob", type=float, default=0.0, help="non-leaking augmentation: probability of each transform")
    data("--cache_images", choices=["auto", "yes", "no"], default="auto", help="keep decoded images in memory")
    data("--dataloader_num_workers", type=int, default=0)

    run = parser.add_argument_group("training").add_argument
    run("--train_batch_size", type=int, default=16, help="images a step and device")
    run("--gradient_accumulation_steps", type=int, default=1)
    run("--max_train_steps", type=int, help="optimizer steps; wins over --num_train_epochs")
    run("--num_train_epochs", type=int, default=100)
    run("--learning_rate", type=float, default=5e-4)
    run("--mapping_lr_scale", type=float, default=1 / 3, help="learning rate of HDiT's mapping network, relative")
    run("--lr_scheduler", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup")  # fmt: skip
    run("--lr_warmup_steps", type=int, default=100)
    run("--adam_beta1", type=float, default=0.9)
    run("--adam_beta2", type=float, default=0.95)
    run("--adam_weight_decay", type=float, default=0.01)
    run("--adam_epsilon", type=float, default=1e-8)
    run("--use_8bit_adam", action=yes_no, default=False, help="optimizer states of 8 bits (bitsandbytes)")
    run("--max_grad_norm", type=float, default=1.0)
    run("--ema_decay", type=float, nargs="+", default=[0.9999], help="of the averages; the first is saved and shown")
    run(
        "--ema_lengths",
        type=float,
        nargs="*",
        default=[],
        help="relative lengths of power-function averages (0.05 0.10)",
    )
    run("--ema_snapshot_steps", type=int, help="keep those for reconstruct_ema.py; default: --checkpointing_steps")
    run("--noise_density", choices=list(diffusion.DENSITIES), default="cosine-interpolated")
    run(
        "--noise_density_params", nargs="+", type=named_number, default=[], metavar="NAME=NUMBER", help="mean=-1.2 ..."
    )
    run("--loss_weighting", choices=list(diffusion.WEIGHTINGS), default="soft-min-snr")
    run("--label_dropout", type=float, default=0.1, help="share of conditions left out, for classifier-free guidance")
    run(
        "--mixed_precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="auto: bf16 where it is fast"
    )
    run("--force_fp16", action=yes_no, default=False, help="let --mixed_precision fp16 be")
    run("--allow_tf32", action=yes_no, default=True)
    run("--gradient_checkpointing", nargs="?", const="all", default="none", type=levels, metavar="LEVELS",
        help="less memory, about a third more time: all levels, or some, such as 0,1 (0 is the outermost)")  # fmt: skip
    run("--compile", nargs="?", const="default", default="none", choices=["none", "default", *CUDA_GRAPHS],
        help="torch.compile the model; all modes but default replay CUDA graphs, on a GPU")  # fmt: skip
    run("--seed", type=int, default=0)

    out = parser.add_argument_group("saving and looking").add_argument
    out("--checkpointing_steps", type=int, default=5000)
    out("--checkpoints_total_limit", type=int, help="keep only the newest ones")
    out("--resume_from_checkpoint", help="a checkpoint folder; default, and 'latest': the newest in --output_dir")
    out("--validation_steps", type=int, default=5000, help="draw pictures every so many steps")
    out("--num_validation_images", type=int, default=16)
    out("--logging_steps", type=int, default=10)
    out("--metrics_every", type=int, help="compare averaged weights' images with the training set every so many steps")
    out("--metrics", nargs="+", choices=metrics.METRICS, help="which; default: those that the feature network has")
    out("--metrics_images", type=int, default=1000, help="drawn for them")
    out("--metrics_steps", type=int, default=50, help="of the sampler")
    out(
        "--feature_network",
        default="efficientnet-lite0",
        help=f"{', '.join(feature_networks.NETWORKS)}, or module:function",
    )
    out("--feature_weights", help="file (inception-v3), folder or name on the Hub (dinov2, clip); default: fetched")
    out("--report_to", help=f"{', '.join(TRACKERS)}, several with commas, or none; default: tensorboard if installed")
    out("--logging_dir", default="logs", help="inside the output folder")

    hub = parser.add_argument_group("Hugging Face Hub").add_argument
    hub("--push_to_hub", action=yes_no, default=False, help="push the pipeline, in the background, at each validation")
    hub("--hub_model_id", help="USER/NAME; default: the name of the output folder")
    hub("--hub_token", help="default: the one of `hf auth login`, or HF_TOKEN")
    hub("--hub_private_repo", action=yes_no, default=None, help="make the repository a private one")
    return parser


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def named_number(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    return name, float(number)


def json_data(path: str) -> dict:
    return json.loads(Path(path).read_text())


def levels(text: str) -> str:
    if text not in ("all", "none"):
        [int(level) for level in text.split(",")]
    return text


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """
    The flags, checked; `args.model` (arguments of the network that `args.model_type` names) and `args.scheduler` are
    complete afterwards.

    Raises:
        SystemExit: for wrong flags, having said what is wrong.
    """
    parser = make_parser(description)
    first, _ = parser.parse_known_args(argv)
    config = read_config(parser, first.config) if first.config else {}
    name = first.preset or config.get("preset")
    if name is not None and name not in presets.names():
        parser.error(f"there is no preset {name!r}; the presets are {', '.join(presets.names())}.")
    preset = presets.load(name) if name else {"model": {}, "scheduler": {}, "training": {}}
    config_model, scheduler = config.pop("model", {}), {**preset["scheduler"], **config.pop("scheduler", {})}
    parser.set_defaults(**{**preset["training"], **config})
    args = parser.parse_args(argv)
    tidy(args)
    check_types(parser, args)
    check_together(parser, args)
    args.model = network_arguments(parser, args, preset["model"], config_model)
    args.scheduler = {"sigma_min": 0.01, "sigma_max": 160.0, "sigma_data": 0.5, **scheduler}
    args.sigma_data = args.scheduler["sigma_data"]
    if args.augment_prob and args.model.get("augment_cond_dim", 9) != 9:
        parser.error("--augment_prob needs a model with augment_cond_dim 9.")
    try:
        middle = torch.tensor(0.5, dtype=torch.float64)
        diffusion.sigma_from_uniform(middle, args.noise_density, **args.noise_density_params)
    except ValueError as error:
        parser.error(f"noise_density_params: {error}")
    args.checkpointed_levels = checkpointed_levels(parser, args)
    return args


def network_arguments(parser, args: argparse.Namespace, preset: dict, config: dict) -> dict:
    """Arguments of the network, from the "model" of the preset and of the config file, and from the flags."""
    network_class = NETWORKS[args.model_type]
    if args.model_type != "hdit":  # a preset is one of HDiT
        preset = {name: value for name, value in preset.items() if name in SHARED_ARGUMENTS}
    model = {"sample_size": 256, **preset, **config}
    allowed = list(inspect.signature(network_class.__init__).parameters)[1:]
    unknown = sorted(set(model) - set(allowed))
    if unknown:
        parser.error(
            f'the config\'s "model" has unknown keys: {", ".join(unknown)}. {network_class.__name__}, which --model_type '
            f"{args.model_type} trains, takes {', '.join(allowed)}."
        )
    if (
        model.get("mapping_cond_dim")
        or model.get("conditioning_channels")
        or model.get("out_channels") not in (None, model.get("in_channels", 3))
    ):
        parser.error(
            "this script trains models with as many output as input channels, sizes their mapping_cond by "
            "--condition_columns, and their conditioning_channels by --task."
        )
    if args.task == "upscale":
        model["conditioning_channels"] = conditioning_channels(model.get("in_channels", 3))
    if args.resolution:
        model["sample_size"] = args.resolution[0] if len(args.resolution) == 1 else args.resolution
    return model


def checkpointed_levels(parser, args: argparse.Namespace) -> list[int]:
    """The levels that `--gradient_checkpointing` names; a baseline has one."""
    depth = len(args.model.get("depths", (2, 2, 4))) if args.model_type == "hdit" else 1
    if args.gradient_checkpointing in ("all", "none"):
        return list(range(depth)) if args.gradient_checkpointing == "all" else []
    levels = sorted({int(level) for level in args.gradient_checkpointing.split(",")})
    if args.model_type != "hdit":
        parser.error(
            f"gradient_checkpointing names levels {levels}, which only HDiT has; without them it is for all blocks of a "
            f"{args.model_type}."
        )
    if not set(levels) <= set(range(depth)):
        parser.error(f"gradient_checkpointing names levels {levels}; there are 0 to {depth - 1}.")
    return levels


def tidy(args: argparse.Namespace) -> None:
    """One form for what flags and config files write differently."""
    for name in ("resolution", "ema_decay", "ema_lengths"):
        value = getattr(args, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(args, name, [value])
    if isinstance(args.condition_columns, str):
        args.condition_columns = names(args.condition_columns)
    elif args.condition_columns:
        flat = [column for part in args.condition_columns for column in (part if isinstance(part, list) else [part])]
        args.condition_columns = flat
    if not isinstance(args.noise_density_params, dict):
        args.noise_density_params = dict(args.noise_density_params)
    if isinstance(args.compile, bool):
        args.compile = "default" if args.compile else "none"
    if isinstance(args.gradient_checkpointing, bool):
        args.gradient_checkpointing = "all" if args.gradient_checkpointing else "none"
    elif isinstance(args.gradient_checkpointing, list):
        args.gradient_checkpointing = ",".join(map(str, args.gradient_checkpointing))


def check_types(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse does not check: that counts are positive, and the types of values from a config file."""
    for action in parser._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        if value is None or name in ("noise_density_params", "condition_statistics"):
            continue
        kinds = {int: ("a whole number", int), float: ("a number", (int, float))}
        wanted, kind = kinds.get(action.type, ("a text", str))
        if isinstance(action, argparse.BooleanOptionalAction):
            wanted, kind = "true or false", bool
        values = value if action.nargs in ("+", "*") and isinstance(value, list) else [value]
        if not all(isinstance(v, kind) and (kind is bool or not isinstance(v, bool)) for v in values):
            parser.error(f"{name} must be {wanted}, got {value!r}.")
        if action.choices is not None and set(values) - set(action.choices):
            parser.error(f"{name} must be one of {', '.join(map(str, action.choices))}; got {value!r}.")
        if name in POSITIVE and min(values) < 1:
            parser.error(f"{name} must be at least 1, got {value!r}.")
        if name in ("dataloader_num_workers", "lr_warmup_steps") and value < 0:
            parser.error(f"{name} must not be negative, got {value!r}.")
        if name == "max_grad_norm" and not value > 0:
            parser.error(f"max_grad_norm must be over 0, got {value!r}; inf clips nothing.")
        if name in SHARES and not 0 <= value <= 1:
            parser.error(f"{name} must be from 0 to 1, got {value!r}.")
    if args.resolution is not None and len(args.resolution) not in (1, 2):
        parser.error(f"resolution must be one number, or height and width; got {args.resolution}.")
    if not args.ema_decay or not all(0 <= decay < 1 for decay in args.ema_decay):
        parser.error(f"ema_decay must be one or more numbers from 0 to below 1; got {args.ema_decay}.")


def check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Flags that need, or forbid, each other."""
    default = make_parser().get_default  # not the one at hand, whose defaults are what presets and config files say
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir or --dataset_name.")
    hub_flags = [name for name in ("hub_model_id", "hub_token", "hub_private_repo") if getattr(args, name)]
    if hub_flags and not args.push_to_hub:
        parser.error(f"--{hub_flags[0]} does nothing without --push_to_hub.")
    if args.augment_prob and args.random_flip:
        parser.error(
            "--augment_prob mirrors half of the images already, and tells the model: leave --random_flip out."
        )
    if args.ema_snapshot_steps and not args.ema_lengths:
        parser.error("--ema_snapshot_steps keeps snapshots of the averages that --ema_lengths names; name some.")
    for name in ("upscale_factor", "max_conditioning_noise"):
        if args.task != "upscale" and getattr(args, name) != default(name):
            parser.error(f"--{name} does nothing without --task upscale.")
    if args.model_type != "hdit" and args.mapping_lr_scale != default("mapping_lr_scale"):
        parser.error(
            f"--mapping_lr_scale is for HDiT's mapping network, which --model_type {args.model_type} has not."
        )
    if args.model_type == "dit" and args.buckets:
        parser.error("--buckets needs a network that takes several sizes; --model_type dit takes one square size.")
    if args.compile in CUDA_GRAPHS and args.gradient_accumulation_steps > 1:
        parser.error(
            f"--compile {args.compile} replays CUDA graphs, which use the memory of one part's gradients again for the "
            "next part's: with --gradient_accumulation_steps, take --compile default."
        )
    if args.upscale_factor < 2:
        parser.error(f"upscale_factor must be at least 2, got {args.upscale_factor}.")
    if args.condition_statistics and not args.condition_columns:
        parser.error("--condition_statistics are those of --condition_columns; name these.")
    if args.streaming and args.dataset_name is None:
        parser.error("--streaming reads a --dataset_name.")
    if args.streaming and args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps: nobody knows how long an epoch is.")
    if args.streaming and args.buckets:
        parser.error("--buckets needs to know all images' sizes beforehand, which --streaming does not.")
    if args.mixed_precision == "fp16" and not args.force_fp16:
        parser.error(
            "--mixed_precision fp16: numbers over 65,504 are infinite in float16, and training then skips steps or "
            "diverges. Use bf16, which has the range of float32, or no; or insist with --force_fp16."
        )
    if args.force_fp16 and args.mixed_precision != "fp16":
        parser.error("--force_fp16 does nothing without --mixed_precision fp16.")
    check_metrics_flags(parser, args)
    wanted = [] if args.report_to in (None, "none") else args.report_to.split(",")
    if unknown := sorted(set(wanted) - set(TRACKERS)):
        parser.error(f"report_to must be of {', '.join(TRACKERS)}, or none; got {', '.join(unknown)}.")


def check_metrics_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    changed = [name for name in OF_METRICS if getattr(args, name) != make_parser().get_default(name)]
    if not args.metrics_every:
        if changed:
            parser.error(f"--{changed[0]} does nothing without --metrics_every.")
        return
    if args.metrics_images < 4:
        parser.error(f"metrics_images must be at least 4, got {args.metrics_images}.")
    for name, reason in (("streaming", "reads the set again and again"), ("buckets", "compares at one size")):
        if getattr(args, name):
            parser.error(f"--metrics_every {reason}: leave --{name} out, or evaluate_hdit.py does it afterwards.")
    if args.task == "upscale":
        parser.error("--metrics_every compares images drawn from noise, not those of --task upscale.")


def read_config(parser: argparse.ArgumentParser, path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path!r} is not a readable JSON file: {error}")
    known = {action.dest for action in parser._actions} - {"config", "help"} | {"model", "scheduler"}
    unknown = sorted(set(config) - known)
    if unknown:
        parser.error(f"--config {path!r} has unknown keys: {', '.join(unknown)}. Allowed: {', '.join(sorted(known))}.")
    return config
