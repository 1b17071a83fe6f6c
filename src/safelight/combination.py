"""The combination of guards that does best on the leaderboard, for a pipeline and a concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .backbone import Backbone
from .bundle import load
from .compose import COMBINATIONS, build, name_of
from .errors import ArtefactError
from .method import Method

IN_GENERAL = {
    "unet": ("pre_filter", "post_filter", "dual_latent", "saferedir"),
    "transformer": ("pre_filter", "post_filter", "dual_latent", "saferedir", "uvr", "safedig"),
}
"""Denoiser -> the order in which guards of a model of one's own are stacked, outermost first; those that were made for it."""


def recommended(pipe: Any, concept: str, artefacts: str | Path | None = None) -> list[Method]:
    """The guards to attach, outermost first: `guard(pipe, *recommended(pipe, "weapons"))`.

    Each line of defence looks at something else: the prompt, the latents on their way, the denoiser's activations, and the finished picture,
    so that a prompt which gets past one of them meets the next.

    Args:
        pipe: a testbed pipeline, or one of your own.
        concept: what should not be in the picture: on the testbed a domain, `weapons` or `substances`; else the name of a folder in `artefacts`.
        artefacts: for a model of your own, a folder with one folder per concept, and in it one bundle per guard, named after it, as
            `safelight train` and `safelight.save` write them: `weapons/saferedir`, `weapons/uvr`, …

    Raises:
        ArtefactError: if nothing was made for this pipeline.
        ValueError: if there is no such concept.
    """
    name = name_of(pipe)
    if artefacts is not None:
        return _from_folder(pipe, Path(artefacts) / concept, name)
    if name not in COMBINATIONS:
        raise ArtefactError(
            f"nothing ships for {name or type(pipe).__name__}: train guards of your own (`safelight train …`), and name their folder with "
            f"artefacts=…, where {concept}/saferedir, {concept}/uvr and so on hold their bundles"
        )
    return build(["recommended"], name, domain=concept)


def _from_folder(pipe: Any, folder: Path, name: str) -> list[Method]:
    order = IN_GENERAL[Backbone.of(pipe).denoiser]
    found = [folder / guard for guard in order if (folder / guard / "method.json").is_file()]
    if not found:
        raise ArtefactError(
            f"{folder} holds no bundle of {', '.join(order)}; make some with `safelight train`, each into a folder of its name"
        )
    return [method for bundle in found for method in load(bundle, made_for=name or None)]
