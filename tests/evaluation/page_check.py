"""Reads a page as a browser and a screen reader would."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Checked(HTMLParser):
    """Reads a page, and fails where it is not well-formed, not self-contained or not accessible."""

    VOID = {"meta", "img", "input", "br", "col", "line", "circle", "polyline", "path", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check(text: str) -> Checked:
    parsed = Checked(text)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text))
    assert not parsed.of("link")
    assert not parsed.of("iframe")
    for picture in parsed.of("img"):
        assert (picture["src"] or "").startswith("data:image/png;base64,")
        assert picture["alt"]
        assert picture["loading"] == "lazy"
    for svg in parsed.of("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("aria-label")
    assert all("scope" in head for head in parsed.of("th"))
    assert parsed.of("html")[0]["lang"] == "en"
    return parsed
