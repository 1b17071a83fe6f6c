"""Recording is a method that changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..anchors import Anchors
from ..backbone import Backbone
from ..method import Method
from ..site import Site


@dataclass(kw_only=True, eq=False)
class Capture(Method):
    """Keeps activations at sites and steps; the images stay bit-identical.

    Recording activations of a frozen model follows UVR (Yang et al., 2026, https://arxiv.org/abs/2606.06875).
    """

    at: Sequence[str]
    """The sites, e.g. `single.10.attention:image`."""
    steps: Collection[int] | None = None
    """Which steps; None: all."""
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(site, step) -> activations [batch, tokens, width] of the latest generation, in half precision on the CPU."""

    def begin(self) -> None:
        """Drops what was kept of the generation before."""
        self.kept.clear()

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """Those to be recorded."""
        return self.at

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Keeps a copy."""
        if self.steps is None or self.run.index in self.steps:
            self.kept[str(site), self.run.index] = tokens.detach().to("cpu", torch.float16, copy=True)
        return tokens

    def of(self, site: str, image: int) -> Tensor:
        """What was kept of one image, in the order of the steps: [steps, tokens, width]."""
        return torch.stack(
            [tokens[image] for (where, _), tokens in sorted(self.kept.items(), key=lambda item: item[0][1]) if where == site]
        )


@dataclass(kw_only=True, eq=False)
class Watch(Method):
    """Keeps score maps of anchors at their probes; the images stay bit-identical.

    Scores are those of UVR (Yang et al., 2026, https://arxiv.org/abs/2606.06875).
    """

    anchors: Mapping[str, Anchors]
    """Site -> the anchors of that probe."""
    steps: Collection[int]
    """Which steps."""
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(site, step) -> score maps [batch, concepts, height, width] of the latest generation."""

    def begin(self) -> None:
        """Drops what was kept of the generation before."""
        self.kept.clear()

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """All probes."""
        return tuple(self.anchors)

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Keeps the scores."""
        if self.run.index in self.steps:
            maps = self.anchors[str(site)].at(tokens.device).scores(tokens, self.run.progress, self.run.layout.grid)
            self.kept[str(site), self.run.index] = maps.cpu()
        return tokens

    def of(self, site: str) -> Tensor:
        """The maps of one probe: [batch, steps, concepts, height, width]."""
        return torch.stack([maps for (where, _), maps in sorted(self.kept.items(), key=lambda item: item[0][1]) if where == site], dim=1)
