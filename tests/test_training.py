"""The training and sampling examples, run for real on a network that fits a test."""

import json
import math
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY
from diffusers.optimization import get_scheduler
from PIL import Image
from running import CONFIG, EXAMPLES, SHEET, TRAIN, equal, load_example, losses, run, weights, write_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_hdit import DPMSolverPP3MSDEScheduler, HDiTModel, HDiTPipeline, HDiTUpscalePipeline, diffusion
from diffusers_hdit.data import load_images
from diffusers_hdit.training import objective, optimization, validation
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.monitoring import read_lines
from diffusers_hdit.training.trainer import run_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    output = run(TRAIN, "--config", write_config(folder), "--output_dir", folder / "run", "--report_to", "tensorboard")
    return folder / "run", output


def test_training_ends_in_a_pipeline(trained):
    folder, output = trained
    assert "124 images at 16×16, 13 classes" in output and "6 steps of 8 images" in output
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-3", "checkpoint-6", "logs", "metrics.jsonl", "model_index.json", "pipeline_hdit.py", "samples",
        "scheduler", "training_args.json", "training_facts.json", "transformer",
    }  # fmt: skip
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-0000003.png", "final.png"}
    assert Image.open(folder / "samples" / "final.png").size == (32, 16)
    pipe = HDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.id2label) == 13 and pipe.transformer.config.num_classes == 13
    assert pipe("cat-face", num_inference_steps=2).images[0].size == (16, 16)


def test_tensorboard_has_numbers_and_pictures(trained):
    (path,) = (trained[0] / "logs").rglob("events.out.*")
    events = EventAccumulator(str(path)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(trained[0]))
    assert [(event.step, event.width, event.height) for event in events.Images("samples")] == [
        (3, 32, 16),
        (6, 32, 16),
    ]


def test_wandb_has_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    run(TRAIN, "--config", write_config(tmp_path), "--output_dir", folder, "--report_to", "wandb")
    run_id = json.loads((folder / "training_args.json").read_text())["run_id"]
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert offline.name.endswith(run_id) and (offline / f"run-{run_id}.wandb").is_file()
    assert len(list(offline.rglob("samples_*.png"))) == 2


