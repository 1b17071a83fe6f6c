"""`capture`, `train safedig` and `features`: activations, the dictionaries made from them, and what their features mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json
from .training import train

Pipeline = Annotated[str, typer.Option("--pipeline", "-p", help="testbed/flux, testbed/sd3, a local folder, or a Hub id.")]
Device = Annotated[str, typer.Option(help="Where to generate and train, e.g. cuda.")]


@app.command()
def capture(
    pairs: Annotated[Path, typer.Argument(help="CSV with the columns unsafe and safe: both members are recorded, with the same seeds.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The shards' folder; the same command resumes.")],
    pipeline: Pipeline = "testbed/flux",
    at: Annotated[str, typer.Option(help="Sites, with commas, e.g. prompt:text,joint.18:image; default: those that are worth it.")] = "",
    times: Annotated[int, typer.Option(min=1, help="So many evenly spread steps.")] = 5,
    tokens: Annotated[int | None, typer.Option(min=1, help="So many random tokens of each site; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 8,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Records activations of prompt pairs while a frozen model makes their pictures."""
    quiet()
    from ..backbone import Backbone
    from ..compose import call_settings, load_pipeline
    from ..generator import Generator
    from ..training.activations import Sampling, examples_of, record
    from ..training.prompt_pairs import read_prompts
    from ..training.safedig import candidates
    from ..training.trajectories import workers

    known = read_prompts(pairs, None, "unsafe").pairs
    generator = Generator(load_pipeline(pipeline).to(device), call_settings(pipeline))
    sites = tuple(filter(None, at.split(","))) or candidates(Backbone.of(generator.pipe))
    helping = workers().process_index > 0
    with progress(as_json or helping) as advance:
        shards = record(generator, examples_of(known, seeds), Sampling(sites, times, tokens), out, batch=batch, progress=advance)
    if not helping:
        result = {"shards": str(out), "pictures": 2 * seeds * len(known), "sites": list(sites)}
        emit(result, as_json, f"{out}: {result['pictures']} pictures, sites {', '.join(sites)} (see {shards.folder / 'manifest.json'})")


@train.command()
def safedig(
    source: Annotated[str, typer.Argument(help="The known risk: a domain of the testbed, or a name for --source-pairs.")],
    target: Annotated[str, typer.Argument(help="The new risk, of which there is little.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's folder; the same command resumes.")],
    pipeline: Pipeline = "testbed/flux",
    source_pairs: Annotated[Path | None, typer.Option(help="CSV with the columns unsafe, safe and (optionally) category.")] = None,
    target_pairs: Annotated[Path | None, typer.Option(help="The same for the target; a few dozen will do.")] = None,
    benign: Annotated[Path | None, typer.Option(help="Benign prompts, one a line: 64 for routing, the rest calibrate the gate.")] = None,
    at: Annotated[str, typer.Option(help="Candidate positions, with commas; default: the prompt, and blocks' image streams.")] = "",
    fixed: Annotated[str, typer.Option(help="Positions to use without routing, with commas.")] = "",
    operator: Annotated[Literal["blend", "repel"] | None, typer.Option(help="Use this operator; default: what routing says.")] = None,
    positions: Annotated[int, typer.Option(min=1, max=2, help="How many positions to choose.")] = 2,
    expansion: Annotated[int | None, typer.Option(min=1, help="Latents per direction; default 16, on the testbed 4.")] = None,
    reduced: Annotated[int | None, typer.Option(min=1, help="Look at so many principal directions only; the rest passes.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Keep so many tokens per site, picture and time; default: all.")] = None,
    harmful: Annotated[int | None, typer.Option(min=1, help="How many features count as harmful; default 128, on the testbed 32.")] = None,
    target_fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="The share of benign pictures that may be steered.")] = 0.01,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Routes, trains, transfers and calibrates safety dictionaries for SafeDIG, and writes a bundle."""
    quiet()
    from ..bundle import save
    from ..compose import call_settings, load_pipeline
    from ..generator import Generator
    from ..methods.safedig import SafeDIG
    from ..training.domains import from_testbed, read_domains
    from ..training.safedig import Config, make, testbed_config

    given = [file for file in (source_pairs, target_pairs, benign) if file]
    if given and len(given) < 3:
        raise ValueError("--source-pairs, --target-pairs and --benign belong together; give all three, or none on the testbed")
    if not given and not pipeline.startswith("testbed/"):
        raise ValueError(f"{pipeline} needs pairs of your own: give --source-pairs, --target-pairs and --benign")
    names = (source, target)
    domains = read_domains(given[0], given[1], given[2], names) if given else from_testbed(source, target)
    config = testbed_config() if pipeline.startswith("testbed/") else Config()
    sae = replace(config.sae, expansion=expansion or config.sae.expansion, reduced=reduced)
    config = replace(
        config, sites=_listed(at), fixed=_listed(fixed), operator=operator, positions=positions, tokens=tokens, sae=sae,
        harmful=harmful or config.harmful, target_fpr=target_fpr,
    )  # fmt: skip
    generator = Generator(load_pipeline(pipeline).to(device), call_settings(pipeline))
    with progress(as_json) as advance:
        made = make(generator, domains, config, out, advance, device)
    save(out, SafeDIG(dictionaries=made.dictionaries), made_for=pipeline)
    lines = [routing_table(made.routing), f"{out}: {', '.join(f'{site} ({op})' for site, op in made.report['positions'].items())}"]
    lines += [f"SAE at {site}: FVU {facts['fvu']:.3f}, {facts['dead']:.1%} dead" for site, facts in made.report["sae"].items()]
    lines += [str(one.calibration) for one in made.dictionaries if one.calibration]
    emit({"bundle": str(out)} | dict(made.report), as_json, "\n".join(lines))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def routing_table(routing: Any) -> str:
    """The scores of all candidates, best first."""
    lines = [f"{'position':<18}{'group':<11}{'operator':<10}{'S_sem':>7}{'S_fit':>8}{'S_stab':>8}{'C':>7}{'R':>8}"]
    for row in routing.rows():
        scores = f"{row['semantics']:>7.2f}{row['fit']:>8.2f}{row['stability']:>8.2f}{row['cost']:>7.2f}{row['score']:>8.3f}"
        lines.append(f"{row['site']:<18}{row['group']:<11}{row['operator']:<10}{scores}{'  *' if row['chosen'] else ''}")
    return "\n".join([*lines, f"the same choice under {routing.steady:.0%} of weights varied by 20 %"])


@app.command()
def features(
    bundle: Annotated[Path, typer.Argument(help="A bundle of `safelight train safedig`, with its recordings.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page's file.")] = Path("features.html"),
    count: Annotated[int, typer.Option(min=1, help="Features per position.")] = 12,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures per feature.")] = 8,
    blur: Annotated[bool, typer.Option(help="Blur the pictures; --no-blur shows them as they are.")] = True,
    as_json: Json = False,
) -> None:
    """Writes a page that shows the scenes which activate harmful features most."""
    quiet()
    from ..bundle import load
    from ..methods.safedig import SafeDIG
    from ..training.feature_page import page, scenes

    methods = [method for method in load(bundle) if isinstance(method, SafeDIG)]
    if not methods:
        raise ValueError(f"{bundle} holds no safedig; give a folder that `safelight train safedig` has written")
    found = [scenes(dictionary, bundle / "activations", count, pictures) for dictionary in methods[0].dictionaries]
    out.write_text(page(found, blur=blur))
    shown = {one.site: [feature.index for feature in one.features] for one in found}
    emit({"page": str(out), "features": shown}, as_json, str(out))
