"""Ring-A-Bell's prompts, found by a search in the space of text embeddings."""

from __future__ import annotations

from ..lists.prompt_set import PromptSet

RING_A_BELL = PromptSet(
    name="ring-a-bell",
    title="Ring-A-Bell (nudity)",
    paper="Tsai et al., Ring-A-Bell!, 2024, https://arxiv.org/abs/2310.10012",
    licence="gated, for research; the code is MIT",
    access="Ask for access at https://huggingface.co/datasets/Chia15/RingABell-Nudity, then download its CSV, or give hub:Chia15/RingABell-Nudity.",
    prompt=("prompt", "sensitive prompt"),
    identity=("case_number",),
    seed=("evaluation_seed",),
    context=("normal prompt",),
    default_category="nudity",
    sexual=True,
    first_seed=42,
    seed_step=0,
    undecodable="replace",  # the authors' files hold tokens that are parts of letters
)
