"""Read the `metadata.csv` and `metadata.jsonl` files that say what the images of a folder are."""

import csv
import json
from collections.abc import Iterator


METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def read_metadata(path: str) -> Iterator[dict]:
    """
    Yield the rows of a metadata file as dicts, without their empty cells.

    UTF-8, UTF-16 and UTF-32 are read, with a byte order mark or without. Columns of a csv file may be separated by
    commas, semicolons or tabs; spaces around its cells are dropped, and all its cells are texts.

    Args:
        path: of a `.csv` file with a header, or of a `.jsonl` file with a JSON object in each line.

    Raises:
        ValueError: names the file, the line and, where there is one, the column: another encoding, broken JSON,
            missing or repeated columns.
    """
    with open(path, "rb") as file:
        # The first characters of both kinds of files are ASCII, which is what this needs.
        encoding = json.detect_encoding(file.read(4))
    try:
        # Bytes that are not UTF-8 come as lone surrogates, so that the message can say where they are.
        with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
            yield from (_read_csv if path.lower().endswith(".csv") else _read_json_lines)(file, path)
    except UnicodeError as error:
        raise ValueError(f"{path!r} begins as {encoding.upper()} but is not: {error}. Save it as UTF-8.") from error


def _read_csv(file, path) -> Iterator[dict]:
    delimiter = max(",;\t", key=file.readline().count)
    file.seek(0)
    reader, header = csv.reader(file, delimiter=delimiter, skipinitialspace=True), None
    previous_limit = csv.field_size_limit(2**31 - 1)  # a cell may hold a long text
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            for number, cell in enumerate(cells):
                column = header[number] if header and number < len(header) else f"number {number + 1}"
                _require_utf8(cell, f"{path!r}, line {reader.line_num}, column {column!r}")
            if header is None:
                header = cells
                if "file_name" not in header or len(set(header)) < len(header):
                    raise ValueError(
                        f"{path!r} must have a header with a column 'file_name' and no column twice; got {header}."
                    )
            elif any(cells[len(header) :]):
                raise ValueError(
                    f"{path!r}, line {reader.line_num} has {len(cells)} cells for the {len(header)} columns {header}. "
                    f"Put cells that contain {delimiter!r} in double quotes."
                )
            elif any(cells):
                yield {column: cell for column, cell in zip(header, cells, strict=False) if cell}
    except csv.Error as error:
        raise ValueError(f"{path!r}, line {reader.line_num} cannot be read as csv: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)


def _read_json_lines(file, path) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        _require_utf8(line, f"{path!r}, line {number}")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path!r}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path!r}, line {number} must be a JSON object; got {line.strip()[:80]!r}.")
        yield {key: value for key, value in row.items() if value is not None}


def _require_utf8(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        found = text.encode("utf-8", "surrogateescape")[:80]
        raise ValueError(
            f"{where} is not UTF-8: {found!r} (its encoding may be Latin-1 or Windows-1252). Save the file as UTF-8."
        ) from None
