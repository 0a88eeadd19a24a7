"""Reading and writing the reference's checkpoints; that the numbers are right is shown in test_golden.py."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import save_file

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.conversion import (
    main,
    model_config_from_reference,
    read_safetensors,
    reference_config,
    weights_to_reference,
)


GOLDEN = REPOSITORY / "tests" / "fixtures" / "golden"
CHECKPOINT = GOLDEN / "class_shifted_window" / "checkpoint.safetensors"


@pytest.fixture
def golden():
    weights, metadata = read_safetensors(CHECKPOINT)
    return weights, json.loads(metadata["config"])


def same_weights(pipeline: HDiTPipeline, other: HDiTPipeline) -> bool:
    a, b = pipeline.transformer.state_dict(), other.transformer.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_state_dict_pth_and_safetensors_give_the_same(golden, tmp_path):
    weights, config = golden
    expected = HDiTPipeline.from_k_diffusion(CHECKPOINT)
    assert same_weights(HDiTPipeline.from_k_diffusion(weights, config=config), expected)

    # A training checkpoint: the averaged weights are taken, not the trained ones beside them.
    zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
    training = {
        "config": config,
        "model": zeros,
        "model_ema": weights,
        "opt": {"state": {}},
        "step": 5,
        "elapsed": 1.5,
    }
    torch.save(training, tmp_path / "training.pth")
    assert same_weights(HDiTPipeline.from_k_diffusion(tmp_path / "training.pth"), expected)

    torch.save(weights, tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same_weights(
        HDiTPipeline.from_k_diffusion(tmp_path / "weights.pth", config=tmp_path / "config.json"), expected
    )
    with pytest.raises(ValueError, match="holds no configuration; give the one"):
        HDiTPipeline.from_k_diffusion(tmp_path / "weights.pth")


def test_scheduler_and_labels_come_along():
    pipeline = HDiTPipeline.from_k_diffusion(CHECKPOINT)
    assert pipeline.transformer.config.num_classes == 5
    assert [pipeline.scheduler.config[key] for key in ("sigma_min", "sigma_max", "sigma_data")] == [0.01, 160, 0.5]
    assert not pipeline.transformer.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_fourier_phases(dtype):
    model = HDiTPipeline.from_k_diffusion(CHECKPOINT, torch_dtype=dtype).transformer
    assert model.dtype == dtype and model.conditioning.time_proj.weight.dtype == torch.float32


def test_defaults_of_the_reference():
    """What k-diffusion's load_config fills in."""
    model = {
        "type": "image_transformer_v2", "input_channels": 3, "input_size": [256, 256], "patch_size": [4, 4],
        "depths": [2, 2, 4], "widths": [128, 256, 512],
    }  # fmt: skip
    config = HDiTModel(**model_config_from_reference({"model": model, "dataset": {}})).config
    assert config.mapping_depth == 2 and config.mapping_width == 256 and config.num_classes is None
    written = reference_config(
        HDiTModel(**model_config_from_reference({"model": model})), {"sigma_min": 1, "sigma_max": 2, "sigma_data": 3}, None
    )["model"]  # fmt: skip
    assert written["d_ffs"] == [384, 768, 1536] and written["mapping_d_ff"] == 768
    assert written["self_attns"] == [
        {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
        {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
        {"type": "global", "d_head": 64},
    ]
    assert written["dropout_rate"] == [0.0] * 3


@pytest.mark.parametrize("scalar", [0.1, None, [0.0, 0.1, 0.2]])
def test_dropout_as_a_number_or_a_list(golden, scalar):
    config = copy.deepcopy(golden[1])
    config["model"]["dropout_rate"] = scalar
    levels = HDiTModel(**model_config_from_reference(config)).levels
    assert [level.dropout for level in levels] == (scalar if isinstance(scalar, list) else [scalar or 0.0] * 3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"widths": [32], "depths": [3]},
        {"attention_types": ["none", "shifted_window", "none"], "window_size": 4},
        {"attention_types": ["global", "neighborhood", "shifted_window"], "kernel_size": [3, 5, 3], "window_size": 4},
        {"patch_size": (2, 4), "sample_size": (32, 64), "in_channels": 1, "dropout": [0.0, 0.1, 0.2]},
        {"num_classes": 7, "mapping_cond_dim": 3, "mapping_depth": 1, "ff_widths": (40, 50, 60)},
    ],
)
def test_any_network_goes_there_and_back(make_model, tmp_path, overrides):
    """By rule, not by case: networks unlike the golden ones keep every weight and setting."""
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.02, sigma_max=90.0, sigma_data=0.4)
    pipeline = HDiTPipeline(make_model(**overrides), scheduler)
    pipeline.save_k_diffusion(tmp_path / "there.safetensors")
    back = HDiTPipeline.from_k_diffusion(tmp_path / "there.safetensors")
    assert same_weights(pipeline, back)
    sample, conditions = torch.randn(1, pipeline.transformer.config.in_channels, *back.transformer.sample_size), {}
    if "mapping_cond_dim" in overrides:
        conditions = {"mapping_cond": torch.randn(1, 3), "class_labels": torch.tensor([5])}
    with torch.no_grad():
        outputs = [p.transformer(sample, 0.3, **conditions).sample for p in (pipeline, back)]
    assert torch.equal(*outputs)
    assert back.transformer.sample_size == pipeline.transformer.sample_size
    assert back.scheduler.config.sigma_data == 0.4 and back.scheduler.config.sigma_max == 90.0
    back.save_k_diffusion(tmp_path / "again.safetensors")
    first, second = (read_safetensors(tmp_path / name) for name in ("there.safetensors", "again.safetensors"))
    assert json.loads(first[1]["config"]) == json.loads(second[1]["config"])


