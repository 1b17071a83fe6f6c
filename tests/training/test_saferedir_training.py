"""Redirectors are trained on trajectories of pairs, the same way whether interrupted or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from safelight import guard
from safelight.bank import Pair
from safelight.compose import call_settings, load_pipeline
from safelight.errors import ArtefactError
from safelight.fitting import Training
from safelight.generator import Generator
from safelight.methods.saferedir import SafeRedir
from safelight.testbed.pairs import concept_pairs, disturbed, neighbours
from safelight.testbed.world import SYNONYMS
from safelight.testing import sample, tiny_pipeline
from safelight.training import redirector_learning, trajectories
from safelight.training.prompt_pairs import Prompts, check, edits_from_testbed, family_of, from_testbed, read_prompts, split_families
from safelight.training.redirector_learning import Config, otsu
from safelight.training.saferedir import examples, gather, learn, recorded
from safelight.training.trajectories import Trajectory

CONFIG = Config(seeds=1, width=32, rank=8, epochs=6, batch=32, lr=3e-3, held_out=0.2, target_fpr=0.2, patience=9, noise=0.1)
SETTINGS = call_settings("testbed/sd") | {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return from_testbed("knife", pairs=60, disturb=0, benign=84)


def generator() -> Generator:
    return Generator(load_pipeline("testbed/sd"), SETTINGS)  # two steps: quick, and with a text encoder that understands


def make(prompts: Prompts, out: Path, calibrating: int = 20, config: Config = CONFIG) -> tuple[Any, dict[str, Any]]:
    return learn(gather(generator(), prompts, config, out, calibrating), "knife", config, out)


@pytest.fixture(scope="module")
def trained(prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("trained")
    return *make(prompts, out), out


def test_training_finds_the_concept_and_leaves_the_rest(trained: Any) -> None:
    redirector, report, out = trained
    assert report["recall"] > 0.9
    assert report["pictures"] == 2 * 60 + 84
    assert redirector.calibration.n == 20
    assert (out / "curves.png").is_file()
    pipe = load_pipeline("testbed/sd")
    with guard(pipe, SafeRedir(redirectors=(redirector,))) as handle:
        pipe(["a knife on the beach", "a cat on the beach"], **SETTINGS)
    assert [record.flagged for record in handle.records] == [True, False]


def test_interrupted_and_resumed_training_has_the_same_curve(
    trained: Any, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    advance, steps = Training._advance, iter(range(22))

    def failing(self: Training, spent: float) -> float:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return advance(self, spent)

    monkeypatch.setattr(Training, "_advance", failing)
    with pytest.raises(KeyboardInterrupt):
        make(prompts, tmp_path)
    monkeypatch.setattr(Training, "_advance", advance)
    again, _ = make(prompts, tmp_path)
    redirector, _, out = trained
    assert json.loads((tmp_path / "fit/validation.json").read_text()) == json.loads((out / "fit/validation.json").read_text())
    for name, tensor in redirector.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor), name
    losses = [[json.loads(line)["loss"] for line in (folder / "fit/curve.jsonl").read_text().splitlines()] for folder in (tmp_path, out)]
    assert losses[0] == losses[1]


def test_a_folder_holds_one_training(trained: Any, prompts: Prompts) -> None:
    with pytest.raises(ArtefactError, match="holds a training of another model, or with other prompts"):
        make(prompts, trained[2], config=replace(CONFIG, seed=1))


def test_recording_changes_no_image_and_resumes(prompts: Prompts, tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    expected = sample(pipe, "a cat on the beach")
    trajectory = Trajectory()
    with guard(pipe, trajectory):
        assert torch.equal(sample(pipe, "a cat on the beach"), expected)
    assert trajectory.kept[0][0].shape == (1, 16, 6, 6)
    few = Prompts(prompts.pairs[:3], prompts.benign[:2])
    first = recorded(generator(), few, 2, tmp_path)
    file = tmp_path / "000004.safetensors"
    kept = file.read_bytes()
    file.unlink()
    second = recorded(generator(), few, 2, tmp_path)
    assert file.read_bytes() == kept
    assert torch.equal(first.latents, second.latents)
    assert first.unsafe.tolist() == ([True] * 2 + [False] * 2) * 3 + [False] * 2
    assert first.twin.tolist() == [2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 12, 13]
    assert first.pair.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 2
    assert [e.seed for e in examples(few, 2)][:4] == [100_000, 100_001, 100_000, 100_001]


def test_a_damaged_recording_is_named(prompts: Prompts, tmp_path: Path) -> None:
    few = Prompts(prompts.pairs[:1], [])
    recorded(generator(), few, 1, tmp_path)
    (tmp_path / "000001.safetensors").write_bytes(b"short")
    with pytest.raises(ArtefactError, match=r"000001.safetensors can't be read.*remove that file"):
        recorded(generator(), few, 1, tmp_path)


def test_masks_mark_the_words_that_were_replaced(prompts: Prompts, tmp_path: Path) -> None:
    pair = Pair("a cat and a knife on the beach", "a cat and a spoon on the beach", "knife")
    records = recorded(generator(), Prompts([pair], []), 1, tmp_path)
    mask = records.masks()
    assert mask[0, 5] == 1, "the sixth token, after the marker and five words"
    assert mask[0, :5].sum() == 0, "CLIP reads from left to right: nothing before it changes"
    assert mask[1].sum() == 0


def test_otsu_parts_two_heaps() -> None:
    values = torch.cat([torch.rand(100) * 0.2, 0.8 + torch.rand(300) * 0.2])
    assert float(values[:100].max()) - 1e-6 <= otsu(values) <= 0.81


def test_inputs_can_be_hidden() -> None:
    given = (torch.ones(1, 4, 2, 2), torch.ones(1, 3, 5), torch.ones(1), torch.ones(1, 7))
    hidden = redirector_learning.visible(*given, ("text",))
    assert [float(part.abs().sum()) > 0 for part in hidden if part is not None] == [False, True, False, True]
    hidden = redirector_learning.visible(*given, ("latents", "time"))
    assert [float(part.abs().sum()) > 0 for part in hidden if part is not None] == [True, False, True, False]


# Prompts


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a knife on the beach", "on the beach"), r"5 and 3 tokens; replace words"),
        (("a knife on the beach", "a knife on the beach"), "sees no difference"),
        (("a knife", "the spoon"), r"only 0 of 2 tokens are the same"),
    ],
)
def test_pairs_that_do_not_match_are_named(pair: tuple[str, str], message: str) -> None:
    good = Pair("a cat and a knife", "a cat and a spoon", "knife")
    with pytest.raises(ValueError, match=f"pair 2.*{message}"):
        check([good, Pair(*pair, "knife")], tiny_pipeline("flux"))


def test_no_pairs_and_too_few_benign_prompts_are_refused(prompts: Prompts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no pairs"):
        check([], tiny_pipeline("sd"))
    with pytest.raises(ValueError, match="there are 84 benign prompts, of which 84 are needed"):
        make(prompts, tmp_path, 84)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unsafe,safe\na knife,\n", r"row 1 \(line 2\): the column 'safe' is empty"),
        ("unsafe\nx\n", "has no column 'safe'"),
        ("", "is empty"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(file, None, "knife")


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("unsafe,safe\na knife, a spoon\n")
    (tmp_path / "benign.txt").write_text("a cat\n\na dog\n")
    assert read_prompts(tmp_path / "pairs.csv", tmp_path / "benign.txt", "k") == Prompts(
        [Pair("a knife", "a spoon", "k")], ["a cat", "a dog"]
    )


@pytest.mark.parametrize("concept", ["weapons", "beer", "pencil sketch"])
def test_testbed_pairs_differ_in_the_concept_only_and_use_no_synonym(concept: str) -> None:
    random = Random(0)
    pairs = concept_pairs(random, concept, 120)
    pairs += [disturbed(random, pair) for pair in pairs]
    check(pairs, tiny_pipeline("flux"))
    forbidden = {word for words in SYNONYMS.values() for word in words}
    for text in (*(text for pair in pairs for text in pair[:2]), *neighbours(random, concept, 50)):
        assert not forbidden & set(text.replace(",", "").replace(":", "").split())


def test_families_are_held_out_whole() -> None:
    pairs = concept_pairs(Random(0), "weapons", 200)
    train, held_out = split_families(pairs, 0.2, 0)
    assert sorted(train + held_out) == list(range(200))
    assert not {family_of(pairs[i]) for i in train} & {family_of(pairs[i]) for i in held_out}
    assert family_of(Pair("a cat and a knife on the beach", "", "")) == family_of(Pair("on the beach: a knife, a cat", "", ""))
    leaky = split_families(pairs, 0.2, 0, whole=False)
    assert {family_of(pairs[i]) for i in leaky[0]} & {family_of(pairs[i]) for i in leaky[1]}


def test_instructions_have_pictures_and_may_take_the_concept_away(tmp_path: Path) -> None:
    prompts = edits_from_testbed("weapons", pairs=12, benign=40)
    check(prompts.pairs, tiny_pipeline("kontext"))
    assert len(prompts.pictures) == 52
    assert any(word in text for text in prompts.benign for word in ("knife", "sword", "bomb", "axe"))
    few = replace(prompts, pairs=prompts.pairs[:2], benign=(), pictures=prompts.pictures[:2])
    kontext = Generator(load_pipeline("testbed/kontext"), call_settings("testbed/kontext") | {"num_inference_steps": 2})
    records = recorded(kontext, few, 1, tmp_path)
    assert records.latents.shape == (4, 2, 16, 8, 8), "the source's tokens are not part of the latents"


def test_processes_share_the_batches(prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Prompts(prompts.pairs[:20], [])
    for index in range(2):
        monkeypatch.setattr(trajectories, "workers", lambda index=index: trajectories.Alone(index, 2))
        trajectories.record(generator(), examples(few, 1), tmp_path, batch=8)
        assert len(list(tmp_path.glob("*.safetensors"))) == (24, 40)[index]
