"""The Hourglass Diffusion Transformer for Diffusers: `HDiTModel`, its pipelines and samplers, `presets`, `diffusion`."""

import importlib


__version__ = "0.2.0.dev0"

# Where each public name is. Imported on first use, so that
# `import diffusers_hdit` stays quick.
_MODULES = {
    "HDiTModel": "models.modeling_hdit",
    "DiTPixelModel": "models.baselines",
    "UNetPixelModel": "models.baselines",
    "HDiTPipeline": "pipelines.pipeline_hdit",
    "HDiTImg2ImgPipeline": "pipelines.pipeline_hdit_img2img",
    "HDiTInpaintPipeline": "pipelines.pipeline_hdit_inpaint",
    "HDiTUpscalePipeline": "pipelines.pipeline_hdit_upscale",
    "DPMSolverPP3MSDEScheduler": "schedulers.scheduling_edm",
    "EDMHeunScheduler": "schedulers.scheduling_edm",
}
_PUBLIC_MODULES = {
    "presets": "presets",
    "diffusion": "diffusion",
    "guidance": "pipelines.guidance",
    "probability_flow": "pipelines.probability_flow",
    "upscaling": "pipelines.upscaling",
}
__all__ = [*_MODULES, *_PUBLIC_MODULES]


def __getattr__(name: str):
    if name in _PUBLIC_MODULES:
        value = importlib.import_module(f".{_PUBLIC_MODULES[name]}", __name__)
    elif name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