def test_networks_that_the_reference_does_not_have(make_model, tmp_path):
    from diffusers import EDMDPMSolverMultistepScheduler

    pipeline = HDiTPipeline(make_model(out_channels=1), EDMDPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="the reference has no such network.*out_channels=1"):
        pipeline.save_k_diffusion(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Damaged and wrong files


def refuses(weights, config, message):
    with pytest.raises(ValueError, match=message):
        HDiTPipeline.from_k_diffusion(weights, config=config)


def test_wrong_weights_name_key_expected_and_given_shape(golden):
    weights, config = golden
    key = "down_levels.0.1.self_attn.qkv_proj.weight"
    refuses({**weights, key: torch.zeros(96, 31)}, config, rf"{key} has shape \(96, 31\), expected \(96, 32\)")
    refuses({k: v for k, v in weights.items() if k != key}, config, rf"{key} is missing \(expected \(96, 32\)\)")
    refuses({**weights, "extra.weight": torch.zeros(2)}, config, r"extra.weight \(2,\) is not part of the configured")
    refuses({**weights, key: weights[key] * torch.nan}, config, f"{key} holds NaN")
    freqs = "mid_level.0.self_attn.pos_emb.freqs"
    refuses({**weights, freqs: weights[freqs] * 2}, config, f"{freqs} holds other rotary frequencies")


def test_weights_and_configuration_of_different_networks(golden):
    weights, config = golden
    config["model"]["widths"] = [32, 32, 64]
    refuses(weights, config, r"merges.1.proj.weight has shape \(48, 128\), expected \(64, 128\).*and \d+ more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "image_v1"}, "model type is 'image_v1'; only 'image_transformer_v2'"),
        ({"self_attns": [{"type": "axial"}] * 3}, "type 'axial'; known are 'global', 'neighborhood', 'shifted-window'"),
        ({"self_attns": [{"type": "shifted-window"}] * 3}, "without a window_size"),
        ({"depths": [2, 2]}, "depths has 2 entries, but widths has 3"),
    ],
)  # fmt: skip
def test_wrong_configurations(golden, change, message):
    weights, config = golden
    config["model"].update(change)
    refuses(weights, config, message)


def test_lacking_configuration(golden):
    weights, config = golden
    del config["model"]["widths"], config["model"]["patch_size"]
    refuses(weights, config, 'the configuration\'s "model" lacks patch_size, widths')


def test_damaged_files(golden, tmp_path):
    content = CHECKPOINT.read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("text", b"hello"), ("empty", b"")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damaged)
        refuses(path, None, "is not a readable safetensors file")
        path = path.with_suffix(".pth")
        path.write_bytes(damaged)
        refuses(path, golden[1], "can't be read as tensors alone")
    refuses(tmp_path / "none.safetensors", None, "there is no checkpoint file")
    torch.save([1, 2], tmp_path / "list.pth")
    refuses(tmp_path / "list.pth", golden[1], "holds a list, not a checkpoint")
    torch.save({"step": 3}, tmp_path / "step.pth")
    refuses(tmp_path / "step.pth", golden[1], r"not a checkpoint of the reference.*found the keys \['step'\]")


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_cannot_run_code(golden, tmp_path, capsys):
    torch.save({"model_ema": golden[0], "evil": Evil()}, tmp_path / "evil.pth")
    refuses(tmp_path / "evil.pth", golden[1], "holds Python objects, which could run code")
    assert "code ran" not in capsys.readouterr().out


def test_saving_over_a_checkpoint_leaves_no_half_file(golden, tmp_path, monkeypatch):
    pipeline = HDiTPipeline.from_k_diffusion(CHECKPOINT)
    path = tmp_path / "model.safetensors"
    pipeline.save_k_diffusion(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers_hdit.conversion.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pipeline.save_k_diffusion(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_weight_names_are_unique(make_model):
    model = make_model(num_classes=2, mapping_cond_dim=1)
    weights = weights_to_reference(model.state_dict())
    attention_blocks = sum(name.endswith("attn.scale") for name in model.state_dict())
    assert len(weights) == len(model.state_dict()) - 2 * attention_blocks + attention_blocks


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "diffusers_hdit.conversion",
        CHECKPOINT,
        "--output_dir",
        tmp_path / "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0.2M parameters" in done.stdout
    assert same_weights(HDiTPipeline.from_pretrained(tmp_path / "out"), HDiTPipeline.from_k_diffusion(CHECKPOINT))


def test_command_line_refuses(golden, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main([str(CHECKPOINT), "--output_dir", str(tmp_path / "out")])
    assert "is not an empty folder; nothing in it was touched" in capsys.readouterr().err
    save_file(golden[0], tmp_path / "bare.safetensors")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "bare.safetensors"), "--output_dir", str(tmp_path / "new")])
    assert "holds no configuration" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
