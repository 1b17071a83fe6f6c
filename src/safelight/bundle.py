"""A method and its weights in one folder: `method.json` and safetensors files. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .anchors import Anchors
from .bank import Bank
from .calibration import Calibration
from .detector import Detector
from .dictionary import Dictionary
from .encoders import SentenceEncoder
from .errors import ArtefactError
from .files import LARGEST_FILE, Facts, content_hash, inside, read_bytes, read_json, write_json
from .method import Method
from .picture_model import PictureModel
from .redirector import Redirector
from .registry import Registry
from .safe_guidance import Arithmetic, InContext, NearestTwin, Rewrite
from .schema import check

FORMAT = "safelight-bundle/2"
METHODS: Registry[Method] = Registry("safelight.methods", Method)
DETECTORS: Registry[Detector[Any]] = Registry("safelight.detectors", Detector)
ARTEFACTS: Mapping[str, Any] = {
    "bank": Bank, "anchors": Anchors, "redirector": Redirector, "dictionary": Dictionary, "picture_model": PictureModel,
}  # fmt: skip
"""Weights with a file format of their own, by the name of their files."""
PROVIDERS: Mapping[str, type] = {kind.__name__: kind for kind in (InContext, NearestTwin, Rewrite, Arithmetic)}
ENCODERS: Mapping[str, type] = {SentenceEncoder.__name__: SentenceEncoder}


def save(folder: str | Path, *methods: Method, made_for: str = "") -> None:
    """Writes methods, outermost first, with the name of the model they were made for.

    Raises:
        ValueError: if there is no method, or a field holds something a bundle can't store.
    """
    if not methods:
        raise ValueError("a bundle without a method would guard nothing; give at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder)
    document: dict[str, Any] = {"format": FORMAT, "made_for": made_for, "methods": [writer.describe(method) for method in methods]}
    document["files"] = {name: hashlib.sha256(read_bytes(folder / name, LARGEST_FILE)).hexdigest() for name in writer.files.values()}
    write_json(folder / "method.json", {**document, "sha256": content_hash(json.loads(json.dumps(document)))})


def load(folder: str | Path, *, made_for: str | None = None, changes: Mapping[str, Any] | None = None) -> list[Method]:
    """Reads the methods of a bundle.

    Args:
        folder: where it lies.
        made_for: the model it will be used with; a bundle made for another one is refused. None: don't check.
        changes: `{"dual_latent.until": 0.3}` overrides fields.

    Raises:
        ArtefactError: if it is missing, damaged, or made for another model.
        ValueError: if a field is unknown.
    """
    folder = Path(folder)
    document = _document(folder)
    if made_for is not None and document.get("made_for") not in ("", made_for):
        raise ArtefactError(
            f"{folder} was made for {document.get('made_for')}, not for {made_for}; make one for it, or load with made_for=None to use it all the same"
        )
    changes = dict(changes or {})
    reader = _Reader(folder, changes, document.get("files", {}))
    methods = [reader.build(described) for described in document["methods"]]
    if not all(isinstance(method, Method) for method in methods):
        raise ArtefactError(f"{folder}/method.json is damaged: not all of its methods are methods")
    for method in methods:
        _check_fields(method, folder)
    own = {name: value for name, value in document.items() if name != "sha256"}
    if document.get("sha256") != content_hash(own):
        raise ArtefactError(
            f"{folder}/method.json is damaged, or was changed by hand (its sha256 differs); save the methods again, or load them with changes "
            "instead of changing the file"
        )
    if changes:
        raise ValueError(f"{folder} has no field {sorted(changes)[0]!r}")
    return methods


def _document(folder: Path) -> dict[str, Any]:
    """What `method.json` says, once it is found whole."""
    file = folder / "method.json"
    try:
        document = read_json(file)
    except ArtefactError as error:
        raise ArtefactError(f"{folder} is no bundle ({error}); a bundle is a folder with a method.json") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        document = document if isinstance(document, dict) else {}
        raise ArtefactError(f"{file} has the format {document.get('format')!r}, not {FORMAT!r}")
    facts = Facts(document, str(file), "save the methods again, or load them with changes instead of changing the file")
    facts.only(("format", "made_for", "methods", "files", "sha256"))
    files = document.get("files", {})
    if not isinstance(document.get("made_for", ""), str) or not isinstance(files, dict) or not all(map(_is_text, files.values())):
        raise facts.error("is damaged: made_for is a text, and files are names with their sha256")
    if not isinstance(document.get("methods"), list) or not document["methods"]:
        raise facts.error("holds no method, so it would guard nothing")
    return document


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_fields(part: Any, folder: Path) -> None:
    """Raises ArtefactError where a stored field isn't what a method's, or its parts', fields may be."""
    try:
        check(part)
    except ValueError as error:
        raise ArtefactError(f"{folder}/method.json: {error}") from error


