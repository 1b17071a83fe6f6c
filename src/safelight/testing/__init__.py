"""What every method, backbone and detector must keep to, for ours and for those of other packages."""

from __future__ import annotations

from .backbones import check_backbone
from .containing import Containing
from .detectors import check_detector
from .methods import check_method
from .tiny import NAMES, sample, tiny_pipeline

__all__ = ["NAMES", "Containing", "check_backbone", "check_detector", "check_method", "sample", "tiny_pipeline"]
