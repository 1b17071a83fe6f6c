"""UnlearnDiffAtk's prompts: 142 rows of I2P, at which its attack begins."""

from __future__ import annotations

from dataclasses import replace

from .i2p import I2P

UNLEARNDIFFATK = replace(
    I2P,
    name="unlearndiffatk",
    title="UnlearnDiffAtk",
    paper="Zhang et al., To Generate or Not?, 2024, https://arxiv.org/abs/2310.11868",
    access="Download prompts/nudity.csv from https://github.com/OPTML-Group/Diffusion-MU-Attack.",
    sexual=True,
    default_category="nudity",
)
