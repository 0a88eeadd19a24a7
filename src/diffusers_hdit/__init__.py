"""The Hourglass Diffusion Transformer for Diffusers: `HDiTModel`, its pipelines and samplers, `presets`, `diffusion`."""

import importlib


__version__ = "0.1.0"

# Imported on first use, so that `import diffusers_hdit` stays quick.
_MODULES = {
    "HDiTModel": "modeling_hdit",
    "DiTPixelModel": "baselines",
    "UNetPixelModel": "baselines",
    "HDiTPipeline": "pipeline_hdit",
    "HDiTImg2ImgPipeline": "pipeline_hdit_img2img",
    "HDiTInpaintPipeline": "pipeline_hdit_inpaint",
    "HDiTUpscalePipeline": "pipeline_hdit_upscale",
    "DPMSolverPP3MSDEScheduler": "scheduling_edm",
    "EDMHeunScheduler": "scheduling_edm",
    "presets": None,
    "diffusion": None,
    "guidance": None,
    "probability_flow": None,
    "upscaling": None,
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] is None:
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_MODULES])
