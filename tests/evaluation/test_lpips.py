"""LPIPS: the library's learned heads on an AlexNet with random weights, against torchmetrics' own computation."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sample_pictures import noise, plain, scenes

from safelight.errors import ArtefactError
from safelight.evaluation.metrics.lpips import Lpips, alexnet, lpips

PAIRS = ([*scenes(), noise(64, 64), noise(70, 50)], [*scenes()[1:], noise(64, 64, seed=1), noise(64, 64, seed=2), plain(128, 70, 50)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({f"features.{name}": row for name, row in alexnet().state_dict().items()} | {"classifier.1.bias": torch.zeros(3)}, path)
    return str(path)


def test_it_is_torchmetrics_computation(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as library

    network = Lpips(weights=weights, batch=2)
    features, _ = network._network
    monkeypatch.setattr(library, "_get_tv_model_features", lambda net, pretrained: features)  # where torchvision would be needed
    theirs = library._LPIPS(net="alex")
    found = network(*PAIRS)
    for mine, first, second in zip(found, *PAIRS, strict=True):
        one, other = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in (first, second))
        assert mine == pytest.approx(float(theirs(one, other)), rel=1e-4)


def test_equal_pictures_are_at_distance_zero_and_it_is_symmetric(weights: str) -> None:
    network = Lpips(weights=weights)
    assert network(scenes(), scenes()) == [0.0] * 3
    assert network(*PAIRS) == pytest.approx(network(*PAIRS[::-1]), rel=1e-5)
    assert all(distance > 0 for distance in network(*PAIRS))


def test_the_estimate_is_over_prompts(weights: str) -> None:
    network = Lpips(weights=weights)
    distances = network(*PAIRS)
    alone, grouped = lpips(*PAIRS, network), lpips(*PAIRS, network, prompts=["a", "a", "b", "b", "b"])
    assert alone.value == pytest.approx(np.mean(distances)) == grouped.value
    assert (alone.n, grouped.n) == (5, 2)
    assert alone.low <= alone.value <= alone.high


def test_weights_as_torchvision_publishes_them(weights: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "alexnet.pth")
    assert Lpips(weights=str(tmp_path / "alexnet.pth"))(*PAIRS) == Lpips(weights=weights)(*PAIRS)


def test_it_says_what_it_is(weights: str) -> None:
    described = Lpips(weights=weights).describe()
    assert described["network"] == "alexnet"
    assert described["weights"].startswith("sha256:")
    assert described["heads"].startswith("sha256:")
    assert Lpips().describe()["weights"] == "missing"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "over nothing"), ([noise()], [], "1 pictures on one side and 0"), ([noise()], [noise(64, 64)], "pair 0 is"),
        ([plain(0, 20, 64)], [plain(0, 20, 64)], "at least 32 pixels"), ([np.zeros((64, 64, 3))], [noise(64, 64)], "picture 0 is float64"),
    ],
)  # fmt: skip
def test_bad_input_raises(weights: str, first: list[np.ndarray], second: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lpips(first, second, Lpips(weights=weights))


def test_missing_and_wrong_weights_are_named(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"needs torchvision's AlexNet as `weights`; https://download.pytorch.org"):
        Lpips()(*PAIRS)
    with pytest.raises(ArtefactError, match=r"there is no file nowhere\.pth"):
        Lpips(weights="nowhere.pth")(*PAIRS)
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtefactError, match="not those of AlexNet"):
        Lpips(weights=str(tmp_path / "other.safetensors"))(*PAIRS)


def test_nothing_is_executed(tmp_path: Path, weights: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "alexnet.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtefactError, match="can't be read as a file of tensors"):
        Lpips(weights=str(tmp_path / "alexnet.pth"))(*PAIRS)
    assert not (tmp_path / "exploded").exists()
    assert math.isfinite(Lpips(weights=weights)(*PAIRS)[0])
