"""Monitoring of a training: skipped steps, spikes, loss by noise level, the metrics file."""

import json
import math

import pytest
import torch
from running import load_example

from diffusers_hdit.training.monitoring import (
    MAX_SKIPPED_STEPS,
    LossBySigma,
    MetricsFile,
    StepRecord,
    TrainingDiverged,
    TrainingMonitor,
    read_lines,
)


def record(step, loss, grad_norm=1.0, losses=(0.1, 0.3, 0.2)):
    sigmas, indices = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 8, 9])
    return StepRecord(step, torch.tensor([loss, grad_norm]), torch.tensor(losses), sigmas, indices)


def test_steps_are_inspected_one_later_or_on_request():
    monitor = TrainingMonitor(1)
    monitor.add(record(1, 0.5))
    assert monitor.pop()[0] == []
    monitor.add(record(2, 0.25))
    monitor.flush()
    assert monitor.pop() == ([0.5, 0.25], [1.0, 1.0], [])


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (0.1, math.nan), (0.1, math.inf)])
def test_skipped_steps_are_counted_and_named(loss, norm):
    monitor = TrainingMonitor(1)
    for step in range(1, 4):
        monitor.add(record(step, loss, norm, losses=(0.1, math.nan, 0.2)))
    monitor.add(record(4, 0.1))
    monitor.flush()
    losses, _, messages = monitor.pop()
    assert (monitor.skipped, monitor.consecutive_skips, losses) == (3, 0, pytest.approx([0.1]))
    assert (
        messages[0].startswith("Skipped step 1") and "worst images: 8 (sigma 2, loss nan), 9 (sigma 3" in messages[0]
    )


def test_too_many_in_a_row_end_the_run():
    monitor = TrainingMonitor(1)
    for step in range(MAX_SKIPPED_STEPS - 1):
        monitor.add(record(step, math.nan))
    monitor.add(record(20, 0.1))
    for step in range(30, 30 + MAX_SKIPPED_STEPS - 1):
        monitor.add(record(step, 0.1, math.inf))
    monitor.add(record(50, math.nan))
    with pytest.raises(TrainingDiverged, match=f"{MAX_SKIPPED_STEPS} steps in a row.*(?s:.)*step 30.*(?s:.)*step 50"):
        monitor.flush()


def test_a_spike_is_named_with_sigma_and_images():
    monitor = TrainingMonitor(1)
    for step in range(150):
        monitor.add(record(step, 0.1 + 0.001 * math.sin(step)))
    assert monitor.pop()[2] == []
    monitor.add(record(150, 0.2))
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.flush()
    (line,) = monitor.pop()[2]
    assert line.startswith("Loss spike at step 150: 0.2,") and "worst images: 8 (sigma 2, loss 0.3)" in line
    resumed = TrainingMonitor(1)
    resumed.load_state_dict(state)
    resumed.add(record(150, 0.2))
    resumed.flush()
    assert resumed.pop()[2] != [], "a resumed run remembers what is usual"


def test_loss_by_sigma_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.exp(4 * torch.randn(2000, generator=generator))
    losses = torch.rand(2000, generator=generator)
    losses[7] = math.nan
    bins = LossBySigma(torch.device("cpu"))
    for part in range(0, 2000, 100):
        bins.add(sigmas[part : part + 100], losses[part : part + 100])
    found = bins.pop(lambda sums: sums)
    expected = {}
    for sigma, loss in zip(sigmas.tolist(), losses.tolist(), strict=True):
        if not math.isnan(loss):
            position = min(24, max(-1, math.floor((math.log10(sigma) + 3) * 4)))
            expected.setdefault(position, []).append(loss)
    assert found["images"] == [len(expected[i]) for i in sorted(expected)] and sum(found["images"]) == 1999
    assert found["loss"] == pytest.approx([sum(expected[i]) / len(expected[i]) for i in sorted(expected)], rel=1e-6)
    assert found["sigma"] == pytest.approx([10 ** (-3 + (i + 0.5) / 4) for i in sorted(expected)], rel=1e-3)
    assert bins.pop(lambda sums: sums) == {"sigma": [], "loss": [], "images": []}


def test_a_resumed_metrics_file_continues_at_its_step(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.add(step=step, loss=step / 10)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    MetricsFile(path, 2).add(step=3, loss=0.9)
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    MetricsFile(path, 0)
    assert read_lines(path) == []


def test_plots_of_runs(tmp_path):
    for name in ("a", "b"):
        metrics = MetricsFile(tmp_path / name / "metrics.jsonl", 0)
        for step in range(1, 9):
            by_sigma = {"sigma": [0.1, 1.0], "loss": [0.2 / step, 0.4], "images": [step, 1]}
            values = {"grad_norm": 1.0, "lr": 1e-3, "images_per_second": 5.0, "data_wait": 0.1}
            metrics.add(step=step, loss=None if step == 3 else 1 / step, loss_by_sigma=by_sigma, **values)
    plots = load_example("plot_metrics")
    sigmas, means = plots.loss_by_sigma(read_lines(tmp_path / "a" / "metrics.jsonl"))
    assert sigmas.tolist() == [0.1, 1.0] and means.tolist() == pytest.approx([8 * 0.2 / 36, 0.4])
    for runs in (["a"], ["a", "b"]):
        plots.main(["--run", *(str(tmp_path / name) for name in runs), "--output", str(tmp_path / "plot.png")])
        assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        plots.main(["--run", str(tmp_path)])
