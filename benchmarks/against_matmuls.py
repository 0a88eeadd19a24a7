"""oxford-flowers-256 beside its matrix products alone, and beside shifted windows written as in the reference."""

from importlib import util

import torch
from backends import KERNEL, attention_call, natten_itself
from matmuls import Replay, record
from measure import Bench, Table, randomize
from networks import gradient_call, hdit_of_image, images, training_call
from reference_windows import ReferenceNetwork

from diffusers_hdit import HDiTModel, presets
from diffusers_hdit.neighborhood import neighborhood_attention


NETWORK, REFERENCE = "HDiT", "shifted windows as in the reference"
PRODUCTS, LINEAR = "its matrix products alone", "those of its linear layers alone"


def make_networks(bench: Bench) -> tuple[dict[str, torch.nn.Module], int]:
    """By name, with the size of their images."""
    config = presets.load("tiny" if bench.quick else "oxford-flowers-256")["model"]
    torch.manual_seed(0)
    model = randomize(HDiTModel(**config)).to(bench.device)
    count = len(config["widths"])
    windows = HDiTModel(**config, attention_types=["shifted_window"] * (count - 1) + ["global"], window_size=8)
    windows = windows.to(bench.device)
    windows.load_state_dict(model.state_dict())
    networks = {NETWORK: model, "HDiT with shifted windows": windows, REFERENCE: ReferenceNetwork(windows)}
    if bench.compile_mode:
        networks["HDiT, compiled"] = torch.compile(model, mode=bench.compile_mode)
    return networks, config["sample_size"]


def autocast_to_bfloat16(network):
    def run(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return network(*args, **kwargs)

    return run


def mode_calls(bench: Bench, mode: str, networks: dict, batch: int, size: int) -> dict:
    """What the networks do in one mode: "forward", "forward + backward" or "training step"."""
    if bench.device.type == "cpu":
        networks = {**networks, "HDiT, autocast to bfloat16": autocast_to_bfloat16(networks[NETWORK])}
    calls = {}
    for name, network in networks.items():
        weights = networks[name if isinstance(network, ReferenceNetwork | HDiTModel) else NETWORK]
        if mode == "forward":
            calls[name] = inference_call(bench, network, batch, size)
        elif mode == "forward + backward":
            calls[name] = gradient_call(bench, hdit_of_image(network), list(weights.parameters()), batch, size)
        else:
            calls[name] = training_call(bench, weights, network, batch, size)
    return calls


def inference_call(bench: Bench, network, batch: int, size: int):
    samples, run = images(bench, batch, size), hdit_of_image(network)

    @torch.no_grad()
    def call():
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
            return run(next(samples))

    return call


def matmuls_table(bench: Bench) -> Table:
    batch = 2 if bench.device.type == "cpu" else 64
    networks, size = make_networks(bench)
    table = Table(
        "matmuls",
        f"{'tiny' if bench.quick else 'oxford-flowers-256'} and its matrix products, batch {batch}, "
        + ("float32" if bench.device.type == "cpu" else "autocast to bfloat16"),
        ["what", "network", "ms", "HDiT over this", "GMAC"],
        notes=[
            "The products are recorded from a real call of the same network, shapes and strides, and run alone in the "
            "same rounds. Attention counts as its products, two forward and four backward, on all keys that its kernel "
            "is given (a tile of queries and its halo). A training step has the loss, clipping, AdamW and a moving "
            "average besides."
        ],
    )
    for mode in ("forward", "forward + backward", "training step"):
        calls = mode_calls(bench, mode, networks, batch, size)
        recorded = record(calls[NETWORK])
        linear = {product: count for product, count in recorded.products.items() if product.kind == "linear"}
        calls = {
            **calls,
            PRODUCTS: Replay(recorded.products, bench.device),
            LINEAR: Replay(linear, bench.device),
        }
        gmac = {
            name: sum(product.macs * count for product, count in counts.items()) / 1e9
            for name, counts in ((PRODUCTS, recorded.products), (LINEAR, linear))
        }
        times = bench.turns(calls, 2 * bench.seconds)
        for name, seconds in times.items():
            ratio = None if name == NETWORK else times[NETWORK].over(seconds)
            table.add(mode, name, seconds, ratio, gmac.get(name))
        if recorded.opaque:
            table.notes.append(f"{mode}: products inside of {', '.join(sorted(recorded.opaque))} are not counted.")
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
