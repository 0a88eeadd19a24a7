"""What the training example costs over the bare network: one step of each in turn, and the median of the ratios.

    python benchmarks/training_overhead.py [--steps 30] [any flag of examples/train_hdit.py]

A bare step is forward, backward and AdamW on one batch that is already noised and on the device. A step of the example
is all that it does: loading, drawing noise, augmentation, loss, clipping, averages, watching and logging. Both train
networks of their own of the same configuration, in one process, with the same precision.
"""

import argparse
import copy
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from measure import Bench
from tqdm.auto import tqdm


EXAMPLE = Path(__file__).parents[1] / "examples" / "train_hdit.py"


def load_example():
    spec = importlib.util.spec_from_file_location("train_hdit", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_hdit"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    own, flags = parser.parse_known_args()
    train_hdit = load_example()
    with tempfile.TemporaryDirectory() as folder:
        args = train_hdit.parse_args([*flags, "--output_dir", folder, "--report_to", "none"])
        accelerator = train_hdit.make_accelerator(args)
        run = train_hdit.prepare(args, accelerator, train_hdit.open_dataset(args, accelerator))
        bare = copy.deepcopy(run.network)
        if args.compile != "none":
            bare.compile(mode=args.compile)
        optimizer = train_hdit.training.make_optimizer(bare, args, accelerator.device)
        batches = iter(train_hdit.open_loader(run))
        train_hdit.open_logs(run)
        progress_bar = tqdm(disable=True)
        device = accelerator.device
        sample = torch.randn(args.train_batch_size, bare.config.in_channels, *run.dataset.resolution, device=device)
        target, timestep = torch.randn_like(sample), torch.randn(len(sample), device=device)
        labels = torch.zeros(len(sample), dtype=torch.long, device=device) if bare.config.num_classes else None

        def bare_step():
            with accelerator.autocast():
                output = bare(sample, timestep, class_labels=labels, return_dict=False)[0]
                loss = (output.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def whole_step():
            train_hdit.train_step(run, batches)
            if run.step % args.logging_steps == 0:
                train_hdit.report(run, progress_bar)

        bench = Bench(device, least=own.steps, most=own.steps)
        times = bench.turns({"bare forward, backward, AdamW": bare_step, "step of the example": whole_step})
    print(
        f"{train_hdit.training.describe_hardware(accelerator)}, torch {torch.__version__}, precision "
        f"{accelerator.mixed_precision}, {args.train_batch_size} images of {run.dataset.resolution}, "
        f"{sum(p.numel() for p in bare.parameters()) / 1e6:.1f}M parameters"
    )
    for name, seconds in times.items():
        print(f"{name:<32}{str(seconds):>32} ms   (middle half)")
    bare, whole = times.values()
    ratio = whole.over(bare)
    low, high = ratio.middle_half
    print(f"overhead: {ratio.median - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})")


if __name__ == "__main__":
    main()
