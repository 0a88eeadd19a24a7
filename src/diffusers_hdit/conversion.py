"""Checkpoints of the reference implementation (k-diffusion, `image_transformer_v2`), read and written.

    python -m diffusers_hdit.conversion CHECKPOINT --output_dir DIR [--config FILE] [--push_to_hub USER/NAME]

The names and the defaults of its configuration are those of k-diffusion's `config.py` and `image_transformer_v2.py`.
"""

import argparse
import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import presets
from .models.modeling_hdit import DESIGN_CHOICES, HDiTModel, axial_rotary_frequencies, cast_parameters


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

# Reference's names of attention types -> ours.
ATTENTION_TYPES = {
    "global": "global",
    "neighborhood": "neighborhood",
    "shifted-window": "shifted_window",
    "none": "none",
}


def model_config_from_reference(config: dict) -> dict:
    """Arguments of `HDiTModel` for a reference configuration, its defaults applied where it leaves them out."""
    model = config.get("model", {})
    if model.get("type") != "image_transformer_v2":
        raise ValueError(
            f"the configuration's model type is {model.get('type')!r}; only 'image_transformer_v2' is HDiT."
        )
    missing = [key for key in ("input_channels", "input_size", "patch_size", "widths", "depths") if key not in model]
    if missing:
        raise ValueError(f'the configuration\'s "model" lacks {", ".join(missing)}.')
    levels = len(model["widths"])
    self_attns = model.get("self_attns") or [{"type": "neighborhood"}] * (levels - 1) + [{"type": "global"}]
    for i, attn in enumerate(self_attns):
        if attn["type"] not in ATTENTION_TYPES:
            known = ", ".join(map(repr, ATTENTION_TYPES))
            raise ValueError(f"self_attns[{i}] has the type {attn['type']!r}; known are {known}.")
        if attn["type"] == "shifted-window" and "window_size" not in attn:
            raise ValueError(f"self_attns[{i}] is a shifted window without a window_size.")
    return {
        "sample_size": model["input_size"],
        "in_channels": model["input_channels"],
        "patch_size": model["patch_size"],
        "widths": model["widths"],
        "depths": model["depths"],
        "ff_widths": model.get("d_ffs") or None,
        "attention_types": [ATTENTION_TYPES[attn["type"]] for attn in self_attns],
        "attention_head_dim": [attn.get("d_head", 64) for attn in self_attns],
        "kernel_size": [attn.get("kernel_size", 7) for attn in self_attns],
        "window_size": [attn.get("window_size", 8) for attn in self_attns],
        "dropout": model.get("dropout_rate") or 0.0,
        "mapping_depth": model.get("mapping_depth", 2),
        "mapping_width": model.get("mapping_width", 256),
        "mapping_ff_width": model.get("mapping_d_ff") or None,
        "mapping_dropout": model.get("mapping_dropout_rate", 0.0),
        "num_classes": config.get("dataset", {}).get("num_classes") or None,
        "mapping_cond_dim": model.get("mapping_cond_dim", 0),
    }


def scheduler_config_from_reference(config: dict) -> dict:
    defaults = presets.load("tiny")["scheduler"]
    return {
        "sigma_min": config["model"].get("sigma_min", defaults["sigma_min"]),
        "sigma_max": config["model"].get("sigma_max", defaults["sigma_max"]),
        # 1, not the paper's 0.5: what the reference does where its configuration is silent.
        "sigma_data": config["model"].get("sigma_data", 1.0),
    }


def reference_config(model: HDiTModel, scheduler_config: Mapping, original: dict | None) -> dict:
    """The reference's configuration of a model: what the model says, on top of what else the original one said."""
    if not hasattr(model, "levels"):
        raise ValueError(f"the reference has no such network: it knows HDiT, this is a {type(model).__name__}.")
    out_channels = model.config.out_channels or model.config.in_channels
    inputs = model.config.in_channels + model.config.conditioning_channels
    if model.config.augment_cond_dim != 9 or out_channels != inputs:
        raise ValueError(
            "the reference has no such network: it needs augment_cond_dim=9 and as many output as input channels; this "
            f"model has augment_cond_dim={model.config.augment_cond_dim}, {inputs} input channels, out_channels={out_channels}."
        )
    other = [
        f"{name}={model.config[name]!r}"
        for name, choices in DESIGN_CHOICES.items()
        if model.config[name] != choices[0]
    ]
    if model.config.position_size is not None:
        other.append(f"position_size={model.config.position_size}")
    reference_types = {ours: name for name, ours in ATTENTION_TYPES.items()}
    other += [f"attention type {level.type!r}" for level in model.levels if level.type not in reference_types]
    if other:
        raise ValueError(
            f"the reference has no such network: it does not know {', '.join(dict.fromkeys(other))}. Only models with "
            f"the paper's design choices can be written: attention types {', '.join(map(repr, reference_types))}, and "
            f"{', '.join(f'{name}={choices[0]!r}' for name, choices in DESIGN_CHOICES.items())}."
        )
    config = copy.deepcopy(original or {})
    sample_size = model.config.sample_size
    self_attns = []
    for level in model.levels:
        attn = {"type": reference_types[level.type]}
        if level.type != "none":
            attn["d_head"] = level.head_dim
        if level.type == "neighborhood":
            attn["kernel_size"] = level.kernel_size
        if level.type == "shifted_window":
            attn["window_size"] = level.window_size
        self_attns.append(attn)
    config.setdefault("model", {}).update(
        type="image_transformer_v2",
        input_channels=model.config.in_channels,
        input_size=[sample_size, sample_size] if isinstance(sample_size, int) else list(sample_size),
        patch_size=list(model.patch_size),
        depths=[level.depth for level in model.levels],
        widths=[level.width for level in model.levels],
        d_ffs=[level.ff_width for level in model.levels],
        self_attns=self_attns,
        dropout_rate=[level.dropout for level in model.levels],
        mapping_depth=model.config.mapping_depth,
        mapping_width=model.config.mapping_width,
        mapping_d_ff=model.config.mapping_ff_width or 3 * model.config.mapping_width,
        mapping_cond_dim=model.config.mapping_cond_dim,
        mapping_dropout_rate=model.config.mapping_dropout,
        sigma_data=scheduler_config["sigma_data"],
        sigma_min=scheduler_config["sigma_min"],
        sigma_max=scheduler_config["sigma_max"],
    )
    config.setdefault("dataset", {})["num_classes"] = model.config.num_classes or 0
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Weights

