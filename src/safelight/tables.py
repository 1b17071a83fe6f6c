"""The one reader of tables and lists of prompts: CSV, TSV, JSON, JSON lines, Parquet, and plain text with one prompt per line.

Texts are kept as they are: only line feeds and carriage returns end a line, and what can't be read for certain is refused, with the file,
the row and the remedy. No message shows a prompt.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, str]

LARGEST = 512 * 2**20
"""Bytes. The largest public list has 60 MB."""
LONGEST_FIELD = 131_072
"""Characters, the limit of Python's CSV reader; for all kinds of files."""
LONGEST_NAME = 40
"""Characters of a column's name that a message shows; what is longer may be a prompt."""
SIGNATURES = {
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"PK\x03\x04": "a zip archive or spreadsheet", b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF", b"PAR1": "a Parquet file (call it .parquet)", b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
    b"\xff\xfe\x00\x00": "UTF-32 text (save it as UTF-8)", b"\x00\x00\xfe\xff": "UTF-32 text (save it as UTF-8)",
}  # fmt: skip
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
MARK = "\ufeff"
LINE_END = re.compile(r"\r\n|\n|\r")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
LATE_QUOTE = "a quote behind a space opens no text; remove the space between the {} and the quote"
SAVE_AS_UTF8 = "save it as UTF-8 (a spreadsheet calls it 'CSV UTF-8')"


@dataclass(frozen=True)
class Table:
    """The rows of a file, all values as text."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    lines: Sequence[int] = ()
    """The line on which each row begins; empty where rows have none, as in JSON."""

    def where(self, index: int) -> str:
        """How a row is called in messages: counted from 1, without the header, and its line in the file, counted from 1."""
        line = f" (line {self.lines[index]:,})" if self.lines else ""
        return f"{self.name}, row {index + 1:,}{line}"

    def column(self, names: Sequence[str], needed_by: str, *, besides: Sequence[str] = ()) -> str:
        """The first of some columns that is there; `besides` are columns with another meaning.

        Raises:
            ValueError: if there is none of them; the message lists the columns, and the nearest.
        """
        if found := next((name for name in names if name in self.columns), None):
            return found
        there = ", ".join(repr(name) if len(name) <= LONGEST_NAME else "(a long text: is there no header?)" for name in self.columns)
        near = next(filter(None, (self._near(name, besides, 0.6) for name in names)), None)
        remedy = "" if near is None else f"; is {near!r} meant? Then rename it to {names[0]!r}"
        raise ValueError(f"{self.name} has no column {' or '.join(map(repr, names))}, which {needed_by} needs; it has {there}{remedy}")

    def required(self, *names: str, needed_by: str) -> list[tuple[str, ...]]:
        """The values of some columns, row by row, without space around them.

        Raises:
            ValueError: if a column is missing, or a value empty.
        """
        for name in names:
            self.column((name,), needed_by, besides=names)
        values = []
        for index, row in enumerate(self.rows):
            values.append(tuple(row[name].strip() for name in names))
            if empty := next((name for name in names if not row[name].strip()), None):
                raise ValueError(f"{self.where(index)}: the column {empty!r} is empty; complete the row, or remove it")
        return values

    def optional(self, name: str, *, besides: Sequence[str]) -> list[str]:
        """The values of a column, row by row, without space around them; empty without one. `besides` are columns with another meaning.

        Raises:
            ValueError: if there is none, but one that is nearly called so: what it holds would be left out, and nobody would know.
        """
        if name not in self.columns and (near := self._near(name, besides, 0.85)):
            raise ValueError(f"{self.name} has a column {near!r}; is {name!r} meant? Then rename it, else give it a name less like it")
        return [row.get(name, "").strip() for row in self.rows]

    def _near(self, name: str, besides: Sequence[str], likeness: float) -> str | None:
        """The column whose name is nearest to another one."""
        known = {column.strip().casefold(): column for column in self.columns if len(column) <= LONGEST_NAME and column not in besides}
        return next((known[match] for match in difflib.get_close_matches(name.casefold(), known, n=1, cutoff=likeness)), None)


def read_table(path: Path, *, encoding: str = "utf-8", errors: str = "strict") -> Table:
    """Reads a table; what it is follows from the file's extension.

    Args:
        path: of a regular file.
        encoding: of the text. A byte order mark of UTF-8 or UTF-16 is understood.
        errors: `replace` for files that are known to hold a few bytes of another encoding.

    Raises:
        ValueError: if it is missing, empty, no table, damaged, or in another encoding; the message names the row and the remedy.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path} is of no known kind; give one of {', '.join(KINDS)}")
    _check_regular(path)
    table = _parquet(path) if kind == ".parquet" else READERS[kind](str(path), text_of(path, encoding, errors))
    if not table.rows:
        raise ValueError(f"{path} is empty: it has no rows")
    return table


