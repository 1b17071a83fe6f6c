"""A leaderboard is complete or says what it lacks, and its tables hold its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_check import check

from safelight.cli import main
from safelight.errors import ArtefactError
from safelight.evaluation.reporting.leaderboard import (
    ATTACKS,
    COLUMNS,
    END,
    METHODS,
    OPTIONAL,
    START,
    markdown,
    put_markdown,
    read_leaderboard,
)
from safelight.evaluation.reporting.leaderboard_page import attacked, cost, panels
from safelight.evaluation.reporting.report import page

BACKBONES = ("testbed/sd", "testbed/sd3")
ROWS = [method for method in METHODS if method not in OPTIONAL]


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": value and value * 0.9, "high": value and value * 1.1, "n": 80}


def board(**changes: Any) -> dict[str, Any]:
    """A whole leaderboard: the later a method's row, the safer."""
    cells = []
    for backbone in BACKBONES:
        for index, method in enumerate(ROWS):
            for column in COLUMNS:
                cell: dict[str, Any] = {"method": method, "backbone": backbone, "column": column}
                success = 0.9 - 0.07 * index
                if column in ATTACKS:
                    cell["figures"] = {
                        "asr": figure(success),
                        "asr_classifier": figure(success),
                        "erase_rate": figure(None),
                        "retention": figure(0.81),
                    }
                else:
                    cell["figures"] = {
                        "untouched": figure(0.99),
                        "over_refusal": figure(0.01),
                        "sadi_delta_p": figure(0.002 * index),
                        "overhead": figure(1.2),
                    }
                if method == "uvr" and backbone == "testbed/sd":
                    cell = {key: cell[key] for key in ("method", "backbone", "column")} | {"impossible": "uvr needs joint attention"}
                cells.append(cell)
    claims = [
        {"claim": "a | b", "source": "paper, 4", "holds": True, "figures": "3 %", "variant": False},
        {"claim": "c", "source": "", "holds": None, "figures": ""},
        {"claim": "d", "source": "", "holds": True, "figures": ""},
    ]
    return {"kind": "leaderboard", "concept": "weapons", "versions": {"torch": "2.13.0"}, "command": "python recipes/leaderboard.py", "seconds": 600.0,
            "cells": cells, "claims": claims} | changes  # fmt: skip


def written(folder: Path, given: Any) -> Path:
    file = folder / "leaderboard.json"
    file.write_text(json.dumps(given))
    return file


def test_a_complete_leaderboard_lacks_nothing(tmp_path: Path) -> None:
    found = read_leaderboard(written(tmp_path, board()))
    assert found.missing == []
    assert found.complete() is found
    assert found.methods == ROWS
    assert found.backbones == list(BACKBONES)


def test_missing_cells_are_named(tmp_path: Path) -> None:
    given = board()
    given["cells"] = [c for c in given["cells"] if (c["method"], c["column"]) != ("safree", "ring_a_bell") and c["method"] != "combination"]
    found = read_leaderboard(written(tmp_path, given))
    assert "safree / testbed/sd3 / ring_a_bell" in found.missing
    assert "combination / testbed/sd / plain" in found.missing
    assert len(found.missing) == 2 + 2 * len(COLUMNS)
    with pytest.raises(ArtefactError, match=r"lacks 14 cells: .*safree / testbed/sd / ring_a_bell"):
        found.complete()
    assert "14 cells are missing" in check(page([], [found])).text
    assert markdown(found).startswith("14 of its cells are missing")


def test_further_methods_stand_before_the_combination(tmp_path: Path) -> None:
    given = board()
    given["cells"] += [{**cell, "method": new} for cell in given["cells"] if cell["method"] == "block" for new in ("mine", "sld-max")]
    found = read_leaderboard(written(tmp_path, given))
    assert found.methods[-2:] == ["mine", "combination"]
    assert found.methods.index("sld-max") == found.methods.index("sld-medium") + 1
    assert found.missing == []


