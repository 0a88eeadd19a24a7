"""The networks that can be trained, by their names in `--model_type`."""

from collections.abc import Mapping

from .baselines import DiTPixelModel, UNetPixelModel
from .modeling_hdit import HDiTModel


NETWORKS = {"hdit": HDiTModel, "dit": DiTPixelModel, "unet": UNetPixelModel}
# Arguments that mean the same for all of them, so that a preset, which is for HDiT, sets them for the others too.
SHARED_ARGUMENTS = ("sample_size", "in_channels", "out_channels", "num_classes", "augment_cond_dim")


def network_class(config: Mapping) -> type:
    """Return the class of a network's saved configuration; HDiTModel for a class that is not in `NETWORKS`."""
    return {cls.__name__: cls for cls in NETWORKS.values()}.get(config.get("_class_name"), HDiTModel)
