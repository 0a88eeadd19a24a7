import subprocess
import sys

import pytest

from diffusers_hdit.utils import memory


HELD = """
import platform, resource, torch
from pathlib import Path
from diffusers_hdit.utils.memory import keep_freed_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def by_a_freed_tensor():
    before = held()
    torch.zeros(2**26, dtype=torch.uint8).fill_(1)
    return held() - before

by_a_freed_tensor()
left = by_a_freed_tensor()
assert left < 8, left
assert keep_freed_memory()
left = by_a_freed_tensor()
assert left > 56, left
"""


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="Needs glibc.")
def test_freed_memory_is_kept():
    subprocess.run([sys.executable, "-c", HELD], check=True)


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
