"""Every reader of files gets valid ones that were changed at random: it returns a result, or says in a sentence what is wrong."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, randomize
from running import CONFIG
from safetensors.torch import save_file

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.conversion import read_checkpoint, read_config, weights_to_reference
from diffusers_hdit.data.metadata import read_metadata
from diffusers_hdit.evaluation.metrics import load_adm_statistics
from diffusers_hdit.training.checkpointing import verify
from diffusers_hdit.training.config import TrainingConfig, read_json
from diffusers_hdit.training.monitoring import read_lines
from diffusers_hdit.training.trainer import check_network


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = [100, pytest.param(2000, marks=pytest.mark.slow)]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1000),
    st.sampled_from([1e30, -1.5, 0.5, float("nan"), float("inf")]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed_json(draw, valid):
    """The valid value with one or two parts replaced or deleted."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            return draw(VALUES)
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()) or isinstance(inner, list):
            inner[path[-1]] = draw(VALUES)
        else:
            del inner[path[-1]]
    return value


@st.composite
def changed_bytes(draw, valid):
    """The valid bytes cut off, with some of them changed, or with others inserted."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["cut", "change", "insert"]))
        if kind == "cut":
            del data[i:]
        elif kind == "change" and data:
            data[i] = draw(st.integers(0, 255))
        else:
            data[i:i] = draw(st.binary(max_size=8))
    return bytes(data)


def feed(examples, strategy, read, name=""):
    """Call `read` with values of a strategy; only ValueError and OSError may come out of it, and they name the file."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def check(value):
        try:
            read(value)
        except (ValueError, OSError) as error:
            assert str(error).strip() and name in str(error), f"an error that does not name {name!r}: {error}"

    check()


def network_config():
    return {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_configs_of_networks(examples):
    full = {**network_config(), "num_classes": 3, "dropout": [0.1, 0.0, 0.0], "ff_widths": [32, 48, 64]}

    def read(config):
        with torch.device("meta"):
            HDiTModel.from_config(config)

    feed(examples, changed_json(full).filter(lambda x: isinstance(x, dict)), read)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_configs_of_trainings(examples, tmp_path):
    valid = {**CONFIG, "scheduler": {"sigma_min": 0.01}, "noise_density_params": {"image_d": 64}, "ema_decay": [0.99]}
    path = tmp_path / "config.json"

    def read(config):
        path.write_text(json.dumps(config))
        flags = {"output_dir": str(tmp_path / "run"), "dataset_name": "fluent-faces"}
        check_network(TrainingConfig.from_sources(flags, read_json(str(path), "config")))

    feed(examples, changed_json(valid), read)


@pytest.fixture(scope="module")
def reference_files(tmp_path_factory):
    """A checkpoint of the reference and its configuration."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    model = randomize(HDiTModel(**{**SMALL, "widths": (16, 32), "depths": (1, 1)}))
    config = {
        "model": {
            "type": "image_transformer_v2", "input_channels": 3, "input_size": [32, 32], "patch_size": [2, 2],
            "widths": [16, 32], "depths": [1, 1], "d_ffs": [48, 96], "mapping_width": 32, "mapping_d_ff": 96,
            "mapping_depth": 2, "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0, "dropout_rate": [0.0, 0.0],
            "self_attns": [{"type": "neighborhood", "d_head": 16, "kernel_size": 3}, {"type": "global", "d_head": 16}],
        },
        "dataset": {"num_classes": 0},
    }  # fmt: skip
    weights = {name: value.contiguous() for name, value in weights_to_reference(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config)})
    torch.save({"model_ema": weights, "config": config}, folder / "model.pth")
    return folder, config


@pytest.mark.parametrize("examples", EXAMPLES)
def test_configs_of_k_diffusion(examples, reference_files, tmp_path):
    folder, config = reference_files
    path = tmp_path / "config.json"
    HDiTPipeline.from_k_diffusion(folder / "model.safetensors", config)

    def read(value):
        path.write_text(json.dumps(value))
        HDiTPipeline.from_k_diffusion(folder / "model.safetensors", path)

    feed(examples, changed_json(config), read)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_checkpoints_of_k_diffusion(examples, name, reference_files, tmp_path):
    valid = (reference_files[0] / name).read_bytes()
    path = tmp_path / name

    def read(data):
        path.write_bytes(data)
        read_checkpoint(path)

    feed(examples, changed_bytes(valid), read, name)


READERS = {
    "metadata.csv": lambda path: list(read_metadata(str(path))),
    "metadata.jsonl": lambda path: list(read_metadata(str(path))),
    "statistics.npz": load_adm_statistics,
    "config.json": lambda path: (read_json(str(path), "config"), read_config(path)),
    "metrics.jsonl": read_lines,
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", READERS)
def test_files(examples, name, tmp_path):
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("file_name,label,temperature\na.png,cat,1.5\nb.png,dog,-2\n", encoding="utf-16")
    elif name.endswith("npz"):
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    elif name == "config.json":
        path.write_text(json.dumps(CONFIG))
    else:
        path.write_text('{"file_name": "a.png", "label": "cat", "step": 1}\n{"file_name": "b.png", "step": 2}\n')
    valid = path.read_bytes()
    READERS[name](path)

    def read(data):
        path.write_bytes(data)
        READERS[name](path)

    feed(examples, changed_bytes(valid), read, name)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_checksums(examples, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")

    def read(value):
        (tmp_path / "checksums.json").write_text(json.dumps(value))
        assert isinstance(verify(tmp_path), str)

    feed(examples, changed_json({"model.safetensors": "0" * 64}), read)


@pytest.mark.parametrize("labels", [torch.tensor(1), torch.tensor([[1]]), "cat", [1.5], {}, object(), [None], [[1]]])
def test_labels_of_a_wrong_shape(labels, make_model):
    from diffusers import EDMEulerScheduler

    pipe = HDiTPipeline(make_model(num_classes=3), EDMEulerScheduler(), id2label={"0": "a", "1": "b", "2": "c"})
    pipe.set_progress_bar_config(disable=True)
    try:
        assert len(pipe(class_labels=labels, num_inference_steps=1).images) == 1
    except ValueError as error:
        assert "class" in str(error)
