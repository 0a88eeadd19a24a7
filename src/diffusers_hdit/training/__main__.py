"""Train a Hourglass Diffusion Transformer, or a baseline, on your images, and save it as a pipeline.

    accelerate launch -m diffusers_hdit.training --config CONFIG.json --output_dir DIR [any flag]

A config is a JSON object whose keys are the flags below, plus "model": arguments of HDiTModel (or of the network that
--model_type names), and "scheduler": sigma_min, sigma_max, sigma_data. Flags override the config, the config overrides the
preset. DIR gets the pipeline with the averaged (EMA) weights, checkpoint-STEP folders, samples/ with grids of generated
images, and metrics.jsonl. To resume an interrupted run, run the same command again.
"""

import signal
import sys
from collections.abc import Sequence

from .config import parse_args


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> None:
    """Train as the flags say; wrong ones end the program with a line that says what is wrong."""
    config = parse_args(argv, description)  # before PyTorch is imported: a mistake shows at once
    from .trainer import run_training

    try:
        run_training(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
