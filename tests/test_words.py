"""The project's names, messages and pages use the field's words, not words of its own.

Names are checked word by word: `draw_many` holds the word "draw". Prose is checked in docstrings, messages and pages.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY


SOURCES = sorted([*REPOSITORY.glob("src/**/*.py"), *REPOSITORY.glob("examples/**/*.py")])
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/**/*.md")])

# Words that no public name contains, and what to say instead.
WORDS_IN_NAMES = {
    "draw|draws|drawn|drew": "generate, sample",
    "turn|turns|turned": "rotate, rotated",
    "plan|plans": "summary, cached",
    "watch": "TrainingMonitor",
    "facts": "metadata, settings",
    "kind|kinds": "processor, type",
    "formula|formulas": "reference",
    "picture|pictures": "image, grid",
    "enlarge|enlarged": "prepare_condition, resize",
    "tidy": "normalize",
    "bare": "unwrap",
    "damage|damaged": "verify, corrupt",
    "whatever": "force",
    "fac": "lerp_weight",
    "enough": "min_size",
}
# Whole names, in code and in prose.
NAMES = {
    "Watch": "TrainingMonitor",
    "Averages": "EMAWeights",
    "NumberedBatches": "ResumableBatchSampler",
    "many_images": "generate",
    "draw_many": "generate",
    "MetricsOnTheWay": "InTrainingEvaluator",
    "push_on_the_way": "push_intermediate",
    "computed_by_all": "distributed_map",
    "from_main": "broadcast_from_main",
    "on_main": "distributed_map",
    "CarriesCode": "RemoteCodeMixin",
    "NOT_WRITTEN_OUT": "STUBBED_IMPORTS",
    "make_attention_kind": "a processor",
    "scale_and_turn": "normalize_and_rotate",
    "has_kernels": "ops availability",
    "bad_in_row": "consecutive_skips",
    "ema_lengths": "ema_sigma_rel",
    "earlier_parts": "sessions",
}
# Whole names of functions and arguments, which mean something else within longer names or in prose.
SHORT_NAMES = {"on": "to_device", "cond": "temb", "small": "low_res_image", "parts": "design choices, sessions, steps"}
PROSE = {
    r"draws?|drawn|drew|drawings?": "generate, sample; plot",
    r"go(?:es|ing)? on|went on|gone on": "resume, continue",
    r"turned": "rotated",
    r"plans?": "summary, cached tensors",
    r"formulas?": "reference",
    r"pictures?": "image, grid",
    r"attention kinds?|kinds? of attention": "attention type, processor",
    r"facts?": "metadata, settings",
    r"on the way": "during training",
    r"(?:the|its) paper's parts?": "design choices",
}  # fmt: skip

# Ordinary uses, which are taken out of the text before it is checked.
ALLOWED_PROSE = [
    r"ImageDraw",
    r"(?:draws?|drawn|drawing) (?:a |the |an )?(?:plots?|curves?|lines?|frames?|text)\b",
    r"(?:uniform|log-scale|stretch's) draws?|number of draws",
    r"on the way (?:up|down)\b",
    r"draw(?:s|n)? (?:independently |uniformly |anew |again )?(?:from|at random|uniformly|independently)\b",
    r"random(?:ly)? draw(?:s|n)?",
    r"turned (?:on|off|into|out)\b",
    r"in fact\b",
    # Names on disk and aliases that stay readable.
    r"training_facts\.json",
    r"\bfac\b",
    r"--ema_lengths|\"ema_lengths\"|'ema_lengths'|\A(?:--)?ema_lengths\Z",
]
ALLOWED_NAMES = {
    "ImageDraw",
    # Random numbers are drawn, and so are plots.
    "draw_transforms",
    "draw_curve",
    "draw_plot",
}


def words(name: str) -> list[str]:
    """Split snake_case and CamelCase names into words of lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def public_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield functions, classes, their fields and arguments, and constants, with the lines that they are in."""

    def visit(body: list[ast.stmt], fields: bool) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if node.name.startswith("_") and not node.name.startswith("__"):
                    continue
                yield node.name, node.lineno
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, True)
                else:
                    a = node.args
                    for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
                        if arg is not None:
                            yield arg.arg, arg.lineno
            elif fields and isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((t.id, t.lineno) for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_"))
            elif isinstance(node, (ast.If, ast.Try)):
                yield from visit(node.body, fields)

    yield from visit(tree.body, True)


def wrong_name(name: str, banned: dict[str, str] = WORDS_IN_NAMES) -> str | None:
    """Return what to say in place of a name, or None if it is a good one."""
    if name in ALLOWED_NAMES:
        return None
    if name in NAMES or name in SHORT_NAMES:
        return NAMES.get(name) or SHORT_NAMES[name]
    return next((better for word, better in banned.items() if set(words(name)) & set(word.split("|"))), None)


def wrong_prose(text: str) -> Iterator[tuple[str, str]]:
    """Yield each word of a text that is not the field's, and what to say instead."""
    for allowed in ALLOWED_PROSE:
        text = re.sub(allowed, " ", text, flags=re.IGNORECASE)
    for pattern, better in PROSE.items():
        for found in re.finditer(rf"(?<![\w-])(?:{pattern})(?!\w)", text, flags=re.IGNORECASE):
            yield text[max(0, found.start() - 25) : found.end() + 15].replace("\n", " "), better
    for name in re.findall(r"\w+", text):
        if name in NAMES:
            yield name, NAMES[name]


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names(path):
    wrong = [f"{path.stem} (the module): {better}" for better in [wrong_name(path.stem)] if better]
    for name, line in public_names(ast.parse(path.read_text())):
        if better := wrong_name(name):
            wrong.append(f"{line}: {name}: {better}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_and_messages(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A key or a name by itself is no prose.
            texts = wrong_prose(node.value) if re.search(r"\s", node.value) else ()
            wrong += [f"{node.lineno}: ...{found}...: {better}" for found, better in texts]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages(path):
    text = path.read_text()
    if path.name == "CHANGELOG.md":  # names that were renamed are in code spans
        text = re.sub(r"`[^`]*`", "", text)
    wrong = [f"...{found}...: {better}" for found, better in wrong_prose(text)]
    assert not wrong, "\n".join(wrong)


def test_wrong_words_are_found():
    tree = ast.parse("class Watch:\n    facts: dict\n    def f(self, kind): ...\ndef scale_and_turn(x): ...\n")
    assert {name for name, _ in public_names(tree) if wrong_name(name)} == {
        "Watch",
        "facts",
        "kind",
        "scale_and_turn",
    }
    assert wrong_name("kinder") is None and wrong_name("redrawn") is None and wrong_name("attention_kind")
    assert [better for _, better in wrong_prose("Draws images.\nAn interrupted run goes\non.")]
    assert not list(wrong_prose("Noise is drawn from N(0, 1). It turned out to be random; withdrawn."))
