"""LoRA adapters of networks and pipelines, by Diffusers' own functions."""

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_hdit import HDiTModel, HDiTPipeline


peft = pytest.importorskip("peft")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
INPUTS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, -0.7])


def plain_pipeline(make_model):
    torch.manual_seed(7)  # of the Fourier features
    return HDiTPipeline(make_model(), EDMEulerScheduler())


def run(pipe):
    with torch.no_grad():
        return pipe.transformer(*INPUTS).sample


def adapted(make_model, name="default", seed=0):
    pipe = plain_pipeline(make_model)
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False), name
    )
    return pipe


def save_adapter(pipe, folder):
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    HDiTPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def test_load_fuse_and_unload(make_model, tmp_path):
    pipe, plain = adapted(make_model), plain_pipeline(make_model)
    expected, base = run(pipe), run(plain)
    assert not torch.allclose(expected, base)
    save_adapter(pipe, tmp_path)
    plain.load_lora_weights(tmp_path)
    assert torch.allclose(run(plain), expected, atol=1e-5)
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert torch.allclose(run(plain), expected, atol=1e-4)
    # Now it is part of the weights, which are saved as ever.
    plain.save_pretrained(tmp_path / "fused")
    assert torch.equal(run(HDiTPipeline.from_pretrained(tmp_path / "fused")), run(plain))


def test_several_adapters(make_model, tmp_path):
    outputs = []
    for i in range(2):
        pipe = adapted(make_model, seed=i)
        outputs.append(run(pipe))
        save_adapter(pipe, tmp_path / str(i))
    plain = plain_pipeline(make_model)
    for i in range(2):
        plain.load_lora_weights(tmp_path / str(i), adapter_name=f"style{i}")
    for i in range(2):
        plain.set_adapters(f"style{i}")
        assert torch.allclose(run(plain), outputs[i], atol=1e-5)
    plain.disable_lora()
    assert torch.equal(run(plain), run(plain_pipeline(make_model)))


def test_a_pipeline_with_adapters_is_not_saved_without_them(make_model, tmp_path):
    """It used to be loaded again with random weights where the adapters had been."""
    pipe = adapted(make_model)
    for saved in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"HDiTModel has LoRA adapters \(default\).*save_lora_adapter.*fuse_lora"):
            saved.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_adapters_are_read_from_safetensors_only(make_model):
    with pytest.raises(ValueError, match="use_safetensors=False was given"):
        HDiTPipeline(make_model(), EDMEulerScheduler()).load_lora_weights("folder", use_safetensors=False)


def test_low_cpu_mem_usage(make_model, tmp_path):
    """Diffusers refuses False for networks that keep some layers in float32."""
    pipe = HDiTPipeline(make_model(), EDMEulerScheduler())
    pipe.save_pretrained(tmp_path)
    for options in ({"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}):
        assert torch.equal(run(HDiTPipeline.from_pretrained(tmp_path, **options)), run(pipe))
        loaded = HDiTModel.from_pretrained(tmp_path / "transformer", **options)
        assert torch.equal(loaded(*INPUTS).sample, run(pipe))
