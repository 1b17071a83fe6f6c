"""SafeRedir on the testbed: three tasks on two pipelines, synonyms, what the classifier needs, a fine-tuned copy, and ablations.

    python recipes/saferedir_testbed.py --out runs            # generates what is missing, then writes the tables into docs/methods/saferedir.md

With `--train`, redirectors are trained first (about ten minutes each on two cores); else the bundled ones are used. The trajectories that
two of the tables need are recorded in any case. `--only` makes some of the parts: tasks, paraphrase, inputs, tuned, ablation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from uvr_testbed import cell, insert

from safelight import load
from safelight.cli.console import progress, quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.evaluate import Sizes, evaluate
from safelight.fitting import Budget, Training
from safelight.generator import Generator
from safelight.methods.dual_latent import DualLatent
from safelight.methods.saferedir import SafeRedir
from safelight.nets.redirector import Aim, Judgement
from safelight.redirector import rounded
from safelight.testbed import architectures
from safelight.testbed.scenes import render, sample_scene
from safelight.testbed.training import sd
from safelight.testbed.training.latents import Prompts as TextEncoders
from safelight.testbed.training.vae import to_tensor
from safelight.training.prompt_pairs import Prompts, from_testbed
from safelight.training.redirector_learning import Config, Input, Records
from safelight.training.saferedir import fit, recorded, split, validate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/methods/saferedir.md"
MOST = {"testbed/beer": 72, "testbed/pencil-sketch": 150, "testbed/paraphrase-beer": 120}
"""How many held-out prompts there are, where there are fewer than 200."""
TASKS = {"weapons": "testbed/weapons", "beer": "testbed/beer", "pencil sketch": "testbed/pencil-sketch"}
SYNONYMS = {"weapons": "testbed/paraphrase-weapons", "beer": "testbed/paraphrase-beer"}
PIPELINES = ("sd", "flux")
SHOWN = ("unsafe_rate_base", "fsr", "unsafe_rate", "retention", "untouched", "over_refusal", "overhead_benign", "overhead_unsafe")
INPUTS: Mapping[str, tuple[Input, ...]] = {
    "text": ("text",), "latents": ("latents",), "both": ("latents", "text"), "both + t": ("latents", "text", "time"),
}  # fmt: skip
Advance = Callable[[str, int, int], None]


@dataclass
class Bench:
    """Where runs lie, and the guards that are measured."""

    out: Path
    guards: Mapping[tuple[str, str], SafeRedir]
    advance: Advance

    def run(
        self, name: str, pipeline: str, benchmark: str, methods: Sequence[Any], sizes: tuple[int, int, int], pipe: Any = None
    ) -> dict[str, Any]:  # fmt: skip
        """Evaluates guards; what has been generated already is not generated again."""
        generator = Generator(pipe or load_pipeline(f"testbed/{pipeline}"), call_settings(f"testbed/{pipeline}"))
        described = [fields(method) for method in methods]
        description = {"pipeline": f"testbed/{pipeline}", "guard": name, "fields": described}
        folder = self.out / f"saferedir-{name.replace(', ', '-').replace(' ', '_')}"
        return evaluate(generator, methods, benchmark, folder, sizes=Sizes(*sizes), description=description, progress=self.advance)


def main() -> None:
    """Trains if asked, evaluates, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    quiet()
    made = trained if arguments.train else bundled
    guards = {(concept, name): made(concept, name, arguments.out) for concept in TASKS for name in PIPELINES}
    with progress() as advance:
        bench = Bench(arguments.out, guards, advance)
        for part in arguments.only:
            text = PARTS[part](bench)
            print(text, flush=True)
            insert(PAGE, part, text)


def trained(concept: str, name: str, out: Path) -> SafeRedir:
    """The guard made by the command that made the bundled one."""
    bundle = out / f"bundle-{name}-{concept.replace(' ', '-')}"
    command = [str(Path(sys.executable).with_name("safelight")), "train", "saferedir", concept, "--pipeline", f"testbed/{name}"]
    subprocess.run([*command, "--seeds", "1", "--out", str(bundle), "--json"], check=True, stdout=subprocess.DEVNULL)
    (method,) = load(bundle)
    assert isinstance(method, SafeRedir)
    return method


def bundled(concept: str, name: str, out: Path) -> SafeRedir:
    """The guard with the bundled redirector."""
    (method,) = build(["saferedir"], f"testbed/{name}", [f"saferedir.concepts={concept.replace(' ', '-')}"])
    assert isinstance(method, SafeRedir)
    return method


def fields(method: Any) -> dict[str, Any]:
    """Hyper-parameters, and what identifies the weights."""
    if not isinstance(method, SafeRedir):
        return {"method": method.name}
    weights = [round(float(sum(p.double().abs().sum() for p in r.net.parameters())), 3) for r in method.redirectors]
    return {name: value for name, value in vars(method).items() if name != "redirectors"} | {"weights": weights}


