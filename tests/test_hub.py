"""Push and pull over a real wire: the real client, HTTP on loopback, and the server in `hub_server.py`."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL, relative_error
from diffusers import AutoModel, DiffusionPipeline, EDMDPMSolverMultistepScheduler
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from diffusers.utils import dynamic_modules_utils
from hub_server import Hub
from huggingface_hub import HfApi, constants, hf_api
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from packaging.version import Version
from PIL import Image

import diffusers_hdit
from diffusers_hdit import (
    DPMSolverPP3MSDEScheduler,
    EDMHeunScheduler,
    HDiTImg2ImgPipeline,
    HDiTInpaintPipeline,
    HDiTModel,
    HDiTPipeline,
    HDiTUpscalePipeline,
)
from diffusers_hdit import conversion as convert_k_diffusion
from diffusers_hdit.hub import model_card
from diffusers_hdit.hub import push as hub_module
from diffusers_hdit.hub.model_card import TrainingMetadata
from diffusers_hdit.hub.push import BackgroundPush, push_folder
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.trainer import run_training
from diffusers_hdit.utils import remote_code


if Version(diffusers.__version__) < Version("0.42"):
    pytest.skip(
        "the round trips are shown with Diffusers 0.42 and later only, see docs/hub.md", allow_module_level=True
    )


TINY = {**SMALL, "sample_size": 16, "widths": (32, 32), "depths": (1, 1)}
NAME = "user/faces"
FILES = {
    ".gitattributes", "README.md", "model_index.json", "pipeline_hdit.py", "scheduler/scheduler_config.json",
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/modeling_hdit.py",
}  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to, logged in as `user`, with an empty cache and short waits."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setenv("HF_TOKEN", "hf_user")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(hub_module, "WAITS", (0.01, 0.01, 0.01))
        yield hub


@pytest.fixture
def make_pipeline(make_model):
    def make(**overrides):
        config = {**TINY, "num_classes": 3, **overrides}
        id2label = None if config["num_classes"] is None else dict(enumerate(["cat", "dog", "owl"]))
        scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=80.0, sigma_data=0.5)
        pipe = HDiTPipeline(make_model(**config), scheduler, id2label=id2label)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pushed(hub, make_pipeline):
    pipe = make_pipeline()
    pipe.push_to_hub(NAME)
    return pipe


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("dog", num_inference_steps=2, generator=generator, output_type="latent").images


def environment(hub, tmp_path, **more):
    """For other processes. No path to this repository: the package is there only if `more` says so."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    return {
        **keep, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1", **more,
    }  # fmt: skip


SOURCE = {"PYTHONPATH": str(REPOSITORY / "src")}


def run(script, env, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Round trips


def test_package_to_package(hub, pushed, make_model):
    assert set(hub.repos[NAME].files) == FILES
    assert len(hub.repos[NAME].commits) == 2 and not hub.repos[NAME].private
    pipe = HDiTPipeline.from_pretrained(NAME)
    assert type(pipe) is HDiTPipeline and type(pipe.transformer) is HDiTModel
    assert torch.equal(draw(pipe), draw(pushed))
    assert pipe.id2label == {0: "cat", 1: "dog", 2: "owl"} and pipe.scheduler.config.sigma_max == 80.0
    model = HDiTModel.from_pretrained(NAME, subfolder="transformer")
    assert type(model) is HDiTModel and torch.equal(model.patch_in.proj.weight, pipe.transformer.patch_in.proj.weight)
    assert HDiTModel.from_pretrained(NAME, subfolder="transformer", torch_dtype=torch.bfloat16).dtype == torch.bfloat16

    other = make_model(**TINY, num_classes=3)
    assert HDiTPipeline.from_pretrained(NAME, transformer=other).transformer is other
    assert HDiTPipeline.from_pretrained(NAME, torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_revision_and_variant(hub, pushed, make_pipeline):
    first = hub.repos[NAME].commits[-1].oid
    second = make_pipeline()
    second.transformer.patch_in.proj.weight.data.mul_(2)
    second.push_to_hub(NAME, revision="later", commit_message="Twice as much")
    assert [commit.message for commit in hub.repos[NAME].branches["later"]][-1] == "Twice as much"
    assert hub.repos[NAME].commits[-1].oid == first, "main is as it was"
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME, revision="later")), draw(second))
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME, revision=first)), draw(pushed))

    second.to(torch.bfloat16).push_to_hub(NAME, variant="bf16")
    assert set(hub.repos[NAME].files) == FILES | {WEIGHTS.replace("model.", "model.bf16.")}
    loaded = HDiTPipeline.from_pretrained(NAME, variant="bf16", torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.transformer.patch_in.proj.weight, second.transformer.patch_in.proj.weight)
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pushed)), "the other weights are still there"
    pull_request = second.push_to_hub(NAME, variant="bf16", create_pr=True, license="cc0-1.0")
    assert pull_request.pr_url and len(hub.repos[NAME].commits) == 3


