"""From words to objects: pipelines and guards by name, as the command line and the server get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from .anchors import Anchors
from .bank import Bank
from .bundle import DETECTORS, METHODS, load
from .detector import Detector
from .dictionary import Dictionary
from .errors import ArtefactError
from .method import Method
from .methods.sld import PRESETS
from .picture_model import PictureModel
from .redirector import Redirector
from .safe_guidance import Arithmetic, InContext, NearestTwin, Rewrite, SafeGuidance
from .schema import field_of, fields_of

WEIGHTS = Path(__file__).parent / "testbed" / "weights"
GUIDANCE = ("arithmetic", "twin", "context", "rewrite")
SAFREE_ON_TESTBED = {"validate": False}
"""Chosen on the development split: these pipelines take 20 steps and not 50, and draw what is unsafe in the later ones."""

COMBINATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "testbed/sd": {"weapons": ("pre_filter", "post_filter", "dual_latent", "saferedir")},
    "testbed/sd3": {"weapons": ("pre_filter", "post_filter", "dual_latent", "saferedir", "uvr")},
    "testbed/flux": {"weapons": ("pre_filter", "post_filter", "dual_latent", "saferedir", "uvr")},
    "testbed/kontext": {"weapons": ("pre_filter", "post_filter", "dual_latent", "saferedir", "uvr")},
}
"""Pipeline -> domain -> the guards that `recommended` stands for, outermost first: the leaderboard's best (`recipes/leaderboard.py`), and
`pre_filter`, which acts where pictures go in."""


def name_of(pipe: Any) -> str:
    """The name by which a pipeline was loaded; empty if it doesn't say."""
    return str(getattr(pipe, "name_or_path", None) or "")


def load_pipeline(name: str) -> Any:
    """A pipeline: `testbed/flux`, a local folder, or a Hub id.

    Raises:
        ArtefactError: if it can't be loaded.
    """
    if name.startswith("testbed/"):
        from .testbed import load as load_testbed  # diffusers is heavy, and `safelight list` needs none of it

        return load_testbed(name.removeprefix("testbed/"))
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ArtefactError(
            f"the pipeline {name!r} can't be loaded: {first} (use testbed/sd, testbed/flux, a local folder or a Hub id)"
        ) from error


def call_settings(name: str) -> dict[str, Any]:
    """The call arguments that suit a pipeline; empty for one that has its own defaults."""
    if not name.startswith("testbed/"):
        return {}
    from .testbed import settings

    return settings(name.removeprefix("testbed/"))


@cache
def testbed_bank(pipeline: str) -> Bank:
    """The bank that ships for a testbed pipeline."""
    return Bank.load(WEIGHTS / f"bank-{pipeline.removeprefix('testbed/')}.safetensors")


def build(
    guards: Sequence[str], pipeline: str, settings: Sequence[str] = (), bank: Path | None = None, domain: str | None = None
) -> list[Method]:  # fmt: skip
    """Guards by name or bundle folder, outermost first, for a pipeline.

    Args:
        guards: names as in `safelight list`, folders with a `method.json`, or `recommended`.
        pipeline: the pipeline's name; testbed pipelines bring a bank along.
        settings: `name.field=value` each.
        bank: a bank to use instead.
        domain: the testbed's domain that guards are told of in words or labels, where no setting tells them.

    Raises:
        ValueError: for an unknown guard, field, value or domain.
        ArtefactError: if a bank is needed and there is none.
    """
    changes = parse_settings(settings)
    methods: list[Method] = []
    for guard in _expanded(guards, pipeline, domain):
        if (Path(guard) / "method.json").is_file():
            methods += load(guard, made_for=pipeline, changes=_typed(changes))
        else:
            methods.append(_by_name(guard, pipeline, changes, bank, domain))
    if changes:
        raise ValueError(
            f"--set {sorted(changes)[0]} fits none of the guards {', '.join(guards) or '(none given)'}; write guard.field=value"
        )
    return methods


