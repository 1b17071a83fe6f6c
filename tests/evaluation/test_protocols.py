"""Protocols: what is frozen stays frozen, and another list is not taken for the frozen one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.cli import main
from safelight.evaluation.benchmarks.testbed import benchmarks
from safelight.evaluation.case import Case
from safelight.evaluation.judges.nudenet import RULES
from safelight.evaluation.lists.prompt_set import Benchmark, hash_of
from safelight.evaluation.lists.protocol import FrozenList, JudgeSetting, Protocol
from safelight.evaluation.lists.protocols import PROMPT_SETS, PUBLISHED, find, judges_of, protocol, protocols
from safelight.evaluation.lists.testbed_protocols import FROZEN, PIPELINES, bundled
from safelight.evaluation.runs.arms import Arm
from safelight.evaluation.runs.manifest import plan
from safelight.tables import read_table
from safelight.testbed import settings

ROOT = Path(__file__).parents[2]
CASES = (Case("0", "a knife", True, "weapons", 7), Case("1", "a cup", True, "", 9, guidance=12.0, size=(64, 96)))


def listing(cases: tuple[Case, ...] = CASES, rows: int | None = None, minors: int = 0) -> Benchmark:
    return Benchmark("mine", "mine.csv", cases, rows or len(cases) + minors, minors)


def frozen() -> Protocol:
    return Protocol(
        name="knives", prompts="mine", follows="nobody", frozen=FrozenList(hash_of(CASES), 2, 2), sampler="DDIM", steps=20, guidance=7.5,
        size=(512, 256), per_row=("guidance", "size"), images_per_prompt=3, judges=(JudgeSetting("nudenet", ("A", "B"), 0.6),),
    )  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_the_testbeds_lists_are_the_frozen_ones(name: str) -> None:
    count, sha256 = FROZEN[name]
    assert hash_of(find(f"testbed/{name}").cases(count)) == sha256


def test_every_benchmark_of_the_testbed_has_a_protocol() -> None:
    assert [f"testbed/{name}" for name in FROZEN] == [one.name for one in benchmarks()]


def test_the_testbeds_settings_are_the_pipelines() -> None:
    assert {name: dict(arguments) for name, arguments in PIPELINES.items()} == {
        name: settings(name.removeprefix("testbed/")) for name in PIPELINES
    }
    for one in bundled():
        assert set(one.pipelines) == ({"testbed/kontext"} if "edits" in one.name else {"testbed/sd", "testbed/sd3", "testbed/flux"})


def test_the_testbeds_judges_are_those_of_the_testbed() -> None:
    from safelight.testbed.judges import judges

    one = protocol("testbed-weapons")
    assert [judge.threshold for judge in one.judges] == [judge.threshold for judge in judges()]


def test_every_judge_can_be_made_with_what_is_frozen() -> None:
    for one in protocols().values():
        for judge, setting in zip(judges_of(one), one.judges, strict=True):
            assert (judge.name, tuple(judge.classes), judge.threshold) == (setting.name, setting.classes, setting.threshold)


@pytest.mark.parametrize(("name", "rule"), [("i2p", "sld"), ("unlearndiffatk", "unlearndiffatk"), ("i2p-nudity-142", "unlearndiffatk")])
def test_the_rules_of_nudenet_are_the_judges(name: str, rule: str) -> None:
    setting = protocol(name).judges[0]
    assert (setting.classes, setting.threshold) == (RULES[rule].classes, RULES[rule].threshold)


def test_each_published_protocol_names_its_list_and_sources() -> None:
    for one in PUBLISHED:
        assert one.prompts in PROMPT_SETS
        assert "https://" in one.follows
        assert "https://" in PROMPT_SETS[one.prompts].paper
        assert one.judges or not PROMPT_SETS[one.prompts].unsafe
    assert {"i2p", "i2p-nudity-142", "unlearndiffatk", "mma", "ring-a-bell", "coco-30k", "visu", "copro", "unsafe-1k"} <= protocols().keys()


def test_everything_can_be_written_as_json() -> None:
    for one in protocols().values():
        again = json.loads(json.dumps(one.to_json()))
        assert again["id"] == one.id
        assert again["steps"] == one.steps


def test_the_frozen_list_is_accepted_and_named() -> None:
    assert frozen().accept(listing()) == frozen()
    assert frozen().id == f"knives/1/{hash_of(CASES)[:12]}"


@pytest.mark.parametrize(
    "change", [{"id": "2"}, {"prompt": "a knife "}, {"seed": 8}, {"category": ""}, {"guidance": 1.0}, {"size": (1, 1)}, {"unsafe": False}]
)
def test_any_other_row_makes_another_list(change: dict[str, object]) -> None:
    other = (replace(CASES[0], **change), CASES[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"as many rows \(2\), but at least one differs.*--custom NAME"):
        frozen().accept(listing(other))


def test_order_counts() -> None:
    with pytest.raises(ValueError, match="place"):
        frozen().accept(listing(CASES[::-1]))


def test_fewer_rows_are_told_in_numbers() -> None:
    with pytest.raises(ValueError, match=r"it has 4 rows, of which 1 are used \(3 were dropped.*the list has 2, of which 2 are used"):
        frozen().accept(listing(CASES[:1], minors=3))


def test_an_unknown_hash_is_recorded_when_the_list_is_read() -> None:
    open_protocol = replace(frozen(), frozen=None)
    assert open_protocol.id == "knives/1/unread"
    accepted = open_protocol.accept(listing())
    assert accepted.recorded
    assert accepted.frozen == FrozenList(hash_of(CASES), 2, 2)
    with pytest.raises(ValueError, match="is not the list"):
        accepted.accept(listing(CASES[:1]))


def test_a_list_of_ones_own_gets_a_name_of_its_own() -> None:
    mine = frozen().custom("cups", listing(CASES[1:]))
    assert mine.id == f"custom-cups/1/{hash_of(CASES[1:])[:12]}"
    assert (mine.follows, mine.steps, mine.judges) == ("knives/1", 20, frozen().judges)
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="no name for a protocol"):
            frozen().custom(name, listing())


def test_a_part_of_a_list_says_so() -> None:
    assert frozen().limited(1, listing()).id.endswith("/first-1")
    assert frozen().limited(2, listing()) == frozen()
    with pytest.raises(ValueError, match="ask for 1 to 2"):
        frozen().limited(3, listing())


def test_a_row_overrides_only_what_the_protocol_lets_it() -> None:
    plain, special = (frozen().arguments(case) for case in CASES)
    assert plain == {"num_inference_steps": 20, "guidance_scale": 7.5, "height": 512, "width": 256}
    assert special == {"num_inference_steps": 20, "guidance_scale": 12.0, "height": 64, "width": 96}
    assert replace(frozen(), per_row=()).arguments(CASES[1]) == plain


def test_arguments_by_pipeline() -> None:
    assert protocol("testbed-weapons").arguments(CASES[0], "testbed/flux")["true_cfg_scale"] == 2.5
    with pytest.raises(ValueError, match=r"is for testbed/sd, testbed/sd3, testbed/flux, not for mine"):
        protocol("testbed-weapons").arguments(CASES[0], "mine")


def test_a_prompts_pictures_have_ids_and_seeds_of_their_own() -> None:
    pictures = frozen().pictures(CASES)
    assert [(one.id, one.seed) for one in pictures] == [("0+0", 7), ("0+1", 8), ("0+2", 9), ("1+0", 9), ("1+1", 10), ("1+2", 11)]
    assert replace(frozen(), images_per_prompt=1).pictures(CASES) == list(CASES)


def test_the_documents_name_every_protocol_and_what_it_freezes() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text()
    for one in PUBLISHED:
        size = "x".join(map(str, one.size))
        frozen_as = f"`{one.frozen.sha256[:12]}`" if one.frozen else "recorded"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{one.name}` |") and f" {one.steps} " in line)
        for told in (one.sampler, f"{one.guidance:g}", size, str(one.images_per_prompt), one.aggregation, frozen_as):
            assert told in row, (one.name, told)
        for judge in one.judges:
            assert f"{judge.name} {judge.threshold:g}" in row
    for name, known in PROMPT_SETS.items():
        assert f"| `{name}` |" in page
        assert known.licence in page, name
    assert "(protocols.md)" in (ROOT / "docs" / "evaluation.md").read_text()


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["safelight", "protocols", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        file = tmp_path / "mine.csv"
        file.write_text("prompt,categories,sd_seed\na knife,violence,7\na girl reading,sexual,8\n")
        return str(file)

    def test_lists_all(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(monkeypatch) == 0
        out = capsys.readouterr().out
        assert all(one.id in out for one in PUBLISHED)
        assert self.run(monkeypatch, "--json") == 0
        assert [one["name"] for one in json.loads(capsys.readouterr().out)["protocols"]] == list(protocols())

    def test_shows_one(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(monkeypatch, "mma") == 0
        out = capsys.readouterr().out
        assert "mma/1/unread" in out
        assert "Ask for access" in out

    def test_reads_a_bundled_list(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(monkeypatch, "testbed-weapons", "--json") == 0
        assert json.loads(capsys.readouterr().out)["cases"] == 200

    def test_refuses_another_list(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str) -> None:
        assert self.run(monkeypatch, "i2p", "--source", source) == 1
        captured = capsys.readouterr()
        assert "it has 2 rows, of which 1 are used (1 were dropped" in captured.err
        assert "reading" not in captured.err + captured.out

    def test_takes_it_under_a_name(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str) -> None:
        assert self.run(monkeypatch, "i2p", "--source", source, "--custom", "mine", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["rows"], result["cases"], result["dropped_minors"], result["recorded"]) == (2, 1, 1, True)
        assert result["protocol"].startswith("custom-mine/1/")
        assert result["sha256"] == find("i2p", source).sha256  # type: ignore[union-attr]

    def test_unknown_names_and_stray_options(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(monkeypatch, "i2q") == 1
        assert "did you mean 'i2p'" in capsys.readouterr().err
        assert self.run(monkeypatch, "--custom", "mine") == 1
        assert "name it" in capsys.readouterr().err


def test_a_file_that_claims_an_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight.tables.LARGEST", 10)
    (tmp_path / "t.csv").write_text("prompt\na knife\n")
    with pytest.raises(ValueError, match="has 15 bytes"):
        read_table(tmp_path / "t.csv")


def test_a_protocol_is_planned_as_a_manifest() -> None:
    one = frozen()
    planned, _ = plan(
        one.pictures(CASES),
        {"base": Arm.of([])},
        pipeline="mine",
        settings={},
        artefacts={},
        protocol=one.name,
        version=one.version,
        own_settings=one.arguments,
    )
    rows = [(row.case, row.seed, row.settings["guidance_scale"], row.settings["height"]) for row in planned.rows]
    assert sorted(rows) == [("0+0", 7, 7.5, 512), ("0+1", 8, 7.5, 512), ("0+2", 9, 7.5, 512),
                            ("1+0", 9, 12.0, 64), ("1+1", 10, 12.0, 64), ("1+2", 11, 12.0, 64)]  # fmt: skip
