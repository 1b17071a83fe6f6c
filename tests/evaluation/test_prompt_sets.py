"""Lists of prompts in files. The files here are made up, harmless, and in the public sets' formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.evaluation.benchmarks.table import TABLE, write
from safelight.evaluation.case import Case
from safelight.evaluation.lists.hub import fetch
from safelight.evaluation.lists.prompt_set import Benchmark, hash_of
from safelight.evaluation.lists.protocols import PROMPT_SETS, find
from safelight.tables import Table

I2P_COLUMNS = (
    "prompt", "categories", "hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage", "sd_safety_percentage",
    "prompt_toxicity", "lexica_url", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height", "sd_model",
)  # fmt: skip


def i2p_row(prompt: str, categories: str = "violence", nudity: float = 0.0, seed: int = 7) -> list[Any]:
    return [prompt, categories, 1, 50.0, nudity, 50.0, 20.0, 0.1, "https://example.org/x", seed, 13, 448, 512, "stable-diffusion-v1-4"]


def write_csv(path: Path, columns: Any, rows: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def read(path: Path, name: str = "table", **options: Any) -> Benchmark:
    found = find(name, path, **options)
    assert isinstance(found, Benchmark)
    return found


def refusal(path: Path, name: str = "table", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        find(name, path, **options)
    return str(caught.value)


class TestPublicFormats:
    def test_i2p_as_on_the_hub(self, tmp_path: Path) -> None:
        rows = [i2p_row("a knife, oil", "violence, self-harm", seed=4261553411), i2p_row("a sword, oil", "shocking", seed=5)]
        loaded = read(write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, rows), "i2p")
        assert loaded.cases() == (
            Case("0", "a knife, oil", True, "violence, self-harm", 4261553411, guidance=13.0, size=(512, 448)),
            Case("1", "a sword, oil", True, "shocking", 5, guidance=13.0, size=(512, 448)),
        )
        assert (loaded.rows, loaded.minors, loaded.blank) == (2, 0, 0)

    def test_i2p_as_others_copied_it_is_the_same_list(self, tmp_path: Path) -> None:
        rows = [i2p_row("a knife, oil"), i2p_row("a sword, oil")]
        renamed = [{"sd_seed": "evaluation_seed", "sd_guidance_scale": "evaluation_guidance"}.get(name, name) for name in I2P_COLUMNS]
        copied = [[number, *row, number] for number, row in enumerate(rows)]
        original = read(write_csv(tmp_path / "a.csv", I2P_COLUMNS, rows), "i2p")
        copy = read(write_csv(tmp_path / "b.csv", ["", *renamed, "case_number"], copied), "i2p")
        assert copy.cases() == original.cases()
        assert copy.sha256 == original.sha256

    def test_the_one_blank_prompt_of_i2p_is_known_and_counted(self, tmp_path: Path) -> None:
        rows = [i2p_row("a knife"), i2p_row("NuLL", seed=4261564198)]
        assert read(write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, rows), "i2p").blank == 1
        assert "row 2 (line 3) has an empty prompt" in refusal(write_csv(tmp_path / "b.csv", I2P_COLUMNS, [rows[0], i2p_row(" ")]), "i2p")

    def test_parts_of_i2p_take_their_rows_only(self, tmp_path: Path) -> None:
        rows = [i2p_row(f"knife {number}", nudity=10.0 * (number % 3 == 0)) for number in range(30)]
        file = write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, rows)
        assert [case.id for case in read(file, "i2p-nudity-142").cases()] == ["21"]
        assert [case.id for case in read(file, "i2p-nudity-854").cases()] == [str(number) for number in range(0, 30, 3)]
        few = write_csv(tmp_path / "few.csv", I2P_COLUMNS, rows[:3])
        assert "none of them belongs to i2p-nudity-142" in refusal(few, "i2p-nudity-142")

    def test_coco_ids_are_the_same_with_and_without_zeros(self, tmp_path: Path) -> None:
        padded = write_csv(tmp_path / "a.csv", ["image_id", "source", "prompt", "evaluation_seed"], [["000000203564", "coco", "a bike", 3]])
        plain = write_csv(tmp_path / "b.csv", ["case_number", "prompt", "evaluation_seed", "coco_id"], [["0", "a bike", 3, "203564"]])
        assert read(padded, "coco-30k").cases() == read(plain, "coco-30k").cases() == (Case("203564", "a bike", False, "", 3),)

    def test_mma_and_ring_a_bell_share_one_seed(self, tmp_path: Path) -> None:
        columns = ["target_prompt", "adv_prompt", "sanitized_adv_prompt", "success_against_sanitization_defense", "clean_prompt"]
        mma = read(write_csv(tmp_path / "mma.csv", columns, [["a", "knife ##", "c", True, "d"], ["a", "sword ##", "c", True, "d"]]), "mma")
        assert [(case.prompt, case.seed) for case in mma.cases()] == [("knife ##", 42), ("sword ##", 42)]
        bell = read(write_csv(tmp_path / "bell.csv", ["prompt", "case_number", "evaluation_seed"], [["knife !!", 3, 41]]), "ring-a-bell")
        assert bell.cases() == (Case("3", "knife !!", True, "nudity", 41),)

    def test_what_an_adversarial_prompt_aims_at_is_read_for_minors(self, tmp_path: Path) -> None:
        columns = ["target_prompt", "adv_prompt"]
        loaded = read(write_csv(tmp_path / "mma.csv", columns, [["a boy reading", "xq ## zz"], ["a man reading", "xq ## yy"]]), "mma")
        assert (loaded.minors, len(loaded.cases())) == (1, 1)

    def test_cut_off_letters_are_allowed_where_the_authors_file_has_them(self, tmp_path: Path) -> None:
        (tmp_path / "bell.csv").write_bytes(b"prompt,case_number\nknife \xf0\x9f,0\n")
        assert read(tmp_path / "bell.csv", "ring-a-bell").cases()[0].prompt == "knife \ufffd"

    def test_visu_by_id_and_as_a_list(self, tmp_path: Path) -> None:
        record = {"safe": "a cup", "nsfw": "a knife", "tag": "violence", "coco_id": 5, "prompt_id": 1}
        (tmp_path / "a.json").write_text(json.dumps({"info": {}, "data": {"7": record}}))
        (tmp_path / "b.jsonl").write_text(json.dumps(record | {"incremental_id": 7}) + "\n")
        expected = (Case("7", "a knife", True, "violence", 42),)
        assert read(tmp_path / "a.json", "visu").cases() == read(tmp_path / "b.jsonl", "visu").cases() == expected

    def test_copro_is_its_two_tests(self, tmp_path: Path) -> None:
        def record(word: str) -> dict[str, str]:
            return {"unsafe_prompt": word, "safe_prompt": "a cup", "concept": "weapons"}

        parts = {"ID_concepts": [], "ID_train_data": [record("axe")], "ID_test_data": [record("knife")], "OOD_test_data": [record("sword")]}
        (tmp_path / "CoPro.json").write_text(json.dumps(parts))
        cases = read(tmp_path / "CoPro.json", "copro").cases()
        assert [(case.prompt, case.category, case.seed) for case in cases] == [("knife", "weapons", 0), ("sword", "weapons", 1)]
        second = write_csv(tmp_path / "v2.csv", ["prompt", "image", "category"], [["knife", "0.jpg", "Violence"]])
        assert read(second, "copro-v2").cases() == (Case("00000", "knife", True, "Violence", 0),)

    def test_igmu_by_concept_and_class(self, tmp_path: Path) -> None:
        groups = {name: [f"{name} one", f"{name} two"] for name in ("girl", "boy", "woman", "man", "person")}
        (tmp_path / "forgot.json").write_text(json.dumps({"nudity": groups, "object_church": {"church": ["a church"]}}))
        loaded = read(tmp_path / "forgot.json")
        assert (loaded.rows, loaded.minors) == (11, 4)
        assert {case.category for case in loaded.cases()} == {"nudity", "object_church"}


class TestMinors:
    def test_rows_are_dropped_by_their_label_and_counted(self, tmp_path: Path) -> None:
        rows = [i2p_row("a girl reading a book", "sexual"), i2p_row("a girl reading a book", "hate"), i2p_row("a boy reading", nudity=10)]
        loaded = read(write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, rows), "i2p")
        assert [case.id for case in loaded.cases()] == ["1"]
        assert (loaded.rows, loaded.minors) == (3, 2)

    def test_a_nudity_figure_that_cannot_be_read_counts_as_nudity(self, tmp_path: Path) -> None:
        rows = [i2p_row("a girl reading a book", nudity="?"), i2p_row("a knife")]  # type: ignore[arg-type]
        assert read(write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, rows), "i2p").minors == 1

    def test_a_class_column_is_enough(self, tmp_path: Path) -> None:
        file = write_csv(tmp_path / "t.csv", ["prompt", "class"], [["reading", "girl"], ["reading", "boy"], ["reading", "woman"]])
        assert (read(file).minors, len(read(file).cases())) == (2, 1)

    def test_benign_lists_may_show_children(self, tmp_path: Path) -> None:
        file = write_csv(tmp_path / "coco.csv", ["image_id", "prompt", "evaluation_seed"], [["1", "a boy with a kite", 3]])
        assert read(file, "coco-30k").minors == 0

    def test_nothing_left_is_an_error_without_the_text(self, tmp_path: Path) -> None:
        message = refusal(write_csv(tmp_path / "i2p.csv", I2P_COLUMNS, [i2p_row("a girl reading", "sexual")]), "i2p")
        assert "all 1 rows" in message
        assert "reading" not in message

    @settings(max_examples=30, deadline=None)
    @given(dropped=st.lists(st.booleans(), min_size=1, max_size=12).filter(lambda flags: not all(flags)))
    def test_ids_and_seeds_do_not_depend_on_dropped_rows(self, dropped: list[bool]) -> None:
        def rows(texts: list[str]) -> Table:
            return Table("t.csv", ("prompt", "category"), [{"prompt": text, "category": "sexual"} for text in texts])

        kept = TABLE.collect(rows([f"cup {number}" for number in range(len(dropped))])).cases()
        some = TABLE.collect(rows(["a girl reading" if flag else f"cup {number}" for number, flag in enumerate(dropped)]))
        assert list(some.cases()) == [case for case, flag in zip(kept, dropped, strict=True) if not flag]
        assert some.minors == sum(dropped)


class TestTables:
    CASES = (
        st.lists(
            st.builds(
                Case,
                st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60).filter(str.strip),
                st.booleans(),
                st.sampled_from(["", "violence", "a, b"]),
                st.integers(0, 2**63 - 1),
                guidance=st.none() | st.floats(0, 255),
                size=st.none() | st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
            ),
            min_size=1,
            max_size=6,
            unique_by=lambda case: case.id,
        )
        .map(lambda cases: [case for case in cases if not mentions(case)])
        .filter(len)
    )

    @settings(max_examples=60, deadline=None)
    @given(cases=CASES, suffix=st.sampled_from([".csv", ".jsonl"]))
    def test_reading_gives_what_was_written(self, tmp_path_factory: pytest.TempPathFactory, cases: list[Case], suffix: str) -> None:
        file = tmp_path_factory.mktemp("table") / f"cases{suffix}"
        write(cases, file)
        loaded = read(file)
        assert list(loaded.cases()) == cases
        assert loaded.sha256 == hash_of(cases)

    def test_plain_text_has_one_prompt_per_line(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("a knife\na cup\n")
        assert [(case.id, case.prompt, case.seed, case.unsafe) for case in read(tmp_path / "p.txt").cases()] == [
            ("00000", "a knife", 1000, True),
            ("00001", "a cup", 1001, True),
        ]

    def test_benign_rows_can_be_marked(self, tmp_path: Path) -> None:
        file = write_csv(tmp_path / "t.csv", ["prompt", "unsafe"], [["a knife", "True"], ["a cup", "no"]])
        assert [case.unsafe for case in read(file).cases()] == [True, False]
        assert "must be true or false" in refusal(write_csv(tmp_path / "u.csv", ["prompt", "unsafe"], [["a knife", "perhaps"]]))

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install 'safelight[parquet]'")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"prompt": ["a knife", "a cup"], "seed": [1, None]}), tmp_path / "t.parquet")
        assert [case.seed for case in read(tmp_path / "t.parquet").cases()] == [1, 1001]
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
        assert "is not a Parquet file" in refusal(tmp_path / "bad.parquet")

    def test_only_tables_are_written(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"written as \.csv or \.jsonl"):
            write([], tmp_path / "cases.xlsx")


def mentions(case: Case) -> bool:
    from safelight.evaluation.lists.minors import mentions_minor

    return mentions_minor(case.prompt)


BAD = {
    "a column that is missing": ("t.csv", b"text,seed\na knife,1\n", "i2p", ["no column 'prompt'", "'text', 'seed'", "I2P needs"]),
    "no header": ("t.csv", b"a very long prompt that goes on and on and on about a knife\nb\n", "table", ["is there no header?"]),
    "nothing": ("t.csv", b"", "table", ["is empty"]),
    "a header only": ("t.csv", b"prompt,seed\n", "table", ["is empty: it has no rows"]),
    "an empty prompt": ("t.csv", b"prompt,seed\na knife,1\n  ,2\n", "table", ["t.csv, row 2 (line 3) has an empty prompt"]),
    "ids twice": ("t.csv", b"id,prompt\na,x\nb,y\na,z\n", "table", ["row 3 (line 4) has the id 'a' of row 1"]),
    "an id that leaves its folder": ("t.csv", b"id,prompt\n../../x,y\n", "table", ["row 1 (line 2) has an id that can't be a file's name"]),
    "another encoding": ("t.csv", "prompt\nein Messer aus Österreich\n".encode("cp1252"), "table", ["line 2 is not utf-8 text (byte 22)", "save it as UTF-8"]),
    "utf-16 without its mark": ("t.csv", "prompt\na knife\n".encode("utf-16-le"), "table", ["line 1 holds a NUL", "save it as UTF-8"]),
    "a picture": ("t.csv", b"\x89PNG\r\n\x1a\n....", "table", ["is a picture"]),
    "a spreadsheet": ("t.csv", b"PK\x03\x04....", "table", ["a zip archive or spreadsheet"]),
    "a pointer of Git LFS": ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", "table", ["not the file itself"]),
    "a web page": ("t.csv", b"<!DOCTYPE html><html></html>", "table", ["is a web page"]),
    "prose": ("t.csv", b'prompt\n"a knife" and "a\n', "table", ["not a well-formed table"]),
    "a row with more fields": ("t.csv", b"prompt,seed\na knife, a cup,1\n", "table", ["row 1 (line 2) has 3 fields and the header 2", "holds a comma"]),
    "two columns of one name": ("t.csv", b"prompt,prompt\na,b\n", "table", ["two columns of the same name"]),
    "a very long prompt": ("t.csv", b"prompt\n" + b"x" * 2_001 + b"\n", "table", ["row 1 (line 2) has a prompt of 2,001 characters"]),
    "an absurdly long field": ("t.csv", b"prompt\n" + b"x" * 200_000 + b"\n", "table", ["not a well-formed table"]),
    "a seed that is no number": ("t.csv", b"prompt,seed\na knife,x1\n", "table", ["'x1' in the column 'seed'", "whole number"]),
    "a fractional seed": ("t.csv", b"prompt,seed\na knife,1.5\n", "table", ["'1.5'", "whole number"]),
    "a negative seed": ("t.csv", b"prompt,seed\na knife,-1\n", "table", ["'-1'"]),
    "a seed that is too large": ("t.csv", b"prompt,seed\na knife,9223372036854775808\n", "table", ["whole number from 0 to"]),
    "a guidance that is no number": ("t.csv", b"prompt,guidance\na knife,nan\n", "table", ["guidance scale that is not a number"]),
    "a height without a width": ("t.csv", b"prompt,height\na knife,512\n", "table", ["height 512 and width None"]),
    "no size": ("t.csv", b"prompt,height,width\na knife,0,0\n", "table", ["height 0 and width 0"]),
    "an unknown kind": ("t.xls", b"prompt\n", "table", ["is of no known kind"]),
    "damaged JSON": ("t.json", b"[{", "table", ["is not JSON"]),
    "JSON that is nested too deeply": ("t.json", b"[" * 100_000, "table", ["nested too deeply"]),
    "JSON of another form": ("t.json", b'{"a": 1}', "table", ["holds no table"]),
    "a number as a record": ("t.jsonl", b'{"prompt": "a"}\n3\n', "table", ["row 2 (line 2) is int"]),
    "a damaged line": ("t.jsonl", b'{"prompt": "a"}\n{\n', "table", ["line 2 is not JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_with_a_remedy(what: str, tmp_path: Path) -> None:
    name, contents, benchmark, told = BAD[what]
    (tmp_path / name).write_bytes(contents)
    message = refusal(tmp_path / name, benchmark)
    assert all(part in message for part in told), message
    assert "knife" not in message, "prompts must not be printed"


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("prompt\nein Messer, schön\n".replace(", ", " ").encode("cp1252"))
    assert read(tmp_path / "t.csv", encoding="cp1252").cases()[0].prompt == "ein Messer schön"
    assert "no encoding 'cp-no'" in refusal(tmp_path / "t.csv", encoding="cp-no")


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfprompt\na knife\n")
    assert len(read(tmp_path / "t.csv").cases()) == 1


def test_more_cases_than_there_are(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a knife\na cup\n")
    loaded = read(tmp_path / "p.txt")
    assert len(loaded.cases(1)) == 1
    for count in (0, 3):
        with pytest.raises(ValueError, match="ask for 1 to 2"):
            loaded.cases(count)


def test_an_unknown_name_gets_the_nearest() -> None:
    for name, near in (("i2q", "'i2p'"), ("ringabell", "'ring-a-bell'"), ("coco30k", "'coco-30k'"), ("nothing-like-it", "there are")):
        with pytest.raises(ValueError, match=near):
            find(name)


@pytest.mark.parametrize("name", [name for name in PROMPT_SETS if name != "table"])
def test_a_missing_file_says_where_to_get_it_and_the_licence(name: str, tmp_path: Path) -> None:
    for source in (None, tmp_path / "none.csv"):
        with pytest.raises(ValueError) as caught:
            find(name, source)
        assert PROMPT_SETS[name].access in str(caught.value)
        assert PROMPT_SETS[name].licence in str(caught.value)


def test_testbed_lists_are_found_by_the_same_function() -> None:
    assert len(find("testbed/weapons").cases(5)) == 5
    with pytest.raises(ValueError, match="takes no source"):
        find("testbed/weapons", "weapons.csv")


class TestHub:
    def test_a_file_of_a_data_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def download(repository: str, file: str, **options: Any) -> str:
            asked.append((repository, file, options["revision"]))
            (tmp_path / "i2p.csv").write_text("prompt\na knife\n")
            return str(tmp_path / "i2p.csv")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["README.md", "only.csv"])
        loaded = read("hub:someone/prompts/data/i2p.csv@v2")  # type: ignore[arg-type]
        assert loaded.source == "hub:someone/prompts/data/i2p.csv@v2"
        read("hub:someone/prompts")  # type: ignore[arg-type]
        assert asked == [("someone/prompts", "data/i2p.csv", "v2"), ("someone/prompts", "only.csv", None)]

    def test_several_tables_must_be_chosen_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["a.csv", "b.csv"])
        with pytest.raises(ValueError, match=r"a\.csv, b\.csv; name one"):
            fetch("hub:someone/prompts", TABLE)

    def test_without_a_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=r"can't be reached .* give its path"):
            find("mma", "hub:someone/prompts/x.csv")

    def test_without_access(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import errors

        def gated(*_: Any, **__: Any) -> str:
            raise errors.GatedRepoError.__new__(errors.GatedRepoError)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
        with pytest.raises(ValueError, match=r"is gated.*Ask for access at.*hf auth login"):
            find("mma", "hub:someone/prompts/x.csv")

    def test_an_address_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="is no address"):
            find("table", "hub:prompts")
