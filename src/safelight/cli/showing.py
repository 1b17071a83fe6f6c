"""`list`, `describe` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Lists guards, detectors, judges, attacks, pipelines and benchmarks."""
    from ..bundle import DETECTORS, METHODS
    from ..evaluation.attack import ATTACKS
    from ..evaluation.benchmarks.testbed import benchmarks
    from ..evaluation.runs.judging import JUDGES

    result = {
        "guards": METHODS.names(),
        "detectors": DETECTORS.names(),
        "judges": JUDGES.names(),
        "attacks": ATTACKS.names(),
        "pipelines": ["testbed/sd", "testbed/sd3", "testbed/flux", "testbed/kontext"],
        "benchmarks": [one.name for one in benchmarks()],
    }
    emit(result, as_json, "\n".join(f"{kind}: {', '.join(names)}" for kind, names in result.items()))


@app.command()
def describe(name: str, as_json: Json = False) -> None:
    """Says what a guard, detector, judge or attack does, and what can be set."""
    import inspect

    from ..bundle import DETECTORS, METHODS
    from ..evaluation.attack import ATTACKS
    from ..evaluation.runs.judging import JUDGES
    from ..schema import fields_of

    registries: tuple[Any, ...] = (METHODS, DETECTORS, JUDGES, ATTACKS)
    registry: Any = next((one for one in registries if name in one.names()), METHODS)  # whose error names the nearest guards
    cls = registry[name]
    fields = fields_of(cls)
    result = {"name": name, "doc": inspect.cleandoc(cls.__doc__ or ""), "fields": [_field(field) for field in fields]}
    lines = [f"{name}: {result['doc']}", ""]
    for field in fields:
        extent = f"one of {', '.join(field.choices)}" if field.choices else f"{field.kind}{field.range}"
        default = "" if field.default is None else f", default {field.default}"
        lines.append(f"  {name}.{field.name} ({extent}{default})\n      {field.doc}")
    emit(result, as_json, "\n".join(lines))


def _field(field: Any) -> dict[str, Any]:
    default = field.default if isinstance(field.default, (int, float, str, bool, type(None))) else str(field.default)
    return {name: value for name, value in vars(field).items() if name != "of"} | {"default": default, "choices": list(field.choices)}


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sheet and the page go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    as_json: Json = False,
) -> None:
    """Shows every guard before and after, on the bundled models: a contact sheet and a page."""
    from ..demo import run

    quiet()
    with progress(as_json) as advance:
        result = run(out, steps, advance)
    emit(result, as_json, f"{result['sheet']}\n{result['page']}\n{result['summary']}")