WITHOUT_PACKAGE = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "diffusers_hdit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
import torch
from diffusers import DiffusionPipeline
name, folder = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(name)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code of a repository ran without being trusted")
for _ in range(2):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("dog", num_inference_steps=2, generator=generator, output_type="latent").images
    torch.save(image, f"{folder}/image.pt")
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
assert not any(module.startswith("diffusers_hdit") for module in sys.modules)
pipe.save_pretrained(f"{folder}/saved")
for call in (lambda: pipe.push_to_hub(name), lambda: type(pipe.transformer).from_preset("tiny"),
             lambda: type(pipe).from_k_diffusion("x"), lambda: pipe.save_k_diffusion("x")):
    try:
        call()
    except ImportError as error:
        assert "needs the package diffusers-hdit" in str(error), error
    else:
        raise AssertionError("this can't work here")
"""


def test_package_to_no_package_and_back(hub, pushed, tmp_path):
    """Also from what was saved there, and from what the package saved of that."""
    env, expected = environment(hub, tmp_path), draw(pushed)
    _, err = run(WITHOUT_PACKAGE, env, NAME, tmp_path)
    # To rounding: without the package, there are no compiled kernels.
    assert relative_error(torch.load(tmp_path / "image.pt"), expected) < 1e-4
    assert "might require the following packages" not in err and "Expected types" not in err, err

    pipe = HDiTPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipe) is HDiTPipeline and type(pipe.transformer) is HDiTModel
    assert torch.equal(draw(pipe), expected) and pipe.id2label == pushed.id2label
    pipe.push_to_hub("user/again")
    assert {path: hub.repos["user/again"].files[path] for path in FILES - {"README.md"}} == {
        path: hub.repos[NAME].files[path] for path in FILES - {"README.md"}
    }


SAMPLER_WITHOUT_PACKAGE = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "diffusers_hdit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
import torch
from diffusers import DiffusionPipeline
for number, name in enumerate(sys.argv[1:3]):
    try:
        DiffusionPipeline.from_pretrained(name)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("code of a repository ran without being trusted")
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("dog", num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="latent").images
    torch.save(image, f"{sys.argv[3]}/image{number}.pt")
    assert type(pipe.scheduler).__module__.endswith(".scheduling_edm"), type(pipe.scheduler)
    assert type(pipe.scheduler).__name__ == sys.argv[4]
    assert type(pipe).from_pipe(pipe).transformer is pipe.transformer
    assert type(pipe).from_pipe(pipe).guidance_model is pipe.guidance_model is not None
    assert not any(module.startswith("diffusers_hdit") for module in sys.modules)
    pipe.save_pretrained(f"{sys.argv[3]}/saved{number}")
"""


@pytest.mark.parametrize("cls", [DPMSolverPP3MSDEScheduler, EDMHeunScheduler])
def test_our_samplers_and_a_guidance_model_from_folder_and_hub(hub, make_pipeline, make_model, tmp_path, cls):
    """With the package no flag; without it the code is the repository's. And what was saved there, here again."""
    pipe = make_pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    pipe.register_modules(guidance_model=make_model(**{**TINY, "num_classes": 3, "mapping_width": 16}))

    def draw(pipe):
        arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
        return pipe("dog", generator=torch.Generator().manual_seed(0), **arguments).images

    expected = draw(pipe)
    pipe.push_to_hub(NAME)
    new = {"scheduler/scheduling_edm.py"} | {
        path.replace("transformer", "guidance_model") for path in FILES if path.startswith("transformer")
    }
    assert set(hub.repos[NAME].files) == FILES | new
    pipe.save_pretrained(tmp_path / "folder")
    run(SAMPLER_WITHOUT_PACKAGE, environment(hub, tmp_path), tmp_path / "folder", NAME, tmp_path, cls.__name__)
    for number in range(2):
        assert relative_error(torch.load(tmp_path / f"image{number}.pt"), expected) < 1e-4
    for where in (NAME, tmp_path / "folder", tmp_path / "saved0", tmp_path / "saved1"):
        loaded = HDiTPipeline.from_pretrained(where)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is cls and type(loaded.guidance_model) is HDiTModel
        assert torch.equal(draw(loaded), expected)
    assert cls.from_pretrained(NAME, subfolder="scheduler").config.sigma_max == 80.0


# In a process of its own: where the package has not been asked for its samplers yet.
FRESH = """
import sys, torch
from diffusers_hdit import HDiTPipeline
assert "diffusers_hdit.schedulers.scheduling_edm" not in sys.modules
pipe = HDiTPipeline.from_pretrained(sys.argv[1])
assert type(pipe.scheduler).__module__ == "diffusers_hdit.schedulers.scheduling_edm"
"""


