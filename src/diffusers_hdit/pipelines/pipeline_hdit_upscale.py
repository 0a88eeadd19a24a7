"""Upscaling: a model that was trained with small images as a condition draws them large."""

from typing import Optional, Union

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ImagePipelineOutput, ModelMixin
from torch import Tensor

from ..models.modeling_hdit import HDiTModel
from .image_inputs import Images, images_to_tensor
from .pipeline_hdit import HDiTPipeline, Labels
from .upscaling import check_noise_level, conditioning_channels, conditioning_image


class HDiTUpscalePipeline(HDiTPipeline):
    r"""
    Super-resolution with a model that was trained for it, see `upscaling.py`.

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
        self, image: Images, class_labels: Labels | None = None, noise_level: float = 0.0, **sampling
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image: what to upscale: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1. The
                result is `upscale_factor` times as high and wide.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            noise_level: how much noise to put over the image, from 0 to `max_noise_level`: more for images with faults,
                whose finest detail the result should not follow.
            **sampling: num_images_per_prompt, num_inference_steps, mapping_cond, guidance_scale, guidance_interval,
                guidance_rescale, adaptive_projection, generator, latents, output_type, return_dict,
                callback_on_step_end, callback_on_step_end_tensor_inputs: as in `HDiTPipeline`.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        check_noise_level(noise_level, self.config.max_noise_level)
        factor = self.config.upscale_factor
        image = images_to_tensor(image, self.transformer.config.in_channels)
        height, width = (factor * side for side in image.shape[-2:])

        def enlarge(small: Tensor, generator) -> Tensor:
            noise = self.noise((*small.shape[:2], height, width), generator) if noise_level else None
            return conditioning_image(small, factor, noise_level, noise)

        return self.sample(height, width, class_labels=class_labels, small=image, enlarge=enlarge, **sampling)
