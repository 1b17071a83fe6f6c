"""The page of runs and leaderboards: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape

from ... import __version__
from ..diagnosing.strength import curve, estimate
from .curve_page import curve_plots
from .labels import interval, written
from .leaderboard import Leaderboard
from .leaderboard_page import panels
from .run_folder import RunFolder, short_names
from .run_page import comparison, run_page

PICTURES = 24
"""Cases of each part that a page shows."""


def page(runs: Sequence[RunFolder], boards: Sequence[Leaderboard] = (), *, pictures: int = PICTURES, blur: bool | None = None) -> str:
    """The HTML of some runs and leaderboards.

    Args:
        runs: One is shown in full; several are compared first, and drawn as a curve if they differ in one setting only.
        boards: Leaderboards come before runs.
        pictures: So many cases of each part are shown.
        blur: Whether pictures are blurred until they are chosen; by default those of all protocols but the testbed's.

    Raises:
        ValueError: if there is nothing to show.
    """
    if not runs and not boards:
        raise ValueError("there is nothing to report; give the folder of a run, or a leaderboard.json")
    template = environment().get_template("report.html")
    found = curve([run.results for run in runs])
    common, names = short_names(runs) if len(runs) > 1 else ("", [run.name for run in runs])
    return template.render(
        common=common, names=names, runs=[run_page(run, pictures) for run in runs], boards=[panels(board) for board in boards], version=__version__, blur=blur,
        comparison=comparison(runs) if len(runs) > 1 else [], curve=found, plots=curve_plots(found) if found else [],
        beyond=found.finding() if found else None,
    )  # fmt: skip


def environment() -> Environment:
    """The templates, with what they call figures and parts."""
    made = Environment(loader=PackageLoader("safelight"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True)
    made.filters["written"] = written
    made.filters["interval"] = interval
    made.filters["marked"] = marked
    made.filters["figure"] = estimate
    return made


def write(
    runs: Sequence[RunFolder], out: Path, boards: Sequence[Leaderboard] = (), *, pictures: int = PICTURES, blur: bool | None = None
) -> Path:
    """Writes the page, whole or not at all."""
    text = page(runs, boards, pictures=pictures, blur=blur)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    return out


def marked(text: str) -> Markup:
    """Words between back-ticks as code."""
    words = [escape(word) for word in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(word) if index % 2 else word for index, word in enumerate(words))
