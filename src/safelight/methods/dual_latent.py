"""Dual latent reconstruction: mix the latents of the prompt with those of safe guidance, then follow the latter alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from ..branch import Branch
from ..detector import Detector, Verdict
from ..flow import Call, Step, put
from ..method import Method
from ..run import Run
from ..safe_guidance import Arithmetic, InContext, SafeGuidance

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(kw_only=True, eq=False)
class DualLatent(Method):
    """Blends the latents of an unsafe prompt with those of safe guidance, then follows the latter alone (Vice et al., 2024, https://arxiv.org/abs/2411.13982).

    Context-preserving dual latent reconstruction. Until step τ_gc of T, the latents of an unsafe prompt x are the blend w_x·ẑ_x + w_ξ·ẑ_ξ with those of safe guidance ξ, which keeps
    the global context of x; from then on safe guidance goes on alone. Here τ_gc/T is `until`, w_ξ is `safe_weight`, w_x `weight`.
    """

    detector: Detector[str] = field(metadata={"artefact": "bank"})
    """Tells which prompts are unsafe; all others are sampled as if the guard were absent."""
    guidance: SafeGuidance | None = field(default=None, metadata={"artefact": "bank"})
    """Where a flagged sample is led; by default embedding arithmetic if the detector's bank holds token shifts, else words of safe context."""
    safe_weight: Share = 0.75
    """w_ξ: larger is safer and less faithful."""
    weight: Share | None = None
    """w_x: how much of the prompt's own latents goes into the blend; by default 1 - `safe_weight`."""
    until: Share = 0.2
    """τ_gc as a share of all steps: larger keeps more global context and is less safe."""
    coupling: Literal["coupled", "free"] = "coupled"
    """Whether the blend feeds both branches (one extra denoiser row), or the prompt's branch keeps its own trajectory (two)."""
    renorm: bool = True
    """With free coupling, restore the blend's standard deviation, which a sum of two latents lowers."""

    def __post_init__(self) -> None:
        total = self.safe_weight + (1 - self.safe_weight if self.weight is None else self.weight)
        if total <= 0:
            raise ValueError(f"safe_weight={self.safe_weight} and weight={self.weight} leave nothing to blend; raise one of them")
        if abs(total - 1) > 1e-6:
            warnings.warn(f"safe_weight + weight is {total:g}; both are divided by it", stacklevel=2)
        self._safe = self.safe_weight / total
        if self.guidance is None:
            bank = getattr(self.detector, "bank", None)
            self.guidance = InContext() if bank is None or bank.tokens is None else Arithmetic(bank)

    def begin(self) -> None:
        """Judges the prompts and encodes safe guidance for the flagged ones."""
        verdicts = self.run.judge(self.detector)
        self.flagged = [image for image, verdict in enumerate(verdicts) if verdict.flagged]
        for image, verdict in enumerate(verdicts):
            self._note(image, verdict)
        self.branch: Branch | None = None
        if not self.flagged:
            return
        assert self.guidance is not None
        self.safe = self.guidance(self.run, self.flagged, [verdicts[image] for image in self.flagged])
        self.run.record("flagged", images=self.flagged)
        if self.coupling == "free":
            self.branch = Branch(self.run, None, self.flagged)

    def meet(self, further: Run) -> None:
        """Judges prompts that come late."""
        further.refuse_unsafe(self.detector, self.name)

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Follows safe guidance in the flagged rows; while blending, also the prompt."""
        if not self.flagged:
            return denoise(call)
        noise = denoise(self._led(call))
        if self.blending and self.branch is not None:
            self.branch.denoise(call, noise, denoise)
        elif self.blending and call.conditional and self._safe < 1:
            own = denoise(call.take(self.flagged, conditional=True))
            rows = torch.tensor([call.cond.start + i for i in self.flagged], device=noise.device)
            # A scheduler that is affine in the prediction turns mixed predictions into mixed latents.
            return put(noise, rows, torch.lerp(own, noise[rows], self._safe))
        return noise

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """Blends the two trajectories where each has its own."""
        if not self.flagged or not self.blending or self.branch is None:
            return advance(step)
        own = self.branch.advance(step)[self.flagged]
        latents = advance(step)
        safe = latents[self.flagged]
        mixed = torch.lerp(own, safe, self._safe)
        if self.renorm:
            axes = tuple(range(1, mixed.ndim))
            wanted = torch.lerp(own.std(axes, keepdim=True), safe.std(axes, keepdim=True), self._safe)
            mean = mixed.mean(axes, keepdim=True)
            mixed = mean + (mixed - mean) * (wanted / mixed.std(axes, keepdim=True).clamp_min(1e-8))
        return put(latents, self.flagged, mixed)

    @property
    def blending(self) -> bool:
        """Whether this step is before τ_gc."""
        return self.run.index < round(self.until * self.run.total)

    def _led(self, call: Call) -> Call:
        """The call with safe guidance in the flagged conditional rows."""
        if not call.conditional:
            return call
        for image in self.flagged:
            self.note(image, action="reconstructed", steps=(0, self.run.total))
        own = call.text[call.cond]
        text = put(own, self.flagged, self.safe.text.to(own))
        pooled = None
        if call.pooled is not None and self.safe.pooled is not None:
            pooled = put(call.pooled[call.cond], self.flagged, self.safe.pooled.to(call.pooled))
        return call.with_text(text, pooled)

    def _note(self, image: int, verdict: Verdict) -> None:
        self.note_verdict(image, verdict)
        if verdict.flagged:
            self.note(image, action="reconstructed", strength=self._safe)
