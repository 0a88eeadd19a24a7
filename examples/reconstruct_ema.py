"""Build a pipeline with averaged weights of another width, after the training.

    python examples/reconstruct_ema.py --run DIR --sigma_rel 0.10 --output_dir NEW [--step N]

DIR is the folder of a finished training with power-function averages: its pipeline, and DIR/snapshots. sigma_rel is the
relative standard deviation of the average: 0.10 averages over about a tenth of the run. Karras et al. 2024, arXiv 2312.02696.
"""

import argparse
import sys
from pathlib import Path

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.training.ema import (
    find_snapshots,
    gamma_of_sigma_rel,
    profile_mismatch,
    read_snapshot_metadata,
    reconstruct,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="folder of the training: a pipeline, and its snapshots/")
    add(
        "--sigma_rel",
        "--length",
        dest="sigma_rel",
        type=float,
        required=True,
        help="relative standard deviation, between 0 and 0.2887",
    )
    add("--step", type=int, help="step of one of the snapshots; default: the latest")
    add("--output_dir", required=True, help="folder to write the pipeline to; new or empty")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run, output = Path(args.run), Path(args.output_dir)
    gamma_of_sigma_rel(args.sigma_rel)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {str(output)!r} is not an empty folder. Nothing was changed.")
    if not (run / "model_index.json").is_file():
        raise ValueError(f"there is no pipeline in --run {str(run)!r}: give the folder of a finished training.")
    snapshots = find_snapshots(run / "snapshots")
    if not snapshots:
        raise ValueError(
            f"there are no snapshots in {str(run / 'snapshots')!r}: they are written by a training with power-function "
            "averages, and can't be made afterwards."
        )
    weights = reconstruct(snapshots, args.sigma_rel, args.step)
    pipeline = HDiTPipeline.from_pretrained(run)
    try:
        pipeline.transformer.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the snapshots are of another network than the pipeline in {str(run)!r}: {error}") from error
    pipeline.save_pretrained(output)
    profiles = [read_snapshot_metadata(path)[:2] for path in snapshots]
    step = max(t for t, _ in profiles) if args.step is None else args.step
    used = [profile for profile in profiles if profile[0] <= step]
    print(
        f"Wrote {output}: the average of sigma_rel {args.sigma_rel} at step {step}, from {len(used)} snapshots; its "
        f"profile differs by {profile_mismatch(used, args.sigma_rel, step):.2g}."
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
