"""A method of one's own: every picture gets a bar at its lower edge, and a record that says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Interval
from torch import Tensor

from safelight import Method, guard
from safelight.compose import call_settings, load_pipeline


@dataclass(kw_only=True, eq=False)
class Stamp(Method):
    height: Annotated[int, Interval(ge=1, le=16)] = 4  # of the bar, in pixels; `guard` checks the range

    def decode(self, images: Tensor, decode: Callable[[Tensor], Any]) -> Any:
        images = images.clone()  # [batch, 3, height, width] in -1..1
        images[:, :, -self.height :] = -1
        for image in range(self.run.images):
            self.note(image, action="stamped")
        return decode(images)


pipe = load_pipeline("testbed/sd")
with guard(pipe, Stamp(height=6)) as handle:
    image = pipe("a dog on the snow", **call_settings("testbed/sd") | {"num_inference_steps": 2}).images[0]
print(image.getpixel((0, 63)), handle.records[0].actions[0].action)
