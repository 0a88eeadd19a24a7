"""Numbered images: resumed, split over processes, packed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from diffusers import EDMDPMSolverMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig
from PIL import Image

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.evaluation import generate
from diffusers_hdit.evaluation.generate import generate_images, image_seed


STEPS = {"num_inference_steps": 3}


@pytest.fixture
def pipeline(make_model):
    model = make_model(sample_size=16, widths=(32, 32), depths=(1, 1), num_classes=3)
    scheduler = EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", sigma_max=80.0)
    return HDiTPipeline(model, scheduler)


def read(folder, n):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(n)]).astype(int)


def test_an_image_depends_on_its_number_only(pipeline, tmp_path):
    """Not on batches, interruptions, or how many are wanted. Batched arithmetic may round one grey level otherwise."""
    generate_images(pipeline, tmp_path / "a", 7, class_labels=[0, 1, 2], batch_size=7, **STEPS)
    generate_images(pipeline, tmp_path / "b", 3, class_labels=[0, 1, 2], batch_size=2, **STEPS)
    (tmp_path / "b" / "000001.png").unlink()
    generate_images(pipeline, tmp_path / "b", 7, class_labels=[0, 1, 2], batch_size="auto", **STEPS)
    a, b = read(tmp_path / "a", 7), read(tmp_path / "b", 7)
    assert np.abs(a - b).max() <= 1
    assert len({image.tobytes() for image in a}) == 7, "no two are the same"
    alone = pipeline(1, generator=torch.Generator().manual_seed(4), **STEPS).images[0]
    assert np.abs(np.asarray(alone).astype(int) - a[4]).max() <= 1, "image 4 has class 4 mod 3 and seed 4"


def test_seeds():
    """The noise differs: the generator uses 32 bits of its seed."""
    noise = {
        torch.randn(4, generator=torch.Generator().manual_seed(image_seed(seed, index))).numpy().tobytes()
        for seed in (0, 1, 2, 2**32 - 1)
        for index in range(50)
    }
    assert len(noise) == 200
    assert [image_seed(0, index) for index in range(3)] == [0, 1, 2]


def test_a_failed_call_binds_nobody(pipeline, tmp_path):
    """Settings are kept for the images; where there are none, the corrected command goes."""
    with pytest.raises(ValueError, match="num_inference_steps must be a positive integer"):
        generate_images(pipeline, tmp_path / "a", 1, num_inference_steps=0)
    assert (tmp_path / "a" / "sampling.json").is_file()
    generate_images(pipeline, tmp_path / "a", 1, **STEPS)
    settings = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert settings["arguments"] == STEPS and "_diffusers_version" not in settings["scheduler"]


def test_labels_are_checked_first(pipeline, tmp_path):
    pipeline.register_to_config(id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="class label 99 is out of range"):
        generate_images(pipeline, tmp_path / "a", 3, class_labels=[0, 1, 99], batch_size=1, **STEPS)
    with pytest.raises(ValueError, match="mapping_cond must be made of numbers, .* got ndarray"):
        generate_images(pipeline, tmp_path / "a", 3, mapping_cond=np.zeros((1, 2)), **STEPS)
    assert not (tmp_path / "a").exists()
    for name, labels in (("names", ["c", "a"]), ("array", np.array([2, 0]))):
        generate_images(pipeline, tmp_path / f"{name}.npz", 3, class_labels=labels, **STEPS)
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file["arr_1"].tolist() == [2, 0, 2]


def test_leftovers_of_killed_processes(pipeline, tmp_path, monkeypatch):
    output, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    # While writing settings, and while writing image 3 of 5.
    parts.mkdir()
    (parts / ".partial-1-sampling.json").write_text("{")
    (parts / ".partial-1-000003.png").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        generate_images(pipeline, output, 3, **STEPS)
    (parts / ".partial-1-000003.png").unlink()
    generate_images(pipeline, output, 5, **STEPS)
    first = output.read_bytes()
    output.unlink()
    monkeypatch.setattr(generate, "remove_packed", lambda *_: None)
    generate_images(pipeline, output, 3, **STEPS)
    monkeypatch.undo()
    # Between the npz and the end: the same command finds its work done.
    (parts / ".partial-1-000003.png").touch()
    assert (parts / "000000.png").exists()
    written = output.read_bytes()
    generate_images(pipeline, output, 3, **STEPS)
    assert output.read_bytes() == written != first and not parts.exists()
    generate_images(pipeline, output, 3, **STEPS)
    for other in ({"num_images": 4}, {"num_images": 3, "seed": 1}):
        with pytest.raises(ValueError, match="was written by another call; give another name. Nothing was changed"):
            generate_images(pipeline, output, **other, **STEPS)
    output.unlink()
    generate_images(pipeline, parts, 2, **STEPS)
    (parts / ".partial-1-000003.png").touch()
    generate_images(pipeline, output, 2, **STEPS)
    assert not parts.exists(), "leftovers do not stop the end"


def test_settings_that_can_not_be_read(pipeline, tmp_path):
    generate_images(pipeline, tmp_path / "a", 1, **STEPS)
    (tmp_path / "a" / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"sampling.json' can't be read .* Nothing was changed"):
        generate_images(pipeline, tmp_path / "a", 1, **STEPS)


def test_the_model_is_weights_and_configuration(pipeline, make_model, tmp_path):
    digest = generate.model_digest(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert generate.model_digest(HDiTPipeline.from_pretrained(tmp_path)) == digest
    pipeline.transformer.register_to_config(sample_size=[24, 24])
    assert generate.model_digest(pipeline) != digest


def test_a_cache_is_refused(make_model, tmp_path):
    model = make_model(sample_size=16, widths=(32, 32), depths=(1, 2))
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="depends on the others of its batch; call pipe.transformer.disable_cache"):
        generate_images(HDiTPipeline(model, EDMDPMSolverMultistepScheduler()), tmp_path / "a", 1, **STEPS)


def test_the_progress_bar_stays_the_callers(pipeline, tmp_path):
    pipeline.set_progress_bar_config(desc="mine")
    generate_images(pipeline, tmp_path / "a", 1, **STEPS)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_existing_images_are_not_generated_again(pipeline, tmp_path):
    generate_images(pipeline, tmp_path / "a", 4, batch_size=2, **STEPS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.png")}
    generate_images(pipeline, tmp_path / "a", 4, batch_size=2, **STEPS)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.png")} and len(times) == 4


def test_interrupted(pipeline, tmp_path, monkeypatch):
    original, written = generate.write_image, []

    def failing(image, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        original(image, path)

    monkeypatch.setattr(generate, "write_image", failing)
    with pytest.raises(KeyboardInterrupt):
        generate_images(pipeline, tmp_path / "x.npz", 5, class_labels=[2, 0], batch_size=2, **STEPS)
    assert not (tmp_path / "x.npz").exists()
    monkeypatch.setattr(generate, "write_image", original)
    generate_images(pipeline, tmp_path / "x.npz", 5, class_labels=[2, 0], batch_size=2, **STEPS)
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [2, 0, 2, 0, 2]
        generate_images(pipeline, tmp_path / "y", 5, class_labels=[2, 0], batch_size=5, **STEPS)
        assert np.abs(file["arr_0"].astype(int) - read(tmp_path / "y", 5)).max() <= 1
    assert not (tmp_path / "x.npz.parts").exists()
    with pytest.raises(ValueError, match="was written by another call; give another name. Nothing was changed"):
        generate_images(pipeline, tmp_path / "x.npz", 5, **STEPS)


def test_grey_without_labels(make_model, tmp_path):
    model = make_model(sample_size=16, widths=(32, 32), depths=(1, 1), in_channels=1)
    generate_images(HDiTPipeline(model, EDMDPMSolverMultistepScheduler()), tmp_path / "x.npz", 2, **STEPS)
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (2, 16, 16, 1) and file.files == ["arr_0"]


def test_auto_halves_the_batch_while_memory_does_not_suffice(pipeline, tmp_path, monkeypatch):
    sizes, original = [], HDiTPipeline.__call__

    def short_of_memory(self, *args, generator, **kwargs):
        sizes.append(len(generator))
        if len(generator) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(self, *args, generator=generator, **kwargs)

    monkeypatch.setattr(HDiTPipeline, "__call__", short_of_memory)
    generate_images(pipeline, tmp_path / "a", 20, **STEPS)
    assert sizes == [16, 8, 4, 4, 4, 4, 4] and read(tmp_path / "a", 20).shape == (20, 16, 16, 3)


def test_errors(pipeline, make_model, tmp_path):
    generate_images(pipeline, tmp_path / "a", 1, **STEPS)
    with pytest.raises(ValueError, match="holds images with other seed, arguments"):
        generate_images(pipeline, tmp_path / "a", 2, seed=1, num_inference_steps=4)
    other = HDiTPipeline(make_model(sample_size=16, widths=(32, 32), depths=(1, 2)), pipeline.scheduler)
    with pytest.raises(ValueError, match="holds images with other model"):
        generate_images(other, tmp_path / "a", 2, **STEPS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not an empty folder, nor one of this script's"):
        generate_images(pipeline, tmp_path / "b", 2, **STEPS)
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        generate_images(pipeline, tmp_path / "c", 0)
    with pytest.raises(ValueError, match="batch_size must be a positive integer or 'auto', got 'big'"):
        generate_images(pipeline, tmp_path / "c", 1, batch_size="big")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_two_processes_and_the_script(pipeline, tmp_path):
    """Two processes generate what one does."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    script = str(REPOSITORY / "examples" / "sample_hdit.py")
    arguments = ["--pipeline", tmp_path / "pipeline", "--num_images", 5, "--num_inference_steps", 3, "--batch_size", 2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    for command, output in (([sys.executable], "one"), (launch, "two"), (launch, "two.npz")):
        done = subprocess.run(
            [*map(str, [*command, script, *arguments, "--output", tmp_path / output])],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Wrote 5 images" in done.stdout and "Images" in done.stderr
    one, two = read(tmp_path / "one", 5), read(tmp_path / "two", 5)
    assert np.abs(one - two).max() <= 1
    with np.load(tmp_path / "two.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - one).max() <= 1 and file["arr_1"].tolist() == [0, 1, 2, 0, 1]
    assert json.loads((tmp_path / "two" / "sampling.json").read_text())["class_labels"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", "4", "--cell_size", "3"], "--cell_size is for a grid"),
        (["--num_images", "4", "--batch_size", "0"], "argument --batch_size: invalid"),
        (["--batch_size", "auto"], "--batch_size auto is for --num_images"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message):
    script = str(REPOSITORY / "examples" / "sample_hdit.py")
    done = subprocess.run(
        [sys.executable, script, "--pipeline", "x", "--output", "y", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr
