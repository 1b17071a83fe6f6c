"""Files of artefacts: whatever stands in their place is read within limits, or refused in words."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight import bundle, guard
from safelight.bank import Bank
from safelight.calibration import Calibration
from safelight.detectors.image_classifier import ImageClassifier
from safelight.detectors.neighbours import Neighbours
from safelight.errors import ArtefactError
from safelight.files import Facts, content_hash, inside, parse_json, read_bytes, read_json, read_tensors, write_json, write_tensors
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.post_filter import PostFilter
from safelight.testing import Containing, tiny_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ArtefactError) as caught:
        call(*args)
    return str(caught.value)


# JSON.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"), ('{"a": NaN}', "NaN is no JSON"), ("[Infinity]", "Infinity is no JSON"),
        ("[" * 100_000, "nested deeper"), ("[" * 65 + "]" * 65, "nested deeper"), (b"\xff\xfe{}", "no UTF-8"), ('"\\ud800"', "half a character"),
        ('{"a": 1} 2', "Extra data"), ("9" * 5000, "digits"),
    ],
)  # fmt: skip
def test_json_is_strict(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_categories=("Cs",))), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",))), inner, max_size=4), max_leaves=20))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_what_is_json_survives(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert content_hash(value) == content_hash(json.loads(json.dumps(value, indent=2)))


def test_json_files_are_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]})
    assert read_json(tmp_path / "a.json") == {"b": [1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", math.nan)
    assert read_json(tmp_path / "a.json") == {"b": [1]}


# What stands in a file's place.


def test_only_files_are_read_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * 100)
    for name, message in (("pipe", "no file, but a folder, a pipe or a device"), ("zero", "a device"), (".", "a folder"), ("loop", "can't be read"), ("none", "can't be read")):  # fmt: skip
        assert message in refusal(read_bytes, tmp_path / name)
        assert "can't be read as a bank" in refusal(Bank.load, tmp_path / name)
    assert "more than the 10" in refusal(read_bytes, tmp_path / "large", 10)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "", "a\0b", None, 5, "out"])
def test_names_lead_nowhere_else(tmp_path: Path, name: Any) -> None:
    (tmp_path / "out").symlink_to("/etc/passwd")
    assert "points outside the bundle" in refusal(inside, tmp_path, name, "method.json")


# Tensors.


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"), (struct.pack("<Q", 10**12), "no header"), (safetensors(b"[1"), "header is damaged"), (safetensors([]), "lists no tensors"),
        (safetensors({"a": entry("F8_E4M3", (4,))}, bytes(4)), "of the type 'F8_E4M3'"), (safetensors({"a": entry(["F32"])}, bytes(4)), "of the type"),
        (safetensors({"a": entry(shape=[10**12], offsets=[0, 4 * 10**12])}), "not where, or as many as"),
        (safetensors({"a": entry(shape=[-1])}, bytes(4)), "has the shape"), (safetensors({"a": entry(shape=[True])}, bytes(4)), "has the shape"),
        (safetensors({"a": entry(), "b": entry()}, bytes(4)), "not where, or as many as"), (safetensors({"a": entry()}, bytes(9)), "belong to no tensor"),
        (safetensors({"a": entry(), "a2": 5}, bytes(4)), "of the type None"), (safetensors({"__metadata__": {"a": 1}}), "metadata are no texts"),
        (safetensors(b'{"a": {}, "a": {}}'), "stands twice"), (safetensors({"a": entry(shape=[1] * 9)}, bytes(4)), "has the shape"),
    ],
)  # fmt: skip
def test_headers_are_checked_before_anything_is_made(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    told = refusal(read_tensors, tmp_path / "a", "a bank", "x/1", "make one")
    assert message in told
    assert told.endswith("; make one")


def test_damage_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_tensors(file, "x/1", {"a": torch.arange(4.0), "b": torch.tensor(True)}, {"facts": "{}"})
    facts, tensors = read_tensors(file, "a thing", "x/1", "make one")
    facts.settle()
    assert torch.equal(tensors["a"], torch.arange(4.0))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert "its content is not what was written" in refusal(read_tensors(file, "a thing", "x/1", "make one")[0].settle)


# Facts.


@pytest.mark.parametrize(
    ("value", "look"),
    [
        (True, lambda facts: facts.number("x")), ("1", lambda facts: facts.number("x")), (10**400, lambda facts: facts.number("x")),
        (1.5, lambda facts: facts.integer("x", 0, 9)), (True, lambda facts: facts.integer("x", 0, 9)), (10**12, lambda facts: facts.integer("x", 0, 9)),
        ([], lambda facts: facts.texts("x")), ([""], lambda facts: facts.texts("x")), ("ab", lambda facts: facts.texts("x")), ([], lambda facts: facts.numbers("x")),
        ([None], lambda facts: facts.numbers("x")), ([], lambda facts: facts.mapping("x")), ({"width": 10**12}, lambda facts: facts.sizes("x")),
        ({"width": [[1]]}, lambda facts: facts.sizes("x")), ("  ", lambda facts: facts.text("x")),
    ],
)  # fmt: skip
def test_facts_are_of_their_type(value: Any, look: Any) -> None:
    told = refusal(look, Facts({"x": value}, "file", "make one"))
    assert told.startswith(("file has x=", "file has x.width="))
    assert told.endswith("; make one")


def test_calibrations_are_checked() -> None:
    whole = vars(Calibration(0.5, 350, 0, 0.01, 0.01, 0.95))
    assert Calibration.read(Facts({"calibration": whole}, "f", "r")) == Calibration(0.5, 350, 0, 0.01, 0.01, 0.95)
    for change in ({"threshold": True}, {"threshold": None}, {"n": 1.5}, {"bound": 7}, {"more": 1}, {"data": 5}):
        refusal(Calibration.read, Facts({"calibration": whole | change}, "f", "r"))


# Bundles.


def test_a_bundle_without_methods_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would guard nothing"):
        bundle.save(tmp_path)
    (tmp_path / "method.json").write_text(json.dumps({"format": bundle.FORMAT, "made_for": "", "methods": []}))
    assert "holds no method, so it would guard nothing" in refusal(bundle.load, tmp_path)


def changed(folder: Path, change: Any) -> None:
    """A bundle's method.json, changed and with a hash of what it says now: what a stranger would send."""
    document = json.loads((folder / "method.json").read_text())
    del document["sha256"]
    change(document)
    (folder / "method.json").write_text(json.dumps(document | {"sha256": content_hash(document)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["methods"][0]["fields"].update(until=True), "until=True is no number"), (lambda d: d["methods"][0]["fields"].update(until="x"), ""),
        (lambda d: d["methods"][0]["fields"].update(until=[0.5]), "no number"), (lambda d: d["methods"][0]["fields"].update(renorm=1), "no switch"),
        (lambda d: d["methods"][0]["fields"].update(safe_weight=10**12), "out of range"), (lambda d: d["methods"][0]["fields"].update(colour="red"), "colour"),
        (lambda d: d["methods"][0]["fields"].update(detector=None), ""), (lambda d: d["methods"][0].update(name=5), ""),
        (lambda d: d["methods"][0]["fields"]["detector"]["fields"].update(word=5), ""), (lambda d: d.update(made_for=5), "made_for is a text"),
        (lambda d: d.update(extra=1), "one part too many"), (lambda d: d["methods"].append(d["methods"][0]["fields"]["detector"]), "not all of its methods"),
    ],
)  # fmt: skip
def test_fields_of_a_bundle_are_of_their_type(change: Any, message: str, tmp_path: Path) -> None:
    bundle.save(tmp_path, DualLatent(detector=Containing()))
    changed(tmp_path, change)
    told = refusal(bundle.load, tmp_path)
    assert "method.json" in told
    assert message in told


