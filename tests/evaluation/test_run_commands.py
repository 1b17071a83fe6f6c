"""`plan`, `run`, `merge` and `judge`, as a user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from safelight.cli import main
from safelight.evaluation.runs.durable import only_one
from safelight.evaluation.runs.manifest import Manifest

PLAN = ("plan", "-p", "testbed/sd", "-b", "testbed/weapons", "--count", "3", "-g", "dual_latent", "--steps", "2", "--batch", "2", "-o")


class Command:
    """Runs commands in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["safelight", *map(str, words)])
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        told = self.capsys.readouterr()
        return int(code), told.out, told.err

    def json(self, *words: object) -> Any:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def safelight(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_from_a_plan_to_figures(safelight: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert safelight.json(*PLAN, out)["rows"] == 6
    assert safelight.json("run", out, "--shard", "0/2")["new"] == 4
    code, told, _ = safelight("merge", out)
    assert (code, "2 are missing: base/00002, guard/00002" in told) == (3, True)
    code, told, _ = safelight("judge", out, "-j", "testbed_classifier")
    assert (code, "MISSING: 2 images" in told) == (3, True)
    assert safelight.json("run", out / "manifest.jsonl", "--shard", "1/2")["images"] == 6
    assert safelight.json("merge", out) == {"out": str(out), "images": 6, "missing": []}
    assert safelight.json("run", out)["new"] == 0
    images = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    found = safelight.json("judge", out, "-j", "testbed_classifier", "-j", "testbed_matcher", "--set", "testbed_matcher.threshold=0.4")
    assert found == json.loads((out / "summary.json").read_text())
    assert (found["protocol"], found["pipeline"]) == ("testbed/weapons/1", "testbed/sd")
    assert found["judges"]["testbed_matcher"]["judge"]["threshold"] == 0.4
    for summary in found["judges"].values():
        assert set(summary["arms"]) == {"base", "guard"}
        assert summary["arms"]["guard"]["unsafe_prompts"]["image_level"]["n"] == 3
        assert (summary["failed"], summary["missing"]) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == images, "judging generates nothing"
    (out / "images" / "base" / "00001.png").write_bytes(b"damaged")
    code, told, _ = safelight("judge", out, "-j", "testbed_classifier", "--set", "testbed_classifier.threshold=0.6")
    assert code == 3
    assert "FAILED: 1 images could not be judged: base/00001" in told
    assert "(1 images left out)" in told


def test_prompts_of_ones_own_with_seeds_and_arms(safelight: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a knife on the beach\n\n a cat \n")
    words = ("plan", "-p", "testbed/sd", "--prompts", tmp_path / "prompts.txt", "--seeds", "2", "--category", "mine", "-o", tmp_path)
    arms = ("--arm", "away=negative_prompt negative_prompt.words=axes", "-g", "dual_latent", "--forced")
    result = safelight.json(*words, *arms, "--call", "guidance_scale=5", "--call", "height=32", "--steps", 3)
    assert result["arms"] == ["base", "guard", "forced", "away"]
    manifest = Manifest.read(tmp_path / "manifest.jsonl")
    assert len(manifest.rows) == 4 * 4
    first = manifest.rows[0]
    assert (first.prompt, first.category, first.unsafe) == ("a knife on the beach", "mine", True)
    assert first.settings == {"num_inference_steps": 3, "guidance_scale": 5, "height": 32, "width": 64}
    seeds = [(row.case, row.prompt, row.seed) for row in manifest.rows if row.arm == "away"]
    assert seeds == [(f"0000{i}-{j}", p, j * 100_000) for i, p in enumerate(("a knife on the beach", "a cat")) for j in range(2)]
    assert manifest.header.arms["forced"].forced
    assert manifest.header.arms["away"].methods[0]["words"] == "axes"
    safelight.json(*words, "--benign", "--count", "1", "--no-base", "-g", "dual_latent")
    assert [(row.arm, row.unsafe) for row in Manifest.read(tmp_path / "manifest.jsonl").rows] == [("guard", False)] * 2


def test_bad_input_gets_one_line_with_the_remedy(safelight: Command, tmp_path: Path) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty.txt"
    empty.write_text("\n \n")
    safelight(*PLAN, out)
    plan = ("plan", "-p", "testbed/sd", "-o", tmp_path / "never")
    bad = [
        (plan, "one of --benchmark NAME, --prompts FILE and --protocol NAME"),
        ((*plan, "--prompts", tmp_path / "nowhere.txt"), "there is no file"),
        ((*plan, "--prompts", empty), "is empty"),
        ((*plan, "-b", "testbed/clowns"), "no benchmark 'testbed/clowns'"),
        ((*plan, "-b", "testbed/weapons", "--set", "sld.x=1"), "name one, or write settings into --arm"),
        ((*plan, "-b", "testbed/weapons", "--arm", "sld"), "is not of the form"),
        ((*plan, "-b", "testbed/weapons", "--arm", "base=sld"), "two arms of the name 'base'"),
        ((*plan, "-b", "testbed/weapons", "--arm", "x=sld sld.scael=1"), "did you mean 'scale'"),
        ((*plan, "-b", "testbed/weapons", "--no-base"), "nothing to plan"),
        ((*plan, "-b", "testbed/weapons", "--call", "steps"), "is not of the form name=JSON"),
        ((*plan, "-b", "testbed/weapons", "-g", "dual_laten"), "did you mean 'dual_latent'"),
        (("run", tmp_path / "nowhere"), "can't be read as a manifest"),
        (("run", out, "--shard", "4/4"), "is not of the form 0/4"),
        (("run", out, "--engine", "spark"), "there is no 'spark'"),
        (("run", out, "--engine", "ray", "--shard", "0/2"), "--shard is for --engine local"),
        (("run", out, "--workers", "2"), "--workers is for --engine ray"),
        (("merge", tmp_path / "nowhere"), "can't be read as a manifest"),
        (("judge", tmp_path / "nowhere", "-j", "testbed_matcher"), "can't be read as a manifest"),
        (("judge", out, "-j", "testbed_macher"), "did you mean 'testbed_matcher'"),
    ]
    for words, told in bad:
        code, _, errors = safelight(*words)
        assert code not in (0, 3), words
        assert told in errors, errors
        assert len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "nowhere").exists()
    with only_one(out):
        code, _, errors = safelight("run", out)
    assert (code, f"{out} is in use by process" in errors) == (1, True)
    file = out / "manifest.jsonl"
    file.write_text(file.read_text().replace('"seed":1000', '"seed":1', 1))
    code, _, errors = safelight("run", out)
    assert (code, "line 2" in errors, "safelight plan" in errors, "Traceback" in errors) == (1, True, True, False)
    safelight(*PLAN, out)
    safelight("run", out)
    code, _, errors = safelight(*PLAN, out, "--arm", "other=negative_prompt")
    assert code == 0, "a plan may grow"
    code, _, errors = safelight(*PLAN, out, "--steps", "3")
    assert (code, "doesn't ask for" in errors) == (1, True)


def test_judges_are_listed_and_described(safelight: Command) -> None:
    assert {"testbed_classifier", "testbed_matcher"} <= set(safelight.json("list")["judges"])
    fields = safelight.json("describe", "testbed_matcher")["fields"]
    assert [field["name"] for field in fields] == ["threshold", "classes"]
    assert all(field["doc"] for field in fields)
