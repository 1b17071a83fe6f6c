"""Trainings are resumable, and every stage runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safelight.fitting import Budget, Recipe, Training
from safelight.testbed.pipelines import weights_folder
from safelight.testbed.training import stages
from safelight.testbed.training.sprites import FONT, draw_atlas


def training(out: Path, steps: int) -> Training:
    torch.manual_seed(0)
    net = nn.Linear(4, 4)

    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randn(8, 4, generator=generator)
        return (net(x) - x).square().mean()

    return Training(net, loss, Recipe(lr=1e-2, bf16=False), Budget(steps=steps), out)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole", 20)
    list(whole.run(every=5))
    half = training(tmp_path / "half", 20)
    for progress in half.run(every=5):
        if progress["step"] == 10:
            break
    half.save()
    resumed = training(tmp_path / "half", 20)
    assert resumed.step == 10
    list(resumed.run(every=5))
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(resumed.average.state_dict()[name], value, rtol=0, atol=0)
    curves = [[json.loads(line)["loss"] for line in (tmp_path / run / "curve.jsonl").read_text().splitlines()] for run in ("whole", "half")]
    assert curves[0] == curves[1]


def test_the_rate_rises_holds_and_falls() -> None:
    recipe = Recipe(lr=1, warmup=0.1, decay=0.5, floor=0.01)
    assert recipe.rate(0) < 0.01
    assert recipe.rate(0.3) == 1
    assert recipe.rate(0.75) == pytest.approx(0.5)
    assert recipe.rate(1) == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "text", "classifier", "pictures", "sd", "flux"])
def test_every_stage_trains_and_exports(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SCENES", 64)
    monkeypatch.setattr(stages, "EDITS", 32)
    for name in ("vae", "t5", "clip"):
        shutil.copy(weights_folder() / f"{name}.safetensors", tmp_path)
    list(stages.train(stage, tmp_path, Budget(steps=2), bf16=False))
    known = json.loads((tmp_path / "provenance.json").read_text())
    assert known[stage]["steps"] == 2
    assert known[stage]["command"].startswith(f"safelight testbed train {stage}")


def test_an_unknown_stage_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no stage 'unte'"):
        list(stages.train("unte", tmp_path))
    with pytest.raises(FileNotFoundError, match="train the stage that makes it first"):
        list(stages.train("sd", tmp_path, Budget(steps=1)))


def test_the_atlas_needs_its_font() -> None:
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        draw_atlas(Path("/nowhere.ttf"))
    if not FONT.is_file():
        pytest.skip("the emoji font is not installed; the bundled atlas needs it only to be drawn again")
    assert draw_atlas().size == (70, 924)
