"""SafeDIG on FLUX.1-dev and Stable Diffusion 3.5 Large, a guard near the published method beside ours; the same code runs on the testbed.

    python recipes/safedig_models.py flux --source s.csv --target t.csv --benign benign.txt --out dictionaries-flux       # GPU, bf16
    python recipes/safedig_models.py sd35 --source s.csv --target t.csv --benign benign.txt --out dictionaries-sd35
    python recipes/safedig_models.py flux --pipeline testbed/flux --small --out /tmp/dictionaries                  # the recipe in miniature

The prompts are yours: CSV files with the columns unsafe and safe, of the known risk and of the new one, and benign prompts, one a line: 64
for routing, and at least 600 to calibrate the gate at 1 %. Published: 256 pixels, 30 steps of which every 6th is recorded. The weights are
gated: accept their licence on the Hub and log in first. Recordings are large: 512 tokens of each site are kept per picture and step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safelight import guard, save
from safelight.cli.console import progress, quiet
from safelight.cli.dictionaries import routing_table
from safelight.compose import call_settings, load_pipeline
from safelight.generator import Generator
from safelight.methods.safedig import SafeDIG
from safelight.training.domains import Domains, from_testbed, read_domains
from safelight.training.examples import Example
from safelight.training.sae_learning import SAEConfig
from safelight.training.safedig import Config, make, testbed_config

MODELS = {"flux": "black-forest-labs/FLUX.1-dev", "sd35": "stabilityai/stable-diffusion-3.5-large"}
CALLS: dict[str, dict[str, Any]] = {"flux": {"guidance_scale": 3.5}, "sd35": {"guidance_scale": 4.5}}
STEPS, PIXELS, TOKENS = 30, 256, 512
BETA = {"flux": 0.2, "sd35": 1.5}
"""Published strengths of Blend; γ of Repel is 0.2 on both."""
REDUCED = 1024
"""Principal directions that dictionaries look at: a full dictionary of FLUX's 3,072 channels has 300 million parameters."""


def main() -> None:
    """Records, routes, trains, transfers, calibrates, and saves our guard and the one near the published method: its strengths and operators, with our decoder and routing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--pipeline", help="another one of this family, e.g. a fine-tune, or a testbed's")
    parser.add_argument("--source", type=Path, help="pairs of the known risk")
    parser.add_argument("--target", type=Path, help="pairs of the new one")
    parser.add_argument("--benign", type=Path)
    parser.add_argument("--names", nargs=2, default=("source", "target"), help="what records call the two risks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="on the testbed: a few pairs only")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    quiet()
    name = arguments.pipeline or MODELS[arguments.model]
    if name.startswith("testbed/"):
        generator, domains = testbed_generator(name, arguments.small), testbed_domains(arguments.small)
        config, device = testbed_setup(arguments.small), "cpu"
    else:
        if not (arguments.source and arguments.target and arguments.benign):
            parser.error("give --source, --target and --benign")
        generator, device = real_generator(name, arguments.model, arguments.device), arguments.device
        domains = read_domains(arguments.source, arguments.target, arguments.benign, tuple(arguments.names))
        config = Config(tokens=TOKENS, sae=SAEConfig(reduced=REDUCED), batch=1)
    with progress() as advance:
        made = make(generator, domains, config, arguments.out, advance, device)
    print(routing_table(made.routing))
    save(arguments.out, SafeDIG(dictionaries=made.dictionaries), made_for=name)
    save(arguments.out / "near-published", SafeDIG.near_published(made.dictionaries, beta=BETA[arguments.model]), made_for=name)
    shown = Example(domains.target[0].unsafe, 0)
    with guard(generator.pipe, SafeDIG(dictionaries=made.dictionaries)) as handle:
        generator([shown])
    print(handle.records[0].to_json()["actions"])


def real_generator(name: str, model: str, device: str) -> Generator:
    """A real pipeline in bf16, with the published steps and size."""
    pipe = load_pipeline(name).to(device, torch.bfloat16)
    return Generator(pipe, {"num_inference_steps": STEPS, "height": PIXELS, "width": PIXELS} | CALLS[model])


def testbed_generator(name: str, small: bool) -> Generator:
    """The testbed's pipeline."""
    return Generator(load_pipeline(name), call_settings(name) | ({"num_inference_steps": 4} if small else {}))


def testbed_domains(small: bool) -> Domains:
    """The testbed's pairs; a few categories of a few pairs are enough for a look at the recipe."""
    sizes = {"pairs": 12, "target_pairs": 6, "benign": 164} if small else {}
    return from_testbed("weapons", "substances", **sizes)


def testbed_setup(small: bool) -> Config:
    """What suits small models."""
    config = testbed_config()
    if not small:
        return config
    return replace(config, times=2, target_fpr=0.05, sae=replace(config.sae, epochs=1, batch=128), sites=("prompt:text", "joint.0:image"))


if __name__ == "__main__":
    main()
