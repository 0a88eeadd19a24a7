"""Runs that are killed, asked to stop, or find damaged checkpoints, go on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from running import CONFIG, TRAIN, equal, losses, run, start, weights, write_config


STEPS = 30
# Dropout too: it is drawn from (seed, number of the image).
OVERRIDES = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 3,
    "validation_steps": 10,
    "random_flip": False,
    "augment_prob": 0.3,
    "ema_sigma_rel": [0.1],
    "model": CONFIG["model"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), **OVERRIDES)


@pytest.fixture(scope="module")
def uninterrupted(config):
    folder = config.parent / "uninterrupted"
    run(TRAIN, "--config", config, "--output_dir", folder)
    return folder


def assert_same_end(folder, reference):
    for average in ("", *(path.name for path in reference.glob("ema-*"))):
        assert equal(weights(folder / average), weights(reference / average))
    assert losses(folder) == losses(reference)
    facts = [json.loads((path / "training_facts.json").read_text()) for path in (folder, reference)]
    assert facts[0]["final_loss"] == facts[1]["final_loss"] and facts[0]["images_seen"] == facts[1]["images_seen"]
    for name in sorted(path.name for path in (reference / "snapshots").iterdir()):
        assert (folder / "snapshots" / name).read_bytes() == (reference / "snapshots" / name).read_bytes(), name
    for name in sorted(path.name for path in (reference / "samples").iterdir()):
        assert (folder / "samples" / name).read_bytes() == (reference / "samples" / name).read_bytes(), name


def newest(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def kill_at_random(config, folder, kills, seed):
    """
    Starts the run, kills it with SIGKILL, `kills` times; at a random moment of a step, a save or a picture, which take
    about as long. Returns how many kills left a half-written checkpoint behind.
    """
    moments, halves = random.Random(seed), 0
    for _ in range(kills):
        process = start(TRAIN, "--config", config, "--output_dir", folder)
        seen = newest(folder)
        while process.poll() is None and newest(folder) == seen:
            time.sleep(0.01)  # importing and loading take seconds that are not the point
        time.sleep(moments.uniform(0, 0.2))
        assert process.poll() is None, "the run came to its end before it was killed often enough"
        process.kill()
        process.wait()
        halves += any(folder.glob(".partial-checkpoint-*"))
    return halves


@pytest.mark.parametrize(("kills", "steps"), [(2, 20), pytest.param(20, 150, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, steps, tmp_path):
    """SIGKILL, also inside a save; the same command then ends bit-equal to a run that nobody killed."""
    config = write_config(tmp_path, **{**OVERRIDES, "max_train_steps": steps})
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "reference")
    halves = kill_at_random(config, tmp_path / "run", kills, seed=kills)
    output = run(TRAIN, "--config", config, "--output_dir", tmp_path / "run")
    assert "checkpoint-" in output.split("start")[1].splitlines()[0]
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    print(f"{kills} of {kills} kills resumed, {halves} of them inside a save")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop(number, config, uninterrupted, tmp_path):
    """As a scheduler or a Ctrl-C does it: all processes of the run get the signal, the loader's workers too."""
    folder = tmp_path / "run"
    process = start(TRAIN, "--config", config, "--output_dir", folder, "--dataloader_num_workers", 1)
    while process.poll() is None and newest(folder) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    step = newest(folder)
    assert f"Stopped by {number.name} after step {step}. Saved checkpoint-{step}. The same command resumes" in output
    assert 3 <= step < STEPS and not (folder / "model_index.json").exists()
    run(TRAIN, "--config", config, "--output_dir", folder)
    assert_same_end(folder, uninterrupted)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "model_index.json").unlink()
    path = folder / f"checkpoint-{STEPS}" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    output = run(TRAIN, "--config", config, "--output_dir", folder)
    assert f"checkpoint-{STEPS} is damaged (optimizer.pt is not what was written) and not used" in output
    assert f"checkpoint-{STEPS - 1}: step {STEPS - 1}" in output
    assert_same_end(folder, uninterrupted)


