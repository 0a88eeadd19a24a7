"""Upscaling: a model that was trained with low-resolution images as a condition generates them at a higher resolution."""

from collections.abc import Callable, Mapping, Sequence
from typing import Optional, Union

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..models.modeling_hdit import HDiTModel
from .guidance import AdaptiveProjection
from .image_inputs import Images, images_to_tensor
from .pipeline_hdit import Generators, HDiTPipeline, Labels
from .upscaling import check_noise_level, conditioning_channels, conditioning_image


class HDiTUpscalePipeline(HDiTPipeline):
    r"""
    Upscale images with a model that was trained for it, see `upscaling.py`.

    Args:
        transformer (`HDiTModel`): with `conditioning_channels=upscaling.conditioning_channels(in_channels)`.
        upscale_factor (`int`): side of the result by side of the image, as in the training.
        max_noise_level (`float`): the highest level of noise in the condition, as in the training.
        scheduler, id2label, condition_columns, k_diffusion_config, guidance_model: as in `HDiTPipeline`.

    Raises:
        ValueError: for a model that was not trained for this.
    """

    def __init__(
        self,
        # Written as Diffusers 0.36 can read them when it loads a pipeline; it passes over `A | B`.
        transformer: Union[HDiTModel, ModelMixin],  # noqa: UP007
        scheduler: Union[EDMDPMSolverMultistepScheduler, EDMEulerScheduler],  # noqa: UP007
        id2label: Optional[dict] = None,  # noqa: UP045
        condition_columns: Optional[dict] = None,  # noqa: UP045
        k_diffusion_config: Optional[dict] = None,  # noqa: UP045
        guidance_model: Optional[Union[HDiTModel, ModelMixin]] = None,  # noqa: UP007, UP045
        upscale_factor: int = 4,
        max_noise_level: float = 0.5,
    ):
        config = transformer.config
        if config.conditioning_channels != conditioning_channels(config.in_channels):
            raise ValueError(
                f"this model has conditioning_channels={config.conditioning_channels}; one that upscales images of "
                f"{config.in_channels} channels has {conditioning_channels(config.in_channels)}, and was trained with them."
            )
        super().__init__(transformer, scheduler, id2label, condition_columns, k_diffusion_config, guidance_model)
        self.register_to_config(upscale_factor=upscale_factor, max_noise_level=max_noise_level)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        class_labels: Labels | None = None,
        noise_level: float = 0.0,
        num_images_per_prompt: int = 1,
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
        Upscale images.

        Args:
            image: what to upscale: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1. The
                result is `upscale_factor` times as high and wide.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            noise_level: how much noise to add to the image, from 0 to `max_noise_level`: more for images with faults, whose
                finest detail the result should not follow.
            latents: as in `HDiTPipeline`.
            num_images_per_prompt, num_inference_steps, mapping_cond, guidance_scale, guidance_interval, guidance_rescale,
                adaptive_projection, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, conditions: as in `HDiTPipeline`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        check_noise_level(noise_level, self.config.max_noise_level)
        low_res_image = images_to_tensor(image, self.transformer.config.in_channels)
        height, width = (self.config.upscale_factor * side for side in low_res_image.shape[-2:])
        return self.generate(
            height,
            width,
            inputs={
                "low_res_image": low_res_image,
                "noise_level": torch.full((len(low_res_image),), float(noise_level)),
            },
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            mapping_cond=self.one_condition(mapping_cond, conditions),
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

    def check_condition(self, inputs: Mapping[str, Tensor]) -> None:
        """The model's condition is the low-resolution image."""

    def prepare_condition(self, inputs: Mapping[str, Tensor], generator: Generators) -> dict[str, Tensor]:
        """Return the low-resolution image at the size of the result, with noise of its level."""
        low_res_image, level, factor = inputs["low_res_image"], inputs["noise_level"], self.config.upscale_factor
        if not level.any():
            return {"conditioning_image": conditioning_image(low_res_image, factor, 0.0)}
        height, width = (factor * side for side in low_res_image.shape[-2:])
        noise = self.noise((*low_res_image.shape[:2], height, width), generator)
        return {"conditioning_image": conditioning_image(low_res_image, factor, level, noise)}
