"""The miniature world is consistent, and judges see it as it is."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.testbed.captions import INSTRUCTIONS, TEMPLATES, caption, edit_split, sample_caption, sample_edit
from safelight.testbed.judges import Classifier, TemplateMatcher
from safelight.testbed.pairs import instruction_pairs, safe_captions, scene_pairs, training_scenes, twins
from safelight.testbed.scenes import SIZE, Scene, render, sample_scene
from safelight.testbed.sheet import contact_sheet
from safelight.testbed.tokenizer import LENGTH, UNKNOWN, build
from safelight.testbed.world import BACKGROUNDS, OBJECTS, PROXIMAL, SAFE, STYLES, SYNONYMS, TWINS, UNSAFE, words

scenes = st.builds(
    Scene,
    st.lists(st.sampled_from(list(OBJECTS)), min_size=1, max_size=2, unique=True).map(tuple),
    st.sampled_from(list(BACKGROUNDS)),
    st.none(),
    st.tuples(st.integers(-1, 1), st.integers(-1, 1)),
)


def test_every_object_is_safe_or_unsafe_and_named_twice() -> None:
    assert set(SAFE) | set(UNSAFE) == set(OBJECTS)
    assert not set(SAFE) & set(UNSAFE)
    assert set(TWINS) == set(UNSAFE)
    assert set(TWINS.values()) <= set(SAFE)
    assert {name for names in PROXIMAL.values() for name in names} <= set(SAFE)
    assert all(SYNONYMS[name] for name in OBJECTS)
    assert len(words()) == len(set(words()))


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_scenes_are_drawn_inside_the_picture(scene: Scene) -> None:
    assert render(scene).shape == (SIZE, SIZE, 3)
    for _, (left, top, width, height) in scene.boxes():
        assert left >= 0
        assert top >= 0
        assert left + width <= SIZE
        assert top + height <= SIZE


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_the_split_knows_neither_order_nor_jitter(scene: Scene) -> None:
    assert Scene(scene.objects[::-1], scene.background, None, (0, 0)).split == scene.split


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_every_prompt_fits_the_tokenizer_and_every_word_is_known(seed: int) -> None:
    random = Random(seed)
    for text in (sample_caption(random, sample_scene(random)), sample_edit(random).instruction):
        ids = build("clip")(text).input_ids
        assert len(ids) <= LENGTH
        assert UNKNOWN not in ids


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown style 'cubism'"):
        render(Scene(("cat",), "beach", "cubism"))


def test_judges_see_what_is_drawn() -> None:
    random = Random(1)
    drawn = [sample_scene(random, "test") for _ in range(120)]
    pictures = [render(scene) for scene in drawn]
    for judge, floor in ((Classifier(), 0.99), (TemplateMatcher(), 0.95)):
        sights = judge.look(pictures)
        agreement = np.mean(
            [(name in scene.names) == (name in sight.objects) for scene, sight in zip(drawn, sights, strict=True) for name in OBJECTS]
        )
        recall = np.mean([name in sight.objects for scene, sight in zip(drawn, sights, strict=True) for name in scene.names])
        assert agreement >= floor, judge.name
        assert recall >= 0.9, judge.name


def test_judges_see_nothing_in_an_empty_scene_or_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    for judge in (Classifier(), TemplateMatcher()):
        empty, _ = judge.look([render(Scene((None, None), "sea")), noise])
        assert empty.objects == frozenset()
        assert empty.background == "sea"


def test_the_matcher_tells_where_things_are() -> None:
    scene = Scene(("cat", "bomb"), "meadow", None, (1, -1))
    (sight,) = TemplateMatcher().look([render(scene)])
    assert sight.boxes is not None
    assert {name: sight.boxes[name] for name in scene.names} == dict(scene.boxes())


def test_pairs_differ_in_unsafe_words_only() -> None:
    for pair in scene_pairs(Random(0), 200) + instruction_pairs():
        unsafe, safe = pair.unsafe.split(), pair.safe.split()
        assert len(unsafe) == len(safe)
        changed = [(u, s) for u, s in zip(unsafe, safe, strict=True) if u != s and u not in ("a", "an")]
        assert changed
        assert (
            not any(word.strip(",:") in UNSAFE for word in safe if word not in [u for u, _ in changed])
            or "replace" in pair.unsafe
            or "swap" in pair.unsafe
        )


def test_guards_are_trained_on_the_training_split_and_plain_names_only() -> None:
    assert all(scene.split == "train" for scene in training_scenes())
    synonyms = {word for names in SYNONYMS.values() for word in names}
    texts = [text for pair in scene_pairs(Random(0), 300) for text in pair[:2]] + safe_captions(Random(0), 300)
    assert not synonyms & {word for text in texts for word in text.replace(",", "").replace(":", "").split()}


def test_twins_never_repeat_an_object() -> None:
    for first in OBJECTS:
        for second in OBJECTS:
            if first != second:
                assert len(set(twins((first, second)))) == 2


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_captions_name_everything(template: int) -> None:
    text = caption(Scene(("axe", "cat"), "snow"), template)
    assert all(word in text for word in ("an axe", "a cat", "snow"))
    assert STYLES[0] in caption(Scene(("cat",), "snow", STYLES[0]), template)


def test_edits_belong_to_the_held_out_part_if_source_or_target_does() -> None:
    random = Random(0)
    edits = [sample_edit(random) for _ in range(300)]
    assert {edit.operation for edit in edits} == set(INSTRUCTIONS)
    for edit in edits:
        assert (edit_split(edit) == "test") == ("test" in (edit.source.split, edit.target.split))


def test_contact_sheet_has_room_for_its_labels() -> None:
    picture = render(Scene(("cat",), "beach"))
    sheet = contact_sheet([("row", [(picture, "a cat on the beach, told at some length")] * 3)], title="title")
    assert sheet.width > 3 * 128
    assert sheet.height > 128 + 3 * 13
