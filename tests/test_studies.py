"""Studies: tiny ones, run whole, and interrupted; and what is refused before any work."""

import csv
import json
import math
import os
import signal
import time

import pytest
import study as studies
import study_report
import study_runs
import torch
from conftest import SMALL
from running import RESEARCH, Images, finish, load_example, run, start

from diffusers_hdit import HDiTModel, diffusion


RUN_STUDY = RESEARCH / "run_study.py"
MODEL = {**SMALL, "sample_size": 16, "widths": [16, 16], "depths": [1, 1]}
BASE = {
    "data": {"resolution": 16, "views": 40, "held_out_views": 24},
    "budget": {"images": 64},
    "seeds": [0, 1],
    "training": {"model": MODEL, "train_batch_size": 8, "lr_warmup_steps": 2, "mixed_precision": "no"},
    "evaluation": {
        "loss_at": [0.5, 1.0],
        "distances_at": [1.0],
        "images": 6,
        "num_inference_steps": 3,
        "loss_images": 10,
        "noise_levels": 3,
        "feature_network": "tiny_features:make",
        "network_resolution": 16,
        "seed": 0,
    },
}
ROWS = {"lerp": {"paper": 27.74}, "add": {"model": {"skip": "add"}}}


def write_study(folder, name="skips", rows=ROWS, base=BASE, **more):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"title": "Skips", "base": base, "rows": rows, **more}))
    return path


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".csv")}