def test_our_sampler_is_found_where_it_was_not_imported(hub, make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.scheduler = DPMSolverPP3MSDEScheduler.from_config(pipe.scheduler.config)
    pipe.push_to_hub(NAME)
    run(FRESH, environment(hub, tmp_path, **SOURCE), NAME)


OTHER_PIPELINES_WITHOUT_PACKAGE = (
    WITHOUT_PACKAGE.split("import torch")[0]
    + """
import numpy as np
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
image = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
arguments = (image, image[..., :1].round()) if "Inpaint" in type(pipe).__name__ else (image,)
drawn = pipe(*arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
torch.save(drawn, sys.argv[2])
"""
)


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(HDiTImg2ImgPipeline, marks=pytest.mark.slow),
        pytest.param(HDiTInpaintPipeline, marks=pytest.mark.slow),
        HDiTUpscalePipeline,
    ],
)
def test_the_other_pipelines(hub, make_model, make_pipeline, tmp_path, cls):
    import numpy as np

    channels = 4 if cls is HDiTUpscalePipeline else 0
    pipe = cls(make_model(**TINY, conditioning_channels=channels), make_pipeline().scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.push_to_hub(NAME)
    file = f"{cls.__module__.rpartition('.')[2]}.py"
    assert set(hub.repos[NAME].files) == FILES - {"pipeline_hdit.py"} | {file}
    run(OTHER_PIPELINES_WITHOUT_PACKAGE, environment(hub, tmp_path), NAME, tmp_path / "image.pt")
    image = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    arguments = (image, image[..., :1].round()) if cls is HDiTInpaintPipeline else (image,)
    loaded = cls.from_pretrained(NAME)
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = loaded(*arguments, num_inference_steps=2, generator=generator, output_type="latent").images
    assert relative_error(torch.load(tmp_path / "image.pt"), drawn) < 1e-4
    card = hub.repos[NAME].files["README.md"].decode()
    assert f"pipe = {cls.__name__}.from_pretrained" in card and "image=" in card
    assert "pipeline_tag: image-to-image" in card
    assert ("| conditioning image | 4 channels |" in card) == (cls is HDiTUpscalePipeline)


def test_code_of_the_repository_beside_the_package(hub, pushed, tmp_path, monkeypatch):
    """Two imports of the network in one process, each with its own operator."""
    expected = draw(pushed)
    for _ in range(2):
        pipe = DiffusionPipeline.from_pretrained(NAME, trust_remote_code=True)
        assert type(pipe.transformer) is not HDiTModel and torch.equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(HDiTPipeline.from_pretrained(tmp_path / "saved")), expected)
    carried = sys.modules[type(pipe.transformer).__module__]
    theirs, ours = carried._opaque_flex, sys.modules["diffusers_hdit.ops.neighborhood_backends"]._opaque_flex
    assert theirs._qualname != ours._qualname
    if not carried.unavailable_reason("flex", device="cpu", dtype=torch.float32, head_dim=16, training=False):
        query = torch.randn(1, 8, 8, 1, 16)
        assert torch.equal(theirs(query, query, query, 3, 3, 0.25), ours(query, query, query, 3, 3, 0.25))
    # The package's methods are there for the repository's classes too.
    assert type(type(pipe.transformer).from_preset("tiny")) is type(pipe.transformer)


def test_save_pretrained_pushes_too(hub, make_pipeline, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make_pipeline().save_pretrained(tmp_path, push_to_hub=True, repo_id=NAME, private=True)
    assert set(hub.repos[NAME].files) == FILES and hub.repos[NAME].private


def test_logs_go_along_if_asked(hub, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    for name in ("logs/run/events", "checkpoint-3/optimizer.bin"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    hub_module.main([str(tmp_path), NAME, "--also", "logs/**/*"])
    assert set(hub.repos[NAME].files) == FILES | {"logs/run/events"}
    with pytest.raises(SystemExit, match="matches 'notes"):
        hub_module.main([str(tmp_path), NAME, "--also", "notes*"])


def test_somebodys_subclass_keeps_its_name(make_pipeline, tmp_path):
    class OurPipeline(HDiTPipeline):
        pass

    pipe = OurPipeline(**make_pipeline().components)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "OurPipeline"
    assert not list(tmp_path.glob("*.py")) and (tmp_path / "transformer" / "modeling_hdit.py").is_file()
    for cls in (OurPipeline, HDiTPipeline):
        assert torch.equal(draw_first(cls.from_pretrained(tmp_path)), draw_first(pipe))


def test_a_model_by_itself(make_model, tmp_path):
    model = make_model(**TINY)
    model.save_pretrained(tmp_path)
    assert torch.equal(HDiTModel.from_pretrained(tmp_path).patch_in.proj.weight, model.patch_in.proj.weight)
    found = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert torch.equal(found.patch_in.proj.weight, model.patch_in.proj.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Large files, and wires that break


LARGE = {"mapping_ff_width": 15000}  # 12 MB


def test_above_the_lfs_threshold(hub, make_pipeline):
    pipe = make_pipeline(**LARGE)
    pipe.push_to_hub(NAME)
    assert len(hub.lfs) == hub.count("PUT", "/lfs/") == hub.count("POST", "/verify") == 1
    assert len(hub.repos[NAME].files[WEIGHTS]) > 10 * 2**20
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pipe))
    pipe.push_to_hub(NAME)
    assert hub.count("PUT", "/lfs/") == 1 and len(hub.repos[NAME].commits) == 2, "nothing new: nothing sent"


@pytest.mark.parametrize("how", [500, "drop", "drop-after"])
@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_an_interrupted_push_is_one_commit(hub, make_pipeline, how, where):
    make_pipeline().push_to_hub(NAME)
    before = dict(hub.repos[NAME].files)
    seen = []
    pipe = make_pipeline()
    pipe.transformer.patch_in.proj.weight.data.mul_(2)
    hub.fail("POST", where, how, times=2)
    original, hub.failure = hub.failure, lambda *args: (seen.append(dict(hub.repos[NAME].files)), original(*args))[1]
    pipe.push_to_hub(NAME)
    assert len(hub.repos[NAME].commits) == 3 and set(hub.repos[NAME].files) == FILES
    assert all(files in (before, hub.repos[NAME].files) for files in seen), "half a push was visible"
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pipe))


