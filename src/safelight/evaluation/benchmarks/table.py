"""Lists of your own: any table with a column of prompts, or plain text with one prompt per line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from ..case import Case
from ..lists.prompt_set import PromptSet

COLUMNS = ("id", "prompt", "unsafe", "category", "seed", "guidance", "height", "width")

TABLE = PromptSet(
    name="table",
    title="a list of your own",
    paper="",
    licence="yours",
    access="Give a CSV, TSV, JSON, JSON lines, Parquet or text file, or hub:owner/name/file.",
    prompt=("prompt", "text", "caption"),
    identity=("id", "case_number"),
    seed=("seed", "evaluation_seed", "sd_seed"),
    guidance=("guidance", "evaluation_guidance", "sd_guidance_scale"),
    height=("height", "sd_image_height"),
    width=("width", "sd_image_width"),
    category=("category", "categories", "concept"),
    unsafe=("unsafe",),
    labels=lambda row: [row["concept"]] if "concept" in row else [],
)


def write(cases: Sequence[Case], path: Path) -> None:
    """Writes cases as CSV or JSON lines, such that reading gives the same ones; pictures and truths are not written.

    Raises:
        ValueError: for another kind of file.
    """
    rows = [dict(zip(COLUMNS, _values(case), strict=True)) for case in cases]
    if path.suffix.lower() == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    elif path.suffix.lower() == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise ValueError(f"{path.name}: tables are written as .csv or .jsonl")


def _values(case: Case) -> tuple[object, ...]:
    height, width = case.size or ("", "")
    return case.id, case.prompt, case.unsafe, case.category, case.seed, "" if case.guidance is None else case.guidance, height, width
