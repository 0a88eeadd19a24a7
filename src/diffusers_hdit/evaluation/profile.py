"""Print the parameters, multiply-accumulates (of one image's forward pass) and memory of a preset's model, and the kernels
that would run on a device.

    diffusers-hdit profile --preset ffhq-1024 [--resolution N] [--device cuda]
"""

import argparse
import sys
from collections.abc import Sequence

from .. import presets
from ..utils.arguments import ArgumentParser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=presets.names())
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels, one number or height and width")
    parser.add_argument("--device", help="report the kernels for it; default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    if args.resolution and len(args.resolution) > 2:
        parser.error(f"--resolution is one number, or height and width; got {args.resolution}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `diffusers-hdit profile`; what can't be done ends the program with one line."""
    args = parse_args(argv)
    import torch

    from .. import ops
    from ..models.modeling_hdit import HDiTModel
    from .profiler import profile_model

    config, resolution = presets.load(args.preset)["model"], args.resolution and (args.resolution * 2)[:2]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        print(report(profile_model(config, resolution)))
        with torch.device("meta"):
            model = HDiTModel(**config)
        print(f"\n{ops.report(model, device, training=True)}")
    except (ValueError, RuntimeError) as error:  # RuntimeError: no device of that name
        sys.exit(f"error: {error}")


def report(profile) -> str:
    """Return a `ModelProfile` as a table, and what training needs besides the activations."""
    lines = [f"{'level':<28}{'tokens':>9}{'parameters':>13}{'MACs':>9}{'share':>8}{'attention products':>20}"]
    for level in profile.levels:
        lines.append(
            f"{level.name:<28}{f'{level.tokens:,}' if level.tokens else '':>9}{scaled(level.parameters):>13}"
            f"{scaled(level.macs):>9}{level.macs / profile.macs:>8.1%}{level.attention_macs / profile.macs:>20.1%}"
        )
    lines += [
        f"{'all':<37}{scaled(profile.parameters):>13}{scaled(profile.macs):>9}",
        f"activations kept for the backward pass, bfloat16, one image: {mebibytes(profile.activation_bytes)}",
        # Weights, gradients, two moments of AdamW, one average; 4 bytes each.
        f"weights, gradients, AdamW and one EMA, float32: {mebibytes(5 * 4 * profile.parameters)}",
        "not counted: temporary tensors, and PyTorch with its libraries (some hundred MiB before the first step)",
    ]
    return "\n".join(lines)


def scaled(number: int) -> str:
    """Return a count with the unit (G, M, k) that leaves digits to read."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
