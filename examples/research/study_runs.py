"""One run of a study, in a process of its own: the training, then the held-out loss and distances at points of it.

A run's folder has pipeline/, `ema-STEP.safetensors` for each point, and `result-HASH.json`, by which it is done. A run
that was killed goes on from its last checkpoint, on a CPU to the same bits, so that its result is the same.
"""

import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from study import SIGMA_DATA, Row, parts_of
from torch import Tensor, nn

from diffusers_hdit import diffusion
from diffusers_hdit.data import load_images, to_float
from diffusers_hdit.evaluation import evaluator as evaluation
from diffusers_hdit.evaluation import metrics
from diffusers_hdit.pipelines.pipeline_hdit import HDiTPipeline
from diffusers_hdit.training.monitoring import read_lines
from diffusers_hdit.training.objective import sample_noise
from diffusers_hdit.utils.files import write_atomically
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
    train_script: Path
    threads: int

    @property
    def pipeline_dir(self) -> Path:
        """What the training writes: a folder of its own, since it takes none with something else in it."""
        return self.folder / "pipeline"

    @property
    def result_path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.evaluation, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"result-{digest}.json"

    def steps_at(self, name: str) -> list[int]:
        """Steps of the points named "loss_at" or "distances_at"."""
        return sorted({round(share * self.row.steps) for share in self.evaluation[name]})

    @property
    def steps(self) -> list[int]:
        return sorted({*self.steps_at("loss_at"), *self.steps_at("distances_at")})

    def read_result(self) -> dict | None:
        try:
            return json.loads(self.result_path.read_text())
        except (OSError, ValueError):
            return None


def carry_out(run: Run) -> None:
    """The target of a process: trains what is not trained, evaluates what is not evaluated; its output goes to log.txt."""
    die_with_parent()
    torch.set_num_threads(run.threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(run.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with open(run.folder / ".lock", "w") as lock:
        # Of another command with the same folder: its result will do.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.read_result() is not None:
            return
        if not all(average_path(run, step).is_file() for step in run.steps):
            train(run)
        write_atomically(run.result_path, json.dumps(evaluate(run), indent=1))


def die_with_parent() -> None:
    """Killed studies must not leave trainings behind, which would be in the way of the next ones."""
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
        "seed": run.seed,
        "train_data_dir": str(run.train_data_dir),
        "cache_dir": str(run.cache_dir),
        "max_train_steps": run.row.steps,
        "checkpointing_steps": run.row.steps // parts_of(run.evaluation),
        "validation_steps": run.row.steps,
        "num_validation_images": 1,
        "logging_steps": 10,
        "report_to": "none",
    }
    path = run.folder / "config.json"
    write_atomically(path, json.dumps(config, indent=2))
    if run.pipeline_dir.is_dir() and not any(run.pipeline_dir.glob("checkpoint-*")):
        shutil.rmtree(run.pipeline_dir)  # killed before there was anything to go on from
    load_main(run.train_script)(["--config", str(path), "--output_dir", str(run.pipeline_dir)])
    check_finished(run)
    for step in run.steps:
        saved = torch.load(run.pipeline_dir / f"checkpoint-{step}" / "averages.pt", weights_only=True)["averages"]
        partial = average_path(run, step).with_suffix(".partial")
        save_file(next(iter(saved.values())), partial)
        os.replace(partial, average_path(run, step))
    for checkpoint in run.pipeline_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def check_finished(run: Run) -> None:
    """A training that is told to end (Ctrl-C) saves and returns as one that is done."""
    if not (run.pipeline_dir / f"checkpoint-{run.row.steps}").is_dir():
        raise RuntimeError(
            f"the training in {run.pipeline_dir} was ended before its last step, {run.row.steps}; the same command "
            "goes on from its last checkpoint."
        )


def average_path(run: Run, step: int) -> Path:
    return run.folder / f"ema-{step}.safetensors"


def load_main(script: Path) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run: Run) -> dict:
    """Of the averaged weights at each point: held-out errors by noise level, and distances of drawn images."""
    pipeline = HDiTPipeline.from_pretrained(run.pipeline_dir)
    pipeline.to(PartialState().device)
    size, wanted = pipeline.transformer.sample_size, run.evaluation
    # load_images only to read the same way as the training does.
    held_out = load_images(train_data_dir=run.held_out_dir, resolution=size, center_crop=True, cache_dir=run.cache_dir)
    extractor = metrics.load_extractor(wanted["feature_network"], wanted["network_resolution"])
    real = reference_features(extractor, held_out, run.cache_dir)
    points, facts = [], {}
    for step in run.steps:
        load_average(pipeline.transformer, average_path(run, step))
        point = {"step": step, "images": step * run.row.batch, "flops": step * run.row.batch * run.row.flops_per_image}
        if step in run.steps_at("loss_at"):
            point["held_out"] = held_out_errors(pipeline.transformer, held_out, wanted)
        if step in run.steps_at("distances_at"):
            drawing = evaluation.Drawing(
                pipeline, {}, wanted["images"], BATCH, wanted["num_inference_steps"], seed=wanted["seed"]
            )
            facts = drawing.facts
            drawn, _ = evaluation.features_of(drawing, extractor)
            names = ["kernel_distance", "frechet_distance"]
            point["distances"] = metrics.evaluate(drawn, real, names, extractor)
        points.append(point)
    losses = [[line["images_seen"], line["loss"]] for line in read_lines(run.pipeline_dir / "metrics.jsonl")]
    return {"row": run.row.identity, "seed": run.seed, "points": points, "training_loss": losses, "drawing": facts}


def load_average(network: nn.Module, path: Path) -> None:
    """EMAWeights are of parameters; what else a network has (Fourier projections) never changes."""
    found = network.load_state_dict(load_file(path), strict=False)
    trained = {name for name, _ in network.named_parameters()} & set(found.missing_keys)
    if found.unexpected_keys or trained:
        raise ValueError(f"{path} is of another network: {[*found.unexpected_keys, *sorted(trained)]}")


def reference_features(extractor, images, cache_dir: Path) -> Tensor:
    return evaluation.reference_features(extractor, images, BATCH, Path(cache_dir) / "features")


def noise_levels(count: int, image_size: int, sigma_data: float = SIGMA_DATA) -> Tensor:
    """The middles of equal parts of the paper's density: a mean over them is one over the density, for every row."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return diffusion.sigma_from_uniform(u, image_size=image_size, sigma_data=sigma_data).float()


@torch.inference_mode()
def held_out_errors(network: nn.Module, images, wanted: dict, sigma_data: float = SIGMA_DATA) -> dict:
    """
    The network's error on images that it did not see, with the same noise for every network: unweighted (F against its
    target, as `diffusion.loss` with "karras") for each noise level, and the mean of all with soft-min-snr's weights.
    """
    sigmas = noise_levels(wanted["noise_levels"], max(network.sample_size), sigma_data)
    device = next(network.parameters()).device
    count = min(wanted["loss_images"], len(images))
    sums = torch.zeros(len(sigmas), dtype=torch.float64)
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        image = to_float(evaluation.real_images(images, numbers)).to(device)
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
    # With self-conditioning, of the second pass: what sampling sees from its second step on.
    known = (
        {"self_conditioned": torch.ones(len(image), dtype=torch.bool, device=image.device)}
        if self_conditioned(network)
        else {}
    )
    return diffusion.loss(network, image, noise, sigma, sigma_data, weighting="karras", **known)


def self_conditioned(network: nn.Module) -> bool:
    return bool(network.config.get("self_conditioning"))
