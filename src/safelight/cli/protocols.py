"""`protocols`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import app
from .console import emit
from .generating import Json


@app.command()
def protocols(
    name: Annotated[str | None, typer.Argument(help="A protocol; all are listed without one.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Your copy of its list: a file, or hub:owner/name/file. Nothing for testbed-….")
    ] = None,
    custom: Annotated[str | None, typer.Option(help="Take another list with the protocol's settings, under this name.")] = None,
    encoding: Annotated[str, typer.Option(help="Of the file.")] = "utf-8",
    as_json: Json = False,
) -> None:
    """Lists the evaluation protocols; or reads a protocol's list, and says what was dropped and whether it is the frozen one."""
    from ..evaluation.lists.protocols import protocol
    from ..evaluation.lists.protocols import protocols as known

    if name is None:
        if source or custom:
            raise ValueError("--source and --custom belong to one protocol; name it")
        listed = [one.to_json() for one in known().values()]
        emit({"protocols": listed}, as_json, "\n".join(f"{one['id']:<48}{_settings(one)}" for one in listed))
    elif source or name.startswith("testbed-"):
        emit(*_read(protocol(name), source, custom, encoding, as_json))
    else:
        found = protocol(name)
        emit(found.to_json() | _list(found.prompts), as_json, _lines(found.to_json() | _list(found.prompts)))


def _read(found: Any, source: str | None, custom: str | None, encoding: str, as_json: bool) -> tuple[dict[str, Any], bool, str]:
    """Reads the list of a protocol; a list that isn't the frozen one is refused."""
    from ..evaluation.lists.prompt_set import Benchmark
    from ..evaluation.lists.protocols import find

    benchmark = find(found.prompts, source, encoding=encoding)
    if not isinstance(benchmark, Benchmark):
        kept = tuple(benchmark.cases(found.frozen.cases))
        benchmark = Benchmark(benchmark.name, benchmark.name, kept, len(kept), 0)
    accepted = found.custom(custom, benchmark) if custom else found.accept(benchmark)
    state = "recorded from this file" if accepted.recorded else "frozen, and this is it"
    result = {
        "protocol": accepted.id,
        "source": benchmark.source,
        "rows": benchmark.rows,
        "cases": len(benchmark.kept),
        "dropped_minors": benchmark.minors,
        "blank": benchmark.blank,
        "sha256": benchmark.sha256,
        "recorded": accepted.recorded,
    }
    text = f"{accepted.id}\n  {len(benchmark.kept):,} cases of {benchmark.summary}\n  sha256 {benchmark.sha256} ({state})"
    return result | {"settings": accepted.to_json()}, as_json, text


def _list(prompts: str) -> dict[str, Any]:
    """What is known of a list that is not bundled."""
    from ..evaluation.lists.protocols import prompt_set

    return dict(prompt_set(prompts).describe())


def _settings(one: dict[str, Any]) -> str:
    judges = " + ".join(f"{judge['name']} {judge['threshold']}" for judge in one["judges"]) or "no safety judge"
    size = "x".join(map(str, one["size"]))
    return f"{one['steps']} steps, {size}, {one['images_per_prompt']} per prompt, by {one['aggregation']}, {judges}"


def _lines(one: dict[str, Any]) -> str:
    return "\n".join(f"{key:<20}{_shown(value)}" for key, value in one.items() if value not in (None, "", {}, ()))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return "; ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)