@pytest.mark.slow
def test_a_study_killed_and_resumed_gives_the_same_tables(feature_folder):
    path = write_study(feature_folder)
    # A second study with the default row under another name, and its defaults spelled out.
    other = write_study(feature_folder, "parts", {"lerp again": {"model": {"norm": "ada_rms_norm"}}})
    output = run(RUN_STUDY, path, other, "--output_dir", feature_folder / "whole", "--threads", 1)
    assert "4 runs, 0 of them done" in output and len(list((feature_folder / "whole" / "runs").iterdir())) == 4
    whole = texts(feature_folder / "whole")
    assert set(whole) == {f"{name}{end}" for name in ("skips", "parts") for end in (".md", ".csv", "-points.csv")}
    for name in ("skips", "parts"):
        assert (feature_folder / "whole" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    killed = feature_folder / "killed"
    process = start(RUN_STUDY, path, other, "--output_dir", killed, "--processes", 2, "--threads", 1)
    # In the middle of a training, and of an evaluation if the machine is quick.
    while not list(killed.glob("runs/*/pipeline/checkpoint-4")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    time.sleep(0.5)  # its children follow it
    assert not list(killed.glob("*.md"))
    run(RUN_STUDY, path, other, "--output_dir", killed, "--processes", 2, "--threads", 1)
    assert texts(killed) == whole

    # Done: nothing is trained again, and the tables can be had alone.
    (killed / "skips.md").unlink()
    assert "of them done" in run(RUN_STUDY, path, other, "--output_dir", killed, "--report_only")
    assert texts(killed) == whole

    rows = list(csv.DictReader(whole["skips.csv"].splitlines()))
    assert [row["row"] for row in rows] == ["lerp", "add"] and rows[0]["paper"] == "27.74"
    assert {row["held-out loss n"] for row in rows} == {"2"} and float(rows[0]["images"]) == 64
    points = list(csv.DictReader(whole["skips-points.csv"].splitlines()))
    by_seed = {(p["row"], p["seed"]): float(p["held-out loss"]) for p in points if p["images"] == "64"}
    means = [(by_seed[name, "0"] + by_seed[name, "1"]) / 2 for name in ("lerp", "add")]
    assert math.isclose(float(rows[1]["held-out loss mean"]), means[1], rel_tol=1e-12)
    assert math.isclose(float(rows[1]["held-out loss difference mean"]), means[1] - means[0], abs_tol=1e-12)
    # The shared row is one and the same.
    again = next(csv.DictReader(whole["parts.csv"].splitlines()))
    assert again["identity"] == rows[0]["identity"] != rows[1]["identity"]
    assert again["held-out loss mean"] == rows[0]["held-out loss mean"]


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_are_in_the_table(feature_folder):
    path = write_study(feature_folder, seeds=[0])
    blocked = studies.read_study(path).rows[1]
    (feature_folder / "out" / "runs").mkdir(parents=True)
    # What this row's run would need as a folder is a file.
    (feature_folder / "out" / "runs" / f"{blocked.identity}-seed0").write_text("")
    process = start(RUN_STUDY, path, "--output_dir", feature_folder / "out", "--threads", 1)
    output, _ = process.communicate()
    assert process.returncode == 1 and "1 runs failed" in output and "lerp, seed 0\n" in output
    text = (feature_folder / "out" / "skips.md").read_text()
    assert "Not finished: 1 of 2 runs" in text and "Failed: add seed 0." in text
    (result,) = (feature_folder / "out" / "runs").glob("*/result-*.json")
    assert json.loads(result.read_text())["drawing"]["steps"] == 3

    other = write_study(feature_folder, seeds=[0], base={**BASE, "data": {**BASE["data"], "views": 41}})
    process = start(RUN_STUDY, other, "--output_dir", feature_folder / "out", "--threads", 1)
    output, _ = process.communicate()
    assert process.returncode == 1 and "has views of other settings" in output


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ({"bad": {"model": {"widths": [16]}}}, {}, "row 'bad': depths has 2 entries"),
        ({"bad": {"model": {"wdths": [16]}}}, {}, "row 'bad'.*unknown keys: wdths"),
        ({"bad": {"loss_weighting": "none"}}, {}, "row 'bad'.*loss_weighting must be one of"),
        ({"bad": {"lr": 1}}, {}, "row 'bad'.*unknown keys: lr"),
        ({"bad": {"seed": 1}}, {}, "row 'bad': seed can't be set"),
        ({"bad": {"gradient_accumulation_steps": 2}}, {}, "row 'bad': gradient_accumulation_steps can't be 2.*batch"),
        ({"bad": {"scheduler": {"sigma_data": 0.6}}}, {}, "row 'bad': sigma_data.*0.6"),
        ({"bad": {"metrics_every": 4}}, {}, "row 'bad': metrics_every"),
        ({"bad": {"label_column": "label", "model": {"num_classes": 2}}}, {}, "row 'bad': label_column"),
        ({"bad": {"condition_columns": ["x"]}}, {}, "row 'bad': condition_columns"),
        ({"bad": {"task": "upscale"}}, {}, "row 'bad': task"),
        ({"bad": {"model": {"sample_size": 32}}}, {}, "row 'bad': sample_size of the model is 32"),
        ({"bad": {"seeds": [0, 0]}}, {}, "seeds must be different"),
        ({"bad": 3}, {}, "row 'bad'"),
        ({}, {}, "is no study"),
        (ROWS, {"colour": 1}, "is no study"),
        (ROWS, {"budget": {"hours": 1}}, "the budget of"),
        (ROWS, {"budget": {"images": 8}}, "less than 2 steps"),
        (ROWS, {"base": {**BASE, "evaluation": {}}}, '"evaluation" in the base'),
        (ROWS, {"base": "nowhere.json"}, "not a readable JSON"),
    ],
)
def test_malformed_studies_are_refused_before_any_work(feature_folder, rows, more, message):
    path = (
        write_study(feature_folder, rows=rows, **{**{"base": BASE}, **more})
        if "base" in more
        else write_study(feature_folder, rows=rows, **more)
    )
    with pytest.raises(ValueError, match=message):
        studies.read_study(path)


def test_unknown_studies_and_folders_are_refused_before_any_work(feature_folder):
    study = load_example("run_study", RESEARCH)
    with pytest.raises(ValueError, match="no study 'nothing'; there are attention"):
        study.main(["nothing", "--output_dir", str(feature_folder / "out")])
    with pytest.raises(SystemExit):
        study.main(["skips", "--output_dir", str(feature_folder / "out"), "--train_data_dir", str(feature_folder)])
    other = write_study(feature_folder, "other", base={**BASE, "data": {**BASE["data"], "views": 41}})
    with pytest.raises(ModuleNotFoundError):
        study.main([str(write_study(feature_folder)), "--output_dir", str(feature_folder / "out"), "--seeds", "0"])
    (feature_folder / "out").exists() and pytest.fail("something was written")
    process = start(RUN_STUDY, write_study(feature_folder), other, "--output_dir", feature_folder / "out")
    output, _ = process.communicate()
    assert process.returncode == 1 and "have other views" in output and not (feature_folder / "out").exists()