# The parts


def tasks(bench: Bench) -> str:
    """Each concept on each pipeline: held-out prompts, benign ones, and proximal ones."""
    lines = ["| task | pipeline | n | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |", "|---" * (len(SHOWN) + 3) + "|"]
    for (concept, name), method in bench.guards.items():
        result = bench.run(f"{concept}, {name}", name, TASKS[concept], [method], (MOST.get(TASKS[concept], 200), 100, 100))
        lines.append(row([concept, name], result))
    return "\n".join(lines)


def paraphrase(bench: Bench) -> str:
    """Synonyms that neither pairs nor benign prompts of any training contain."""
    shown = ("unsafe_rate_base", "unsafe_rate", "retention")
    lines = ["| synonyms of | pipeline | n | ASR unguarded | ASR guarded | retention |", "|---|---|---|---|---|---|"]
    for concept, benchmark in SYNONYMS.items():
        for name in PIPELINES:
            result = bench.run(
                f"paraphrase, {concept}, {name}", name, benchmark, [bench.guards[concept, name]], (MOST.get(benchmark, 200), 1, 1)
            )
            lines.append(row([concept, name], result, shown))
    return "\n".join(lines)


def inputs(bench: Bench) -> str:
    """The classifier's accuracy on held-out prompts, by what it may look at, and by how prompts were held out."""
    records, prompts = trajectories(bench, "sd")
    lines = ["| classifier sees | prompts at random (the paper's split) | whole families | synonyms |", "|---|---|---|---|"]
    others = recorded(
        Generator(load_pipeline("testbed/sd"), call_settings("testbed/sd")), synonym_pairs(prompts), 1, bench.out / "synonyms-sd"
    )
    for label, chosen in INPUTS.items():
        cells = []
        for by_family in (False, True):
            config = Config(seeds=1, inputs=chosen, by_family=by_family)
            made = fit(records, prompts, config, bench.out / f"inputs-{label.replace(' ', '')}-{by_family}", bench.advance)
            cells.append(accuracy(made.net, records, split(records, prompts, config)[1], config))
        cells.append(accuracy(made.net, others, torch.arange(len(others.latents)), config))
        lines.append(f"| {label} | " + " | ".join(f"{100 * value:.2f} %" for value in cells) + " |")
    return "\n".join(lines)


def tuned(bench: Bench) -> str:
    """The module trained on `testbed/sd`, unchanged, on a fine-tuned copy of it; and beside another guard."""
    pipe = load_pipeline("testbed/sd")
    pipe.unet = fine_tuned(bench)
    method = bench.guards["weapons", "sd"]
    shown = ("unsafe_rate_base", "fsr", "retention", "untouched", "over_refusal")
    lines = ["| fine-tuned copy of `testbed/sd` | n | " + " | ".join(name.replace("_", " ") for name in shown) + " |", "|---" * 7 + "|"]
    lines.append(row(["saferedir, unchanged"], bench.run("tuned", "sd", TASKS["weapons"], [method], (200, 100, 100), pipe), shown))
    (dual,) = build(["dual_latent"], "testbed/sd")
    assert isinstance(dual, DualLatent)
    both = bench.run("tuned, with dual latent", "sd", TASKS["weapons"], [dual, method], (100, 50, 50), pipe)
    lines.append(row(["dual_latent around saferedir"], both, shown))
    return "\n".join(lines)


def ablation(bench: Bench) -> str:
    """What is lost without a part of it, on held-out prompts for weapons."""
    own = bench.guards["weapons", "sd"]
    records, prompts = trajectories(bench, "sd")
    # the official network takes ten times as long per record: it learns from every fifth step, in three epochs
    sparse = replace(records, latents=records.latents[:, ::5], times=records.times[:, ::5])
    official = fit(sparse, prompts, Config(seeds=1, architecture="official", lr=3e-4, epochs=3), bench.out / "official", bench.advance)
    released = (replace(own.redirectors[0], net=rounded(official.net), threshold=0.5, calibration=None),)
    fixed = (replace(own.redirectors[0], net=Fixed(own.redirectors[0].net, difference(records))),)
    arms = {
        "ours": own,
        "no mask": replace(own, masked=False),
        "no alpha": replace(own, adaptive=False),
        "neither": replace(own, masked=False, adaptive=False),
        "fixed difference": replace(own, redirectors=fixed),
        "checked after the denoiser": replace(own, late=True),
        "unconditional rows too": replace(own, unconditional=True),
        "released architecture, our training and loop": SafeRedir(redirectors=released),
        "the same, near the released loop": SafeRedir.near_published(released),
    }
    shown = ("fsr", "retention", "untouched", "over_refusal")
    lines = ["| arm | n | " + " | ".join(name.replace("_", " ") for name in shown) + " |", "|---" * 6 + "|"]
    for name, method in arms.items():
        result = bench.run(f"ablation, {name.replace('(', '').replace(')', '')}", "sd", TASKS["weapons"], [method], (120, 40, 40))
        lines.append(row([name], result, shown))
    return "\n".join(lines)


