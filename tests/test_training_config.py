"""The configuration of a training: what is refused, and what overrides what."""

import json
import re
import subprocess
import sys

import pytest
from running import write_config

from diffusers_hdit.training.config import TrainingConfig, make_parser, names_where, parse_args
from diffusers_hdit.training.trainer import check_network


def parse(tmp_path, *arguments, **config):
    path = str(write_config(tmp_path, **config))
    return parse_args(["--config", path, "--output_dir", "x", *map(str, arguments)])


def refused(parse, capsys):
    """The message of the error that ends the program, or of the check of the network that comes next."""
    try:
        check_network(parse())
    except SystemExit as stop:
        assert stop.code == 2
        return capsys.readouterr().err
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lr_scheduler", "zigzag"], "invalid choice: 'zigzag'"),
        (["--train_data_dir", "x"], "give either --train_data_dir or --dataset_name"),
        (["--lerning_rate", "1"], r"unknown flag --lerning_rate; did you mean --learning_rate\?\n$"),
        (["--mixed_precision", "fp16"], "numbers over 65,504 are infinite in float16.*--force_fp16"),
        (["--force_fp16"], "does nothing without --mixed_precision fp16"),
        (["--max_grad_norm", "0"], r"max_grad_norm must be over 0 \(inf is allowed\), got 0.0"),
        (["--lr_warmup_steps", "-1"], "lr_warmup_steps must not be negative"),
        (["--upscale_factor", "2"], "--upscale_factor does nothing without --task upscale"),
        (["--task", "upscale", "--upscale_factor", "1"], "upscale_factor must be at least 2, got 1"),
        (["--augment_prob", "0.1"], "leave --random_flip out"),
        (["--augment_prob", "1.5"], "augment_prob must be from 0 to 1, got 1.5"),
        (["--ema_snapshot_steps", "5"], "--ema_sigma_rel names"),
        (["--ema_decay", "1"], r"ema_decay must be from 0 to below 1, got \[1.0\]"),
        (["--gradient_checkpointing", "0,2"], r"levels \[0, 2\]; there are 0 to 1"),
        (["--gradient_checkpointing", "outer"], "invalid levels value: 'outer'"),
        (["--noise_density", "lognormal", "--noise_density_params", "mu=1"], "takes mean, std; got mu"),
        (["--report_to", "tensorboard,paper"], "report_to must be of tensorboard, wandb, trackio, or none; got paper"),
        (["--hub_model_id", "me/x"], "does nothing without --push_to_hub"),
    ],
)
def test_wrong_flags(tmp_path, capsys, arguments, message):
    assert re.search(message, refused(lambda: parse(tmp_path, *arguments), capsys), re.DOTALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lerning_rate": 1}, "has unknown keys: lerning_rate. Did you mean learning_rate. Allowed: .*learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": [1e-3]}, r"learning_rate must be a number, got \[0.001\]"),
        ({"compile": "fast"}, "compile must be one of none, default, reduce-overhead, max-autotune; got 'fast'"),
        (
            {"compile": "max-autotune", "gradient_accumulation_steps": 2},
            "which reuse the memory of one batch's gradients",
        ),
        ({"upscale_factor": 2}, "--upscale_factor does nothing without --task upscale"),
        ({"max_train_steps": 2.5}, "max_train_steps must be a whole number, got 2.5"),
        ({"validation_steps": 0}, "validation_steps must be at least 1, got 0"),
        ({"checkpoints_total_limit": -1}, "checkpoints_total_limit must not be negative, got -1"),
        ({"num_validation_images": 0}, "num_validation_images must be at least 1"),
        ({"resolution": [1, 2, 3]}, r"resolution must be one number, or height and width; got \[1, 2, 3\]"),
        ({"model": {"width": 3}}, '"model" has unknown keys: width'),
        ({"model": {"mapping_cond_dim": 3}}, "mapping_cond is sized by --condition_columns"),
        ({"noise_density": "pink"}, "noise_density must be one of cosine-interpolated.*got 'pink'"),
        ({"preset": "huge"}, "there is no preset 'huge'"),
    ],
)
def test_wrong_configs(tmp_path, capsys, config, message):
    assert re.search(message, refused(lambda: parse(tmp_path, **config), capsys))


def test_precedence_of_flags_config_and_preset(tmp_path):
    config = {"preset": "tiny", "ema_decay": 0.9, "model": {"depths": [1, 1, 1]}}
    args = parse(tmp_path, "--ema_decay", "0.7", "--no-random_flip", **config)
    assert args.ema_decay == [0.7] and args.random_flip is False
    assert args.learning_rate == 2e-3 and args.model["depths"] == [1, 1, 1] and args.model["patch_size"] == 2
    assert args.adam_beta2 == 0.95 and args.adam_epsilon == 1e-8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"streaming": True}, "--streaming reads a --dataset_name|needs --max_train_steps"),
        ({"streaming": True, "dataset_name": "x", "buckets": True}, "which --streaming does not"),
    ],
)
def test_streams(tmp_path, capsys, config, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, **{"max_train_steps": None if len(config) == 1 else 5, **config})
    assert re.search(message, capsys.readouterr().err)


