"""The documentation, the workflows and the metadata that a visitor of the repository sees."""

import configparser
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

import diffusers_hdit
from diffusers_hdit.training.config import TrainingConfig


YAML_FILES = [
    "mkdocs.yml", "CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/test.yml", ".github/ISSUE_TEMPLATE/bug_report.yml"
]  # fmt: skip
PAGES = sorted(path.relative_to(REPOSITORY) for path in [*REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("*.md")])


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    return setup


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_files_parse(name):
    assert isinstance(yaml.safe_load((REPOSITORY / name).read_text()), dict)


def test_the_workflow_covers_the_oldest_and_the_newest_versions():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/test.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    setup = read_setup()
    oldest_python = setup["options"]["python_requires"].removeprefix(">=")
    requirements = dict(re.findall(r"^(\w+)>=([\d.]+)$", setup["options"]["install_requires"], flags=re.MULTILINE))
    oldest = {"python": oldest_python, "torch": requirements["torch"], "diffusers": requirements["diffusers"]}
    assert oldest in matrix
    newest_python = re.findall(r"Python :: (3\.\d+)$", setup["metadata"]["classifiers"], flags=re.MULTILINE)[-1]
    assert {"python": newest_python, "torch": "newest", "diffusers": "newest"} in matrix
    extras = set(setup["options.extras_require"])
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for named in re.findall(r"\.\[([\w,]+)\]", step.get("run", "")):
                assert set(named.split(",")) <= extras


def test_metadata():
    setup = read_setup()
    assert {"name", "version", "author", "url", "license", "keywords", "classifiers"} <= set(setup["metadata"])
    assert "py.typed" in setup["options.package_data"]["diffusers_hdit"].split()
    assert (REPOSITORY / "src/diffusers_hdit/py.typed").exists()


def test_ruff_is_one_version():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    pinned = re.search(r"^ruff==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert hooks["repos"][0]["rev"] == f"v{pinned}"


def heading_ids(text: str) -> set[str]:
    """The anchors that GitHub and mkdocs give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in heading_ids(file.read_text()), f"{page} links to {target}"


def modules_of_the_package() -> set[str]:
    package = REPOSITORY / "src" / "diffusers_hdit"
    files = {
        path.relative_to(package).as_posix() for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")
    }
    # A room's __init__.py is named only if it has something to say.
    return {f for f in files if not (f.count("/") and f.endswith("__init__.py") and not (package / f).read_text())}


def test_the_map_of_modules_is_complete():
    """docs/architecture.md has one line for each module, and none for a module that does not exist."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    block = re.search(r"^```\nsrc/diffusers_hdit/\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)[1]
    folder, named = [], []
    for line in block.splitlines():
        depth, (name, _, description) = (len(line) - len(line.lstrip())) // 2 - 1, line.strip().partition(" ")
        if name.endswith("/"):
            folder = [*folder[:depth], name]
            continue
        named.append("".join(folder[:depth]) + name)
        assert description.strip(), f"{name} has no description"
        assert len(line) <= 119
    assert sorted(named) == sorted(modules_of_the_package())


def test_modules_named_elsewhere_in_architecture_exist():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`((?:[\w.]+/)*[\w.]+\.py|(?:[\w.]+/)+)`", page):
        places = [REPOSITORY / name, REPOSITORY / "src" / "diffusers_hdit" / name]
        assert any(place.exists() for place in places), name


def test_documentation_says_dtype():
    for page in PAGES:
        assert "torch_dtype=" not in (REPOSITORY / page).read_text() or page.name == "CHANGELOG.md", page


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    index = (tmp_path / "site" / "api" / "models" / "index.html").read_text()
    assert 'id="diffusers_hdit.models.modeling_hdit.HDiTModel"' in index


def test_the_quickstart_notebook_runs(tmp_path):
    """Its code cells run one after another, with fewer steps, in a process and a folder of their own."""
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code, shortened = re.subn(r"^STEPS = \d+", "STEPS = 4", "\n\n".join(cells), flags=re.MULTILINE)
    assert shortened == 1
    (tmp_path / "quickstart.py").write_text(
        code + "\n\nassert images and (Path(OUTPUT_DIR) / 'model_index.json').exists()\n"
    )
    package = str(Path(diffusers_hdit.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "quickstart.py"], cwd=tmp_path, check=True, timeout=300, env=environment)


def documented() -> list[str]:
    """The modules and classes that the API reference has a `:::` line for."""
    pages = (path.read_text() for path in sorted((REPOSITORY / "docs" / "api").glob("*.md")))
    return re.findall(r"^::: (\S+)$", "\n".join(pages), flags=re.MULTILINE)


def test_the_api_reference_has_every_public_name():
    paths = documented()
    for name in diffusers_hdit.__all__:
        value = getattr(diffusers_hdit, name)
        path = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        assert path in paths or path.rpartition(".")[0] in paths, name


def public_functions(value) -> Iterator[tuple[str, Callable]]:
    """Yield what a module or class of this package defines itself, classes with their methods."""
    for name, member in vars(value).items():
        function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
        if not (getattr(function, "__module__", None) or "").startswith("diffusers_hdit"):
            continue
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if inspect.isclass(function):
            if inspect.ismodule(value) and function.__module__ == value.__name__:
                yield from public_functions(function)
        elif inspect.isfunction(function) and (inspect.isclass(value) or function.__module__ == value.__name__):
            yield f"{function.__module__}.{function.__qualname__}", function


@pytest.mark.parametrize("path", documented())
def test_public_functions_are_annotated(path):
    """The package is typed (py.typed), so parameters and results of its public functions have annotations."""
    module, _, name = path.rpartition(".")
    try:
        value = importlib.import_module(path)
    except ModuleNotFoundError:
        value = getattr(importlib.import_module(module), name)
    missing = []
    functions = [(path, value)] if inspect.isfunction(value) else public_functions(value)
    for function_name, function in functions:
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.annotation is parameter.empty and not variadic and parameter.name not in ("self", "cls"):
                missing.append(f"{function_name}: {parameter.name}")
        if signature.return_annotation is signature.empty and function.__name__ != "__init__":
            missing.append(f"{function_name}: what it returns")
    assert not missing, "\n".join(missing)


def test_flags_in_the_documentation_exist():
    """Every --flag that README and docs name is one of this project's, or of a tool in the list below."""
    sources = [
        p.read_text() for folder in ("src", "examples", "benchmarks") for p in (REPOSITORY / folder).rglob("*.py")
    ]
    flags = set(re.findall(r"\"(--\w+)\"", "\n".join(sources)))
    flags |= {f"--{field.name}" for field in dataclasses.fields(TrainingConfig)}
    others = {"--config_file", "--help", "--no-deps", "--signal"}  # accelerate, all, pip, Slurm
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", (REPOSITORY / page).read_text()))
        assert named <= flags | others, f"{page}: {', '.join(sorted(named - flags - others))}"


def test_names_that_architecture_places_in_a_module_are_there():
    page = " ".join((REPOSITORY / "docs" / "architecture.md").read_text().split())
    placed = re.findall(r"`([\w.]+)`(?:, and|,)? in `((?:\w+/)*\w+\.py)`", page)
    assert len(placed) > 4
    for name, module in placed:
        text = (REPOSITORY / "src" / "diffusers_hdit" / module).read_text()
        assert re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b|^{name} = ", text, flags=re.MULTILINE), (
            name,
            module,
        )
