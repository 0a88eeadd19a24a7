import os
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, kept_bytes

from diffusers_hdit import HDiTModel, presets
from diffusers_hdit.evaluation.profiler import profile_model
from diffusers_hdit.ops.registry import reference


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac"),
    [("imagenet-128", 117.0, 31.4), ("imagenet-256", 557.4, 197.6), ("ffhq-1024", 85.1, 206.1)],
)
def test_the_papers_table(preset, parameters, gmac):
    """Crowson et al. 2024, table 7."""
    profile = profile_model(presets.load(preset)["model"])
    assert round(profile.parameters / 1e6, 1) == parameters
    assert round(profile.macs / 1e9, 1) == gmac


def test_share_of_each_level():
    profile = profile_model(presets.load("ffhq-1024")["model"])
    shares = [round(100 * level.macs / profile.macs, 1) for level in profile.levels]
    assert shares[:5] == [28.7, 27.9, 15.5, 18.4, 3.5]
    neighborhood = sum(level.attention_macs for level in profile.levels[:3])
    assert round(100 * neighborhood / profile.macs, 1) == 2.7


def test_against_a_real_model_and_pytorchs_own_counter():
    """Parameters of a model that exists; FLOPs as PyTorch counts them where no kernel loads more keys than it needs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = {**SMALL, "attention_types": ["global", "shifted_window", "none"], "window_size": 4, "num_classes": 3}
    model = HDiTModel(**config)
    profile = profile_model(config)
    assert profile.parameters == sum(p.numel() for p in model.parameters())
    # The fused attention kernels of the CPU are unknown to the counter; two matrix products are not.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 32), 0.0)
    assert profile.macs == counter.get_total_flops() / 2


@pytest.mark.parametrize("types", [None, ["shifted_window", "none", "global"]])
def test_activation_memory_is_what_autograd_keeps(types):
    config = {**SMALL, "attention_types": types, "window_size": 4}
    model = HDiTModel(**config).bfloat16()
    model.set_neighborhood_backend("tiled")
    with reference():
        assert profile_model(config).activation_bytes == pytest.approx(kept_bytes(model), rel=0.1)


def test_command_line():
    def run(*args):
        command = [sys.executable, "-m", "diffusers_hdit.evaluation.profiler", *args]
        # Without kernels none is compiled, which would be announced.
        environment = {**os.environ, "DIFFUSERS_HDIT_KERNELS": "0"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run("--preset", "ffhq-1024")
    assert "85.1M" in done.stdout and "206.1" in done.stdout and "28.7%" in done.stdout
    assert done.returncode == 0 and not done.stderr
    assert "geglu" in done.stdout and "normalize_and_rotate" in done.stdout, "the kernels that would run"
    # Four times the pixels, four times the work of a local level.
    done = run("--preset", "tiny")
    assert "123.9M" in done.stdout and "139.3k" in done.stdout and " 0.0" not in done.stdout.replace(" 0.0%", "")
    assert "one image: 4.4 MiB" in done.stdout
    done = run("--preset", "tiny", "--resolutoin", "32")
    assert done.returncode == 2 and done.stderr == "error: unknown flag --resolutoin; did you mean --resolution?\n"
    done = run("--preset", "tiny", "--resolution", "30")
    assert done.returncode == 1 and "must be a multiple of" in done.stderr


MISTAKE = """
import sys
from diffusers_hdit.cli import main
try:
    main([sys.argv[1], "--pipelin", "x"])
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "diffusers", "accelerate"} & set(sys.modules)
"""


@pytest.mark.parametrize("command", ["sample", "evaluate", "profile"])
def test_wrong_flags_are_refused_before_pytorch_is_imported(command):
    done = subprocess.run([sys.executable, "-c", MISTAKE, command], capture_output=True, text=True)
    meant = "--help lists all flags." if command == "profile" else "did you mean --pipeline?"
    assert done.returncode == 0 and done.stderr.startswith("error: unknown flag --pipelin") and meant in done.stderr
