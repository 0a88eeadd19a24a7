"""LoRA adapters of pipelines: load, fuse, choose and save them, as in all pipelines of Diffusers."""

import os

from diffusers.loaders import SanaLoraLoaderMixin
from torch import Tensor


class HDiTLoraLoaderMixin(SanaLoraLoaderMixin):
    """What Diffusers has for pipelines whose only network with adapters is the `transformer`; it does not depend on Sana."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor], **kwargs):
        """As in Diffusers, but from safetensors only; raises ValueError for `use_safetensors=False`."""
        if kwargs.get("use_safetensors") not in (None, True):
            raise ValueError(
                "use_safetensors=False was given, but adapters are read from safetensors only, because a pickle can run code. "
                "Leave it out."
            )
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **{**kwargs, "use_safetensors": True})