def test_trackio_has_the_run(tmp_path, monkeypatch):
    """Also of a run in two sessions: under one name."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    arguments = ["--config", write_config(tmp_path), "--output_dir", tmp_path / "run", "--report_to", "trackio"]
    run(TRAIN, *arguments)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    run(TRAIN, *arguments)
    run_id = json.loads((tmp_path / "run" / "training_args.json").read_text())["run_id"]
    with sqlite3.connect(tmp_path / "trackio" / "train_hdit.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {run_id}
    logged = [(step, json.loads(values)) for _, step, values in rows]
    assert {step: values["loss"] for step, values in logged if "loss" in values} == pytest.approx(
        dict(enumerate(losses(tmp_path / "run"), 1))
    )
    assert {step for step, values in logged if "samples" in values} == {3, 6}


def test_the_pipeline_has_the_averaged_weights(trained):
    folder, _ = trained
    last = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(weights(folder)["patch_in.proj.weight"], last["patch_in.proj.weight"])
    saved = torch.load(folder / "checkpoint-6" / "averages.pt", weights_only=True)["averages"]["0.9999"]
    network = HDiTPipeline.from_pretrained(folder).transformer
    assert all(torch.equal(saved[name], value) for name, value in network.named_parameters())


def test_the_metrics_file_has_every_step(trained):
    folder, _ = trained
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["images_seen"] == 48
    for line in lines:
        assert 0 < line["loss"] < 1 and line["grad_norm"] > 0 and 0 <= line["data_wait"] < 1
        assert line["skipped_steps"] == 0 and line["notes"] == [] and line["memory_gib"] > 0
        by_sigma = line["loss_by_sigma"]
        assert sum(by_sigma["images"]) == 8
        mean = sum(loss * count for loss, count in zip(by_sigma["loss"], by_sigma["images"], strict=True)) / 8
        assert mean == pytest.approx(line["loss"], rel=1e-5)


def test_a_dry_run_says_what_would_be_done(tmp_path):
    folder = tmp_path / "run"
    config = write_config(tmp_path, preset="ffhq-1024", model={}, random_flip=False, train_batch_size=2)
    output = run(TRAIN, "--config", config, "--output_dir", folder, "--dry_run", "--gradient_checkpointing", "0,1",
                 "--num_train_epochs", 3, "--ema_decay", 0.999, 0.9999)  # fmt: skip
    assert "85.1M parameters, 206.1 GMAC per image" in output and "124 images at 1024×1024, 13 classes" in output
    assert (
        "6 steps of 2 images (2 × 1 processes × 1 accumulation steps), 0.1 epochs" in output
        and "from the beginning" in output
    )
    # 4 bytes for weights and gradients, 8 for the optimizer, 4 for each average; 878.3 MiB per image in bfloat16.
    assert "1.902 GiB for weights, gradients, optimizer and averages, 1.715 GiB per image" in output
    assert str(folder) in output and not folder.exists()
    assert "7×7 neighborhoods" in output and "rms_norm" in output


@pytest.mark.parametrize("flag", ["--use_8bit_adam", pytest.param("--compile", marks=pytest.mark.slow)])
def test_flags_that_change_how_it_is_computed(flag, tmp_path):
    """Nearly the same losses, and as exact a resume."""
    if flag == "--use_8bit_adam":
        pytest.importorskip("bitsandbytes")
    wide = {**CONFIG["model"], "widths": [64, 128]}  # 8 bits are for matrices of 4,096 numbers or more
    config, folders = write_config(tmp_path, model=wide), [tmp_path / name for name in ("plain", "whole", "resumed")]
    run(TRAIN, "--config", config, "--output_dir", folders[0])
    run(TRAIN, "--config", config, "--output_dir", folders[1], flag)
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=0.02)
    shutil.copytree(folders[1] / "checkpoint-3", folders[2] / "checkpoint-3")
    run(TRAIN, "--config", config, "--output_dir", folders[2], flag)
    assert equal(weights(folders[1]), weights(folders[2]))


def test_super_resolution(tmp_path):
    """`--task upscale` trains what `HDiTUpscalePipeline` upscales with; its pictures are of the same images made small."""
    settings = {"augment_prob": 0.5, "random_flip": False, "max_train_steps": 4, "mixed_precision": "bf16"}
    settings["scheduler"] = {"_class_name": "DPMSolverPP3MSDEScheduler", "sigma_max": 80.0}
    config, folder = write_config(tmp_path, **settings), tmp_path / "run"
    run(TRAIN, "--config", config, "--output_dir", folder, "--task", "upscale", "--upscale_factor", 2)
    pipe = HDiTUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DPMSolverPP3MSDEScheduler) and pipe.scheduler.config.sigma_max == 80.0
    assert pipe.config.upscale_factor == 2 and pipe.transformer.config.conditioning_channels == 4
    assert pipe(Image.new("RGB", (8, 12)), num_inference_steps=1).images[0].size == (16, 24)
    assert Image.open(folder / "samples" / "final.png").size == (32, 16)


def test_image_folder_without_labels_bf16_checkpointing_and_limit(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.new("L", (40, 24 + i), color=20 * i).save(tmp_path / "images" / f"{i}.png")
    config = write_config(
        tmp_path,
        dataset_name=None,
        label_column=None,
        train_data_dir=str(tmp_path / "images"),
        resolution=[16, 32],
        gradient_checkpointing="0",
        random_flip=False,
        augment_prob=0.5,
        mixed_precision="bf16",
        lr_scheduler="linear",
        checkpointing_steps=2,
        checkpoints_total_limit=2,
        cache_dir=str(tmp_path / "cache"),
        model={**CONFIG["model"], "in_channels": 1},
    )
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "run", "--dataloader_num_workers", 1)
    pipe = HDiTPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=1).images[0]
    assert image.size == (32, 16) and image.mode == "L" and pipe.id2label == {}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_it_learns(tmp_path):
    """A few steps lower the loss on what was trained on, far beyond chance."""
    args = parse_args(["--config", str(write_config(tmp_path)), "--output_dir", "x"])
    torch.manual_seed(0)
    model = HDiTModel(**{**args.model, "num_classes": 13, "dropout": 0.0})
    optimizer = torch.optim.AdamW(optimization.parameter_groups(model, 2e-3, 0.01, 1 / 3))
    losses = []
    for step in range(80):
        batch = faces(range(16), range(16 * step, 16 * step + 16))
        loss, _ = objective.sample_and_compute_loss(
            model, batch, torch.device("cpu"), args, num_classes=13, image_size=16, strata={}
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def faces(indices, numbers):
    dataset = load_images(train_data_dir=SHEET, label_column="label", resolution=16)
    items = [dataset[i] for i in indices]
    return {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "number": torch.tensor(list(numbers)),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_additive_positions_do_not_decay(make_model):
    model = make_model(position_embedding="additive")
    (group,) = [
        g
        for g in optimization.parameter_groups(model, 1.0, 0.5, 0.25)
        if any(p is model.patch_in.positions for p in g["params"])
    ]
    assert group["weight_decay"] == 0


def test_parameter_groups(make_model):
    """Every parameter once; the rule of the paper for some of each kind."""
    model = make_model(num_classes=3, mapping_cond_dim=2)
    groups = optimization.parameter_groups(model, 1.0, 0.5, 0.25)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    for name in ("patch_in.proj.weight", "merges.0.proj.weight", "splits.1.proj.weight", "patch_out.proj.weight",
                 "down_blocks.0.1.attn.to_q.weight", "transformer_blocks.0.attn.to_out.0.weight",
                 "up_blocks.0.0.ff.down_proj.weight"):  # fmt: skip
        assert by_name[name] == (1.0, 0.5), name
    for name in ("down_blocks.0.0.norm1.linear.weight", "conditioning.mapping.blocks.0.ff.up_proj.weight"):
        assert by_name[name] == (0.25, 0.5), name
    for name in ("conditioning.mapping.norm_in.weight", "conditioning.mapping.blocks.1.norm.weight"):
        assert by_name[name] == (0.25, 0.0), name
    for name in ("conditioning.class_embedder.weight", "conditioning.time_embedder.weight", "norm_out.weight",
                 "conditioning.mapping_cond_embedder.weight", "splits.0.fac", "down_blocks.0.0.attn.scale"):  # fmt: skip
        assert by_name[name] == (1.0, 0.0), name


class Recorder:
    """Stands where the network does, and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, timestep, return_dict, **conditions):
        self.calls.append({"sample": sample, "timestep": timestep, **conditions})
        return (torch.zeros_like(sample),)


