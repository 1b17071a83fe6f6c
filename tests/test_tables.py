"""The reader of tables and lists: what is read is what the file says, and the rest is refused with file, row and remedy."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.cli.artefacts import read_pairs
from safelight.tables import Table, lines_of, read_prompts, read_table
from safelight.training.examples import read_examples
from safelight.training.prompt_pairs import read_prompts as read_training_prompts

INSIDE = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for a line's end, and no tokenizer does."""
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30) | st.text(
    "ab ,;\"'\n\r" + INSIDE, min_size=1
)


def wrote(folder: Path, name: str, contents: str | bytes) -> Path:
    (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return folder / name


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_table(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    mark=st.booleans(),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json"]),
)
def test_what_was_written_is_read(
    rows: list[tuple[str, str]], mark: bool, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    rows = [(f"1{first}", second) for first, second in rows]  # no row that repeats the header, or begins with a mark
    file = tmp_path_factory.mktemp("table") / f"t.{kind}"
    records = [dict(zip(("a", "b"), row, strict=True)) for row in rows]
    with file.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as stream:
        if kind in ("csv", "tsv"):
            csv.writer(stream, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
        elif kind == "jsonl":
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            json.dump(records, stream)
    assert list(read_table(file).rows) == records


@settings(max_examples=50, deadline=None)
@given(prompts=st.lists(st.text("a b" + INSIDE, min_size=1).filter(str.strip), min_size=1), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_only_real_line_ends_end_a_prompt(prompts: list[str], end: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = wrote(tmp_path_factory.mktemp("lines"), "p.txt", "\ufeff" + end.join(prompts))
    assert read_prompts(file) == [prompt.strip() for prompt in prompts]
    assert [row["prompt"] for row in read_table(file).rows] == prompts


def test_a_mark_and_crlf_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    (pair,) = read_pairs(wrote(tmp_path, "p.csv", "\ufeffunsafe,safe,category\r\na knife,a spoon,weapons\r\n"))
    assert pair == ("a knife", "a spoon", "weapons")
    assert read_prompts(wrote(tmp_path, "p.txt", "\ufeffa cat\r\n\r\na dog\r\n")) == ["a cat", "a dog"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_mark_names_the_encoding(encoding: str, tmp_path: Path) -> None:
    file = wrote(tmp_path, "t.csv", "prompt,seed\nein schönes Messer,1\n".encode(encoding))
    assert read_table(file).rows == [{"prompt": "ein schönes Messer", "seed": "1"}]


def test_lists_of_prompts_may_be_tables(tmp_path: Path) -> None:
    assert read_prompts(wrote(tmp_path, "p.csv", 'prompt,seed\n"a cat, asleep",1\n')) == ["a cat, asleep"]
    with pytest.raises(ValueError, match="no column 'prompt', which a list of prompts needs"):
        read_prompts(wrote(tmp_path, "q.csv", "a cat\na dog\n"))


def test_lists_of_any_other_name_are_text(tmp_path: Path) -> None:
    assert read_prompts(wrote(tmp_path, "benign", "a cat, asleep\n")) == ["a cat, asleep"]


REFUSED = {
    "an unquoted comma": ("t.csv", "unsafe,safe\na,b\na cat, and a knife,c\n", ["row 2 (line 3) has 3 fields and the header 2", "holds a comma"]),
    "a missing comma": ("t.csv", "unsafe,safe\n\na\n", ["row 1 (line 3) has 1 fields and the header 2", "a comma is missing"]),
    "a broken line": ("t.csv", "unsafe,safe\na\nb,c\n", ["row 1 (line 2)", "holds a line break"]),
    "semicolons": ("t.csv", "unsafe;safe\na;b\n", ["by semicolons, not commas"]),
    "a spreadsheet's first line": ("t.csv", "sep=;\nunsafe;safe\na;b\n", ["by semicolons, not commas"]),
    "tabs": ("t.csv", "unsafe\tsafe\na\tb\n", ["by tabs, not commas", "call it .tsv"]),
    "commas in a .tsv": ("t.tsv", "unsafe,safe\na,b\n", ["by commas, not tabs"]),
    "semicolons below the header": ("t.csv", "unsafe,safe\na;b\n", ["row 1 (line 2)", "separated by semicolons, not commas"]),
    "a column without a name": ("t.csv", "unsafe,safe,\na,b,c\n", ["no name for column 3 of 3"]),
    "an unclosed quote": ("t.csv", 'unsafe,safe\na,b\n"c,d\ne,f\n', ["not a well-formed table", "begins on line 3"]),
    "a quote behind a space": ("t.csv", 'unsafe,safe\na, "b"\n', ["row 1 (line 2)", "remove the space between the comma and the quote"]),
    "a quoted comma behind a space": ("t.csv", 'unsafe,safe\na, "b, c"\n', ["row 1 (line 2)", "remove the space between the comma"]),
    "two headers": ("t.csv", "unsafe,safe\na,b\nunsafe,safe\nc,d\n", ["row 2 (line 3) repeats the header"]),
    "a mark in the middle": ("t.csv", "unsafe,safe\na,b\n\ufeffc,d\n", ["row 2 (line 3) begins with a byte order mark"]),
    "two marks": ("t.csv", "\ufeff\ufeffunsafe,safe\na,b\n", ["its header begins with a byte order mark"]),
    "a mark in a list": ("t.txt", "a\n\ufeffb\n", ["line 2 begins with a byte order mark"]),
    "a NUL": ("t.txt", "a\nb\0c\n", ["line 2 holds a NUL"]),
    "a NUL in JSON": ("t.jsonl", '{"prompt": "a"}\n\n{"prompt": "\\u0000"}\n', ["row 2 (line 3)", "a NUL"]),
    "half of a character": ("t.json", '["a", "\\ud800"]', ["row 2 holds half of a character"]),
    "one name twice": ("t.jsonl", '{"prompt": "a", "prompt": "b"}\n', ["line 1", "two values of the same name"]),
    "a very long line": ("t.txt", "a\n" + "x" * 200_000 + "\n", ["line 2 has a text of 200,000 characters"]),
    "another encoding": ("t.csv", "prompt\na\nun détail\n".encode("latin-1"), ["line 3 is not utf-8 text (byte 13)", "CSV UTF-8"]),
    "another encoding after a mark": ("t.txt", b"\xef\xbb\xbfa\n\xe9\n", ["line 2 is not utf-8 text (byte 5)"]),
    "encoded surrogates": ("t.txt", b"a\n\xed\xa0\x80\n", ["line 2 is not utf-8 text"]),
    "utf-32": ("t.txt", "a\n".encode("utf-32"), ["UTF-32"]),
    "half of utf-16": ("t.txt", b"\xff\xfea\0b", ["is not utf-16 text"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_for_certain_is_refused(what: str, tmp_path: Path) -> None:
    name, contents, told = REFUSED[what]
    message = refusal(wrote(tmp_path, name, contents))
    assert all(part in message for part in told), message
    assert "a cat" not in message, "prompts must not be printed"


def test_a_prompt_may_begin_with_a_space_and_a_quote(tmp_path: Path) -> None:
    assert read_table(wrote(tmp_path, "t.csv", 'a,b\n1," ""x"" y"\n')).rows[0]["b"] == ' "x" y'


def test_the_index_of_a_data_frame_needs_no_name(tmp_path: Path) -> None:
    assert read_table(wrote(tmp_path, "t.csv", ",prompt\n0,a\n1,b\n")).columns == ("", "prompt")
    assert "no name for column 1 of 2" in refusal(wrote(tmp_path, "u.csv", ",prompt\nx,a\n"))


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    assert "is a pipe or device" in refusal(tmp_path / "pipe.csv")
    assert "is a pipe or device" in refusal(tmp_path / "device.csv")
    assert "is a folder" in refusal(tmp_path / "folder.csv")
    assert "there is no file" in refusal(tmp_path / "nowhere.csv")


def test_the_nearest_column_is_named(tmp_path: Path) -> None:
    file = wrote(tmp_path, "t.csv", "Unsafe,safe,category\na,b,c\n")
    with pytest.raises(ValueError, match=r"no column 'unsafe'.*is 'Unsafe' meant\? Then rename it to 'unsafe'"):
        read_pairs(file)


def test_another_column_is_not_taken_for_the_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'safe', which a list of pairs needs; it has 'unsafe', 'x'$"):
        read_training_prompts(wrote(tmp_path, "t.csv", "unsafe,x\na,b\n"), None, "weapons")


@pytest.mark.parametrize(("name", "meant"), [("Safe", "safe"), ("safe_", "safe")])
def test_an_optional_column_is_not_left_out_for_its_spelling(name: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has a column '{name}'; is '{meant}' meant"):
        read_pairs(wrote(tmp_path, "t.csv", f"unsafe,{name},category\na,b,c\n"))
    assert read_pairs(wrote(tmp_path, "t.csv", "unsafe,notes,category\na,b,c\n")) == [("a", "", "c")]


@pytest.mark.parametrize("read", [read_pairs, read_examples, lambda file: read_training_prompts(file, None, "weapons")])
def test_all_readers_are_this_one(read: object, tmp_path: Path) -> None:
    columns = "unsafe,safe,category,prompt,concept"
    file = wrote(tmp_path, "t.csv", f"{columns}\na knife, and more,a spoon,weapons,a knife,knife\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 2\) has 6 fields and the header 5: probably a text in it holds a comma"):
        read(file)  # type: ignore[operator]
    wrote(tmp_path, "t.csv", f"{columns}\na,b,c,d,e\n ,,, ,\n")
    with pytest.raises(ValueError, match=r"row 2 \(line 3\): the column '\w+' is empty"):
        read(file)  # type: ignore[operator]
    wrote(tmp_path, "t.csv", f"\ufeff{columns}\na,b,c,d,e\n")
    read(file)  # type: ignore[operator]


def test_examples_take_ascii_seeds_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 \(line 2\): the seed '²' is not a whole number"):
        read_examples(wrote(tmp_path, "t.csv", "prompt,concept,seed\na,b,²\n"))
    assert [example.seed for example in read_examples(wrote(tmp_path, "t.csv", "prompt,concept\na,b\nc,\n"))] == [2, 3]


def test_rows_without_lines_are_called_by_their_number() -> None:
    assert Table("t.json", (), ()).where(1_000) == "t.json, row 1,001"


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_our_own_lines_end_at_line_feeds_alone(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = wrote(tmp_path_factory.mktemp("own"), "x.jsonl", "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))
    assert [json.loads(line) for line in lines_of(file)] == texts
    assert lines_of(file.with_name("none.jsonl")) == []
