"""`train`: what methods learn from a pipeline."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import Json

train = typer.Typer(no_args_is_help=True, help="Collect and train what a method needs, from a pipeline of your own.")
app.add_typer(train, name="train")

PROBES = {
    "testbed/flux": "single.0.attention:image",
    "testbed/kontext": "single.0.attention:image",
    "testbed/sd3": "joint.1.attention:image",
}
PUBLISHED_PROBE = "single.10.attention:image"
EARLY = 6
"""Steps in which the model's own attention to a word says where a concept is."""


@train.command()
def uvr(
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's folder; the same command resumes.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="testbed/flux, testbed/kontext, a local folder, or a Hub id.")] = "testbed/flux",
    examples: Annotated[Path | None, typer.Option(help="CSV: prompt, concept (empty: benign), and optionally word, seed, image, mask.")] = None,
    domains: Annotated[str, typer.Option(help="Without examples: the testbed's domains, with commas.")] = "weapons,substances",
    masks: Annotated[Literal["judge", "drawn", "attention"], typer.Option(help="Who says where a concept is.")] = "judge",
    site: Annotated[str | None, typer.Option(help="The probe (see `safelight analyse`).")] = None,
    kind: Annotated[Literal["whitened", "raw", "cosine"], typer.Option(help="How tokens are compared with anchors.")] = "whitened",
    clusters: Annotated[int, typer.Option(min=1, help="Directions per concept.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Collect in so many first steps; by default in all, for image to image too.")] = None,
    unsafe: Annotated[int, typer.Option(min=1, help="Without examples: images per concept.")] = 40,
    benign: Annotated[int, typer.Option(min=1, help="Without examples: benign images to collect from.")] = 200,
    extend: Annotated[Path | None, typer.Option(help="Anchors of the first steps: keep these, their τ and level, and add later steps.")] = None,
    reference_site: Annotated[str, typer.Option(help="Editing: the probe that searches the reference image.")] = "single.3.attention:reference",
    reference_clusters: Annotated[int, typer.Option(min=1, help="Editing: directions per concept in the reference image.")] = 8,
    target_fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="The share of benign images that may be flagged.")] = 0.01,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Collects anchors for UVR, calibrates them, and writes a bundle."""
    quiet()
    from ..anchors import Anchors
    from ..backbone import Backbone
    from ..bundle import save
    from ..calibration import items_needed
    from ..compose import call_settings, load_pipeline
    from ..generator import Generator
    from ..methods.uvr import UVR
    from ..training.examples import Example, from_testbed, halves, read_examples
    from ..training.uvr import Config, calibrate, collect, extended, fit

    generator = Generator(load_pipeline(pipeline), call_settings(pipeline))
    known = Anchors.load(extend) if extend is not None else None
    config = Config(site or PROBES.get(pipeline, PUBLISHED_PROBE), kind, steps, clusters, target_fpr=target_fpr)
    editing = pipeline.endswith("kontext")

    def drawn(keeping: bool) -> tuple[list[Example], list[Example]]:
        """What to collect from, and what to calibrate with."""
        if examples is not None:
            given = read_examples(examples)
            if editing and any(example.image is None for example in given):
                raise ValueError(f"{examples}: {pipeline} edits pictures, and not every row has one; name it in the column `image`")
            return halves(given)
        chosen, benign_held_out = domains.split(","), 3 * items_needed(target_fpr)  # so that a few odd ones may be above the threshold
        made = from_testbed(chosen, unsafe=unsafe, benign=benign, editing=editing, keeping=keeping, seed=2 if keeping else 0)
        return made, from_testbed(chosen, unsafe=8, benign=benign_held_out, editing=editing, keeping=keeping, seed=3 if keeping else 1)

    found, backbone = [], Backbone.of(generator.pipe)
    with progress(as_json) as advance:
        for keeping in (False, True) if editing and masks != "attention" else (False,):
            own = replace(config, site=reference_site, clusters=reference_clusters, smooth=False) if keeping else config
            collected, held_out = drawn(keeping)
            locator, folder = _locator(masks, generator.pipe, own), out / ("recordings-reference" if keeping else "recordings")
            shards = collect(generator, collected, [own.site], own, locator, folder, advance)
            anchors = fit(shards, collected, own.site, own, backbone)
            if known is not None and not keeping:
                anchors = extended(known, anchors)
                own = replace(own, window=len(known.moments) / generator.pipe.num_timesteps)
            found += calibrate(generator, [anchors], held_out, own, locator, advance)
    anchors, reference = found[0][0], found[1][0] if len(found) > 1 else None
    looks = min(UVR.localise, len(anchors.moments) / generator.pipe.num_timesteps)
    save(out, UVR(anchors=anchors, reference_anchors=reference, localise=looks), made_for=pipeline)
    qualities = {made.site: asdict(known) | {"threshold": made.thresholds[0]} for made, known in found}
    calibrations = {made.site: asdict(made.calibration) for made, _ in found if made.calibration}
    result = {"bundle": str(out), "concepts": anchors.concepts, "probes": qualities, "calibrations": calibrations, "config": asdict(config)}
    lines = [
        f"{made.site}: {made.calibration}; {known.recall:.1%} of {known.unsafe} unsafe images found, IoU {known.iou:.2f}"
        for made, known in found
    ]
    emit(result, as_json, "\n".join([f"{out}: {len(anchors.concepts)} concepts", *lines]))


@train.command()
def saferedir(
    concept: Annotated[str, typer.Argument(help="What the redirector finds: on the testbed a domain, an unsafe object, or a style.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's folder; the same command resumes.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="testbed/sd, testbed/flux, a local folder, or a Hub id.")] = "testbed/sd",
    pairs: Annotated[Path | None, typer.Option(help="CSV with the columns unsafe and safe: pairs of prompts of equal length.")] = None,
    benign: Annotated[Path | None, typer.Option(help="Benign prompts, one a line; the last ones calibrate the threshold.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    width: Annotated[int, typer.Option(min=32, help="Of the network's hidden layers, a multiple of 32.")] = 64,
    target_fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="The share of benign generations that may be redirected.")] = 0.01,
    device: Annotated[str, typer.Option(help="Where to generate and train, e.g. cuda.")] = "cpu",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Trains a redirector for SafeRedir on trajectories of prompt pairs, calibrates it, and writes a bundle."""
    quiet()
    from ..bundle import save
    from ..calibration import items_needed
    from ..compose import call_settings, load_pipeline
    from ..generator import Generator
    from ..methods.saferedir import SafeRedir
    from ..training.prompt_pairs import edits_from_testbed, from_testbed, read_prompts
    from ..training.redirector_learning import Config
    from ..training.saferedir import gather, learn
    from ..training.trajectories import workers

    if width % 32:
        raise ValueError(f"--width {width} is no multiple of 32")
    needed = 2 * items_needed(target_fpr)
    given = edits_from_testbed if pipeline.endswith("kontext") else from_testbed
    prompts = read_prompts(pairs, benign, concept) if pairs else given(concept, benign=400 + needed)
    config = Config(seeds=seeds, epochs=epochs, width=width, target_fpr=target_fpr)
    generator = Generator(load_pipeline(pipeline).to(device), call_settings(pipeline))
    helping = workers().process_index > 0
    with progress(as_json or helping) as advance:
        gathered = gather(generator, prompts, config, out, needed, advance)
        if helping:
            return
        redirector, report = learn(gathered, concept, config, out, advance, device)
    save(out, SafeRedir(redirectors=(redirector,)), made_for=pipeline)
    lines = [f"{out}: {concept}, {report['parameters']:,} parameters, {report['seconds']:.0f} s of training", str(redirector.calibration)]
    lines.append(f"{report['accuracy']:.2%} of held-out records right; {report['recall']:.1%} of unsafe prompts found in the first step")
    emit({"bundle": str(out)} | report, as_json, "\n".join(lines))


def _locator(masks: str, pipe: Any, config: Any) -> Any:
    from ..testbed.judges import TemplateMatcher
    from ..training.locate import Boxes, Drawn, SelfLocalisation, TextMass

    if masks == "attention":
        return SelfLocalisation(pipe, TextMass(at=[config.site.split(":")[0]], steps=range(config.steps or EARLY)))
    return Drawn() if masks == "drawn" else Boxes(TemplateMatcher())