def _expanded(guards: Sequence[str], pipeline: str, domain: str | None) -> list[str]:
    """The guards by name, with those that `recommended` stands for in its place."""
    if "recommended" not in guards:
        return list(guards)
    known, concept = COMBINATIONS.get(pipeline, {}), domain or "weapons"
    if not known:
        raise ArtefactError(f"nothing is recommended for {pipeline!r}, only for {', '.join(COMBINATIONS)}; name guards one by one")
    if concept not in known:
        raise ValueError(f"nothing is recommended against {concept!r} on {pipeline}, only against {', '.join(known)}")
    return [name for guard in guards for name in (known[concept] if guard == "recommended" else (guard,))]


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`name.field=value` each, as `{"name.field": "value"}`.

    Raises:
        ValueError: for one that is not of that form.
    """
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--set {setting!r} is not of the form guard.field=value, e.g. dual_latent.until=0.3")
        changes[key.strip()] = value.strip()
    return changes


def _typed(changes: dict[str, str]) -> dict[str, Any]:
    typed = {}
    for key in list(changes):
        name, field = key.split(".", 1)
        if name in METHODS.names():
            typed[key] = field_of(METHODS[name], field).parse(changes.pop(key))
    return typed


def _by_name(name: str, pipeline: str, changes: dict[str, str], bank: Path | None, domain: str | None = None) -> Method:
    cls = METHODS[name]
    own = {key.split(".", 1)[1]: changes.pop(key) for key in list(changes) if key.startswith(f"{name}.")}
    given: dict[str, Any] = {}
    artefacts = {field.name for field in fields_of(cls) if field.kind == "artefact"}  # type: ignore[arg-type]  # classes are hashable
    if "detector" in artefacts:
        detector = own.pop("detector", "image_classifier" if cls.judges_images else "neighbours")
        given["detector"] = _detector(detector, pipeline, changes, bank, domain)
    if "guidance" in artefacts:
        chosen = own.pop("guidance", "rewrite" if detector == "llm" else "arithmetic")
        if chosen == "rewrite" and detector != "llm":
            raise ValueError(f"guidance=rewrite needs a language model: add --set {name}.detector=llm, llm.base_url=… and llm.model=…")
        given["guidance"] = Rewrite() if chosen == "rewrite" else _guidance(chosen, _bank(pipeline, bank))
    if "method" in artefacts:
        given["method"] = _by_name(own.pop("method", "negative_prompt"), pipeline, changes, bank, domain)
    if "redirectors" in artefacts:
        given["redirectors"] = _redirectors(pipeline, own.pop("concepts", domain or ""))
    if "dictionaries" in artefacts:
        given["dictionaries"] = _dictionaries(pipeline)
    given |= {field: _anchors(pipeline, field) for field in ("anchors", "reference_anchors") if field in artefacts}
    if name == "sld":
        given |= _preset(own.pop("preset", None))
    given |= {field: field_of(cls, field).parse(text) for field, text in own.items()}
    return cls(**_told(name, pipeline, domain) | given)


def _told(name: str, pipeline: str, domain: str | None) -> dict[str, Any]:
    """What a guard that goes by words is told, and on the testbed how to act: its published settings are for other models."""
    words, small = unsafe_words(pipeline, domain), pipeline.startswith("testbed/")
    if name == "negative_prompt":
        return {"words": " ".join(map(_with_article, words)) if small else ", ".join(words)}
    if name == "sld":
        return {"concept": ", ".join(map(_with_article, words) if small else words)}
    if name == "safree":
        return {"concepts": words} | (SAFREE_ON_TESTBED if small else {})
    return {}


def _with_article(word: str) -> str:
    from .testbed.world import article

    return article(word)


def _preset(name: str | None) -> dict[str, Any]:
    """The fields of one of SLD's presets; none of its own if none is named."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"sld.preset={name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]._asdict()


def _detector(name: str, pipeline: str, changes: dict[str, str], bank: Path | None, domain: str | None = None) -> Detector[Any]:
    cls: Any = DETECTORS[name]
    own = {key.split(".", 1)[1]: changes.pop(key) for key in list(changes) if key.startswith(f"{name}.")}
    given: dict[str, Any] = {field: _parsed(cls, field, text) for field, text in own.items()}
    if name == "image_classifier" and "pretrained" not in given:
        given["model"] = _picture_model(pipeline)
        if domain is not None:
            given.setdefault("unsafe", _domain(domain))
    needed = [
        field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING and field.name not in given
    ]
    if "bank" in needed:
        given["bank"] = _bank(pipeline, bank)
        needed.remove("bank")
    if needed:
        raise ValueError(f"the detector {name} needs --set {name}.{needed[0]}=…")
    return cls(**given)


def _parsed(cls: type[Detector[Any]], name: str, text: str) -> Any:
    """A field's value from its text form; an artefact may have one of its own (`parse` in the field's metadata)."""
    own = {field.name: field.metadata.get("parse") for field in fields(cls)}.get(name)  # type: ignore[arg-type]
    return own(text) if own else field_of(cls, name).parse(text)


