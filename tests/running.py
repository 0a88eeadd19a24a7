"""What tests of the example scripts share: a run that takes seconds, and how to start it."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile

import torch
from conftest import REPOSITORY, SMALL
from safetensors.torch import load_file


EXAMPLES = REPOSITORY / "examples"
RESEARCH = EXAMPLES / "research"
SHEET = REPOSITORY / "src" / "diffusers_hdit" / "data" / "fluent_faces_64.png"
TRAIN = EXAMPLES / "train_hdit.py"
CONFIG = {
    "dataset_name": "fluent-faces",
    "label_column": "label",
    "random_flip": True,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "validation_steps": 3,
    "logging_steps": 1,
    "num_validation_images": 2,
    "learning_rate": 2e-3,
    "mixed_precision": "no",
    "model": {**SMALL, "sample_size": 16, "widths": [32, 32], "depths": [1, 1], "dropout": 0.1},
}
NO_DROPOUT = {"model": {**CONFIG["model"], "dropout": 0.0}}


class Images(list):
    """Tensors, as `evaluator.real_images` reads them from a dataset."""

    resolution, in_channels = (8, 8), 3

    @property
    def fingerprint(self):
        return hashlib.sha256(b"".join(image.numpy().tobytes() for image in self)).hexdigest()

    def __getitem__(self, item):
        return {"image": super().__getitem__(item[0])}


def load_example(name, folder=EXAMPLES):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_config(folder, **overrides):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **overrides}))
    return path


def start(*command, threads="1"):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def run(*command, threads="1"):
    """
    Run a script to its end in a process of its own, and return what it printed.

    Importing PyTorch and Diffusers takes longer than most of these runs: the process is forked from one that has imported
    them and done nothing else, unless the environment says otherwise since then.
    """
    if command[0] == "-m" or environment() != environment_at_start:
        return finish(start(*command, threads=threads))
    with tempfile.NamedTemporaryFile("w+") as output:
        arguments = [*map(str, command)]
        process = forks.Process(target=run_script, args=(arguments, threads, os.getcwd(), output.name))
        process.start()
        process.join()
        printed = output.read()
    assert process.exitcode == 0, printed
    return printed


def run_script(command, threads, folder, output):
    """In the forked process: as `python SCRIPT ARGUMENTS`."""
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    torch.set_num_threads(int(threads))
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    runpy.run_path(command[0], run_name="__main__")


def environment():
    """The variables that decide what a run does; libraries set others when they are imported."""
    prefixes = ("ACCELERATE_", "CXX", "DIFFUSERS_", "HF_", "HOME", "PATH", "PYTHON", "TORCH_EXTENSIONS_DIR", "XDG_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["diffusers_hdit.training.trainer", "torch.utils.tensorboard", "datasets"])
environment_at_start = environment()


def launch(*arguments, **options):
    return finish(start_launch(*arguments, **options))


def start_launch(kind, *arguments, processes=2, script=TRAIN):
    """Through `accelerate launch`, on this machine's cores: "ddp", "fsdp2" or "deepspeed"."""
    flags = {
        "ddp": ["--multi_gpu"],
        "fsdp2": ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
        "deepspeed": ["--use_deepspeed", "--zero_stage", 2],
    }[kind]
    sharding = [] if kind == "ddp" else [REPOSITORY / "tests" / "shard_on_cpu.py"]
    return start(
        "-m", "accelerate.commands.launch", *flags, "--num_processes", processes, "--num_machines", 1,
        "--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", free_port(), *sharding, script,
        *arguments,
    )  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
