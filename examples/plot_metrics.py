"""Plot what a training wrote to metrics.jsonl: loss, loss by noise level, gradient norm, learning rate and speed.

    python examples/plot_metrics.py --run DIR [DIR ...] [--output metrics.png]

Several runs share one plot, so that they can be compared.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from diffusers_hdit.training.monitoring import read_lines


# Each run is cut into this many periods, whose mean losses by noise level are plotted.
PERIODS = 4


def series(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, and a quantity at those that have it."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return tuple(np.array(known, dtype=float).reshape(-1, 2).T)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the running mean over `window` values, fewer at the ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def loss_by_sigma(lines: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return sigma and the mean loss over these lines, each image counted once."""
    sums: dict[float, list] = {}
    for line in lines:
        part = line.get("loss_by_sigma", {"sigma": [], "loss": [], "images": []})
        for sigma, loss, images in zip(part["sigma"], part["loss"], part["images"], strict=True):
            total = sums.setdefault(sigma, [0.0, 0])
            total[0], total[1] = total[0] + loss * images, total[1] + images
    sigmas = sorted(sums)
    return np.array(sigmas), np.array([sums[sigma][0] / sums[sigma][1] for sigma in sigmas])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, help="output folders of the training")
    parser.add_argument("--output", default="metrics.png")
    args = parser.parse_args(argv)
    names = [Path(folder).resolve().name for folder in args.run]
    names = names if len(set(names)) == len(names) else args.run
    runs = {name: read_lines(Path(folder) / "metrics.jsonl") for name, folder in zip(names, args.run, strict=True)}
    for name, lines in runs.items():
        if not lines:
            raise ValueError(f"there is no metrics.jsonl with anything in it in the folder {name!r}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('this needs matplotlib: pip install "diffusers-hdit[train]"') from error

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for name, lines in runs.items():
        for axis, quantity in zip(
            (axes[0, 0], axes[0, 2], axes[1, 0], axes[1, 1], axes[1, 2]),
            ("loss", "grad_norm", "lr", "images_per_second", "data_wait"),
            strict=True,
        ):
            steps, values = series(lines, quantity)
            if quantity in ("loss", "grad_norm"):
                (line,) = axis.plot(steps, values, alpha=0.25)
                axis.plot(steps, smooth(values, max(1, len(values) // 50)), color=line.get_color(), label=name)
                axis.set_yscale("log")
            else:
                axis.plot(steps, values, label=name)
            axis.set(title=quantity.replace("_", " "), xlabel="step")
        count = PERIODS if len(runs) == 1 else 1
        for i in range(count):
            part = lines[len(lines) * i // count : len(lines) * (i + 1) // count]
            if part:
                label = f"{name}, steps {part[0]['step']} to {part[-1]['step']}" if count > 1 else name
                axes[0, 1].plot(*loss_by_sigma(part), marker=".", label=label)
    axes[0, 1].set(title="mean loss by noise level", xlabel="sigma", xscale="log", yscale="log")
    axes[0, 1].legend(fontsize="small")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize="small")
    figure.savefig(args.output, dpi=110)
    print(f"Plotted {', '.join(runs)} in {args.output}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
