"""oxford-flowers-256 beside its matrix products alone, and beside shifted windows written as in the reference."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import util

import torch
from backends import KERNEL, attention_call, natten_itself
from matmuls import Replay, record
from measure import Bench, Table
from networks import forward_call, gradient_call, hdit_of_image, training_call
from reference_windows import ReferenceNetwork

from diffusers_hdit import HDiTModel, presets
from diffusers_hdit.ops.linear import onednn_is_faster
from diffusers_hdit.ops.neighborhood_attention import neighborhood_attention
from diffusers_hdit.ops.registry import reference as kernels_off


NETWORK, REFERENCE = "HDiT", "shifted windows as in the reference"
PRODUCTS, LINEAR = "its matrix products alone", "those of its linear layers alone"


@dataclass
class Contender:
    """`module` has the weights; `within` makes what it is called in."""

    name: str
    module: torch.nn.Module
    compiled: bool = False
    within: Callable[[], AbstractContextManager] = nullcontext


@contextmanager
def without_onednn():
    """Linear layers as PyTorch multiplies (`linear.py`)."""
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def autocast_to_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def make_contenders(bench: Bench) -> tuple[list[Contender], int]:
    """With the size of their images. The first is the one that the others are compared with."""
    config = presets.load("tiny" if bench.quick else "oxford-flowers-256")["model"]
    torch.manual_seed(0)
    model = bench.ready(HDiTModel(**config))
    count = len(config["widths"])
    windows = HDiTModel(**config, attention_types=["shifted_window"] * (count - 1) + ["global"], window_size=8)
    windows = windows.to(bench.device)
    windows.load_state_dict(model.state_dict())
    reference = ReferenceNetwork(windows)
    found = [
        Contender(NETWORK, model),
        Contender("HDiT with shifted windows", windows),
        Contender(REFERENCE, reference),
    ]
    tiles = copy.deepcopy(model)
    tiles.set_neighborhood_backend("tiled")
    found.append(Contender("HDiT on tiles", tiles))
    on_cpu = bench.device.type == "cpu"  # on a GPU all are in bfloat16
    if on_cpu:
        found.append(Contender("HDiT, autocast to bfloat16", model, within=autocast_to_bfloat16))
        found.append(Contender("HDiT, kernels of its own switched off", model, within=kernels_off))
        if onednn_is_faster():
            found.append(Contender("HDiT, linear layers by MKL", model, within=without_onednn))
    if bench.compile_mode:
        found += [
            Contender("HDiT, compiled", model, compiled=True),
            Contender("HDiT on tiles, compiled", tiles, compiled=True),
            Contender(f"{REFERENCE}, compiled", reference, compiled=True),
        ]
    if on_cpu and bench.compile_mode:
        name = "HDiT, compiled, autocast to bfloat16"
        found.append(Contender(name, model, compiled=True, within=autocast_to_bfloat16))
    return found, config["sample_size"]


def called_within(context, network):
    def run(*args, **kwargs):
        with context():
            return network(*args, **kwargs)

    return run


def mode_call(bench: Bench, mode: str, contender: Contender, batch: int, size: int):
    """What a network does in one mode: "forward", "forward + backward" or "training step"."""
    module = contender.module
    if mode == "forward":
        module = copy.deepcopy(module).to(bench.dtype)
    network = torch.compile(module, mode=bench.compile_mode) if contender.compiled else module
    network = called_within(contender.within, network)
    if mode == "forward":
        return forward_call(bench, hdit_of_image(network), batch, size)
    if mode == "forward + backward":
        return gradient_call(bench, hdit_of_image(network), list(module.parameters()), batch, size)
    return training_call(bench, module, network, batch, size)


def record_products(bench: Bench, mode: str, contender: Contender, batch: int, size: int) -> Counter:
    """The products of one call, those of a neighborhood on tiles and their halos."""
    contender.module.set_neighborhood_backend("tiled")
    recorded = record(mode_call(bench, mode, contender, batch, size))
    contender.module.set_neighborhood_backend(bench.backend)
    if recorded.opaque:
        raise RuntimeError(f"products inside of {', '.join(sorted(recorded.opaque))} cannot be counted.")
    return recorded.products


def matmuls_table(bench: Bench) -> Table:
    batch = 2 if bench.device.type == "cpu" else 64
    contenders, size = make_contenders(bench)
    table = Table(
        "matmuls",
        f"{'tiny' if bench.quick else 'oxford-flowers-256'} and its matrix products, batch {batch}, "
        + ("float32" if bench.device.type == "cpu" else "bfloat16"),
        ["what", "network", "ms", "HDiT over this", "compiled over this", "this over bfloat16", "GMAC"],
        notes=[
            "The products are recorded from a real call of the same network, shapes and strides, and run alone in the "
            "same rounds. Attention counts as its products, two forward and four backward; those of a neighborhood on 8×8 "
            "queries and their 14×14 keys, as the tiled kernel has them. Those of linear layers are run by the library "
            "that the network asks for them. A training step has the loss, clipping, AdamW and a moving average besides."
        ],
    )
    for mode in ("forward", "forward + backward", "training step"):
        products = record_products(bench, mode, contenders[0], batch, size)
        linear = {product: count for product, count in products.items() if product.kind == "linear"}
        calls = {contender.name: mode_call(bench, mode, contender, batch, size) for contender in contenders}
        calls |= {PRODUCTS: Replay(products, bench.device), LINEAR: Replay(linear, bench.device)}
        gmac = {
            name: sum(product.macs * count for product, count in counts.items()) / 1e9
            for name, counts in ((PRODUCTS, products), (LINEAR, linear))
        }
        times = bench.turns(calls, 10 * bench.seconds)
        compiled = times.get(f"{NETWORK}, compiled")
        for name, seconds in times.items():
            half = times.get(f"{name}, autocast to bfloat16")
            table.add(
                mode,
                name,
                seconds,
                None if name == NETWORK else times[NETWORK].over(seconds),
                compiled.over(seconds) if compiled and "compiled" not in name else None,
                seconds.over(half) if half else None,
                gmac.get(name),
            )
        calls.clear()
        bench.forget()
    return table


def natten_table(bench: Bench) -> Table:
    """NATTEN's own path, with as many rounds as it takes, however long one lasts."""
    side = 16 if bench.quick else 64
    table = Table(
        "natten",
        f"NATTEN's na2d, {side}×{side} tokens, batch 1, forward, {bench.dtype}",
        ["what", "ms", "over ours"],
    )
    if util.find_spec("natten") is None:
        table.notes.append("NATTEN is not installed; benchmarks/README.md says how to.")
        return table

    def ours(query, key, value):
        return neighborhood_attention(query, key, value, KERNEL, scale=1.0)

    calls = {
        name: attention_call(bench, attend, 1, side, False)
        for name, attend in (("neighborhood_attention", ours), ("natten.na2d", natten_itself))
    }
    times = bench.turns(calls)
    for name, seconds in times.items():
        table.add(name, seconds, seconds.over(times["neighborhood_attention"]) if name == "natten.na2d" else None)
    return table
