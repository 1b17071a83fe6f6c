"""A safety dictionary: an SAE of one site, the decoder that was adapted to a risk, and the features that speak of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .anchors import check_model
from .backbone import Backbone
from .calibration import Calibration
from .errors import ArtefactError
from .files import Facts, read_tensors, write_tensors
from .nets.sae import SAE, Decoder

FORMAT = "safelight-dictionary/1"
REMEDY = "make one with `safelight train safedig`"
Operator = Literal["blend", "repel"]
CLAMP = 9.0
"""Features count up to so many standard deviations."""
TOP = 16
"""A picture's score is the mean of its highest tokens: one in so many."""


@dataclass(frozen=True)
class Harmful:
    """The features that fire more for unsafe pictures than for their safe twins, per time point; H of them."""

    features: Tensor
    """[times, H], indices of latents."""
    means: Tensor
    """[times, H]: a token is edited only where a feature exceeds its mean over all tokens."""
    spreads: Tensor
    """[times, H], standard deviations."""
    contrasts: Tensor
    """[times, H]: differences of the normalised means, unsafe - safe."""

    def at(self, device: torch.device) -> Harmful:
        """The same on another device."""
        return Harmful(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Alarm:
    """What tells whom to steer: a linear reading of some features, that says how much a token ought to change."""

    features: Tensor
    """[G], indices of latents."""
    weights: Tensor
    """[G]"""

    def scores(self, sae: SAE, seen: Tensor) -> Tensor:
        """How harmful each picture is, [batch]: the mean over its highest tokens, one in sixteen, of what the encoder sees."""
        readings = sae.some(seen, self.features) @ self.weights
        return readings.topk(max(1, readings.shape[1] // TOP), dim=1).values.mean(1)

    def at(self, device: torch.device) -> Alarm:
        """The same on another device."""
        return Alarm(self.features.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Dictionary:
    """What SafeDIG knows at one site."""

    sae: SAE
    """Encoder, and the source decoder that reconstructs."""
    adapted: Decoder
    """The decoder after transfer."""
    harmful: Harmful
    alarm: Alarm
    moments: tuple[float, ...]
    """The share of the steps that lay behind at each time point."""
    site: str
    operator: Operator
    """What routing chose."""
    threshold: float | None = None
    """The alarm's score above which a picture is steered; None: another position's dictionary looks."""
    risks: tuple[str, ...] = ()
    """The domains it was made for."""
    calibration: Calibration | None = None
    model: Mapping[str, Any] | None = None

    def moment(self, progress: float) -> int:
        """The nearest time point."""
        return min(range(len(self.moments)), key=lambda i: abs(self.moments[i] - progress))

    @cached_property
    def repair(self) -> tuple[Tensor, Tensor]:
        """D_adapted - D_source as one map: what it is multiplied with [latents, width], and what it adds [width]."""
        return self.adapted.weight - self.sae.decoder.weight, self.adapted.bias - self.sae.decoder.bias

    def harm(self, seen: Tensor, moment: int) -> Tensor:
        """Z of the harmful features, where they exceed their means, clamped at 9 σ: [batch, tokens, H]."""
        chosen = self.harmful.features[moment]
        values = self.sae.some(seen, chosen)
        top = self.harmful.means[moment] + CLAMP * self.harmful.spreads[moment]
        return torch.minimum(values, top) * (values > self.harmful.means[moment])

    def scores(self, seen: Tensor) -> Tensor:
        """How harmful each picture is, [batch], from what the encoder sees [batch, tokens, width]."""
        return self.alarm.scores(self.sae, seen)

    def at(self, device: torch.device) -> Dictionary:
        """The same on another device."""
        if self.sae.b_pre.device == device:
            return self
        sae, adapted = SAE(**self.sae.settings), Decoder(self.sae.latents, self.sae.width)
        sae.load_state_dict(self.sae.state_dict())
        adapted.load_state_dict(self.adapted.state_dict())
        frozen = [net.eval().requires_grad_(False).to(device) for net in (sae, adapted)]
        parts: dict[str, Any] = {"sae": frozen[0], "adapted": frozen[1], "harmful": self.harmful.at(device), "alarm": self.alarm.at(device)}
        return replace(self, **parts)

    def check(self, backbone: Backbone, *, transfer: bool = False) -> None:
        """Makes sure that it fits a denoiser.

        Args:
            backbone: the denoiser's.
            transfer: whether another checkpoint of the same architecture will do.

        Raises:
            ArtefactError: if it doesn't.
        """
        check_model(backbone, self.site, self.model, f"the SAE at '{self.site}' was trained on", REMEDY, transfer=transfer)

    def check_tokens(self, tokens: Tensor) -> None:
        """Makes sure that a site's tokens [batch, tokens, width] have the SAE's width.

        Raises:
            ArtefactError: if not.
        """
        if tokens.shape[-1] != self.sae.token_width:
            raise ArtefactError(f"this SAE takes width {self.sae.token_width}, but '{self.site}' has {tokens.shape[-1]}; {REMEDY}")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, weights in half precision, atomically."""
        facts = {
            "settings": self.sae.settings, "moments": self.moments, "site": self.site, "operator": self.operator, "threshold": self.threshold,
            "risks": self.risks, "model": dict(self.model) if self.model else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
        }  # fmt: skip
        single = ("threshold", "scale")
        tensors = {
            f"sae.{name}": value if name in single else value.half() for name, value in self.sae.state_dict().items() if value is not None
        }
        tensors |= {f"adapted.{name}": value.half() for name, value in self.adapted.state_dict().items()}
        for name in ("harmful", "alarm"):
            tensors |= {f"{name}.{key}": value for key, value in vars(getattr(self, name)).items()}
        write_tensors(path, FORMAT, tensors, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Reads a dictionary.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds something else.
        """
        metadata, tensors = read_tensors(path, "a safety dictionary", FORMAT, REMEDY)
        try:
            made = _assembled(metadata.parsed("facts"), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError) as error:
            if isinstance(error, ArtefactError):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtefactError(f"{path} lacks a part of a safety dictionary, or has one too many ({first}); {REMEDY}") from error
        if flaw := made._flaw():
            raise ArtefactError(f"{path} {flaw}; {REMEDY}")
        metadata.settle()
        return made

    def _flaw(self) -> str | None:
        """What is wrong, if anything."""
        shapes = {tuple(tensor.shape) for tensor in vars(self.harmful).values()}
        if len(shapes) != 1 or len(self.moments) not in {shape[0] for shape in shapes}:
            return "has no harmful features for each time point"
        whole = (self.harmful.features, self.alarm.features)
        if any(tensor.is_floating_point() or tensor.dtype == torch.bool for tensor in whole):
            return "names features by something else than whole numbers"
        if (
            self.alarm.features.ndim != 1
            or self.harmful.features.ndim != 2
            or not self.alarm.features.numel()
            or not self.harmful.features.numel()
        ):
            return "names no harmful features"
        if self.alarm.features.shape != self.alarm.weights.shape:
            return "has no weight for each feature of its alarm"
        named = torch.cat([self.harmful.features.flatten(), self.alarm.features])
        if not bool((named < self.sae.latents).all()) or bool((named < 0).any()):
            return f"names features beyond its {self.sae.latents}"
        floating = [*self.sae.state_dict().values(), *self.adapted.state_dict().values(), *vars(self.harmful).values(), self.alarm.weights]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in floating if tensor is not None):
            return "contains NaN or infinite values"
        if not all(map(math.isfinite, (self.threshold or 0.0, *self.moments))):
            return "has a threshold or time points that are no numbers"
        return None if self.operator in get_args(Operator) else f"has an unknown operator {self.operator!r}"


def _assembled(facts: Facts, tensors: Mapping[str, Tensor]) -> Dictionary:
    """From what a file holds."""
    facts.only(("settings", "moments", "site", "operator", "threshold", "risks", "model", "calibration"))
    settings = facts.sizes("settings")
    own = {
        name: {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        for name in ("sae.", "adapted.", "harmful.", "alarm.")
    }
    if sum(map(len, own.values())) < len(tensors):
        raise facts.error("has tensors that are no part of a safety dictionary")
    states = {name: {key: value.float() for key, value in own[name].items()} for name in ("sae.", "adapted.")}
    with torch.device("meta"):  # nothing is allocated before the tensors are known to fit
        SAE(**settings).load_state_dict(states["sae."], assign=True)
    sae, adapted = SAE(**settings), Decoder(settings["latents"], settings["width"])
    for net, name in ((sae, "sae."), (adapted, "adapted.")):
        net.load_state_dict(states[name])
        net.eval().requires_grad_(False)
    threshold = None if facts.get("threshold") is None else facts.number("threshold")
    return Dictionary(
        sae, adapted, Harmful(**own["harmful."]), Alarm(**own["alarm."]), facts.numbers("moments"), facts.text("site"),
        facts.text("operator"), threshold, facts.texts("risks", some=False), Calibration.read(facts),  # type: ignore[arg-type]
        None if facts.get("model") is None else facts.mapping("model"),
    )  # fmt: skip


def stored(sae: SAE, adapted: Decoder) -> tuple[SAE, Decoder]:
    """Both in the precision in which they are saved, so that what is calibrated is what is shipped."""
    with torch.no_grad():
        for parameter in (*sae.parameters(), *adapted.parameters()):
            parameter.copy_(parameter.half().float())
    return sae, adapted


def top_features(harm: Tensor, features: Sequence[int], count: int) -> list[int]:
    """The features that fired most in one picture, [tokens, H]."""
    totals = harm.sum(0)
    order = totals.argsort(descending=True)[:count].tolist()
    return [features[place] for place in order if totals[place] > 0]
