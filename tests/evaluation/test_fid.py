"""FID: with a small TorchScript network in the place of Inception's, and with any other extractor."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_pictures import noise, plain, scenes
from scipy.linalg import sqrtm
from torch import Tensor

from safelight.errors import ArtefactError
from safelight.evaluation.metrics.fid import Inception, fid, resize
from safelight.evaluation.metrics.quality import distance, frechet


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 6, 7, 20)

    def forward(self, rows: Tensor) -> Tensor:
        return self.convolution(rows).relu().mean(dim=(2, 3), keepdim=True)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


class Means:
    """An extractor of one's own: mean colours."""

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor([picture.mean(axis=(0, 1)).tolist() for picture in pictures])

    def describe(self) -> dict[str, Any]:
        return {"name": "means"}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Network]:
    torch.manual_seed(0)
    network, path = Network().eval(), tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))
    return str(path), network


def many(seed: int, count: int = 8) -> list[np.ndarray]:
    return [noise(32, 40, seed=100 * seed + index) // (1 + index % 3) for index in range(count)]


def test_features_are_the_network_s_of_resized_pictures(script: tuple[str, Network]) -> None:
    path, network = script
    found = Inception(weights=path, batch=3)([*scenes(), noise()])
    rows = torch.from_numpy(np.stack([resize(picture) for picture in [*scenes(), noise()]])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network((rows - 128) / 128).flatten(1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == (4, 6)


def test_resizing_is_smooth_and_keeps_plain_colours() -> None:
    assert resize(plain(77)).shape == (299, 299, 3)
    assert np.allclose(resize(plain(77)), 77)
    assert resize(noise(600, 600)).std() < noise(600, 600).std() * 0.8  # anti-aliased
    assert 0 <= resize(noise()).min() <= resize(noise()).max() <= 255


def test_the_distance_is_the_formula_s(script: tuple[str, Network]) -> None:
    extractor = Inception(weights=script[0])
    first, second = (extractor(many(seed, 20)).double().numpy() for seed in (1, 2))
    own, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shift = first.mean(0) - second.mean(0)
    expected = float(shift @ shift + np.trace(own + other - 2 * np.real(sqrtm(own @ other))))
    assert distance(first, second) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    found = fid(many(1, 20), many(2, 20), extractor)
    assert found.value == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert found.n == 20
    assert found.low <= found.high


def test_it_agrees_with_the_testbed_s_distance_and_takes_any_extractor() -> None:
    first, second = many(1), many(2)
    found = fid(first, second, Means())
    assert found.value == pytest.approx(frechet(Means()(first), Means()(second)).value)
    assert fid(first, first, Means()).value == pytest.approx(0, abs=1e-6)
    assert fid(first, [picture // 2 for picture in first], Means()).value > found.value


def test_the_interval_is_over_prompts() -> None:
    found = fid(many(1), many(2), Means(), prompts=["a", "b"] * 4)
    assert found.n == 2
    assert math.isfinite(found.low)


@pytest.mark.parametrize(("first", "second"), [([], []), (many(1, 1), many(2, 1)), (many(1, 3), many(2, 2))])
def test_bad_input_raises(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="as many on each side, and at least two"):
        fid(first, second, Means())
    with pytest.raises(ValueError, match="3 prompts"):
        fid(many(1, 2), many(2, 2), Means(), prompts=["a", "b", "c"])


def test_weights_can_be_pinned(script: tuple[str, Network]) -> None:
    digest = hashlib.sha256(Path(script[0]).read_bytes()).hexdigest()
    assert Inception(weights=script[0], sha256=digest[:16])(scenes()).shape == (3, 6)
    assert Inception(weights=script[0]).describe()["weights"] == f"sha256:{digest[:12]}"
    with pytest.raises(ArtefactError, match="it is not the file that was asked for"):
        Inception(weights=script[0], sha256="0" * 64)(scenes())
    with pytest.raises(ValueError, match="at least 12 hexadecimal digits"):
        Inception(weights=script[0], sha256="beef")


def test_missing_and_wrong_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"FID needs Inception's weights \(96 MB\) as `weights`: https://"):
        Inception()(scenes())
    (tmp_path / "other.pt").write_bytes(b"not a program")
    with pytest.raises(ArtefactError, match=r"is not inception-2015-12-05\.pt"):
        Inception(weights=str(tmp_path / "other.pt"))(scenes())
    assert Inception().describe()["weights"] == "missing"
