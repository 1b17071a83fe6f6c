"""Whether the testbed's generators and judges deserve trust: what is asked for must be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from ..backbone import Backbone
from ..compose import load_pipeline, testbed_bank
from ..detectors.neighbours import Neighbours
from ..generator import Generator, as_bytes
from ..run import Run
from ..testbed.captions import OPERATIONS, Edit, caption, edit_split, sample_caption, sample_edit
from ..testbed.judges import Judge, Sight, judges
from ..testbed.scenes import Scene, render, sample_scene
from ..testbed.world import OBJECTS, UNSAFE
from .case import Case, Estimate
from .evaluate import look
from .metrics.estimates import rate

Progress = Callable[[str, int, int], None]
Figures = dict[str, dict[str, Any]]


def generation(generator: Generator, count: int = 300, batch: int = 16, progress: Progress = lambda *_: None) -> Figures:
    """Named objects present and background right, on held-out captions in plain words."""
    random = Random("fidelity/1")
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(random, "test")
        if scene.style is None:
            scenes.append(scene)
    cases = [Case(str(i), caption(scene, i % 4), False, seed=5000 + i) for i, scene in enumerate(scenes)]
    pictures = _pictures(generator, cases, batch, progress)
    return {judge.name: _generated(scenes, look(judge, pictures)) for judge in judges()}


def _generated(scenes: Sequence[Scene], sights: Sequence[Sight]) -> dict[str, Any]:
    present = [name in sight.objects for scene, sight in zip(scenes, sights, strict=True) for name in scene.names]
    right = [sight.background == scene.background for scene, sight in zip(scenes, sights, strict=True)]
    extra = [bool(sight.objects - set(scene.names)) for scene, sight in zip(scenes, sights, strict=True)]
    return _dicts({"objects_present": rate(present), "background_right": rate(right), "something_else": rate(extra)})


def editing(generator: Generator, count: int = 200, batch: int = 16, progress: Progress = lambda *_: None) -> Figures:
    """Instructions done and untouched objects kept, on held-out edits in plain words."""
    random = Random("fidelity/1")
    edits: list[Edit] = []
    while len(edits) < count:
        edit = sample_edit(random, OPERATIONS[len(edits) % len(OPERATIONS)], synonyms=0.0)
        if edit_split(edit) == "test":
            edits.append(edit)
    cases = [Case(str(i), edit.instruction, False, seed=6000 + i, image=render(edit.source)) for i, edit in enumerate(edits)]
    pictures = _pictures(generator, cases, batch, progress)
    return {judge.name: _edited(edits, look(judge, pictures)) for judge in judges()}


def done(edit: Edit, sight: Sight) -> bool:
    """Whether an instruction was followed."""
    new = set(edit.target.names) - set(edit.source.names)
    old = set(edit.source.names) - set(edit.target.names)
    if edit.operation == "background":
        return sight.background == edit.target.background
    return new <= sight.objects and not old & sight.objects


def _edited(edits: Sequence[Edit], sights: Sequence[Sight]) -> dict[str, Any]:
    figures = {"done": rate([done(edit, sight) for edit, sight in zip(edits, sights, strict=True)])}
    for operation in OPERATIONS:
        figures[f"done_{operation}"] = rate([done(e, s) for e, s in zip(edits, sights, strict=True) if e.operation == operation])
    kept = [name in s.objects for e, s in zip(edits, sights, strict=True) for name in e.target.names if name in e.source.names]
    return _dicts(figures | {"untouched_objects_kept": rate(kept)})


def judging(count: int = 2000) -> Figures:
    """Per-object accuracy of both judges on rendered held-out scenes."""
    random = Random("fidelity/1")
    scenes = [sample_scene(random, "test") for _ in range(count)]
    return {judge.name: _judged(scenes, judge) for judge in judges()}


def _judged(scenes: Sequence[Scene], judge: Judge) -> dict[str, Any]:
    sights = judge.look([render(scene) for scene in scenes])
    pairs = list(zip(scenes, sights, strict=True))
    agree = [(name in scene.names) == (name in sight.objects) for scene, sight in pairs for name in OBJECTS]
    found = [name in sight.objects for scene, sight in pairs for name in scene.names]
    backgrounds = [scene.background == sight.background for scene, sight in pairs if scene.style != "pencil sketch"]
    return _dicts({"per_object_accuracy": rate(agree), "recall": rate(found), "background_right": rate(backgrounds)})


def _pictures(generator: Generator, cases: Sequence[Case], batch: int, progress: Progress) -> list[Any]:
    pictures: list[Any] = []
    for start in range(0, len(cases), batch):
        progress("generating", start, len(cases))
        pictures += [as_bytes(image) for image in generator(cases[start : start + batch])]
    progress("generating", len(cases), len(cases))
    return pictures


def _dicts(figures: dict[str, Estimate]) -> dict[str, Any]:
    return {name: figure._asdict() for name, figure in figures.items()}


def detection(pipeline: str, count: int = 1000) -> dict[str, Any]:
    """The bundled bank's detector on held-out prompts: recall and false positives, in plain words and in synonyms."""
    pipe, bank = load_pipeline(pipeline), testbed_bank(pipeline)
    run = Run(Backbone.of(pipe), pipe.encode_prompt, None)
    detector = Neighbours(bank=bank, encoder=run.pool)
    random = Random("fidelity/1")
    figures: dict[str, Estimate] = {}
    for wording, synonyms in (("plain", 0.0), ("synonyms", 1.0)):
        for kind, unsafe in (("recall", True), ("false_positives", False)):
            prompts = [_held_out_prompt(random, pipeline == "testbed/kontext", unsafe, synonyms) for _ in range(count)]
            figures[f"{kind}_{wording}"] = rate([verdict.flagged for verdict in detector.verdicts(prompts)])
    return {"detector": _dicts(figures), "calibration": str(bank.calibration)}


def _held_out_prompt(random: Random, editing: bool, unsafe: bool, synonyms: float) -> str:
    while True:
        if editing:
            edit = sample_edit(random, synonyms=synonyms)
            brought_in = set(edit.target.names) - set(edit.source.names)
            if edit_split(edit) == "test" and bool(brought_in & set(UNSAFE)) == unsafe:
                return edit.instruction
        else:
            scene = sample_scene(random, "test")
            if bool(set(scene.names) & set(UNSAFE)) == unsafe:
                return sample_caption(random, scene, synonyms=synonyms)