def _bank(pipeline: str, bank: Path | None) -> Bank:
    if bank is not None:
        return Bank.load(bank)
    if pipeline.startswith("testbed/"):
        return testbed_bank(pipeline)
    raise ArtefactError(
        f"this guard needs a bank of known prompts for {pipeline!r}; make one with `safelight bank`, and pass it as --bank FILE"
    )


def _picture_model(pipeline: str) -> PictureModel:
    if pipeline.startswith("testbed/"):
        return PictureModel.load(WEIGHTS / "pictures.safetensors")
    raise ArtefactError(
        f"no classifier of pictures ships for {pipeline!r}; name one with --set image_classifier.pretrained=FOLDER_OR_HUB_ID and its unsafe "
        "labels with --set image_classifier.unsafe=…"
    )


def _anchors(pipeline: str, name: str) -> Anchors | None:
    kind = name.replace("_", "-")
    file = WEIGHTS / f"{kind}-{pipeline.removeprefix('testbed/')}.safetensors"
    if pipeline.startswith("testbed/") and file.is_file():
        return Anchors.load(file)
    if name == "reference_anchors":
        return None
    raise ArtefactError(
        f"there are no anchors for {pipeline!r}; collect some with `safelight train uvr`, and pass its folder as --guard FOLDER"
    )


def _redirectors(pipeline: str, concepts: str) -> tuple[Redirector, ...]:
    """The redirectors that ship for a testbed pipeline: all of them, or those of some concepts."""
    known = {concept: file for concept, file in bundled_redirectors(pipeline).items() if not concepts or concept in concepts.split(",")}
    if missing := [concept for concept in concepts.split(",") if concept and concept not in known]:
        raise ValueError(
            f"there is no redirector of {missing[0]!r} for {pipeline}; there are {', '.join(bundled_redirectors(pipeline)) or 'none'}"
        )
    if not known:
        raise ArtefactError(
            f"there is no redirector for {pipeline!r}; train one with `safelight train saferedir`, and pass its folder as --guard FOLDER"
        )
    return tuple(Redirector.load(file) for file in known.values())


def _dictionaries(pipeline: str) -> tuple[Dictionary, ...]:
    """The safety dictionaries that ship for a testbed pipeline."""
    files = sorted(WEIGHTS.glob(f"dictionary-{pipeline.removeprefix('testbed/')}-*.safetensors")) if pipeline.startswith("testbed/") else []
    if not files:
        raise ArtefactError(
            f"there are no safety dictionaries for {pipeline!r}; make some with `safelight train safedig`, and pass its folder as --guard FOLDER"
        )
    return tuple(Dictionary.load(file) for file in files)


def bundled_redirectors(pipeline: str) -> dict[str, Path]:
    """Concept -> the file of its redirector, for a testbed pipeline."""
    prefix = f"redirector-{pipeline.removeprefix('testbed/')}-"
    files = sorted(WEIGHTS.glob(f"{prefix}*.safetensors")) if pipeline.startswith("testbed/") else []
    return {file.stem.removeprefix(prefix): file for file in files}


def _guidance(name: str, bank: Bank) -> SafeGuidance:
    makers: Mapping[str, Any] = {
        "arithmetic": lambda: Arithmetic(bank),
        "twin": lambda: NearestTwin(bank),
        "context": InContext,
    }
    if name not in makers:
        raise ValueError(f"guidance={name!r} is not one of {', '.join(GUIDANCE)}")
    maker = makers["context" if name == "arithmetic" and bank.tokens is None else name]
    return maker()  # type: ignore[no-any-return]


def unsafe_words(pipeline: str, domain: str | None = None) -> tuple[str, ...]:
    """What is unsafe, in words, where the user didn't say: on the testbed the objects of a domain, by default weapons.

    Raises:
        ValueError: if there is no such domain.
    """
    if not pipeline.startswith("testbed/"):
        if domain is not None:
            raise ValueError(f"domain={domain!r}: only the testbed has domains; tell the guard in its own settings")
        return ("violence", "nudity", "weapons", "blood", "drugs")
    return _domain(domain or "weapons")


def _domain(name: str) -> tuple[str, ...]:
    """The unsafe objects of a testbed domain."""
    from .testbed.world import DOMAINS

    if name not in DOMAINS:
        raise ValueError(f"there is no domain {name!r}; there are {', '.join(DOMAINS)}")
    return DOMAINS[name]