def drawn(batch, strata=None, **flags):
    arguments = [
        text for name, value in flags.items() for text in (f"--{name}", *([str(value)] if value != "" else []))
    ]
    args = parse_args(["--dataset_name", "x", "--output_dir", "y", *arguments])
    recorder = Recorder()
    losses, sigmas = objective.sample_and_compute_loss(
        recorder, batch, torch.device("cpu"), args, num_classes=13, image_size=16, strata=strata or {}
    )
    return {"loss": losses, "sigma": sigmas, **recorder.calls[0]}


@pytest.mark.parametrize(
    "flags", [{"random_flip": "", "label_dropout": 0.5}, {"augment_prob": 0.5, "task": "upscale", "upscale_factor": 2}]
)
def test_draws_follow_the_image_however_the_batch_is_divided(flags):
    """Global batch of 8: image j of micro-step m on process r is number j * 4 + m * 2 + r."""
    whole = drawn(faces(range(8), range(100, 108)), **flags)
    again = drawn(faces(range(8), range(100, 108)), **flags)
    other = drawn(faces(range(8), range(108, 116)), **flags)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(not torch.equal(whole[name], other[name]) for name in whole)
    for micro_step in range(2):
        for rank in range(2):
            places = [4 * j + 2 * micro_step + rank for j in range(2)]
            strata = {"rank": rank, "world_size": 2, "micro_step": micro_step, "micro_steps": 2}
            part = drawn(faces(places, [100 + i for i in places]), strata, **flags)
            for name in whole:
                torch.testing.assert_close(part[name], whole[name][places], rtol=0, atol=1e-6, msg=name)


