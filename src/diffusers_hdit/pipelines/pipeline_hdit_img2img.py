"""Image to image: noise is added to an image, and it is denoised again."""

from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .guidance import AdaptiveProjection
from .image_inputs import Images, fit_to_model, images_to_tensor
from .pipeline_hdit import Generators, HDiTPipeline, Labels


class HDiTImg2ImgPipeline(HDiTPipeline):
    """
    Generate variations of an image (SDEdit, Meng et al. 2022, arXiv 2108.01073). Components and configuration are
    `HDiTPipeline`'s; `from_pipe` makes one from the other.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        class_labels: Labels | None = None,
        strength: float = 0.8,
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
        Generate variations of an image.

        Args:
            image: what to start from: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1.
                Its size is that of the result; one that the model does not take is resized to the nearest that it does.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            strength: share of `num_inference_steps` that is run, in (0, 1]. The image gets noise of the level where they
                begin; 1 leaves next to nothing of it.
            latents: the noise to add, of unit variance.
            num_images_per_prompt, num_inference_steps, mapping_cond, guidance_scale, guidance_interval, guidance_rescale,
                adaptive_projection, generator, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, conditions: as in `HDiTPipeline`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        image = fit_to_model(images_to_tensor(image, self.transformer.config.in_channels), self.transformer)
        return self.generate(
            *image.shape[-2:],
            inputs={"image": image},
            strength=strength,
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
