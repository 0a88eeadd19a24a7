"""Sampling: labels -> noise levels -> noise -> denoised step by step -> images."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Optional, Union

import torch
from diffusers import (
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from huggingface_hub import CommitInfo
from torch import Tensor

from ..models.modeling_hdit import HDiTModel
from ..utils.remote_code import PipelineRemoteCodeMixin, package_module
from .conditions import append_presence_flag
from .denoising import Denoising
from .guidance import AdaptiveProjection, Guidance
from .lora import HDiTLoraLoaderMixin


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Labels = int | str | Sequence[int] | Sequence[str] | Tensor
Generators = torch.Generator | list[torch.Generator] | None


class HDiTPipeline(PipelineRemoteCodeMixin, Denoising, HDiTLoraLoaderMixin, DiffusionPipeline):
    r"""
    Generate images with a Hourglass Diffusion Transformer, directly in pixels.

    Args:
        transformer (`HDiTModel`): the network, or one with the same arguments: `DiTPixelModel`, `UNetPixelModel`.
        scheduler: an EDM scheduler of Diffusers or of this package, holding sigma_min, sigma_max and sigma_data of the
            training.
        guidance_model (`HDiTModel`, *optional*): a smaller or less trained network for autoguidance (Karras et al. 2024,
            arXiv 2406.02507), or an unconditional one; it then replaces the unconditional prediction in guidance.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        condition_columns (`dict[str, list]`, *optional*): for a model whose `mapping_cond` was made of named numbers:
            their "names", and "mean" and "std" in the training set, in the order of the vector.
        k_diffusion_config (`dict`, *optional*): the reference's configuration, if the weights came from there.
    """

    model_cpu_offload_seq = "guidance_model->transformer"
    _optional_components = ["guidance_model"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        # Written as Diffusers 0.36 can read them when it loads a pipeline; it passes over `A | B`.
        transformer: Union[HDiTModel, ModelMixin],  # noqa: UP007
        scheduler: Union[EDMDPMSolverMultistepScheduler, EDMEulerScheduler],  # noqa: UP007
        id2label: Optional[dict] = None,  # noqa: UP045
        condition_columns: Optional[dict] = None,  # noqa: UP045
        k_diffusion_config: Optional[dict] = None,  # noqa: UP045
        guidance_model: Optional[Union[HDiTModel, ModelMixin]] = None,  # noqa: UP007, UP045
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, guidance_model=guidance_model)
        self.register_to_config(
            id2label=id2label, condition_columns=condition_columns, k_diffusion_config=k_diffusion_config
        )
        self._warned_of_columns = False
        # The images are the latents: nothing is scaled up.
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "HDiTPipeline":
        """Make this pipeline from the components and the configuration of another one; keyword arguments replace some."""
        if {"dtype", "torch_dtype", "custom_pipeline"} & set(kwargs):
            return super().from_pipe(pipeline, **{**pipeline.components, **kwargs})
        # Diffusers would make the weights float32, and leave out networks whose class came with a repository.
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        config = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
        # What a pipeline does not use it keeps under a private name, for one that does.
        known = {name.removeprefix("_"): value for name, value in config.items()}
        given = {**known, **pipeline.components, **kwargs}
        pipe = cls(
            **{name: given[name] for name in names if name in given}, **{k: kwargs[k] for k in set(kwargs) - names}
        )
        pipe.register_to_config(**{f"_{name}": value for name, value in known.items() if name not in names})
        return pipe

    # ------------------------------------------------------------------------------------------------------------------
    # Labels

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class by its number; empty for a model without names."""
        return {int(i): name for i, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, labels: str | Sequence[str]) -> list[int]:
        """
        Return the numbers of the classes with these names.

        Raises:
            ValueError: for a name that is not in `id2label`, with the names that are close or all of them.
        """
        label2id = {name: i for i, name in self.id2label.items()}
        labels = [labels] if isinstance(labels, str) else list(labels)
        for label in labels:
            if label not in label2id:
                known = ", ".join(map(repr, list(label2id)[:20])) or "none, this model's classes have numbers only"
                more = ", ..." if len(label2id) > 20 else ""
                raise ValueError(f"there is no class {label!r}; the classes are: {known}{more}.")
        return [label2id[label] for label in labels]

    def encode_conditions(
        self,
        class_labels: Labels | None,
        mapping_cond: Tensor | Mapping | None,
        num_images_per_prompt: int,
        **images: Tensor | None,
    ) -> tuple[dict[str, Tensor], int]:
        """
        Return the network's arguments besides the noised image, with the other `images`, and the number of images.

        Each tensor has an entry for every image to generate, on the pipeline's device.
        """
        encoded = {
            "class_labels": self.encode_labels(class_labels),
            "mapping_cond": self.encode_mapping_cond(mapping_cond),
            **images,
        }
        encoded = {name: value for name, value in encoded.items() if value is not None}
        batch_size = max((len(value) for value in encoded.values()), default=1)
        for name, value in encoded.items():
            if len(value) not in (1, batch_size):
                raise ValueError(
                    f"{len(value)} {name} were given, but {batch_size} of another argument. Give as many, or one."
                )
            value = value.expand(batch_size, *value.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)
            encoded[name] = value.to(self._execution_device)
        return encoded, batch_size * num_images_per_prompt

    def encode_labels(self, class_labels: Labels | None) -> Tensor | None:
        """Return class numbers `(B,)`, all checked; None for a model without classes."""
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            return None if num_classes is None else torch.tensor([num_classes])
        if num_classes is None:
            raise ValueError("class_labels were given, but this model was trained without classes. Leave them out.")
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("class_labels is empty; give at least one, or None to generate without a label.")
        try:
            ids = [
                self.get_label_ids(label)[0] if isinstance(label, str) else operator.index(label)
                for label in class_labels
            ]
        except TypeError as error:
            raise ValueError(
                f"class_labels must be class numbers or names, one or a list of them, got {class_labels!r}."
            ) from error
        for i in ids:
            if not 0 <= i <= num_classes:
                raise ValueError(
                    f"class label {i} is out of range: this model has the classes 0 to {num_classes - 1}, "
                    f"and {num_classes} for no label."
                )
        return torch.tensor(ids)

    def encode_mapping_cond(
        self, mapping_cond: Tensor | Mapping[str, float | Sequence[float]] | None
    ) -> Tensor | None:
        """Return the vector condition `(B, D)` in float32, checked; named numbers are put in order and normalised."""
        dim = self.transformer.config.mapping_cond_dim
        columns = (self.config.condition_columns or {}).get("names", [])
        if mapping_cond is None:
            if columns and not self._warned_of_columns:
                self._warned_of_columns = True
                names = ", ".join(columns)
                logger.warning(
                    f"Generating without the columns that this model was trained on: {names}. Give mapping_cond."
                )
            return None
        if not dim:
            raise ValueError("mapping_cond was given, but this model has mapping_cond_dim=0. Leave it out.")
        if isinstance(mapping_cond, Mapping):
            mapping_cond = self.encode_columns(mapping_cond)
        mapping_cond = torch.as_tensor(mapping_cond, dtype=torch.float32)
        if columns and mapping_cond.ndim == 2 and mapping_cond.shape[1] == len(columns) == dim - 1:
            mapping_cond = append_presence_flag(mapping_cond)
        if mapping_cond.ndim != 2 or mapping_cond.shape[1] != dim:
            raise ValueError(f"mapping_cond must have shape (batch, {dim}), got {tuple(mapping_cond.shape)}.")
        return mapping_cond

    def encode_columns(self, values: Mapping[str, float | Sequence[float]]) -> Tensor:
        """Return named numbers, and vectors (a column v has the entries v[0], v[1], ...), as the network gets them."""
        columns = self.config.condition_columns or {"names": []}
        given = {}
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).cpu()
            if name not in columns["names"] and f"{name}[0]" in columns["names"] and value.ndim:
                given.update((f"{name}[{i}]", part) for i, part in enumerate(value.unbind(-1)))
            else:
                given[name] = value
        if set(given) != set(columns["names"]):
            raise ValueError(
                f"mapping_cond names {sorted(values)}, but this model was trained on the columns "
                f"{columns['names']}. Give a value for each of these, or pass a tensor."
            )
        values = torch.stack(torch.broadcast_tensors(*(given[name].flatten() for name in columns["names"])), dim=1)
        values = (values - torch.tensor(columns["mean"])) / torch.tensor(columns["std"])
        # Where the training dropped conditions, a last entry of 1 says that there is one: zeros are the columns' means.
        missing = self.transformer.config.mapping_cond_dim - values.shape[1]
        return append_presence_flag(values) if missing == 1 else values

    def one_condition(
        self, mapping_cond: Tensor | Mapping | None, conditions: Mapping | None
    ) -> Tensor | Mapping | None:
        """Return the one of the two that is given; raise ValueError for both."""
        if mapping_cond is not None and conditions is not None:
            raise ValueError("mapping_cond and conditions are two names of one thing: give one of them.")
        return mapping_cond if conditions is None else conditions

    # ------------------------------------------------------------------------------------------------------------------
    # Checks, before any work

    def check_inputs(
        self,
        num_inference_steps: int,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError for arguments that can't be, before any work."""
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(map(repr, OUTPUT_TYPES))}; got {output_type!r}.")
        channels = self.transformer.config.out_channels or self.transformer.config.in_channels
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(f"PIL has no images of {channels} channels; use output_type='np', 'pt' or 'latent'.")
        if channels != self.transformer.config.in_channels:
            raise ValueError(
                f"this pipeline needs a model with as many output as input channels; this one has {channels} and "
                f"{self.transformer.config.in_channels}."
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be in {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )
        if getattr(self.scheduler.config, "sigma_data", None) is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} is not an EDM scheduler (it has no sigma_data). Use for instance "
                "EDMDPMSolverMultistepScheduler or EDMEulerScheduler."
            )

    def check_guidance(self, guidance: Guidance, has_condition: bool) -> None:
        """Raise ValueError unless there is something to guide with."""
        guide, model = self.guidance_model, self.transformer
        if guidance.scale == 1:
            return
        if guide is None and not has_condition:
            raise ValueError(
                f"guidance_scale={guidance.scale} needs class_labels or a mapping_cond to guide towards, or a pipeline "
                "with a guidance_model."
            )
        if guide is None:
            return
        if guide.config.in_channels != model.config.in_channels:
            raise ValueError(
                f"the guidance_model has {guide.config.in_channels} channels, the transformer {model.config.in_channels}."
            )
        outputs = [m.config.out_channels or m.config.in_channels for m in (guide, model)]
        if outputs[0] != outputs[1]:
            raise ValueError(f"the guidance_model has {outputs[0]} output channels, the transformer {outputs[1]}.")
        for name, nothing in (
            ("num_classes", None),
            ("mapping_cond_dim", 0),
            ("conditioning_channels", 0),
            ("self_conditioning", False),
        ):
            guides, own = guide.config.get(name, nothing), model.config.get(name, nothing)
            if guides not in (nothing, own):
                raise ValueError(
                    f"the guidance_model has {name}={guides}, the transformer {own}; it must have the same or {nothing}."
                )

    def first_step(self, strength: float, num_inference_steps: int) -> int:
        """Return how many of the steps to skip."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}.")
        steps = round(num_inference_steps * strength)
        if steps == 0:
            raise ValueError(
                f"strength={strength} of {num_inference_steps} steps is less than one; take for instance "
                f"num_inference_steps={int(1 / strength) + 1}."
            )
        return num_inference_steps - steps

    def prepare_latents(
        self, latents: Tensor | None, batch_size: int, height: int, width: int, generator: Generators
    ) -> Tensor:
        """Return unit-variance noise `(B, C, H, W)` in float32 on the pipeline's device."""
        shape = (batch_size, self.transformer.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} images; give one for each, or one."
            )
        if latents is None:
            return self.noise(shape, generator)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, torch.float32)

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        mapping_cond: Tensor | Mapping[str, float | Sequence[float]] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        adaptive_projection: AdaptiveProjection | Mapping[str, float] | bool | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in all pipelines of Diffusers)
        conditions: Mapping[str, float | Sequence[float]] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels: a class by number or by name, or a list of them; None generates without a label.
            num_images_per_prompt: images for each label.
            height, width: size in pixels, by default that of the training (or of `latents`).
            num_inference_steps: steps of the sampler, each one evaluation of the network but with Heun's method.
            mapping_cond: vector condition `(B, D)`, or `{name: value}` for a model trained on named columns.
            guidance_scale: w, of D_weak + w (D - D_weak); 1 means none. D_weak is predicted without label and with a zero
                `mapping_cond` (classifier-free guidance, Ho & Salimans 2022, arXiv 2207.12598) in one call together
                with D, or by the pipeline's `guidance_model` (autoguidance, Karras et al. 2024, arXiv 2406.02507).
            guidance_interval: `(sigma_lo, sigma_hi)`: guide only where sigma_lo < sigma <= sigma_hi (Kynkäänniemi et
                al. 2024, arXiv 2404.07724); elsewhere the network sees each image once, and D_weak is not computed.
            guidance_rescale: from 0 to 1, how far to bring the guided prediction back to the standard deviation of D (Lin
                et al. 2023, arXiv 2305.08891).
            adaptive_projection: adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416): True, or some of
                `{"eta": 0.0, "norm_threshold": None, "momentum": 0.0}`.
            generator: one, or a list with one for each image.
            latents: unit-variance noise `(B, C, H, W)` to start from; multiplied by the first sigma here.
            output_type: "pil"; "np" `(B, H, W, C)` or "pt" `(B, C, H, W)` in [0, 1]; or "latent", in [-1, 1] but
                neither clamped nor rounded.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each step (with
                Heun's method after each evaluation, with jumps once more for each repeated one); may return a dict with
                changed latents.
            conditions: the same as `mapping_cond`, for named columns: `conditions={"temperature": 20}`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        mapping_cond = self.one_condition(mapping_cond, conditions)
        if latents is not None and getattr(latents, "ndim", None) != 4:
            raise ValueError(f"latents must be a tensor (B, C, H, W), got {getattr(latents, 'shape', latents)!r}.")
        if latents is not None and class_labels is None and mapping_cond is None and num_images_per_prompt == 1:
            num_images_per_prompt = len(latents)
        default = self.transformer.sample_size if latents is None else latents.shape[-2:]
        return self.generate(
            default[0] if height is None else height,
            default[1] if width is None else width,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            mapping_cond=mapping_cond,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            adaptive_projection=adaptive_projection,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def generate(
        self,
        height: int,
        width: int,
        *,
        class_labels: Labels | None,
        num_images_per_prompt: int,
        num_inference_steps: int,
        mapping_cond: Tensor | Mapping[str, float | Sequence[float]] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None,
        guidance_rescale: float,
        adaptive_projection: AdaptiveProjection | Mapping[str, float] | bool | None,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        inputs: Mapping[str, Tensor] | None = None,
        strength: float = 1.0,
        jumps: tuple[int, int] = (1, 1),
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images: the steps that this pipeline has in common with those that are made from it.

        They change the steps `prepare_condition`, `add_noise`, `before_step` and `finish`, which get `inputs`.

        Args:
            inputs: further tensors `(B, ...)`, repeated for each prompt, for instance an image to start from.
            strength: share of the steps to run.
            jumps: `(jump_length, jump_n_sample)`, see `HDiTInpaintPipeline`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}.")
        generator = list(generator) if isinstance(generator, tuple) else generator
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale, adaptive_projection)
        has_condition = class_labels is not None or mapping_cond is not None
        self.check_guidance(guidance, has_condition)
        first_step = self.first_step(strength, num_inference_steps)
        self.transformer.check_size(height, width)
        if guidance.scale != 1 and self.guidance_model is not None:
            self.guidance_model.check_size(height, width)
        self.check_condition(inputs or {})
        inputs = dict(inputs or {})
        conditions, batch_size = self.encode_conditions(class_labels, mapping_cond, num_images_per_prompt, **inputs)
        inputs = {name: conditions.pop(name) for name in inputs}
        latents = self.prepare_latents(latents, batch_size, height, width, generator)
        conditions |= self.prepare_condition(inputs, generator)

        self._guidance_scale = guidance_scale
        self.set_timesteps(num_inference_steps, self._execution_device)
        # The first sigma itself: the schedulers' init_noise_sigma, sqrt(sigma² + 1), is not where EDM samplers start.
        sigmas = self.scheduler.sigmas.tolist()
        runs = self.runs(first_step, num_inference_steps, *jumps)
        latents = self.add_noise(latents * sigmas[runs[0].start], inputs)
        callback = None
        if callback_on_step_end is not None:
            names = callback_on_step_end_tensor_inputs
            callback = functools.partial(self.call_back, callback_on_step_end, names, guidance, has_condition)
        before_step = functools.partial(self.before_step, inputs, sigmas, generator)
        latents = self.denoise(latents, conditions, guidance, generator, callback, runs=runs, before_step=before_step)
        latents = self.finish(latents, inputs)

        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_condition(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the model has what conditions it; here, for a model that is conditioned on an image."""
        if channels := self.transformer.config.conditioning_channels:
            raise ValueError(
                f"this model has conditioning_channels={channels}: it upscales images. Use "
                "HDiTUpscalePipeline.from_pipe(pipe)."
            )

    def prepare_condition(self, inputs: Mapping[str, Tensor], generator: Generators) -> dict[str, Tensor]:
        """Return further arguments of the network; here none."""
        return {}

    def add_noise(self, noise: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the latents of the first step from noise of its level; here the noise itself."""
        return noise

    def before_step(
        self, inputs: Mapping[str, Tensor], sigmas: list[float], generator: Generators, i: int, latents: Tensor
    ) -> Tensor:
        """Return the latents that evaluation `i` begins with; here those of the evaluation before."""
        return latents

    def finish(self, latents: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the latents that become images; here those of the last step."""
        return latents

    def call_back(
        self,
        function: Callable,
        names: Sequence[str],
        guidance: Guidance,
        has_condition: bool,
        step: int,
        timestep: Tensor,
        latents: Tensor,
    ) -> Tensor:
        """Call the user's function after a step; it may return other latents, and change `pipe._guidance_scale`."""
        tensors = {"latents": latents}
        changed = function(self, step, timestep, {name: tensors[name] for name in names}) or {}
        if self._guidance_scale != guidance.scale:
            guidance.scale = self._guidance_scale
            self.check_guidance(guidance, has_condition)
        return changed.get("latents", latents)

    # ------------------------------------------------------------------------------------------------------------------
    # The reference's checkpoints

    @classmethod
    def from_k_diffusion(
        cls,
        checkpoint: str | PathLike | Mapping[str, Tensor],
        config: str | PathLike | dict | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> "HDiTPipeline":
        """
        Make a pipeline from a checkpoint of the reference implementation (k-diffusion, `image_transformer_v2`).

        Args:
            checkpoint: a `.safetensors` for inference, a training `.pth` (its EMA weights are taken), or a state dict.
            config: the reference's configuration, a dict or a JSON file; by default the one inside the checkpoint.
            dtype: dtype of the weights, float32 by default. `torch_dtype` is the same.

        Raises:
            ValueError: for a file that can't be read, a configuration of another network, or weights that do not fit it.
        """
        return package_module("conversion").load_pipeline(checkpoint, config, dtype or torch_dtype, pipeline_class=cls)

    def save_k_diffusion(self, path: str | PathLike) -> None:
        """Write the weights and their configuration as a `.safetensors` that the reference loads."""
        package_module("conversion").save_pipeline(self, path)

    # ------------------------------------------------------------------------------------------------------------------
    # The Hub

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> CommitInfo:
        """
        Upload what inference needs, and a model card, to the Hugging Face Hub, in one commit that is retried if need be.

        Text that somebody wrote into the repository's card stays. Weights of an earlier push that these replace go.

        Args:
            repo_id: "user/name"; made if it is not there.
            commit_message, private, token, create_pr, variant: as in Diffusers. `private=True` and a repository that is
                public already is an error.
            revision: branch to push to, made if it is not there.
            max_shard_size: larger weights are split, for instance "5GB".
            license: of the weights, for the card, for instance "cc-by-4.0".
            training_metadata: `model_card.TrainingMetadata` of the training, for the card; without it, the card says nothing of that.
            samples: a PIL image for the card, described by `training_metadata.samples`.

        Returns:
            `huggingface_hub.CommitInfo`, the URL of the commit.

        Raises:
            ValueError: for arguments that can't be, before anything is uploaded.
            ImportError: in code that came with a repository, where the package is not installed.
            huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or fails again and again.
        """
        return package_module("hub.push").push_pipeline(self, repo_id, *args, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """As in Diffusers; `push_to_hub=True` then calls `push_to_hub(repo_id=...)` with the other arguments."""
        hub = ("repo_id", "commit_message", "private", "token", "create_pr", "revision", "license")
        hub = {name: kwargs.pop(name) for name in hub if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            package_module("hub.push").push_folder(save_directory, repo_id, **hub)
