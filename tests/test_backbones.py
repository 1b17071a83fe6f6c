"""The tables of the backbones against real diffusers pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight import Site, guard
from safelight.backbone import BACKBONES, Backbone
from safelight.errors import UnsupportedPipeline
from safelight.methods.dual_latent import DualLatent
from safelight.testing import Containing, check_backbone, sample


def test_a_backbone_keeps_its_promises(pipe: Any) -> None:
    check_backbone(pipe)


def test_a_subclass_of_a_known_pipeline_is_known(sd: Any) -> None:
    kind = type(sd)
    sd.__class__ = type("MyPipeline", (kind,), {})
    assert isinstance(Backbone.of(sd), BACKBONES[kind.__name__])


def test_an_unknown_pipeline_is_refused() -> None:
    with pytest.raises(UnsupportedPipeline, match=r"no backbone knows object; known: .*FluxPipeline"):
        Backbone.of(object())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tower.0:image", "has no site 'tower.0:image'; kinds: "),
        ("joint.7:image", "'joint' has 2 blocks"),
        ("joint.0.hair", "no site"),
    ],
)
def test_an_unknown_site_is_refused(flux: Any, address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone.of(flux).locate(Site.parse(address))


@pytest.mark.parametrize("scale", [1.5, 2.0, 4.0])
def test_true_guidance_is_recovered_from_the_predictions(flux: Any, scale: float) -> None:
    """`true_cfg_scale` is a local variable of FLUX's pipeline; an extra branch must use the same one."""
    cond, uncond = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = Backbone.of(flux)
    guided = backbone.guide([cond, uncond], scale)
    assert backbone.scale([cond, uncond], guided) == pytest.approx(scale, abs=1e-3)
    assert backbone.scale([cond], cond) == 1
    assert backbone.guide([cond], 1.0) is cond


def test_rescaled_guidance_can_not_be_repeated(sd: Any, detector: Containing) -> None:
    with (
        guard(sd, DualLatent(detector=detector, coupling="free")),
        pytest.raises(UnsupportedPipeline, match="guidance_rescale"),
    ):
        sample(sd, "a knife on a beach", guidance_rescale=0.5)
