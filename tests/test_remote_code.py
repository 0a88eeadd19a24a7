"""Code that saved pipelines carry uses the installed package only in the version that wrote it."""

import importlib
import json
import os
import subprocess
import sys

import torch
from diffusers import EDMDPMSolverMultistepScheduler

import diffusers_hdit
from diffusers_hdit import HDiTPipeline
from diffusers_hdit.utils import remote_code


SAMPLE = """
import json, sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images
torch.save(images, sys.argv[2])
carried = sys.modules[type(pipe.transformer).__module__]
print(json.dumps({"kernels": sorted(carried.kernels_of("geglu")), "version": carried.CODE_VERSION}))
"""


def sample(folder, output, **variables):
    command = [sys.executable, "-c", SAMPLE, str(folder), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(output), json.loads(done.stdout.splitlines()[-1])


def test_another_version_is_left_alone(make_model, tmp_path):
    """Whatever was removed from it: the code runs on plain PyTorch. The same version's kernels are used."""
    folder = tmp_path / "saved"
    HDiTPipeline(make_model(), EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=80.0)).save_pretrained(folder)

    other = tmp_path / "other" / "diffusers_hdit" / "ops"
    other.mkdir(parents=True)
    (other.parent / "__init__.py").write_text('__version__ = "99.0"\n')
    (other / "__init__.py").write_text("")
    (other / "kernels.py").write_text("raise AttributeError('a private function is gone')\n")
    search_path = os.pathsep.join((str(tmp_path / "other"), os.environ.get("PYTHONPATH", "")))
    beside_another, found = sample(folder, tmp_path / "a.pt", PYTHONPATH=search_path)
    assert found == {"kernels": [], "version": diffusers_hdit.__version__}

    without_kernels, _ = sample(folder, tmp_path / "b.pt", DIFFUSERS_HDIT_KERNELS="0")
    torch.testing.assert_close(beside_another, without_kernels, rtol=0, atol=1e-5)
    with_kernels, found = sample(folder, tmp_path / "c.pt")
    assert found["kernels"] == ["cpp"]
    torch.testing.assert_close(with_kernels, without_kernels, rtol=0, atol=1e-3)


def test_every_leaf_has_a_module():
    for leaf, module in remote_code.MODULES.items():
        assert module.rpartition(".")[2] == leaf
        assert importlib.import_module(f"diffusers_hdit.{module}")
