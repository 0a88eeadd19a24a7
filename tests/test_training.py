"""The training and sampling examples, run for real on a network that fits a test."""

import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, SMALL
from PIL import Image
from safetensors.torch import load_file

from diffusers_hdit import HDiTModel, HDiTPipeline, training
from diffusers_hdit.data import load_images, to_float
from diffusers_hdit.ema import ema_weights, make_ema


EXAMPLES = REPOSITORY / "examples"
SHEET = EXAMPLES / "data" / "fluent_faces_64.png"
TRAIN = EXAMPLES / "train_hdit.py"
CONFIG = {
    "dataset_name": "fluent-faces",
    "label_column": "label",
    "random_flip": True,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "validation_steps": 3,
    "num_validation_images": 2,
    "learning_rate": 2e-3,
    "mixed_precision": "no",
    "model": {**SMALL, "sample_size": 16, "widths": [32, 32], "depths": [1, 1], "dropout": 0.1},
}


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_config(folder, **overrides):
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **overrides}))
    return path


def run(*command, threads="1"):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    output = run(TRAIN, "--config", write_config(folder), "--output_dir", folder / "run", "--report_to", "tensorboard")
    return folder / "run", output


def test_training_ends_in_a_pipeline(trained):
    folder, output = trained
    assert "124 images at 16×16 in 13 classes, 6 steps of 8 images" in output
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-3", "checkpoint-6", "logs", "model_index.json", "pipeline_hdit.py", "samples", "scheduler",
        "training_args.json", "training_facts.json", "transformer",
    }  # fmt: skip
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-0000003.png", "final.png"}
    assert Image.open(folder / "samples" / "final.png").size == (32, 16)
    pipe = HDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.id2label) == 13 and pipe.transformer.config.num_classes == 13
    assert pipe("cat-face", num_inference_steps=2).images[0].size == (16, 16)
    assert list((folder / "logs").rglob("events.out.*"))


def test_the_pipeline_has_the_averaged_weights(trained):
    folder, _ = trained
    last = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(weights(folder)["patch_in.proj.weight"], last["patch_in.proj.weight"])
    ema = torch.load(folder / "checkpoint-6" / "custom_checkpoint_1.pkl", weights_only=True)
    shapes = [p.shape for p in HDiTPipeline.from_pretrained(folder).transformer.parameters()]
    assert [p.shape for p in ema["shadow_params"]] == shapes
    by_name = dict(
        zip((n for n, _ in HDiTPipeline.from_pretrained(folder).transformer.named_parameters()), ema["shadow_params"],
            strict=True)
    )  # fmt: skip
    assert all(torch.equal(weights(folder)[name], value) for name, value in by_name.items())


def test_resumed_equals_uninterrupted_bit_for_bit(trained, tmp_path):
    """Dropout, flips, crops, noise and label dropout included."""
    folder, _ = trained
    resumed = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-3", resumed / "checkpoint-3")
    output = run(
        TRAIN, "--config", write_config(tmp_path), "--output_dir", resumed, "--resume_from_checkpoint", "latest"
    )
    assert "step 3, 24 images seen" in output
    assert equal(weights(resumed), weights(folder))
    for run_folder, parts in ((folder, 1), (resumed, 2)):
        facts = json.loads((run_folder / "training_facts.json").read_text())
        assert len(facts["runs"]) == parts and facts["images_seen"] == 48


def test_accelerate_launch_and_gradient_accumulation(trained, tmp_path):
    """Two micro-batches of four images are one step of eight: the same order of images, the same number of steps."""
    arguments = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 100]
    config = write_config(tmp_path)
    output = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1,
        TRAIN, "--config", config, "--output_dir", tmp_path / "run", *arguments,
    )  # fmt: skip
    assert "6 steps of 8 images" in output
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "progress.json").read_text())["images_seen"] == 48


