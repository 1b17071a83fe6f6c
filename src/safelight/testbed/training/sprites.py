"""Draws the sprite atlas from the colour emoji font (Debian: fonts-noto-color-emoji, OFL)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..scenes import ALONE, SPRITE_SIZES
from ..world import OBJECTS

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def draw_atlas(font: Path = FONT) -> Image.Image:
    """One row per object; each row holds the sprite at both sizes."""
    if not font.is_file():
        raise FileNotFoundError(f"no emoji font at {font}; install fonts-noto-color-emoji or name the font's file")
    face = ImageFont.truetype(str(font), 109)
    atlas = Image.new("RGBA", (sum(SPRITE_SIZES), ALONE * len(OBJECTS)))
    for row, symbol in enumerate(OBJECTS.values()):
        tile = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(tile).text((0, 0), symbol, font=face, embedded_color=True)
        tile = tile.crop(tile.getbbox())
        left = 0
        for size in SPRITE_SIZES:
            ratio = size / max(tile.size)
            shape = tuple(max(1, round(side * ratio)) for side in tile.size)
            atlas.paste(tile.resize(shape, Image.Resampling.LANCZOS), (left, row * ALONE))
            left += size
    return atlas
