"""Every method on every backbone."""

from __future__ import annotations

from typing import Any

import pytest

from safelight import Method
from safelight.bundle import METHODS
from safelight.compose import WEIGHTS
from safelight.detectors.image_classifier import ImageClassifier
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.post_filter import PostFilter
from safelight.methods.safree import SAFREE
from safelight.methods.sld import SLD
from safelight.picture_model import PictureModel
from safelight.testing import Containing, check_method

FACTORIES = {
    "block": lambda pipe: Block(detector=Containing()),
    "dual_latent": lambda pipe: DualLatent(detector=Containing(), until=0.5),
    "dual_latent (free)": lambda pipe: DualLatent(detector=Containing(), until=0.5, coupling="free"),
    "gate": lambda pipe: Gate(detector=Containing(), method=NegativePrompt(words="knife")),
    "gate (dual latent)": lambda pipe: Gate(detector=Containing(), method=DualLatent(detector=Containing())),
    "negative_prompt": lambda pipe: NegativePrompt(words="knife"),
    "post_filter": lambda pipe: PostFilter(
        detector=ImageClassifier(model=PictureModel.load(WEIGHTS / "pictures.safetensors"), threshold=0.0)
    ),
    "safree": lambda pipe: SAFREE(concepts=("a knife",), alpha=0.0, gamma=4),
    "sld": lambda pipe: SLD(concept="knife", warmup=0),
}
INDISCRIMINATE = {"negative_prompt", "post_filter", "safree", "sld"}
"""They act on every sample here: `post_filter` does so at a threshold that all pictures exceed, as random weights draw nothing to judge."""


@pytest.mark.parametrize("name", FACTORIES)
def test_a_method_keeps_its_promises(name: str, pipe: Any) -> None:
    check_method(FACTORIES[name], [pipe], selective=name not in INDISCRIMINATE)


def test_no_method_is_forgotten() -> None:
    own = {
        "safedig",
        "saferedir",
        "uvr",
        "pre_filter",
    }  # their artefacts belong to a pipeline: their own tests fit some to each, and run the same checks; pictures go into few
    assert {name.split(" ")[0] for name in FACTORIES} | own == set(METHODS.names())


class Forgetful(Method):
    """Breaks one promise: it acts in the first generation only."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, step: Any, advance: Any) -> Any:
        self.seen.append(1)
        return advance(step) * (0.9 if len(self.seen) < 4 else 1)


class Lazy(Method):
    """Breaks another: it does nothing."""


@pytest.mark.parametrize(("method", "message"), [(Forgetful, "differs from its rows run alone|does nothing"), (Lazy, "does nothing about")])
def test_who_breaks_a_promise_is_found_out(method: type[Method], message: str, sd: Any) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(lambda pipe: method(), [sd], selective=False)
