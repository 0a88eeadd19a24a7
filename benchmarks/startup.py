"""What it takes until something runs: imports, in processes of their own, and loading a large model."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import SOURCE, Bench, Table, randomize

from diffusers_hdit import HDiTModel, presets


IMPORTS = {
    "import torch, diffusers": "import torch, diffusers",
    "import diffusers_hdit": "import diffusers_hdit",
    "import torch, diffusers, diffusers_hdit": "import torch, diffusers, diffusers_hdit",
    "from diffusers_hdit import HDiTModel, HDiTPipeline": "from diffusers_hdit import HDiTModel, HDiTPipeline",
    "from diffusers import DiTTransformer2DModel, DiTPipeline": (
        "from diffusers import DiTTransformer2DModel, DiTPipeline"
    ),
    "nothing": "pass",
}


def imports_table(bench: Bench) -> Table:
    base = "import torch, diffusers"
    table = Table("imports", "Imports, in new processes that take turns", ["code", "ms", f"over {base}"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}

    def call(code: str):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, env=environment)

    names = [base, "import diffusers_hdit"] if bench.quick else list(IMPORTS)
    times = bench.turns({name: call(IMPORTS[name]) for name in names}, 3 * bench.seconds)
    for name, seconds in times.items():
        table.add(name, seconds, seconds.over(times[base]) if name != base else None)
    return table


def read(folder: Path) -> int:
    """Reads the files whole, into one buffer that is used again."""
    buffer, count = bytearray(2**24), 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                count += size
    return count


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the files' content, so that the disk is read."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading_table(bench: Bench) -> Table:
    name = "tiny" if bench.quick else "imagenet-256"
    table = Table(
        "loading",
        f"from_pretrained of {name} (float32) beside reading its file",
        ["file", "what", "ms", "GB/s", "over reading"],
        notes=["The model is loaded into the memory of the processor. Reading goes through a buffer of 16 MB."],
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        randomize(HDiTModel(**presets.load(name)["model"])).save_pretrained(folder)
        calls = {"read": lambda: read(folder), "from_pretrained": lambda: HDiTModel.from_pretrained(folder)}

        def from_disk(call):
            def run():
                drop_from_cache(folder)
                return call()

            return run

        size, ways = read(folder), {"cached by the system": calls}
        if hasattr(os, "posix_fadvise"):
            ways["on disk"] = {what: from_disk(call) for what, call in calls.items()}
        for where, pair in ways.items():
            times = bench.turns(pair)
            for what, seconds in times.items():
                table.add(
                    where, what, seconds, size / seconds.median / 1e9,
                    seconds.over(times["read"]) if what != "read" else None,
                )  # fmt: skip
    return table
