"""A manifest says all that determines its images, and nobody edits it unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import ArtefactError
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.case import Case, file_name, path_of
from safelight.evaluation.runs.arms import Arm
from safelight.evaluation.runs.fingerprint import described, digest
from safelight.evaluation.runs.manifest import Manifest, identified, plan, save, sources_of
from safelight.methods.block import Block
from safelight.testing import Containing

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "manifest.py"
ARMS = {"base": Arm(), "guard": Arm.of([Block(detector=Containing())])}
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0}


def cases(count: int, **changes: Any) -> list[Case]:
    return [Case(f"{i:03d}", f"prompt {i}", i % 2 == 0, "knives" if i % 4 == 0 else "", seed=i, **changes) for i in range(count)]


def planned(count: int = 5, batch: int = 2, arms: Any = ARMS, **options: Any) -> Manifest:
    return plan(cases(count), arms, pipeline="mine", settings=SETTINGS, batch=batch, protocol="p", **options)[0]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = planned()
    manifest.write(tmp_path / "manifest.jsonl")
    read = Manifest.read(tmp_path / "manifest.jsonl")
    assert read.rows == manifest.rows
    assert read.header == manifest.header
    assert [case.id for case in cases(5)] == [row.to_case().id for row in read.rows if row.arm == "base"]
    assert read.rows[0].to_case() == cases(1)[0]


def test_a_line_ends_at_line_feeds_alone(tmp_path: Path) -> None:
    odd = [Case("a", "a knife\u2028at sea\x85at night\x1e\x0c", True, "\u2029")]
    plan(odd, ARMS, pipeline="mine", settings=SETTINGS)[0].write(tmp_path / "manifest.jsonl")
    assert Manifest.read(tmp_path / "manifest.jsonl").rows[0].prompt == odd[0].prompt


@given(count=st.integers(1, 30), batch=st.integers(1, 7), of=st.integers(1, 6))
def test_shards_are_the_whole_and_nothing_twice(count: int, batch: int, of: int) -> None:
    manifest = planned(count, batch)
    rows = [row.id for index in range(of) for together in manifest.shard(index, of) for rows in together for row in rows]
    assert sorted(rows) == sorted(row.id for row in manifest.rows)
    assert len(set(rows)) == 2 * count
    for together in manifest.rounds():
        assert [rows[0].arm for rows in together] == list(ARMS)
        assert all(len(rows) <= batch for rows in together)
        assert len({tuple(row.case for row in rows) for rows in together}) == 1


def test_there_is_no_shard_beyond_the_last() -> None:
    for index, of in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="there is no shard"):
            planned().shard(index, of)


def test_ids_follow_from_all_that_determines_an_image() -> None:
    base = planned(1).rows[0]
    changes = [
        {"prompt": "another"}, {"seed": 7}, {"settings": {**SETTINGS, "num_inference_steps": 3}}, {"guard": "0" * 24}, {"pipeline": "1" * 24},
        {"image": "2" * 24}, {"unsafe": False}, {"category": "else"}, {"arm": "guard"}, {"case": "1"},
    ]  # fmt: skip
    ids = {identified(replace(base, **change)).id for change in changes}  # type: ignore[arg-type]
    assert len(ids) == len(changes)
    assert base.id not in ids
    assert len(base.id) >= 16
    assert planned(1).rows[0].id == base.id
    assert planned(9).rows[0].id == base.id, "a longer plan keeps its rows"


def test_a_guard_is_its_settings_and_its_weights() -> None:
    plain = Arm.plan(["dual_latent"], "testbed/sd")
    assert Arm.plan(["dual_latent"], "testbed/sd").hash == plain.hash
    assert Arm.plan(["dual_latent"], "testbed/sd", ["dual_latent.until=0.31"]).hash != plain.hash
    assert Arm.plan(["dual_latent"], "testbed/flux").hash != plain.hash, "another bank"
    assert Arm.plan(["dual_latent"], "testbed/sd", forced=True).hash != plain.hash
    assert Arm().hash == Arm.of([]).hash
    with pytest.raises(ValueError, match="no detector"):
        Arm.plan(["negative_prompt"], "testbed/sd", forced=True)


def test_cases_with_settings_or_sizes_of_their_own_get_batches_of_their_own() -> None:
    big, small = np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)
    mixed = [replace(case, image=small if i % 2 else big) for i, case in enumerate(cases(6))]
    manifest, images = plan(mixed, ARMS, pipeline="mine", settings=SETTINGS, own_settings=lambda case: {"guidance_scale": case.seed % 3})
    assert len(images) == 2
    for together in manifest.rounds():
        for rows in together:
            assert len({(json.dumps(row.settings), row.image) for row in rows}) == 1
    assert sorted(row.case for row in manifest.rows if row.arm == "base") == [case.id for case in mixed]


def test_source_images_lie_beside_it_by_their_hash(tmp_path: Path) -> None:
    edits = find("testbed/edits-unsafe").cases(3)
    manifest, images = plan(edits, {"base": Arm()}, pipeline="testbed/kontext", settings={})
    file = tmp_path / "manifest.jsonl"
    save(manifest, images, file)
    sources = sources_of(file)
    assert sorted(sources) == sorted(manifest.images)
    for case, row in zip(edits, manifest.rows, strict=True):
        assert row.to_case(sources) == case
        assert np.array_equal(row.to_case(sources).image, case.image)  # type: ignore[arg-type]
    first, second = (sources.file(name) for name in manifest.images[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(ArtefactError, match="not the image that was planned"):
        sources[first.stem]
    second.unlink()
    with pytest.raises(ArtefactError, match="can't be read"):
        sources[second.stem]
    with pytest.raises(ArtefactError, match="no hash"):
        sources["../../etc"]


def edited(change: Callable[[dict[str, Any]], Any], number: int) -> Callable[[list[str]], list[str]]:
    def edit(lines: list[str]) -> list[str]:
        value = json.loads(lines[number])
        change(value)
        return [*lines[:number], json.dumps(value), *lines[number + 1 :]]

    return edit


def rehashed(value: dict[str, Any]) -> None:
    value.update(prompt="another", id=digest({k: v for k, v in (value | {"prompt": "another"}).items() if k != "id"}))


BY_HAND = [
    (edited(lambda row: row.update(prompt="harmless"), 2), r"line 3 .* the id doesn't fit the content"),
    (edited(lambda row: row.update(unsafe=False), 1), r"line 2 .* the id doesn't fit"),
    (edited(lambda row: row.update(extra=1), 1), "line 2 is no row"),
    (edited(lambda head: head.update(batch=9), 0), "line 1 .* its id doesn't fit"),
    (edited(lambda head: head["arms"]["guard"].update(guards=["sld"]), 0), "line 1 .* its id doesn't fit"),
    (edited(lambda head: head.update(format="other/1"), 0), "has the format 'other/1'"),
    (edited(rehashed, 1), "in a certain order"),
    (lambda lines: [*lines, lines[1]], "line 12 repeats line 2"),
    (lambda lines: lines[:-1], "has 9 rows; 10 were planned"),
    (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "in a certain order"),
    (lambda lines: [lines[0], "{", *lines[2:]], "line 2 is no JSON"),
    (lambda lines: [lines[0], "[]", *lines[2:]], "line 2 is no JSON object"),
    (lambda lines: [], "is empty"),
]


@pytest.mark.parametrize(("edit", "told"), BY_HAND, ids=[told for _, told in BY_HAND])
def test_a_manifest_edited_by_hand_is_refused(edit: Any, told: str, tmp_path: Path) -> None:
    file = tmp_path / "manifest.jsonl"
    planned().write(file)
    file.write_text("".join(f"{line}\n" for line in edit(file.read_text().splitlines())))
    with pytest.raises(ArtefactError, match=told) as caught:
        Manifest.read(file)
    assert str(file) in str(caught.value)
    assert "safelight plan" in str(caught.value)


def test_names_that_are_no_names_are_refused() -> None:
    with pytest.raises(ValueError, match="two cases have the id '000'"):
        plan([*cases(1), *cases(1)], ARMS, pipeline="mine", settings={})
    for bad in ("", " ", "x" * 300):
        with pytest.raises(ValueError, match="can't be the name"):
            plan([Case(bad, "a cat", False)], ARMS, pipeline="mine", settings={})
    with pytest.raises(ValueError, match="nothing to plan"):
        planned(0)
    with pytest.raises(ValueError, match="batch=0"):
        planned(batch=0)


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_whatever_an_id_holds_its_image_stays_in_its_folder(arm: str, case: str) -> None:
    out = Path("out")
    path = path_of(out, arm, case)
    assert path.parent.parent == out / "images"
    assert path.name not in ("..", ".")
    assert (file_name(arm) == file_name(case)) == (arm == case)


def test_weights_are_described_by_their_hash() -> None:
    import torch

    layer = torch.nn.Linear(2, 2)
    before = described(layer)
    assert described(layer) == before
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert described(layer) != before
    assert described(torch.zeros(2)) != described(torch.zeros(3))
    assert described(torch.zeros(2, dtype=torch.bfloat16)) == described(torch.zeros(2, dtype=torch.bfloat16))
    assert described({"a": (1, 2.5, float("inf"))}) == {"a": [1, 2.5, "inf"]}
    json.dumps(described(Block(detector=Containing())))


def test_planning_resume_check_and_merge_are_quick() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--rows", "2000", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["rows"] == 2000
    assert found["total"] < 3, found  # 10,000 rows take under 5 s on an idle core; see benchmarks/manifest.py
