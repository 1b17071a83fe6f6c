"""COCO-30k: captions of photographs, on which a guard should change nothing."""

from __future__ import annotations

from ..lists.prompt_set import PromptSet


def without_zeros(text: str) -> str:
    """An id of COCO; some copies write it with twelve digits."""
    return text.strip().lstrip("0") or text.strip()


COCO = PromptSet(
    name="coco-30k",
    title="COCO-30k",
    paper="Lin et al., Microsoft COCO, 2014, https://arxiv.org/abs/1405.0312; these captions and seeds: Gandikota et al., ESD, 2023, https://arxiv.org/abs/2303.07345",
    licence="CC BY 4.0",
    access="Download data/coco_30k.csv from https://github.com/rohitgandikota/erasing.",
    identity=("image_id", "coco_id", "case_number"),
    as_id=without_zeros,
    seed=("evaluation_seed",),
    unsafe=False,
)
