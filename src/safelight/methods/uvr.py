"""UVR: unsafe image tokens are located inside the denoiser, and cut off from what makes them unsafe."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from ..anchors import Anchors
from ..backbone import Backbone
from ..errors import SafetyBypassed, UnsupportedPipeline
from ..flow import Call, Heads, Step, put
from ..localisation import Finds, Memory
from ..masks import clean, dilate, over_latents, resize
from ..method import Method
from ..regulation import Group, regulate
from ..run import Run
from ..site import Site

Share = Annotated[float, Interval(ge=0, le=1)]
Factor = Annotated[float, Interval(ge=0, le=10)]
ATTENTIONS = ("joint.attention", "single.attention")


@dataclass(kw_only=True, eq=False)
class UVR(Method):
    """Locates unsafe semantics in the joint attention of an MM-DiT, and regulates it there, in generation and editing alike.

    Our variant of UVR, Unified Visual Safety Regulator (Yang et al., 2026, https://arxiv.org/abs/2606.06875). Image tokens whose attention output at a
    probe looks like an unsafe concept's anchors, s(n) = out(n)·ō > τ, form a mask (its *core*, and a *ring* around it). There,
    O(i) = (1 - a) Σ_j λ(i,j) A(i,j) V(j) + a ε: λ scales what text and reference tokens pass on, ε is noise. An empty mask changes nothing.
    """

    anchors: Anchors = field(metadata={"artefact": "anchors"})
    """What the unsafe concepts look like, with thresholds τ; from `safelight train uvr`."""
    reference_anchors: Anchors | None = field(default=None, metadata={"artefact": "reference anchors"})
    """What they look like in a reference image (editing). With them, the reference is searched itself, and faded where something is found
    there; without, where something is found in the image (published)."""
    threshold: float | None = None
    """τ for all concepts; by default the anchors' own. Lower: more is found, and more that is harmless."""
    until: Share = 1.0
    """The share of the steps in which to regulate; UVR's start-up window is 0.39 of FLUX's schedule."""
    sigma: Share | None = None
    """Regulate while the noise level is at least this, instead of `until`; published: 0.85."""
    localise: Share = 0.25
    """The share of the steps in which to look for unsafe tokens."""
    late: Share = 0.35
    """The same for generations that begin late (image to image), as a share of the whole schedule: there, things come up over several steps."""
    eager: Share = 0.1
    """For how much of the schedule, from where such a generation begins in its first half, the masks' level does for τ: nothing harmless
    that looks alike is drawn yet."""
    memory: Memory = "union"
    """What becomes of earlier masks: joined with the new one, kept, or replaced by it."""
    text: Factor = 0.0
    """λ of text keys for masked image queries: 0 cuts the mask off from the prompt, 1 leaves it alone."""
    reference: Factor = 0.0
    """λ of the reference image's masked keys, for text and image queries (editing); published: 0.2."""
    reference_ring: Factor = 0.0
    """The same in the ring; published: 0.4."""
    boost: Factor = 1.0
    """λ of text and image keys for image queries while regulating an edit; published: 1.05."""
    renormalise: bool = True
    """Whether each query's attention sums to one again; published: no."""
    noise: Share = 0.0
    """a: how much of masked tokens' attention outputs becomes noise (generation); published: 0.999."""
    noise_like: Literal["outputs", "unit"] = "outputs"
    """The noise's spread: that of the unmasked outputs of each head, or 1 (published)."""
    guidance: float | None = 1.0
    """The guidance scale at masked tokens, where the pipeline has an unconditional prediction: 1 follows the prompt, 0 ignores it, less
    leads away from it. None: the pipeline's own (published)."""
    ring: Annotated[int, Ge(0)] = 0
    """How many tokens wide the ring around the core is; it is regulated like the core, but see `reference_ring`."""
    cover: Share = 1.0
    """Components are masked, the most unsafe first, until this share of the image is covered; published: 0.3."""
    components: Annotated[int, Ge(1)] | None = None
    """At most so many components are masked; published: 3 for editing."""
    least: Share = 0.0
    """Components smaller than this share of the image are dropped."""
    transfer: bool = False
    """Whether anchors of another checkpoint of the same architecture will do."""

    @classmethod
    def near_published(cls, anchors: Anchors, *, editing: bool = False) -> UVR:
        """The nearest that this class comes to the method as published: noise for generation, value scaling for editing, both while σ ≥ 0.85.

        It differs in the anchors (published: raw means of the last step, τ probed; these are as given), keeps components by the area of the image
        (published: by softmax mass), has no minimum areas, takes a ring of one token (published: a 7 x 7 ellipse, twice) with a square, and boosts
        only where there is a mask.
        """
        common = cls(
            anchors=anchors, sigma=0.85, localise=1.0, memory="latest", text=1.0, renormalise=False, guidance=None, reference=0.2,
            reference_ring=0.4, boost=1.05, noise=0.999, noise_like="unit", ring=1 if editing else 0,
        )  # fmt: skip
        return replace(common, localise=0.0, memory="first", components=3) if editing else replace(common, cover=0.3)

    def sites(self, backbone: Backbone) -> Iterable[Site | str]:
        """The probes, and every attention that is to be regulated.

        Raises:
            UnsupportedPipeline: if the denoiser has no joint attention.
            ArtefactError: if the anchors are another model's.
        """
        kinds = [kind for kind in ATTENTIONS if kind in backbone.attentions]
        if not kinds:
            raise UnsupportedPipeline(
                f"uvr regulates the joint attention of text and image tokens, and {type(backbone.module).__name__} has none; "
                "use dual_latent for this pipeline"
            )
        for anchors in self._searched():
            anchors.check(backbone, transfer=self.transfer)
            yield anchors.site
        if self.noise:
            every = backbone.sites(*(f"{kind}:image" for kind in kinds))
            yield from (site for site in every if str(site) != self.anchors.site)
        yield from backbone.sites(*kinds)

    judges_images = True

    def meet(self, further: Run) -> None:
        """It looks at what is drawn, whatever the prompt."""

    def owed(self) -> Iterable[int]:
        """Those in which it found something.

        Raises:
            SafetyBypassed: if it was to look and never did.
        """
        if not self.looked and (self.until if self.sigma is None else True):
            raise SafetyBypassed(
                f"uvr never looked at the image: none of the {self.run.total} steps is in its window "
                + (f"(until={self.until:g})" if self.sigma is None else f"(noise level of at least {self.sigma:g})")
                + "; the images are withheld. Widen the window, or take more steps"
            )
        return super().owed() if self._regulates() else ()

    def _regulates(self) -> bool:
        """Whether what it would do about a mask changes anything: with every factor at 1 and no noise, it only looks."""
        reference = bool(self.run.layout.reference) and (self.reference, self.reference_ring, self.boost) != (1, 1, 1)
        return bool(self.noise) or self.text != 1 or reference or self.guidance is not None

    def begin(self) -> None:
        """Nothing is known yet: masks are found on the way."""
        self.finds = {anchors.site: Finds(anchors) for anchors in self._searched()}
        self.chances: dict[int, torch.Generator] = {}
        self.latents: dict[int, Tensor] = {}
        self.looked = False
        self.predictions: list[tuple[Tensor | None, Tensor | None]] = []
        self.noise_levels: list[float] | None = None
        self.prepared: dict[tuple[Any, ...], list[Group]] = {}

    def _searched(self) -> list[Anchors]:
        return [self.anchors] if self.reference_anchors is None else [self.anchors, self.reference_anchors]

    @property
    def core(self) -> dict[int, Tensor]:
        """Image -> the mask found in it, [height, width]."""
        return self.finds[self.anchors.site].masks

    @property
    def source(self) -> dict[int, Tensor]:
        """Image -> the mask of its reference, on the reference's grid: found there, or else where the image's own mask is."""
        if self.reference_anchors is not None:
            return self.finds[self.reference_anchors.site].masks
        return self.core

    @property
    def acting(self) -> bool:
        """Whether this step is in the window."""
        return self._acts_at(self.run.index)

    def _acts_at(self, index: int) -> bool:
        if self.sigma is None:
            return index < round(self.until * self.run.total)
        if self.noise_levels is None:
            self.noise_levels = self.run.sigmas  # read once: each look at the scheduler's would wait for the device
        return self.noise_levels[index] >= self.sigma

    def _looks_at(self, index: int) -> bool:
        """Whether to look for unsafe tokens in a step: at least in the first."""
        return index < max(1, self._steps(self.late if self.run.skipped else self.localise))

    def _steps(self, share: float) -> int:
        """How many steps are a share of the whole schedule."""
        return round(share * (self.run.skipped + self.run.total))

    def _limits(self, anchors: Anchors) -> tuple[float, ...]:
        """τ of each concept in this step."""
        if self.threshold is not None:
            return (self.threshold,) * len(anchors.concepts)
        eager = self.run.skipped and self.run.index < self._steps(self.eager) and self.run.progress <= 0.5
        return anchors.levels if eager else anchors.thresholds

    @property
    def attends(self) -> bool:
        """Whether there is a mask to regulate; until then attention is left alone."""
        return any(finds.masks for finds in self.finds.values()) and self.acting

    def denoise(self, call: Call, denoise: Callable[[Call], Tensor]) -> Tensor:
        """Remembers the predictions with and without the prompt, which guidance at masked tokens needs."""
        if self.run.index == 0 and call.conditional:
            self.latents = dict(zip(call.samples, call.latents[call.cond], strict=True)) | self.latents
        noise = denoise(call)
        if self.guidance is not None and self.acting and len(call.samples or noise) == self.run.images:
            rest = noise[: call.cond.start] if call.conditional else noise
            self.predictions.append((noise[call.cond] if call.conditional else None, rest if len(rest) else None))
        return noise

    def edit(self, site: Site, tokens: Tensor) -> Tensor:
        """Looks for unsafe tokens at the probes, and replaces masked outputs by noise."""
        if not self.acting:
            return tokens
        if str(site) in self.finds and self._looks_at(self.run.index):
            self._localise(str(site), tokens)
        rows = self._rows(self.core)
        if not rows or not self.noise or site.stream != "image" or self.run.layout.reference:
            return tokens
        return self._noised(tokens, rows)

    def attend(self, site: Site, heads: Heads, attend: Callable[[Heads], Tensor]) -> Tensor:
        """Attention under λ, for the samples with a mask."""
        rows = self._rows(self.core | self.source)
        if not rows:
            return attend(heads)
        own = heads.take(rows)
        groups = self._prepared(own, [self._call.samples[row] for row in rows])
        if not groups:
            return attend(heads)
        self._acted(self._call.samples[row] for row in rows)
        everyone = len(rows) == len(heads.query)
        changed = regulate(
            own, groups, attend, lambda: attend(heads) if everyone else attend(heads)[list(rows)], renormalise=self.renormalise
        )
        return changed if everyone else put(attend(heads), rows, changed)

    def step(self, step: Step, advance: Callable[[Step], Tensor]) -> Tensor:
        """Guides masked tokens by their own scale."""
        predictions, self.predictions = self.predictions, []
        images = sorted(self.core)
        cond = next((cond for cond, _ in predictions if cond is not None), None)
        uncond = next((rest for _, rest in predictions if rest is not None), None)
        if not images or self.guidance is None or cond is None or uncond is None:
            return advance(step)
        self._acted(images)
        wanted = torch.lerp(uncond[images].float(), cond[images].float(), self.guidance).to(step.noise)
        masks = over_latents(self._masks(images, self.ring), step.noise)
        return advance(replace(step, noise=put(step.noise, images, torch.where(masks, wanted, step.noise[images]))))

    @property
    def _call(self) -> Call:
        assert self.run.call is not None
        return self.run.call

    def _rows(self, masks: Mapping[int, Tensor]) -> list[int]:
        """The conditional rows of this call whose image has a mask."""
        return [row for row, image in enumerate(self._call.samples) if image in masks] if self.acting else []

    def _localise(self, site: str, tokens: Tensor) -> None:
        """Finds unsafe tokens, [batch, tokens, width], and joins them to what was found before."""
        finds, layout = self.finds[site], self._call.layout
        reference = Site.parse(site).stream == "reference"
        if reference and not layout.reference:  # Kontext also makes pictures from nothing
            return
        finds.anchors.check_tokens(tokens, layout)
        anchors = finds.anchors = finds.anchors.at(tokens.device)
        if not self.looked:
            ahead = [index for index in range(self.run.index, self.run.total) if self._looks_at(index) and self._acts_at(index)]
            anchors.check_moments(self.run.skipped, self.run.total, ahead)
        self.looked = True
        maps = anchors.scores(tokens, self.run.progress, layout.reference_grid if reference else layout.grid)
        limits = self._limits(anchors)
        self.run.weigh(self._call.samples, maps.amax(dim=(2, 3)), limits)
        peaks = maps.amax(dim=(2, 3)).tolist()  # the step's one wait for the device
        for row, image in enumerate(self._call.samples):
            if self.confined_to is not None and image not in self.confined_to:
                continue
            finds.see(image, peaks[row], limits)
            if finds.fired[image]:
                self._join(finds, image, self._mask(anchors, maps[row], sorted(finds.fired[image]), limits), reference)
            self._note(image)

    def _mask(self, anchors: Anchors, maps: Tensor, concepts: list[int], limits: tuple[float, ...]) -> Tensor:
        """The core of some concepts' maps [concepts, height, width]: [height, width]."""
        levels = torch.tensor([min(anchors.levels[c], limits[c]) for c in concepts], device=maps.device)
        best = (maps[concepts] - levels[:, None, None]).amax(dim=0, keepdim=True)
        weight = best.flatten(1).softmax(-1).view_as(best)
        return clean(best > 0, weight, least=self.least, cover=self.cover, count=self.components)[0]

    def _join(self, finds: Finds, image: int, mask: Tensor, reference: bool) -> None:
        tokens = finds.join(image, mask, self.memory)
        self.prepared.clear()
        if tokens is not None:
            self.run.record("localised", image=image, tokens=tokens, stream="reference" if reference else "image")

    def _note(self, image: int) -> None:
        """Fills in the record: what was found by the probe that is surest, and the mask (the reference's, if there is no other)."""
        finds = max(self.finds.values(), key=lambda found: found.margin(image))
        flagged = bool(finds.fired.get(image))
        score, threshold, concept = finds.best[image]
        self.note(image, flagged=flagged, concept=concept if flagged else None, score=score, threshold=threshold)
        mask = self.core.get(image, self.source.get(image))
        if not flagged:
            return
        started = min(found.since[image] for found in self.finds.values() if image in found.since)
        end = next((index for index in range(started, self.run.total) if not self._acts_at(index)), self.run.total)
        strength = max(abs(1 - self.text), self.noise if not self.run.layout.reference else abs(1 - self.reference))
        self.note(
            image, acted=False, action="none" if mask is None else "regulated", steps=(started, end), strength=strength,
            mask=None if mask is None else [[int(token) for token in line] for line in mask.tolist()],
            note="no component of its mask is as large as `least`" if mask is None else None,
        )  # fmt: skip

    def _acted(self, images: Iterable[int]) -> None:
        for image in images:
            self.run.note_acted(self.position, image)

    def _masks(self, images: list[int], ring: int) -> Tensor:
        """Masks with their ring, [images, height, width]; empty for images without."""
        empty = torch.zeros(self.run.layout.grid, dtype=torch.bool, device=self.device)
        return dilate(torch.stack([self.core.get(image, empty) for image in images]), ring)

    def _prepared(self, heads: Heads, images: list[int]) -> list[Group]:
        """The groups of these images; all blocks of a kind share them until a mask changes."""
        key = (*images, *map(str, heads.queries.items()))
        if key not in self.prepared:
            self.prepared[key] = list(self._groups(heads, images))
        return self.prepared[key]

    def _groups(self, heads: Heads, images: list[int]) -> Iterable[Group]:
        """λ for each class of queries."""
        text, image, reference = (heads.keys.get(stream, slice(0, 0)) for stream in ("text", "image", "reference"))
        factors: Tensor | None = None
        if self.run.layout.reference and (self.boost != 1 or any(image in self.source for image in images)):
            yield Group(heads.queries["reference"], None)
            factors = torch.ones(len(images), heads.key.shape[2], device=heads.key.device)
            factors[:, reference] = self._faded(images)
            if self.boost == 1:
                yield Group(slice(heads.queries["text"].start, heads.queries["image"].stop), factors)
            else:
                yield Group(heads.queries["text"], factors)
                factors = factors.clone()
                factors[:, text] *= self.boost
                factors[:, image] *= self.boost
                yield Group(heads.queries["image"], factors)
        if self.text == 1 or not any(image in self.core for image in images):
            return
        tokens, valid = self._chosen(images)
        tokens = tokens + (heads.queries["image"].start or 0)
        if self.text == 0 and self.renormalise:
            others = slice(text.stop, None) if text.start == 0 else slice(0, text.start)  # text stands first or last
            yield Group(tokens, factors, valid, others)
            return
        factors = torch.ones(len(images), heads.key.shape[2], device=heads.key.device) if factors is None else factors.clone()
        factors[:, text] *= self.text
        yield Group(tokens, factors, valid)

    def _faded(self, images: list[int]) -> Tensor:
        """λ of the reference's keys, [images, reference tokens]."""
        grid = self.run.layout.reference_grid
        empty = torch.zeros(grid, dtype=torch.bool, device=self.device)
        cores = torch.stack([resize(self.source[image][None], grid)[0] if image in self.source else empty for image in images])
        factors = torch.ones(cores.shape, device=self.device).masked_fill(dilate(cores, self.ring), self.reference_ring)
        return factors.masked_fill(cores, self.reference).flatten(1)

    def _chosen(self, images: list[int]) -> tuple[Tensor, Tensor]:
        """The indices of masked tokens among image tokens, padded, and which of them are no padding: each [images, chosen]."""
        masks = self._masks(images, self.ring).flatten(1)
        valid, tokens = masks.float().topk(int(masks.sum(1).max()), dim=1)
        return tokens, valid > 0

    def _noised(self, tokens: Tensor, rows: list[int]) -> Tensor:
        """(1 - a) out + a ε in masked tokens, [batch, tokens, width]."""
        images = [self._call.samples[row] for row in rows]
        self._acted(images)
        own = tokens[rows].unflatten(-1, (self.anchors.heads, -1))  # [rows, tokens, heads, width]
        masks = self._masks(images, self.ring).flatten(1)[:, :, None, None]
        chance = torch.stack([self._chance(image, own.shape[1:]) for image in images]).to(own)
        if self.noise_like == "outputs":
            rest = torch.where(masks.all(1, keepdim=True), masks, ~masks).to(own)  # with nothing unmasked, all there is
            count = rest.sum(1, keepdim=True) * own.shape[-1]
            mean = (own * rest).sum((1, 3), keepdim=True) / count
            spread = (((own - mean) * rest).square().sum((1, 3), keepdim=True) / count).sqrt()
            chance = mean + chance * spread
        return put(tokens, rows, torch.where(masks, torch.lerp(own, chance, self.noise), own).flatten(2))

    def _chance(self, image: int, shape: torch.Size) -> Tensor:
        """Noise of the image's own: it depends on the image's first latents, not on its place in the batch."""
        if image not in self.chances:
            seed = zlib.crc32(self.latents[image].detach().float().cpu().numpy().tobytes())
            self.chances[image] = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=self.chances[image], device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return self._call.latents.device