class _Writer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[int, str] = {}

    def describe(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        for kind, cls in ARTEFACTS.items():
            if isinstance(value, cls):
                return {"kind": kind, "file": self._file(kind, value)}
        if isinstance(value, Calibration):
            return {"kind": "calibration", "fields": vars(value)}
        if isinstance(value, Mapping):
            return {"kind": "mapping", "fields": {key: self.describe(item) for key, item in value.items()}}
        if isinstance(value, (tuple, list)):
            return [self.describe(item) for item in value]
        if is_dataclass(value) and not isinstance(value, type):
            kind, name = _name_of(value)
            stored = [f.name for f in fields(value) if f.init and "local" not in f.metadata]
            return {"kind": kind, "name": name, "fields": {field: self.describe(getattr(value, field)) for field in stored}}
        raise ValueError(
            f"a bundle can't store {type(value).__name__}; artefacts are numbers, texts, banks, anchors, redirectors, dictionaries, models of pictures, detectors and methods"
        )

    def _file(self, kind: str, artefact: Any) -> str:
        if id(artefact) not in self.files:
            self.files[id(artefact)] = f"{kind}-{len(self.files)}.safetensors"
            artefact.save(self.folder / self.files[id(artefact)])
        return self.files[id(artefact)]


def _name_of(value: Any) -> tuple[str, str]:
    if isinstance(value, Method):
        return "method", value.name
    if isinstance(value, Detector):
        return "detector", type(value).__module__.rsplit(".", 1)[-1]
    if type(value).__name__ in PROVIDERS:
        return "guidance", type(value).__name__
    if type(value).__name__ in ENCODERS:
        return "encoder", type(value).__name__
    raise ValueError(f"a bundle can't store {type(value).__name__}")


class _Reader:
    def __init__(self, folder: Path, changes: dict[str, Any], hashes: Mapping[str, str]) -> None:
        self.folder, self.changes, self.hashes = folder, changes, hashes
        self.files: dict[str, Any] = {}

    def build(self, described: Any) -> Any:
        """A part from its description.

        Raises:
            ArtefactError: if it describes none.
        """
        try:
            return self._built(described)
        except (KeyError, AttributeError, TypeError) as error:
            raise ArtefactError(f"{self.folder}/method.json is damaged: it lacks {error}") from error

    def _artefact(self, kind: str, name: Any) -> Any:
        path = inside(self.folder, name, f"{self.folder}/method.json")
        if name not in self.files:
            if hashlib.sha256(read_bytes(path, LARGEST_FILE)).hexdigest() != self.hashes.get(name):
                raise ArtefactError(
                    f"{path} is damaged, or another file than the one that was saved (its sha256 differs); save the methods again"
                )
            self.files[name] = ARTEFACTS[kind].load(path)
        if not isinstance(self.files[name], ARTEFACTS[kind]):
            raise ArtefactError(f"{self.folder}/method.json uses {name} for two kinds of artefact")
        return self.files[name]

    def _built(self, described: Any) -> Any:
        if isinstance(described, list):
            return tuple(self.build(item) for item in described)
        if not isinstance(described, dict):
            return described
        kind = str(described.get("kind"))
        if kind in ARTEFACTS:
            return self._artefact(kind, described["file"])
        given = {name: self.build(value) for name, value in described.get("fields", {}).items()}
        if kind == "mapping":
            return given
        if kind == "calibration":
            return Calibration.read(Facts({"calibration": described["fields"]}, f"{self.folder}/method.json", "save the methods again"))
        makers: dict[str, Callable[[str], Any]] = {
            "method": METHODS.__getitem__, "detector": DETECTORS.__getitem__, "guidance": PROVIDERS.__getitem__,
            "encoder": ENCODERS.__getitem__,
        }  # fmt: skip
        if kind not in makers:
            raise ArtefactError(f"{self.folder}/method.json holds an unknown kind of part: {kind!r}")
        name = described["name"]
        try:
            maker = makers[kind](name)
            local = {f.name for f in fields(maker) if "local" in f.metadata} if is_dataclass(maker) else set()
            if local & set(given):  # a stranger's bundle must not say where this machine sends its keys
                raise ArtefactError(
                    f"{self.folder}/method.json sets {name}.{min(local & set(given))}, which only you may set; pass it as a change"
                )
            self._settle_paths(name, maker, given)
            for key in [key for key in self.changes if key.startswith(f"{name}.") and key.split(".", 1)[1] in {*given, *local}]:
                given[key.split(".", 1)[1]] = self.changes.pop(key)
            return maker(**given)
        except (TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ArtefactError(f"{self.folder}/method.json doesn't fit this version of {name!r}: {error}") from error

    def _settle_paths(self, name: str, maker: Any, given: dict[str, Any]) -> None:
        """A stranger's bundle must not lead elsewhere: a model that it names is a folder in it, or the one that a package brings."""
        for field in fields(maker) if is_dataclass(maker) else ():
            value, where = given.get(field.name), f"{name}.{field.name}"
            if "path" not in field.metadata or value is None or value == field.default or where in self.changes:
                continue
            folder = inside(self.folder, value, f"{self.folder}/method.json, {where},")
            if not folder.is_dir():
                raise ArtefactError(
                    f"{self.folder}/method.json sets {where}={value!r}, which is no folder in the bundle; only you may name another: pass it as a change"
                )
            given[field.name] = str(folder)
