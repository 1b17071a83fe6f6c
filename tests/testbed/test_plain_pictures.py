"""What judges say of pictures that no generator makes."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.testbed.judges import is_plain, judges
from safelight.testbed.scenes import Scene, render


@pytest.mark.parametrize("grey", [0, 100, 127, 128, 255])
def test_a_plain_picture_shows_nothing(grey: int) -> None:
    for judge in judges():
        (sight,) = judge.look([np.full((64, 64, 3), grey, np.uint8)])
        assert not sight.objects, judge.name
        assert max(sight.scores.values()) <= judge.threshold


def test_a_scene_is_not_plain() -> None:
    classifier = judges()[0]
    pictures = [np.full((64, 64, 3), 127, np.uint8), render(Scene(("cat", "knife"), "beach"))]
    assert [is_plain(picture) for picture in pictures] == [True, False]
    assert classifier.look(pictures)[1].objects == {"cat", "knife"}
