"""Banks: embeddings with labels, a metric, one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelight.bank import Bank, Pair, embed_all
from safelight.calibration import Calibration
from safelight.errors import ArtefactError
from safelight.metric import discriminant, shrunk_covariance, squared_distances

PAIRS = [Pair("a knife on the beach", "a spoon on the beach", "weapons"), Pair("a beer in the snow", "a juice in the snow", "substances")]
SAFE = ["a cat on the beach", "a tree in the snow"]


def bag_of_words(prompts: Sequence[str], width: int = 64, salt: str = "") -> Tensor:
    """A text encoder for tests: a random vector for each word, summed."""

    def vector(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256((salt + word).encode()).digest()[:4], "big")
        return torch.randn(width, generator=torch.Generator().manual_seed(seed))

    return torch.stack([torch.stack([vector(word) for word in prompt.split() or [""]]).sum(dim=0) for prompt in prompts])


def other_encoder(prompts: Sequence[str]) -> Tensor:
    return bag_of_words(prompts, salt="other")


def narrow_encoder(prompts: Sequence[str]) -> Tensor:
    return bag_of_words(prompts, width=8)


def test_what_is_built() -> None:
    bank = Bank.build(bag_of_words, PAIRS, [*SAFE, "a spoon on the beach"])
    assert bank.categories == ("weapons", "substances")
    assert bank.labels.tolist() == [1, 2, 0, 0, 0, 0]
    assert bank.twins == ("a spoon on the beach", "a juice in the snow")
    assert torch.allclose(bank.embeddings.norm(dim=1), torch.ones(6))
    assert bank.projection is None


def test_texts_of_unsafe_prompts_are_not_written(tmp_path: Path) -> None:
    Bank.build(bag_of_words, PAIRS, SAFE).save(tmp_path / "bank.safetensors")
    content = (tmp_path / "bank.safetensors").read_bytes()
    assert b"knife" not in content
    assert b"spoon" in content


@settings(max_examples=15, deadline=None)
@given(metric=st.sampled_from(["cosine", "discriminant"]), calibrated=st.booleans(), shifts=st.booleans())
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, metric: str, calibrated: bool, shifts: bool) -> None:
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank = Bank.build(bag_of_words, PAIRS, SAFE, metric=metric)
    if calibrated:
        bank = replace(bank, calibration=Calibration.fit([index / 400 for index in range(400)]))
    if shifts:
        bank = bank.with_shifts(torch.randn(5, 64), torch.randn(5, 64), torch.randn(2, 64))
    bank.save(path)
    loaded = Bank.load(path)
    for name, value in vars(bank).items():
        found = getattr(loaded, name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(found, value, atol=2e-3, rtol=1e-3)
        else:
            assert found == value, name
    assert os.listdir(path.parent) == ["bank.safetensors"]
    loaded.check(bag_of_words)


def test_with_a_projection_only_unsafe_entries_keep_their_embeddings() -> None:
    plain, bank = (Bank.build(bag_of_words, PAIRS, SAFE, metric=metric) for metric in ("cosine", "discriminant"))
    assert torch.equal(bank.embeddings, plain.embeddings[:2])
    assert bank.projection is not None
    queries = embed_all(bag_of_words, ["a knife in the snow", "a cat"])
    expected = squared_distances(queries @ bank.projection, plain.embeddings @ bank.projection)
    torch.testing.assert_close(bank.distances(queries), expected)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank = Bank.build(bag_of_words, PAIRS)
    bank.save(path)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        replace(bank, probes="no tensor").save(path)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_no_pairs_and_unknown_metrics_raise() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        Bank.build(bag_of_words, [])
    with pytest.raises(ValueError, match="cosine and discriminant"):
        Bank.build(bag_of_words, PAIRS, metric="euclid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs safe and unsafe"):
        Bank.build(bag_of_words, [Pair("a knife", "", "weapons")], metric="discriminant")


def test_embeddings_that_are_not_finite_raise() -> None:
    def broken(prompts: Sequence[str]) -> Tensor:
        return bag_of_words(prompts).index_fill(0, torch.tensor([0]), torch.nan)

    with pytest.raises(ValueError, match="1 of 2 embeddings are not finite"):
        embed_all(broken, ["a", "b"])


@pytest.mark.parametrize(("encoder", "message"), [(other_encoder, "made with another encoder"), (narrow_encoder, "the encoder gives 8")])
def test_another_encoder_is_refused(encoder: object, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        Bank.build(bag_of_words, PAIRS).check(encoder)  # type: ignore[arg-type]


# Files that are no banks. Each message names the remedy.


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "bank.safetensors"
    Bank.build(bag_of_words, PAIRS).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtefactError, match=r"can't be read as a bank.*safelight bank"):
        Bank.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ArtefactError, match="safelight bank"):
            Bank.load(path)


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a good bank."""
    Bank.build(bag_of_words, PAIRS, SAFE, metric="discriminant").save(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"embeddings": torch.full((6, 64), torch.nan)}, {}, "NaN or infinite"),
        ({"probes": torch.full((3, 64), torch.inf)}, {}, "NaN or infinite"),
        ({"projection": torch.full((64, 2), torch.nan)}, {}, "NaN or infinite"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, {}, "no label for each"),
        ({"projected": torch.zeros(3, 2)}, {}, "no label for each"),
        ({"projected": torch.full((6, 2), torch.nan)}, {}, "NaN or infinite"),
        ({"projected": torch.zeros(6, 5)}, {}, "different widths"),
        ({"embeddings": torch.zeros(1, 64)}, {}, "one safe twin for each"),
        ({"labels": torch.full((6,), 7)}, {}, "name no category"),
        ({"projection": torch.ones(8, 2)}, {}, "different widths"),
        ({"surprise": torch.ones(8, 2)}, {}, "one too many"),
        ({}, {"format": "safelight-bank/99"}, "no bank of this version"),
        ({}, {"twins": "[]"}, "one safe twin for each"),
        ({}, {"twins": "{"}, "lacks a part"),
    ],
)
def test_flawed_banks_are_refused(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "bank.safetensors"
    good_tensors, good_metadata = parts(path)
    save_file(good_tensors | tensors, path, good_metadata | metadata)
    with pytest.raises(ArtefactError, match=f"{message}.*safelight bank"):
        Bank.load(path)


@pytest.mark.parametrize("missing", ["embeddings", "labels", "probes"])
def test_incomplete_banks_are_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "bank.safetensors"
    tensors, metadata = parts(path)
    del tensors[missing]
    save_file(tensors, path, metadata)
    with pytest.raises(ArtefactError, match=r"lacks a part.*safelight bank"):
        Bank.load(path)


# The metric.


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_cosine_distances_are_twice_one_minus_likeness(seed: int) -> None:
    bank = Bank.build(bag_of_words, PAIRS, SAFE)
    queries = torch.nn.functional.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)), dim=1)
    torch.testing.assert_close(bank.distances(queries), 2 - 2 * queries @ bank.embeddings.T, atol=1e-5, rtol=1e-5)


