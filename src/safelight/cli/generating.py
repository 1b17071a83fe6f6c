"""`generate` and `edit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import checked_prompt, emit, progress, quiet, read_image

Pipeline = Annotated[str, typer.Option("--pipeline", "-p", help="testbed/sd, testbed/flux, testbed/kontext, a local folder, or a Hub id.")]
Guards = Annotated[list[str], typer.Option("--guard", "-g", help="A guard's name or bundle folder; repeat to stack, outermost first.")]
Settings = Annotated[list[str], typer.Option("--set", help="guard.field=value, e.g. dual_latent.until=0.3; repeatable.")]
BankFile = Annotated[Path | None, typer.Option("--bank", help="A bank of known prompts for the detector (see `safelight bank`).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The picture's file.")]
Seed = Annotated[int, typer.Option(help="The random seed.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
ShowMask = Annotated[bool, typer.Option("--show-mask", help="Also write the picture with the guarded region tinted, as NAME-mask.png.")]
Unjudged = Annotated[
    str,
    typer.Option(
        "--unjudged-images",
        help="If no guard looks at the picture that goes in: warn, refuse, or accept. Guards that do: pre_filter, post_filter.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def generate(
    prompt: str, pipeline: Pipeline = "testbed/flux", guard: Guards = [], settings: Settings = [], bank: BankFile = None,
    out: Out = Path("safelight.png"), seed: Seed = 0, steps: Steps = None, show_mask: ShowMask = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Makes a picture from a prompt, guarded."""
    _run(pipeline, {"prompt": checked_prompt(prompt)}, guard, settings, bank, out, seed, steps, show_mask, as_json, "accept")


@app.command()
def edit(
    image: Path, instruction: str, pipeline: Pipeline = "testbed/kontext", guard: Guards = [], settings: Settings = [],
    bank: BankFile = None, out: Out = Path("safelight.png"), seed: Seed = 0, steps: Steps = None, show_mask: ShowMask = False,
    unjudged_images: Unjudged = "warn", as_json: Json = False,
) -> None:  # fmt: skip
    """Edits a picture by an instruction, guarded."""
    picture = read_image(image)
    if pipeline.startswith("testbed/"):
        picture = picture.resize((64, 64))
    inputs = {"prompt": checked_prompt(instruction), "image": picture}
    _run(pipeline, inputs, guard, settings, bank, out, seed, steps, show_mask, as_json, unjudged_images)


def _run(
    name: str, inputs: dict[str, Any], guards: list[str], settings: list[str], bank: Path | None, out: Path, seed: int,
    steps: int | None, show_mask: bool, as_json: bool, unjudged_images: Any,
) -> None:  # fmt: skip
    import torch

    from ..attach import guard as attach
    from ..compose import build, call_settings, load_pipeline

    methods = build(guards, name, settings, bank)
    quiet()
    pipe = load_pipeline(name)
    arguments = call_settings(name) | inputs | ({"num_inference_steps": steps} if steps else {})
    with progress(as_json) as advance, attach(pipe, *methods, unjudged_images=unjudged_images):

        def stepped(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            advance("generating", step + 1, int(pipe.num_timesteps))
            return values

        output = pipe(**arguments, generator=torch.Generator().manual_seed(seed), callback_on_step_end=stepped)
    out.parent.mkdir(parents=True, exist_ok=True)
    output.images[0].save(out)
    record = output.records[0]
    result = {"image": str(out), "record": record.to_json(), "pipeline": name, "guards": guards, "seed": seed}
    decisive = record.decisive
    names = ", ".join(method.name for method in methods)
    told = f"{decisive.method}: {decisive.action}" if decisive is not None else f"{names}: nothing to do" if names else "no guard attached"
    if decisive is not None and decisive.flagged:
        told += f" ({decisive.concept or 'unsafe'}, score {decisive.score:.2f} > {decisive.threshold:.2f})"
    if record.unjudged and unjudged_images == "warn":
        told += f"; not looked at: {', '.join(record.unjudged)} (add --guard pre_filter)"
    if show_mask:
        result["mask_image"] = _show_mask(output.images[0], record, out)
        told += f"; {result['mask_image']}" if result["mask_image"] else "; no region was guarded"
    emit(json.loads(json.dumps(result, default=str)), as_json, f"{out}  [{told}]")


def _show_mask(image: Any, record: Any, out: Path) -> str | None:
    """Writes the overlay of the first mask, if there is any."""
    from ..overlay import overlay

    mask = next((action.mask for action in record.actions if action.mask is not None), None)
    if mask is None:
        return None
    file = out.with_name(f"{out.stem}-mask.png")
    overlay(image, mask).save(file)
    return str(file)
