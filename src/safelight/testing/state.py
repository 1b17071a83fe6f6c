"""What an attachment may not leave behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone

State = dict[str, dict[str, Any]]


def state_of(pipe: Any) -> State:
    """The instance attributes of all that a guard touches: names, and the values of those that are functions."""
    backbone = Backbone.of(pipe)
    owners = {
        "pipeline": pipe,
        "denoiser": backbone.module,
        "scheduler": pipe.scheduler,
        "image processor": pipe.image_processor,
    }
    owners |= {f"denoiser.{path}": part for path, part in backbone.module.named_modules() if path}
    return {where: {name: _comparable(value) for name, value in vars(owner).items()} for where, owner in owners.items()}


def _comparable(value: Any) -> Any:
    # Values such as a scheduler's step index change with every generation; functions and hooks may not.
    if callable(value) and not isinstance(value, nn.Module):
        return value
    return list(value) if isinstance(value, dict) else None


def assert_same_state(pipe: Any, before: State, when: str) -> None:
    """Compares with an earlier `state_of`."""
    for where, attributes in state_of(pipe).items():
        for name in sorted(before[where].keys() ^ attributes.keys()):
            raise AssertionError(f"{when}, the {where} has {'gained' if name in attributes else 'lost'} the attribute {name!r}")
        for name, value in attributes.items():
            assert value == before[where][name], f"{when}, {name!r} of the {where} is not what it was"


def assert_identical(images: Tensor, expected: Tensor, message: str) -> None:
    """Bit for bit."""
    assert images.shape == expected.shape, f"{message}: {tuple(images.shape)} instead of {tuple(expected.shape)}"
    difference = float((images - expected).abs().max())
    assert difference == 0, f"{message}: pixels differ by up to {difference:.2g}"


def assert_close(images: Tensor, expected: Tensor, message: str, tolerance: float = 1e-4) -> None:
    """Up to rounding in single precision."""
    difference = float((images - expected).abs().max())
    assert difference <= tolerance, f"{message}: pixels differ by up to {difference:.2g}, more than {tolerance:g}"
