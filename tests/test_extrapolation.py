"""Sizes never trained at: where the tokens are, networks brought to a size, and the example from end to end."""

import json

import extrapolation
import pytest
import torch
from conftest import SMALL, randomize
from diffusers import EDMDPMSolverMultistepScheduler
from running import RESEARCH, load_example, run, start

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.models.modeling_hdit import axial_positions


TINY = {**SMALL, "sample_size": 16, "widths": (16, 16), "depths": (1, 1), "augment_cond_dim": 0}
BOTH = pytest.mark.parametrize("kind", ["rope", "additive"])


def tiny(**overrides):
    return randomize(HDiTModel(**{**TINY, **overrides}), 0.2).eval()


def output(model, size):
    with torch.no_grad():
        return model(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)), 0.1).sample


def test_positions_keep_their_spacing():
    y, x = axial_positions(4, 6, torch.device("cpu"), across=2)
    torch.testing.assert_close(x, torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]))
    torch.testing.assert_close(y, torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    y, x = axial_positions(4, 6, torch.device("cpu"))
    assert x.max() == pytest.approx(5 / 6) and y.max() == pytest.approx(3 / 6)


def test_rotations_at_trained_spacing_are_those_of_the_trained_size():
    """The middle of a larger image has the tables of the trained one; a smaller one has those of its middle."""
    model = tiny()
    trained = model.rotary_tables(8, 8, torch.zeros(1))
    model.set_position_size(16)
    assert torch.equal(model.rotary_tables(8, 8, torch.zeros(1))[0][0], trained[0][0])
    for level, cut in ((0, slice(4, 12)), (1, slice(2, 6))):
        larger = model.rotary_tables(16, 16, torch.zeros(1))[level]
        for one, other in zip(larger, trained[level], strict=True):
            torch.testing.assert_close(one[cut, cut], other, atol=2e-6, rtol=0)
    smaller = model.rotary_tables(4, 4, torch.zeros(1))[0][0]
    torch.testing.assert_close(smaller, trained[0][0][2:6, 2:6], atol=2e-6, rtol=0)


def test_additive_positions_at_trained_spacing():
    """Inside the learned ones, outside those of the nearest token of the border; between two tokens their mean."""
    part = tiny(position_embedding="additive", position_size=16).patch_in
    learned = part.positions
    torch.testing.assert_close(part.positions_for(4, 4), learned[:, 2:6, 2:6], atol=1e-6, rtol=1e-5)
    larger = part.positions_for(12, 10)
    near = [torch.arange(n).sub(k).clamp(0, 7) for n, k in ((12, 2), (10, 1))]
    torch.testing.assert_close(larger, learned[:, near[0]][:, :, near[1]], atol=1e-6, rtol=1e-5)
    odd = part.positions_for(7, 8)
    torch.testing.assert_close(odd, (learned[:, :-1] + learned[:, 1:]) / 2, atol=1e-6, rtol=1e-5)
    assert part.positions_for(8, 8) is learned


@BOTH
def test_the_treatment_changes_other_sizes_only_and_is_saved(kind, tmp_path):
    model = tiny(position_embedding=kind)
    same, filled = output(model, 16), output(model, 32)
    model.set_position_size(16)
    assert torch.equal(output(model, 16), same)
    spaced = output(model, 32)
    assert (spaced - filled).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = HDiTModel.from_pretrained(tmp_path)
    assert again.config.position_size == 16 and torch.equal(output(again, 32), spaced)
    model.set_position_size(None)
    assert torch.equal(output(model, 32), filled)
    model.set_position_size((16, 16))
    model(torch.randn(1, 3, 32, 32), 0.1).sample.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_positions_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no positions. Leave it out"):
        tiny(position_embedding="none", position_size=16)
    with pytest.raises(ValueError, match="additive positions keep the spacing of the sample_size"):
        tiny(position_embedding="additive", position_size=32)
    with pytest.raises(ValueError, match="position_size must be positive"):
        tiny(position_size=0)
    with pytest.raises(ValueError, match="treatment must be one of"):
        extrapolation.set_treatment(tiny(), "stretch")
    model = tiny(augment_cond_dim=9, position_size=16)
    with pytest.raises(ValueError, match="does not know position_size=16"):
        HDiTPipeline(model, EDMDPMSolverMultistepScheduler()).save_k_diffusion(tmp_path / "model.safetensors")
    assert extrapolation.treatments_of(tiny(position_embedding="none")) == ("fill",)


@BOTH
@pytest.mark.parametrize("treatment", extrapolation.TREATMENTS)
def test_a_network_brought_to_a_size_begins_as_it_was_there(kind, treatment):
    model = tiny(position_embedding=kind)
    extrapolation.set_treatment(model, treatment)
    before = output(model, 24)
    brought = extrapolation.at_size(model, 24, treatment)
    assert brought.sample_size == (24, 24)
    torch.testing.assert_close(output(brought.eval(), 24), before, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="the nearest that works"):
        extrapolation.at_size(model, 18, treatment)


def saved(folder, kind):
    path = folder / kind
    HDiTPipeline(tiny(position_embedding=kind), EDMDPMSolverMultistepScheduler()).save_pretrained(path)
    return path


@pytest.mark.slow
def test_extrapolation_from_end_to_end(feature_folder):
    paths = [saved(feature_folder, kind) for kind in ("rope", "additive")]
    load_example("make_panorama_views", RESEARCH).main(
        ["--output_dir", str(feature_folder / "views"), "--number", "8", "--resolution", "24"]
    )
    options = ["--num_images", 8, "--num_inference_steps", 2, "--feature_network", "tiny_features:make"]
    options += ["--network_resolution", 16, "--finetune_steps", 2, "--train_batch_size", 4]
    options += ["--train_data_dir", feature_folder / "views"]
    command = [
        RESEARCH / "extrapolate.py",
        *paths,
        "--resolutions",
        "24,16",
        "--output_dir",
        feature_folder / "out",
        *options,
    ]
    run(*command)
    text = (feature_folder / "out" / "results.json").read_text()
    results = json.loads(text)
    found = {(r["resolution"], r["pipeline"], r["treatment"], r["finetune_steps"]): r["metrics"] for r in results}
    wanted = {(16, kind, way, 0) for kind in ("rope", "additive") for way in ("fill", "spacing")}
    wanted |= {(24, kind, way, n) for kind in ("rope", "additive") for way in ("fill", "spacing") for n in (0, 2)}
    assert set(found) == wanted
    assert len({str(found[key]) for key in found}) == len(found) - 2  # at 16 pixels the treatments are one
    for name in ("distances.png", "images-16.png", "images-24.png"):
        assert (feature_folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "rope, trained spacing, 2 steps more" in (feature_folder / "out" / "results.md").read_text()
    tuned = HDiTPipeline.from_pretrained(feature_folder / "out" / "finetuned" / "rope-spacing-24").transformer
    assert tuned.sample_size == (24, 24) and tuned.config.position_size == 16
    assert not torch.equal(
        tuned.patch_in.proj.weight, HDiTPipeline.from_pretrained(paths[0]).transformer.patch_in.proj.weight
    )
    # Again: what was fine-tuned is taken from there, and all is the same.
    run(*command)
    assert (feature_folder / "out" / "results.json").read_text() == text
    process = start(*command, "--finetune_steps", 3)
    said, _ = process.communicate()
    assert process.returncode == 1 and "fine-tuned with other settings" in said


def test_extrapolation_refuses_before_any_work(feature_folder):
    extrapolate = load_example("extrapolate", RESEARCH)
    path = saved(feature_folder, "rope")
    out = ["--output_dir", str(feature_folder / "out")]
    with pytest.raises(ValueError, match="can't process 18×18 images"):
        extrapolate.main([str(path), *out, "--resolutions", "16,18"])
    for flags in (["--resolutions", "x"], ["--num_images", "2"], ["--train_data_dir", "x"], ["--real_dir", "nowhere"]):
        with pytest.raises(SystemExit):
            extrapolate.main([str(path), *out, *flags])
    with pytest.raises(ValueError, match="two pipelines have one name"):
        extrapolate.main([str(path), str(path), *out])
    assert extrapolate.named(["a=x/y", "x/z"]) == {"a": "x/y", "z": "x/z"}
    classes = tiny(num_classes=2)
    HDiTPipeline(classes, EDMDPMSolverMultistepScheduler()).save_pretrained(feature_folder / "classes")
    with pytest.raises(ValueError, match="has classes or other conditions"):
        extrapolate.main([str(feature_folder / "classes"), *out, "--resolutions", "16"])
    with pytest.raises(ValueError, match="only networks without classes"):
        extrapolation.finetune(classes, None, 1, None)
    assert not (feature_folder / "out").exists()


def test_fine_tuning_takes_the_trainings_settings(tmp_path):
    (tmp_path / "training_args.json").write_text(
        json.dumps({"loss_weighting": "snr", "seed": 9, "max_grad_norm": 2.0})
    )
    config = extrapolation.finetuning_config(tmp_path, 0.25, seed=1, learning_rate=1e-4)
    assert (config.loss_weighting, config.max_grad_norm, config.seed, config.learning_rate) == ("snr", 2.0, 1, 1e-4)
    assert config.sigma_data == 0.25
