"""Q16 with a tiny random CLIP: its formula, its prompts' file, its rules."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sample_pictures import harmless, noise, plain
from tiny_networks import clip

from safelight.errors import ArtefactError
from safelight.evaluation.clip import embed_pictures, embed_texts
from safelight.evaluation.judges.q16 import Q16, RULES

PROMPTS = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "q16.npy"
    np.save(path, PROMPTS)
    return str(path)


def test_the_formula(model: str, prompts: str) -> None:
    judge, pictures = Q16(model=model, prompts=prompts, batch=2), harmless()
    rows = embed_pictures(judge, pictures).numpy()
    anchors = PROMPTS.astype(np.float64) / np.linalg.norm(PROMPTS.astype(np.float64), axis=1, keepdims=True)
    logits = 100 * rows @ anchors.T
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    found = judge(pictures)
    assert [judged.score for judged in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(judged.labels == {"inappropriate": judged.score} for judged in found)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_both_file_formats_mean_the_same(model: str, prompts: str, tmp_path: Path) -> None:
    save_file({"prompts": torch.from_numpy(PROMPTS)}, tmp_path / "q16.safetensors")
    other = Q16(model=model, prompts=str(tmp_path / "q16.safetensors"))
    assert other(harmless()) == Q16(model=model, prompts=prompts)(harmless())


def test_two_texts_can_stand_in_and_are_named(model: str) -> None:
    judge = Q16(model=model, texts=("a good cat", "a bad knife"))
    rows, anchors = embed_pictures(judge, [noise()]), embed_texts(judge, ["a good cat", "a bad knife"])
    assert judge([noise()])[0].score == pytest.approx(float((100 * rows @ anchors.T).softmax(dim=-1)[0, 1]), abs=1e-5)
    assert judge.describe()["zero_shot"]
    assert "a bad knife" in judge.describe()["version"]


def test_rules_are_thresholds(prompts: str) -> None:
    assert [Q16(rule=rule).threshold for rule in RULES] == [0.5, 0.9]
    assert Q16(threshold=0.7).rule == "custom"
    described = Q16(rule="listing", prompts=prompts).describe()
    assert (described["rule"], described["threshold"], described["zero_shot"]) == ("listing", 0.9, False)
    assert "q16.npy sha256:" in described["version"]


def test_a_pickle_is_never_read(model: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("prompts.p", "prompts.npy", "prompts.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ArtefactError, match="convert it where you trust it: python -c"):
            Q16(model=model, prompts=str(tmp_path / name))([plain(0)])
    np.save(tmp_path / "objects.npy", np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ArtefactError, match="allow_pickle"):
        Q16(model=model, prompts=str(tmp_path / "objects.npy"))([plain(0)])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [(np.ones((3, 8)), "two prompts"), (np.ones(8), "two prompts"), (np.full((2, 8), np.nan), "two prompts"), (np.ones((2, 5)), "width 5")],
)
def test_other_contents_are_refused(model: str, tmp_path: Path, rows: np.ndarray, message: str) -> None:
    np.save(tmp_path / "q16.npy", rows)
    with pytest.raises(ArtefactError, match=message):
        Q16(model=model, prompts=str(tmp_path / "q16.npy"))([plain(0)])


def test_missing_prompts_say_where_they_are() -> None:
    with pytest.raises(ArtefactError, match=r"two learned prompts. Take prompts.p .*github.com/ml-research/Q16"):
        Q16()([plain(0)])


def test_missing_weights_say_how_to_get_them(prompts: str) -> None:
    with pytest.raises(ArtefactError, match=r"the judge 'q16' can't load openai/clip-vit-large-patch14.*hf download"):
        Q16(prompts=prompts, download=False)([plain(0)])


@pytest.mark.parametrize(
    "settings",
    [{"rule": "softmax"}, {"rule": "custom"}, {"texts": ("a",)}, {"texts": ("a", "b"), "prompts": "x.npy"}, {"classes": ("nsfw",)}],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no rule|needs a threshold|two `texts`|knows one"):
        Q16(**settings)  # type: ignore[arg-type]
