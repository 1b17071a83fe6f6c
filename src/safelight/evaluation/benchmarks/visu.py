"""ViSU: pairs of a caption of COCO and a rewriting that is not safe."""

from __future__ import annotations

from ..lists.prompt_set import PromptSet

VISU = PromptSet(
    name="visu",
    title="ViSU-Text",
    paper="Poppi et al., Safe-CLIP, 2024, https://arxiv.org/abs/2311.16254",
    licence="CC, gated, for institutions and non-commercial research only",
    access=(
        "Ask for access, from an institution's e-mail address, at https://huggingface.co/datasets/aimagelab/ViSU-Text, then download its test "
        "split, or give hub:aimagelab/ViSU-Text/FILE."
    ),
    prompt=("nsfw",),
    identity=("incremental_id", "key"),
    category=("tag",),
    context=("safe",),
    first_seed=42,
    seed_step=0,
)
