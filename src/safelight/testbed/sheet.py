"""Contact sheets: pictures in rows, with labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Cell = tuple[Any, str]
CELL, MARGIN, LINE = 128, 8, 13


def contact_sheet(rows: Sequence[tuple[str, Sequence[Cell]]], title: str = "", cell: int = CELL) -> Image.Image:
    """Rows of (heading, cells); a cell is a picture and its caption."""
    columns = max(len(cells) for _, cells in rows)
    lines = max((len(wrap(label, cell)) for _, cells in rows for _, label in cells), default=0)
    height = cell + lines * LINE + MARGIN
    width = columns * (cell + MARGIN) + MARGIN
    headings = sum(LINE + MARGIN for heading, _ in rows if heading)
    sheet = Image.new("RGB", (width, len(rows) * height + headings + (LINE * 2 if title else 0) + MARGIN), (250, 249, 247))
    draw, y = ImageDraw.Draw(sheet), MARGIN
    if title:
        draw.text((MARGIN, y), title, fill=(20, 20, 20), font=font(15))
        y += LINE * 2
    for heading, cells in rows:
        if heading:
            draw.text((MARGIN, y), heading, fill=(150, 30, 30), font=font(12))
            y += LINE + MARGIN
        for column, (picture, label) in enumerate(cells):
            x = MARGIN + column * (cell + MARGIN)
            sheet.paste(enlarged(picture, cell), (x, y))
            for number, line in enumerate(wrap(label, cell)):
                draw.text((x, y + cell + 2 + number * LINE), line, fill=(70, 70, 70), font=font(10))
        y += height
    return sheet


def enlarged(picture: Any, size: int) -> Image.Image:
    """A picture at the size of a cell."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
    return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def wrap(label: str, cell: int) -> list[str]:
    """A label in lines that fit under a cell."""
    return textwrap.wrap(label, max(8, cell // 6))


def font(size: int) -> Any:
    """Pillow's own font."""
    return ImageFont.load_default(size)
