"""The gallery's script with a network that has learned nothing: that it runs, and what its tables are made of."""

import ast
import functools
import importlib.util
import re

import pytest
import torch
from conftest import REPOSITORY
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image

from diffusers_hdit import HDiTPipeline, HDiTUpscalePipeline


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "research"))
    spec = importlib.util.spec_from_file_location(
        "make_gallery", REPOSITORY / "examples" / "research" / "make_gallery.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_pictures_and_tables(gallery, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "REFERENCE_STEPS", 50)
    # Fewer steps than its pictures have: a test of the script, not of the sampler.
    quick = functools.partialmethod(HDiTPipeline.generate, num_inference_steps=4)
    monkeypatch.setattr(gallery.HDiTImg2ImgPipeline, "generate", quick)
    monkeypatch.setattr(gallery.HDiTUpscalePipeline, "generate", quick)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=80.0)
    small = {"widths": (16, 32), "depths": (1, 2), "sample_size": 32}
    HDiTPipeline(make_model(**small, num_classes=3), scheduler).save_pretrained(tmp_path / "pipe")
    upscaler = make_model(**small, conditioning_channels=4)
    HDiTUpscalePipeline(upscaler, scheduler).save_pretrained(tmp_path / "up")
    output = tmp_path / "out"
    gallery.main([
        "--pipeline", str(tmp_path / "pipe"), "--upscale_pipeline", str(tmp_path / "up"), "--output_dir", str(output),
        "--only", "img2img", "upscaling", "sizes", "errors",
    ])  # fmt: skip
    for name in ("img2img", "upscaling", "sizes"):
        with Image.open(output / f"{name}.png") as picture:
            assert picture.width > 200 and picture.height > 200
    tables = (output / "tables.md").read_text()
    assert tables.count("| DPM++ 3M SDE |") == 4 and tables.count("| Heun |") == 4


def test_one_brownian_path(gallery):
    """Noises of fine steps add up to that of the coarse step, and each is of unit variance."""
    scheduler = gallery.OnePath(sigma_min=0.1, sigma_max=10.0).prepare((5, 9, 50), (1, 3, 64, 64))
    increments = {}
    for steps in (5, 9):
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas[:-1].tolist()
        increments[steps] = [scheduler.path[b] - scheduler.path[a] for a, b in zip(levels, levels[1:], strict=False)]
        for (a, b), increment in zip(zip(levels, levels[1:], strict=False), increments[steps], strict=True):
            assert (increment / (b**-2 - a**-2) ** 0.5).std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(sum(increments[5]), sum(increments[9]))


def test_the_page_that_shows_it():
    """Its pictures are there and small, its snippets are Python and name what exists."""
    import diffusers_hdit

    page = (REPOSITORY / "docs" / "sampling.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(pictures) == 7
    assert all((REPOSITORY / "docs" / path).stat().st_size < 300_000 for path in pictures)
    for snippet in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "diffusers_hdit":
                assert all(hasattr(diffusers_hdit, name.name) for name in node.names)
