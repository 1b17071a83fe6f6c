"""Unsafe-1K: 1,039 prompts for nudity that modifiers disguise."""

from __future__ import annotations

from ..lists.prompt_set import PromptSet

UNSAFE_1K = PromptSet(
    name="unsafe-1k",
    title="Unsafe-1K",
    paper="Yang et al., UVR, 2026, https://arxiv.org/abs/2606.06875",
    licence="none stated",
    access="Its authors have not published it (https://github.com/deng12yx/UVR holds no data); ask them, and save it as a table with a column 'prompt'.",
    identity=("id", "case_number"),
    seed=("seed", "evaluation_seed"),
    category=("category", "categories"),
    default_category="nudity",
    sexual=True,
)
