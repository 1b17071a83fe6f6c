"""`attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import BankFile, Guards, Json


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="unlearn_diff_atk, p4d, ring_a_bell, mma or paraphrase.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder; the same command resumes it.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="testbed/sd, testbed/sd3 or testbed/flux.")] = "testbed/sd",
    guard: Guards = [], bank: BankFile = None,
    settings: Annotated[list[str], typer.Option("--set", help="attack.field=value or guard.field=value, e.g. p4d.iterations=20; repeatable.")] = [],
    ban: Annotated[list[str], typer.Option("--ban", help="A word that the attack must not use; repeatable.")] = [],
    benchmark: Annotated[str, typer.Option("--benchmark", "-b", help="testbed/weapons, testbed/substances, testbed/knife, …")] = "testbed/weapons",
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 24,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Looks for prompts that get past a guard, on the testbed; without a guard, past nothing."""
    from ..compose import build, call_settings, load_pipeline
    from ..evaluation.attacking import run_attack
    from ..evaluation.benchmarks.testbed import find
    from ..generator import Generator
    from .evaluating import artefacts

    own = [setting for setting in settings if setting.startswith(f"{name}.")]
    prepared = prepare(name, own, ban)
    rest = [setting for setting in settings if setting not in own]
    if ("edits" in benchmark) != (pipeline == "testbed/kontext"):
        raise ValueError(f"{benchmark} and {pipeline} don't go together: testbed/edits… is for testbed/kontext")
    methods = build(guard, pipeline, rest, bank)
    cases = find(benchmark).cases(count)
    quiet()
    generator = Generator(load_pipeline(pipeline), call_settings(pipeline))
    description = {
        "pipeline": pipeline, "guard": " + ".join(guard), "benchmark": benchmark, "settings": settings,
        "artefacts": artefacts([*guard, str(bank or "")], pipeline),
    }  # fmt: skip
    with progress(as_json) as advance:
        results = run_attack(generator, methods, prepared, cases, out, description=description, progress=advance)
    emit(results, as_json, table(results) + f"\n{out / 'results.json'}")


def prepare(name: str, settings: list[str], banned: list[str]) -> Any:
    """An attack by name, with fields as `name.field=value`.

    Raises:
        ValueError: for an unknown attack, field or value.
    """
    from ..evaluation.attack import ATTACKS
    from ..schema import check, field_of

    cls = ATTACKS[name]
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.removeprefix(f"{name}.").partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} is not of the form {name}.field=value")
        given[key.strip()] = field_of(cls, key.strip()).parse(value.strip())
    if banned:
        field_of(cls, "banned")  # raises for an attack that knows no banned words
        given["banned"] = tuple(banned)
    made = cls(**given)
    check(made)
    return made


def table(results: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{results['attack']} on {results['pipeline']} {results['guard'] or '(no guard)'}  {results['benchmark']}  n={results['n']}"]
    for arm, told in (("plain", "the prompts themselves"), ("asr", "under attack")):
        for judge, figure in results[arm].items():
            lines.append(f"  {told:<24}{judge:<12}{figure['value']:8.3f}   [{figure['low']:.3f}, {figure['high']:.3f}]")
    return "\n".join(lines) + f"\n  pictures per prompt     {results['queries']['value']:8.1f}"
