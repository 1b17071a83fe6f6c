"""`analyse`: where and when a model shows what it is about to draw."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json


@app.command()
def analyse(
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for tables and plots; the same command resumes.")],
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", help="testbed/flux, testbed/kontext, a local folder, or a Hub id.")
    ] = "testbed/flux",
    examples: Annotated[Path | None, typer.Option(help="CSV as for `safelight train uvr`; without it, the testbed's weapons.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Look at so many first steps.")] = 10,
    unsafe: Annotated[int, typer.Option(min=2, help="Without examples: images per concept.")] = 16,
    benign: Annotated[int, typer.Option(min=10, help="Without examples: benign images.")] = 64,
    as_json: Json = False,
) -> None:
    """Measures information flow and localisation quality by block and step, and picks UVR's probe and start-up window."""
    quiet()
    from ..backbone import Backbone
    from ..compose import call_settings, load_pipeline
    from ..generator import Generator
    from ..testbed.judges import TemplateMatcher
    from ..training.analysis import choose, flow, localisation, plot_flow, plot_localisation
    from ..training.examples import from_testbed, halves, read_examples
    from ..training.locate import Boxes, Drawn
    from ..training.uvr import Config

    generator = Generator(load_pipeline(pipeline), call_settings(pipeline))
    backbone = Backbone.of(generator.pipe)
    kinds = [kind for kind in backbone.ports if kind.endswith("attention:image") and kind.removesuffix(":image") in backbone.attentions]
    if not kinds:
        raise ValueError(f"{pipeline} has no joint attention to analyse; UVR works on FLUX, Kontext and SD3")
    sites = [str(site) for site in backbone.sites(*kinds)]
    given = (
        read_examples(examples)
        if examples
        else from_testbed(["weapons"], unsafe=unsafe, benign=benign, editing=pipeline.endswith("kontext"))
    )
    collected, held_out = halves(given)
    locator = Drawn() if examples else Boxes(TemplateMatcher())
    out.mkdir(parents=True, exist_ok=True)
    with progress(as_json) as advance:
        found = localisation(generator, collected, held_out, sites, Config(sites[0], steps=steps), locator, out / "recordings", advance)
        advance("information flow", 0, 1)
        flows = flow(generator, [example for example in held_out if example.concept][:8])
        advance("information flow", 1, 1)
    choice = choose(found, generator.pipe.num_timesteps)
    plot_localisation(found, out / "localisation.png")
    plot_flow(flows, out / "flow.png")
    table = {
        f"{site}@{step}": [[None if value != value else value for value in row] for row in values.tolist()]
        for (site, step), values in flows.items()
    }
    result = {"pipeline": pipeline, "choice": asdict(choice), "localisation": [asdict(one) for one in found], "flow": table}
    (out / "analysis.json").write_text(json.dumps(result, indent=1) + "\n")
    best = max((one for one in found if one.site == choice.site), key=lambda one: one.iou)
    emit(
        result,
        as_json,
        f"{_table(found)}\n{out}: probe {choice.site}, start-up {choice.steps} steps; IoU {best.iou:.2f} at step {best.step}",
    )


def _table(found: list[Any]) -> str:
    """IoU by block and step."""
    sites = list(dict.fromkeys(one.site for one in found))
    lines = [f"{site:<28}" + " ".join(f"{one.iou:.2f}" for one in found if one.site == site) for site in sites]
    return "\n".join(["IoU with the final object, step by step", *lines])
