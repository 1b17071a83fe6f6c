"""Each failure signature is found in a guard that really fails so, and none in one that works."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight import testbed
from safelight.compose import build
from safelight.detector import Forced
from safelight.detectors.keywords import Keywords
from safelight.errors import ArtefactError
from safelight.evaluation.case import Estimate
from safelight.evaluation.diagnosing.diagnosis import SIGNATURES, diagnose
from safelight.evaluation.diagnosing.evidence import Evidence
from safelight.evaluation.diagnosing.findings import LIMITS
from safelight.evaluation.diagnosing.judged import read_judged
from safelight.evaluation.diagnosing.strength import Curve, Point, curve
from safelight.evaluation.evaluate import Sizes, evaluate
from safelight.evaluation.metrics.blank import blanked, is_blank
from safelight.evaluation.metrics.diversity import MOST, diversity, remoteness, shift, thinned
from safelight.generator import Generator
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.run import Run
from safelight.safe_guidance import SafeGuidance
from safelight.testbed.world import UNSAFE

SIZES = Sizes(unsafe=8, benign=6, proximal=4)
WORDS = Keywords(words={"weapons": UNSAFE})


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(testbed.load("sd"), testbed.settings("sd") | {"num_inference_steps": 6})


def findings(results: dict[str, Any]) -> dict[str, Any]:
    return {finding["name"]: finding for finding in results["diagnosis"]["findings"]}


class OnePlace(SafeGuidance):
    """Leads every prompt to the same picture."""

    def __call__(self, run: Run, flagged: Any, verdicts: Any) -> Any:
        return run.encode(["a fish on the sea"] * len(flagged))


def fixed_seed(generator: Generator) -> Generator:
    """Cases that all start from the same noise, as a deployment with a fixed seed does."""

    class Fixed(Generator):
        def __call__(self, requests: Any) -> Any:
            return super().__call__([replace(request, seed=7) for request in requests])

    return Fixed(generator.pipe, generator.settings)


def evaluated(generator: Generator, method: Any, out: Path) -> dict[str, Any]:
    return evaluate(generator, [method], "testbed/weapons", out, sizes=SIZES, batch=8)


@pytest.fixture(scope="module")
def healthy(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healthy")
    evaluated(generator, build(["dual_latent"], "testbed/sd")[0], out)
    return out


def test_a_healthy_run_has_no_findings(healthy: Path) -> None:
    results, tmp_path = json.loads((healthy / "results.json").read_text()), healthy
    assert results["diagnosis"] == {"findings": [], "not_assessed": {}}
    assert set(results["categories"]) >= {"weapons", "weapons: knife"}
    assert results["categories"]["weapons"] == {name: results["metrics"][name] for name in results["categories"]["weapons"]}
    rows = read_judged(tmp_path / "unsafe")
    assert len(rows) == 8
    assert rows["00003"].seed == 1003
    assert set(rows["00003"].seen) == {"classifier", "matcher"}
    for judge in ("classifier", "matcher"):
        share = np.mean([row.seen[judge]["guard"] for row in rows.values()])
        assert share == results["judges"][judge]["unsafe_rate"]["value"]


def test_a_detector_that_never_fires_misses(generator: Generator, tmp_path: Path) -> None:
    silent = Keywords(words={"weapons": ["a word that no prompt holds"]})
    found = findings(evaluated(generator, DualLatent(detector=silent), tmp_path))
    assert set(found) == {"missed_detections"}
    assert found["missed_detections"]["severity"] == "severe"
    assert found["missed_detections"]["figures"]["missed"]["value"] >= 0.8
    assert found["missed_detections"]["examples"][0].startswith("unsafe/")


def test_flagged_and_still_unsafe_is_a_weak_intervention(generator: Generator, tmp_path: Path) -> None:
    found = findings(evaluated(generator, DualLatent(detector=WORDS, safe_weight=0.0, until=1.0), tmp_path))
    assert set(found) == {"weak_intervention"}
    assert "safe_weight" in found["weak_intervention"]["advice"]


def test_one_guidance_for_everything_collapses(generator: Generator, tmp_path: Path) -> None:
    method = DualLatent(detector=Forced(WORDS), guidance=OnePlace(), safe_weight=1.0)
    found = findings(evaluated(fixed_seed(generator), method, tmp_path))
    assert {"mode_collapse", "context_loss", "over_censoring"} <= set(found)
    collapse = found["mode_collapse"]
    assert collapse["severity"] == "severe"
    assert collapse["figures"]["diversity"]["value"] < 0.05
    assert collapse["figures"]["benign_diversity"]["value"] < 0.05
    assert "weak_intervention" not in found
    assert "missed_detections" not in found


def test_refusal_collapses_and_loses_context(generator: Generator, tmp_path: Path) -> None:
    found = findings(evaluated(generator, Block(detector=WORDS), tmp_path))
    assert set(found) == {"mode_collapse", "context_loss"}  # withheld pictures are not distorted ones
    assert found["context_loss"]["figures"]["retention"]["value"] < 0.2
    assert "block withholds pictures by design" in found["context_loss"]["advice"]


def test_a_detector_of_harmless_words_censors(generator: Generator, tmp_path: Path) -> None:
    broken = Keywords(words={"weapons": [*UNSAFE, "a", "an"]})
    found = findings(evaluated(generator, Block(detector=broken), tmp_path))
    censoring = found["over_censoring"]
    assert set(censoring["figures"]) == {"over_refusal_benign", "over_refusal_proximal", "blanked", "untouched"}
    assert {example.split("/")[0] for example in censoring["examples"]} == {"benign", "proximal"}
    assert "calibrate" in censoring["advice"]


features = st.integers(4, 12).flatmap(
    lambda n: st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=n, max_size=n).map(torch.tensor)
)


@settings(max_examples=8, deadline=None)
@given(features)
def test_diversity_knows_equal_and_collapsed_pictures(pictures: torch.Tensor) -> None:
    pictures = pictures + torch.eye(len(pictures), 3)  # not all the same
    assert diversity(pictures, pictures).value == pytest.approx(1)
    assert diversity(pictures, 2 * pictures + 1).value == pytest.approx(2, rel=1e-3)
    collapsed = diversity(pictures, pictures[:1].expand(len(pictures), 3))
    assert collapsed.value == pytest.approx(0, abs=1e-6)
    assert collapsed.high == pytest.approx(0, abs=1e-6)


def test_few_or_equal_pictures_have_no_diversity() -> None:
    assert math.isnan(diversity(torch.rand(3, 2), torch.rand(3, 2)).value)
    assert math.isnan(diversity(torch.ones(5, 2), torch.rand(5, 2)).value)
    assert math.isnan(remoteness(torch.rand(3, 2), torch.rand(5, 2), torch.rand(5, 2)).value)


def test_thousands_of_pictures_are_thinned() -> None:
    many = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    assert diversity(many, 3 * many).value == pytest.approx(3)
    assert remoteness(torch.zeros(5000, 4), many, 3 * many).n == MOST
    assert torch.equal(thinned(many)[[0, -1]], many[[0, -1]])


@settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 10))
def test_remoteness_is_a_ratio_of_distances(factor: float) -> None:
    harmless = torch.zeros(4, 2)
    base = torch.nn.functional.normalize(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), dim=1)
    assert remoteness(harmless, base, factor * base).value == pytest.approx(factor, rel=1e-5)
    assert remoteness(harmless, base, torch.zeros(6, 2)).value == 0


def test_a_shift_is_a_share_of_the_variance() -> None:
    base = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert shift(base, Estimate(4.0, 2.0, 8.0, 4)).value == pytest.approx(4 / (8 / 3))
    assert math.isnan(shift(torch.ones(4, 2), Estimate(1.0, 1.0, 1.0, 4)).value)


def test_blank_is_one_plain_colour() -> None:
    assert is_blank(np.full((8, 8, 3), 127))
    assert not is_blank(np.random.default_rng(0).integers(0, 255, (8, 8, 3)))
    assert blanked([True, False], [True, True]).value == 0.5
    for background in testbed.world.BACKGROUNDS:
        assert not is_blank(testbed.scenes.backdrop(background))


@given(st.sampled_from(sorted(LIMITS)), st.floats(0, 2), st.floats(0, 1), st.floats(0, 1))
def test_severe_means_the_whole_interval(name: str, value: float, below: float, above: float) -> None:
    limit, figure = LIMITS[name], Estimate(value, value - below, value + above, 10)
    if not limit.broken_by(figure):
        return
    whole = figure.high < limit.value if limit.healthy == "at least" else figure.low > limit.value
    assert (limit.severity(figure) == "severe") == whole
    assert not limit.broken_by(Estimate(math.nan, math.nan, math.nan, 0))


def evidence(count: int, **changes: Any) -> Evidence:
    pictures = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    action = {"method": "gate", "flagged": False, "threshold": 0.5}
    record = {"flagged": False, "actions": [action]}
    no = [False] * count
    whole = {"base": pictures, "guarded": pictures, "records": [record] * count, "identical": [True] * count, "blank_base": no, "blank": no,
             "unsafe": no, "lost": [0.0] * count}  # fmt: skip
    return Evidence(cases=[f"{index:05d}" for index in range(count)], **(whole | changes))


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_every_unsafe_picture_is_either_missed_or_weak(unsafe: list[bool], flags: list[bool]) -> None:
    records = [{"flagged": flag, "actions": [{"method": "m", "flagged": flag, "threshold": 0.5}]} for flag in flags[: len(unsafe)]]
    part = evidence(len(unsafe), unsafe=unsafe, records=records)
    shown = [signature.show({"unsafe": part}) for signature in SIGNATURES if signature.name in ("missed_detections", "weak_intervention")]
    assert len(shown[0]) + len(shown[1]) == sum(unsafe)
    assert not set(shown[0]) & set(shown[1])


def test_a_method_without_a_detector_misses_nothing() -> None:
    records = [{"flagged": False, "actions": [{"method": "sld", "flagged": False, "threshold": None}]}] * 8
    answer = diagnose({"unsafe": evidence(8, records=records, unsafe=[True] * 8)}, {})
    assert [finding["name"] for finding in answer["findings"]] == ["weak_intervention"]
    assert "missed_detections" in answer["not_assessed"]


def test_what_cannot_be_said_is_said() -> None:
    answer = diagnose({"benign": evidence(4)}, {})
    assert answer["findings"] == []
    assert {"context_loss", "missed_detections", "weak_intervention", "strength_beyond_range"} <= set(answer["not_assessed"])
    json.dumps(answer, allow_nan=False)


def point(setting: float, erase: float, retention: float, disruption: float = 0.0) -> Point:
    return Point(setting, *(Estimate(value, value - 0.02, value + 0.02, 100) for value in (erase, retention, disruption)))


def test_strength_beyond_its_range_names_the_useful_end() -> None:
    rising = [point(0.2, 0.5, 0.99), point(0.5, 0.97, 0.95), point(0.8, 0.98, 0.70), point(1.0, 0.98, 0.40)]
    found = Curve("sld.scale", rising).finding()
    assert found is not None
    assert found["severity"] == "severe"
    assert "sld.scale = 0.5" in found["advice"]
    assert "0.8, 1" in found["advice"]
    falling = [replace(one, setting=1 - one.setting) for one in reversed(rising)]  # a setting that weakens as it grows
    assert "= 0.5" in (Curve("dual_latent.until", falling).finding() or {})["advice"]
    assert Curve("sld.scale", rising[:2]).finding() is None
    few = [replace(rising[1], erase=Estimate(0.9, 0.8, 0.99, 20)), *rising[2:]]  # so few prompts that 0.9 may be 0.98
    assert (Curve("sld.scale", few).finding() or {})["severity"] == "suspected"
    assert Curve("sld.scale", [point(0.2, 0.5, 1.0), point(0.5, 0.8, 0.97), point(1.0, 0.97, 0.9)]).finding() is None  # all of it is useful
    worse = [point(1, 0.98, 0.97, 0.01), point(2, 0.98, 0.97, 0.2), point(3, 0.98, 0.97, 0.4)]
    assert "2, 3 erase no more" in (Curve("uce.scale", worse).finding() or {})["advice"]


def results(setting: str | None, **changes: Any) -> dict[str, Any]:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    same = {"protocol": "p/1", "sizes": {}, "pipeline": "testbed/sd", "guard": "dual_latent", "settings": [setting] if setting else []}
    return same | {"metrics": {"erase_rate": figure, "retention": figure}} | changes


def test_a_curve_needs_one_guard_and_one_setting() -> None:
    found = curve([results("dual_latent.until=0.8"), results(None), results("dual_latent.until=0.5")])
    assert found is not None
    assert found.setting == "dual_latent.until"
    assert [one.setting for one in found.points] == [0.2, 0.5, 0.8]  # 0.2 is the default
    assert curve([results("dual_latent.until=0.8")]) is None
    assert curve([results("dual_latent.until=0.8"), results("dual_latent.safe_weight=0.5")]) is None
    assert curve([results("dual_latent.coupling=free"), results("dual_latent.coupling=coupled")]) is None
    assert curve([results("dual_latent.until=0.8"), results("dual_latent.until=0.5", pipeline="testbed/flux")]) is None
    with pytest.raises(ArtefactError, match=r"same dual_latent\.until"):
        curve([results("dual_latent.until=0.8"), results("dual_latent.until=0.5"), results("dual_latent.until=0.50")])
