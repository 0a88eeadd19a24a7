"""A block by its parts, against what the machine can copy and multiply: which of the two bounds each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from measure import Bench, Table, copy_bandwidth, matmul_rate
from torch import Tensor

from diffusers_hdit import HDiTModel, presets
from diffusers_hdit.ops.geglu import geglu
from diffusers_hdit.ops.rotary import normalize_and_rotate


@dataclass
class Part:
    """`inputs` are what it must read, weights among them; `macs` its multiply-accumulates in matrix products."""

    name: str
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    macs: int = 0


def block_parts(model: HDiTModel, level: int, batch: int) -> list[Part]:
    """The first block of a level on the way down, cut where one tensor is handed on to the next operation."""
    blocks = model.down_blocks[level] if level < len(model.down_blocks) else model.transformer_blocks
    block, device, dtype = blocks[0], model.device, model.dtype
    height, width = (size // patch >> level for size, patch in zip(model.sample_size, model.patch_size, strict=True))
    shape = (batch, height, width)
    dim, tokens = model.levels[level].width, batch * height * width
    cond = torch.randn(batch, model.config.mapping_width, device=device, dtype=dtype)
    x, attn, ff = torch.randn(*shape, dim, device=device, dtype=dtype), block.attn, block.ff
    heads = x.unflatten(-1, (-1, attn.head_dim))
    rotary = model.rotary_tables(height << level, width << level, x)[level]
    qkv = [torch.randn_like(heads) for _ in range(3)]
    hidden = torch.randn(*shape, 2 * ff.down_proj.in_features, device=device, dtype=dtype)
    projections = [attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]

    def linear(name: str, layer, value: Tensor) -> Part:
        return Part(name, layer, [value, layer.weight], tokens * layer.weight.numel())

    def project(value: Tensor, *_) -> tuple[Tensor, ...]:
        return attn.to_q(value), attn.to_k(value), attn.to_v(value)

    def rotate(query: Tensor, key: Tensor, *_) -> tuple[Tensor, Tensor]:
        return normalize_and_rotate(query, attn.scale, rotary), normalize_and_rotate(key, attn.scale, rotary)

    def attend(query: Tensor, key: Tensor, value: Tensor, *_) -> Tensor:
        attention_only = SimpleNamespace(
            project_qkv=lambda _: (query, key, value),
            rotated_qkv=lambda *_: (*rotate(query, key), value),
            project_out=lambda out: out,
            scale=attn.scale,
        )
        return attn.processor(attention_only, query, rotary)

    pairs = batch * attn.processor.query_key_pairs(height, width)
    parts = [
        Part("first norm", lambda value, *_: block.norm1(value, cond), [x, block.norm1.linear.weight]),
        Part("q, k, v", project, [x, *projections], tokens * sum(weight.numel() for weight in projections)),
        Part(f"attention, {model.levels[level].type}", attend, [*qkv, *rotary], 2 * pairs * dim),
        Part("of it: scaling, rotary, if by themselves", rotate, [*qkv[:2], *rotary]),
        linear("attention out", attn.to_out[0], x),
        Part("first residual", torch.add, [x, x.clone()]),
        Part("second norm", lambda value, *_: block.norm2(value, cond), [x, block.norm2.linear.weight]),
        linear("feed-forward up", ff.up_proj, x),
        Part("GEGLU", geglu, [hidden]),
        linear("feed-forward down", ff.down_proj, hidden[..., : ff.down_proj.in_features].contiguous()),
        Part("second residual", torch.add, [x, x.clone()]),
    ]
    # Linear layers are called with their input alone.
    for part in parts:
        if isinstance(part.run, torch.nn.Linear):
            part.run = lambda value, _, layer=part.run: layer(value)
    macs = sum(part.macs for part in parts)
    whole = Part("the whole block", lambda value, *_: block(value, cond, rotary), [x, *block.parameters()], macs)
    return [*parts, whole]


def bytes_of(result: Tensor | tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in (result if isinstance(result, tuple) else (result,)))


@torch.no_grad()
def parts_table(bench: Bench) -> Table:
    if bench.quick:
        name, batch = "tiny", 1
    else:
        name, batch = ("oxford-flowers-256", 4) if bench.device.type == "cpu" else ("ffhq-1024", 4)
    model = bench.ready(HDiTModel(**presets.load(name)["model"]), bench.dtype).eval()
    bandwidth, rate = copy_bandwidth(bench), matmul_rate(bench, bench.dtype)
    table = Table(
        "parts",
        f"A block by its parts, forward, {name}, batch {batch}, {bench.dtype}",
        ["level", "part", "ms", "share", "GB/s", "of copying", "TFLOP/s", "of a matmul", "time over its floor"],
        notes=[
            f"Measured in this run: copies {bandwidth / 1e9:.1f} GB/s (read and written bytes), matrix products "
            f"{rate / 1e12:.2f} TFLOP/s. Bytes are inputs, weights and outputs, each once; a part's floor is the longer of "
            "the times that its bytes and its operations take at those rates. Attention is counted by the keys that a "
            "query sees."
        ],
    )
    for level in range(len(model.levels)):
        copies = [block_parts(model, level, batch) for _ in range(3)]
        whole = len(copies[0]) - 1
        calls, turn = {}, [0] * (whole + 1)

        def call_of(index, copies=copies, turn=turn):
            def call():
                turn[index] += 1
                part = copies[turn[index] % len(copies)][index]
                return part.run(*part.inputs)

            return call

        for i, part in enumerate(copies[0]):
            calls[part.name] = call_of(i)
        times = bench.turns(calls, bench.seconds / 2)
        for part in copies[0]:
            seconds = times[part.name]
            moved = sum(tensor.nbytes for tensor in part.inputs) + bytes_of(part.run(*part.inputs))
            floor = max(moved / bandwidth, 2 * part.macs / rate)
            table.add(
                f"{model.levels[level].width} wide",
                part.name,
                seconds,
                f"{seconds.over(times['the whole block']).median:.0%}",
                moved / seconds.median / 1e9,
                f"{moved / seconds.median / bandwidth:.0%}",
                2 * part.macs / seconds.median / 1e12 if part.macs else None,
                f"{2 * part.macs / seconds.median / rate:.0%}" if part.macs else None,
                seconds.median / floor,
            )
    return table
