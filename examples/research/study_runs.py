"""One run of a study, in a process of its own: the training, then the held-out loss and distances at points of it.

A run's folder has pipeline/, `ema-STEP.safetensors` for each point, and `result-HASH.json` once it is finished. A run
that was killed resumes from its last checkpoint; on a CPU its result is the same to the bit.
"""

import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from study import SIGMA_DATA, Row, segments_of
from torch import Tensor, nn

from diffusers_hdit import diffusion
from diffusers_hdit.data import load_images, to_float
from diffusers_hdit.evaluation import evaluator, metrics
from diffusers_hdit.pipelines.pipeline_hdit import HDiTPipeline
from diffusers_hdit.training.config import TrainingConfig
from diffusers_hdit.training.monitoring import read_lines
from diffusers_hdit.training.objective import sample_noise
from diffusers_hdit.training.trainer import run_training
from diffusers_hdit.utils.files import atomic_path, write_atomically
from diffusers_hdit.utils.seeding import mixed_seed


BATCH = 64


@dataclass
class Run:
    """A row with one seed. `folder` is named after what makes the training this one: equal rows of studies share it."""

    row: Row
    seed: int
    folder: Path
    evaluation: dict
    train_data_dir: Path
    held_out_dir: Path
    cache_dir: Path
    threads: int

    @property
    def pipeline_dir(self) -> Path:
        """The output of the training: a folder of its own, since it refuses one with other files in it."""
        return self.folder / "pipeline"

    @property
    def result_path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.evaluation, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"result-{digest}.json"

    def steps_at(self, name: str) -> list[int]:
        """Return the steps of the points named "loss_at" or "distances_at"."""
        return sorted({round(share * self.row.steps) for share in self.evaluation[name]})

    @property
    def steps(self) -> list[int]:
        return sorted({*self.steps_at("loss_at"), *self.steps_at("distances_at")})

    def read_result(self) -> dict | None:
        try:
            return json.loads(self.result_path.read_text())
        except (OSError, ValueError):
            return None