def read_prompts(path: Path) -> list[str]:
    """Prompts: the lines of a text file that are not blank, or the column `prompt` of a table, without space around them.

    Raises:
        ValueError: if the file can't be read for certain, or holds none.
    """
    if path.suffix.lower() in KINDS and path.suffix.lower() != ".txt":
        return [prompt for (prompt,) in read_table(path).required("prompt", needed_by="a list of prompts")]
    lines = (row["prompt"].strip() for row in _lines(str(path), text_of(path)).rows)
    return [line for line in lines if line]


def text_of(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file.

    Raises:
        ValueError: if it is something else, or in another encoding.
    """
    _check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); check its permissions") from None
    for signature, what in SIGNATURES.items():
        if data.startswith(signature):
            raise ValueError(f"{path} is {what}, not a table of text")
    text = _decoded(str(path), data, encoding, errors)
    if text.lstrip()[:15].casefold().startswith(("<!doctype html", "<html")):
        raise ValueError(f"{path} is a web page, not a table; was it saved from a site that asks to log in?")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def lines_of(file: Path) -> list[bytes]:
    """The lines of a JSONL file that was written here, without their ends; none if there is no file.

    Only a line feed ends one: a text in it may hold any other character that Unicode counts as a line's end.
    """
    return file.read_bytes().removesuffix(b"\n").split(b"\n") if file.is_file() and file.stat().st_size else []


def _check_regular(path: Path) -> None:
    """Looks at what a path is before it is opened: opening a pipe waits forever, and devices have no end."""
    try:
        known = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path}; check its name and folder") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); check its name and permissions") from None
    if stat.S_ISDIR(known.st_mode):
        raise ValueError(f"{path} is a folder; give a file in it")
    if not stat.S_ISREG(known.st_mode):
        raise ValueError(f"{path} is a pipe or device, not a file; save what it gives into a file first")
    if known.st_size > LARGEST:
        raise ValueError(f"{path} has {known.st_size:,} bytes; a list of prompts has at most {LARGEST:,}")


def _decoded(name: str, data: bytes, encoding: str, errors: str) -> str:
    if encoding.casefold() in ("utf-8", "utf8"):
        encoding = "utf-16" if data.startswith(UTF16_MARKS) else "utf-8"
    mark = len(UTF8_MARK) if encoding == "utf-8" and data.startswith(UTF8_MARK) else 0
    try:
        text = data[mark:].decode(encoding, errors)
    except LookupError:
        raise ValueError(f"there is no encoding {encoding!r}; try utf-8, cp1252 or utf-16") from None
    except UnicodeDecodeError as error:
        line = data[: mark + error.start].count(b"\n") + 1
        raise ValueError(f"{name}, line {line:,} is not {encoding} text (byte {mark + error.start:,}); {SAVE_AS_UTF8}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{name}, line {line:,} holds a NUL character: it is damaged, or UTF-16 without its mark; {SAVE_AS_UTF8}")
    return text


def _csv(name: str, text: str, delimiter: str = ",") -> Table:
    records = _records_of_csv(name, text, delimiter)
    columns = _header(name, next(records, (1, []))[1], delimiter)
    rows, lines = [], []
    for number, (line, fields) in enumerate(records, 1):
        where = f"{name}, row {number:,} (line {line:,})"
        if len(fields) != len(columns):
            why = _why_ragged(fields, len(columns), delimiter)
            raise ValueError(f"{where} has {len(fields)} fields and the header {len(columns)}: {why}")
        if any(_opens_late(field) and delimiter + field in text for field in fields):
            raise ValueError(f"{where}: {LATE_QUOTE.format(DELIMITERS[delimiter].removesuffix('s'))}")
        if len(columns) > 1 and tuple(map(str.strip, fields)) == columns:
            raise ValueError(f"{where} repeats the header: were two files joined? Remove the line")
        _check_joint(where, fields[0])
        rows.append(dict(zip(columns, fields, strict=True)))
        lines.append(line)
    _check_named(name, columns, rows)
    return Table(name, columns, rows, lines)


def _records_of_csv(name: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the line on which it begins."""
    reader, begins = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name} is not a well-formed table: {error} (in the row that begins on line {begins:,}); put texts that hold commas, quotes or "
            "line breaks between double quotes, and write a quote in them twice"
        ) from None


