"""The benchmarks run, report finite numbers, and compare what computes the same. Nothing is timed as a test."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, randomize, relative_error

from diffusers_hdit import HDiTModel
from diffusers_hdit.evaluation.profiler import profile_model


@pytest.fixture(autouse=True)
def path_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


def run_quick(path, only, *flags):
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "run.py"),
        "--quick",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [*command, "--only", only, "--json", str(path), *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # NaN and infinity are no JSON.
    return done.stdout, json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    "only, names",
    [
        ("b,unet,natten,loading", ["parts", "unet", "natten", "loading"]),
        pytest.param("matmuls", ["matmuls"], marks=pytest.mark.slow),
        pytest.param("presets,resolution", ["presets", "resolution"], marks=pytest.mark.slow),
        pytest.param("backends,imports", ["backends", "imports"], marks=pytest.mark.slow),
    ],
)
def test_quick(tmp_path, only, names):
    printed, report = run_quick(tmp_path / "report.json", only)
    assert [table["name"] for table in report["tables"]] == names
    assert report["versions"]["torch"] == torch.__version__ and report["machine"]["threads"] == 1
    assert "--quick" in report["command"]
    for table in report["tables"]:
        assert f"## {table['title']}\n" in printed
        assert table["rows"] or table["notes"]
        measured = [cell for row in table["rows"] for cell in row if isinstance(cell, dict)]
        assert measured or not table["rows"]
        for cell in measured:
            assert cell["unit"] in ("s", "x") and cell["count"] == len(cell["samples"]) >= 1
            low, high = cell["middle_half"]
            assert 0 < min(cell["samples"]) <= low <= cell["median"] <= high <= max(cell["samples"]) < math.inf
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "speed"], "'speed': allowed are a (backends)"),
        (["--json", "no/such/folder.json"], "the folder of no/such/folder.json does not exist"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_refused_before_work_starts(flags, message, capsys):
    import run

    with pytest.raises(SystemExit):
        run.parse_args(flags)
    assert message in capsys.readouterr().err


SMALL = {
    "sample_size": 64, "patch_size": 2, "widths": (32, 48, 64), "depths": (2, 1, 2), "attention_head_dim": 16,
    "mapping_width": 32, "window_size": 4, "attention_types": ["shifted_window", "shifted_window", "global"],
    "num_classes": 3,
}  # fmt: skip


def test_the_reference_windows_compute_what_ours_do():
    """Output and gradients; the odd levels' shifts and rectangular images included."""
    from reference_windows import ReferenceNetwork

    model = randomize(HDiTModel(**SMALL))
    reference = ReferenceNetwork(model)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 64, 32, generator=generator)
    args = (sample, torch.tensor([0.3, -0.7]), torch.tensor([0, 2]))
    expected, output = model(*args).sample, reference(*args)[0]
    assert relative_error(output, expected) < 1e-5
    expected.square().mean().backward()
    inner = model.transformer_blocks[0].attn
    wanted = {
        "qkv": torch.cat([layer.weight.grad for layer in (inner.to_q, inner.to_k, inner.to_v)]),
        "scale": inner.scale.grad,
        "norm1": model.transformer_blocks[0].norm1.linear.weight.grad,
    }
    patches = model.patch_in.proj.weight.grad.clone()
    model.zero_grad()
    output.square().mean().backward()
    for name, gradient in wanted.items():
        assert relative_error(getattr(reference.middle[0], name).grad, gradient) < 1e-4, name
    # Behind everything else.
    assert relative_error(model.patch_in.proj.weight.grad, patches) < 1e-4


def test_reference_windows_of_another_network():
    from reference_windows import ReferenceNetwork

    with pytest.raises(ValueError, match="must be of type 'shifted_window' or 'global'"):
        ReferenceNetwork(HDiTModel(**{**SMALL, "attention_types": None}))


@pytest.mark.parametrize("by_onednn", [False, True])
def test_recorded_products_are_those_of_the_network(by_onednn, monkeypatch):
    """Linear layers as `profile_model` counts them; in the backward pass two for each but the first, which has no input."""
    from matmuls import Replay, record

    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without oneDNN.")
    monkeypatch.setattr(sys.modules["diffusers_hdit.ops.linear"], "_mkl_is_slow", lambda: by_onednn)
    config = {**SMALL, "attention_types": ["shifted_window", "none", "global"]}
    model = randomize(HDiTModel(**config))
    sample = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    profile = profile_model(config)
    linear_macs = profile.macs - sum(level.attention_macs for level in profile.levels)

    def macs(recorded, kind):
        return sum(product.macs * count for product, count in recorded.products.items() if product.kind == kind)

    with torch.no_grad():
        forward = record(lambda: model(sample, 0.3))
    attention_macs = sum(level.attention_macs for level in profile.levels)
    assert macs(forward, "linear") == linear_macs and macs(forward, "attention") == attention_macs
    assert not forward.opaque

    both = record(lambda: model(sample, 0.3).sample.square().mean().backward())
    # Layers whose input needs no gradient: the patches, and the embeddings of time and augmentation.
    first = model.patch_in.proj.weight.numel() * 32 * 32 + 2 * 32 * 32
    assert macs(both, "linear") == 3 * linear_macs - first
    assert macs(both, "attention") == 3 * attention_macs
    assert any(product.by_onednn for product in both.products) == by_onednn
    Replay(both.products, torch.device("cpu"))()


def test_products_of_an_attention_kernel():
    from matmuls import RecordProducts, Replay

    query = torch.randn(2, 3, 8, 16, requires_grad=True)
    key, value = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(2))
    with RecordProducts() as recorded:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    shapes = Counter()
    for product, count in recorded.products.items():
        shapes[product.shapes] += count
        assert [tuple(x.shape) for x in product.operands(torch.device("cpu"))] == list(product.shapes)
    assert shapes == {
        ((6, 8, 16), (6, 16, 20)): 2,  # scores, gradient of the probabilities
        ((6, 8, 20), (6, 20, 16)): 2,  # output, gradient of the queries
        ((6, 20, 8), (6, 8, 16)): 2,  # gradients of keys and values
    }
    Replay(recorded.products, torch.device("cpu"))()


def test_samples_and_numbers():
    from measure import Samples, Table, number

    a, b = Samples([2.0, 4.0, 9.0]), Samples([1.0, 2.0, 3.0])
    assert a.median == 4 and a.middle_half == (3.0, 6.5)
    assert a.over(b).values == [2, 2, 3] and str(a.over(b)) == "2 (2 to 2.5)"
    assert str(Samples([0.0123])) == "12.3 (12.3 to 12.3)"
    assert [number(value) for value in (12345.6, 99.94, 1.5, 0.0123, 0.0)] == ["12,346", "99.9", "1.5", "0.0123", "0"]
    with pytest.raises(ValueError, match="1 cells for the 2 columns"):
        Table("t", "T", ["one", "two"]).add(1)


def test_turns_alternate():
    from measure import Bench

    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = Bench(torch.device("cpu"), most=4).turns(calls)
    assert [len(samples.values) for samples in times.values()] == [4, 4]
    # Each is first as often as the other.
    assert "".join(order[-8:]) == "baab" * 2