def test_two_processes_share_the_global_batch(tmp_path):
    output = run(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(),
        TRAIN, "--config", write_config(tmp_path), "--output_dir", tmp_path / "run", "--train_batch_size", 4,
    )  # fmt: skip
    assert output.count("6 steps of 8 images") == 1
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "progress.json").read_text())["images_seen"] == 48
    assert {path.name for path in (tmp_path / "run" / "checkpoint-6").glob("random_states_*")} == {
        "random_states_0.pkl", "random_states_1.pkl",
    }  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
        gradient_checkpointing=True,
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
    module = load_example("train_hdit")
    args = module.parse_args(["--config", str(write_config(tmp_path)), "--output_dir", "x"])
    torch.manual_seed(0)
    model = HDiTModel(**{**args.model, "num_classes": 13, "dropout": 0.0})
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 2e-3, 0.01, 1 / 3))
    faces = load_images(train_data_dir=SHEET, label_column="label", resolution=16)
    image = to_float(torch.stack([faces[i]["image"] for i in range(16)]))
    labels = torch.tensor([faces[i]["label"] for i in range(16)])
    losses = []
    for step in range(80):
        training.seed_step(0, step)
        loss = training.draw_and_compute_loss(
            model, image, labels, num_classes=13, image_size=16, strata={}, args=args
        ).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_parameter_groups(make_model):
    """Every parameter once; the rule of the paper for some of each kind."""
    model = make_model(num_classes=3, mapping_cond_dim=2)
    groups = training.parameter_groups(model, 1.0, 0.5, 0.25)
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


def test_ema_against_the_recursion():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = make_ema(model, decay=0.8)
    values, expected = torch.randn(30, dtype=torch.float64), model.weight.item()
    for n, value in enumerate(values):
        model.weight.data.fill_(value)
        ema.step(model.parameters())
        decay = min(0.8, 1 - (1 + n) ** -0.75)
        expected = decay * expected + (1 - decay) * value.item()
        with ema_weights(model, ema):
            assert model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == value.item()
    with pytest.raises(RuntimeError), ema_weights(model, ema):
        raise RuntimeError
    assert model.weight.item() == values[-1].item(), "the trained weights come back after an error too"


def test_label_dropout_flips_and_seeds():
    seen = []

    def model(sample, timestep, return_dict, class_labels):
        seen.append(class_labels)
        return (torch.zeros_like(sample),)

    args = load_example("train_hdit").parse_args(
        ["--dataset_name", "x", "--output_dir", "y", "--label_dropout", "0.25"]
    )
    image, labels = torch.zeros(4000, 1, 2, 2), torch.ones(4000, dtype=torch.long)
    draw = lambda number: (  # noqa: E731
        training.seed_step(3, number),
        training.draw_and_compute_loss(model, image, labels, num_classes=5, image_size=2, strata={}, args=args),
    )[1]
    assert torch.equal(draw(7), draw(7)) and not torch.equal(draw(7), draw(8))
    share = (seen[0] == 5).float().mean().item()
    assert set(seen[0].tolist()) == {1, 5} and share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


def test_auto_precision():
    assert training.resolve_mixed_precision("no", torch.device("cpu")) == "no"
    assert training.resolve_mixed_precision("auto", torch.device("mps")) == "no"
    assert training.resolve_mixed_precision("auto", torch.device("cpu")) in ("no", "bf16")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, refused before any work


@pytest.fixture
def refuse(tmp_path):
    module = load_example("train_hdit")

    def check(message, *arguments, **config):
        before = sorted(tmp_path.rglob("*"))
        path = write_config(tmp_path, **config)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module.main(["--config", str(path), "--output_dir", str(tmp_path / "run"), *map(str, arguments)])
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


def test_a_folder_that_holds_another_run(refuse, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refuse("is not an empty folder.*--resume_from_checkpoint latest")
    refuse(
        "there is no complete checkpoint 'checkpoint-9'.*there are: none", "--resume_from_checkpoint", "checkpoint-9"
    )


def test_latest_in_a_folder_of_something_else(refuse, tmp_path):
    """Another program's checkpoint-3 must not be written over."""
    (tmp_path / "run" / "checkpoint-3" / "unet").mkdir(parents=True)
    refuse("is not an empty folder", "--resume_from_checkpoint", "latest")


def test_going_on_from_elsewhere_or_from_an_older_checkpoint(refuse, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_index.json").write_text("{}")
    refuse("is not an empty folder", "--resume_from_checkpoint", trained[0] / "checkpoint-3")
    for name in ("checkpoint-3", "checkpoint-6", "checkpoint-6-mine", "checkpoint-best"):
        shutil.copytree(trained[0] / "checkpoint-3", tmp_path / "run" / name)
    assert [path.name for path in training.checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-6"]
    refuse("has a newer checkpoint, checkpoint-6", "--resume_from_checkpoint", "checkpoint-3")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"sigma_mx": 1}, '"scheduler" is wrong.*sigma_mx'),
        ({"solver_type": "hen"}, '"scheduler" is wrong.*hen'),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order 1 or 2"),
    ],
)
def test_a_scheduler_that_could_not_sample(refuse, scheduler, message):
    refuse(message, scheduler=scheduler)


