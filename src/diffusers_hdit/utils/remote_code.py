"""Saved models and pipelines carry their own code, so that Diffusers loads them where this package is not installed.

    model_index.json                    names the files below
    pipeline_hdit.py                    the pipeline's class; pipeline_hdit_inpaint.py, ... for the others
    transformer/modeling_hdit.py        the network's class (a baseline's: baselines.py); also in guidance_model/ if there is one
    scheduler/scheduling_edm.py         the sampler's class, if it is none of Diffusers'
    transformer/config.json, *.safetensors, scheduler/scheduler_config.json

`DiffusionPipeline.from_pretrained(x, trust_remote_code=True)` runs these files. Diffusers copies one file of a
component and no others, hence each is written whole: the modules that it imports relatively are put in their place.
The classes of the package read the same folders without running anything from them.
"""

import ast
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path


HEADER = "# Code of diffusers-hdit"
# The version that wrote a carried file, filled in there; None in the package itself.
CODE_VERSION = None
# Saved folders name leaf modules only, and keep doing so wherever a module stands in the package.
MODULES = {
    "modeling_hdit": "models.modeling_hdit",
    "baselines": "models.baselines",
    "scheduling_edm": "schedulers.scheduling_edm",
    "pipeline_hdit": "pipelines.pipeline_hdit",
    "pipeline_hdit_img2img": "pipelines.pipeline_hdit_img2img",
    "pipeline_hdit_inpaint": "pipelines.pipeline_hdit_inpaint",
    "pipeline_hdit_upscale": "pipelines.pipeline_hdit_upscale",
}
# What stands in a carried file for an import of the network: it is a file of its own, and only annotations name it.
STUBBED_IMPORTS = {"modeling_hdit": "from diffusers import ModelMixin as HDiTModel"}


def package_module(name: str):
    """
    Import a module of the installed package that saved folders do not carry.

    In code that a folder carries, this works with the version of the package that wrote the code and no other one: names
    and signatures inside the package change freely, and a published repository must not depend on them.

    Raises:
        ImportError: where the package is not installed, or in another version than the carried code is of.
    """
    try:
        installed = importlib.import_module("diffusers_hdit")
    except ModuleNotFoundError as error:
        if error.name != "diffusers_hdit":
            raise
        raise ImportError(
            "This needs the package diffusers-hdit, which is not installed; the code that comes with a repository only "
            "loads, samples and saves. Install the package, or leave this out."
        ) from error
    if CODE_VERSION not in (None, installed.__version__):
        raise ImportError(
            f"This code was saved by diffusers-hdit {CODE_VERSION}, and {installed.__version__} is installed. Load the "
            "folder with the class of the package instead of trust_remote_code=True, for instance HDiTPipeline."
        )
    return importlib.import_module(f"diffusers_hdit.{name}")


def is_own_class(cls: type) -> bool:
    """Whether a class is one of this package, or of the code from a repository; not somebody's subclass of it."""
    return cls.__module__.split(".")[0] == __name__.split(".")[0]


def inline_imports(path: Path, seen: set[Path] | None = None) -> str:
    """Source of a module in which those that it imports relatively, at the top level, are written out, once each."""
    seen = set() if seen is None else seen
    source = path.read_text(encoding="utf-8")
    lines, written, position = source.splitlines(keepends=True), [], 0
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        written += lines[position : node.lineno - 1]
        position = node.end_lineno
        module = path.parents[node.level - 1].joinpath(*node.module.split("."))
        if module.name in STUBBED_IMPORTS:
            written.append(STUBBED_IMPORTS[module.name] + "\n")
        elif module not in seen:
            seen.add(module)
            written.append(inline_imports(module.with_suffix(".py"), seen))
    return "".join([*written, *lines[position:]])


def remote_code_of(cls: type) -> str:
    """The file that makes `cls` without this package. A class that came from such a file gives it back unchanged."""
    source = inline_imports(Path(inspect.getsourcefile(cls)).resolve())
    if source.startswith(HEADER):
        return source
    version = sys.modules[cls.__module__.split(".")[0]].__version__
    source = source.replace("\nCODE_VERSION = None\n", f'\nCODE_VERSION = "{version}"\n')
    return f"{HEADER} {version}, Apache License 2.0, written here so that it runs without the package.\n{source}"


class RemoteCodeMixin:
    """Mixin in front of Diffusers' classes: whatever is saved carries the code of its class, and no local path."""

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        if is_own_class(type(self)) and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            path = Path(save_directory) / f"{type(self).__module__.rpartition('.')[2]}.py"
            path.write_text(remote_code_of(type(self)), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs) -> dict:
        # Downloads and loading both read the configuration here. What it says of code is for those who ask for no class
        # by name; where one is asked for, it is not to be replaced by the repository's.
        config = super()._dict_from_json_file(json_file, **kwargs)
        config.pop("auto_map", None)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config


class SafeWeights:
    """Mixin in front of Diffusers' classes with weights, which are saved as and loaded from safetensors only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in Diffusers, but weights are read from safetensors only: a pickle can run code when it is opened."""
        if kwargs.get("use_safetensors") not in (None, True):
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']} was given, but {cls.__name__} reads safetensors only, "
                "because a pickle can run code. Leave it out; convert old weights with safetensors.torch.save_file."
            )
        kwargs["use_safetensors"] = True
        if getattr(cls, "_keep_in_fp32_modules", None) and not kwargs.get("low_cpu_mem_usage", True):
            # Diffusers refuses it for such models; the loaded weights are the same.
            del kwargs["low_cpu_mem_usage"]
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs,
    ) -> None:
        """
        As in Diffusers; its pipelines look for these parameters by name.

        Raises:
            ValueError: for `safe_serialization=False`, before anything is written: the pickle could not be loaded again.
        """
        check_safe_serialization(self, safe_serialization)
        check_no_adapters(self)
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size}
        super().save_pretrained(save_directory, is_main_process, save_function, **kwargs)


def check_safe_serialization(saved: object, safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError(
            f"safe_serialization=False was given, but {type(saved).__name__} saves weights as safetensors only, because a "
            "pickle can run code and would not be loaded again. Leave it out."
        )


def check_no_adapters(saved: object) -> None:
    """Raise ValueError for a network with LoRA adapters, which would be loaded again without them and with random weights."""
    if getattr(saved, "_hf_peft_config_loaded", False):
        names = ", ".join(getattr(saved, "peft_config", {}))
        raise ValueError(
            f"{type(saved).__name__} has LoRA adapters ({names}), which save_pretrained does not save. Save them with "
            "save_lora_adapter(FOLDER); or make them part of the weights with fuse_lora() and unload_lora(), or remove them "
            "with unload_lora(), and save then."
        )


class PipelineRemoteCodeMixin(RemoteCodeMixin, SafeWeights):
    """Writes into model_index.json which files hold the code, and reads past it with a class that is at hand."""

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args, **kwargs):
        """As in Diffusers; raises ValueError for `safe_serialization=False` (see `SafeWeights`)."""
        check_safe_serialization(self, safe_serialization)
        for component in self.components.values():
            check_no_adapters(component)
        super(SafeWeights, self).save_pretrained(save_directory, safe_serialization, *args, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        packages = {__name__.split(".")[0], "diffusers_hdit", "diffusers_modules"}
        for name, value in config.items():
            # Modules as Diffusers recorded them, with their full path: [None, None] is an empty component.
            if isinstance(value, list) and len(value) == 2 and str(value[0]).split(".")[0] in packages:
                config[name] = [value[0].rpartition(".")[2], value[1]]
        if is_own_class(type(self)):
            config["_class_name"] = [type(self).__module__.rpartition(".")[2], type(self).__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args, **kwargs):
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        package = (cls.__module__ if is_own_class(cls) else __name__).rpartition(".")[0]
        for name, value in config.items():
            if not (isinstance(value, list) and len(value) == 2):
                continue
            module = f"{package}.{value[0]}"
            # Diffusers finds only modules that are imported already. What a repository names is never imported, but for
            # the package's own modules.
            if __name__.split(".")[0] == "diffusers_hdit" and value[0] in MODULES:
                module = importlib.import_module(f"diffusers_hdit.{MODULES[value[0]]}").__name__
            if module in sys.modules:
                config[name] = [module, value[1]]
        return loaded
