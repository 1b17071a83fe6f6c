"""The folder is the registry."""

from __future__ import annotations

import pytest

from safelight.bundle import DETECTORS, METHODS
from safelight.methods.dual_latent import DualLatent
from safelight.testing import Containing


def test_names_are_those_of_the_files() -> None:
    assert {"block", "dual_latent", "gate", "negative_prompt"} <= set(METHODS.names())
    assert METHODS.names() == sorted(METHODS.names())
    assert METHODS["dual_latent"] is DualLatent


def test_every_name_resolves_to_a_class_of_the_catalogue() -> None:
    for name, kind in METHODS:
        assert issubclass(kind, METHODS.base)
        assert kind.__module__.endswith(f".{name}")


def test_other_packages_add_to_it_by_entry_points() -> None:
    assert "containing" in DETECTORS.names()
    assert DETECTORS["containing"] is Containing


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no 'dual_latnet' in safelight\.methods; did you mean 'dual_latent'"):
        METHODS["dual_latnet"]
