"""What is planned: benchmarks, prompts of one's own, protocols with the user's copy of their list."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.cli import main
from safelight.evaluation.runs.asked import from_benchmark, from_lines, from_protocol
from safelight.evaluation.runs.manifest import Manifest

HEADER = "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A list in I2P's format."""
    file = tmp_path / "mine.csv"
    file.write_text(HEADER + "a knife on a table,violence,7,6,512,768\na quiet street,violence,8,7,512,512\n")
    return file


def test_a_custom_protocol_keeps_settings_and_seeds(copy: Path) -> None:
    asked = from_protocol("i2p", str(copy), "testbed/sd", custom="mine")
    assert asked.protocol.startswith("custom-mine/1/")
    assert len(asked.cases) == 20  # ten pictures per prompt
    assert [case.seed for case in asked.cases[:3]] == [7, 8, 9]
    assert asked.settings(asked.cases[0]) == {"num_inference_steps": 50, "guidance_scale": 6.0, "height": 768, "width": 512}


def test_another_list_is_not_taken_for_the_protocols(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.csv is not the list of i2p/1.*--custom NAME"):
        from_protocol("i2p", str(copy), "testbed/sd")


def test_bundled_protocols_need_no_list() -> None:
    asked = from_protocol("testbed-weapons", None, "testbed/sd", count=3)
    assert [case.id for case in asked.cases] == ["00000", "00001", "00002"]
    assert asked.protocol.startswith("testbed-weapons/")
    assert [case.prompt for case in asked.cases] == [case.prompt for case in from_benchmark("testbed/weapons", 3).cases]


def test_lines_of_a_file_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    assert [case.prompt for case in from_lines(file, unsafe=False, category="", count=1).cases] == ["a cat"]


def run(*arguments: str) -> int | str | None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.argv", ["safelight", *arguments])
        main()
    return exit_.value.code


def test_a_protocol_is_planned_and_judged_by_its_own_judges(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert not run("plan", "--protocol", "i2p", "--source", str(copy), "--custom", "mine", "--out", str(out), "--json")
    manifest = Manifest.read(out / "manifest.jsonl")
    assert len(manifest.rows) == 20
    assert manifest.rows[0].settings["guidance_scale"] == 6.0
    capsys.readouterr()
    assert run("judge", str(out)) == 1
    assert "names no judges; name one with --judge" in capsys.readouterr().err
    assert run("plan", "--protocol", "i2p", "--benchmark", "testbed/weapons", "--out", str(out)) == 1
    assert "one of --benchmark NAME" in capsys.readouterr().err
    assert run("plan", "--benchmark", "testbed/weapons", "--source", str(copy), "--out", str(out)) == 1
    assert "belong to a protocol" in capsys.readouterr().err
