"""Inpainting: part of an image is drawn anew, the rest stays as it is."""

import torch
from diffusers import ImagePipelineOutput

from .image_inputs import Images, images_to_tensor, mask_to_tensor
from .pipeline_hdit import HDiTPipeline, Labels


class HDiTInpaintPipeline(HDiTPipeline):
    """
    Draws what a mask covers so that it fits the rest, with a model that was not trained for it (RePaint, Lugmayr et al.
    2022, arXiv 2201.09865). Components and configuration are `HDiTPipeline`'s; `from_pipe` makes one out of the other.
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
        **sampling,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image: one or a list, PIL images, or arrays `(H, W, C)` or tensors `(C, H, W)` from 0 to 1. Its size is that of
                the result.
            mask_image: of the same size: white (0.5 and above) is drawn anew, black comes back as it was, to the 8 bits.
            class_labels: as in `HDiTPipeline`; one, or as many as images.
            strength: as in `HDiTImg2ImgPipeline`; below 1, what the mask covers is not forgotten altogether.
            jump_length, jump_n_sample: after each `jump_length` steps, go back up as many and down again, until they have
                been run `jump_n_sample` times, so that what is drawn and what is known come to fit (section 4.2 of the
                paper; its values). 1 sample means no jumps and one evaluation a step; `jump_n_sample`
                multiplies the evaluations, but for those of the first stretch.
            **sampling: as in `HDiTImg2ImgPipeline`.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        image = images_to_tensor(image, self.transformer.config.in_channels)
        return self.sample(
            *image.shape[-2:],
            class_labels=class_labels,
            image=image,
            mask=mask_to_tensor(mask_image, *image.shape[-2:]),
            strength=strength,
            jumps=(jump_length, jump_n_sample),
            **sampling,
        )
