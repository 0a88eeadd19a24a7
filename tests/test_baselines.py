"""The networks that HDiT is compared with, from a single call to a training and its pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import kept_bytes, randomize, relative_error
from diffusers import DiTTransformer2DModel, EDMDPMSolverMultistepScheduler, UNet2DModel
from running import CONFIG, EXAMPLES, TRAIN, equal, losses, run, weights, write_config

from diffusers_hdit import DiTPixelModel, HDiTModel, HDiTPipeline, UNetPixelModel, diffusion
from diffusers_hdit.evaluation.profiler import profile_model, profile_network
from diffusers_hdit.hub import push as hub
from diffusers_hdit.models.baselines import TIME_SCALE
from diffusers_hdit.models.networks import NETWORKS
from diffusers_hdit.training import optimization, saving
from diffusers_hdit.training.config import names_where, parse_args
from diffusers_hdit.training.trainer import check_network


SMALL = {
    "dit": {
        "sample_size": 16,
        "patch_size": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
    },
    "unet": {
        "sample_size": 16,
        "block_out_channels": [16, 16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}
ALL = {"num_classes": 3, "mapping_cond_dim": 2, "conditioning_channels": 4}
TYPES = pytest.mark.parametrize("model_type", list(SMALL))


def make(model_type, **overrides):
    return randomize(NETWORKS[model_type](**{**SMALL[model_type], **overrides})).eval()


def inputs(batch=2, size=16):
    generator = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "sample": randn(batch, 3, size, size),
        "timestep": randn(batch) / 2,
        "class_labels": torch.arange(batch) % 3,
        "augment_cond": randn(batch, 9),
        "mapping_cond": randn(batch, 2),
        "conditioning_image": randn(batch, 4, size, size),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The networks


@TYPES
def test_a_new_network_learns_from_everything(model_type):
    model = NETWORKS[model_type](**SMALL[model_type], **ALL)
    given = inputs()
    output = model(**given)
    assert output.sample.shape == (2, 3, 16, 16) and output.sample.isfinite().all()
    torch.testing.assert_close(model(**given, return_dict=False)[0], output.sample)
    randomize(model)(**given).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@TYPES
def test_the_start(model_type):
    """A DiT begins with F = 0, as its paper has it; neither listens to a vector or an augmentation yet."""
    model, given = NETWORKS[model_type](**SMALL[model_type], **ALL).eval(), inputs()
    output = model(**given).sample
    assert (not output.any()) == (model_type == "dit")
    if model_type == "unet":
        torch.testing.assert_close(model(**{**given, "mapping_cond": None, "augment_cond": None}).sample, output)
    else:
        gates = [block.norm1.linear for block in model.transformer.transformer_blocks]
        assert not any(linear.weight.any() for linear in gates) and model.time_embedder.linear_1.weight.any()


@TYPES
@pytest.mark.parametrize("name", list(inputs()))
def test_every_condition_has_an_effect(model_type, name):
    model, given = make(model_type, **ALL), inputs()
    output = model(**given).sample
    changed = model(**{**given, name: given[name].roll(1, 0)}).sample
    assert relative_error(changed, output) > 1e-3


@TYPES
def test_what_is_left_out(model_type):
    model, given = make(model_type, num_classes=3, mapping_cond_dim=2), inputs()
    given = {name: given[name] for name in ("sample", "timestep")}
    nothing = {
        "class_labels": torch.full((2,), 3),
        "augment_cond": torch.zeros(2, 9),
        "mapping_cond": torch.zeros(2, 2),
    }
    torch.testing.assert_close(model(**given).sample, model(**given, **nothing).sample)
    number, vector = (model(given["sample"], timestep).sample for timestep in (0.25, torch.full((2,), 0.25)))
    torch.testing.assert_close(number, vector)
    # Labels are dropped by the script alone.
    model.train()
    labels = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(model(**given, class_labels=labels).sample, model(**given, class_labels=labels).sample)


def test_dit_is_diffusers_own():
    """With its embeddings in every block, filled with copies of ours, as a converted checkpoint has them."""
    model, given = make("dit", num_classes=3, augment_cond_dim=0), inputs(batch=3)
    theirs = DiTTransformer2DModel(**SMALL["dit"], in_channels=3, num_embeds_ada_norm=3).eval()
    embeddings = {
        "timestep_embedder": model.time_embedder.state_dict(),
        "class_embedder.embedding_table": model.conditioning.class_embedder.state_dict(),
    }
    state = dict(model.transformer.state_dict())
    for i in range(2):
        for part, values in embeddings.items():
            state.update({f"transformer_blocks.{i}.norm1.emb.{part}.{key}": value for key, value in values.items()})
    theirs.load_state_dict(state)
    expected = theirs(given["sample"], TIME_SCALE * given["timestep"], given["class_labels"]).sample
    output = model(given["sample"], given["timestep"], given["class_labels"]).sample
    assert relative_error(output, expected) < 1e-6


def test_unet_is_diffusers_own():
    model, given = make("unet", num_classes=3, augment_cond_dim=0), inputs(batch=3)
    theirs = UNet2DModel(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=4,
    ).eval()
    table = model.conditioning.class_embedder.weight
    theirs.load_state_dict({**model.unet.state_dict(), "class_embedding.weight": table})
    expected = theirs(given["sample"], TIME_SCALE * given["timestep"], given["class_labels"]).sample
    output = model(given["sample"], given["timestep"], given["class_labels"]).sample
    assert relative_error(output, expected) < 1e-6


@TYPES
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_noise_levels_are_resolved(model_type, dtype):
    """Sigmas one percent apart are distinguished everywhere, in half precision too; in float64, against the definition of the waves."""
    model = make(model_type).to(dtype)
    seen = []
    module = model.time_proj if model_type == "dit" else model.unet.time_proj
    module.register_forward_hook(lambda module, arguments, output: seen.append(output))
    sigma = 1e-3 * 1.01 ** torch.arange(1389, dtype=torch.float64)  # up to 1e3
    model(torch.zeros(1389, 3, 16, 16, dtype=dtype)[:1].expand(1389, -1, -1, -1), diffusion.c_noise(sigma))
    embedding = seen[0].double()
    half = embedding.shape[1] // 2
    shift = 1 if model_type == "dit" else 0
    waves = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - shift))
    angles = 250 * (sigma.log() / 4)[:, None] * waves
    # Angles of up to 432 radians in float32.
    torch.testing.assert_close(embedding, torch.cat((angles.cos(), angles.sin()), dim=1), rtol=0, atol=2e-4)
    assert (embedding.diff(dim=0).norm(dim=1) > 0.3).all()
    spread = torch.cdist(embedding, embedding) + 9 * torch.eye(len(embedding))
    assert spread.min() > 0.3, "no level is mistaken for another one"


@TYPES
def test_recomputing_changes_no_gradient(model_type):
    plain, saving = make(model_type).train(), make(model_type).train()
    saving.load_state_dict(plain.state_dict())
    saving.set_gradient_checkpointing_levels([0])
    given = {name: inputs()[name] for name in ("sample", "timestep")}
    for model in (plain, saving):
        model(**given).sample.square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(ValueError, match="no levels to choose among"):
        saving.set_gradient_checkpointing_levels([1])
    config = {**SMALL[model_type], "sample_size": 32}
    kept = [profile_network(NETWORKS[model_type], config, None, levels).activation_bytes for levels in ([], [0])]
    assert kept[1] < 0.6 * kept[0]
    model = NETWORKS[model_type](**config).bfloat16()
    assert kept[0] == pytest.approx(kept_bytes(model), rel=0.1)


def test_unet_of_other_shapes():
    model = make("unet")
    assert model(torch.randn(1, 3, 8, 20), 0.0).sample.shape == (1, 3, 8, 20)
    with pytest.raises(ValueError, match=r"multiples of 4 .*the nearest that works: 8×20"):
        model(torch.randn(1, 3, 8, 21), 0.0)


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("dit", {"sample_size": (16, 32)}, "must be square"),
        ("dit", {"sample_size": 18}, "multiple of patch_size 4"),
        ("dit", {"attention_head_dim": 7}, "is 14; it must be a multiple of 4"),
        ("dit", {"num_layers": 0}, "num_layers must be at least 1"),
        ("unet", {"sample_size": 18}, "multiples of 4"),
        ("unet", {"block_out_channels": [16, 20]}, "multiples of norm_num_groups 8"),
        ("unet", {"attention_blocks": [3]}, "attention_blocks must be of 0 to 2"),
        ("unet", {"attention_head_dim": 12}, "must divide the channels"),
        ("unet", {"num_classes": 0}, "num_classes must be at least 1"),
        ("unet", {"augment_cond_dim": -1}, "augment_cond_dim must be at least 0"),
    ],
)
def test_wrong_arguments(model_type, config, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS[model_type](**{**SMALL[model_type], **config})


@TYPES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 16, 16)}, "sample must have shape"),
        ({"sample": torch.zeros(2, 3, 18, 18)}, "can't process 18×18 images"),
        ({"class_labels": torch.tensor([0, 4])}, "0 to 2, or 3 for no label"),
        ({"class_labels": torch.tensor([0])}, r"must have shape \(2,\)"),
        ({"augment_cond": torch.zeros(2, 8)}, r"augment_cond must have shape \(2, 9\)"),
        ({"mapping_cond": torch.zeros(2, 3)}, r"mapping_cond must have shape \(2, 2\)"),
        ({"conditioning_image": None}, "conditioning_image must have shape"),
    ],
)
def test_wrong_inputs(model_type, change, message):
    with pytest.raises(ValueError, match=message):
        make(model_type, **ALL)(**{**inputs(), **change})


# ----------------------------------------------------------------------------------------------------------------------
# What they cost


def test_costs_of_dit():
    """Against a count by hand."""
    profile = profile_network(DiTPixelModel, {**SMALL["dit"], "num_classes": 3})
    tokens, width, patch = 16, 16, 3 * 4 * 4
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = 2 * tokens * patch * width + 2 * width**2
    assert profile.macs == 2 * block + ends + (256 + width) * width + 9 * width
    model = NETWORKS["dit"](**SMALL["dit"], num_classes=3)
    assert profile.parameters == sum(p.numel() for p in model.parameters())


def test_the_examples_unet():
    """The default is the layout of Diffusers' train_unconditional.py, and the map of the augmentation."""
    with torch.device("meta"):
        theirs = UNet2DModel(
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        )
        ours = UNetPixelModel(sample_size=64)
    shapes = lambda model: {name: p.shape for name, p in model.named_parameters()}  # noqa: E731
    assert shapes(ours.unet) == shapes(theirs)
    profile = profile_network(UNetPixelModel, {"sample_size": 64})
    assert profile.parameters == sum(p.numel() for p in theirs.parameters()) + 9 * 512
    # Four times the pixels: four times the work of convolutions, the rest is small.
    assert profile_network(UNetPixelModel, {}, 128).macs == pytest.approx(4 * profile.macs, rel=0.02)


