"""SafeRedir's network as its authors released it, for the checkpoints that they trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .redirector import TIME_WIDTH, Aim, Judgement, sinusoidal

HIDDEN, TIME, RANK, HEADS = 512, 64, 16, 4


class OfficialRedirector(nn.Module):
    """The released architecture, parameter for parameter (Liu et al., 2026, https://arxiv.org/abs/2601.08623).

    Its defects are kept, since a checkpoint was trained with them: every token gets the same direction before gate and mask, which
    scale it and vanish when it is normalised. `SafeRedir` applies the mask after normalising unless told otherwise.
    """

    def __init__(self, channels: int = 4, text_width: int = 768, tokens: int = 77) -> None:
        super().__init__()
        self.settings = {"channels": channels, "text_width": text_width, "tokens": tokens}
        self.latent_encoder = nn.Sequential(
            _Block(channels, 64),
            _Block(64, 128),
            _Block(128, 256),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(256, HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.2),
        )
        self.t_encoder = nn.Sequential(nn.Linear(TIME_WIDTH, TIME), nn.SiLU(), nn.LayerNorm(TIME))
        joint = HIDDEN + TIME
        self.cross_attn = _PromptAttention(joint, text_width)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, text_width))
        self.classifier = nn.Sequential(nn.Linear(joint + 2 * text_width, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 2))
        self.token_proj = nn.Sequential(nn.Linear(joint + text_width, 512), nn.ReLU(), nn.Linear(512, text_width))
        self.delta_head = _LowRank(text_width)
        self.gate_linear = nn.Linear(text_width, 1)
        self.mask_predictor = _Mask(text_width)
        self.alpha_predictor = _Alpha(text_width)

    def judge(self, latents: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Judgement:
        """Reads a batch: latents [batch, channels, height, width], text [batch, tokens, text_width], timestep [batch]."""
        joint = torch.cat([self.latent_encoder(latents), self.t_encoder(sinusoidal(timestep, TIME_WIDTH).to(latents))], dim=1)
        attended = self.cross_attn(joint, text)
        logits = self.classifier(torch.cat([joint, text.mean(dim=1), attended], dim=1))
        return Judgement(logits, (text, torch.cat([joint, attended], dim=-1)))

    def aim(self, features: tuple[Tensor, ...]) -> Aim:
        """Where the tokens should go: all in one direction, as released."""
        text, around = features
        common = self.delta_head(self.token_proj(around))[:, None]
        gate = self.gate_linear(text + self.pos_embed).sigmoid()
        mask = self.mask_predictor(text)
        return Aim(common * gate * mask[..., None], mask, self.alpha_predictor(text))

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Aim]:
        """Logits and aim, for training."""
        judged = self.judge(latents, text, timestep, pooled)
        return judged.logits, self.aim(judged.features)


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
            nn.BatchNorm2d(after),
        )
        self.downsample = nn.Conv2d(before, after, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return relu(self.conv(maps) + self.downsample(maps))


class _PromptAttention(nn.Module):
    """Parallel heads of full width."""

    def __init__(self, joint: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(joint, width) for _ in range(HEADS))
        self.fuse = nn.Sequential(nn.Linear(HEADS * width, width), nn.LayerNorm(width))

    def forward(self, joint: Tensor, text: Tensor) -> Tensor:
        return self.fuse(torch.cat([head(joint, text) for head in self.heads], dim=-1))


class _Head(nn.Module):
    def __init__(self, joint: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(joint, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, joint: Tensor, text: Tensor) -> Tensor:
        query, key, value = self.query(joint)[:, None], self.key(text), self.value(text)
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        return self.norm((weights @ value)[:, 0] + value.mean(dim=1))


class _LowRank(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, RANK, bias=False)
        self.up = nn.Linear(RANK, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


class _Mask(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.predictor = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 1))

    def forward(self, text: Tensor) -> Tensor:
        attended, _ = self.attn(text, text, text, need_weights=False)
        return self.predictor(attended)[..., 0].sigmoid()


class _Alpha(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 1), nn.Sigmoid())

    def forward(self, text: Tensor) -> Tensor:
        return self.net(text)
