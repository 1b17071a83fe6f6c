"""What goes into a pipeline besides text: pictures, masks, references, latents."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .detector import Detector, Verdict
from .errors import SafetyBypassed

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class GivenPicture:
    """Something picture-like among the arguments of a call."""

    argument: str
    place: int | None
    """Its place, where the argument is a list of pictures; None: it stands alone."""
    of: int
    """How many pictures the argument has."""
    value: Any

    def images(self, count: int) -> range:
        """Which of `count` images it goes into: its own, where each image has one; else it may be any of them, so all."""
        return range(count) if self.place is None or self.of != count else range(self.place, self.place + 1)

    @property
    def name(self) -> str:
        """For people: `image`, or `image[2]`."""
        return self.argument if self.place is None else f"{self.argument}[{self.place}]"

    def pixels(self) -> list[Picture]:
        """What it shows, [height, width, 3] each.

        Raises:
            SafetyBypassed: if that can't be told: of latents and embeddings, for instance.
        """
        if "latent" in self.argument or "embed" in self.argument:
            raise self._unjudgeable("it holds no picture that can be looked at")
        if isinstance(self.value, Image.Image):
            return [*_of_image(self.value)]
        array = self.value.detach().float().cpu().numpy() if isinstance(self.value, Tensor) else np.asarray(self.value)
        return [*self._of_array(array, channels_first=isinstance(self.value, Tensor))]

    def _of_array(self, array: NDArray[Any], channels_first: bool) -> Iterator[Picture]:
        if array.ndim == 2:
            array = array[None] if channels_first else array[..., None]
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4:
            raise self._unjudgeable(f"an array of shape {array.shape} is no picture")
        array = np.moveaxis(array, 1, -1) if channels_first else array
        if array.shape[-1] not in (1, 3) or not array.size:
            raise self._unjudgeable(f"an array of {array.shape[-1]} channels is no picture of 1 or 3")
        if array.dtype != np.uint8:
            if not np.isfinite(array).all():
                raise self._unjudgeable("it has values that are not finite")
            values = array.astype(np.float32)
            low, high = float(values.min()), float(values.max())
            # As pipelines read them: -1..1 where anything is negative, else 0..1; what was meant as 0..255 is looked at as that.
            values = (values + 1) * 127.5 if low < 0 else values if high > 1 else values * 255
            array = values.round().clip(0, 255).astype(np.uint8)
        yield from (np.ascontiguousarray(np.broadcast_to(one, (*one.shape[:2], 3))) for one in array)

    def _unjudgeable(self, why: str) -> SafetyBypassed:
        return SafetyBypassed(
            f"`{self.name}` can't be judged: {why}; give pictures (PIL, or arrays of 1 or 3 channels), and `generator` instead of `latents`"
        )


def judge(detector: Detector[Any], images: Tensor) -> list[Verdict]:
    """Verdicts on pictures [pictures, 3, height, width] in -1..1; one with NaN in it can't be judged, and counts as unsafe."""
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    pixels = ((images.nan_to_num(0.0).float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    verdicts = detector.verdicts(list(pixels.permute(0, 2, 3, 1).cpu().numpy()))
    unjudged = Verdict(1.0, detector.threshold, True, note="the picture has values that are not finite, hence treated as unsafe")
    return [verdict if sound else unjudged for verdict, sound in zip(verdicts, finite, strict=True)]


def greyed(images: Tensor, chosen: Sequence[int]) -> Tensor:
    """Images in -1..1, some of them made plain grey."""
    if chosen:
        images = images.clone()
        images[list(chosen)] = torch.zeros((), dtype=images.dtype, device=images.device)
    return images


def bound_arguments(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; those that don't fit are left to the function, which will say so itself."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    rest = next((name for name, one in bound.signature.parameters.items() if one.kind is one.VAR_KEYWORD), None)
    return {**bound.arguments, **bound.arguments.pop(rest, {})} if rest else dict(bound.arguments)


def pictures_in(arguments: Mapping[str, Any]) -> list[GivenPicture]:
    """Everything picture-like among a pipeline's arguments: images, masks, references, control images, latents; embeddings of pictures too."""
    return [given for name, value in arguments.items() if _may_show(name) for given in _listed(name, value)]


def _may_show(name: str) -> bool:
    """Whether an argument may hold a picture. Embeddings of prompts, noise levels and the like may not."""
    return not (name.endswith("prompt_embeds") or name in ("timesteps", "sigmas", "guidance_scale", "attention_mask", "generator"))


def _listed(name: str, value: Any) -> list[GivenPicture]:
    if _is_picture(value):
        many = not isinstance(value, Image.Image) and value.ndim == 4 and len(value) > 1 and "latent" not in name and "embed" not in name
        return (
            [GivenPicture(name, place, len(value), value[place]) for place in range(len(value))]
            if many
            else [GivenPicture(name, None, 1, value)]
        )
    if not isinstance(value, (list, tuple)):
        return []
    if all(_is_picture(one) for one in value):
        flat = all(isinstance(one, Image.Image) or one.ndim < 4 for one in value)
        return [GivenPicture(name, place if flat else None, len(value) if flat else 1, one) for place, one in enumerate(value)]
    return [GivenPicture(name, None, 1, given.value) for one in value if isinstance(one, (list, tuple)) for given in _listed(name, one)]


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim >= 2)


def _of_image(image: Image.Image) -> Iterator[Picture]:
    """What a PIL image shows: its colours, and where parts are transparent also what they hide."""
    yield np.asarray(image.convert("RGB"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        for ground in ("white", "black"):
            yield np.asarray(Image.alpha_composite(Image.new("RGBA", whole.size, ground), whole).convert("RGB"))


__all__ = ["GivenPicture", "Picture", "bound_arguments", "greyed", "judge", "pictures_in"]
