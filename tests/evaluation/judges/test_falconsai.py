"""An image classifier of the real class, tiny and random, and what happens without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sample_pictures import harmless, noise, plain
from tiny_networks import vit

from safelight.errors import ArtefactError
from safelight.evaluation.judges.falconsai import Falconsai
from safelight.evaluation.pictures import to_images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vit(tmp_path_factory.mktemp("vit"))


def test_scores_are_the_network_s(model: str) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    pictures = harmless()
    inputs = AutoImageProcessor.from_pretrained(model)(images=to_images(pictures), return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(model)(**inputs).logits.softmax(dim=-1)
    found = Falconsai(model=model, batch=3)(pictures)
    assert [judged.labels["nsfw"] for judged in found] == pytest.approx(expected[:, 1].tolist(), abs=1e-5)
    assert [judged.labels["normal"] for judged in found] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    assert all(judged.score == judged.labels["nsfw"] and judged.unsafe == (judged.score >= 0.5) for judged in found)
    assert len({round(judged.score, 5) for judged in found}) > 3


def test_other_labels_can_count(model: str) -> None:
    judged = Falconsai(model=model, classes=("normal", "nsfw"), threshold=1.0)([noise()])[0]
    assert judged.score == max(judged.labels.values())
    with pytest.raises(ValueError, match=r"has no label 'gore'; it has normal, nsfw"):
        Falconsai(model=model, classes=("gore",))([noise()])


def test_it_is_loaded_once_and_says_what_it_is(model: str) -> None:
    judge = Falconsai(model=model, download=False, device="cpu")
    described = judge.describe()
    assert not {"network", "processor"} & set(vars(judge))
    assert (described["name"], described["precision"]) == ("falconsai", "cpu float32")
    assert f"{Path(model).name} sha256:" in described["version"]
    assert str(Path(model).parent) not in described["version"]
    judge([plain(1)])
    first = judge.network
    judge([plain(2)])
    assert judge.network is first


def test_missing_weights_say_which_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    judge = Falconsai(download=False)
    assert "unknown" in judge.describe()["version"]
    with pytest.raises(ArtefactError) as caught:
        judge([plain(0)])
    for words in ("the judge 'falconsai'", "Falconsai/nsfw_image_detection", "hf download", "HF_HUB_OFFLINE is set", "`download` is off"):
        assert words in str(caught.value)


def test_pickled_weights_are_not_read(model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for file in Path(model).glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(Path(model) / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="safetensors"):
        Falconsai(model=str(tmp_path))([plain(0)])


def test_a_device_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(ValueError, match="device='tpu' is not there"):
        Falconsai(model=model, device="tpu")([plain(0)])
