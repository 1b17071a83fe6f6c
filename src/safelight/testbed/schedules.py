"""The noise schedule of the testbed's U-Net."""

from __future__ import annotations

from diffusers import DDIMScheduler


def noise_schedule() -> DDIMScheduler:
    """DDPM's linear schedule: almost no signal is left at the last step, unlike with Stable Diffusion's own."""
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1,  # unused with this spacing, but diffusers warns about anything else
    )  # fmt: skip
