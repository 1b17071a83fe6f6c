"""Tables of prompts in files: CSV, TSV, JSON, JSON lines, Parquet, and plain text with one prompt per line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, str]

LARGEST = 512 * 2**20
"""Bytes. The largest public list has 60 MB."""
SIGNATURES = {
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"PK\x03\x04": "a zip archive or spreadsheet", b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF", b"PAR1": "a Parquet file (call it .parquet)", b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of a file, all values as text."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]

    def where(self, index: int) -> str:
        """How a row is called in messages: counted from 1, without the header."""
        return f"{self.name}, row {index + 1:,}"


def read_table(path: Path, *, encoding: str = "utf-8", errors: str = "strict") -> Table:
    """Reads a table; what it is follows from the file's extension.

    Raises:
        ValueError: if it is empty, no table, or in another encoding.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path.name} is of no known kind; give one of {', '.join(KINDS)}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; a list of prompts has at most {LARGEST:,}")
    if kind == ".parquet":
        columns, rows = _parquet(path)
    else:
        columns, rows = READERS[kind](path.name, text_of(path, encoding, errors))
    if not rows:
        raise ValueError(f"{path.name} is empty: it has no rows")
    return Table(path.name, tuple(columns), rows)


def text_of(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file.

    Raises:
        ValueError: if it is something else, or in another encoding.
    """
    data = path.read_bytes()
    for signature, what in SIGNATURES.items():
        if data.startswith(signature):
            raise ValueError(f"{path.name} is {what}, not a table of text")
    try:
        text = data.decode("utf-8-sig" if encoding.casefold() in ("utf-8", "utf8") else encoding, errors)
    except LookupError:
        raise ValueError(f"there is no encoding {encoding!r}; try utf-8, cp1252 or utf-16") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not {encoding} text (byte {error.start:,}); save it as UTF-8, or name its encoding, e.g. cp1252 or utf-16"
        ) from None
    if text.lstrip()[:15].casefold().startswith(("<!doctype html", "<html")):
        raise ValueError(f"{path.name} is a web page, not a table; was it saved from a site that asks to log in?")
    if not text.strip():
        raise ValueError(f"{path.name} is empty")
    return text


Parsed = tuple[Sequence[str], list[Row]]


def _csv(name: str, text: str, delimiter: str = ",") -> Parsed:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(reader)]
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise ValueError(
            f"{name} is not a well-formed table: {error} (line {reader.line_num:,}); quote texts that hold commas or quotes"
        ) from None
    if len(set(header)) < len(header):
        raise ValueError(f"{name} has two columns of the same name; there are {', '.join(map(repr, header))}")
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ValueError(
                f"{name}, row {number:,} has {len(line)} fields and the header {len(header)}; quote texts that hold a comma or line break"
            )
    return header, [dict(zip(header, line, strict=True)) for line in lines]


def _tsv(name: str, text: str) -> Parsed:
    return _csv(name, text, "\t")


def _lines(name: str, text: str) -> Parsed:
    return ("prompt",), [{"prompt": line} for line in text.removesuffix("\n").split("\n")]


def _json_lines(name: str, text: str) -> Parsed:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(json_value(f"{name}, line {number:,}", line))
    return table_of(name, records)


def _json(name: str, text: str) -> Parsed:
    return table_of(name, list(records_of(name, json_value(name, text))))


def json_value(where: str, text: str) -> Any:
    """A JSON value; errors name where it is."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', 'it is damaged')}") from None
    except RecursionError:
        raise ValueError(f"{where} is not a table: it is nested too deeply") from None


def records_of(name: str, value: Any) -> Iterator[Any]:
    """The records of a JSON value: a list, records by their id, or lists of prompts by concept and class (the format of IGMU)."""
    if isinstance(value, dict) and isinstance(value.get("data"), (list, dict)):
        value = value["data"]
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict) and value and all(isinstance(record, dict) for record in value.values()):
        for key, record in value.items():
            groups = {group: prompts for group, prompts in record.items() if isinstance(prompts, list)}
            if groups and len(groups) == len(record):
                yield from ({"concept": key, "class": group, "prompt": prompt} for group, prompts in groups.items() for prompt in prompts)
            else:
                yield {"key": key, **record}
    else:
        raise ValueError(f"{name} holds no table: give a list of records, or records by their id")


def table_of(name: str, records: Iterable[Any]) -> Parsed:
    """Columns and rows of records; a text alone is a prompt."""
    columns: dict[str, None] = {}
    rows = []
    for number, record in enumerate(records, 1):
        if isinstance(record, str):
            record = {"prompt": record}
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {number:,} is {type(record).__name__}, not a record with named columns")
        columns |= dict.fromkeys(record)
        rows.append({column: _text(value) for column, value in record.items()})
    return tuple(columns), [dict.fromkeys(columns, "") | row for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parquet(path: Path) -> Parsed:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path.name} needs pyarrow: pip install 'safelight[parquet]', or save the table as CSV or JSON lines") from None
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is not a Parquet file ({type(error).__name__})") from None
    return table_of(path.name, records)


READERS: Mapping[str, Callable[[str, str], Parsed]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".txt": _lines,
}  # fmt: skip
KINDS = (*READERS, ".parquet")
