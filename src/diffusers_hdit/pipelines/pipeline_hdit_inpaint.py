"""Inpainting: a part of an image is generated anew, the rest stays as it is."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .guidance import AdaptiveProjection
from .image_inputs import Images, fit_to_model, images_to_tensor, mask_to_tensor
from .pipeline_hdit import Generators, HDiTPipeline, Labels


class HDiTInpaintPipeline(HDiTPipeline):
    """
    Generate what a mask covers so that it fits the rest, with a model that was not trained for it (RePaint, Lugmayr et al.
    2022, arXiv 2201.09865). Components and configuration are `HDiTPipeline`'s; `from_pipe` makes one from the other.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        mask_image: Images,
        class_labels: Labels | None = None,
        strength: float = 1.0,
        jump_length: int = 10,
        jump_n_sample: int = 10,
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
        Generate what a mask covers.

        Args:
            image: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1. Its size is that of
                the result.
            mask_image: of the same size: white (0.5 and above) is generated anew, black stays as it was, to the 8 bits.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            strength: as in `HDiTImg2ImgPipeline`; below 1, what the mask covers is not forgotten altogether.
            jump_length, jump_n_sample: after each `jump_length` steps, go back up as many and down again, until they have
                been run `jump_n_sample` times, so that the filled region and its surroundings fit each other (section 4.2
                of the paper; its values). Without resampling (`jump_n_sample=1`) the filled region ignores its
                surroundings; `jump_n_sample` multiplies the evaluations, but for those of the first stretch.
            latents: the noise to add, of unit variance.
            num_images_per_prompt, num_inference_steps, mapping_cond, guidance_scale, guidance_interval, guidance_rescale,
                adaptive_projection, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, conditions: as in `HDiTPipeline`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        image = images_to_tensor(image, self.transformer.config.in_channels)
        mask = mask_to_tensor(mask_image, *image.shape[-2:])
        image = fit_to_model(image, self.transformer)
        mask = F.interpolate(mask.float(), image.shape[-2:], mode="nearest-exact") > 0.5
        return self.generate(
            *image.shape[-2:],
            inputs={"image": image, "mask": mask},
            strength=strength,
            jumps=(jump_length, jump_n_sample),
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

    def add_noise(self, noise: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return noise + inputs["image"]

    def before_step(
        self, inputs: Mapping[str, Tensor], sigmas: list[float], generator: Generators, i: int, latents: Tensor
    ) -> Tensor:
        """Replace what was generated outside the mask by the image at this noise level (RePaint, equation 8)."""
        if i % self.scheduler.order:
            return latents  # in the middle of a step
        image = inputs["image"]
        return torch.where(inputs["mask"], latents, image + sigmas[i] * self.noise(image.shape, generator))

    def finish(self, latents: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.where(inputs["mask"], latents, inputs["image"])
