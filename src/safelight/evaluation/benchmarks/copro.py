"""CoPro: unsafe prompts around concepts, each with a safe counterpart; and its second version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...tables import Table, json_value, read_table, records_of, table_of, text_of
from ..lists.prompt_set import PromptSet

TESTS = ("ID_test_data", "OOD_test_data")
"""Concepts that training has seen, and others. The training part is not evaluated on."""


def read(path: Path, *, encoding: str = "utf-8", errors: str = "strict") -> Table:
    """Reads CoPro_v1.0.json, which holds several tables, or any other table."""
    if path.suffix.lower() != ".json":
        return read_table(path, encoding=encoding, errors=errors)
    name = str(path)
    return table_of(name, _records(name, json_value(name, text_of(path, encoding, errors))))


def _records(name: str, value: Any) -> Iterator[Any]:
    if not isinstance(value, dict) or not all(isinstance(value.get(part), list) for part in TESTS):
        yield from records_of(name, value)
        return
    for part in TESTS:
        for record in value[part]:
            yield record | {"part": part} if isinstance(record, dict) else record


COPRO = PromptSet(
    name="copro",
    title="CoPro",
    paper="Liu et al., Latent Guard, 2024, https://arxiv.org/abs/2404.08031",
    licence="BSD 3-Clause (the repository's)",
    access="Download dataset/CoPro_v1.0.json from https://github.com/rt219/LatentGuard.",
    prompt=("unsafe_prompt", "prompt"),
    category=("category", "concept"),
    context=("safe_prompt",),
    labels=lambda row: [row[column] for column in ("concept", "category") if column in row],
    first_seed=0,
    read=read,
)

COPRO_V2 = replace(
    COPRO,
    name="copro-v2",
    title="CoProV2",
    paper="Liu et al., SafetyDPO, 2024, https://arxiv.org/abs/2412.10493",
    licence="MIT",
    access="Download data/CoProv2_test.csv from https://github.com/Visualignment/SafetyDPO.",
    prompt=("prompt",),
    category=("category",),
)