def two_clouds(entries: int = 200, width: int = 16) -> tuple[Tensor, Tensor]:
    """Classes that differ a little in one direction, and vary much in the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(entries) % 2
    points = 2 * torch.randn(entries, width, generator=generator)
    points[:, 0] = 2 * labels + 0.2 * torch.randn(entries, generator=generator)
    return points, labels


def agreement(points: Tensor, labels: Tensor) -> float:
    """How often the nearest other point has the same label."""
    return float((labels[squared_distances(points, points).fill_diagonal_(torch.inf).argmin(dim=1)] == labels).float().mean())


def test_a_discriminant_looks_at_what_separates() -> None:
    points, labels = two_clouds()
    projection = discriminant(points, labels)
    assert projection.shape == (16, 1)
    assert agreement(points, labels) < 0.8
    assert agreement(points @ projection, labels) > 0.95


def test_its_distances_do_not_depend_on_the_scale_of_embeddings() -> None:
    points, labels = two_clouds()
    torch.testing.assert_close(
        100 * points @ discriminant(100 * points, labels), points @ discriminant(points, labels), atol=1e-3, rtol=1e-3
    )


def test_shrinkage_runs_from_the_covariance_to_the_identity() -> None:
    points = two_clouds()[0]
    points = (points - points.mean(dim=0)).double()
    covariance = points.T @ points / len(points)
    torch.testing.assert_close(shrunk_covariance(points, 0.0), covariance)
    torch.testing.assert_close(shrunk_covariance(points, 1.0), covariance.trace() / 16 * torch.eye(16, dtype=torch.double))
    drawn = shrunk_covariance(points)
    assert torch.linalg.matrix_norm(drawn - covariance) < torch.linalg.matrix_norm(shrunk_covariance(points, 1.0) - covariance)


def test_ledoit_and_wolf_as_scikit_learn_has_it() -> None:
    reference = pytest.importorskip("sklearn.covariance")
    points = two_clouds(entries=30)[0].double()
    points = points - points.mean(dim=0)
    expected = reference.ledoit_wolf(points.numpy(), assume_centered=True)[0]
    torch.testing.assert_close(shrunk_covariance(points), torch.from_numpy(expected))


def test_classes_that_cannot_be_told_apart_raise() -> None:
    with pytest.raises(ValueError, match="same mean"):
        discriminant(torch.ones(6, 4), torch.tensor([0, 1] * 3))
    with pytest.raises(ValueError, match="at least one prompt of each"):
        discriminant(torch.randn(6, 4), torch.tensor([0, 2] * 3))