def test_costs_of_hdit_are_those_of_its_own_profile():
    config = {"sample_size": 16, "patch_size": 2, "widths": [16], "depths": [1], "attention_head_dim": 8}
    assert profile_network(HDiTModel, config) == profile_model(config)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and sampling


def make_pipeline(model, **components):
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=80.0, sigma_data=0.5)
    pipe = HDiTPipeline(model, scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, *arguments, **keywords):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*arguments, num_inference_steps=3, generator=generator, output_type="latent", **keywords).images


@TYPES
def test_model_round_trip(model_type, tmp_path):
    model, given = make(model_type, **ALL), inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**given).sample, model(**given).sample)
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and relative_error(half(**given).sample, model(**given).sample) < 0.05


WITHOUT_PACKAGE = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "diffusers_hdit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = pipe("dog", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
             output_type="latent").images
torch.save((type(pipe.transformer).__name__, image), sys.argv[2])
"""


@TYPES
def test_pipeline_round_trip(model_type, tmp_path):
    """With the package, and without it by the code that is saved along."""
    pipe = make_pipeline(make(model_type, num_classes=2), id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path / "saved")
    loaded = HDiTPipeline.from_pretrained(tmp_path / "saved")
    name = NETWORKS[model_type].__name__
    assert type(loaded.transformer) is NETWORKS[model_type]
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["transformer"] == ["baselines", name]
    plain, guided = generate(loaded, "dog"), generate(loaded, "dog", guidance_scale=2.0)
    # The weights, bit for bit; a convolution's sums may be taken in another order.
    expected, weights = pipe.transformer.state_dict(), loaded.transformer.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert relative_error(plain, generate(pipe, "dog")) < 1e-5 and relative_error(guided, plain) > 1e-3
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, tmp_path / "saved", tmp_path / "image.pt"],
        capture_output=True, text=True, env={**env, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0 and "Expected types" not in done.stderr, done.stderr
    class_name, image = torch.load(tmp_path / "image.pt")
    assert class_name == name and relative_error(image, guided) < 1e-5


def test_what_a_pipeline_refuses(tmp_path):
    pipe = make_pipeline(make("dit"))
    with pytest.raises(ValueError, match="takes only the size that it was made for, 16×16"):
        pipe(height=32, width=32)
    with pytest.raises(ValueError, match="it knows HDiT, this is a DiTPixelModel"):
        pipe.save_k_diffusion(tmp_path / "model.safetensors")


def test_a_baseline_guides_hdit(make_model):
    """Autoguidance needs only the same call."""
    model = make_model(sample_size=16, widths=(32,), depths=(1,))
    guided = generate(make_pipeline(model, guidance_model=make("unet")), guidance_scale=2.0)
    assert relative_error(guided, generate(make_pipeline(model))) > 1e-3


@TYPES
def test_the_card_says_what_it_is(model_type, tmp_path):
    make_pipeline(make(model_type, num_classes=2), id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    card = hub.write_card(tmp_path, "user/model", None, None)
    profile = profile_network(NETWORKS[model_type], {**SMALL[model_type], "num_classes": 2})
    assert "a baseline to compare" in card and "not an HDiT itself" in card
    assert f"| network | {NETWORKS[model_type].__name__} |" in card and f"{profile.parameters / 1e6:.1f} M" in card
    assert f"- {model_type}\n" in card and "- hdit\n" not in card and "crowson" not in card
    assert ("refuses other sizes" in card) == (model_type == "dit")
    assert "trust_remote_code=True" in card and '"cat"' in card


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["dit", "unet"])
def test_training_and_resuming(model_type, tmp_path):
    """Ends bit-equal to an uninterrupted run; all conditions, augmentation and dropout are on."""
    config = write_config(
        tmp_path,
        model_type=model_type,
        model={**SMALL[model_type], "dropout": 0.1},
        random_flip=False,
        augment_prob=0.3,
        ema_decay=[0.9, 0.5],
        gradient_checkpointing="all",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    output = run(TRAIN, "--config", config, "--output_dir", whole)
    assert f"network     {NETWORKS[model_type].__name__}: " in output and "MAC per image" in output
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    assert "checkpoint-3: step 3" in run(TRAIN, "--config", config, "--output_dir", resumed)
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 6
    for name in ("", "ema-0.5"):
        assert equal(weights(resumed / name), weights(whole / name))
    assert (resumed / "samples" / "final.png").read_bytes() == (whole / "samples" / "final.png").read_bytes()

    progress = json.loads((whole / "checkpoint-6" / "progress.json").read_text())
    assert progress["settings"]["model_type"] == model_type and progress["settings"]["model.dropout"] == 0.1

    pipe = HDiTPipeline.from_pretrained(whole)
    assert type(pipe.transformer) is NETWORKS[model_type] and pipe.transformer.config.num_classes == 13
    label = pipe.id2label[0]
    assert relative_error(generate(pipe, label, guidance_scale=3.0), generate(pipe, label)) > 1e-4
    assert pipe.transformer.conditioning.augment_embedder.weight.any(), "it has learned of the augmentation"


def test_averaged_weights_with_their_tables():
    model = make("dit")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    made, given = saving.network_with_weights(model, weights), inputs()
    given = {name: given[name] for name in ("sample", "timestep")}
    torch.testing.assert_close(made(**given).sample, model(**given).sample)


@TYPES
def test_optimizer_groups_are_plain(model_type):
    model = make(model_type, **ALL)
    groups = optimization.parameter_groups(model, 1e-3, 0.1, 1 / 3)
    assert {group["lr"] for group in groups} == {1e-3} and {group["weight_decay"] for group in groups} == {0.1, 0.0}
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim > 1 and not name.startswith("conditioning.")
        assert (id(parameter) in decaying) == expected, name


def parse(tmp_path, *flags, **config):
    path = write_config(tmp_path, **{"model_type": "dit", "model": SMALL["dit"], **config})
    config = parse_args(["--config", str(path), "--output_dir", "out", *map(str, flags)])
    check_network(config)
    return config


def test_flags(tmp_path):
    args = parse(tmp_path, "--gradient_checkpointing", "--task", "upscale", "--resolution", 32)
    assert args.checkpointed_levels == [0] and args.model["conditioning_channels"] == 4
    assert args.model["sample_size"] == 32 and "model_type" in names_where(resume="fixed")
    # Of a preset, what is not only HDiT's.
    args = parse(tmp_path, preset="oxford-flowers-256", model={}, model_type="unet", learning_rate=1e-4)
    assert args.model == {"sample_size": 256, "num_classes": 102} and args.learning_rate == 1e-4


@TYPES
def test_the_example_configs_compare(model_type):
    """About as many parameters as the tiny HDiT, the same in all else."""
    path = lambda name: EXAMPLES / "configs" / f"{name}.json"  # noqa: E731
    args = [parse_args(["--config", str(path(name)), "--output_dir", "o"]) for name in ("tiny", f"tiny-{model_type}")]
    profiles = [profile_network(NETWORKS[a.model_type], {**a.model, "num_classes": 13}) for a in args]
    assert profiles[1].parameters == pytest.approx(profiles[0].parameters, rel=0.15)
    differing = {name for name, value in vars(args[0]).items() if vars(args[1])[name] != value}
    assert differing == {"config", "model", "model_type"}


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ([], {"model_type": "hdti"}, "model_type must be one of hdit, dit, unet"),
        ([], {"model": CONFIG["model"]}, "unknown keys: depths.* DiTPixelModel, which --model_type dit trains, takes"),
        (["--model_type", "hdit"], {}, "unknown keys: num_attention_heads, num_layers"),
        (["--gradient_checkpointing", "0"], {}, "only HDiT has"),
        (["--mapping_lr_scale", "1"], {}, "--mapping_lr_scale is for HDiT's mapping network"),
        ([], {"buckets": True}, "takes one square size"),
    ],
)
def test_wrong_flags(flags, config, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse(tmp_path, *flags, **config)
    error = " ".join((str(refusal.value) + capsys.readouterr().err).split())
    assert re.search(message, error), error
