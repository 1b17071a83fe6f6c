"""`evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import BankFile, Guards, Json, Settings


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder; the same command resumes it.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="testbed/sd, testbed/flux or testbed/kontext.")] = "testbed/sd",
    guard: Guards = [], settings: Settings = [], bank: BankFile = None,
    benchmark: Annotated[str, typer.Option("--benchmark", "-b", help="testbed/weapons, testbed/substances, testbed/edits-unsafe, …")] = "testbed/weapons",
    unsafe: Annotated[int, typer.Option(min=1, help="Unsafe prompts.")] = 200,
    benign: Annotated[int, typer.Option(min=1, help="Benign prompts.")] = 100,
    proximal: Annotated[int, typer.Option(min=1, help="Benign prompts near the unsafe ones.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measures a guard: with and without it, on the same seeds, by both judges."""
    from ..compose import build, call_settings, load_pipeline
    from ..evaluation.evaluate import Sizes
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.reporting.report import write
    from ..evaluation.reporting.run_folder import read_run
    from ..generator import Generator

    if not guard:
        raise ValueError("nothing to evaluate; name a guard with --guard (see `safelight list`)")
    if ("edits" in benchmark) != (pipeline == "testbed/kontext"):
        raise ValueError(
            f"{benchmark} and {pipeline} don't go together: testbed/edits… is for testbed/kontext, the others are for the rest"
        )
    methods = build(guard, pipeline, settings, bank)
    quiet()
    generator = Generator(load_pipeline(pipeline), call_settings(pipeline))
    description = {
        "pipeline": pipeline,
        "guard": " + ".join(guard),
        "settings": settings,
        "artefacts": artefacts([*guard, str(bank or "")], pipeline),
    }
    with progress(as_json) as advance:
        results = run(
            generator,
            methods,
            benchmark,
            out,
            sizes=Sizes(unsafe, benign, proximal),
            batch=batch,
            description=description,
            progress=advance,
        )
    page = write([read_run(out)], out / "report.html")
    emit(results, as_json, table(results) + f"\n{findings(results)}\n{out / 'results.json'}\n{page}")


def artefacts(names: list[str], pipeline: str) -> dict[str, str]:
    """A hash of every file that the figures depend on: a changed one makes another run."""
    import hashlib

    from ..testbed.pipelines import weights_folder

    files = [path for name in names if name for path in ([Path(name)] if Path(name).is_file() else sorted(Path(name).glob("*")))]
    if pipeline.startswith("testbed/"):
        files += sorted(weights_folder().glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files if path.is_file()}


def table(results: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{results['protocol']}  {results['pipeline']}  {results['guard']}  n={results['n']}"]
    for name, figure in results["metrics"].items():
        told = "undefined" if figure["value"] is None else f"{figure['value']:8.3f}   [{figure['low']:.3f}, {figure['high']:.3f}]"
        lines.append(f"  {name:<22}{told}   n={figure['n']}")
    return "\n".join(lines)


def findings(results: dict[str, Any]) -> str:
    """The diagnosis as text."""
    lines = [f"  {one['severity']} {one['name']}: {one['title']}. {one['advice']}" for one in results["diagnosis"]["findings"]]
    return "\n".join(lines) or "  no failure signature"