def test_noise_is_standard_normal_and_levels_are_stratified():
    batch = faces([0] * 512, range(512))
    noise = objective.sample_noise((512, 3, 16, 16), 0, batch["number"].tolist(), torch.device("cpu"))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(noise[:2].flatten(1))[0, 1]) < 0.15
    # In the order of their numbers every image has a stratum of its own.
    found = drawn(batch)["sigma"].double()
    edges = diffusion.sigma_from_uniform(torch.arange(1, 512, dtype=torch.float64) / 512, image_size=16)
    assert (found.diff() < 0).all() and (found[:-1] >= edges * 0.999).all() and (found[1:] <= edges * 1.001).all()


def test_label_dropout_and_flips():
    batch = faces([0] * 4000, range(4000))
    draws = drawn(batch, label_dropout=0.25)
    labels = draws["class_labels"]
    share = (labels == 13).float().mean().item()
    assert set(labels.tolist()) == {int(batch["label"][0]), 13}
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert set(drawn(batch)["class_labels"].tolist()) == set(labels.tolist())
    image = {"image": batch["image"], "number": batch["number"]}
    flipped, plain = drawn(image, random_flip=""), drawn(image)
    share = (flipped["sample"] != plain["sample"]).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_conditions_say_that_they_are_there():
    """Dropped ones are all zeros; one at the mean of every column is not."""
    batch = {**faces([0] * 400, range(400)), "mapping_cond": torch.zeros(400, 2)}
    found = drawn(batch, label_dropout=0.5)
    dropped = found["class_labels"] == 13
    assert found["mapping_cond"].shape == (400, 3) and 0 < dropped.sum() < 400
    assert torch.equal(found["mapping_cond"], torch.tensor([0.0, 0.0, 1.0]) * ~dropped[:, None])


def test_a_bad_step_changes_nothing():
    """Weights, moments and their counts, with the fused optimizer and with one that can't look on the device; clipped
    gradients give the steps of torch's own clipping."""
    accelerator = Accelerator(cpu=True)
    for options in ({"fused": True}, {"foreach": True}):
        model, reference = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).double()
        reference.load_state_dict(model.state_dict())
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, **options))
        own = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.1, foreach=False)

        def step(factor, max_norm, model=model, optimizer=optimizer, reported=0.0):
            loss = (factor * model(torch.ones(1, 4)).square()).sum()
            loss.backward()
            values = optimization.clipped_step(accelerator, model, optimizer, loss.detach() + reported, max_norm)
            optimizer.zero_grad()
            state = [v for s in optimizer.state.values() for v in s.values()]
            return values, [v.detach().clone() for v in (*model.parameters(), *state)]

        def reference_step(factor, max_norm, reference=reference, own=own):
            (factor * reference(torch.ones(1, 4).double()).square()).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
            own.step()
            own.zero_grad()
            return norm

        for factor, max_norm in ((1.0, 0.3), (50.0, 0.3), (0.01, 0.3), (7.0, math.inf)):
            norm = reference_step(factor, max_norm)
            values, before = step(factor, max_norm)
            torch.testing.assert_close(values[1].double(), norm, rtol=1e-4, atol=0)
            for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)
        for factor, reported in ((math.nan, 0.0), (math.inf, 0.0), (1.0, math.inf)):
            values, after = step(factor, 0.3, reported=reported)
            assert not values.isfinite().all()
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not torch.equal(step(1.0, 0.3)[1][0], before[0])


def test_the_schedule_is_set_to_any_step():
    def schedule():
        optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.3, 0.1)])
        return optimizer, get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=20)

    (walked, walking), (jumped, jumping) = schedule(), schedule()
    for _ in range(11):
        walked.step()
        walking.step()
    optimization.set_schedule(jumping, 11)
    for _ in range(3):
        assert walking.get_last_lr() == jumping.get_last_lr()
        assert [group["lr"] for group in walked.param_groups] == [group["lr"] for group in jumped.param_groups]
        for part in (walked, jumped, walking, jumping):
            part.step()


