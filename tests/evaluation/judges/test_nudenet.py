"""NudeNet's rules, and its real network on harmless pictures."""

from __future__ import annotations

import dataclasses
import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_pictures import harmless, noise, plain

from safelight.errors import ArtefactError
from safelight.evaluation.judge import Judgement
from safelight.evaluation.judges.nudenet import EXPLICIT, EXPOSED, LABELS, RULES, NudeNet, judgement
from safelight.testbed.scenes import render, sample_scene

detections = st.lists(st.fixed_dictionaries({"class": st.sampled_from(LABELS), "score": st.floats(0.25, 1)}), max_size=6)


def installed() -> None:
    pytest.importorskip("nudenet", reason="the package nudenet (AGPL-3.0, with OpenCV 72 MB) is an extra that `make test` does not install")


def test_a_rule_is_classes_and_threshold() -> None:
    found = [{"class": "BELLY_EXPOSED", "score": 0.7}, {"class": "FACE_FEMALE", "score": 0.9}, {"class": "BELLY_EXPOSED", "score": 0.4}]
    broad, narrow = (judgement(found, RULES[rule].classes, RULES[rule].threshold) for rule in ("rece", "sld"))
    assert (broad.unsafe, broad.score) == (True, 0.7)
    assert (narrow.unsafe, narrow.score) == (False, 0.0)
    assert broad.labels == narrow.labels == {"BELLY_EXPOSED": 0.7, "FACE_FEMALE": 0.9}
    assert not judgement(found, *_of("unlearndiffatk-prompts")).unsafe


def test_nothing_seen_is_safe_at_threshold_zero() -> None:
    assert judgement([], EXPOSED, 0.0) == Judgement(False, 0.0, {})
    assert not judgement([{"class": "FACE_MALE", "score": 0.9}], EXPOSED, 0.0).unsafe
    assert judgement([{"class": "ANUS_EXPOSED", "score": 0.26}], EXPOSED, 0.0).unsafe


@given(detections)
def test_a_stricter_rule_finds_no_less(found: list[dict[str, object]]) -> None:
    mild, strict = judgement(found, EXPLICIT, 0.6), judgement(found, EXPOSED, 0.45)
    assert strict.unsafe >= mild.unsafe
    assert strict.score >= mild.score
    assert mild.unsafe == (mild.score >= 0.6)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_names_its_source_and_known_classes(rule: str) -> None:
    described = NudeNet(rule=rule).describe()
    assert described["classes"] == list(RULES[rule].classes)
    assert set(described["classes"]) <= set(LABELS)
    assert described["threshold"] == RULES[rule].threshold
    assert "https://arxiv.org/abs/" in described["source"]
    assert json.loads(json.dumps(described)) == described


def test_there_are_eighteen_classes_and_six_rules() -> None:
    assert len(LABELS) == len(set(LABELS)) == 18
    assert len({(rule.classes, rule.threshold) for rule in RULES.values()}) >= 6


def test_other_settings_make_a_custom_rule() -> None:
    judge = NudeNet(rule="mace", threshold=0.8)
    assert (judge.rule, judge.classes, judge.threshold) == ("custom", EXPOSED, 0.8)
    assert dataclasses.replace(judge, resolution=640).rule == "custom"
    assert dataclasses.replace(NudeNet(rule="mace"), resolution=640).rule == "mace"
    assert "source" not in judge.describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "esdd"}, "there is no rule 'esdd'; there are sld, esd"), ({"rule": "custom"}, "needs classes and a threshold"),
        ({"classes": ("KNEE",), "threshold": 0.5}, "no class 'KNEE'"), ({"threshold": 1.5}, "out of range"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NudeNet(**settings)  # type: ignore[arg-type]


def test_harmless_pictures_are_safe() -> None:
    installed()
    for rule in ("unlearndiffatk", "mace"):
        found = NudeNet(rule=rule)(harmless())
        assert [judged.unsafe for judged in found] == [False] * len(harmless())


def test_any_score_rules_raise_false_alarms() -> None:
    """One of the two scenes behind the figure in docs/judges.md."""
    installed()
    random = Random(0)
    scene = next(scene for scene in (sample_scene(random) for _ in range(100)) if scene.objects == ("firework", "dog"))
    strict, touchy = (NudeNet(rule=rule)([render(scene)])[0] for rule in ("rece", "mace"))
    assert touchy.unsafe
    assert not strict.unsafe
    assert 0.25 < touchy.score < 0.3
    assert touchy.labels == strict.labels


def test_weights_are_named_and_loaded_once() -> None:
    installed()
    judge = NudeNet()
    assert "nudenet 3.4" in judge.describe()["version"]
    assert "320n.onnx sha256:" in judge.describe()["version"]
    assert "_detector" not in vars(judge)
    judge([plain(0)])
    first = judge._detector
    assert judge([plain(3)])[0] == judge([plain(0)])[0]
    assert judge._detector is first


def test_pictures_are_seen_as_from_a_file(tmp_path: object) -> None:
    installed()
    import cv2

    seen: list[object] = []

    class Watching:
        def detect(self, picture: object) -> list[dict[str, object]]:
            seen.append(picture)
            return []

    judge, picture = NudeNet(), noise()
    judge.__dict__["_detector"] = Watching()
    judge([picture, picture])
    cv2.imwrite(f"{tmp_path}/picture.png", picture[..., ::-1])
    assert len(seen) == 1
    assert (seen[0] == cv2.imread(f"{tmp_path}/picture.png")).all()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nudenet", None)
    with pytest.raises(ArtefactError, match=r"AGPL-3.0.*pip install 'safelight\[nudenet\]'"):
        NudeNet()([plain(0)])


def test_missing_weights_are_named() -> None:
    installed()
    assert "no weights" in NudeNet(weights="nowhere/640m.onnx").describe()["version"]
    with pytest.raises(ArtefactError, match=r"there is no file nowhere/640m\.onnx"):
        NudeNet(weights="nowhere/640m.onnx")([plain(0)])


def _of(rule: str) -> tuple[tuple[str, ...], float]:
    return RULES[rule].classes, RULES[rule].threshold
