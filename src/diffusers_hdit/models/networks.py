"""The networks that can be trained, by the names that `--model_type` has for them."""

from collections.abc import Mapping

from .baselines import DiTPixelModel, UNetPixelModel
from .modeling_hdit import HDiTModel


NETWORKS = {"hdit": HDiTModel, "dit": DiTPixelModel, "unet": UNetPixelModel}
# Arguments that mean the same for all of them: what a preset, which is for HDiT, says of others too.
SHARED_ARGUMENTS = ("sample_size", "in_channels", "out_channels", "num_classes", "augment_cond_dim")


def network_class(config: Mapping) -> type:
    """The class that a network's saved configuration is of; HDiTModel for somebody's own subclass of it."""
    return {cls.__name__: cls for cls in NETWORKS.values()}.get(config.get("_class_name"), HDiTModel)
