"""Compare a training step with the bare network: one step of each in turn, and the median of the ratios.

    python benchmarks/training_overhead.py [--steps 30] [any flag of the training]

A bare step is forward, backward and AdamW on one batch that is already noised and on the device. A step of the
training is everything: loading, sampling noise, augmentation, loss, clipping, averages, monitoring and logging. Both train
networks of their own of the same configuration, in one process, with the same precision.
"""

import argparse
import copy
import tempfile

import torch
from measure import Bench
from tqdm.auto import tqdm

from diffusers_hdit.training import distributed, trainer
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.optimization import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    own, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_args([*flags, "--output_dir", folder, "--report_to", "none"])
        accelerator = distributed.make_accelerator(config)
        trainer.check_network(config)
        run = trainer.prepare_run(config, accelerator, trainer.load_dataset(config, accelerator))
        bare = copy.deepcopy(run.network)
        if config.compile != "none":
            bare.compile(mode=config.compile)
        optimizer = make_optimizer(bare, config, accelerator.device)
        batches = iter(trainer.make_run_loader(run))
        trainer.open_logs(run)
        progress_bar = tqdm(disable=True)
        device = accelerator.device
        sample = torch.randn(config.train_batch_size, bare.config.in_channels, *run.dataset.resolution, device=device)
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
            trainer.train_step(run, batches)
            if run.step % config.logging_steps == 0:
                trainer.report(run, progress_bar)

        bench = Bench(device, least=own.steps, most=own.steps)
        times = bench.turns({"bare forward, backward, AdamW": bare_step, "training step": whole_step})
    print(
        f"{distributed.describe_hardware(accelerator)}, torch {torch.__version__}, precision "
        f"{accelerator.mixed_precision}, {config.train_batch_size} images of {run.dataset.resolution}, "
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
