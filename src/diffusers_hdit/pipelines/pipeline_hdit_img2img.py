"""Image to image: an image is noised in part, and denoised again."""

import torch
from diffusers import ImagePipelineOutput

from .image_inputs import Images, images_to_tensor
from .pipeline_hdit import HDiTPipeline, Labels


class HDiTImg2ImgPipeline(HDiTPipeline):
    """
    Draws variations of an image (SDEdit, Meng et al. 2022, arXiv 2108.01073). Components and configuration are
    `HDiTPipeline`'s; `from_pipe` makes one out of the other.
    """

    @torch.no_grad()
    def __call__(
        self, image: Images, class_labels: Labels | None = None, strength: float = 0.8, **sampling
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image: what to start from: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1.
                Its size is that of the result.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            strength: share of `num_inference_steps` that is run, in (0, 1]. The image gets noise of the level where they
                begin; 1 leaves next to nothing of it.
            **sampling: num_images_per_prompt, num_inference_steps, mapping_cond, guidance_scale, guidance_interval,
                guidance_rescale, adaptive_projection, generator, latents (here the noise that is added), output_type,
                return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in `HDiTPipeline`.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        image = images_to_tensor(image, self.transformer.config.in_channels)
        return self.sample(*image.shape[-2:], class_labels=class_labels, image=image, strength=strength, **sampling)
