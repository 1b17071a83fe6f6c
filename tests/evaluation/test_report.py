"""The page says what the run's folder says, asks nothing of the network, and shows nothing unasked."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_check import check

from safelight.cli import main
from safelight.errors import ArtefactError
from safelight.evaluation.case import Estimate
from safelight.evaluation.reporting.charts import Axis, axis, mark, pareto, spread, steps
from safelight.evaluation.reporting.labels import LABELS, interval, number, written
from safelight.evaluation.reporting.report import page
from safelight.evaluation.reporting.run_folder import read_run, short_names
from safelight.evaluation.runs.generate import write_png

FIGURES = {
    "unsafe_rate_base": 0.95, "unsafe_rate": 0.125, "erase_rate": 0.868, "retention": 0.975, "sadi_s": 0.125, "sadi": 0.9331, "fsr": 0.881,
    "untouched": 0.984, "over_refusal": 0.015, "overhead_benign": 1.019, "overhead_unsafe": 1.234, "sadi_delta_p": 0.0087, "frechet": 3.21,
}  # fmt: skip
FINDING = {
    "name": "context_loss", "severity": "severe", "title": "What was harmless goes", "advice": "For sld lower `scale` & rest.",
    "examples": ["unsafe/00002"], "figures": {"retention": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 9, "limit": "at least 80 %", "why": "why"}},
}  # fmt: skip


def figure(value: float | None, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": value and value - 0.05, "high": value and value + 0.05, "n": n}


def make_run(folder: Path, *, protocol: str = "testbed/weapons/1", figures: dict[str, float | None] = FIGURES, **changes: Any) -> Path:
    """A run's folder with small pictures: case 2 is unsafe with the guard, case 3 is untouched."""
    random = np.random.default_rng(0)
    for part, count in (("unsafe", 5), ("benign", 3)):
        lines, rows = [], []
        for index in range(count):
            case, flagged = f"{index:05d}", part == "unsafe" and index != 3
            for arm in ("base", "guard"):
                image = f"images/{arm}/{case}.png"
                write_png(random.random((8, 8, 3)).astype(np.float32), folder / part / image)
                action = {
                    "method": "sld",
                    "flagged": flagged,
                    "concept": "weapons",
                    "score": 0.9,
                    "threshold": 0.5,
                    "action": "guided away",
                }
                record = {"prompt": f"prompt <{index}> of {part}", "flagged": flagged, "actions": [action]}
                digest = f"{arm if flagged else 'same'}{case}"
                lines.append({"case": case, "arm": arm, "image": image, "sha256": digest, "seconds": 0.1, "record": record if arm == "guard" else None})  # fmt: skip
            seen = (
                {"classifier": {"base": True, "guard": index == 2}, "matcher": {"base": True, "guard": False}} if part == "unsafe" else {}
            )
            rows.append({"case": case, "prompt": f"prompt <{index}> of {part}", "unsafe": part == "unsafe", "seed": 1000 + index, "category": "weapons",
                         "groups": ["weapons"], "seen": seen})  # fmt: skip
        (folder / part / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / part / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = {
        name: figure(value) for name, value in figures.items() if name in ("unsafe_rate_base", "unsafe_rate", "erase_rate", "retention")
    }
    results = {
        "protocol": protocol, "n": 64, "pipeline": "testbed/sd", "guard": "sld", "settings": [], "sizes": {"unsafe": 5, "benign": 3},
        "metrics": {name: figure(value) for name, value in figures.items()}, "judges": {"classifier": judged, "matcher": judged},
        "judge_versions": {"classifier": {"version": "9", "threshold": 0.5}, "matcher": {"version": "7", "threshold": 0.3}},
        "categories": {"weapons": judged}, "diagnosis": {"findings": [], "not_assessed": {}}, "versions": {"torch": "2.13.0"},
        "artefacts": {"vae.safetensors": "8f5c7ec3bdf2326e"}, "command": "safelight evaluate -g sld --out 'my runs/x'",
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def test_a_page_says_what_the_folder_says(tmp_path: Path) -> None:
    parsed = check(page([read_run(make_run(tmp_path))]))
    for name, value in FIGURES.items():
        if name != "sadi_s":
            assert number(value, LABELS[name].share) in parsed.text, name
    for told in ("testbed/weapons/1", "1000 to 1004", "torch 2.13.0", "8f5c7ec3bdf2326e", "safelight evaluate -g sld --out 'my runs/x'", "version 9",
                 "No failure signature", "agree in direction", "bit-identical", "prompt <2> of unsafe", "still unsafe: classifier"):  # fmt: skip
        assert told in parsed.text, told
    other = check(page([read_run(make_run(tmp_path, figures=FIGURES | {"retention": 0.4321}))]))
    assert "43.2 %" in other.text
    assert "97.5 %" not in other.text


def test_undefined_figures_say_so(tmp_path: Path) -> None:
    parsed = check(page([read_run(make_run(tmp_path, figures=FIGURES | {"erase_rate": None, "frechet": None}))]))
    assert parsed.text.count("undefined") >= 2
    assert "nan" not in parsed.text.lower()


def test_findings_are_shown_with_their_figures(tmp_path: Path) -> None:
    diagnosis = {"findings": [FINDING], "not_assessed": {"mode_collapse": "too few pictures"}}
    text = page([read_run(make_run(tmp_path, diagnosis=diagnosis))])
    parsed = check(text)
    for told in (
        "What was harmless goes",
        "context loss, severe",
        "40 %",
        "30 to 50 %",
        "at least 80 %",
        "unsafe/00002",
        "Not assessed: mode collapse",
    ):
        assert told in parsed.text
    assert "<code>scale</code> &amp; rest" in text
    assert "No failure signature" not in parsed.text
    examples = [item for item in parsed.of("li") if "example" in (item.get("class") or "").split()]
    assert len(examples) == 1


def test_old_runs_can_be_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for key in ("diagnosis", "categories", "artefacts", "settings"):
        del results[key]
    (tmp_path / "results.json").write_text(json.dumps(results))
    for part in ("unsafe", "benign"):
        (tmp_path / part / "judged.jsonl").unlink()
    parsed = check(page([read_run(tmp_path)]))
    assert "has not been diagnosed" in parsed.text
    assert "prompt <2> of unsafe" in parsed.text  # from the guard's record


def test_pictures_of_real_protocols_are_veiled(tmp_path: Path) -> None:
    real, testbed = make_run(tmp_path / "real", protocol="i2p/1"), make_run(tmp_path / "testbed")
    parsed = check(page([read_run(real)]))
    veils = [tag for tag in parsed.of("label") if tag.get("class") == "veil"]
    assert len(veils) == len(parsed.of("img")) > 0
    boxes = [box for box in parsed.of("input") if box["type"] == "checkbox"]
    assert all(box.get("aria-label") or box.get("class") == "all" for box in boxes)
    assert not any("checked" in box for box in boxes)
    assert not any("prompt" in str(picture["alt"]) for picture in parsed.of("img"))
    assert not [tag for tag in check(page([read_run(testbed)])).of("label") if tag.get("class") == "veil"]
    assert [tag for tag in check(page([read_run(testbed)], blur=True)).of("label") if tag.get("class") == "veil"]
    assert not [tag for tag in check(page([read_run(real)], blur=False)).of("label") if tag.get("class") == "veil"]


def test_the_most_telling_cases_come_first(tmp_path: Path) -> None:
    diagnosis = {"findings": [FINDING | {"examples": ["unsafe/00004"]}], "not_assessed": {}}
    text = page([read_run(make_run(tmp_path, diagnosis=diagnosis))], pictures=2)
    assert "guarded picture of case 00004" in text
    assert "guarded picture of case 00002" in text  # still unsafe
    assert "picture of case 00001" not in text.split("Pictures: benign")[0]
    assert "2 of 5 cases" in text


def test_several_runs_are_compared_and_make_a_curve(tmp_path: Path) -> None:
    kept = {1: 0.99, 10: 0.95, 100: 0.4}
    runs = [
        read_run(make_run(tmp_path / str(scale), figures=FIGURES | {"retention": value}, settings=[f"sld.scale={scale}"]))
        for scale, value in kept.items()
    ]
    parsed = check(page(runs))
    for told in (
        "3 runs of sld on testbed/sd",
        "Strength: sld.scale",
        "Side by side",
        "scale=10",
        "Use sld.scale = 1; 100 erases no more and keeps less",
    ):
        assert told in parsed.text, told
    assert short_names([runs[0], runs[0]])[1] == ["1", "1"]  # their folder's name, where nothing else tells
    different = page([runs[0], read_run(make_run(tmp_path / "flux", pipeline="testbed/flux"))])
    assert "Strength:" not in different
    check(different)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        page([])
    with pytest.raises(ArtefactError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not finished"):
        read_run(tmp_path)
    for text in ("{", "[]", '{"metrics": {"erase_rate": 3}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ArtefactError, match="no results file"):
            read_run(tmp_path)
    make_run(tmp_path)
    (tmp_path / "unsafe" / "judged.jsonl").write_text('{"case": "00000"}\n')
    with pytest.raises(ArtefactError, match="line 1 is damaged"):
        read_run(tmp_path)
    make_run(tmp_path)
    (tmp_path / "unsafe" / "images" / "guard" / "00002.png").unlink()
    with pytest.raises(ArtefactError, match=r"00002\.png can't be read"):
        page([read_run(tmp_path)])


def test_the_command_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", diagnosis={"findings": [FINDING], "not_assessed": {}})
    out = tmp_path / "pages" / "report.html"
    monkeypatch.setattr(sys, "argv", ["safelight", "report", str(tmp_path / "run"), "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert told["runs"][0]["findings"][0]["name"] == "context_loss"
    check(out.read_text())


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6), st.booleans())
def test_numbers_are_written_without_noise(value: float, share: bool) -> None:
    text = number(value, share)
    assert not text.startswith("-0 ")
    assert text not in ("-0", "-0 %")
    assert float(text.removesuffix(" %").replace(",", "")) == pytest.approx(value * 100 if share else value, abs=0.51)
    assert number(math.nan, share) == "undefined"
    assert interval(Estimate(0.5, math.nan, math.nan, 1), share) == "no interval"
    assert written(Estimate(0.5, 0.4, 0.6, 9)) == "50 %"


estimates = st.tuples(st.floats(-2, 2), st.floats(0, 1), st.floats(0, 1)).map(lambda t: Estimate(t[0], t[0] - t[1], t[0] + t[2], 9))


@given(st.lists(estimates, min_size=1, max_size=6), st.booleans(), st.booleans(), st.booleans())
def test_an_axis_holds_what_is_drawn_on_it(found: list[Estimate], share: bool, flipped: bool, fitted: bool) -> None:
    on = axis(found, share, flipped=flipped, fitted=fitted)
    assert on.low < on.high
    assert 1 <= len(on.ticks) <= 8
    assert all(-0.01 <= place <= 100.01 for place, _ in on.ticks)
    for one in found:
        drawn = mark(one, on)
        assert drawn is not None
        assert 0 <= drawn.low <= drawn.value <= drawn.high <= 100
    assert mark(Estimate(math.nan, math.nan, math.nan, 0), on) is None


def test_a_flipped_axis_begins_at_the_top() -> None:
    assert [Axis(0, 1, 200, True, True).at(value) for value in (0, 0.25, 1)] == [200, 150, 0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_labels_keep_apart_and_inside(wanted: list[float]) -> None:
    places = spread(wanted, 8.0, 0.0, 100.0)
    ordered = sorted(places)
    assert all(later - earlier >= 7.98 for earlier, later in pairwise(ordered))
    assert ordered[0] >= -0.02
    assert ordered[-1] <= 100.02


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=10))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    assert front
    for index, own in enumerate(points):
        beaten = any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in points)
        assert (index in front) == (not beaten)
    assert steps([points[index] for index in front]).startswith("M")
    assert steps([]) == ""
