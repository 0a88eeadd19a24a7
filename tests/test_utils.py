"""Files are written whole or not at all; command lines say which flag was meant."""

import os

import pytest

from diffusers_hdit.utils.arguments import ArgumentParser
from diffusers_hdit.utils.files import atomic_path, write_atomically


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_at_once(tmp_path, durable):
    path = tmp_path / "result.json"
    write_atomically(path, "old", durable)
    with atomic_path(path, durable) as partial:
        assert partial.suffix == ".json" and partial.parent == tmp_path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["result.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    with pytest.raises(OSError, match="full"), atomic_path(path) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["result.json"]


def test_a_folder(tmp_path):
    with atomic_path(tmp_path / "folder", durable=True) as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outptu", "x"], "error: unknown flag --outptu; did you mean --output?\n"),
        (["--output", "x", "--number=3", "--nubmer=3"], "error: unknown flag --nubmer; did you mean --number?\n"),
        (["--output", "x", "--zebra"], "error: unknown flag --zebra. --help lists all flags.\n"),
        (["--outp", "x"], "error: unknown flag --outp; did you mean --output?\n"),
        ([], "error: the following arguments are required: --output\n"),
        (["--output", "x", "--number", "many"], "error: argument --number: invalid int value: 'many'\n"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    parser = ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err == message