@pytest.mark.parametrize("how", [500, "drop"])
def test_an_interrupted_upload_of_a_large_file(hub, make_pipeline, how):
    hub.fail("PUT", "/lfs/", how)
    make_pipeline(**LARGE).push_to_hub(NAME)
    assert hub.count("PUT", "/lfs/") == 2 and len(hub.repos[NAME].commits) == 2


def test_a_push_that_failed_goes_on_where_it_was(hub, make_pipeline):
    pipe = make_pipeline(**LARGE)
    hub.fail("POST", "/commit/", 503, times=4)
    with pytest.raises(HfHubHTTPError, match="503"):
        pipe.push_to_hub(NAME)
    assert set(hub.repos[NAME].files) == {".gitattributes"}, "nothing half-visible"
    pipe.push_to_hub(NAME)
    assert hub.count("PUT", "/lfs/") == 1 and len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize("status", [409, 412, 429])
def test_a_busy_hub_is_asked_again(hub, make_pipeline, status):
    hub.fail("POST", "/commit/", status)
    make_pipeline().push_to_hub(NAME)
    assert hub.count("POST", "/commit/") == 2 and len(hub.repos[NAME].commits) == 2


def test_what_does_not_pass_is_not_asked_again(hub, make_pipeline):
    with pytest.raises(HfHubHTTPError, match="401"):
        make_pipeline().push_to_hub(NAME, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="403"):
        make_pipeline().push_to_hub("somebody/else")
    assert hub.count("POST", "/api/repos/create") == 2 and not hub.repos


def test_shards_that_are_replaced_go(hub, make_pipeline):
    pipe = make_pipeline()
    pipe.push_to_hub(NAME, max_shard_size="60KB")
    shards = {path for path in hub.repos[NAME].files if "-of-" in path}
    assert len(shards) > 1 and f"{WEIGHTS}.index.json" in hub.repos[NAME].files
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pipe))
    pipe.push_to_hub(NAME)
    assert set(hub.repos[NAME].files) == FILES and len(hub.repos[NAME].commits) == 3
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pipe))


# ----------------------------------------------------------------------------------------------------------------------
# Who may


def test_private(hub, make_pipeline, monkeypatch):
    pipe = make_pipeline()
    pipe.push_to_hub(NAME, private=True)
    assert hub.repos[NAME].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="make sure to pass a\ntoken|token having permission"):
        HDiTModel.from_pretrained(NAME, subfolder="transformer")
    with pytest.raises(OSError, match="metadata from the Hub") as error:
        HDiTPipeline.from_pretrained(NAME)
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)
    assert "make sure you are authenticated" in str(error.value.__cause__)
    with pytest.raises(OSError):
        HDiTPipeline.from_pretrained(NAME, token="hf_other")
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME, token="hf_user")), draw(pipe))


def test_private_was_wanted_but_the_repository_is_public(hub, pushed):
    with pytest.raises(ValueError, match="exists and is public.*Nothing was uploaded"):
        pushed.push_to_hub(NAME, private=True, license="mit")
    assert len(hub.repos[NAME].commits) == 2


def test_a_name_without_a_user(hub, make_pipeline):
    make_pipeline().push_to_hub("faces")
    assert f'from_pretrained("{NAME}")' in hub.repos[NAME].files["README.md"].decode()


# ----------------------------------------------------------------------------------------------------------------------
# Training