def _header(name: str, fields: Sequence[str], delimiter: str) -> tuple[str, ...]:
    columns = tuple(map(str.strip, fields))
    _check_joint(f"{name}, its header", next(iter(columns), ""))
    other = next((other for other in DELIMITERS if other != delimiter and len(columns) == 1 and other in columns[0]), None)
    if other is not None:
        remedy = f"save it with {DELIMITERS[delimiter]}" + (", or call it .tsv" if other == "\t" else "")
        raise ValueError(f"{name} separates its columns by {DELIMITERS[other]}, not {DELIMITERS[delimiter]}; {remedy}")
    if len(set(columns)) < len(columns):
        shown = ", ".join(repr(column[:LONGEST_NAME]) for column in columns)
        raise ValueError(f"{name} has two columns of the same name; there are {shown}")
    return columns


def _check_named(name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Only an index may have no name: the first column, of numbers, as pandas writes it."""
    if "" not in columns:
        return
    place = columns.index("")
    if place or not all(row[""].isdecimal() for row in rows):
        raise ValueError(f"{name} has no name for column {place + 1} of {len(columns)}; name it in the first line, or remove the column")


def _check_joint(where: str, start: str) -> None:
    if start.startswith(MARK):
        raise ValueError(f"{where} begins with a byte order mark, as where two files were joined; remove it")


def _why_ragged(fields: Sequence[str], expected: int, delimiter: str) -> str:
    other = next(
        (other for other in DELIMITERS if len(fields) == 1 and other != delimiter and fields[0].count(other) == expected - 1), None
    )
    if other is not None:
        return f"it is separated by {DELIMITERS[other]}, not {DELIMITERS[delimiter]}; save the whole file with {DELIMITERS[delimiter]}"
    one = DELIMITERS[delimiter].removesuffix("s")
    if any(map(_opens_late, fields)):
        return LATE_QUOTE.format(one)
    if len(fields) > expected:
        return f"probably a text in it holds a {one}; put such texts between double quotes"
    return f"probably a {one} is missing, or a text holds a line break; put such texts between double quotes"


def _opens_late(field: str) -> bool:
    """Whether a value begins with a space and a quote, which is then a part of the text."""
    return field[:1].isspace() and field.lstrip().startswith('"')


def _tsv(name: str, text: str) -> Table:
    return _csv(name, text, "\t")


def _lines(name: str, text: str) -> Table:
    lines = LINE_END.split(text)
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        _check_joint(f"{name}, line {number:,}", line)
        _check_text(f"{name}, line {number:,}", line)
    return Table(name, ("prompt",), [{"prompt": line} for line in lines], range(1, len(lines) + 1))


def _json_lines(name: str, text: str) -> Table:
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = (json_value(f"{name}, line {number:,}", line) for number, line in numbered)
    return table_of(name, records, [number for number, _ in numbered])


def _json(name: str, text: str) -> Table:
    return table_of(name, records_of(name, json_value(name, text)))


def json_value(where: str, text: str) -> Any:
    """A JSON value; errors name where it is."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (character {error.pos + 1:,})") from None
    except ValueError as error:
        raise ValueError(f"{where} can't be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is not a table: it is nested too deeply") from None


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a record has two values of the same name; keep one of them")
    return record


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


def table_of(name: str, records: Iterable[Any], lines: Sequence[int] = ()) -> Table:
    """The table of some records; a text alone is a prompt."""
    columns: dict[str, None] = {}
    rows = []
    for index, record in enumerate(records):
        where = Table(name, (), (), lines).where(index)
        if isinstance(record, str):
            record = {"prompt": record}
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {type(record).__name__}, not a record with named columns")
        columns |= dict.fromkeys(record)
        rows.append({column: _text(value) for column, value in record.items()})
        for text in rows[-1].values():
            _check_text(where, text)
    return Table(name, tuple(columns), [dict.fromkeys(columns, "") | row for row in rows], lines)


def _check_text(where: str, text: str) -> None:
    """What no tokenizer and no file takes, although JSON can spell it."""
    if "\0" in text or LONE_SURROGATE.search(text):
        raise ValueError(f"{where} holds half of a character, or a NUL; remove it, or write the text in UTF-8 without \\u")
    if len(text) > LONGEST_FIELD:
        raise ValueError(f"{where} has a text of {len(text):,} characters; at most {LONGEST_FIELD:,} are read")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'safelight[parquet]', or save the table as CSV or JSON lines") from None
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file ({type(error).__name__})") from None
    return table_of(str(path), records)


READERS: Mapping[str, Callable[[str, str], Table]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".txt": _lines,
}  # fmt: skip
KINDS = (*READERS, ".parquet")
