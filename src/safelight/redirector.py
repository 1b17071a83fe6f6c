"""A trained SafeRedir network with what it is for: one concept, one kind of denoiser, a calibrated threshold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .calibration import Calibration
from .errors import ArtefactError
from .files import read_tensors, write_tensors
from .flow import Call
from .nets.official_redirector import OfficialRedirector
from .nets.redirector import Aim, Judgement
from .nets.redirector import Redirector as Network

Net = TypeVar("Net", bound=nn.Module)
FORMAT = "safelight-redirector/1"
ARCHITECTURES: Mapping[str, type[nn.Module]] = {"redirector": Network, "official": OfficialRedirector}
REMEDY = "train one for this model with `safelight train saferedir`"
OFFICIAL = {"denoiser": "UNet2DConditionModel", "latent_scale": "variance preserving"}


@dataclass(frozen=True)
class Redirector:
    """Tells whether a generation is on its way to a concept, and which prompt would lead it elsewhere."""

    net: nn.Module = field(repr=False)
    concept: str
    threshold: float = 0.5
    """The probability above which a generation is redirected."""
    calibration: Calibration | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained for: the denoiser's class, and the scale of its latents."""

    @property
    def architecture(self) -> str:
        """The name of the network's architecture."""
        return next(name for name, kind in ARCHITECTURES.items() if isinstance(self.net, kind))

    def check(self, backbone: Backbone) -> None:
        """Makes sure that it fits a denoiser.

        Raises:
            ArtefactError: if it was trained for another kind.
            UnsupportedPipeline: if the scale of the scheduler's latents is unknown.
        """
        own = {"denoiser": type(backbone.module).__name__, "latent_scale": backbone.latent_scale}
        for fact, wanted in self.model.items():
            if fact in own and own[fact] != wanted:
                raise ArtefactError(
                    f"the redirector of {self.concept!r} was trained for a model whose {fact.replace('_', ' ')} is {wanted}, and this one's is "
                    f"{own[fact]}; {REMEDY}"
                )

    def check_call(self, call: Call, maps: Tensor) -> None:
        """Makes sure that it can read a call whose latents are `maps` [batch, channels, height, width].

        Raises:
            ArtefactError: if widths differ.
        """
        settings: Mapping[str, Any] = self.net.settings  # type: ignore[assignment]
        pooled = 0 if call.pooled is None else call.pooled.shape[-1]
        found = {"channels": maps.shape[1], "text_width": call.text.shape[-1], "pooled_width": pooled, "tokens": call.text.shape[1]}
        for name, value in found.items():
            wanted = settings.get(name, value)
            if wanted != value and not (name == "pooled_width" and wanted == 0):
                raise ArtefactError(
                    f"the redirector of {self.concept!r} reads {name.replace('_', ' ')} {wanted}, this model has {value}; {REMEDY}"
                )

    def judge(self, maps: Tensor, text: Tensor, timestep: Tensor, pooled: Tensor | None) -> Judgement:
        """Whether a batch is unsafe, in the network's own precision."""
        own = next(self.net.parameters())
        wants_pooled = self.net.settings.get("pooled_width")  # type: ignore[union-attr,operator]
        pooled = pooled.to(own) if pooled is not None and wants_pooled else None
        return self.net.judge(maps.to(own), text.to(own), timestep.to(own.device), pooled)  # type: ignore[no-any-return,operator]

    def aim(self, judged: Judgement, rows: list[int]) -> Aim:
        """Where the prompts in some rows of a judgement should go."""
        return self.net.aim(tuple(feature[rows] for feature in judged.features))  # type: ignore[no-any-return,operator]

    def at(self, device: torch.device) -> Redirector:
        """The same on another device."""
        if next(self.net.parameters()).device == device:
            return self
        copied = ARCHITECTURES[self.architecture](**self.net.settings)  # type: ignore[arg-type]
        copied.load_state_dict(self.net.state_dict())
        return replace(self, net=copied.eval().requires_grad_(False).to(device))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file in half precision, atomically."""
        facts = {
            "concept": self.concept, "threshold": self.threshold, "model": dict(self.model), "architecture": self.architecture,
            "settings": self.net.settings, "calibration": asdict(self.calibration) if self.calibration else None,
        }  # fmt: skip
        write_tensors(path, FORMAT, {name: _half(tensor) for name, tensor in self.net.state_dict().items()}, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Redirector:
        """Reads a redirector.

        Raises:
            ArtefactError: if the file is missing, damaged, or holds something else.
        """
        metadata, tensors = read_tensors(path, "a redirector", FORMAT, REMEDY)
        facts = metadata.parsed("facts")
        facts.only(("concept", "threshold", "model", "architecture", "settings", "calibration"))
        if facts.text("architecture") not in ARCHITECTURES:
            raise facts.error(f"has an unknown architecture {facts.get('architecture')!r}; there are {', '.join(ARCHITECTURES)}")
        threshold = facts.number("threshold")
        if not 0 <= threshold < 1:
            raise ArtefactError(f"{path} has the threshold {threshold}, which no probability or every one exceeds; {REMEDY}")
        try:
            with torch.device("meta"):  # nothing is allocated before the tensors are known to fit
                ARCHITECTURES[facts.get("architecture")](**facts.sizes("settings")).load_state_dict(tensors, assign=True)
            net = ARCHITECTURES[facts.get("architecture")](**facts.sizes("settings"))
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError, KeyError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{path} has settings that don't fit its architecture ({str(error).strip()[:200]}); {REMEDY}") from error
        made = cls(net, facts.text("concept"), threshold, Calibration.read(facts), facts.mapping("model"))
        made._fill(tensors, path)
        metadata.settle()
        return made

    @classmethod
    def from_official(cls, path: str | Path, concept: str, threshold: float = 0.5) -> Redirector:
        """Reads a checkpoint of the authors' code (a `best_model.pt` with a plain state dict). Nothing in it is executed.

        Raises:
            ArtefactError: if it can't be read, holds anything but tensors, or doesn't fit the released architecture.
        """
        if Path(path).exists() and not Path(path).is_file():
            raise ArtefactError(f"{path} is no file, but a folder, a pipe or a device")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ArtefactError(f"there is no checkpoint {path}") from error
        except Exception as error:  # torch's safe unpickler raises whatever a damaged or hostile file makes it raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArtefactError(f"{path} was not loaded, as it holds more than tensors or is damaged: {first}") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ArtefactError(f"{path} is no plain state dict; save `model.state_dict()`, as the authors' code does")
        needed = ("latent_encoder.0.conv.0.weight", "pos_embed")
        if missing := [name for name in needed if name not in state]:
            raise ArtefactError(f"{path} is no checkpoint of SafeRedir: it lacks {missing[0]!r}")
        if state[needed[0]].ndim != 4 or state[needed[1]].ndim != 3:
            raise ArtefactError(
                f"{path} is no checkpoint of SafeRedir: the shapes of {needed[0]!r} and {needed[1]!r} are those of something else"
            )
        channels, (_, tokens, width) = state[needed[0]].shape[1], state[needed[1]].shape
        made = cls(OfficialRedirector(channels, width, tokens), concept, threshold, None, OFFICIAL)
        made._fill(state, path)
        return made

    def _fill(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        try:
            self.net.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()})
        except RuntimeError as error:
            misfit = str(error).strip().splitlines()[1:2] or [str(error)]
            raise ArtefactError(f"{path} doesn't fit the architecture {self.architecture!r}: {misfit[0].strip()}; {REMEDY}") from error
        if not all(math.isfinite(float(tensor.float().abs().max())) for tensor in state.values() if tensor.numel()):
            raise ArtefactError(f"{path} contains NaN or infinite weights; {REMEDY}")
        self.net.eval().requires_grad_(False)


def _half(tensor: Tensor) -> Tensor:
    """Half precision where it is a weight: what `save` stores and training rounds to."""
    return tensor.detach().half() if tensor.is_floating_point() else tensor.detach().clone()


def rounded(net: Net) -> Net:
    """The network with weights as `save` stores them, so that what is calibrated is what is shipped."""
    net.load_state_dict(
        {name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    )
    return net.eval().requires_grad_(False)