def write_config(folder, **overrides):
    config = {
        "dataset_name": "fluent-faces", "label_column": "label", "train_batch_size": 8, "max_train_steps": 4,
        "validation_steps": 2, "num_validation_images": 2, "mixed_precision": "no", "noise_density": "lognormal",
        "hub_model_id": NAME, "model": TINY, **overrides,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


TRAIN = """
import runpy, sys
from diffusers_hdit.hub import push
push.WAITS = (0.05, 0.05)
sys.argv[0] = script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
"""


def train(env, folder, *arguments, **overrides):
    config = write_config(folder, **overrides)
    script = REPOSITORY / "examples" / "train_hdit.py"
    return run(TRAIN, env, script, "--config", config, "--output_dir", folder / "run", "--push_to_hub", *arguments)


def test_training_pushes_on_the_way_and_at_the_end(hub, tmp_path):
    out, err = train(environment(hub, tmp_path, **SOURCE), tmp_path, "--hub_token", "hf_user", "--hub_private_repo")
    repo = hub.repos[NAME]
    assert repo.private and set(repo.files) == FILES | {"samples.png"}
    assert [commit.message for commit in repo.commits[1:]] == ["Step 2 of 4", "End of training, 4 steps"]
    assert set(repo.commits[1].files) == FILES | {"samples.png"}
    assert f"Pushed it to {hub.endpoint}/{NAME}/commit/{repo.commits[-1].oid}" in out
    samples = (tmp_path / "run" / "samples" / "final.png").read_bytes()
    assert repo.files["samples.png"] == samples != repo.commits[1].files["samples.png"]
    assert not (tmp_path / "run" / ".on-its-way-to-the-hub").exists()
    for path in (tmp_path / "run").rglob("*.json"):
        assert "hf_user" not in path.read_text(), "the token was written to the disk"
    assert torch.equal(
        draw_first(HDiTPipeline.from_pretrained(NAME)), draw_first(HDiTPipeline.from_pretrained(tmp_path / "run"))
    )

    card = repo.files["README.md"].decode()
    training_metadata = json.loads((tmp_path / "run" / "training_facts.json").read_text())
    for row in (
        "| dataset | fluent-faces |", "| images in it | 124 |", "| steps | 4 |", "| images seen | 32 |",
        "| images a step | 8 |", "| noise density | lognormal |", "| loss weighting | soft-min-snr |",
        "| precision | float32 |", "| hardware | CPU, 1 threads |", "| labels dropped | 0.1 |",
        f"| training loss | {training_metadata['final_loss']:.4f}, mean of the last 4 steps |",
    ):  # fmt: skip
        assert row in card, row
    assert "2 images, 50 steps, seed 0, not selected." in card and "datasets" not in header(card)
    assert str(tmp_path) not in card and "| steps | 2 |" in repo.commits[1].files["README.md"].decode()


def draw_first(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, generator=generator, output_type="latent").images


@pytest.mark.slow
def test_training_with_a_hub_that_is_down(tmp_path):
    with Hub() as gone:
        endpoint = gone.endpoint
    out, err = train(environment(endpoint, tmp_path, HF_TOKEN="hf_user", **SOURCE), tmp_path)
    assert "Saved the pipeline" in out and "Pushed" not in out
    assert f"Looking for {NAME} failed" in err and f"Pushing to {NAME} failed" in err
    command = f"python -m diffusers_hdit.hub.push {tmp_path / 'run'} {NAME}"
    assert f"Push it later with\n    {command}" in err
    assert HDiTPipeline.from_pretrained(tmp_path / "run").transformer.config.num_classes == 13

    # And later is now.
    with Hub() as hub:
        env = environment(hub, tmp_path, HF_TOKEN="hf_user", **SOURCE)
        done = subprocess.run(
            [sys.executable, *command.split()[1:]], capture_output=True, text=True, env=env, timeout=300
        )
        assert done.returncode == 0 and f"Pushed to {hub.endpoint}/{NAME}/commit/" in done.stdout, done.stderr
        assert set(hub.repos[NAME].files) == FILES | {"samples.png"}
        assert "| images seen | 32 |" in hub.repos[NAME].files["README.md"].decode()


def test_a_slow_hub_does_not_hold_up_training(hub, make_pipeline, tmp_path):
    gate, pipe = threading.Event(), make_pipeline()
    pipe.save_pretrained(tmp_path / "end")
    pusher = BackgroundPush(NAME, private=None, token=None, scratch=tmp_path / "scratch")
    pusher._looking.join()
    original, hub.failure = hub.failure, lambda *args: (gate.wait(20), original(*args))[1]
    started = time.monotonic()
    assert pusher.push(pipe.save_pretrained, "One") is True
    assert pusher.push(pipe.save_pretrained, "Two") is False, "one at a time, and none that waits"
    assert time.monotonic() - started < 10 and not gate.is_set()
    gate.set()
    assert pusher.finish(tmp_path / "end", "The end").oid == hub.repos[NAME].commits[-1].oid
    assert not (tmp_path / "scratch").exists()


def test_the_background_swallows_what_the_hub_does(hub, make_pipeline, tmp_path, caplog):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "end")
    pusher = BackgroundPush(NAME, private=True, token="hf_wrong", scratch=tmp_path / "scratch")
    pusher._looking.join()
    assert f"Looking for {NAME} failed" in caplog.text and "401" in caplog.text, "known at once"
    assert pusher.push(pipe.save_pretrained, "One") is True
    assert pusher.finish(tmp_path / "end", "The end") is None
    assert f"python -m diffusers_hdit.hub.push {tmp_path / 'end'} {NAME} --private" in caplog.text
    assert "hf_wrong" not in caplog.text and not hub.repos


def test_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--dataset_name", "x", "--output_dir", "y", "--hub_model_id", NAME])
    assert "--hub_model_id does nothing without --push_to_hub" in capsys.readouterr().err
    config = write_config(tmp_path, hub_model_id="a/b/c")
    with pytest.raises(ValueError, match="Repo id"):
        run_training(parse_args(["--config", str(config), "--output_dir", str(tmp_path / "run"), "--push_to_hub"]))
    assert not (tmp_path / "run").exists(), "refused before anything is written"


# ----------------------------------------------------------------------------------------------------------------------
# The reference's checkpoints


def test_convert_and_push(hub, tmp_path, capsys):
    checkpoint = REPOSITORY / "tests" / "fixtures" / "golden" / "neighborhood" / "checkpoint.safetensors"
    config = checkpoint.with_name("config.json")
    convert_k_diffusion.main(
        [str(checkpoint), "--config", str(config), "--output_dir", str(tmp_path / "out"), "--push_to_hub", NAME,
         "--private"]
    )  # fmt: skip
    assert f"Pushed to {hub.endpoint}/{NAME}" in capsys.readouterr().out
    assert hub.repos[NAME].private and set(hub.repos[NAME].files) == FILES
    card = hub.repos[NAME].files["README.md"].decode()
    assert "checkpoint of the reference implementation, k-diffusion. How they were trained is not recorded" in card
    ours, theirs = HDiTPipeline.from_pretrained(tmp_path / "out"), HDiTPipeline.from_pretrained(NAME)
    assert torch.equal(ours.transformer.patch_in.proj.weight, theirs.transformer.patch_in.proj.weight)
    with pytest.raises(SystemExit):
        convert_k_diffusion.main([str(checkpoint), "--output_dir", str(tmp_path / "x"), "--private"])


