"""Masks shown over the images they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

COLOUR = (255, 60, 0)


def overlay(image: Image.Image, mask: Sequence[Sequence[int]], strength: float = 0.45) -> Image.Image:
    """An image with the tokens of a mask, rows of 0 and 1, tinted; small images are enlarged so that there is something to see."""
    scale = max(1, 256 // min(image.size))
    enlarged = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    tokens = Image.fromarray(np.asarray(mask, dtype=np.uint8) * round(255 * strength)).resize(enlarged.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", enlarged.size, COLOUR), enlarged, tokens)
