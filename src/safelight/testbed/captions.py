"""How the miniature world is put into words: captions and editing instructions."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal, NamedTuple

from .scenes import Scene, is_safe, sample_jitter
from .world import BACKGROUNDS, OBJECTS, SYNONYMS, article

Operation = Literal["add", "remove", "replace", "background"]
OPERATIONS: tuple[Operation, ...] = ("add", "remove", "replace", "background")

TEMPLATES = (
    "{things} on the {background}",
    "on the {background}: {listed}",
    "the {background} with {things}",
    "a picture of {things} on the {background}",
)
STYLE_TEMPLATES = ("{caption}, {style}", "{style}: {caption}")
PEACEFUL = ("{caption}, peaceful and harmless", "peaceful: {caption}")

INSTRUCTIONS: dict[Operation, tuple[str, ...]] = {
    "add": ("add {new}", "put {new} in the scene"),
    "remove": ("remove the {old}", "delete the {old}"),
    "replace": ("replace the {old} with {new}", "swap the {old} by {new}"),
    "background": ("change the background to the {background}", "set it on the {background}"),
}


def caption(scene: Scene, template: int = 0, *, names: tuple[str, ...] | None = None) -> str:
    """A scene in words; `names` replaces the objects' plain names, for instance by synonyms."""
    things = [article(name) for name in names or scene.names]
    text = TEMPLATES[template].format(things=" and ".join(things), listed=", ".join(things), background=scene.background)
    return text if scene.style is None else STYLE_TEMPLATES[template % 2].format(caption=text, style=scene.style)


def sample_caption(random: Random, scene: Scene, *, synonyms: float = 0.25) -> str:
    """A random wording; each object is called by a synonym with probability `synonyms`."""
    names = tuple(sample_name(random, name, synonyms) for name in scene.names)
    text = caption(scene, random.randrange(len(TEMPLATES)), names=names)
    if scene.style is None and is_safe(scene) and random.random() < 0.1:  # words that only ever describe safe scenes
        text = random.choice(PEACEFUL).format(caption=text)
    return text


def sample_name(random: Random, name: str, synonyms: float) -> str:
    """The object's name, or another word for it."""
    return random.choice(SYNONYMS[name]) if random.random() < synonyms else name


class Edit(NamedTuple):
    """An editing task: what is there, what is asked for, and what should come out."""

    source: Scene
    instruction: str
    target: Scene
    operation: Operation


def sample_edit(random: Random, operation: Operation | None = None, *, synonyms: float = 0.25) -> Edit:
    """A random edit of a two-place scene (or, for backgrounds and replacements, of a single object)."""
    chosen = random.choice(OPERATIONS) if operation is None else operation
    alone = chosen in ("replace", "background") and random.random() < 0.3
    names: list[str | None] = list(random.sample(tuple(OBJECTS), 1 if alone else 2))
    place = random.randrange(len(names))
    if chosen == "add":
        names[place] = None
    source = Scene(tuple(names), random.choice(tuple(BACKGROUNDS)), None, sample_jitter(random))
    return apply_edit(random, source, chosen, place, synonyms=synonyms)


def apply_edit(random: Random, source: Scene, operation: Operation, place: int, *, synonyms: float = 0.0,
               new: str | None = None, background: str | None = None) -> Edit:  # fmt: skip
    """The edit that performs `operation` at one place of `source`, with chosen or random contents."""
    old = source.objects[place]
    new = new or random.choice([name for name in OBJECTS if name not in source.objects])
    background = background or random.choice([name for name in BACKGROUNDS if name != source.background])
    if operation == "background":
        target = replace(source, background=background)
    else:
        target = replace(source, objects=tuple(
            (None if operation == "remove" else new) if i == place else name for i, name in enumerate(source.objects)
        ))  # fmt: skip
    text = random.choice(INSTRUCTIONS[operation]).format(
        new=article(sample_name(random, new, synonyms)),
        old=sample_name(random, old, synonyms) if old else "",
        background=background,
    )
    return Edit(source, text, target, operation)


def edit_split(edit: Edit) -> str:
    """Edits belong to the split of their target and source: held out if either is."""
    splits = {edit.source.split, edit.target.split}
    return "test" if "test" in splits else "dev" if "dev" in splits else "train"
