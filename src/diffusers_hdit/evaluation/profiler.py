"""Parameters, multiply-accumulates and activation memory of a model, without allocating its weights.

python -m diffusers_hdit.evaluation.profiler --preset ffhq-1024 [--resolution N]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .. import presets
from ..models.modeling_hdit import HDiTAttention, HDiTModel, cast_parameters


@dataclass
class LevelProfile:
    """What the blocks of one level cost for one image (`tokens` of them), or what is outside of all levels."""

    name: str
    tokens: int | None = None
    parameters: int = 0
    macs: int = 0
    attention_macs: int = 0  # the part of `macs` in products of queries, keys and values


@dataclass
class ModelProfile:
    levels: list[LevelProfile]
    activation_bytes: int

    @property
    def parameters(self) -> int:
        return sum(level.parameters for level in self.levels)

    @property
    def macs(self) -> int:
        return sum(level.macs for level in self.levels)


def profile_model(
    config: dict, resolution: int | tuple[int, int] | None = None, checkpointed_levels: Sequence[int] = ()
) -> ModelProfile:
    """
    Counts what a forward pass of one image costs.

    A multiply-accumulate of a linear layer or of an attention product counts as one (the "GFLOP" of the paper's table
    7 are these); an attention product is counted for the keys that a query attends to, not for those a kernel loads
    besides. Activations are the tensors that autograd keeps for the backward pass in bfloat16, as PyTorch's own
    bookkeeping reports them for a pass with fake tensors on the CPU.

    Args:
        config: arguments of `HDiTModel`.
        resolution: pixels, one number or (height, width); by default the model's sample_size.
        checkpointed_levels: levels of which only the blocks' inputs are kept (gradient checkpointing).

    Raises:
        ValueError: for a configuration or a resolution that does not fit.
    """
    with FakeTensorMode():
        model = HDiTModel(**config)
        model.set_gradient_checkpointing_levels(checkpointed_levels)
        return _profile(model, resolution)


def profile_network(
    network_class: type,
    config: dict,
    resolution: int | tuple[int, int] | None = None,
    checkpointed_levels: Sequence[int] = (),
) -> ModelProfile:
    """
    What `profile_model` counts, in the same units, for any network of `networks.NETWORKS`: to compare them at equal
    parameters or equal work. All but HDiT come as one level; matrix products and convolutions are counted as PyTorch
    sees them run.

    Args:
        network_class, config: the class, and its arguments.
        resolution, checkpointed_levels: as in `profile_model`; a baseline has one level, 0.

    Raises:
        ValueError: for a configuration or a resolution that does not fit.
    """
    if issubclass(network_class, HDiTModel):
        return profile_model(config, resolution, checkpointed_levels)
    with FakeTensorMode():
        network = network_class(**config)
        network.set_gradient_checkpointing_levels(checkpointed_levels)
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution or network.sample_size
        network.check_size(height, width)
        parameters = sum(p.numel() for p in network.parameters())
        # The counter does not know the fused attention kernels of all devices; two matrix products it does.
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(**inputs(network, height, width, torch.float32))
        level = LevelProfile("all", parameters=parameters, macs=counter.get_total_flops() // 2)
        return ModelProfile([level], activation_bytes(network, height, width))


def _profile(model: HDiTModel, resolution: int | tuple[int, int] | None) -> ModelProfile:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution or model.sample_size
    model.check_size(height, width)

    grids = [(height // model.patch_size[0] >> i, width // model.patch_size[1] >> i) for i in range(len(model.levels))]
    rows = [LevelProfile(f"{level.type} {h}×{w}", h * w) for level, (h, w) in zip(model.levels, grids, strict=True)]
    between, conditioning = LevelProfile("patches, merges, splits"), LevelProfile("conditioning")
    for name, module in model.named_modules():
        part, *rest = name.split(".")
        index = int(rest[0]) if rest and part not in ("conditioning", "patch_in", "patch_out") else 0
        if part == "transformer_blocks":
            level, row = len(rows) - 1, rows[-1]
        elif part in ("down_blocks", "up_blocks"):
            level, row = index, rows[index]
        elif part == "conditioning":
            level, row = None, conditioning
        else:
            # A merge and a split see the tokens of the inner of their two levels, what mixes skips those of the outer.
            inner = part in ("merges", "splits") and bool(rest) and rest[-1] != "mix"
            level, row = index + inner, between
        row.parameters += sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            # The conditioning, and its projections in the adaptive norms, are there once for an image.
            tokens = 1 if level is None or ".norm" in name else rows[level].tokens
            row.macs += module.weight.numel() * tokens
        if isinstance(module, HDiTAttention):
            # Scores, and their product with the values.
            macs = 2 * module.processor.query_key_pairs(*grids[level]) * module.to_q.out_features
            row.macs += macs
            row.attention_macs += macs
    return ModelProfile([*rows, between, conditioning], activation_bytes(model, height, width))


def activation_bytes(model: nn.Module, height: int, width: int) -> int:
    """
    Bytes that autograd keeps of a forward pass of one bfloat16 image; weights are not counted. Neighborhood attention is
    that of the tiles, norms and activations are PyTorch's: they work everywhere and keep most, whatever this machine has.
    """
    cast_parameters(model.train(), torch.bfloat16)
    if isinstance(model, HDiTModel):
        model.set_neighborhood_backend("tiled")
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # The reference keeps the storage alive, so that its address is not given to another.
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    def recompute(block, *block_inputs):
        # Checkpointing keeps a block's input without autograd's knowing.
        keep(block_inputs[0])
        return checkpoint(block, *block_inputs, use_reentrant=False)

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = recompute
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs(model, height, width, torch.bfloat16))
    return sum(size for size, _ in kept.values())


def inputs(model: nn.Module, height: int, width: int, dtype: torch.dtype) -> dict:
    """What a network is called with for one image."""
    sample = torch.empty(1, model.config.in_channels, height, width, dtype=dtype)
    channels = model.config.conditioning_channels
    conditioning = {"conditioning_image": sample.new_empty(1, channels, height, width)} if channels else {}
    return {"sample": sample, "timestep": torch.zeros(1), **conditioning}


def report(profile: ModelProfile) -> str:
    lines = [f"{'level':<28}{'tokens':>9}{'parameters':>13}{'GMAC':>9}{'share':>8}{'attention products':>20}"]
    for level in profile.levels:
        lines.append(
            f"{level.name:<28}{f'{level.tokens:,}' if level.tokens else '':>9}{level.parameters / 1e6:>12.1f}M{level.macs / 1e9:>9.1f}"
            f"{level.macs / profile.macs:>8.1%}{level.attention_macs / profile.macs:>20.1%}"
        )
    lines += [
        f"{'all':<37}{profile.parameters / 1e6:>12.1f}M{profile.macs / 1e9:>9.1f}",
        f"activations kept for the backward pass, bfloat16, one image: {profile.activation_bytes / 2**20:,.0f} MiB",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_hdit.evaluation.profiler",
        description="Parameters, multiply-accumulates (of one forward pass of one image) and activation memory.",
    )
    parser.add_argument("--preset", required=True, choices=presets.names())
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels, one number or height and width")
    args = parser.parse_args(args)
    resolution = args.resolution and (args.resolution * 2)[:2]
    try:
        print(report(profile_model(presets.load(args.preset)["model"], resolution)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
