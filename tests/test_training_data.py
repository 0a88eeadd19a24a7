"""The training example on each kind of data that people have, resumed on each."""

import csv
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from running import CONFIG, TRAIN, equal, run, weights, write_config

from diffusers_hdit import HDiTPipeline
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.trainer import load_dataset


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 24 images of two shapes, with temperatures, winds of two numbers, and classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    rows = []
    for i in range(24):
        size = (24, 40) if i % 2 else (40, 24)
        image = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(image).save(folder / f"{i:02d}.png")
        wind = generator.normal(size=2).round(3).tolist()
        rows.append(
            {"file_name": f"{i:02d}.png", "temperature": 10 + i, "wind": json.dumps(wind), "kind": "ab"[i % 2]}
        )
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def train_and_resume(tmp_path, *arguments, **config):
    """A run of six steps, and the same one from its third; both end with equal weights. Returns the folder."""
    base = {"dataset_name": None, "label_column": None, "cache_dir": str(tmp_path / "cache"), **config}
    path = write_config(tmp_path, **base)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(TRAIN, "--config", path, "--output_dir", whole, *arguments)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run(TRAIN, "--config", path, "--output_dir", resumed, *arguments)
    assert equal(weights(whole), weights(resumed))
    return whole


def test_numbers_vectors_and_classes_as_conditions(images, tmp_path):
    folder = train_and_resume(
        tmp_path, train_data_dir=str(images), label_column="kind", condition_columns=["temperature", "wind"]
    )
    pipe = HDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.condition_columns["names"] == ["temperature", "wind[0]", "wind[1]"]
    assert pipe.config.condition_columns["mean"][0] == 21.5 and pipe.transformer.config.mapping_cond_dim == 4
    options = {"num_inference_steps": 2, "output_type": "latent"}

    def draw(class_labels, mapping_cond, **more):
        return pipe(class_labels, mapping_cond=mapping_cond, generator=torch.Generator().manual_seed(0), **options,
                    **more).images  # fmt: skip

    warm = draw("a", {"temperature": 30.0, "wind": [0.5, -1.0]})
    raw = (torch.tensor([[30.0, 0.5, -1.0]]) - torch.tensor(pipe.config.condition_columns["mean"])) / torch.tensor(
        pipe.config.condition_columns["std"]
    )
    torch.testing.assert_close(draw("a", torch.cat((raw, torch.ones(1, 1)), 1)), warm)
    torch.testing.assert_close(draw("a", {"temperature": 30.0, "wind[0]": 0.5, "wind[1]": -1.0}), warm)
    means = dict(zip(pipe.config.condition_columns["names"], pipe.config.condition_columns["mean"], strict=True))
    assert not torch.equal(draw("a", means), draw("a", None)), "the mean is a condition, too"
    assert draw("a", {"temperature": [0.0, 30.0], "wind": [0.5, -1.0]}, guidance_scale=2.0).shape[0] == 2
    with pytest.raises(ValueError, match=r"names \['temperature'\], but this model was trained on the columns"):
        draw("a", {"temperature": 30.0})


def test_buckets(images, tmp_path):
    folder = train_and_resume(tmp_path, "--dataloader_num_workers", 1, train_data_dir=str(images), buckets=True)
    assert "buckets of" in json.loads((folder / "checkpoint-3" / "progress.json").read_text())["settings"]["order"]
    HDiTPipeline.from_pretrained(folder)


def test_super_resolution_in_buckets(images, tmp_path):
    """Pictures on the way are of images of one size."""
    settings = {"train_data_dir": str(images), "label_column": None, "dataset_name": None, "max_train_steps": 2}
    config = write_config(tmp_path, **settings, cache_dir=str(tmp_path / "cache"))
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "run", "--buckets", "--task", "upscale",
        "--upscale_factor", 2)  # fmt: skip
    assert (tmp_path / "run" / "samples" / "final.png").exists()


def test_a_stream(images, tmp_path):
    rows = {"image": [str(images / f"{i:02d}.png") for i in range(24)], "t": [float(i) for i in range(24)]}
    dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "t": Value("float32")}))
    for shard in range(2):
        (tmp_path / "rows").mkdir(exist_ok=True)
        dataset.shard(2, shard).to_parquet(tmp_path / "rows" / f"train-{shard}.parquet")
    (tmp_path / "statistics.json").write_text('{"mean": [11.5], "std": [6.9]}')
    arguments = ["--streaming", "--condition_columns", "t", "--condition_statistics", tmp_path / "statistics.json"]
    folder = train_and_resume(tmp_path, *arguments, "--dataloader_num_workers", 1, dataset_name=str(tmp_path / "rows"))
    assert HDiTPipeline.from_pretrained(folder).config.condition_columns["mean"] == [11.5]
    assert "images" not in json.loads((folder / "training_facts.json").read_text())


def test_arrays_of_twelve_channels_and_sixteen_bits(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    for i in range(10):
        array = generator.integers(0, 65535, (20, 20, 12), dtype=np.uint16)
        np.save(tmp_path / "arrays" / f"{i}.npy", array)
    folder = train_and_resume(
        tmp_path, train_data_dir=str(tmp_path / "arrays"), model={**CONFIG["model"], "in_channels": 12}
    )
    pipe = HDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, 12, 16, 16)


def test_flags_say_which_images_and_classes(tmp_path):
    """They reach `load_images`, and the summary shows the classes with their counts."""
    for path in ("train/pets/cat/0.png", "train/pets/dog/0.png", "train/wild/owl/0.png", "test/pets/cat/1.png"):
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / "images" / path)
    (tmp_path / "images" / "test/pets/cat/1.png").write_bytes(b"no image")
    path = write_config(tmp_path, dataset_name=None, train_data_dir=str(tmp_path / "images"), train_batch_size=1)

    def load(*flags):
        flags = ["--config", path, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", *flags]
        return load_dataset(parse_args(list(map(str, flags))), Accelerator(cpu=True))

    with pytest.warns(UserWarning, match="leaves out those in 'test/"):
        assert load().class_counts == {"cat": 1, "dog": 1, "owl": 1}
    with pytest.warns(UserWarning, match="leaves out those in 'test/"):
        assert load("--class_folder_depth", 1).class_counts == {"pets": 2, "wild": 1}
    with pytest.raises(ValueError, match="1 of 4 images .* cannot be read"):
        load("--split", "all", "--class_folder_depth", -1)
    with pytest.warns(UserWarning, match="1 of 4 images cannot be read"):
        assert len(load("--split", "all", "--class_folder_depth", -1, "--max_unreadable", 1)) == 3
    output = run(TRAIN, "--config", path, "--output_dir", tmp_path / "run", "--dry_run")
    assert "3 images at 16×16, 3 classes: cat (1), dog (1), owl (1)" in output
