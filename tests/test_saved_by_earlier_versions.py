"""What version 0.1.0 saved loads in this one, with the package and without it, and gives the same images."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from diffusers import DiffusionPipeline
from running import TRAIN, run
from safetensors.torch import load_file

from diffusers_hdit import HDiTPipeline, HDiTUpscalePipeline


FOLDER = REPOSITORY / "tests" / "fixtures" / "saved_by_0.1.0"
KINDS = sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))
# Other kernels, with their own rounding, over four steps.
TOLERANCE = {"rtol": 0, "atol": 5e-4}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """A folder as version 0.1.0 wrote it."""
    folder = tmp_path / request.param
    shutil.copytree(FOLDER / request.param, folder)
    for name in (folder / "code.txt").read_text().split():
        shutil.copyfile(FOLDER / "code" / name.rpartition("/")[2], folder / name)
    return folder


def generate(pipe, folder):
    expected = load_file(folder / "expected.safetensors")
    call = json.loads((folder / "call.json").read_text())
    call |= {"image": expected["image"]} if "image" in expected else {}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(num_inference_steps=4, generator=generator, output_type="latent", **call).images
    return images, expected["images"]


def test_all_kinds_are_there():
    assert len(KINDS) == 9


def test_with_the_package(saved):
    cls = HDiTUpscalePipeline if saved.name == "upscale" else HDiTPipeline
    pipe = cls.from_pretrained(saved)
    assert type(pipe.transformer).__module__.startswith("diffusers_hdit.models.")
    torch.testing.assert_close(*generate(pipe, saved), **TOLERANCE)


def test_saved_again_by_this_version(saved, tmp_path):
    """And loaded by DiffusionPipeline, whose classes then come from the folder."""
    cls = HDiTUpscalePipeline if saved.name == "upscale" else HDiTPipeline
    again = tmp_path / "again"
    cls.from_pretrained(saved).save_pretrained(again)
    for name in ("call.json", "expected.safetensors"):
        shutil.copyfile(saved / name, again / name)
    torch.testing.assert_close(*generate(cls.from_pretrained(again), saved), **TOLERANCE)
    pipe = DiffusionPipeline.from_pretrained(str(again), trust_remote_code=True)
    torch.testing.assert_close(*generate(pipe, saved), **TOLERANCE)


def test_its_own_code_beside_the_package(saved):
    """The code that the folder carries, in a process that has this version of the package."""
    pipe = DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True)
    assert type(pipe.transformer).__module__.startswith("diffusers_modules.")
    torch.testing.assert_close(*generate(pipe, saved), **TOLERANCE)


WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_hdit":
            raise ModuleNotFoundError("No module named 'diffusers_hdit'", name="diffusers_hdit")

sys.meta_path.insert(0, Blocked())
import json
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

for folder in map(Path, sys.argv[1:]):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    expected = load_file(folder / "expected.safetensors")
    call = json.loads((folder / "call.json").read_text())
    call |= {"image": expected["image"]} if "image" in expected else {}
    generator = torch.Generator().manual_seed(0)
    images = pipe(num_inference_steps=4, generator=generator, output_type="latent", **call).images
    torch.testing.assert_close(images, expected["images"], rtol=0, atol=5e-4)
"""


def test_without_the_package(tmp_path):
    """Its own code, and the code of this version after loading and saving."""
    folders = []
    for kind in KINDS:
        folder = tmp_path / "0.1.0" / kind
        shutil.copytree(FOLDER / kind, folder)
        for name in (folder / "code.txt").read_text().split():
            shutil.copyfile(FOLDER / "code" / name.rpartition("/")[2], folder / name)
        cls = HDiTUpscalePipeline if kind == "upscale" else HDiTPipeline
        again = tmp_path / "again" / kind
        cls.from_pretrained(folder).save_pretrained(again)
        for name in ("call.json", "expected.safetensors"):
            shutil.copyfile(folder / name, again / name)
        folders += [folder, again]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *map(str, folders)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_training_run_resumes(tmp_path):
    """From version 0.1.0's checkpoint, to the weights that it ended with itself."""
    folder = tmp_path / "run"
    shutil.copytree(FOLDER / "training_run", folder)
    run(TRAIN, "--config", folder / "config.json", "--output_dir", folder)
    for average, place in (("ema-0.9999", folder), ("ema-0.99", folder / "ema-0.99")):
        weights = load_file(place / "transformer" / "diffusion_pytorch_model.safetensors")
        expected = load_file(folder / "expected" / f"{average}.safetensors")
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