@pytest.mark.parametrize("name", load_example("run_study", RESEARCH).known_studies())
def test_the_studies_that_come_with_the_project(name):
    """Every row of each is one that can be trained; those of the default's budget share the default row."""
    (path,) = load_example("run_study", RESEARCH).study_paths([name])
    study, default = studies.read_study(path), studies.read_study(path.with_name("skips.json")).rows[0]
    assert len({row.identity for row in study.rows}) == len(study.rows) > 1
    assert default.identity in {row.identity for row in study.rows}


def test_a_model_of_another_type_has_arguments_of_its_own():
    base = {"model": {"widths": [16]}, "learning_rate": 1.0}
    assert studies.merged(base, {"model": {"depths": [1]}})["model"] == {"widths": [16], "depths": [1]}
    other = {"model_type": "dit", "model": {"num_layers": 2}}
    assert studies.merged(base, other) == {**other, "learning_rate": 1.0}


def test_budgets_of_flops_and_what_they_count():
    rows = {"patch 2": {}, "patch 4": {"model": {"patch_size": 4}}}
    one, other = (
        studies.make_row(name, change, BASE["training"], {"flops": 1e10}, BASE["evaluation"], [0], "")
        for name, change in rows.items()
    )
    assert other.steps > 3 * one.steps and one.flops <= 1e10 and other.flops <= 1e10
    assert abs(one.flops / other.flops - 1) < 0.1
    config = studies.training_config({"model": {**MODEL, "attention_types": "global"}})
    network = HDiTModel(**config.model)
    parameters, _ = studies.cost(config)
    assert parameters == sum(p.numel() for p in network.parameters())


def test_held_out_errors_are_those_of_the_loss(make_model):
    network = make_model(sample_size=16, widths=(16, 16), depths=(1, 1)).double()
    images = Images(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8))
    network = network.float()
    found = study_runs.held_out_errors(network, images, {"noise_levels": 4, "loss_images": 5, "seed": 0})
    # In float64, from the definition: F against its target.
    sigma = torch.tensor(found["sigma"][1], dtype=torch.float64)
    x = torch.stack(list(images)).double() / 127.5 - 1
    from diffusers_hdit.training.objective import sample_noise
    from diffusers_hdit.utils.seeding import mixed_seed

    noise = sample_noise(x.shape, mixed_seed("held-out", 0, 1), range(5), x.device).double()
    noised = x + sigma * noise
    total = sigma**2 + 0.25
    with torch.no_grad():
        output = network.double()(noised / total.sqrt(), sigma.log() / 4).sample
    target = (x - 0.25 / total * noised) / (sigma * 0.5 / total.sqrt())
    assert math.isclose((output - target).square().mean().item(), found["error"][1], rel_tol=1e-5)
    weights = [(s * 0.5) ** 2 / (s**2 + 0.25) ** 2 for s in found["sigma"]]
    assert math.isclose(
        found["loss"], sum(w * e for w, e in zip(weights, found["error"], strict=True)) / 4, rel_tol=1e-5
    )
    assert found["sigma"] == sorted(found["sigma"], reverse=True)
    assert diffusion.WEIGHTINGS.keys() >= {"soft-min-snr"}


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.123456], "0.1235 (1)"), ([0.10, 0.12], "0.110 ± 0.014 (2)"), ([], "-"), ([123.4, 125.4], "124.4 ± 1.4 (2)")],
)
def test_numbers_with_their_deviation(values, text):
    assert study_report.show(values) == text


def test_differences_are_taken_seed_by_seed():
    assert study_report.differences({0: 3.0, 2: 5.0, 3: 9.0}, {0: 1.0, 1: 7.0, 2: 2.0}) == [2.0, 3.0]


