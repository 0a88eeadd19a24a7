"""Evaluating on several processes, on conditions, with grids, and during training."""

import copy
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import SMALL, randomize
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image
from running import EXAMPLES, SHEET, TRAIN, equal, launch, run, start, weights, write_config
from torch import nn

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.data import load_images
from diffusers_hdit.evaluation import evaluate, evaluator, image_grid, metrics


EVALUATE = EXAMPLES / "evaluate_hdit.py"


class Pixels(nn.Module):
    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(image, 4).flatten(1)


def make_pixels():
    return Pixels()


@pytest.fixture
def with_tests_on_path(monkeypatch):
    """Other processes find this file's network."""
    there = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(there))


def make_pipeline(folder, id2label=None, condition_columns=None, **config):
    config = {**SMALL, "sample_size": 16, "widths": (32, 32), "depths": (1, 1), **config}
    HDiTPipeline(
        randomize(HDiTModel(**config)).eval(),
        EDMDPMSolverMultistepScheduler(sigma_max=20.0),
        id2label=id2label,
        condition_columns=condition_columns,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def faces():
    return load_images(train_data_dir=SHEET, label_column="label", resolution=16)


@pytest.fixture
def pipeline(tmp_path, faces):
    return make_pipeline(tmp_path / "pipeline", faces.id2label, num_classes=13)


NETWORK = ["--feature_network", "test_evaluation:make_pixels"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(pipeline, tmp_path, with_tests_on_path):
    """Eleven images in batches of four: the last one is smaller, and one process has a batch less."""
    arguments = [
        "--pipeline", pipeline, "--train_data_dir", SHEET, "--label_column", "label", *NETWORK, "--num_images", 11,
        "--batch_size", 4, "--num_inference_steps", 2,
    ]  # fmt: skip
    files = [[tmp_path / f"{name}.{kind}" for kind in ("json", "npz", "statistics.npz")] for name in ("one", "two")]
    for (results, images, statistics), go, folder in zip(files, (run, None), ("a", "b"), strict=True):
        more = ["--output", results, "--save_npz", images, "--save_statistics", statistics]
        more += ["--cache_dir", tmp_path / folder]  # nothing is taken from the other's cache
        if go is None:
            output = launch("ddp", *arguments, *more, script=EVALUATE)
            assert output.count("11 images against 124 real ones") == 1
        else:
            go(EVALUATE, *arguments, *more)
    assert files[0][0].read_text() == files[1][0].read_text()
    for i, name in ((1, "arr_0"), (2, "sigma"), (2, "mu")):
        one, two = (np.load(paths[i])[name] for paths in files)
        assert np.array_equal(one, two), name
    # The cache that two made is found, and what it says compared with instead of the images.
    more = ["--cache_dir", tmp_path / "b", "--reference_statistics", files[1][2], "--output", tmp_path / "again.json"]
    run(EVALUATE, *arguments, *more)
    (result,), whole = json.loads((tmp_path / "again.json").read_text()), json.loads(files[0][0].read_text())
    assert result["name"] == "frechet_distance" and result["value"] == pytest.approx(whole[1]["value"], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# What images are generated from


@pytest.fixture(scope="module")
def measured_folder(tmp_path_factory):
    """Images with a number and a vector."""
    folder = tmp_path_factory.mktemp("measured")
    generator = np.random.default_rng(0)
    lines = ["file_name,kind,warmth,wind"]
    for i in range(12):
        Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        lines.append(f'{i:02d}.png,{"ab"[i % 2]},{i},"[{i % 3}, {-i}]"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


STATISTICS = {"names": ["warmth", "wind[0]", "wind[1]"], "mean": [1.0, 0.0, 2.0], "std": [2.0, 1.0, 4.0]}


def test_conditions_are_the_real_images_in_the_models_units(measured_folder, tmp_path):
    folder = make_pipeline(tmp_path / "pipeline", condition_columns=STATISTICS, mapping_cond_dim=4)
    pipe = HDiTPipeline.from_pretrained(folder)
    arguments = ["--pipeline", str(folder), "--train_data_dir", str(measured_folder), *NETWORK, "--num_images", "6"]
    columns = ["--condition_columns", "warmth", "wind"]
    args = evaluate.parse_args([*arguments, *columns])
    real = evaluator.open_real_images(args, pipe)
    found = evaluator.conditions_for(pipe.transformer.config, real, 6, pipe.id2label, pipe.config.condition_columns)
    numbers = torch.tensor([0.0, 2, 4, 6, 8, 10])
    expected = pipe.encode_columns({"warmth": numbers, "wind": torch.stack([numbers % 3, -numbers], dim=1)})
    torch.testing.assert_close(found["mapping_cond"], expected)
    output = tmp_path / "results.json"
    evaluate.main(
        [*arguments, *columns, "--num_inference_steps", "2", "--cache_dir", str(tmp_path), "--output", str(output)]
    )
    assert json.loads(output.read_text())[0]["conditions"] == ["mapping_cond"]
    with pytest.raises(SystemExit, match="error: .* trained on the conditions .*'warmth', 'wind.*none were given"):
        evaluate.main(arguments)
    with pytest.raises(SystemExit, match="condition_statistics must have an entry"):
        evaluate.main([*arguments, "--condition_columns", "warmth"])


def test_what_can_not_be_compared(measured_folder, faces):
    def model(**config):
        return HDiTModel(**{**SMALL, **config}).config

    plain = load_images(train_data_dir=measured_folder, resolution=16)
    warm = load_images(train_data_dir=measured_folder, resolution=16, condition_columns=["warmth"])
    for config, real, id2label, columns, message in (
        (model(), faces, {}, None, "trained without classes: leave it out"),
        (
            model(num_classes=13),
            faces,
            {0: "other"},
            None,
            "are not those of the model.*: give the images .* or leave --label_column out",
        ),
        (model(), warm, {}, None, "trained without conditions: leave them out"),
        (
            model(mapping_cond_dim=2),
            plain,
            {},
            None,
            "of a caller, without names.* Save the pipeline with condition_columns",
        ),
        (model(mapping_cond_dim=2), warm, {}, {"names": ["cold"]}, r"real images have \['warmth'\]"),
        (model(mapping_cond_dim=2, num_classes=2), warm, {}, warm.condition_columns, "give --label_column too"),
        (model(mapping_cond_dim=2), None, {}, {"names": ["cold"]}, "none were given.*columns in --condition_columns"),
        (model(conditioning_channels=4), plain, {}, None, "upscales"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.conditions_for(config, real, 4, id2label, columns)
    with pytest.raises(ValueError, match="8-bit"):
        evaluator.check_real_images(changed(plain, in_channels=2))
    with pytest.raises(ValueError, match="buckets"):
        evaluator.check_real_images(changed(plain, sizes=[(16, 16), (8, 32)]))
    with pytest.raises(ValueError, match="at least 4"):
        evaluator.check_real_images(changed(plain, readable=plain.readable[:2]))


def changed(real, **changes):
    real = copy.copy(real)
    for name, value in changes.items():
        setattr(real, name, value)
    return real


def test_classes_in_turn_or_in_proportion(faces):
    config = HDiTModel(**{**SMALL, "num_classes": 13}).config
    unlabelled = load_images(train_data_dir=SHEET, resolution=16)
    in_turn = evaluator.conditions_for(config, unlabelled, 40, {}, None)["class_labels"]
    assert in_turn.tolist() == [i % 13 for i in range(40)]
    labels = evaluator.conditions_for(config, faces, 40, faces.id2label, None)["class_labels"]
    counts, real = np.bincount(labels, minlength=13) / 40, np.bincount(faces.labels, minlength=13) / 124
    assert abs(counts - real).max() < 0.06
    nothing = evaluator.conditions_for(config, None, 40, faces.id2label, None)
    assert nothing["class_labels"].tolist() == in_turn.tolist()


class Elsewhere:
    """Images that say where they are moved to: there is no second device here."""

    def __init__(self):
        self.seen = []

    def to(self, device):
        self.seen.append(device)
        return torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


def test_generated_images_are_moved_to_the_networks_device():
    images = Elsewhere()
    generator = SimpleNamespace(generate=lambda indices: images, num_images=2, batch_size=2)
    features, kept = evaluator.generated_features(
        generator, metrics.FeatureExtractor(Pixels(), "pixels"), keep_images=True
    )
    assert images.seen == [PartialState().device] and features.shape == (2, 48) and kept.shape == (2, 3, 8, 8)


# ----------------------------------------------------------------------------------------------------------------------
# The grid of neighbors


def test_neighbors_grid(faces):
    real = evaluator.real_images(faces, range(0, 40))
    generated = torch.cat([real[3:4], 255 - real[5:7]])
    extractor = metrics.FeatureExtractor(Pixels(), "pixels")
    index, distances = metrics.nearest_neighbors(extractor(generated), extractor(real), 3)
    assert index[0, 0] == 3 and image_grid.most_like_copies(distances, 2)[0] == 0
    picture = image_grid.neighbors_grid(["image 0", "image 1", "image 2"], generated, real[index], distances)
    pixels = np.asarray(picture).astype(int)
    red = (pixels == [255, 0, 0]).all(2)
    first_row, others = red[: pixels.shape[0] // 3], red[pixels.shape[0] // 2 :]
    assert first_row.any() and not others.any(), "the copy is framed, the others are not"
    # The copy and what it is a copy of stand side by side.
    top, left = (int(places.min()) for places in np.nonzero(red))
    one, other = (
        pixels[top + 6 : top + 94, left + shift + 6 : left + shift + 92] for shift in (0, 96 + image_grid.MARGIN)
    )
    assert np.array_equal(one, other) and one.std() > 0
    assert image_grid.to_pil(torch.zeros(4, 2, 2, dtype=torch.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert image_grid.to_pil(torch.full((1, 2, 2), 7, dtype=torch.uint8)).getpixel((0, 0)) == (7, 7, 7)


def test_the_script_writes_the_grid_of_neighbors(pipeline, tmp_path):
    path = tmp_path / "neighbors.png"
    evaluate.main([
        "--pipeline", str(pipeline), "--train_data_dir", str(SHEET), *NETWORK, "--num_images", "6", "--num_inference_steps",
        "2", "--cache_dir", str(tmp_path), "--neighbors_picture", str(path), "--neighbors", "3", "--neighbors_rows", "2",
    ])  # fmt: skip
    with Image.open(path) as picture:
        assert picture.height == 24 + 2 * 118 and 4 * 100 < picture.width < 4 * 100 + 96


# ----------------------------------------------------------------------------------------------------------------------
# In training


IN_TRAINING = {
    "metrics_every": 4, "metrics_images": 6, "metrics_steps": 2, "feature_network": "test_evaluation:make_pixels",
    "checkpointing_steps": 3, "max_train_steps": 9, "validation_steps": 100,
}  # fmt: skip


def measured(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["images_seen"], line["metrics"]) for line in lines if "metrics" in line]


@pytest.mark.slow
def test_metrics_in_training_disturb_nothing_and_are_resumed(tmp_path, with_tests_on_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = write_config(tmp_path, **IN_TRAINING)
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "run")
    without = write_config(tmp_path / "without", max_train_steps=9, validation_steps=100)
    run(TRAIN, "--config", without, "--output_dir", tmp_path / "plain")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    whole = measured(tmp_path / "run")
    assert [(step, images) for step, images, _ in whole] == [(4, 32), (8, 64), (9, 72)]
    assert whole[0][2][0]["value"] != whole[1][2][0]["value"]
    first = whole[0][2][0]
    assert first["name"] == "kernel_distance" and first["images"] == 6 and first["steps"] == 2
    assert first["sampler"]["class"] == "EDMDPMSolverMultistepScheduler" and first["conditions"] == ["class_labels"]
    # From step 3, after which the others are measured anew; and from the end, where only the last one is.
    for step in (3, 9):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        for name in ("metrics.jsonl", "training_args.json"):
            shutil.copy(tmp_path / "run" / name, folder)
        if step == 9:  # it died after the checkpoint, before the metrics
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        run(TRAIN, "--config", config, "--output_dir", folder)
        assert measured(folder) == whole, step
        assert equal(weights(folder), weights(tmp_path / "run"))
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "run")
    assert measured(tmp_path / "run") == whole, "a finished run measures nothing twice"
    # What is saved at the end is what was measured last.
    output = tmp_path / "results.json"
    run(
        EVALUATE, "--pipeline", tmp_path / "run", "--train_data_dir", SHEET, "--label_column", "label", *NETWORK,
        "--num_images", 6, "--num_inference_steps", 2, "--batch_size", 8, "--output", output,
    )  # fmt: skip
    for ours, theirs in zip(whole[-1][2], json.loads(output.read_text()), strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6) and ours["sampler"] == theirs["sampler"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_metrics_in_training_on_two_processes(kind, tmp_path, with_tests_on_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = {**SMALL, "sample_size": 16, "widths": [32, 32], "depths": [1, 1]}
    config = write_config(tmp_path, **{**IN_TRAINING, "max_train_steps": 4, "metrics_images": 5}, model=model)
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "one")
    launch(kind, "--config", config, "--output_dir", tmp_path / "two", "--train_batch_size", 4)
    (one,), (two,) = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert one[:2] == two[:2]
    for ours, theirs in zip(one[2], two[2], strict=True):
        assert ours["name"] == theirs["name"] and ours["value"] == pytest.approx(theirs["value"], abs=1e-3)


def test_what_training_refuses_beforehand(tmp_path, faces, with_tests_on_path):
    config = write_config(tmp_path, **{**IN_TRAINING, "metrics": ["fid"]})
    process = start(TRAIN, "--config", config, "--output_dir", tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: fid is a metric of the feature network inception-v3" in output and "Traceback" not in output
    args = SimpleNamespace(metrics_every=5, metrics=None, feature_network="clip", feature_weights=str(tmp_path / "no"))
    with pytest.raises((OSError, ImportError), match="--feature_weights DIR|pip install"):
        evaluator.InTrainingEvaluator.from_args(args, faces)
    args.metrics_every = None
    assert evaluator.InTrainingEvaluator.from_args(args, faces) is None


def test_flags_of_training(capsys):
    from diffusers_hdit.training.config import parse_args

    base = ["--output_dir", "x", "--dataset_name", "fluent-faces"]
    for flags, message in (
        (["--metrics_images", "9"], "--metrics_images does nothing without --metrics_every"),
        (["--metrics_every", "0"], "metrics_every must be at least 1"),
        (["--metrics_every", "5", "--metrics_images", "3"], "at least 4"),
        (["--metrics_every", "5", "--task", "upscale"], "not those of --task upscale"),
        (["--metrics_every", "5", "--buckets"], "leave --buckets out"),
        (["--metrics_every", "5", "--metrics", "lpips"], "lpips"),
    ):
        with pytest.raises(SystemExit):
            parse_args([*base, *flags])
        assert message in capsys.readouterr().err
    args = parse_args([*base, "--metrics_every", "5", "--metrics", "recall", "precision"])
    assert args.metrics == ["recall", "precision"]