# ----------------------------------------------------------------------------------------------------------------------
# The card


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_snippets_run(hub, pushed, tmp_path):
    card = hub.repos[NAME].files["README.md"].decode()
    with_package, without = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for snippet in (with_package, without):
        namespace = {}
        exec(snippet.replace("num_inference_steps=50", "num_inference_steps=2"), namespace)
        assert namespace["image"].size == (16, 16)
    assert f'HDiTPipeline.from_pretrained("{NAME}")' in with_package and "trust_remote_code=True" in without


def test_the_card_says_what_the_configuration_says(hub, make_pipeline):
    make_pipeline(num_classes=None).push_to_hub(NAME)
    card = hub.repos[NAME].files["README.md"].decode()
    profile = diffusers_hdit.evaluation.profiler.profile_model({**TINY, "num_classes": None})
    assert f"| parameters | {profile.parameters / 1e6:.1f} M |" in card
    assert f"| multiply-accumulates | {profile.macs / 1e9:.3g} G for one image and step |" in card
    assert "| resolution | 16×16, 3 channels |" in card and "| sigma | 0.01 to 80.0, sigma_data 0.5 |" in card
    assert "| 0 | neighborhood 3×3 | 8×8 | 32 | 1 |" in card and "| 1 | global | 4×4 | 32 | 1 |" in card
    assert "arxiv.org/abs/2401.11605" in card and "Unconditional" in card and "not as in the paper" not in card
    assert header(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "hdit", "unconditional-image-generation"],
    }
    # Nothing that nobody measured or said.
    assert "How they were trained is not recorded here" in card and "No metric is recorded" in card
    assert "nobody has stated a licence" in card and "samples.png" not in card


def test_the_card_says_what_is_not_the_papers(hub, make_pipeline):
    parts = {"skip": "concat", "activation": "gelu", "self_conditioning": True}
    for kind, words in (("axial", "axial"), ("sliding_window", "sliding window 3×3")):
        make_pipeline(attention_types=[kind, "global"], **parts).push_to_hub(NAME)
        card = hub.repos[NAME].files["README.md"].decode()
        assert f"| 0 | {words} | 8×8 | 32 | 1 |" in card
        assert "| not as in the paper | skip='concat', activation='gelu', self_conditioning=True |" in card


def test_facts_metrics_and_samples(hub, make_pipeline):
    training_metadata = TrainingMetadata(
        dataset="owls",
        dataset_id="user/owls",
        images_seen=1_000_000,
        runs=[{"hardware": "H1", "seconds": 3600}, {"hardware": "H2", "seconds": 5400}],
        metrics=[{"name": "FID", "value": 12.5, "feature_network": "InceptionV3", "images": 50000}],
        samples={"file": "grid.png", "images": 4, "steps": 20, "seed": 3},
    )
    picture = Image.new("RGB", (8, 8))
    make_pipeline().push_to_hub(NAME, training_metadata=training_metadata, samples=picture, license="cc-by-4.0")
    card = hub.repos[NAME].files["README.md"].decode()
    assert "| FID | 12.5 | InceptionV3 | 50,000 |" in card and "| images seen | 1,000,000 |" in card
    assert "| hardware | H1, then H2 |" in card and "| time | 2.5 hours, validation" in card
    assert "![4 images generated by this model](samples.png)" in card and "4 images, 20 steps, seed 3." in card
    assert "steps |" not in card.split("## Training")[1], "unknown values are left out"
    assert header(card)["license"] == "cc-by-4.0" and header(card)["datasets"] == ["user/owls"]
    assert "class-conditional-image-generation" in header(card)["tags"] and "cat, dog, owl" in card
    assert hub.repos[NAME].files["samples.png"][1:4] == b"PNG"
    with pytest.raises(ValueError, match="lacks feature_network"):
        TrainingMetadata(metrics=[{"name": "FID", "value": 1.0, "images": 10}])
    with pytest.raises(ValueError, match="could not say how they were generated"):
        make_pipeline().push_to_hub(NAME, samples=picture)


def edit(name, change):
    """Somebody writes into the card on the Hub's site."""
    card = Path(huggingface_hub.hf_hub_download(name, "README.md")).read_text()
    HfApi().upload_file(path_or_fileobj=change(card).encode(), path_in_repo="README.md", repo_id=name)


def test_hand_written_text_is_kept(hub, pushed):
    def change(card):
        card = card.replace("library_name: diffusers", "license: mit\nlanguage:\n- en\nlibrary_name: diffusers")
        card = card.replace("pipeline_tag: unconditional", "pipeline_tag: my")
        return card.replace("- hdit", "- hdit\n- owls").replace("# faces\n", "# My faces\n\nAbove.\n") + "\nBelow.\r\n"

    edit(NAME, change)
    training_metadata = TrainingMetadata(images_seen=77, dataset_id="user/owls")
    for _ in range(2):
        pushed.push_to_hub(NAME, training_metadata=training_metadata)
    card = hub.repos[NAME].files["README.md"].decode()
    assert card.index("# My faces\n\nAbove.") < card.index("<!-- diffusers-hdit") < card.index("Below.")
    assert card.count("## Model") == 1 and "| images seen | 77 |" in card and "Weights: mit." in card
    assert header(card)["pipeline_tag"] == "my-image-generation"
    assert header(card)["license"] == "mit" and header(card)["language"] == ["en"]
    assert header(card)["tags"][:3] == ["diffusers", "hdit", "owls"] and header(card)["datasets"] == ["user/owls"]


