"""A run's folder: resumed, refused, merged; no row is lost, doubled or somebody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelight.errors import ArtefactError
from safelight.evaluation.case import Case
from safelight.evaluation.engines.local import Local
from safelight.evaluation.runs.arms import Arm
from safelight.evaluation.runs.durable import only_one, write_atomically
from safelight.evaluation.runs.engine import Job
from safelight.evaluation.runs.generate import Maker, generate, generate_shard
from safelight.evaluation.runs.manifest import NAME, Manifest, plan, save, sources_of
from safelight.evaluation.runs.merge import merge
from safelight.evaluation.runs.store import check_outcomes, opened, read_outcomes, read_picture
from safelight.generator import Generator

ARMS = {"base": Arm(), "guard": Arm()}


class Painter(Generator):
    """Paints a colour that follows from prompt and seed, as a pipeline would."""

    def __call__(self, requests: Any) -> Any:
        colours = [(len(request.prompt) % 7, request.seed % 11, int(self.settings.get("tone", 0))) for request in requests]
        return np.stack([np.ones((4, 4, 3), np.float32) * np.float32(colour) / 11 for colour in colours])


@pytest.fixture(autouse=True)
def _painted(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Maker(Painter(None, {}), {"base": (), "guard": ()})
    monkeypatch.setattr(Maker, "load", classmethod(lambda cls, header, device="auto": loaded))


@pytest.fixture
def manifest() -> Manifest:
    return planned()


def planned(count: int = 6, **changes: Any) -> Manifest:
    cases = [Case(f"{i}", "a cat" + "!" * i, True, seed=i) for i in range(count)]
    return plan(cases, ARMS, pipeline="painted", settings={"tone": 1}, batch=2, **changes)[0]


def run(manifest: Manifest, out: Path, shard: Any = None, **options: Any) -> None:
    Local(shard=shard)(Job(manifest, sources_of(out / NAME), out, **options))


def hashes(out: Path) -> dict[str, str]:
    return {outcome.id: outcome.sha256 for outcome in read_outcomes(out)}


def lines(out: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in out.glob("outcomes*.jsonl"))


def test_every_row_gets_its_image_and_its_line(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    outcomes = read_outcomes(tmp_path)
    assert {outcome.id for outcome in outcomes} == set(manifest.by_id)
    for outcome in outcomes:
        assert outcome.image == f"images/{outcome.arm}/{outcome.case}.png"
        assert read_picture(tmp_path, outcome).shape == (4, 4, 3)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_finished_is_not_made_again(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    file = tmp_path / "outcomes.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:5]) + whole[5][:40])  # interrupted in the middle of a batch
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    run(manifest, tmp_path)
    assert file.read_text().splitlines(keepends=True)[:5] == whole[:5]
    assert lines(tmp_path) == len(manifest.rows)
    kept = [tmp_path / json.loads(line)["image"] for line in whole[:5]]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)


def test_a_line_without_its_image_is_refused_or_made_again(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    before = hashes(tmp_path)
    gone = [tmp_path / outcome.image for outcome in read_outcomes(tmp_path)[:3]]
    for path in gone:
        path.unlink()
    with pytest.raises(ArtefactError, match=r"images/base/0.png can't be read: it is missing, as are 2 other .* --remake"):
        run(manifest, tmp_path)
    run(manifest, tmp_path, remake=True)
    assert all(path.is_file() for path in gone)
    assert hashes(tmp_path) == before
    assert lines(tmp_path) == len(before)


def test_a_damaged_line_is_named(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    file = tmp_path / "outcomes.jsonl"
    whole = file.read_text().splitlines()
    outside = json.dumps(json.loads(whole[2]) | {"image": "../../secret.png"})
    for number, bad in ((0, "garbage"), (3, '{"case": "0"}'), (2, outside), (1, "[]")):
        file.write_text("\n".join([*whole[:number], bad, *whole[number + 1 :]]) + "\n")
        with pytest.raises(ArtefactError, match=f"line {number + 1} is damaged .* remove that line"):
            run(manifest, tmp_path)


def test_a_folder_holds_one_run_and_may_grow(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    with pytest.raises(ArtefactError, match="holds a run with other settings"):
        run(replace(manifest, rows=planned(6, protocol="x").rows[1:]), tmp_path)
    grown = planned(8)
    assert set(manifest.by_id) < set(grown.by_id)
    with pytest.raises(ArtefactError, match="doesn't ask for"):
        check_outcomes(tmp_path, replace(manifest, rows=manifest.rows[2:]))
    run(grown, tmp_path)
    assert set(hashes(tmp_path)) == set(grown.by_id)
    (tmp_path / NAME).unlink()
    with pytest.raises(ArtefactError, match="nobody knows what they are"):
        run(grown, tmp_path)


def test_two_runs_into_one_folder(manifest: Manifest, tmp_path: Path) -> None:
    with opened(tmp_path, manifest), pytest.raises(ArtefactError, match=f"is in use by process {os.getpid()} on "):
        run(manifest, tmp_path)
    with only_one(tmp_path, (0, 2)):
        for shard in ((0, 2), None, (1, 3)):
            with pytest.raises(ArtefactError, match="is in use"):
                run(manifest, tmp_path, shard)
        run(manifest, tmp_path, (1, 2))
        with pytest.raises(ArtefactError, match="is in use"):
            merge(tmp_path)
    with only_one(tmp_path), pytest.raises(ArtefactError, match="is in use"):
        run(manifest, tmp_path, (0, 2))
    run(manifest, tmp_path)
    assert set(hashes(tmp_path)) == set(manifest.by_id)


HOLD = """
import sys, time
from pathlib import Path
from safelight.evaluation.runs.durable import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_lock_of_a_dead_process_is_none(holder: subprocess.Popen[str], manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=f"is in use by process {holder.pid} on "):
        run(manifest, tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run(manifest, tmp_path)
    assert len(hashes(tmp_path)) == len(manifest.rows)


def test_shards_merge_to_what_one_process_makes(manifest: Manifest, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(manifest, whole)
    for index in range(2):
        run(manifest, parts, (index, 3))
    merged = merge(parts)
    assert [row.id for row in merged.missing] == [row.id for together in manifest.shard(2, 3) for rows in together for row in rows]
    run(manifest, parts, (2, 3))
    assert not merge(parts).missing
    assert hashes(parts) == hashes(whole)
    assert lines(parts) == len(manifest.rows)
    assert [outcome.id for outcome in read_outcomes(parts)] == [row.id for row in manifest.rows]
    assert [file.name for file in parts.glob("outcomes*")] == ["outcomes.jsonl"]
    run(manifest, parts, (0, 3))
    assert merge(parts).rows == len(manifest.rows), "what is merged is not made again"


def test_folders_of_several_machines_merge(manifest: Manifest, tmp_path: Path) -> None:
    first, second, both = tmp_path / "first", tmp_path / "second", tmp_path / "both"
    run(manifest, first, (0, 2))
    run(manifest, second, (1, 2))
    run(manifest, second, (0, 2))
    assert not merge(both, [first, second]).missing
    assert lines(both) == len(manifest.rows)
    assert all((both / outcome.image).is_file() for outcome in read_outcomes(both))
    assert lines(second) == len(manifest.rows), "sources stay as they are"


def test_what_does_not_belong_together_is_not_merged(manifest: Manifest, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(manifest, first)
    run(planned(4), second)
    with pytest.raises(ArtefactError, match="of another manifest"):
        merge(tmp_path / "both", [first, second])
    third = tmp_path / "third"
    run(manifest, third)
    file = third / "outcomes.jsonl"
    file.write_text(file.read_text().replace(read_outcomes(third)[0].sha256, "f" * 24, 1))
    with pytest.raises(ArtefactError, match=r"have different images of arm base, case 0 .*ffff"):
        merge(tmp_path / "both", [first, third])
    (first / "images" / "base" / "0.png").unlink()
    with pytest.raises(ArtefactError, match=r"base/0.png is missing, .* --remake"):
        merge(first)
    with pytest.raises(ArtefactError, match="can't be read as a manifest"):
        merge(tmp_path / "nothing")


def test_one_image_with_two_hashes_is_a_conflict(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path, (0, 2))
    line = read_outcomes(tmp_path)[0]
    (tmp_path / "outcomes-1-of-2.jsonl").write_text(json.dumps(line.to_json() | {"sha256": "f" * 24}) + "\n")
    with pytest.raises(ArtefactError, match="two different images for arm base, case 0"):
        merge(tmp_path)


def test_rows_settings_reach_the_pipeline(tmp_path: Path) -> None:
    make = Maker(Painter(None, {"tone": 3}), {"base": ()})
    for tone, expected in ((3, 3), (9, 9)):
        manifest, _ = plan([Case("0", "a", False)], {"base": Arm()}, pipeline="painted", settings={"tone": tone})
        ((made,),) = generate_shard(manifest.rounds()[0], make, {})
        assert made.outcome.pixels
        save(manifest, {}, tmp_path / str(tone) / NAME)
        with opened(tmp_path / str(tone), manifest) as store:
            store.keep([made])
            store.keep([made])
        assert read_picture(tmp_path / str(tone), made.outcome)[0, 0, 2] == round(expected / 11 * 255)
        assert lines(tmp_path / str(tone)) == 1, "kept once"


def test_generate_resumes_and_grows(tmp_path: Path) -> None:
    cases = [Case(str(i), "a cat", False, seed=i) for i in range(5)]
    counted: list[int] = []
    first = list(generate(Painter(None, {}), cases[:3], {"base": ()}, tmp_path, 2, counted.append))
    again = list(generate(Painter(None, {}), cases, {"base": ()}, tmp_path, 2, counted.append))
    assert [outcome.case for outcome in again] == [case.id for case in cases]
    assert again[:3] == first
    assert sum(counted) == 8
    with pytest.raises(ArtefactError, match="other settings"):
        list(generate(Painter(None, {"tone": 2}), cases, {"base": ()}, tmp_path, 2))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "x", b"whole")
    (tmp_path / "a" / "y").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a" / "y", b"other")
    assert (tmp_path / "a" / "x").read_bytes() == b"whole"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x", "y"]
