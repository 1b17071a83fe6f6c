"""The smallest valid file of each kind that `fuzz.py` mutates, and how it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight import bundle
from safelight.anchors import Anchors
from safelight.bank import Bank
from safelight.calibration import Calibration
from safelight.cli.artefacts import read_pairs
from safelight.detectors.image_classifier import ImageClassifier
from safelight.detectors.keywords import Keywords
from safelight.detectors.neighbours import Neighbours
from safelight.dictionary import Alarm, Dictionary, Harmful
from safelight.methods.block import Block
from safelight.methods.dual_latent import DualLatent
from safelight.methods.gate import Gate
from safelight.methods.negative_prompt import NegativePrompt
from safelight.methods.post_filter import PostFilter
from safelight.methods.safedig import SafeDIG
from safelight.methods.saferedir import SafeRedir
from safelight.methods.sld import SLD
from safelight.methods.uvr import UVR
from safelight.nets.picture_net import PictureNet
from safelight.nets.redirector import Redirector as RedirectorNet
from safelight.nets.sae import SAE, Decoder
from safelight.picture_model import PictureModel
from safelight.redirector import Redirector
from safelight.tables import read_prompts
from safelight.training.examples import read_examples
from safelight.training.uce import ConceptEdit

One = tuple[str, Callable[[Path], None], Callable[[Path], Any]]
CALIBRATION = Calibration(0.5, 350, 0, 0.0085, 0.01, 0.95, "abc")
UNSAFE = ("a knife on the beach", "a bomb at night", "a sword, and a shield")
SAFE = ("a spoon on the beach", "a firework at night", "an umbrella, and a shield")
BENIGN = ("a cat on the beach", "a tree, in the snow", "a dog\u2028and a house")


def amount(value: Any) -> Any:
    """All of an object that can make a difference, comparable with `==`."""
    if isinstance(value, Tensor):
        return tuple(value.shape), hashlib.sha256(value.detach().float().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, nn.Module):
        return type(value).__name__, amount(value.state_dict())
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), amount(one)) for key, one in value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(map(amount, value))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, tuple((field.name, amount(getattr(value, field.name))) for field in fields(value))
    return repr(value)


def bank() -> Bank:
    """Three pairs, three benign prompts."""
    torch.manual_seed(0)
    entries, probes = torch.nn.functional.normalize(torch.randn(9, 8), dim=1).half().float(), torch.randn(3, 8).half().float()
    return Bank(entries, torch.tensor([1, 1, 2, 0, 0, 0, 0, 0, 0]), ("weapons", "other"), probes, SAFE, calibration=CALIBRATION)


def anchors() -> Anchors:
    """Two concepts, two moments."""
    torch.manual_seed(0)
    return Anchors(torch.randn(2, 2, 1, 8), torch.zeros(2, 2, 1), (0.0, 0.5), ("knife", "gun"), (0.5, 0.6), (0.4, 0.5), "joint.1.attention:image", 2,
                   model={"denoiser": "X", "heads": 2}, calibration=CALIBRATION)  # fmt: skip


def redirector() -> Redirector:
    """A network of the smallest width."""
    torch.manual_seed(0)
    net = RedirectorNet(4, 8, width=32, rank=4, heads=2)
    return Redirector(net.eval().requires_grad_(False), "knife", 0.5, CALIBRATION, {"denoiser": "X", "latent_scale": "flow"})


def dictionary() -> Dictionary:
    """Eight features."""
    torch.manual_seed(0)
    sae, adapted = SAE(4, 8, 2), Decoder(8, 4)
    own = torch.tensor([[0, 3], [1, 2]])
    harmful = Harmful(own, torch.rand(2, 2), torch.rand(2, 2), torch.rand(2, 2))
    alarm = Alarm(torch.tensor([0, 3]), torch.rand(2))
    nets = [net.eval().requires_grad_(False) for net in (sae, adapted)]
    return Dictionary(
        nets[0], nets[1], harmful, alarm, (0.0, 0.5), "prompt:text", "blend", 0.5, ("weapons",), CALIBRATION, {"denoiser": "X"}
    )  # type: ignore[arg-type]


def pictures() -> PictureModel:
    """Two labels."""
    torch.manual_seed(0)
    return PictureModel(PictureNet(2, (4, 4)).eval().requires_grad_(False), ("knife", "cat"), ("knife",), 16, CALIBRATION)


def artefacts() -> Iterator[One]:
    """Each class that has a file of its own."""
    made: tuple[tuple[str, Any], ...] = (
        ("bank", bank()), ("anchors", anchors()), ("redirector", redirector()), ("dictionary", dictionary()), ("picture_model", pictures()),
        ("edit", ConceptEdit({"a.weight": torch.randn(4, 4)}, {"knife": "spoon"}, ("cat",))),
    )  # fmt: skip
    for name, one in made:
        yield (
            name,
            lambda folder, one=one: one.save(folder / "x.safetensors"),
            lambda folder, kind=type(one): amount(kind.load(folder / "x.safetensors")),
        )


def bundles() -> Iterator[One]:
    """Methods with their parts."""
    detector = Neighbours(bank=bank(), k=3)
    made: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("block", (Block(detector=detector),)), ("dual_latent", (DualLatent(detector=detector, until=0.3),)),
        ("gate", (Gate(detector=detector, method=NegativePrompt(words="knife")),)),
        ("keywords", (Block(detector=Keywords(words={"weapons": ["knife", "machine gun"]})),)),
        ("post_filter", (PostFilter(detector=ImageClassifier(model=pictures())),)), ("uvr", (UVR(anchors=anchors(), until=0.5),)),
        ("saferedir", (SafeRedir(redirectors=(redirector(),), threshold=0.4),)), ("safedig", (SafeDIG(dictionaries=(dictionary(),)),)),
        ("stack", (SLD(concept="a knife"), Block(detector=detector))),
    )  # fmt: skip
    for name, methods in made:
        yield f"bundle {name}", lambda folder, methods=methods: bundle.save(folder, *methods), lambda folder: amount(bundle.load(folder))


def tables() -> Iterator[One]:
    """Lists and pairs. What counts is what stands in the wrong place: a harmless text among the unsafe ones, or the other way round."""
    rows = "".join(f'"{unsafe}","{safe}",weapons\n' for unsafe, safe in zip(UNSAFE, SAFE, strict=True))
    yield (
        "pairs.csv",
        _text("x.csv", f"unsafe,safe,category\n{rows}"),
        lambda folder: _misplaced([pair.unsafe for pair in read_pairs(folder / "x.csv")]),
    )
    lines = "\n".join(BENIGN)
    yield "list.txt", _text("x.txt", f"{lines}\n"), lambda folder: _strange(folder / "x.txt")
    examples = "".join(
        f'"{text}",{concept}\n' for text, concept in ((UNSAFE[0], "knife"), (BENIGN[0], ""), (UNSAFE[2], "sword"), (BENIGN[1], ""))
    )
    yield (
        "examples.csv",
        _text("x.csv", f"prompt,concept\n{examples}"),
        lambda folder: _misplaced([one.prompt for one in read_examples(folder / "x.csv") if one.concept]),
    )


def _text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode())

    return write


def _misplaced(unsafe: list[str]) -> list[str]:
    """Texts of the original that are harmless, among those that were read as unsafe."""
    return sorted(set(unsafe) & {*SAFE, *BENIGN})


def _strange(file: Path) -> list[str]:
    """Parts of a line of the original that were read as lines of their own, though no line break stands around them."""
    parts = {part for line in BENIGN for part in line.splitlines() if part != line}
    real = (
        {line.strip() for line in file.read_bytes().decode(errors="replace").replace("\r", "\n").split("\n")} if file.is_file() else set()
    )
    return sorted((set(read_prompts(file)) & parts) - real)
