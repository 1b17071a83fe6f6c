"""Runs resume, belong to one folder, and say what they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelight import testbed
from safelight.compose import build
from safelight.errors import ArtefactError
from safelight.evaluation import evaluate as module
from safelight.evaluation.benchmarks.testbed import benchmarks, find
from safelight.evaluation.evaluate import Sizes, evaluate
from safelight.evaluation.runs.durable import only_one
from safelight.evaluation.runs.generate import read_outcomes
from safelight.evaluation.runs.judging import build_judges, judge_run
from safelight.evaluation.runs.manifest import Manifest
from safelight.evaluation.runs.summary import summarise
from safelight.generator import Generator

SIZES = Sizes(unsafe=6, benign=4, proximal=4)
NAMES = {
    "unsafe_rate_base", "unsafe_rate", "erase_rate", "retention", "untouched", "over_refusal", "sadi", "sadi_s", "sadi_delta_p",
    "sadi_delta_p_forced", "overhead_benign", "overhead_unsafe", "fsr", "alignment_base", "alignment", "frechet",
}  # fmt: skip


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(testbed.load("sd"), testbed.settings("sd") | {"num_inference_steps": 4})


def run(generator: Generator, out: Path, **changes: Any) -> dict[str, Any]:
    return evaluate(generator, build(["dual_latent"], "testbed/sd"), "testbed/weapons", out, sizes=SIZES, batch=4, **changes)


def test_results_name_all_that_is_promised(generator: Generator, tmp_path: Path) -> None:
    results = run(generator, tmp_path, description={"pipeline": "testbed/sd", "guard": "dual_latent"})
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert {"protocol", "guard", "pipeline", "n", "metrics", "judges", "versions", "command"} <= set(results)
    assert set(results["metrics"]) == NAMES
    assert set(results["judges"]) == {"classifier", "matcher"}
    assert all(set(figure) == {"value", "low", "high", "n"} for figure in results["metrics"].values())
    assert results["metrics"]["untouched"]["value"] == 1
    assert results["protocol"] == "testbed/weapons/1"
    check_that_a_part_is_a_run_like_any_other(tmp_path / "unsafe", results)


def check_that_a_part_is_a_run_like_any_other(part: Path, results: dict[str, Any]) -> None:
    manifest = Manifest.read(part / "manifest.jsonl")
    assert f"{manifest.header.protocol}/{manifest.header.version}" == results["protocol"]
    assert [row.to_case() for row in manifest.rows if row.arm == "base"] == find("testbed/weapons").cases(SIZES.unsafe)
    judged = judge_run(part, build_judges(["testbed_classifier"]))["testbed_classifier"]
    again = summarise(manifest, judged)["arms"]["guard"]["unsafe_prompts"]["image_level"]
    named = results["judges"]["classifier"]["unsafe_rate"]
    assert again["n"] == named["n"]
    assert again["value"] >= named["value"], "an unsafe object that the prompt doesn't name counts here, and not there"


def test_an_interrupted_run_goes_on_where_it_stopped(generator: Generator, tmp_path: Path) -> None:
    calls = 0

    class Interrupted(Exception): ...

    class Dying(Generator):
        def __call__(self, cases: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise Interrupted
            return super().__call__(cases)

    with pytest.raises(Interrupted):
        run(Dying(generator.pipe, generator.settings), tmp_path)
    finished = {(o.arm, o.case): o.sha256 for o in read_outcomes(tmp_path / "unsafe")}
    assert finished
    with (tmp_path / "unsafe" / "outcomes.jsonl").open("a") as file:
        file.write('{"case": "000')  # as a full disk or a power cut leaves it
    results = run(generator, tmp_path)
    after = {(o.arm, o.case): o.sha256 for o in read_outcomes(tmp_path / "unsafe")}
    assert finished.items() <= after.items()
    assert len(after) == 2 * SIZES.unsafe
    again = run(generator, tmp_path)
    assert again["metrics"] == results["metrics"]


def test_a_folder_belongs_to_one_run(generator: Generator, tmp_path: Path) -> None:
    run(generator, tmp_path)
    with pytest.raises(ArtefactError, match="holds a run with other settings"):
        run(generator, tmp_path, description={"guard": "another"})
    with only_one(tmp_path), pytest.raises(ArtefactError, match="is in use by process"):
        run(generator, tmp_path)


def test_damage_is_named(generator: Generator, tmp_path: Path) -> None:
    run(generator, tmp_path)
    file = tmp_path / "unsafe" / "outcomes.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(["garbage", *lines[1:]]) + "\n")
    with pytest.raises(ArtefactError, match="line 1 is damaged"):
        run(generator, tmp_path)
    file.write_text("\n".join(lines) + "\n")
    (tmp_path / "unsafe" / json.loads(lines[0])["image"]).unlink()
    with pytest.raises(ArtefactError, match="can't be read"):
        run(generator, tmp_path)


def test_benchmarks_are_held_out_distinct_and_reproducible() -> None:
    for benchmark in (*benchmarks("test"), *benchmarks("dev")):
        cases = benchmark.cases(20)
        assert [case.prompt for case in cases] == [case.prompt for case in benchmark.cases(20)]
        if cases[0].image is None:
            assert len({(case.prompt, case.seed) for case in cases}) == 20
            assert max(Counter(case.prompt for case in cases).values()) <= benchmark.seeds
        assert all(case.truth is not None for case in cases)
        if "benign" in benchmark.name or "proximal" in benchmark.name:
            assert not any(case.unsafe for case in cases)
    unsafe = find("testbed/weapons").cases(200)
    assert all(case.unsafe and case.category == "weapons" for case in unsafe)
    assert not {case.prompt for case in unsafe} & {case.prompt for case in find("testbed-dev/weapons").cases(60)}


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(ValueError, match="no benchmark 'testbed/clowns'"):
        find("testbed/clowns")


def test_equal_pictures_are_looked_at_once() -> None:
    seen = []

    class Counting:
        name, version = "counting", "1"

        def look(self, pictures: Any) -> list[Any]:
            seen.extend(pictures)
            return list(range(len(pictures)))

    picture = np.zeros((2, 2, 3), np.uint8)
    assert module.look(Counting(), [picture, picture + 1, picture]) == [0, 1, 0]
    assert len(seen) == 2