def test_lists_in_flags_and_configs(tmp_path):
    args = parse(tmp_path, "--condition_columns", "temperature,pressure", "--noise_density", "lognormal",
                 "--noise_density_params", "mean=-0.4", "std=1.0", "--gradient_checkpointing", "1")  # fmt: skip
    assert args.condition_columns == ["temperature", "pressure"] and args.checkpointed_levels == [1]
    assert args.noise_density_params == {"mean": -0.4, "std": 1.0}
    config = {"condition_columns": ["a", "b"], "noise_density": "lognormal", "noise_density_params": {"mean": 0.0},
              "gradient_checkpointing": True, "ema_lengths": [0.05, 0.1], "resolution": 16}  # fmt: skip
    args = parse(tmp_path, **config)
    assert args.condition_columns == ["a", "b"] and args.noise_density_params == {"mean": 0.0}
    assert args.checkpointed_levels == [0, 1] and args.ema_sigma_rel == [0.05, 0.1] and args.resolution == [16]


def test_all_flags_of_the_interface_are_there():
    """Frozen: they stand in people's scripts and configs."""
    flags = """dataset_name dataset_config_name train_data_dir cache_dir image_column label_column streaming resolution
        center_crop random_flip train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs
        learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
        use_8bit_adam mixed_precision gradient_checkpointing allow_tf32 compile seed checkpointing_steps
        checkpoints_total_limit resume_from_checkpoint validation_steps num_validation_images report_to logging_dir
        dataloader_num_workers push_to_hub hub_model_id hub_token hub_private_repo condition_columns buckets preset
        noise_density loss_weighting label_dropout augment_prob ema_decay mapping_lr_scale config output_dir"""
    there = {action.dest for action in make_parser()._actions}
    assert set(flags.split()) <= there and set(names_where(resume="fixed") + names_where(resume="fork")) <= there


@pytest.mark.parametrize(
    "name", [name for name in TrainingConfig.__dataclass_fields__ if name not in ("model", "scheduler")]
)
def test_any_value_is_taken_or_refused_by_name(name):
    """Of a wrong type, not finite, out of its domain: a sentence that names the setting, never another error."""
    for value in ([], {}, True, 1.5, -1, float("nan"), float("inf"), "x", [None], [[1]]):
        try:
            TrainingConfig.from_sources({"dataset_name": "x", "output_dir": "y", name: value})
        except ValueError as error:
            assert name in str(error) or name in ("train_data_dir", "dataset_name", "task", "model_type", "streaming")
        else:
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
            assert name == "max_grad_norm" or all(abs(v) < float("inf") for v in numbers)


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "0"])
def test_learning_rates_that_can_not_be(tmp_path, capsys, number):
    assert "learning_rate must be" in refused(lambda: parse(tmp_path, "--learning_rate", number), capsys)
    assert "learning_rate must be" in refused(lambda: parse(tmp_path, learning_rate=float(number)), capsys)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{", "\x00"])
@pytest.mark.parametrize("flag", ["--config", "--condition_statistics"])
def test_files_that_hold_no_object(tmp_path, capsys, content, flag):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        parse_args([flag, str(path), "--dataset_name", "x", "--output_dir", "y", "--condition_columns", "c"])
    assert str(path) in capsys.readouterr().err


def test_names_of_registries_are_those_of_the_registries():
    from diffusers.optimization import SchedulerType

    from diffusers_hdit import diffusion
    from diffusers_hdit.evaluation import feature_extractors, metrics
    from diffusers_hdit.models.networks import NETWORKS, SHARED_ARGUMENTS
    from diffusers_hdit.training import config

    assert tuple(NETWORKS) == config.MODEL_TYPES and config.SHARED_MODEL_ARGUMENTS == SHARED_ARGUMENTS
    assert tuple(diffusion.DENSITIES) == config.NOISE_DENSITIES
    assert tuple(diffusion.WEIGHTINGS) == config.LOSS_WEIGHTINGS
    assert {*metrics.OF_NETWORK, *metrics.OF_STATISTICS} < set(config.METRICS)
    assert set(feature_extractors.HUB_WEIGHTS) < set(config.FEATURE_NETWORKS)
    assert {s.value for s in SchedulerType} - {"piecewise_constant"} == set(config.LR_SCHEDULERS)


MISTAKES = """
import sys
from diffusers_hdit.cli import main
try:
    main(["train", "--lerning_rate", "1"])
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "diffusers", "accelerate"} & set(sys.modules)
"""


def test_a_misspelt_flag_is_found_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", MISTAKES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: unknown flag --lerning_rate; did you mean --learning_rate?\n"


def test_a_configuration_in_python():
    config = TrainingConfig(output_dir="x", dataset_name="y", preset="tiny", model={"depths": [1, 1, 1]})
    assert config.model["widths"] == [64, 128, 256] and config.model["depths"] == [1, 1, 1]
    assert json.loads(json.dumps(config.to_dict()))["learning_rate"] == 5e-4 and config.sigma_data == 0.5
    with pytest.raises(ValueError, match="train_batch_size must be at least 1, got 0"):
        TrainingConfig(output_dir="x", dataset_name="y", train_batch_size=0)


def test_the_flag_and_the_key_of_the_first_version(tmp_path):
    assert parse(tmp_path, "--ema_lengths", "0.05").ema_sigma_rel == [0.05]
    assert parse(tmp_path, ema_lengths=[0.05]).ema_sigma_rel == [0.05]
