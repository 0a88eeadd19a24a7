"""What holds for the repository as a whole: imports, and the README's commands and snippets."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import REPOSITORY

import diffusers_hdit


README = (REPOSITORY / "README.md").read_text()


def test_public_names():
    for name in diffusers_hdit.__all__:
        assert getattr(diffusers_hdit, name) is not None
    assert set(diffusers_hdit.__all__) <= set(dir(diffusers_hdit))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        diffusers_hdit.nothing  # noqa: B018


def test_import_is_quick_and_needs_torch_and_diffusers_only():
    code = """
import sys, builtins
real = builtins.__import__
def guarded(name, *args, **kwargs):
    if name.partition('.')[0] in ('datasets', 'natten', 'peft', 'tensorboard', 'tqdm.auto'):
        caller = (args[0] or {}).get('__name__', '') if args else ''
        assert not caller.startswith('diffusers_hdit'), name
    return real(name, *args, **kwargs)
import diffusers_hdit
assert 'torch' not in sys.modules, 'import diffusers_hdit alone imports nothing heavy'
builtins.__import__ = guarded
from diffusers_hdit import HDiTModel, HDiTPipeline, diffusion, presets
HDiTModel(sample_size=16, patch_size=2, widths=[16], depths=[1], attention_head_dim=8, mapping_width=8)
assert 'natten' not in sys.modules and 'datasets' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def snippets(language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


@pytest.mark.parametrize("number", range(len(snippets("python"))))
def test_python_snippets_of_the_readme(number, tmp_path, monkeypatch, make_model):
    """Run unchanged, in a folder with a pipeline like that of `make demo` in demo/pipeline."""
    from diffusers import EDMDPMSolverMultistepScheduler

    from diffusers_hdit import HDiTPipeline

    labels = {0: "cat-face", 1: "face-smiling"}
    pipeline = HDiTPipeline(make_model(num_classes=2), EDMDPMSolverMultistepScheduler(), id2label=labels)
    pipeline.save_pretrained(tmp_path / "demo" / "pipeline")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets("python")[number], f"README.md, Python snippet {number}", "exec"), {})


@cache
def usage_of(*target: str) -> str:
    return subprocess.run([sys.executable, *target, "--help"], capture_output=True, text=True, check=True).stdout


def test_the_readmes_commands_exist():
    """Every script, console command and flag in the README's shell lines."""
    commands = "\n".join(snippets("bash")).replace("\\\n", " ").splitlines()
    assert any("make demo" in command for command in commands) and any("make test" in command for command in commands)
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands:
        words = command.split("#")[0].split()
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), command
        scripts = [word for word in words if word.endswith(".py")]
        modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m" and "hdit" in words[i + 1]]
        console = [["-m", "diffusers_hdit", words[1]]] if words[:1] == ["diffusers-hdit"] else []
        for target in [[REPOSITORY / s] for s in scripts] + [["-m", m] for m in modules] + console:
            usage = usage_of(*map(str, target))
            for flag in (word for word in words if word.startswith("--")):
                assert flag in usage, f"{flag} in: {command}"


def test_nothing_machine_specific():
    """No file names a path of a development machine."""
    words = [b"/wo" + b"rk/", b"/ro" + b"ot/", b"file:" + b"///opt"]
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    for file in tracked:
        if file.endswith((".py", ".md", ".cfg", ".toml", ".txt", ".json", "Makefile", "run")):
            content = (REPOSITORY / file).read_bytes()
            assert not [word for word in words if word in content], file


FLOORS = [
    "utils",
    "ops",
    "models",
    "schedulers",
    "diffusion",
    "pipelines",
    "data",
    "evaluation",
    "hub",
    "training",
    "cli",
]
LIBRARY = REPOSITORY / "src" / "diffusers_hdit"


def test_rooms_know_only_those_below():
    """Imports at the top of modules lead down; presets and conversion belong to no floor, and utils knows none."""
    wrong = []
    for path in LIBRARY.rglob("*.py"):
        module = path.relative_to(LIBRARY).with_suffix("").parts
        if module[0] not in FLOORS:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                target = (*module[: len(module) - node.level], *(node.module or "").split("."))
                target = target if target[0] else tuple(alias.name for alias in node.names)
                if target[0] in FLOORS and FLOORS.index(target[0]) > FLOORS.index(module[0]):
                    wrong.append(f"{'/'.join(module)} imports {'.'.join(target)}")
    assert not wrong
