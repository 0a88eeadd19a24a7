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
    return profile_network(HDiTModel, config, resolution, checkpointed_levels)


def profile_network(
    network_class: type,
    config: dict,
    resolution: int | tuple[int, int] | None = None,
    checkpointed_levels: Sequence[int] = (),
) -> ModelProfile:
    """
    Count what `profile_model` counts, in the same units, for any network of `networks.NETWORKS`, to compare them at equal
    parameters or equal work. A baseline has one level, 0; its matrix products and convolutions are counted while they run.
    """
    with FakeTensorMode():
        network = network_class(**config)
        network.set_gradient_checkpointing_levels(checkpointed_levels)
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution or network.sample_size
        network.check_size(height, width)
        levels = (profile_levels if isinstance(network, HDiTModel) else profile_baseline)(network, height, width)
        return ModelProfile(levels, activation_bytes(network, height, width))


def profile_baseline(network: nn.Module, height: int, width: int) -> list[LevelProfile]:
    parameters = sum(p.numel() for p in network.parameters())
    # The counter knows matrix products, but not the fused attention kernels of all devices.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(**inputs(network, height, width, torch.float32))
    return [LevelProfile("all", parameters=parameters, macs=counter.get_total_flops() // 2)]


def profile_levels(model: HDiTModel, height: int, width: int) -> list[LevelProfile]:
    """Return the cost of each level of an HDiT, of what is between the levels, and of the conditioning."""
    grids = [(height // model.patch_size[0] >> i, width // model.patch_size[1] >> i) for i in range(len(model.levels))]
    rows = [LevelProfile(f"{level.type} {h}×{w}", h * w) for level, (h, w) in zip(model.levels, grids, strict=True)]
    between, conditioning = LevelProfile("patches, merges, splits"), LevelProfile("conditioning")
    for name, module in model.named_modules():
        module_name, *rest = name.split(".")
        index = int(rest[0]) if rest and module_name not in ("conditioning", "patch_in", "patch_out") else 0
        if module_name == "transformer_blocks":
            level, row = len(rows) - 1, rows[-1]
        elif module_name in ("down_blocks", "up_blocks"):
            level, row = index, rows[index]
        elif module_name == "conditioning":
            level, row = None, conditioning
        else:
            # A merge and a split see the tokens of the inner of their two levels, what mixes skips those of the outer.
            inner = module_name in ("merges", "splits") and bool(rest) and rest[-1] != "mix"
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
    return [*rows, between, conditioning]


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