def test_tables_hold_the_figures(tmp_path: Path) -> None:
    found = read_leaderboard(written(tmp_path, board()))
    text = markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("| unguarded ")]
    assert len(rows) == 2
    assert rows[0].startswith("| unguarded | 90 (81 to 99) | 90 (81 to 99) |")
    assert "| uvr | impossible |" in text
    assert "| a \\| b | paper, 4 | holds | 3 % |" in text
    assert "| d |  | our variant reaches it |  |" in text, "that a claim holds is said of the published method only"
    assert "`python recipes/leaderboard.py`, 10 minutes" in text
    parsed = check(page([], [found]))
    for told in (
        "90 %",
        "81 to 99 %",
        "uvr: uvr needs joint attention",
        "holds",
        "undecided",
        "python recipes/leaderboard.py",
        "Attack by attack",
    ):
        assert told in parsed.text, told
    assert len(parsed.of("button")) == 2 * (1 + 10)
    hints = [cell["title"] for cell in parsed.of("td") if cell.get("title")]
    assert any("ASR, plain 90 %, 95 % interval 81 to 99 %, n = 80; attack success, classifier 90 %" in str(hint) for hint in hints)


def test_plots_stand_on_the_figures(tmp_path: Path) -> None:
    found = read_leaderboard(written(tmp_path, board()))
    assert cost(found, "uvr", "testbed/sd") is None
    paid, strongest = cost(found, "block", "testbed/sd"), attacked(found, "block", "testbed/sd")
    assert paid is not None
    assert paid.value == pytest.approx(0.002 * ROWS.index("block"))
    assert strongest is not None
    assert strongest[0] == "plain"  # the first of equals
    scatter = panels(found).backbones[0].scatter
    assert scatter.absent == ["uvr"]
    assert all(point.front for point in scatter.points)  # each later one is safer and costs more
    assert scatter.front.count("H") == len(scatter.points) - 1
    bars = panels(found).attacks[0]
    assert bars.rows[ROWS.index("uvr")][1][0] is None
    assert bars.rows[0][1][0].value == pytest.approx(90)  # type: ignore[union-attr]


def test_figures_that_are_undefined_or_equal_can_be_shown(tmp_path: Path) -> None:
    given = board()
    for cell in given["cells"]:
        cell["figures"] = {name: figure(None if name == "asr" else 0.5) for name in cell.get("figures", {})} or None
        cell.update({} if cell["figures"] else {"impossible": "no"})
    parsed = check(page([], [read_leaderboard(written(tmp_path, given))]))
    assert "undefined" in parsed.text


Change = Callable[[dict[str, Any]], Any]
BAD: list[tuple[Change, str]] = [
    (lambda b: b.update(kind="run"), "is no leaderboard"),
    (lambda b: b.update(cells={}), "no list of cells"),
    (lambda b: b.update(cells=[]), "has no cells"),
    (lambda b: b["cells"].append(b["cells"][0]), "two cells unguarded / testbed/sd / plain"),
    (lambda b: b["cells"][0].update(column="p4d"), "no column 'p4d'"),
    (lambda b: b["cells"][0].pop("method"), "does not name its method"),
    (lambda b: b["cells"][0].update(figures={}), "has no figures"),
    (lambda b: b["cells"][0]["figures"].pop("asr"), "has no asr"),
    (lambda b: b["cells"][0]["figures"].update(bogus=1), "unknown figures bogus"),
    (lambda b: b["cells"][0]["figures"].update(asr={"value": 1}), "asr needs value, low, high and n"),
    (lambda b: b["cells"][0]["figures"]["asr"].update(value="much"), "asr is no figure"),
    (lambda b: b["cells"][0]["figures"]["asr"].update(high=0.1), "outside its own interval"),
    (lambda b: b["claims"][0].update(holds="yes"), 'claim 0 needs a "claim"'),
]


@pytest.mark.parametrize(("change", "told"), BAD, ids=[told for _, told in BAD])
def test_what_can_not_be_right_is_refused(change: Change, told: str, tmp_path: Path) -> None:
    given = board()
    change(given)
    with pytest.raises(ArtefactError, match=told):
        read_leaderboard(written(tmp_path, given))


def test_the_command_writes_page_and_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, document, out = written(tmp_path, board()), tmp_path / "doc.md", tmp_path / "board.html"
    document.write_text(f"before\n\n{START}\nstale\n{END}\n\nafter\n")
    monkeypatch.setattr(sys, "argv", ["safelight", "report", str(file), "-o", str(out), "--markdown", str(document), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["missing"] == []
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "| unguarded | 90" in text
    assert "stale" not in text
    check(out.read_text())
    put_markdown(read_leaderboard(file), document)
    assert document.read_text() == text
    document.write_text("no place")
    with pytest.raises(ArtefactError, match="has no place for a leaderboard"):
        put_markdown(read_leaderboard(file), document)
    with pytest.raises(ArtefactError, match="can't be read as a leaderboard"):
        read_leaderboard(document)
