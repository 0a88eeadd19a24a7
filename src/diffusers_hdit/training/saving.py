"""Pipelines of a training run: made, saved with what their model card needs, pushed."""

import shutil
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ModelMixin, SchedulerMixin
from torch import Tensor

from ..hub.model_card import TrainingMetadata
from ..hub.push import BackgroundPush
from ..pipelines.pipeline_hdit import HDiTPipeline
from ..pipelines.pipeline_hdit_upscale import HDiTUpscalePipeline
from ..schedulers.scheduling_edm import DPMSolverPP3MSDEScheduler, EDMHeunScheduler
from .config import TrainingConfig
from .validation import VALIDATION_INFERENCE_STEPS


SCHEDULERS = {
    cls.__name__: cls
    for cls in (EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EDMHeunScheduler, DPMSolverPP3MSDEScheduler)
}


def make_scheduler(settings: dict) -> SchedulerMixin:
    """
    Return the scheduler of the saved pipeline.

    Args:
        settings: arguments of a scheduler, and its name in "_class_name"; EDMDPMSolverMultistepScheduler by default.

    Raises:
        ValueError: for an unknown scheduler, or arguments that it does not take or can't sample with.
    """
    settings = dict(settings)
    name = settings.pop("_class_name", "EDMDPMSolverMultistepScheduler")
    if name not in SCHEDULERS:
        raise ValueError(f'the config\'s "scheduler" is wrong: _class_name must be one of {", ".join(SCHEDULERS)}.')
    try:
        scheduler = SCHEDULERS[name](**settings)
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ValueError(f'the config\'s "scheduler" is wrong: {error}') from error
    if scheduler.config.get("algorithm_type") == "sde-dpmsolver++" and scheduler.config.solver_order > 2:
        raise ValueError(
            'the config\'s "scheduler" is wrong: sde-dpmsolver++ has solver_order 1 or 2 in Diffusers. '
            "DPMSolverPP3MSDEScheduler is the third-order one."
        )
    return scheduler


def network_with_weights(trained: ModelMixin, weights: dict[str, Tensor]) -> ModelMixin:
    """Return a network like the trained one that takes over `weights`; in evaluation mode, in main memory."""
    with torch.device("meta"):
        network = type(trained).from_config(trained.config)
    network.load_state_dict(weights, assign=True)
    for name, buffer in trained.named_buffers():
        if name not in weights:  # fixed tables, which are not saved
            parent, _, leaf = name.rpartition(".")
            network.get_submodule(parent).register_buffer(leaf, buffer.to("cpu", copy=True), persistent=False)
    return network.eval()


def make_pipeline(
    model: ModelMixin,
    config: TrainingConfig,
    id2label: dict[int, str] | None = None,
    condition_columns: dict[str, list] | None = None,
) -> HDiTPipeline:
    """Return the pipeline that samples what `config` trains."""
    arguments = {"id2label": id2label, "condition_columns": condition_columns}
    if config.task == "upscale":
        arguments |= {"upscale_factor": config.upscale_factor, "max_noise_level": config.max_conditioning_noise}
    pipeline_class = HDiTUpscalePipeline if config.task == "upscale" else HDiTPipeline
    return pipeline_class(model, make_scheduler(config.scheduler), **arguments)


def make_pusher(config: TrainingConfig) -> BackgroundPush:
    """
    Return what pushes pipelines to the Hub in the background.

    Raises:
        ValueError: for a name that the Hub would refuse.
    """
    folder = Path(config.output_dir).resolve()
    return BackgroundPush(
        config.hub_model_id or folder.name,
        private=config.hub_private_repo,
        token=config.hub_token,
        scratch=folder / ".on-its-way-to-the-hub",
    )


def save_metadata(folder: Path, config: TrainingConfig, *, samples: Path, bundled: bool, **measured) -> None:
    """
    Write what the model card says about a training beside its pipeline, with the grid of samples if it is elsewhere.

    Args:
        samples: the grid of samples.
        bundled: whether the dataset came with this package, and is not on the Hub.
        measured: what the configuration does not say, fields of `TrainingMetadata`.
    """
    grid = Path(folder) / "samples" / samples.name
    if samples.is_file() and not grid.exists():
        grid.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(samples, grid)
    source = config.dataset_name or config.train_data_dir
    on_disk = Path(source).exists()
    name = Path(source).resolve().name if on_disk else source
    TrainingMetadata(
        # Of a folder only its name: where it lies is nobody's business.
        dataset=name if config.dataset_config_name is None else f"{name} ({config.dataset_config_name})",
        dataset_id=None if on_disk or bundled else source,
        noise_density=config.noise_density,
        loss_weighting=config.loss_weighting,
        learning_rate=config.learning_rate,
        label_dropout=config.label_dropout if config.label_column else None,
        ema_decay=config.ema_decay[0],
        seed=config.seed,
        samples={
            "file": f"samples/{samples.name}",
            "images": config.num_validation_images,
            "steps": VALIDATION_INFERENCE_STEPS,
            "seed": config.seed,
            "selected": False,
        },
        **measured,
    ).save(folder)
