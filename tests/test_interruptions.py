"""Signals while images are generated, a full disk, weights that are not finite: what was saved stays, nothing half is left."""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from running import TRAIN, losses, run, start, write_config

from diffusers_hdit.training.checkpointing import checkpoints, folder_size
from diffusers_hdit.training.distributed import SAME_SIGNAL_SECONDS, StopRequest
from diffusers_hdit.utils.files import check_writable


class OneProcess:
    num_processes = 1


def test_a_signal_that_comes_twice_is_one(monkeypatch):
    """`accelerate launch` passes on the Ctrl-C that the terminal has sent already."""
    with StopRequest(OneProcess()) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() and stop.name == "SIGINT"
        monkeypatch.setattr(stop, "arrived", stop.arrived - SAME_SIGNAL_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_images_are_generated(number, tmp_path):
    folder = tmp_path / "run"
    config = write_config(tmp_path, max_train_steps=1000, validation_steps=2, checkpointing_steps=500)
    process = start(TRAIN, "--config", config, "--output_dir", folder, "--num_validation_images", 400)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    process.send_signal(number)
    asked = time.monotonic()
    output, _ = process.communicate()
    assert process.returncode == 0 and time.monotonic() - asked < 10, output
    assert f"Stopped by {number.name} after step 2. Saved checkpoint-2. The same command resumes" in output
    assert not list(folder.glob("samples/*")) and not (folder / "model_index.json").exists()
    # Resumed, it catches up on the images that are missing.
    run(TRAIN, "--config", config, "--output_dir", folder, "--max_train_steps", 3, "--num_validation_images", 2)
    assert (folder / "samples" / "step-0000002.png").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("Mounting a file system needs root.")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk, tmp_path):
    config = write_config(tmp_path, checkpointing_steps=1, report_to="none", validation_steps=100)
    flags = ("--config", config)
    run(TRAIN, *flags, "--output_dir", tmp_path / "good")
    size = folder_size(checkpoints(tmp_path / "good")[-1])
    folder = small_disk(int(2.5 * size)) / "run"

    process = start(TRAIN, *flags, "--output_dir", folder)
    output, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in output
    message = output.strip().splitlines()[-1]
    assert f"{folder}/checkpoint-3 could not be written: No space left on the device" in message
    assert f"takes about {size / 2**20:.1f} MiB" in message and "checkpoint-2 and the earlier" in message
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(folder.glob(".partial-*"))

    # With a limit, the oldest one is deleted before there would be no room.
    run(TRAIN, *flags, "--output_dir", folder, "--checkpoints_total_limit", 1, "--max_train_steps", 4)
    assert losses(folder) == losses(tmp_path / "good")[:4]


def test_an_output_folder_that_cannot_be_written_to(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    process = start(TRAIN, "--config", write_config(tmp_path), "--output_dir", tmp_path / "file" / "run")
    output, _ = process.communicate()
    assert process.returncode == 1 and output.startswith("error: --output_dir") and "cannot be written to" in output


# Stands before the script: a weight becomes infinite at the fourth step, though the loss was finite.
INFINITE = f"""
import runpy, sys
from diffusers_hdit.training import trainer
train_step = trainer.train_step
def with_an_infinite_weight(run, batches):
    train_step(run, batches)
    if run.step == 4:
        next(run.network.parameters()).data.view(-1)[0] = float("inf")
trainer.train_step = with_an_infinite_weight
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    script, folder = tmp_path / "infinite.py", tmp_path / "run"
    script.write_text(INFINITE)
    config = write_config(tmp_path, max_train_steps=4, checkpointing_steps=3)
    process = start(script, "--config", config, "--output_dir", folder)
    output, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in output
    assert "error: after step 4 weights of the network are not finite\nThe last good checkpoint is" in output
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
    assert not (folder / "model_index.json").exists()


def test_what_a_dry_run_says_of_a_long_warm_up_and_threads(tmp_path):
    config = write_config(tmp_path, lr_warmup_steps=7)
    output = run(TRAIN, "--config", config, "--output_dir", tmp_path / "run", "--dry_run", "--num_threads", 2)
    assert "--lr_warmup_steps 7 is longer than the run" in output and "CPU, 2 threads" in output
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_limited_unless_told_otherwise(tmp_path):
    for limit, kept in ((None, 3), (0, 6)):
        folder = tmp_path / str(limit)
        config = write_config(tmp_path, checkpointing_steps=1, validation_steps=100)
        run(TRAIN, "--config", config, "--output_dir", folder,
            *(() if limit is None else ("--checkpoints_total_limit", limit)))  # fmt: skip
        assert len(checkpoints(folder)) == kept
    assert json.loads((folder / "training_args.json").read_text())["checkpoints_total_limit"] == 0
    assert torch.equal(torch.tensor(losses(folder)), torch.tensor(losses(tmp_path / "None")))