def test_edits_inside_the_written_part_are_kept_too(hub, pushed):
    edit(NAME, lambda card: card.replace("For research", "My cat likes it. For research"))
    pushed.push_to_hub(NAME, training_metadata=TrainingMetadata(images_seen=77))
    card = hub.repos[NAME].files["README.md"].decode()
    assert card.count("My cat likes it.") == 1
    assert card.index("| images seen | 77 |") < card.index("# As edited before the last push") < card.index("My cat")


def test_a_card_that_is_written_while_a_push_is_on_its_way(hub, pushed):
    mine, original = "Written in the last moment.", hub.failure

    def failure(method, path):
        files = hub.repos[NAME].files
        if "/commit/" in path and mine.encode() not in files["README.md"]:
            hub.repos[NAME].add("main", "by hand", {**files, "README.md": files["README.md"] + mine.encode()})
        return original(method, path)

    hub.failure = failure
    pushed.push_to_hub(NAME, training_metadata=TrainingMetadata(images_seen=77))
    card = hub.repos[NAME].files["README.md"].decode()
    assert mine in card and "| images seen | 77 |" in card and hub.count("POST", "/commit/") == 3


def test_a_card_of_somebody_else(hub, make_pipeline):
    HfApi().create_repo(NAME)
    mine = "No metadata.\n\nJust text with \\1 and --- in it."
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id=NAME)
    make_pipeline().push_to_hub(NAME)
    card = hub.repos[NAME].files["README.md"].decode()
    assert mine in card and card.index(mine) < card.index("## Model")
    HfApi().upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=NAME)
    with pytest.raises(ValueError, match="(?s)is not readable YAML.*Repair it there"):
        make_pipeline().push_to_hub(NAME)


# ----------------------------------------------------------------------------------------------------------------------
# Security


def test_pickles_are_neither_read_nor_written(hub, pushed, make_pipeline, tmp_path):
    for cls, where in ((HDiTPipeline, {}), (HDiTModel, {"subfolder": "transformer"})):
        with pytest.raises(ValueError, match="reads safetensors only.*Leave it out"):
            cls.from_pretrained(NAME, use_safetensors=False, **where)
    with pytest.raises(ValueError, match="would upload pickles"):
        pushed.push_to_hub(NAME, safe_serialization=False)
    pushed.save_pretrained(tmp_path)
    torch.save(pushed.transformer.state_dict(), tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    for cls, where in ((HDiTPipeline, {}), (HDiTModel, {"subfolder": "transformer"})):
        with pytest.raises(OSError, match="safetensors"):
            cls.from_pretrained(tmp_path, **where)


def test_code_in_a_repository_does_not_run_for_package_users(hub, pushed, tmp_path):
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n".encode()
    files = hub.repos[NAME].files
    files.update({path: evil for path in files if path.endswith(".py")})
    assert torch.equal(draw(HDiTPipeline.from_pretrained(NAME)), draw(pushed))
    HDiTModel.from_pretrained(NAME, subfolder="transformer")
    # Nor under another name.
    index = json.loads(files["model_index.json"])
    files["transformer/evil.py"] = evil
    files["model_index.json"] = json.dumps({**index, "transformer": ["evil", "HDiTModel"]}).encode()
    hub.repos[NAME].add("main", "evil", dict(files))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        HDiTPipeline.from_pretrained(NAME)
    assert not (tmp_path / "ran").exists()


def test_paths_stay_inside(hub, pushed, make_pipeline, tmp_path):
    """Of folders that are pushed, of shards, and of what a Hub says it has."""
    secret = tmp_path / "secret" / "id.json"
    secret.parent.mkdir()
    secret.write_text("{}")
    folder = tmp_path / "folder"
    pushed.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for change in (
        {"../secret": ["id", "X"]},
        {"_class_name": ["../secret/id", "X"]},
        {str(secret.parent): ["id", "X"]},
    ):
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match="is not inside of"):
            push_folder(folder, NAME)
    (folder / "model_index.json").write_text(json.dumps(index))
    TrainingMetadata(samples={"file": "../secret/id.json", "images": 1, "steps": 1, "seed": 1}).save(folder)
    with pytest.raises(ValueError, match="is not inside of"):
        push_folder(folder, NAME)
    (folder / model_card.METADATA_FILE).unlink()
    (folder / "transformer" / "link.json").symlink_to(secret)
    with pytest.raises(ValueError, match="is not inside of"):
        push_folder(folder, NAME)
    assert len(hub.repos[NAME].commits) == 2

    shards = {"metadata": {}, "weight_map": {"x": "../../secret/id.safetensors"}}
    (folder / "transformer" / "link.json").unlink()
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match="not allowed"):
        HDiTModel.from_pretrained(folder, subfolder="transformer")

    escaping = {**hub.repos[NAME].files, "transformer/../../../../diffusion_pytorch_model.safetensors": b"x"}
    hub.repos[NAME].add("main", "escaping", escaping)
    with pytest.raises(ValueError, match="cannot contain a '..' path segment"):
        HDiTPipeline.from_pretrained(NAME)
    assert not list(tmp_path.rglob("escaped*"))