# Ours -> the reference's, applied in turn to a name.
RENAMINGS = [
    (r"^conditioning\.mapping\.(norm_in|norm_out)\.weight$", r"conditioning.mapping.\1.scale"),
    (r"^conditioning\.mapping\.norm_in\.", "mapping.in_norm."),
    (r"^conditioning\.mapping\.norm_out\.", "mapping.out_norm."),
    (r"^conditioning\.mapping\.blocks\.(\d+)\.norm\.weight$", r"mapping.blocks.\1.norm.scale"),
    (r"^conditioning\.mapping\.blocks\.(\d+)\.ff\.", r"mapping.blocks.\1."),
    (r"^conditioning\.time_proj\.", "time_emb."),
    (r"^conditioning\.time_embedder\.", "time_in_proj."),
    (r"^conditioning\.augment_proj\.", "aug_emb."),
    (r"^conditioning\.augment_embedder\.", "aug_in_proj."),
    (r"^conditioning\.class_embedder\.", "class_emb."),
    (r"^conditioning\.mapping_cond_embedder\.", "mapping_cond_in_proj."),
    (r"^(down|up)_blocks\.", r"\1_levels."),
    (r"^transformer_blocks\.", "mid_level."),
    (r"\.norm1\.", ".self_attn.norm."),
    (r"\.norm2\.", ".ff.norm."),
    (r"\.attn\.to_[qkv]\.", ".self_attn.qkv_proj."),
    (r"\.attn\.to_out\.0\.", ".self_attn.out_proj."),
    (r"\.attn\.scale$", ".self_attn.scale"),
    (r"^norm_out\.weight$", "out_norm.scale"),
]
QKV = ("to_q", "to_k", "to_v")


