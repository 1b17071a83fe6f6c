"""SafeDIG: sparse features that speak of a risk are steered at a few positions of a diffusion transformer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from ..backbone import Backbone
from ..dictionary import Dictionary, Operator, top_features
from ..errors import ArtefactError
from ..flow import put
from ..method import Method
from ..run import Run
from ..site import Site

Share = Annotated[float, Interval(ge=0, le=1)]
Strength = Annotated[float, Interval(ge=0, le=10)]
NAMED = 5
"""So many features are named in a record."""


@dataclass(kw_only=True, eq=False)
class SafeDIG(Method):
    """Steers activations by a sparse dictionary whose encoder is frozen and whose decoder was adapted to the risk.

    Our variant of SafeDIG (Xue et al., 2026, https://arxiv.org/abs/2605.30049). With z = E(a), Blend is a′ = a + β (D_adapted(z) - D_source(z)), and
    Repel is a′ = a - γ (M ⊙ z) W_dec with M the harmful features. A picture whose harmful features stay below a calibrated threshold
    is left alone.
    """

    dictionaries: tuple[Dictionary, ...] = field(metadata={"artefact": "dictionaries"})
    """One per position; from `safelight train safedig`."""
    operator: Literal["routed", "blend", "repel"] = "routed"
    """What is done; by default what routing chose for each position."""
    mode: Literal["residual", "paper"] = "residual"
    """`residual` adds what changes, so that reconstruction errors stay out. `paper`: a′ = (1 - β) a + β D_adapted(E(a)), and
    a′ = a - γ (D_adapted(M ⊙ z) - a), where the paper has the source's decoder first."""
    beta: Strength = 1.0
    """The strength of Blend; published: 0.2 for FLUX, 1.5 for SD 3.5."""
    gamma: Strength = 1.0
    """The strength of Repel; published: 0.1, with a target domain 0.2."""
    after: Share = 0.0
    """The share of the steps before steering begins."""
    until: Share = 1.0
    """The share of the steps after which it ends."""
    gated: bool = True
    """Whether only pictures are steered whose harmful features fire; published: no."""
    watch: Share = 0.3
    """The share of the steps in which the gate looks; who was found is steered from then on."""
    threshold: float | None = None
    """The gate's threshold; by default that of the dictionary that looks."""
    transfer: bool = False
    """Whether dictionaries of another checkpoint of the same architecture will do."""

    @classmethod
    def near_published(cls, dictionaries: Iterable[Dictionary], *, beta: float = 0.2, gamma: float = 0.2) -> SafeDIG:
        """The nearest that this class comes to the method as published: no gate, and the paper's operators and strengths (β = 1.5 for SD 3.5).

        It differs in the decoders, which are as given (published: trained to reconstruct; `safelight train safedig` trains them to repair), and
        in Repel, which the paper applies twice, with the source's decoder (γ = 0.1) and the target's (0.2); here it is one, with the adapted decoder.
        """
        return cls(dictionaries=tuple(dictionaries), mode="paper", beta=beta, gamma=gamma, gated=False)

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """The positions.

        Raises:
            ArtefactError: if there are none, two are of one site, one was made for another model, or none can tell whom to steer.
        """
        if not self.dictionaries:
            raise ArtefactError("safedig has no dictionary; make one with `safelight train safedig`")
        if self.gated and all(dictionary.threshold is None for dictionary in self.dictionaries):
            raise ArtefactError("none of safedig's dictionaries has a threshold; calibrate one, or set gated=False to steer every picture")
        found = [dictionary.site for dictionary in self.dictionaries]
        if len(set(found)) < len(found):
            raise ArtefactError(f"safedig has two dictionaries of one site ({', '.join(found)}); give one for each position")
        for dictionary in self.dictionaries:
            dictionary.check(backbone, transfer=self.transfer)
        return found

    def meet(self, further: Run) -> None:
        """It looks at activations, whatever the prompt."""

    def owed(self) -> Iterable[int]:
        """Those whose features fired; without a gate, every image that it isn't kept from, if it is to steer at all."""
        if self.gated:
            return super().owed()
        wanted = any(self.beta if self._operator(dictionary) == "blend" else self.gamma for dictionary in self.dictionaries)
        return [image for image in range(self.run.images) if wanted and (self.confined_to is None or image in self.confined_to)]

    def begin(self) -> None:
        """Nothing is known yet."""
        self.known = {dictionary.site: dictionary for dictionary in self.dictionaries}
        self.flagged: dict[int, int] = {}
        """Image -> the step in which its harmful features fired."""
        self.best: dict[int, float] = {}

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Looks at the harmful features of each picture, and steers those in which they fire."""
        dictionary = self._dictionary(site, tokens)
        strength = self.beta if self._operator(dictionary) == "blend" else self.gamma
        index, total = self.run.index, self.run.total
        steering = bool(strength) and round(self.after * total) <= index < round(self.until * total)
        images = self._images()
        if self.gated and strength and dictionary.threshold is not None and index < max(1, round(self.watch * total)):
            self._check_noise_level(site)
            self._look(dictionary, dictionary.threshold if self.threshold is None else self.threshold, tokens, images)
        rows = [row for row, image in enumerate(images) if image is not None and (image in self.flagged or not self.gated)]
        if not steering or not rows:
            return tokens
        everyone = len(rows) == len(tokens)
        own = tokens if everyone else tokens[rows]
        changed = self._steered(dictionary, own)
        for row in rows:
            image = images[row]
            assert image is not None
            if not self.gated:
                self._note(image, index, dictionary)
            self.run.note_acted(self.position, image)
        return changed if everyone else put(tokens, rows, changed)

    def _check_noise_level(self, site: Site) -> None:
        """Makes sure that a gate looks at noise levels for which it was calibrated: the first of a generation from noise.

        What is read off the prompt alone is the same at all of them.

        Raises:
            ArtefactError: if the generation began later.
        """
        if self.run.skipped and site.block != "prompt":
            raise ArtefactError(
                f"safedig's gate at '{site}' was calibrated in the first steps from pure noise, and this generation (image to image) began "
                f"at {self.run.skipped / (self.run.skipped + self.run.total):.0%} of the noise schedule; use dictionaries whose gate is at "
                "'prompt:text' (`safelight train safedig`), set gated=False to steer every picture, or strength=1"
            )

    def _dictionary(self, site: Site, tokens: Tensor) -> Dictionary:
        """That of a site, where the tokens are."""
        dictionary = self.known[str(site)]
        dictionary.check_tokens(tokens)
        self.known[str(site)] = dictionary.at(tokens.device)
        return self.known[str(site)]

    def _operator(self, dictionary: Dictionary) -> Operator:
        return dictionary.operator if self.operator == "routed" else self.operator

    def _images(self) -> list[int | None]:
        """The image of each row; None where a gate around this method says no."""
        assert self.run.call is not None
        return [image if self.confined_to is None or image in self.confined_to else None for image in self.run.call.samples]

    def _look(self, dictionary: Dictionary, limit: float, tokens: Tensor, images: list[int | None]) -> None:
        """Scores the pictures that haven't been found yet."""
        rows = [row for row, image in enumerate(images) if image is not None and image not in self.flagged]
        if not rows:
            return
        seen = dictionary.sae.inward((tokens if len(rows) == len(tokens) else tokens[rows]).float())
        alarms = dictionary.scores(seen)
        self.run.weigh([image for image in images if image is not None and image not in self.flagged], alarms, limit)
        scores = alarms.tolist()  # the one wait for the device
        for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
            image = images[row]
            assert image is not None
            self.best[image] = max(score, self.best.get(image, score))
            self.note(image, score=self.best[image], threshold=limit)
            if score > limit:
                self._find(image, dictionary, seen[place])

    def _find(self, image: int, dictionary: Dictionary, seen: Tensor) -> None:
        """Remembers that a picture's harmful features fired, and which, from what the encoder sees of it [tokens, width]."""
        self.flagged[image] = self.run.index
        moment = dictionary.moment(self.run.progress)
        fired = top_features(dictionary.harm(seen, moment), dictionary.harmful.features[moment].tolist(), NAMED)
        self.run.record("features", image=image, site=dictionary.site, features=fired)
        self.note(image, flagged=True, concept=", ".join(dictionary.risks) or None)
        self.note(image, note=f"features {', '.join(map(str, fired))} at {dictionary.site}")
        self._note(image, self.run.index, dictionary)

    def _note(self, image: int, index: int, dictionary: Dictionary) -> None:
        operator = self._operator(dictionary)
        start = max(index, round(self.after * self.run.total))
        self.note(
            image, acted=False, action="blended" if operator == "blend" else "repelled", steps=(start, round(self.until * self.run.total)),
            strength=self.beta if operator == "blend" else self.gamma,
        )  # fmt: skip

    def _steered(self, dictionary: Dictionary, tokens: Tensor) -> Tensor:
        """Blend or Repel, [batch, tokens, width]."""
        sae, moment = dictionary.sae, dictionary.moment(self.run.progress)
        seen = sae.inward(tokens.float())
        if self._operator(dictionary) == "blend":
            values = sae.features(seen).values
            if self.mode == "paper":
                change = self.beta * (dictionary.adapted(values) - seen)
            else:
                weight, bias = dictionary.repair
                change = self.beta * (values @ weight + bias)
        else:
            harm = dictionary.harm(seen, moment)
            harmful = harm @ dictionary.adapted.weight[dictionary.harmful.features[moment]]
            change = -self.gamma * (harmful + dictionary.adapted.bias - seen if self.mode == "paper" else harmful)
        return torch.add(tokens.float(), sae.outward(change)).to(tokens.dtype)
