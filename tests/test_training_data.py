"""The training example on each kind of data that people have, resumed on each."""

import csv
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from running import CONFIG, TRAIN, equal, run, weights, write_config

from diffusers_hdit import HDiTPipeline


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
