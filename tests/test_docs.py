"""The documentation, the workflows and the metadata that a visitor of the repository sees."""

import configparser
import importlib.util
import re
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY


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
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")}
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