PARTS: Mapping[str, Callable[[Bench], str]] = {
    "tasks": tasks, "paraphrase": paraphrase, "inputs": inputs, "tuned": tuned, "ablation": ablation,
}  # fmt: skip


# What the parts need


def trajectories(bench: Bench, name: str) -> tuple[Records, Prompts]:
    """The trajectories of weapons' pairs; those of a training that lies in the folder already are used again."""
    prompts = from_testbed("weapons", benign=400)
    generator = Generator(load_pipeline(f"testbed/{name}"), call_settings(f"testbed/{name}"))
    return recorded(generator, prompts, 1, bench.out / f"trajectories-{name}", bench.advance), prompts


def synonym_pairs(prompts: Prompts) -> Prompts:
    """Pairs whose unsafe members use words that no training contains."""
    from safelight.testbed.world import DOMAINS
    from safelight.testbed.world import SYNONYMS as WORDS

    swapped = []
    for number, pair in enumerate(prompts.pairs[:100]):
        words = [WORDS[word][number % 2] if word in DOMAINS["weapons"] else word for word in pair.unsafe.replace(",", " ,").split()]
        swapped.append(pair._replace(unsafe=" ".join(words)))
    return Prompts(swapped, [])


@torch.no_grad()
def accuracy(net: nn.Module, records: Records, chosen: Tensor, config: Config) -> float:
    """The share of records that are classified rightly."""
    return validate(net, records, chosen, config)["accuracy"]


class Fixed(nn.Module):
    """A network whose deltas are replaced by one fixed safe - unsafe difference."""

    def __init__(self, net: Any, delta: Tensor) -> None:
        super().__init__()
        self.net, self.fixed, self.settings = net, delta, net.settings

    def judge(self, *inputs: Any) -> Judgement:
        """As the network does."""
        return self.net.judge(*inputs)  # type: ignore[no-any-return]

    def aim(self, features: tuple[Tensor, ...]) -> Aim:
        """All in one direction."""
        aim = self.net.aim(features)
        return aim._replace(delta=self.fixed.expand_as(aim.delta))


def difference(records: Records) -> Tensor:
    """The mean of e_safe - e_unsafe over the tokens that the pseudo masks mark, [width]."""
    shifts = (records.text[records.twin] - records.text)[records.unsafe]
    marked = records.masks()[records.unsafe].bool()
    return shifts[marked].mean(0)


def fine_tuned(bench: Bench) -> Any:
    """A full fine-tune of the U-Net on warmly tinted scenes; resumable."""
    unet, file = architectures.unet(), bench.out / "tuned-unet.safetensors"
    base = load_pipeline("testbed/sd")
    if not file.is_file():
        from random import Random

        random = Random("tuned")
        scenes = [sample_scene(random) for _ in range(1500)]
        tint = torch.tensor([1.0, 0.93, 0.85]).view(3, 1, 1)
        with torch.no_grad():
            pictures = [(to_tensor([render(scene)]) + 1) * tint - 1 for scene in scenes]
            images = torch.cat([base.vae.encode(torch.cat(pictures[i : i + 50])).latent_dist.mean for i in range(0, len(scenes), 50)])
        unet.load_state_dict(base.unet.state_dict())
        loss = sd.loss_of(
            unet,
            TextEncoders(load_pipeline("testbed/flux").text_encoder_2, base.text_encoder),
            SimpleNamespace(images=images, scenes=scenes),
            batch=24,
        )  # type: ignore[arg-type]
        recipe = replace(sd.RECIPE, lr=3e-4, bf16=False, ema=0.99)
        training = Training(unet, loss, recipe, Budget(steps=TUNING_STEPS), bench.out / "tuning")
        for state in training.run(every=20):
            bench.advance("fine-tuning", int(state["step"]), TUNING_STEPS)
        save_file({name: tensor.contiguous() for name, tensor in training.average.state_dict().items()}, file)
    unet.load_state_dict(load_file(file))
    return unet.eval().requires_grad_(False)


TUNING_STEPS = 300


def row(names: Sequence[str], result: Mapping[str, Any], shown: Sequence[str] = SHOWN) -> str:
    """A line of a table: percent with 95 % intervals, by the judge that thinks least of the guard (FSR: by both)."""
    cells = [cell(result["metrics"].get(name), name) for name in shown]
    return "| " + " | ".join([*names, str(result["n"]), *cells]) + " |"


if __name__ == "__main__":
    main()
