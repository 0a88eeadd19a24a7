"""Shows that a local level costs time in proportion to its tokens: 1, 2 and 4 times the pixels.

    python benchmarks/linear_cost.py [--device cpu|cuda] [--width 128] [--tokens 64] [--rounds 9]

The level is blocks of HDiT as the model builds them (adaptive norms, attention in a 7×7 neighborhood, feed-forward).
Beside it the same blocks with global attention, whose cost grows with the square. The sizes take turns in every round,
and ratios are of times of the same round, so that a machine that slows down slows them all.
"""

import argparse
import platform

import torch
from measure import Bench

from diffusers_hdit.models.checks import Level
from diffusers_hdit.models.modeling_hdit import axial_positions, axial_rotary_tables, make_blocks
from diffusers_hdit.utils.memory import keep_freed_memory


def call_of(level, grid, conditioning, device, train: bool):
    torch.manual_seed(0)
    blocks = make_blocks(level, conditioning.shape[1]).to(device)
    for parameter in blocks.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    rotary = axial_rotary_tables(*axial_positions(*grid, device), level.heads, level.head_dim)
    tokens = torch.randn(1, *grid, level.width, device=device)

    def run():
        with torch.set_grad_enabled(train):
            out = tokens
            for block in blocks:
                out = block(out, conditioning, rotary)
            if train:
                out.square().mean().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="side of the smallest grid")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--attention_types", nargs="+", default=["neighborhood", "global"])
    args = parser.parse_args()
    device, side = torch.device(args.device), args.tokens
    bench = Bench(device, least=args.rounds, most=args.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {name}, float32, width {args.width}, depth {args.depth}")
    conditioning = torch.randn(1, 256, device=device)
    grids = [(side, side), (side, 2 * side), (2 * side, 2 * side)]
    print(f"{'':<34}{'':>12}{'median ms (spread of the middle half)':>38}{'of the smallest':>18}")
    for attention_type in args.attention_types:
        level = Level(args.width, args.depth, 3 * args.width, attention_type, 64, 7, 8, 0.0)
        for train in (False, True):
            calls = {grid: call_of(level, grid, conditioning, device, train) for grid in grids}
            samples = bench.turns(calls)
            for grid, times in samples.items():
                what = f"{attention_type}, {'forward + backward' if train else 'forward'}"
                ratio = times.over(samples[grids[0]]).median
                print(f"{what:<34}{f'{grid[0]}×{grid[1]}':>12}{str(times):>38}{ratio:>17.2f}x")


if __name__ == "__main__":
    keep_freed_memory()
    main()