def test_what_a_checkpoint_brings_with_it_is_not_silently_ignored(refuse, trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    message = "learning_rate was 0.002, is 0.1; ema_decay was 0.9999, is 0.5"
    refuse(message, "--resume_from_checkpoint", "latest", "--learning_rate", 0.1, "--ema_decay", 0.5)


def test_a_checkpoint_of_another_model(refuse, trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    refuse("belongs to another run: seed was 0, is 5", "--resume_from_checkpoint", "latest", "--seed", 5)


def test_a_half_written_checkpoint_is_not_resumed_from(trained, tmp_path):
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(trained[0] / name, tmp_path / name)
    (tmp_path / "checkpoint-6" / "progress.json").unlink()
    assert training.find_checkpoint(tmp_path, "latest").name == "checkpoint-3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lr_scheduler", "zigzag"], "invalid choice: 'zigzag'"),
        (["--train_data_dir", "x"], "give either --train_data_dir or --dataset_name"),
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate"),
    ],
)
def test_wrong_flags(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        load_example("train_hdit").parse_args(
            ["--config", str(write_config(tmp_path)), "--output_dir", "x", *arguments]
        )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lerning_rate": 1}, "unknown keys: lerning_rate. Allowed: .*learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
        ({"learning_rate": [1e-3]}, r"learning_rate must be a number, got \[0.001\]"),
        ({"compile": "false"}, "compile must be true or false, got 'false'"),
        ({"max_train_steps": 2.5}, "max_train_steps must be a whole number, got 2.5"),
        ({"validation_steps": 0}, "validation_steps must be at least 1, got 0"),
        ({"checkpoints_total_limit": -1}, "checkpoints_total_limit must be at least 1, got -1"),
        ({"num_validation_images": 0}, "num_validation_images must be at least 1"),
        ({"resolution": [1, 2, 3]}, r"resolution must be one number, or height and width; got \[1, 2, 3\]"),
        ({"model": {"width": 3}}, '"model" has unknown keys: width'),
        ({"model": {"mapping_cond_dim": 3}}, "without a mapping_cond"),
        ({"noise_density": "pink"}, "noise_density must be one of cosine-interpolated.*got 'pink'"),
        ({"preset": "huge"}, "there is no preset 'huge'"),
    ],
)
def test_wrong_configs(tmp_path, capsys, config, message):
    with pytest.raises(SystemExit):
        load_example("train_hdit").parse_args(["--config", str(write_config(tmp_path, **config)), "--output_dir", "x"])
    assert re.search(message, capsys.readouterr().err)


def test_precedence_of_flags_config_and_preset(tmp_path):
    parse = load_example("train_hdit").parse_args
    config = write_config(tmp_path, preset="tiny", ema_decay=0.9, model={"depths": [1, 1, 1]})
    args = parse(["--config", str(config), "--output_dir", "x", "--ema_decay", "0.7", "--no-random_flip"])
    assert args.ema_decay == 0.7 and args.random_flip is False
    assert args.learning_rate == 2e-3 and args.model["depths"] == [1, 1, 1] and args.model["patch_size"] == 2
    assert args.adam_beta2 == 0.95 and args.adam_epsilon == 1e-8


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
    with pytest.raises(ValueError, match="there is no class 'dog'"):
        main(["--pipeline", str(trained[0]), "--output", str(tmp_path / "x.png"), "--class_labels", "dog"])
    with pytest.raises(ValueError, match="must end in a picture's extension"):
        main(["--pipeline", str(trained[0]), "--output", str(tmp_path / "x")])