def test_a_finished_run_started_again_is_finished(config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    run(TRAIN, "--config", config, "--output_dir", folder)
    assert_same_end(folder, uninterrupted)
    sessions = json.loads((folder / "training_facts.json").read_text())["runs"]
    assert len(sessions) == 1, "no session of the training was added"


# Stands before the script: makes the gradient norms of some steps bad, or dies where a snapshot would be written.
PREPARED = """
import sys, runpy, torch
from diffusers_hdit.training import trainer
bad, die_at, script, *sys.argv[1:] = sys.argv[1:]
bad, count, total_norm, save = eval(bad), [0], torch.nn.utils.get_total_norm, trainer.save_snapshot
def get_total_norm(gradients):
    count[0] += 1
    return total_norm(gradients) * (torch.nan if count[0] in bad else 1)
def save_snapshot(averages, folder, step):
    if step == int(die_at):
        import os
        os._exit(9)
    return save(averages, folder, step)
torch.nn.utils.get_total_norm, trainer.save_snapshot = get_total_norm, save_snapshot
sys.argv[0] = script
sys.path.insert(0, script.rsplit("/", 1)[0])
runpy.run_path(script, run_name="__main__")
"""


def prepared(bad, die_at, *arguments):
    process = start("-c", PREPARED, bad, die_at, TRAIN, *arguments)
    output, _ = process.communicate()
    return process.returncode, output


@pytest.mark.slow
def test_dying_between_a_checkpoint_and_what_else_is_due(config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    code, _ = prepared([], 10, "--config", config, "--output_dir", folder)
    assert code == 9 and newest(folder) == 10 and not (folder / "samples" / "step-0000010.png").exists()
    run(TRAIN, "--config", config, "--output_dir", folder)
    assert_same_end(folder, uninterrupted)


def test_bad_steps_are_left_out(tmp_path):
    """At a checkpoint, which is written later; at the last step; and found again in the log and the card."""
    settings = {**OVERRIDES, "max_train_steps": 8, "checkpointing_steps": 4, "checkpoints_total_limit": None}
    config, folder = write_config(tmp_path, **settings), tmp_path / "run"
    code, output = prepared([4, 5, 8], -1, "--config", config, "--output_dir", folder)
    assert code == 0, output
    assert output.count("Skipped step") == 3 and "Skipped step 5: loss 0." in output
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 3]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, True, False, False, True]
    assert (folder / "model_index.json").exists()


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path):
    settings = {**OVERRIDES, "max_train_steps": 30, "checkpointing_steps": 3}
    config, folder = write_config(tmp_path, **settings), tmp_path / "run"
    code, output = prepared(list(range(8, 30)), -1, "--config", config, "--output_dir", folder)
    assert code == 1 and "10 steps in a row had a loss or gradient that is not finite:\n  step 8: loss" in output
    assert f"The last good checkpoint is {folder / 'checkpoint-6'}." in output and "Traceback" not in output
    assert newest(folder) == 6 and not (folder / "model_index.json").exists()


@pytest.mark.slow
def test_metrics_of_longer_intervals_are_resumed_too(tmp_path):
    settings = {**OVERRIDES, "max_train_steps": 8, "logging_steps": 3, "checkpoints_total_limit": None}
    config, whole, resumed = write_config(tmp_path, **settings), tmp_path / "whole", tmp_path / "resumed"
    run(TRAIN, "--config", config, "--output_dir", whole)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    shutil.copy(whole / "metrics.jsonl", resumed)
    run(TRAIN, "--config", config, "--output_dir", resumed)
    ours, theirs = ([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
                    for path in (resumed, whole))  # fmt: skip
    assert [line["step"] for line in ours] == [3, 6, 8]
    for name in ("step", "images_seen", "loss", "grad_norm", "lr", "loss_by_sigma"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name


def test_a_fork_with_another_learning_rate(config, uninterrupted, tmp_path):
    """From another run's checkpoint, in a folder of its own; the new rate counts, and its schedule."""
    arguments = ["--resume_from_checkpoint", uninterrupted / f"checkpoint-{STEPS - 2}", "--learning_rate", 1e-4]
    run(TRAIN, "--config", config, "--output_dir", tmp_path / "run", *arguments)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [STEPS - 1, STEPS] and {line["lr"] for line in lines} == {1e-4}
    assert lines[0]["loss"] == losses(uninterrupted)[STEPS - 2], "the first loss is of the old weights"
    assert not equal(weights(tmp_path / "run"), weights(uninterrupted))
