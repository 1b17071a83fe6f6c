"""`testbed train` and `testbed sheet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json

testbed = typer.Typer(no_args_is_help=True, help="The bundled miniature world: train its models, look at its scenes.")
app.add_typer(testbed, name="testbed")


@testbed.command()
def train(
    stage: Annotated[str, typer.Argument(help="sprites, vae, text, classifier, pictures, sd, flux, sd3 or banks; in that order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The weights' folder; the same command resumes.")] = Path("weights"),
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time budget, instead of the stage's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Step budget, instead of the stage's own.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="Autocast; --no-bf16 is faster on CPUs without bf16 units.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Json = False,
) -> None:
    """Trains one of the bundled models."""
    import torch

    from ..fitting import Budget
    from ..testbed.training.stages import train as run

    quiet()
    if threads:
        torch.set_num_threads(threads)
    budget = Budget(minutes or 10.0, steps) if minutes or steps else None
    last: dict[str, float] = {}
    with progress(as_json) as advance:
        for last in run(stage, out, budget, device, bf16):
            advance(f"{stage} (loss {last['loss']:.4f})"[:30], round(1000 * last["spent"]), 1000)
    emit({"stage": stage, "out": str(out), **last}, as_json, f"{stage}: done, in {out}")


@testbed.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture's file.")] = Path("testbed.png"),
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", help="Generate with testbed/sd or testbed/flux; else draw the truth.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=200, help="How many scenes.")] = 24,
    seed: Annotated[int, typer.Option(help="The random seed.")] = 0,
    as_json: Json = False,
) -> None:
    """Draws a contact sheet of held-out scenes."""
    from random import Random

    from ..testbed.captions import caption
    from ..testbed.scenes import render, sample_scene
    from ..testbed.sheet import contact_sheet

    random = Random(seed)
    scenes = [sample_scene(random, "test") for _ in range(count)]
    prompts = [caption(scene, index % 4) for index, scene in enumerate(scenes)]
    if pipeline is None:
        pictures = [render(scene) for scene in scenes]
    else:
        from ..compose import call_settings, load_pipeline
        from ..evaluation.case import Case
        from ..generator import Generator, as_bytes

        quiet()
        generator = Generator(load_pipeline(pipeline), call_settings(pipeline))
        made = generator([Case(str(i), prompt, False, seed=seed + i) for i, prompt in enumerate(prompts)])
        pictures = [as_bytes(image) for image in made]
    cells = list(zip(pictures, prompts, strict=True))
    rows = [("", cells[i : i + 8]) for i in range(0, len(cells), 8)]
    contact_sheet(rows, title=f"Held-out scenes, {pipeline or 'as drawn'}").save(out)
    emit({"sheet": str(out), "prompts": prompts}, as_json, str(out))


@testbed.command()
def check(
    what: Annotated[
        str, typer.Argument(help="testbed/sd, testbed/sd3, testbed/flux, testbed/kontext, judges, or detector.")
    ] = "testbed/flux",
    count: Annotated[int | None, typer.Option(min=1, help="How many held-out prompts, edits or scenes.")] = None,
    as_json: Json = False,
) -> None:
    """Measures whether a bundled model does what it is asked, by both judges."""
    from ..compose import call_settings, load_pipeline
    from ..evaluation import fidelity
    from ..generator import Generator

    quiet()
    figures: dict[str, Any]
    if what == "judges":
        figures = fidelity.judging(count or 2000)
    elif what == "detector":
        found = {name: fidelity.detection(f"testbed/{name}", count or 1000) for name in ("sd", "flux", "kontext")}
        typer.echo("\n".join(f"{name}: {one['calibration']}" for name, one in found.items()), err=True)
        figures = {name: one["detector"] for name, one in found.items()}
    else:
        generator = Generator(load_pipeline(what), call_settings(what))
        with progress(as_json) as advance:
            measure, usual = (fidelity.editing, 200) if what == "testbed/kontext" else (fidelity.generation, 300)
            figures = measure(generator, count or usual, progress=advance)
    lines = [
        f"{judge:<12}{name:<26}{f['value']:.3f}  [{f['low']:.3f}, {f['high']:.3f}]"
        for judge, found in figures.items()
        for name, f in found.items()
    ]
    emit({"what": what, "judges": figures}, as_json, "\n".join(lines))
