"""The flags of the training example: what is refused, and what wins over what."""

import re

import pytest
from running import write_config

from diffusers_hdit.training.training_args import SETTINGS, make_parser, parse_args


def parse(tmp_path, *arguments, **config):
    return parse_args(["--config", str(write_config(tmp_path, **config)), "--output_dir", "x", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lr_scheduler", "zigzag"], "invalid choice: 'zigzag'"),
        (["--train_data_dir", "x"], "give either --train_data_dir or --dataset_name"),
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate"),
        (["--mixed_precision", "fp16"], "numbers over 65,504 are infinite in float16.*--force_fp16"),
        (["--force_fp16"], "does nothing without --mixed_precision fp16"),
        (["--max_grad_norm", "0"], "max_grad_norm must be over 0, got 0.0; inf clips nothing"),
        (["--lr_warmup_steps", "-1"], "lr_warmup_steps must not be negative"),
        (["--upscale_factor", "2"], "--upscale_factor does nothing without --task upscale"),
        (["--task", "upscale", "--upscale_factor", "1"], "upscale_factor must be at least 2, got 1"),
        (["--augment_prob", "0.1"], "leave --random_flip out"),
        (["--augment_prob", "1.5"], "augment_prob must be from 0 to 1, got 1.5"),
        (["--ema_snapshot_steps", "5"], "--ema_lengths names"),
        (["--ema_decay", "1"], r"ema_decay must be one or more numbers from 0 to below 1; got \[1.0\]"),
        (["--gradient_checkpointing", "0,2"], r"levels \[0, 2\]; there are 0 to 1"),
        (["--gradient_checkpointing", "outer"], "invalid levels value: 'outer'"),
        (["--noise_density", "lognormal", "--noise_density_params", "mu=1"], "takes mean, std; got mu"),
        (["--report_to", "tensorboard,paper"], "report_to must be of tensorboard, wandb, trackio, or none; got paper"),
        (["--hub_model_id", "me/x"], "does nothing without --push_to_hub"),
    ],
)
def test_wrong_flags(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, *arguments)
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lerning_rate": 1}, "unknown keys: lerning_rate. Allowed: .*learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
        ({"learning_rate": [1e-3]}, r"learning_rate must be a number, got \[0.001\]"),
        ({"compile": "fast"}, "compile must be one of none, default, reduce-overhead, max-autotune; got 'fast'"),
        (
            {"compile": "max-autotune", "gradient_accumulation_steps": 2},
            "which use the memory of one part's gradients",
        ),
        ({"upscale_factor": 2}, "--upscale_factor does nothing without --task upscale"),
        ({"max_train_steps": 2.5}, "max_train_steps must be a whole number, got 2.5"),
        ({"validation_steps": 0}, "validation_steps must be at least 1, got 0"),
        ({"checkpoints_total_limit": -1}, "checkpoints_total_limit must be at least 1, got -1"),
        ({"num_validation_images": 0}, "num_validation_images must be at least 1"),
        ({"resolution": [1, 2, 3]}, r"resolution must be one number, or height and width; got \[1, 2, 3\]"),
        ({"model": {"width": 3}}, '"model" has unknown keys: width'),
        ({"model": {"mapping_cond_dim": 3}}, "sizes their mapping_cond by --condition_columns"),
        ({"noise_density": "pink"}, "noise_density must be one of cosine-interpolated.*got 'pink'"),
        ({"preset": "huge"}, "there is no preset 'huge'"),
    ],
)
def test_wrong_configs(tmp_path, capsys, config, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, **config)
    assert re.search(message, capsys.readouterr().err)


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
    assert args.checkpointed_levels == [0, 1] and args.ema_lengths == [0.05, 0.1] and args.resolution == [16]


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
    assert set(flags.split()) <= there and set(SETTINGS) <= there
