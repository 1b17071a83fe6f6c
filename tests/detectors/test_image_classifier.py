"""The detector of pictures: the small network that ships, and models of transformers."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.bundle import load, save
from safelight.compose import WEIGHTS, build
from safelight.detectors.image_classifier import ImageClassifier
from safelight.errors import ArtefactError
from safelight.methods.post_filter import PostFilter
from safelight.picture_model import PictureModel
from safelight.testbed.scenes import is_safe, render, sample_scene
from safelight.testbed.world import DOMAINS, UNSAFE
from safelight.testing import check_detector

FILE = WEIGHTS / "pictures.safetensors"


@pytest.fixture(scope="module")
def model() -> PictureModel:
    return PictureModel.load(FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of transformers, as a user's own."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label={0: "normal", 1: "gory", 2: "nsfw"}, label2id={"normal": 0, "gory": 1, "nsfw": 2},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(out)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def scenes(count: int, safe: bool, domain: tuple[str, ...] = UNSAFE) -> list[Any]:
    random, found = Random(f"{count}/{safe}"), []
    while len(found) < count:
        scene = sample_scene(random, "test")
        if is_safe(scene) == safe and (safe or any(name in domain for name in scene.names)):
            found.append(render(scene))
    return found


def test_it_tells_held_out_pictures_apart(model: PictureModel) -> None:
    detector = ImageClassifier(model=model)
    assert sum(verdict.flagged for verdict in detector.verdicts(scenes(200, safe=True))) <= 4
    assert sum(verdict.flagged for verdict in detector.verdicts(scenes(200, safe=False))) >= 190


def test_it_keeps_to_the_contract_of_detectors(model: PictureModel) -> None:
    check_detector(ImageClassifier(model=model), [*scenes(6, safe=True), *scenes(6, safe=False)])
    assert ImageClassifier(model=model)([]).shape == (0,)


def test_calibration_moves_the_threshold(model: PictureModel) -> None:
    detector = ImageClassifier(model=model, threshold=0.9)
    calibration = detector.calibrate(scenes(310, safe=True), target_fpr=0.01)
    assert detector.threshold == calibration.threshold < 0.9
    assert calibration.bound <= 0.01


def test_it_can_watch_for_some_things_only(model: PictureModel) -> None:
    (method,) = build(["post_filter"], "testbed/sd", domain="substances")
    assert isinstance(method, PostFilter)
    found = method.detector.verdicts([*scenes(5, False, DOMAINS["substances"])])
    assert all(verdict.concept in DOMAINS["substances"] for verdict in found if verdict.flagged)
    assert method.detector.threshold == model.calibration.threshold  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no label 'gun'; it has cat, dog"):
        ImageClassifier(model=model, unsafe=("gun",))


def test_pictures_of_any_size(model: PictureModel) -> None:
    (picture,) = scenes(1, safe=False)
    big = np.kron(picture, np.ones((4, 4, 1), np.uint8))
    near, far = ImageClassifier(model=model)([picture, big])
    assert abs(float(near - far)) < 0.3


def test_a_model_of_transformers(folder: Path) -> None:
    detector = ImageClassifier(pretrained=str(folder), unsafe=("gory", "nsfw"))
    pictures = [*scenes(3, True), *scenes(3, False)]
    check_detector(detector, pictures)
    alone = [ImageClassifier(pretrained=str(folder), unsafe=(label,))(pictures) for label in ("gory", "nsfw", "normal")]
    assert torch.allclose(detector(pictures), alone[0] + alone[1], atol=1e-5), "labels that exclude each other add up"
    assert torch.allclose(sum(alone), torch.ones(6), atol=1e-5)  # type: ignore[arg-type]


def test_a_bundle_holds_either(model: PictureModel, folder: Path, tmp_path: Path) -> None:
    (picture,) = scenes(1, safe=False)
    for number, detector in enumerate((ImageClassifier(model=model), ImageClassifier(pretrained=str(folder), unsafe=("nsfw",)))):
        save(tmp_path / str(number), PostFilter(detector=detector))
        if detector.pretrained:
            with pytest.raises(ArtefactError, match=r"image_classifier\.pretrained, points outside the bundle"):
                load(tmp_path / str(number))
        (loaded,) = load(
            tmp_path / str(number), changes={"image_classifier.pretrained": detector.pretrained} if detector.pretrained else {}
        )
        assert isinstance(loaded, PostFilter)
        assert torch.allclose(loaded.detector([picture]), detector([picture]), atol=1e-3)
        assert loaded.detector.threshold == detector.threshold


def test_what_is_missing_is_named(model: PictureModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give either `model` or `pretrained`"):
        ImageClassifier()
    with pytest.raises(ValueError, match="which labels"):
        ImageClassifier(pretrained="somewhere")
    with pytest.raises(ArtefactError, match="can't be loaded"):
        ImageClassifier(pretrained=str(tmp_path), unsafe=("nsfw",)).within(None)  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="no classifier of pictures ships"):
        build(["post_filter"], "somebody/model")


def test_unknown_labels_of_a_pretrained_model_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no label 'nude'; it has normal, gory, nsfw"):
        ImageClassifier(pretrained=str(folder), unsafe=("nude",)).within(None)  # type: ignore[arg-type]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pictures.safetensors"
    with pytest.raises(ArtefactError, match="can't be read"):
        PictureModel.load(file)
    save_file(load_file(FILE), file)
    with pytest.raises(ArtefactError, match="holds no model of pictures"):
        PictureModel.load(file)
    save_file(load_file(FILE), file, {"format": "safelight-pictures/1", "facts": "{}"})
    with pytest.raises(ArtefactError, match="lacks a part"):
        PictureModel.load(file)
