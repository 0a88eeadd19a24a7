"""The DataLoader of a run, and how its worker processes end."""

import atexit
import signal
import weakref

import torch

from .image_cache import ImageCache


# Loaders whose workers must not outlive this process.
_loaders = weakref.WeakSet()


def make_loader(
    dataset: torch.utils.data.Dataset,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    micro_steps: int = 1,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
) -> torch.utils.data.DataLoader:
    """
    Build an endless DataLoader of this process's share: a batch for each micro-step, in the order of `sampler.py`.

    It divides the images among processes already: don't pass it through `accelerator.prepare`. Its workers live as long
    as its one iterator; torch gives each of them one thread. `loader.batch_sampler.fingerprint` is a string that must
    be equal when the run is resumed.

    Args:
        dataset: from [`load_images`].
        batch_size: images of a micro-step in this process.
        seed, rank, world_size, micro_steps: see [`ResumableBatchSampler`].
        start: images the run has seen already, over all processes.
        num_workers: 0 decodes in this process, when a batch is asked for.
        pin_memory: copy batches into memory from which a GPU is fed faster.
        prefetch_factor: batches that each worker prepares ahead.

    Raises:
        ValueError: fewer images than a step takes, a count or rank out of range, or, with buckets, a `start` within a
            global batch.
    """
    options = {}
    if num_workers:
        options = {"persistent_workers": True, "prefetch_factor": prefetch_factor, "worker_init_fn": _ignore_signals}
        # Only forked workers share the cache.
        if isinstance(getattr(dataset, "cache", None), ImageCache) and (
            "fork" in torch.multiprocessing.get_all_start_methods()
        ):
            options["multiprocessing_context"] = "fork"
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=dataset.batch_sampler(batch_size, seed, rank, world_size, micro_steps, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        **options,
    )
    if num_workers:
        _loaders.add(loader)
    return loader


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's SIGTERM, which go to all processes: the training process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """
    End the workers of loaders that are still alive, as after an error whose traceback keeps them.

    Otherwise Python would send its children a SIGTERM, which they ignore, and wait for them.
    """
    workers = [worker for loader in _loaders for worker in getattr(loader._iterator, "_workers", ())]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report that they were killed
    for worker in workers:
        if worker.is_alive():
            worker.kill()