def test_a_bundle_tells_damage_and_swapped_files(tmp_path: Path) -> None:
    from fuzz_files import bank

    bundle.save(tmp_path, Block(detector=Neighbours(bank=bank())))
    bundle.load(tmp_path)
    whole = (tmp_path / "method.json").read_text()
    (tmp_path / "method.json").write_text(whole.replace('"k": 5', '"k": 1'))
    assert "changed by hand" in refusal(bundle.load, tmp_path)
    (tmp_path / "method.json").write_text(whole)
    bank().with_shifts(torch.ones(1, 8), torch.ones(1, 8), None).save(tmp_path / "bank-0.safetensors")
    assert "another file than the one that was saved" in refusal(bundle.load, tmp_path)


def test_a_bundle_names_no_model_elsewhere(tmp_path: Path) -> None:
    bundle.save(tmp_path, PostFilter(detector=ImageClassifier(pretrained="owner/name", unsafe=("nsfw",))))
    assert "points outside the bundle" in refusal(bundle.load, tmp_path)
    changed(tmp_path, lambda d: d["methods"][0]["fields"]["detector"]["fields"].update(pretrained="name"))
    assert "no folder in the bundle; only you may name another" in refusal(bundle.load, tmp_path)
    (loaded,) = bundle.load(tmp_path, changes={"image_classifier.pretrained": "owner/name"})
    assert loaded.detector.pretrained == "owner/name"  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [True, "0.5", None, math.nan, [0.5]])
def test_a_guard_takes_numbers_for_numbers(value: Any) -> None:
    method = DualLatent(detector=Containing())
    method.until = value
    with pytest.raises(ValueError, match="until"):
        guard(tiny_pipeline("sd"), method)


# All of it, mutated.


def test_mutated_files_are_refused_or_equal(tmp_path: Path) -> None:
    import fuzz

    odd = []
    for kind in fuzz.kinds():
        folder = tmp_path / kind.name
        folder.mkdir()
        kind.write(folder)
        whole = kind.read(folder)
        for index in range(25):
            what, told = fuzz.outcome(kind, folder, whole, f"test {index}")
            if what not in ("refused", "same"):
                odd.append((kind.name, index, what, told))
    assert not odd
