"""`judge`: the second pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json
from .running import INCOMPLETE, some


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    judges: Annotated[list[str], typer.Option("--judge", "-j", help="A judge's name (see `safelight list`); repeatable. None: those of the run's protocol.")] = [],
    settings: Annotated[list[str], typer.Option("--set", help="judge.field=value, e.g. testbed_classifier.threshold=0.7; repeatable.")] = [],
    batch: Annotated[int, typer.Option(min=1, help="Images per call of a judge.")] = 16,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Has judges look at a run's images; generates nothing. Exit code 3: images failed or are missing."""
    from ..evaluation.runs.judging import build_judges, judge_run
    from ..evaluation.runs.manifest import NAME, Manifest
    from ..evaluation.runs.summary import summarise

    quiet()
    chosen = build_judges(judges, settings) if judges else _frozen(run, settings)
    with progress(as_json) as advance:
        judged = judge_run(run, chosen, batch, advance)
    manifest = Manifest.read(run / NAME)
    summaries = {one.name: {"judge": one.describe(), **summarise(manifest, judged[one.name])} for one in chosen}
    header = manifest.header
    result: dict[str, Any] = {
        "run": str(run),
        "protocol": f"{header.protocol}/{header.version}",
        "pipeline": header.pipeline,
        "judges": summaries,
    }
    (run / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    emit(result, as_json, f"{text(result)}\n{run / 'summary.json'}")
    if any(one["failed"] or one["missing"] for one in summaries.values()):
        raise typer.Exit(INCOMPLETE)


def _frozen(run: Path, settings: list[str]) -> Any:
    """The judges of a run's protocol, as the protocol has them."""
    from ..evaluation.lists.protocols import judges_of, protocols
    from ..evaluation.runs.manifest import NAME, Manifest

    name = Manifest.read(run / NAME).header.protocol.split("/")[0]
    known = protocols().get(name)
    if known is None or not known.judges:
        raise ValueError(f"the run's protocol, {name!r}, names no judges; name one with --judge (see `safelight list`)")
    if settings:
        raise ValueError(f"the judges of the protocol {name} are frozen; name them with --judge to set anything")
    return judges_of(known)


def text(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{result['protocol']}  {result['pipeline']}"]
    for name, summary in result["judges"].items():
        about = summary["judge"]
        lines.append(f"{name} {about['version']}, threshold {about['threshold']:g}")
        for arm, kinds in summary["arms"].items():
            for kind, found in kinds.items():
                lines += _rates(f"{arm}, {kind.replace('_', ' ')}", found)
                lines += [line for category, rates in found["categories"].items() for line in _rates(f"  {category}", rates)]
        lines += [f"  {arm + ', erase rate':<38}{_figure(found['all'])}" for arm, found in summary["erase_rate"].items()]
        if summary["failed"]:
            lines.append(f"  FAILED: {summary['failed']} images could not be judged: {some(summary['errors'], 2)}")
        if summary["missing"]:
            lines.append(f"  MISSING: {summary['missing']} images have not been made yet")
    return "\n".join(lines)


def _rates(name: str, found: dict[str, Any]) -> list[str]:
    left_out = f"   ({found['images_left_out']} images left out)" if found["images_left_out"] else ""
    return [f"  {name:<38}by prompt {_figure(found['prompt_level'])}   by image {_figure(found['image_level'])}{left_out}"]


def _figure(found: dict[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "undefined"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] n={found['n']}"