def reference_name(name: str) -> str:
    for pattern, replacement in RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def weights_to_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the reference's names; queries, keys and values in one matrix, rotary frequencies added."""
    weights = {}
    for name, value in state_dict.items():
        if ".attn.to_q." in name:
            value = torch.cat([state_dict[name.replace("to_q", part)] for part in QKV])
        elif ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        weights[reference_name(name)] = value
        if name.endswith(".attn.scale"):
            width = len(state_dict[name.replace("scale", "to_q.weight")])
            key = reference_name(name).replace("self_attn.scale", "self_attn.pos_emb.freqs")
            weights[key] = axial_rotary_frequencies(len(value), width // len(value))
    return weights


def weights_from_reference(model: HDiTModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    The reference's weights under our names.

    Raises:
        ValueError: naming the first weights that are missing, unknown or of another shape than the model's.
    """
    expected = weights_to_reference(model.state_dict())
    problems = [f"{key} is missing (expected {tuple(expected[key].shape)})" for key in expected if key not in weights]
    for key, value in weights.items():
        if key not in expected:
            problems.append(f"{key} {tuple(value.shape)} is not part of the configured network")
        elif value.shape != expected[key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
        elif key.endswith(".freqs") and not torch.allclose(value.float(), expected[key], rtol=1e-2):
            problems.append(f"{key} holds other rotary frequencies than the paper's")
        elif not value.isfinite().all():
            problems.append(f"{key} holds NaN or infinite values")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(
            f"the checkpoint does not fit its configuration, or is damaged: {'; '.join(problems[:8])}{more}."
        )

    def ours(name: str) -> Tensor:
        value = weights[reference_name(name)]
        for i, part in enumerate(QKV):
            if f".attn.{part}." in name:
                return value.chunk(3)[i]
        return value

    return {name: ours(name) for name in model.state_dict()}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read_checkpoint(checkpoint: str | os.PathLike | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict | None]:
    """Weights under the reference's names, and the configuration that lies beside them, if any. EMA weights if there are."""
    if isinstance(checkpoint, Mapping):
        path, contents, metadata = "the state dict", dict(checkpoint), {}
    else:
        path = Path(checkpoint)
        if not path.is_file():
            raise ValueError(f"there is no checkpoint file {str(path)!r}.")
        contents, metadata = read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    config = embedded_config(path, metadata) if "config" in metadata else contents.get("config")
    weights = contents.get("model_ema") or contents.get("model") or contents
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of the reference: expected a state dict, or a training checkpoint with "
            f"'model_ema' or 'model'; found the keys {list(contents)[:8]}."
        )
    return dict(weights), config


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def embedded_config(path: Path, metadata: Mapping[str, str]) -> dict | None:
    """Return the configuration in the metadata of a safetensors file, None if there is none."""
    try:
        return json.loads(metadata.get("config", "null"))
    except ValueError as error:
        raise ValueError(
            f"the configuration in the metadata of {str(path)!r} is not readable JSON: {error}"
        ) from error


def read_pickle(path: Path) -> dict:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in many ways: UnpicklingError, EOFError, KeyError, ...
        raise ValueError(
            f"{str(path)!r} can't be read as tensors alone (weights_only=True); it is damaged, or holds Python objects, "
            f"which could run code: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(f"{str(path)!r} holds a {type(contents).__name__}, not a checkpoint.")
    return contents


def read_config(config: str | os.PathLike | dict) -> dict:
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if path.suffix == ".safetensors":
        found = embedded_config(path, read_safetensors(path)[1])
        if found is None:
            raise ValueError(f"{str(path)!r} has no configuration in its metadata.")
        return found
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a readable JSON configuration: {error}") from error


def load_pipeline(
    checkpoint: str | os.PathLike | Mapping[str, Tensor],
    config: str | os.PathLike | dict | None,
    dtype: torch.dtype | None,
    pipeline_class: type[DiffusionPipeline],
) -> DiffusionPipeline:
    """See `HDiTPipeline.from_k_diffusion`."""
    weights, found = read_checkpoint(checkpoint)
    if config is None and found is None:
        raise ValueError(
            "the checkpoint holds no configuration; give the one it was trained with: config=FILE.json (--config)."
        )
    where = repr(str(config)) if isinstance(config, (str, os.PathLike)) else "the configuration"
    config = found if config is None else read_config(config)
    try:
        model = HDiTModel(**model_config_from_reference(config))
        scheduler = EDMDPMSolverMultistepScheduler(**scheduler_config_from_reference(config))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{where} has a value of a wrong type or shape, or lacks one ({type(error).__name__}: {error}); give the one "
            "that k-diffusion trained with."
        ) from error
    model.load_state_dict(weights_from_reference(model, weights))
    cast_parameters(model.eval(), dtype or torch.float32)
    return pipeline_class(transformer=model, scheduler=scheduler, k_diffusion_config=config)


def save_pipeline(pipeline: DiffusionPipeline, path: str | os.PathLike) -> None:
    """See `HDiTPipeline.save_k_diffusion`."""
    model = pipeline.transformer
    config = reference_config(model, pipeline.scheduler.config, pipeline.config.k_diffusion_config)
    weights = {name: value.contiguous() for name, value in weights_to_reference(model.state_dict()).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: an interrupted write must not leave half a checkpoint in the place of a whole one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, metadata={"config": json.dumps(config)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(args: list[str] | None = None) -> None:
    from .pipelines.pipeline_hdit import HDiTPipeline

    parser = argparse.ArgumentParser(
        prog="python -m diffusers_hdit.conversion",
        description="Converts a k-diffusion HDiT checkpoint to a folder for HDiTPipeline.from_pretrained.",
    )
    parser.add_argument("checkpoint", help=".safetensors, or a training .pth (its EMA weights are taken)")
    parser.add_argument("--output_dir", required=True, help="folder to write the pipeline to; new or empty")
    parser.add_argument("--config", help="the reference's JSON configuration, if the checkpoint holds none")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="push it to the Hugging Face Hub as well")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: into a private repository")
    args = parser.parse_args(args)
    if args.private and not args.push_to_hub:
        parser.error("--private does nothing without --push_to_hub.")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as error:
            parser.error(str(error))
    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir!r} is not an empty folder; nothing in it was touched.")
    try:
        pipeline = HDiTPipeline.from_k_diffusion(args.checkpoint, config=args.config)
    except ValueError as error:
        parser.error(str(error))
    pipeline.save_pretrained(output_dir)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"Wrote {output_dir}: {parameters / 1e6:.1f}M parameters. HDiTPipeline.from_pretrained({str(output_dir)!r})")
    if args.push_to_hub:
        from .hub import push as hub

        hub.main([str(output_dir), args.push_to_hub, *(["--private"] if args.private else [])])


if __name__ == "__main__":
    main()