def train_and_evaluate(run: Run) -> None:
    """Train and evaluate what is not done yet, as the target of a process; its output goes to log.txt."""
    die_with_parent()
    torch.set_num_threads(run.threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(run.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with open(run.folder / ".lock", "w") as lock:
        # Another command with the same folder may have made the result meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.read_result() is not None:
            return
        if not all(ema_path(run, step).is_file() for step in run.steps):
            train(run)
        write_atomically(run.result_path, json.dumps(evaluate(run), indent=1))


def die_with_parent() -> None:
    """End this process when its parent is killed, so that no training keeps running."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train(run: Run) -> None:
    config = {
        **run.row.training,
        "output_dir": str(run.pipeline_dir),
        "seed": run.seed,
        "train_data_dir": str(run.train_data_dir),
        "cache_dir": str(run.cache_dir),
        "max_train_steps": run.row.steps,
        "checkpointing_steps": run.row.steps // segments_of(run.evaluation),
        "validation_steps": run.row.steps,
        "num_validation_images": 1,
        "logging_steps": 10,
        "report_to": "none",
    }
    write_atomically(run.folder / "config.json", json.dumps(config, indent=2))
    if run.pipeline_dir.is_dir() and not any(run.pipeline_dir.glob("checkpoint-*")):
        shutil.rmtree(run.pipeline_dir)  # killed before its first checkpoint
    run_training(TrainingConfig.from_sources(config=config))
    check_finished(run)
    for step in run.steps:
        saved = torch.load(run.pipeline_dir / f"checkpoint-{step}" / "averages.pt", weights_only=True)["averages"]
        with atomic_path(ema_path(run, step)) as partial:
            save_file(next(iter(saved.values())), partial)
    for checkpoint in run.pipeline_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def check_finished(run: Run) -> None:
    """Raise RuntimeError for a training that was interrupted (Ctrl-C): it saves and returns like one that is finished."""
    if not (run.pipeline_dir / f"checkpoint-{run.row.steps}").is_dir():
        raise RuntimeError(
            f"the training in {run.pipeline_dir} was ended before its last step, {run.row.steps}. To resume it, run "
            "the same command again."
        )


def ema_path(run: Run, step: int) -> Path:
    return run.folder / f"ema-{step}.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run: Run) -> dict:
    """Return, for the EMA weights at each point, held-out errors by noise level and distances of generated images."""
    pipeline = HDiTPipeline.from_pretrained(run.pipeline_dir)
    pipeline.to(PartialState().device)
    size, wanted = pipeline.transformer.sample_size, run.evaluation
    held_out = load_images(train_data_dir=run.held_out_dir, resolution=size, center_crop=True, cache_dir=run.cache_dir)
    extractor = metrics.load_extractor(wanted["feature_network"], wanted["network_resolution"])
    real = reference_features(extractor, held_out, run.cache_dir)
    points, settings = [], {}
    for step in run.steps:
        load_weights(pipeline.transformer, ema_path(run, step))
        point = {"step": step, "images": step * run.row.batch, "flops": step * run.row.batch * run.row.flops_per_image}
        if step in run.steps_at("loss_at"):
            point["held_out"] = held_out_errors(pipeline.transformer, held_out, wanted)
        if step in run.steps_at("distances_at"):
            generator = evaluator.ImageGenerator(
                pipeline, {}, wanted["images"], BATCH, wanted["num_inference_steps"], seed=wanted["seed"]
            )
            settings = generator.settings
            generated, _ = evaluator.generated_features(generator, extractor)
            names = ["kernel_distance", "frechet_distance"]
            point["distances"] = metrics.evaluate(generated, real, names, extractor)
        points.append(point)
    losses = [[line["images_seen"], line["loss"]] for line in read_lines(run.pipeline_dir / "metrics.jsonl")]
    return {"row": run.row.identity, "seed": run.seed, "points": points, "training_loss": losses, "drawing": settings}


def load_weights(network: nn.Module, path: Path) -> None:
    """Load averaged parameters; buffers (Fourier projections) are not in the file, since they never change."""
    found = network.load_state_dict(load_file(path), strict=False)
    trained = {name for name, _ in network.named_parameters()} & set(found.missing_keys)
    if found.unexpected_keys or trained:
        raise ValueError(f"{path} is of another network: {[*found.unexpected_keys, *sorted(trained)]}")


def reference_features(extractor, images, cache_dir: Path) -> Tensor:
    return evaluator.reference_features(extractor, images, BATCH, cache_dir)


def noise_levels(count: int, image_size: int, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Return the midpoints of equal quantiles of the paper's noise density: a mean over them is one over the density."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return diffusion.sigma_from_uniform(u, image_size=image_size, sigma_data=sigma_data).float()


@torch.inference_mode()
def held_out_errors(network: nn.Module, images, wanted: dict, sigma_data: float = SIGMA_DATA) -> dict:
    """
    Return the network's error on images that it was not trained on, with the same noise for every network: unweighted (F
    against its target, as `diffusion.loss` with "karras") for each noise level, and their mean weighted by soft-min-snr.
    """
    sigmas = noise_levels(wanted["noise_levels"], max(network.sample_size), sigma_data)
    device = next(network.parameters()).device
    count = min(wanted["loss_images"], len(images))
    sums = torch.zeros(len(sigmas), dtype=torch.float64)
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        image = to_float(evaluator.real_images(images, numbers)).to(device)
        for i, sigma in enumerate(sigmas):
            seed = mixed_seed("held-out", wanted["seed"], i)
            noise = sample_noise(image.shape, seed, numbers, image.device)
            sums[i] += (
                errors(network, image, noise, sigma.to(device).expand(len(image)), sigma_data).cpu().double().sum()
            )
    error = sums / count
    weights = diffusion.WEIGHTINGS["soft-min-snr"](sigmas.double(), sigma_data)
    return {"sigma": sigmas.tolist(), "error": error.tolist(), "loss": (weights * error).mean().item()}


def errors(network: nn.Module, image: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    # With self-conditioning, the error of the second pass, which sampling uses from its second step on.
    known = (
        {"self_conditioned": torch.ones(len(image), dtype=torch.bool, device=image.device)}
        if self_conditioned(network)
        else {}
    )
    return diffusion.loss(network, image, noise, sigma, sigma_data, weighting="karras", **known)


def self_conditioned(network: nn.Module) -> bool:
    return bool(network.config.get("self_conditioning"))