def test_views_of_panoramas(tmp_path):
    make = load_example("make_panorama_views", RESEARCH)
    # A sphere whose colour is the direction: red is longitude, green latitude.
    height, width = 64, 128
    red = ((torch.arange(width) + 0.5) / width).expand(height, width)
    green = (1 - (torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    sphere = torch.stack((red, green, torch.zeros_like(red)))
    seen = make.view(sphere, yaw=30.0, pitch=10.0, field_of_view=70.0, resolution=9)
    assert math.isclose(seen[0, 4, 4].item() * 360 - 180, 30, abs_tol=1.0)
    assert math.isclose(seen[1, 4, 4].item() * 180 - 90, 10, abs_tol=1.0)
    # The rightmost column of the middle row, from the cross product form of the camera, in float64.
    x = math.tan(math.radians(35)) * 8 / 9
    p = math.radians(10)
    assert math.isclose(seen[0, 4, 8].item() * 360 - 180, 30 + math.degrees(math.atan2(x, math.cos(p))), abs_tol=1.0)
    assert seen[1, 0, 4] > seen[1, 8, 4]  # up is up
    # Round the back the ends meet.
    behind = make.view(sphere, yaw=180.0, pitch=0.0, field_of_view=20.0, resolution=8)[0, 4]
    assert behind[0] > 0.9 and behind[-1] < 0.1

    one = ["--output_dir", str(tmp_path / "one"), "--number", "3", "--resolution", "8"]
    make.main(one)
    make.main(["--output_dir", str(tmp_path / "more"), "--number", "4", "--resolution", "8"])
    make.main(["--output_dir", str(tmp_path / "other"), "--number", "3", "--resolution", "8", "--seed", "1"])
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert len(names) == 3
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "more" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    with pytest.raises(ValueError, match="views of other settings"):
        make.main([*one, "--seed", "2"])
    with pytest.raises(ValueError, match="no panoramas"):
        make.main(["--panoramas", str(tmp_path / "one" / "x"), "--output_dir", str(tmp_path / "new")])


def test_the_command_ends_when_it_is_done(feature_folder):
    """A dry run prints what would be done, and writes nothing."""
    output = finish(start(RUN_STUDY, write_study(feature_folder), "--output_dir", feature_folder / "out", "--dry_run"))
    assert "lerp" in output and "4 runs, 0 of them done" in output and not (feature_folder / "out").exists()


def test_views_of_other_settings_are_refused(tmp_path):
    check_views, done, folder = (
        load_example("run_study", RESEARCH).check_views,
        tmp_path / "train-complete",
        tmp_path / "train",
    )
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").touch()
    settings = {"number": 3, "resolution": 8, "seed": 0}
    done.touch()  # as earlier versions left it
    check_views(done, folder, settings)
    with pytest.raises(ValueError, match="give another --output_dir"):
        check_views(done, folder, {**settings, "number": 4})
    done.write_text(json.dumps(settings))
    check_views(done, folder, settings)
    with pytest.raises(ValueError, match="views of other settings"):
        check_views(done, folder, {**settings, "resolution": 16})


def result_of(errors, sigma=(2.0, 1.0)):
    return {"points": [{"held_out": {"sigma": list(sigma), "error": errors}}]}


def test_rows_are_compared_on_the_seeds_that_they_share():
    first, row = {0: result_of([1.0, 2.0]), 1: result_of([9.0, 9.0])}, {0: result_of([1.1, 1.0]), 2: result_of([5, 5])}
    sigma, ratio, deviations = study_report.errors_against(row, first)
    assert sigma == [2.0, 1.0] and ratio == pytest.approx([10.0, -50.0]) and deviations == [0.0, 0.0]
    assert study_report.errors_against({3: row[2]}, first) == ([], [], [])
    common = study_report.with_common_seeds({"first": first, "row": row, "not begun": {}})
    assert {name: list(found) for name, found in common.items()} == {"first": [0], "row": [0], "not begun": []}
    assert study_report.with_common_seeds({"first": first, "row": {3: row[2]}})["first"] is first


def test_signs_and_missing_runs_are_said(tmp_path):
    assert study_report.same_sign([-1.0, -2.0, 0.5]) == ", lower in 2 of 3" and study_report.same_sign([]) == ""
    study = studies.read_study(write_study(tmp_path))
    add = study.rows[1]
    lines = study_report.missing(study, {"lerp": {0: {}}, "add": {}}, {(add.identity, 1)})
    assert lines[0].startswith("Failed: add seed 1.") and lines[2].startswith(
        "No result yet: lerp seed 1; add seed 0."
    )


def test_an_interrupted_training_is_not_taken_for_a_whole_one(tmp_path):
    row = studies.read_study(write_study(tmp_path)).rows[0]
    one = study_runs.Run(row, 0, tmp_path, BASE["evaluation"], tmp_path, tmp_path, tmp_path, 1)
    (one.pipeline_dir / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="before its last step, 8. To resume it, run the same command again"):
        study_runs.check_finished(one)
    (one.pipeline_dir / "checkpoint-8").mkdir()
    study_runs.check_finished(one)
