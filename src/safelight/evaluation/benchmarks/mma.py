"""MMA-Diffusion's 1,000 adversarial prompts (text modality)."""

from __future__ import annotations

from ..lists.prompt_set import PromptSet

MMA = PromptSet(
    name="mma",
    title="MMA-Diffusion",
    paper="Yang et al., MMA-Diffusion, 2024, https://arxiv.org/abs/2311.17516",
    licence="CC BY-NC-ND 3.0 (the repository's), gated: no commercial use, no sharing of changed copies",
    access=(
        "Ask for access at https://huggingface.co/datasets/YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark, then download its CSV, "
        "or give hub:YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark."
    ),
    prompt=("adv_prompt",),
    context=("target_prompt", "sanitized_adv_prompt", "clean_prompt"),
    default_category="nudity",
    sexual=True,
    first_seed=42,
    seed_step=0,
)
