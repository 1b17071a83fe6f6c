"""The redirector of the published code, to load its checkpoints: `state_dict` names, shapes and outputs are those of the release.

Its defects are part of it (one delta for all tokens; 77 tokens of width 768): `nets/redirector.py` has none of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .redirector import Redirection

TIME, TIME_WIDTH, LATENT = 320, 64, 512


class _Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class _LatentEncoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_Residual(channels, 64), _Residual(64, 128), _Residual(128, 256), nn.AdaptiveAvgPool2d(1))
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(256, LATENT), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, latents: Tensor) -> Tensor:
        return self.project(self.encoder(latents))


class _TimeEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME, TIME_WIDTH), nn.SiLU(), nn.LayerNorm(TIME_WIDTH))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(sinusoid(timestep, TIME).to(self.mlp[0].weight.dtype))


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Sine and cosine of a timestep at `width / 2` frequencies, [batch, width]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=timestep.device) / (width // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class _Head(nn.Module):
    def __init__(self, joint: int, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(joint, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, joint: Tensor, prompt: Tensor) -> Tensor:
        query, key, value = self.q_proj(joint)[:, None], self.k_proj(prompt), self.v_proj(prompt)
        weights = (query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])).softmax(-1)
        return self.norm((weights @ value)[:, 0] + value.mean(1))


class _PromptAttention(nn.Module):
    def __init__(self, joint: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(joint, width) for _ in range(heads))
        self.fuse = nn.Sequential(nn.Linear(heads * width, width), nn.LayerNorm(width))

    def forward(self, joint: Tensor, prompt: Tensor) -> Tensor:
        return self.fuse(torch.cat([head(joint, prompt) for head in self.heads], dim=-1))


class _DeltaHead(nn.Module):
    def __init__(self, width: int, rank: int = 16) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


class _MaskPredictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.predictor = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 1))

    def forward(self, prompt: Tensor) -> Tensor:
        seen, _ = self.attn(prompt, prompt, prompt, need_weights=False)
        return self.predictor(seen)[..., 0].sigmoid()


class _AlphaPredictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, prompt: Tensor) -> Tensor:
        return self.net(prompt)[..., 0].sigmoid()


class OfficialRedirector(nn.Module):
    """SafeRedir (Liu et al., 2026, https://arxiv.org/abs/2601.08623) as released for SD 1.x: latents [batch, 4, 64, 64], prompts
    [batch, 77, 768], timesteps [batch].
    """

    def __init__(self, channels: int = 4, width: int = 768, tokens: int = 77) -> None:
        super().__init__()
        joint = LATENT + TIME_WIDTH
        self.latent_encoder, self.t_encoder = _LatentEncoder(channels), _TimeEncoder()
        self.cross_attn = _PromptAttention(joint, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.classifier = nn.Sequential(nn.Linear(joint + 2 * width, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 2))
        self.token_proj = nn.Sequential(nn.Linear(joint + 2 * width, 512), nn.ReLU(), nn.Linear(512, width))
        self.delta_head = _DeltaHead(width)
        self.gate_linear = nn.Linear(width, 1)
        self.mask_predictor, self.alpha_predictor = _MaskPredictor(width), _AlphaPredictor(width)

    def forward(self, latents: Tensor, prompt: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Redirection:
        """What the released network says: one delta for all tokens, as it was published."""
        joint = torch.cat([self.latent_encoder(latents), self.t_encoder(timestep)], dim=1)
        attended = self.cross_attn(joint, prompt)
        features = torch.cat([joint, prompt.mean(1), attended], dim=1)
        gate = self.gate_linear(prompt + self.pos_embed[:, : prompt.shape[1]]).sigmoid()
        delta = self.delta_head(self.token_proj(features))[:, None] * gate
        return Redirection(self.classifier(features), delta, self.mask_predictor(prompt), self.alpha_predictor(prompt))
