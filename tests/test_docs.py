"""What the documents say is true of the code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import safelight
from safelight.bundle import METHODS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "safelight").rglob("*.py"))


def methods_table() -> str:
    lines = ["| guard | what it does | paper |", "|---|---|---|"]
    for name, cls in METHODS:
        doc = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
        sentence = re.sub(
            r" \([^()]*https://[^()]*\)", "", re.split(r"(?<=\.)\s", doc.replace("et al. ", "et al ").replace("et al.,", "et al,"))[0]
        )
        link = re.search(r"https://arxiv\.org/abs/([\d.]+\d)", doc)
        assert link, f"{name} cites no paper"
        lines.append(f"| [`{name}`](docs/methods/{name}.md) | {sentence} | [arXiv:{link[1]}]({link[0]}) |")
    return "\n".join(lines)


def test_the_table_of_guards_is_made_of_their_docstrings() -> None:
    assert methods_table() in (ROOT / "README.md").read_text(), f"put this into README.md:\n{methods_table()}"


def test_every_guard_has_its_page_and_its_test() -> None:
    for name in METHODS.names():
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file(), name
        assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file(), name


def test_public_names_are_sorted_and_complete() -> None:
    assert safelight.__all__ == sorted(safelight.__all__)
    assert all(getattr(safelight, name) is not None for name in safelight.__all__)


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_are_small_and_name_no_local_paths() -> None:
    for file in SOURCES:
        text = file.read_text()
        assert len(text.splitlines()) <= 400, f"{file.name} has grown; is there a file inside that wants out?"
        assert not re.search(r"(^|[^\w.])/(home|work|root)/", text), file.name


def test_nothing_bundled_is_a_pickle_and_all_is_small() -> None:
    bundled = list((ROOT / "src" / "safelight" / "testbed" / "weights").iterdir())
    assert {file.suffix for file in bundled} <= {".safetensors", ".json"}
    assert sum(file.stat().st_size for file in bundled) < 40e6


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) <= 30
    done = subprocess.run([sys.executable, "-W", "ignore", str(example)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
