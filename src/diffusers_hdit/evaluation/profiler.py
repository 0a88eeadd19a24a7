"""Counting the parameters, multiply-accumulates and activation memory of a model, without allocating its weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ..models.modeling_hdit import HDiTAttention, HDiTModel, cast_parameters


@dataclass
class LevelProfile:
    """The cost of the blocks of one level, which has `tokens` tokens, or of the modules outside of all levels; for one image."""

    name: str
    tokens: int | None = None
    parameters: int = 0
    macs: int = 0
    attention_macs: int = 0  # those of `macs` that are products of queries, keys and values


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
    Count what a forward pass of one image costs.

    A multiply-accumulate of a linear layer or of an attention product counts as one (the paper's table 7 calls these
    "GFLOP"); an attention product is counted for the keys that a query attends to, not for others that a kernel loads.
    Activations are the tensors that autograd keeps for the backward pass in bfloat16, as PyTorch reports them for a pass
    with fake tensors on the CPU.

    Args:
        config: arguments of `HDiTModel`.
        resolution: pixels, one number or (height, width); by default the model's sample_size.
        checkpointed_levels: levels with gradient checkpointing, of which only the blocks' inputs are kept.

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
    Count what `profile_model` counts, in the same units, for any network of `networks.NETWORKS`, to compare them at equal
    parameters or equal work. All but HDiT have one level; their matrix products and convolutions are counted while they
    run.

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
        # The counter knows matrix products, but not the fused attention kernels of all devices.
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
            # The conditioning and its projections in the adaptive norms run once for an image.
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
    Return the bytes that autograd keeps of a forward pass of one bfloat16 image; weights are not counted. Neighborhood
    attention runs in tiles, norms and activations in PyTorch: this works on every machine and keeps the most.
    """
    cast_parameters(model.train(), torch.bfloat16)
    if isinstance(model, HDiTModel):
        model.set_neighborhood_backend("tiled")
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # The reference keeps the storage alive, so that no other gets its address.
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    def recompute(block, *block_inputs):
        # Autograd does not report the block's input that checkpointing keeps.
        keep(block_inputs[0])
        return checkpoint(block, *block_inputs, use_reentrant=False)

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = recompute
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs(model, height, width, torch.bfloat16))
    return sum(size for size, _ in kept.values())


def inputs(model: nn.Module, height: int, width: int, dtype: torch.dtype) -> dict:
    """Return the arguments of a network for one image."""
    sample = torch.empty(1, model.config.in_channels, height, width, dtype=dtype)
    channels = model.config.conditioning_channels
    conditioning = {"conditioning_image": sample.new_empty(1, channels, height, width)} if channels else {}
    return {"sample": sample, "timestep": torch.zeros(1), **conditioning}


if __name__ == "__main__":
    from .profile import main

    main()
