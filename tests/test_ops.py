"""Operations find their kernels in one registry; a report says what would run and why."""

import pytest
import torch

from diffusers_hdit import HDiTModel, ops
from diffusers_hdit.ops import kernels
from diffusers_hdit.ops.geglu import geglu_reference


@pytest.fixture
def registry(monkeypatch):
    """The registered kernels, restored at the end."""
    monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS)
    before = {name: dict(entries) for name, entries in kernels.KERNELS.items()}
    yield kernels.KERNELS
    kernels.KERNELS.clear()
    kernels.KERNELS.update(before)


def test_a_kernel_from_outside_runs_and_is_reported(registry, make_model):
    calls = []

    def mine(x):
        calls.append(x.shape)
        return geglu_reference(x)

    kernel = ops.Kernel("mine", mine, accepts=lambda x: x.shape[-1] == 8, problem=lambda device, dtype: None)
    ops.register_kernel("geglu", kernel)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ops.geglu(x), geglu_reference(x))
    ops.geglu(torch.randn(2, 3, 10))
    assert calls == [(2, 3, 8)], "the other shape is left to the next kernel"
    assert "geglu" in str(ops.report(make_model())) and "mine" in str(ops.report(make_model()))


def test_an_attention_kernel_from_outside_is_a_backend(registry, make_model):
    def mine(query, key, value, kernel_size, scale, norm=None, cos=None, sin=None):
        calls.append(kernel_size)
        if norm is not None:
            rotary = None if cos is None else (cos, sin)
            query, key = (ops.normalize_and_rotate(x, norm**2, rotary) for x in (query, key))
        return ops.neighborhood_attention(query, key, value, kernel_size, scale, backend="dense")

    def problem(device_type, dtype, head_dim):
        return None if head_dim == 16 else "it is for heads of 16 channels"

    calls, model = [], make_model()
    inputs = torch.randn(1, 3, 32, 32), 0.0
    expected = model(*inputs).sample
    ops.register_kernel("neighborhood_attention", ops.Kernel("mine", mine, lambda *args: True, problem))
    torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert calls, "auto takes it"
    calls.clear()
    model.set_neighborhood_backend("mine")
    model(*inputs)
    assert calls
    assert "mine" in str(ops.report(model))
    other = ops.report(HDiTModel(sample_size=64, patch_size=2, widths=(32, 64), depths=(1, 1), attention_head_dim=32))
    assert "not mine: it is for heads of 16 channels" in str(other)


def test_without_kernels_everything_is_the_reference(make_model):
    model, inputs = make_model(), (torch.randn(1, 3, 32, 32), 0.0)
    with ops.reference():
        assert not ops.kernels_enabled()
        by_reference = model(*inputs).sample
        text = str(ops.report(model))
    assert ops.kernels_enabled() and "switched off" in text and "tiled" in text
    torch.testing.assert_close(model(*inputs).sample, by_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", None])
def test_reports_for_devices_that_are_not_there(device):
    with torch.device("meta"):
        model = HDiTModel.from_preset("ffhq-1024")
    report = ops.report(model, device, torch.bfloat16)
    assert len(report.rows) == 5 + 4
    assert all(row.kernel for row in report.rows)
    if device == "cuda":
        choices = {row.kernel for row in report.rows[:3]}
        assert choices <= {"triton", "natten", "tiled"}
        assert choices == {"triton"} or "Triton is not installed" in str(report)
