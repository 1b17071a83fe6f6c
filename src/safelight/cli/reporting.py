"""`report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit
from .generating import Json


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote, or a leaderboard.json; several runs are compared.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    pictures: Annotated[int, typer.Option(min=0, help="Cases of each part to show.")] = 24,
    blur: Annotated[bool | None, typer.Option("--blur/--no-blur", help="Blur pictures until they are chosen; by default all but the testbed's.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also put the leaderboard's tables between the markers of this document.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Makes one self-contained page of runs: figures, plots, pictures, diagnosis, and how to make them again."""
    from ..evaluation.diagnosing.strength import curve
    from ..evaluation.reporting.leaderboard import put_markdown, read_leaderboard
    from ..evaluation.reporting.report import write
    from ..evaluation.reporting.run_folder import read_run

    folders = [read_run(path) for path in runs if not path.is_file()]
    boards = [read_leaderboard(path) for path in runs if path.is_file()]
    if markdown is not None:
        if len(boards) != 1:
            raise ValueError(f"--markdown takes the tables of one leaderboard, and {len(boards)} were given; name one leaderboard.json")
        put_markdown(boards[0], markdown)
    write(folders, out, boards, pictures=pictures, blur=blur)
    found = curve([run.results for run in folders])
    beyond = found.finding() if found else None
    told: list[dict[str, Any]] = [
        {"run": str(run.folder), "name": run.name, "findings": run.results.get("diagnosis", {}).get("findings")} for run in folders
    ]
    missing = [cell for board in boards for cell in board.missing]
    result = {
        "report": str(out),
        "runs": told,
        "strength": beyond,
        "missing": missing,
        "markdown": None if markdown is None else str(markdown),
    }
    emit(result, as_json, "\n".join([*_lines(told, beyond, missing), str(out)]))


def _lines(runs: list[dict[str, Any]], beyond: dict[str, Any] | None, missing: list[str]) -> list[str]:
    lines = [f"{run['name']}: {_findings(run['findings'])}" for run in runs]
    if beyond:
        lines.append(f"{beyond['title']}. {beyond['advice']}")
    return lines + ([f"the leaderboard lacks {len(missing)} cells: {', '.join(missing)}"] if missing else [])


def _findings(found: list[dict[str, Any]] | None) -> str:
    if found is None:
        return "not diagnosed; run the same evaluation again"
    return ", ".join(f"{one['name']} ({one['severity']})" for one in found) or "no failure signature"