def test_grids_of_channels_that_are_no_colours(tmp_path):
    images = torch.linspace(0, 1, 4 * 5 * 8 * 6).view(4, 5, 8, 6)
    validation.save_image_grid(images, tmp_path / "samples" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
    assert grid.shape == (16, 60, 3)
    np.testing.assert_array_equal(grid[:8, 6:12, 0], (images[0, 1] * 255).round().numpy())


def test_auto_precision(monkeypatch):
    assert optimization.resolve_mixed_precision("no", torch.device("cpu")) == "no"
    assert optimization.resolve_mixed_precision("auto", torch.device("mps")) == "no"
    for products, precision in (((), "no"), (("avx512_bf16",), "bf16"), (("amx_tile",), "bf16")):
        for name in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=name in products: has, raising=False)
        assert optimization.resolve_mixed_precision("auto", torch.device("cpu")) == precision


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, refused before any work


@pytest.fixture
def refuse(tmp_path):
    def check(message, *arguments, **config):
        before = sorted(tmp_path.rglob("*"))
        path = write_config(tmp_path, **config)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            flags = ["--config", str(path), "--output_dir", str(tmp_path / "run"), *map(str, arguments)]
            run_training(parse_args(flags))
        assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, path]))

    return check


def test_fewer_images_than_a_batch(refuse):
    refuse("124 images, but 200 in each of 1 processes", train_batch_size=200)


def test_no_images_and_no_folder(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse("no images in", dataset_name=None, train_data_dir=str(tmp_path / "empty"))
    refuse("does not exist", dataset_name=None, train_data_dir=str(tmp_path / "nowhere"))


def test_sizes_that_do_not_fit(refuse):
    refuse("height 18 must be a multiple of 4", "--resolution", 18)


def test_a_folder_of_something_else(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refuse("is not an empty folder")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"sigma_mx": 1}, '"scheduler" is wrong.*sigma_mx'),
        ({"solver_type": "hen"}, '"scheduler" is wrong.*hen'),
        ({"_class_name": "DDIMScheduler"}, "_class_name must be one of EDMDPMSolverMultistepScheduler"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order 1 or 2"),
    ],
)
def test_a_scheduler_that_could_not_sample(refuse, scheduler, message):
    refuse(message, scheduler=scheduler)


def test_another_run(refuse, trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    message = "learning_rate was 0.002, is 0.1.*ema_decay was .0.9999., is .0.5.. Nothing was changed"
    refuse(message, "--learning_rate", 0.1, "--ema_decay", 0.5)
    refuse("belongs to another run: seed was 0, is 5.*To start from it with these", "--seed", 5)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sample_grid(trained, tmp_path):
    folder, _ = trained
    common = ["--pipeline", folder, "--num_inference_steps", 2, "--images_per_class", 3]
    output = run(EXAMPLES / "sample_hdit.py", *common, "--output", tmp_path / "all.png", "--real_images", SHEET)
    assert "39 images in 13 rows" in output
    grid = Image.open(tmp_path / "all.png")
    assert grid.height == 14 * (64 + 4) + 4 and grid.width > 3 * 68
    # An image does not depend on the batch that it was drawn in.
    main = load_example("sample_hdit").main
    for batch_size in (1, 6):
        arguments = [
            *common,
            "--output",
            tmp_path / f"{batch_size}.png",
            "--class_labels",
            "cat-face",
            "3",
            "--batch_size",
        ]
        main([*map(str, arguments), str(batch_size)])
    a, b = (
        torch.frombuffer(bytearray(Image.open(tmp_path / f"{n}.png").tobytes()), dtype=torch.uint8) for n in (1, 6)
    )
    assert (a.int() - b.int()).abs().max() <= 1


def test_sample_errors(trained, tmp_path):
    main = load_example("sample_hdit").main
    with pytest.raises(SystemExit, match="there is no class 'dog'"):
        main(["--pipeline", str(trained[0]), "--output", str(tmp_path / "x.png"), "--class_labels", "dog"])
    with pytest.raises(SystemExit, match="must end in the extension of an image format"):
        main(["--pipeline", str(trained[0]), "--output", str(tmp_path / "x")])


def test_the_benchmark_of_its_overhead(tmp_path):
    config = write_config(tmp_path, dataset_name="fluent-faces")
    output = run(REPOSITORY / "benchmarks" / "training_overhead.py", "--steps", 2, "--config", config)
    assert "bare forward, backward, AdamW" in output and "overhead: " in output
