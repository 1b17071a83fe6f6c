"""`bank`, `calibrate` and `convert`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .app import app
from .console import emit, quiet
from .generating import Json

Pipeline = Annotated[str, typer.Option("--pipeline", "-p", help="The pipeline whose text encoder embeds the prompts.")]


@app.command()
def bank(
    pairs: Annotated[Path, typer.Option(help="Table with the columns unsafe, safe (its twin, may be empty) and category.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bank's file.")],
    pipeline: Pipeline = "testbed/sd",
    benign: Annotated[Path | None, typer.Option(help="Further safe prompts, one a line.")] = None,
    shifts: Annotated[bool, typer.Option(help="Also measure token shifts, which embedding arithmetic needs.")] = True,
    metric: Annotated[Literal["cosine", "discriminant"], typer.Option(help="How prompts are compared.")] = "discriminant",
    as_json: Json = False,
) -> None:
    """Builds a bank of known safe and unsafe prompts."""
    from ..bank import Bank
    from ..safe_guidance import token_shifts
    from ..tables import read_prompts

    known, safe = read_pairs(pairs), read_prompts(benign) if benign else []
    run = _run(pipeline)
    made = Bank.build(run.pool, known, safe, metric=metric)
    if shifts and any(pair.safe for pair in known):
        made = made.with_shifts(*token_shifts(run, known))
    made.save(out)
    result = {"bank": str(out), "entries": len(made.labels), "categories": list(made.categories), "width": made.embeddings.shape[1]}
    emit(result, as_json, f"{out}: {result['entries']} prompts, categories {', '.join(made.categories)}")


@app.command()
def calibrate(
    bank: Annotated[Path, typer.Option(help="The bank; its threshold is set in place.")],
    benign: Annotated[Path, typer.Option(help="Benign prompts, one a line; none of them in the bank.")],
    pipeline: Pipeline = "testbed/sd",
    target_fpr: Annotated[float, typer.Option(min=1e-4, max=0.5, help="The false-positive rate to stay below.")] = 0.01,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="How sure to be of that.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Sets a bank's threshold to a false-positive rate, with a guarantee."""
    from ..bank import Bank
    from ..detectors.neighbours import Neighbours
    from ..tables import read_prompts

    known, run = Bank.load(bank), _run(pipeline)
    detector = Neighbours(bank=known, encoder=run.pool)
    known.check(run.pool)
    calibration = detector.calibrate(read_prompts(benign), target_fpr, confidence)
    replace(known, calibration=calibration).save(bank)
    emit(asdict(calibration) | {"bank": str(bank)}, as_json, f"{bank}: {calibration}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of SafeRedir's authors, e.g. best_model.pt. Nothing in it is executed.")],
    concept: Annotated[str, typer.Option(help="What it finds, e.g. nudity.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's folder.")],
    threshold: Annotated[float, typer.Option(min=0, max=0.9999, help="The probability above which a generation is redirected.")] = 0.5,
    near_published: Annotated[
        bool, typer.Option(help="Keep the behaviour of the released code, defects included, but for where later redirections aim from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turns a checkpoint of SafeRedir's released code into a bundle."""
    from ..bundle import save
    from ..methods.saferedir import SafeRedir
    from ..redirector import Redirector

    redirector = Redirector.from_official(checkpoint, concept, threshold)
    save(out, SafeRedir.near_published([redirector]) if near_published else SafeRedir(redirectors=(redirector,)))
    parameters = sum(parameter.numel() for parameter in redirector.net.parameters())
    result = {"bundle": str(out), "concept": concept, "parameters": parameters, "near_published": near_published}
    emit(result, as_json, f"{out}: {concept}, {parameters:,} parameters")


def _run(pipeline: str) -> Any:
    """A run outside any generation: only its encoders are used."""
    quiet()
    from .. import backbones  # noqa: F401  (makes the backbones known)
    from ..backbone import Backbone
    from ..compose import load_pipeline
    from ..run import Run

    pipe = load_pipeline(pipeline)
    return Run(Backbone.of(pipe), pipe.encode_prompt, None)


def read_pairs(path: Path) -> list[Any]:
    """Pairs from a table with the columns unsafe and category, and optionally safe.

    Raises:
        ValueError: naming the file, the row and what is wrong with it.
    """
    from ..bank import Pair
    from ..tables import read_table

    table = read_table(path)
    known = table.required("unsafe", "category", needed_by="a bank's list of pairs")
    return [
        Pair(unsafe, safe, category)
        for (unsafe, category), safe in zip(known, table.optional("safe", besides=("unsafe", "category")), strict=True)
    ]
