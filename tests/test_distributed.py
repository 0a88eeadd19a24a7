"""Training on two real processes, started by `accelerate launch`, against one process with the same global batch."""

import json
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from PIL import Image
from running import NO_DROPOUT, TRAIN, equal, launch, losses, run, start_launch, weights, write_config


STEPS = 50
KINDS = ["ddp", "fsdp2", pytest.param("deepspeed", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Augmentation, labels, a schedule and all kinds of averages, without dropout, which is sampled by each process."""
    return write_config(
        tmp_path_factory.mktemp("config"), max_train_steps=STEPS, checkpointing_steps=STEPS // 2, validation_steps=1000,
        num_validation_images=3, lr_scheduler="cosine", random_flip=False, augment_prob=0.3, ema_decay=[0.99, 0.9],
        ema_sigma_rel=[0.1], **NO_DROPOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config):
    folder = config.parent / "alone"
    run(TRAIN, "--config", config, "--output_dir", folder)
    return folder


def assert_same_run(folder, reference):
    """The order of additions differs, and AdamW amplifies rounding where a gradient is nearly zero."""
    assert len(losses(reference)) == STEPS
    difference = np.abs(np.array(losses(folder)) - np.array(losses(reference))).max()
    print(f"largest difference of a loss in {STEPS} steps: {difference:.1e}")
    assert difference <= 1e-5
    for average in ("", "ema-0.9"):
        ours, theirs = weights(folder / average), weights(reference / average)
        assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-3
    ours, theirs = (np.asarray(Image.open(path / "samples" / "final.png")).astype(int) for path in (folder, reference))
    print(f"largest difference of a pixel: {np.abs(ours - theirs).max()} of 255")
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, config, alone, tmp_path):
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    output = launch(kind, "--config", config, "--output_dir", tmp_path / "run", "--train_batch_size", 4)
    assert output.count(f"{STEPS} steps of 8 images (4 × 2 processes × 1 accumulation steps)") == 1
    assert ("FSDP" in kind.upper()) == ("fsdp on 2" in output)
    assert_same_run(tmp_path / "run", alone)
    assert sorted(p.name for p in (tmp_path / "run" / "snapshots").iterdir()) == sorted(
        p.name for p in (alone / "snapshots").iterdir()
    )


@pytest.mark.slow
def test_deepspeed_resumes_bit_for_bit(config, tmp_path):
    """Its checkpoints are its own: for the same number of processes."""
    pytest.importorskip("deepspeed")
    arguments = ["--config", config, "--train_batch_size", 4, "--output_dir"]
    launch("deepspeed", *arguments, tmp_path / "run")
    begin_from(tmp_path / "run", f"checkpoint-{STEPS // 2}", tmp_path / "resumed")
    launch("deepspeed", *arguments, tmp_path / "resumed")
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "run"))


@pytest.mark.slow
def test_two_processes_share_accumulated_batches(config, alone, tmp_path):
    arguments = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    launch("ddp", "--config", config, "--output_dir", tmp_path / "run", *arguments)
    assert_same_run(tmp_path / "run", alone)


def begin_from(run_folder, checkpoint, folder):
    folder.mkdir()
    shutil.copytree(run_folder / checkpoint, folder / checkpoint)
    for name in ("metrics.jsonl", "training_args.json"):
        shutil.copy(run_folder / name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_resumed_on_other_processes(kind, config, alone, tmp_path):
    """One process started, two resume; and the other way round."""
    checkpoint, two, one = f"checkpoint-{STEPS // 2}", tmp_path / "two", tmp_path / "one"
    begin_from(alone, checkpoint, two)
    output = launch(kind, "--config", config, "--output_dir", two, "--train_batch_size", 4)
    assert f"{checkpoint}: step {STEPS // 2}" in output
    assert_same_run(two, alone)
    begin_from(two, checkpoint, one)
    run(TRAIN, "--config", config, "--output_dir", one)
    assert_same_run(one, alone)


# Stands before the script: the loss of one image of the fourth step is not finite, wherever that image is.
ONE_BAD_LOSS = f"""
import runpy, sys
from diffusers_hdit.training import trainer
compute = trainer.sample_and_compute_loss
def with_a_bad_one(model, batch, *arguments, **options):
    losses, sigmas = compute(model, batch, *arguments, **options)
    return losses.masked_fill((batch["number"] == 31).to(losses.device), float("nan")), sigmas
trainer.sample_and_compute_loss = with_a_bad_one
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp2", "deepspeed"))]
)
def test_a_bad_step_is_left_out_everywhere(kind, tmp_path):
    """Though only one process has it, and though DeepSpeed steps within its backward pass."""
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    script, config = tmp_path / "one_bad_loss.py", write_config(tmp_path, **NO_DROPOUT)
    script.write_text(ONE_BAD_LOSS)
    run(script, "--config", config, "--output_dir", tmp_path / "alone")
    launch(kind, "--config", config, "--output_dir", tmp_path / "run", "--train_batch_size", 4, script=script)
    for name in ("alone", "run"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-4


def test_a_signal_to_one_process_stops_all(config, tmp_path):
    folder, steps = tmp_path / "run", 100_000
    process = start_launch("ddp", "--config", config, "--output_dir", folder, "--train_batch_size", 4, "--max_train_steps",
                           steps, "--checkpointing_steps", steps)  # fmt: skip
    log = folder / "metrics.jsonl"
    # Both processes have made a step when the first line is there: before, a signal ends a process at once.
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    second = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    second[0].send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "Stopped by SIGTERM after step" in output and len(list(folder.glob("checkpoint-*"))) == 1