def test_folders_that_hold_no_pipeline(hub, make_pipeline, tmp_path):
    with pytest.raises(ValueError, match="holds no pipeline"):
        push_folder(tmp_path, NAME)
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        push_folder(tmp_path, NAME)
    with pytest.raises(ValueError, match="Repo id"):
        push_folder(tmp_path, "a/b/c")
    assert not hub.repos
    with pytest.raises(SystemExit, match="error: .*is not a whole safetensors file"):
        hub_module.main([str(tmp_path), NAME])


def test_no_local_paths_in_what_is_pushed(hub, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    HDiTPipeline.from_pretrained(tmp_path).push_to_hub(NAME)
    for path, content in hub.repos[NAME].files.items():
        assert str(tmp_path).encode() not in content, path


# ----------------------------------------------------------------------------------------------------------------------
# The carried code, and what it leans on in Diffusers


@pytest.mark.parametrize(
    "cls",
    [
        HDiTModel,
        HDiTPipeline,
        HDiTImg2ImgPipeline,
        HDiTInpaintPipeline,
        HDiTUpscalePipeline,
        DPMSolverPP3MSDEScheduler,
        EDMHeunScheduler,
    ],
)
def test_carried_files_are_whole(cls):
    source = remote_code.remote_code_of(cls)
    tree = ast.parse(source)
    assert source.startswith(f"# Code of diffusers-hdit {diffusers_hdit.__version__}")
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, f"{ast.unparse(relative[0])} is not in the file: use package_module, or import it at the top"
    assert not dynamic_names(source), "Diffusers would look for these files in the repository"
    # Of a module that is not written out, there is only what takes its place.
    for node in ast.walk(ast.parse(Path(sys.modules[cls.__module__].__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in remote_code.STUBBED_IMPORTS:
            assert [name.name for name in node.names] == ["HDiTModel"]
    # Modules that stand in one file must not define a name twice.
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert {name for name in defined if defined.count(name) > 1} <= {"_"}


def dynamic_names(source):
    return re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)


def lean(condition, what):
    assert condition, f"a new Diffusers: {what}. See remote_code.py."


def test_guard_configurations_are_read_by_dict_from_json_file(hub, pushed, monkeypatch):
    calls = []
    original = HDiTPipeline._dict_from_json_file.__func__
    reader = classmethod(lambda cls, path: (calls.append(Path(path).name), original(cls, path))[1])
    monkeypatch.setattr(HDiTPipeline, "_dict_from_json_file", reader)
    HDiTPipeline.download(NAME)
    lean("model_index.json" in calls, "`download` no longer reads model_index.json through `_dict_from_json_file`")
    folder = HDiTPipeline.download(NAME)
    calls.clear()
    HDiTPipeline.load_config(folder)
    lean(calls == ["model_index.json"], "`load_config` no longer reads through `_dict_from_json_file`")


def test_guard_modules_are_recorded_with_their_path(make_model):
    record = pipeline_loading_utils._fetch_class_library_tuple(make_model(**TINY))
    lean(record == ("diffusers_hdit.models.modeling_hdit", "HDiTModel"), f"a component is now recorded as {record}")


def test_guard_imported_modules_are_found_by_name():
    library = pipeline_loading_utils._get_library_or_raise("diffusers_hdit.models.modeling_hdit")
    lean(
        library is sys.modules["diffusers_hdit.models.modeling_hdit"],
        "a recorded module is not looked up in sys.modules",
    )
    found, candidates = pipeline_loading_utils.get_class_obj_and_candidates(
        "diffusers_hdit.models.modeling_hdit", "HDiTModel", pipeline_utils.ALL_IMPORTABLE_CLASSES, None, False
    )
    lean(found is HDiTModel, "`get_class_obj_and_candidates` finds another class")
    lean(candidates.get("ModelMixin"), "base classes are no longer looked up in the component's own module")


def test_guard_saving_goes_through_save_config_and_to_json_string(make_pipeline, tmp_path, monkeypatch):
    calls = []
    for name in ("save_config", "to_json_string"):
        original = getattr(remote_code.RemoteCodeMixin, name)
        spy = lambda self, *args, name=name, original=original, **kwargs: (  # noqa: E731
            calls.append((type(self).__name__, name)),
            original(self, *args, **kwargs),
        )[1]
        monkeypatch.setattr(remote_code.RemoteCodeMixin, name, spy)
    make_pipeline().save_pretrained(tmp_path)
    for cls in ("HDiTModel", "HDiTPipeline"):
        for name in ("save_config", "to_json_string"):
            lean((cls, name) in calls, f"{cls}.save_pretrained no longer calls {name}")


def test_guard_the_loader_takes_the_file_that_is_named(tmp_path):
    (tmp_path / "pipeline_x.py").touch()
    path, name = pipeline_loading_utils._resolve_custom_pipeline_and_cls(
        str(tmp_path), {"_class_name": ["pipeline_x", "X"]}, None
    )
    lean(path.endswith("pipeline_x.py") and name == "X", '`_class_name: ["file", "class"]` no longer names the code')
    components, _ = pipeline_loading_utils._get_custom_components_and_folders(
        NAME, {"transformer": ["modeling_hdit", "HDiTModel"]}, ["transformer/modeling_hdit.py"]
    )
    lean(components == {"transformer": "modeling_hdit"}, "a component's code is no longer looked for in its folder")
    lean(HDiTModel._auto_class == "AutoModel", "_auto_class")
