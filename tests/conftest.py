"""Fixtures that all tests share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from safelight import Method, guard
from safelight.run import Run
from safelight.testing import NAMES, Containing, sample, tiny_pipeline

torch.set_num_threads(1)


@pytest.fixture(params=NAMES)
def pipe(request: pytest.FixtureRequest) -> Any:
    """A fresh tiny pipeline of each kind."""
    return tiny_pipeline(request.param)


@pytest.fixture
def sd() -> Any:
    """A tiny StableDiffusionPipeline."""
    return tiny_pipeline("sd")


@pytest.fixture
def flux() -> Any:
    """A tiny FluxPipeline."""
    return tiny_pipeline("flux")


@pytest.fixture
def detector() -> Containing:
    """Flags prompts that contain "knife"."""
    return Containing()


@pytest.fixture
def run(sd: Any) -> Run:
    """A generation that has ended: it can still encode prompts."""
    with guard(sd, Method()) as handle:
        sample(sd, "a knife on a beach", steps=2)
    assert handle.run is not None
    return handle.run


@pytest.fixture(scope="session", autouse=True)
def _plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes `Containing` loadable from bundles, in the way in which another package would: by an entry point."""
    folder = tmp_path_factory.mktemp("site-packages")
    info = folder / "containing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: containing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[safelight.detectors]\ncontaining = safelight.testing.containing:Containing\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
