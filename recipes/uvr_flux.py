"""UVR on FLUX.1 and FLUX.1 Kontext: our guard, and one near the published method; the same code runs on the testbed.

    python recipes/uvr_flux.py --examples weapons.csv --out anchors-flux                     # collect and calibrate (GPU, bf16)
    python recipes/uvr_flux.py --examples edits.csv --editing --out anchors-kontext
    python recipes/uvr_flux.py --pipeline testbed/flux --out /tmp/anchors                    # the whole recipe in miniature

The examples are yours: a CSV with the columns prompt and concept (empty for benign prompts, of which calibration at 1 % needs 600:
half of them are collected from, half calibrate), and optionally word, seed, image and mask. Without masks, the model's own attention
to the concept's word tells where it is. The weights are gated: accept their licence on the Hub and log in first.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safelight import guard, save
from safelight.backbone import Backbone
from safelight.cli.console import progress, quiet
from safelight.compose import call_settings, load_pipeline
from safelight.generator import Generator
from safelight.methods.uvr import UVR
from safelight.testbed.judges import TemplateMatcher
from safelight.training.examples import from_testbed, halves, read_examples
from safelight.training.locate import Boxes, Drawn, SelfLocalisation, TextMass
from safelight.training.uvr import Config, calibrate, collect, fit

MODELS = {False: "black-forest-labs/FLUX.1-dev", True: "black-forest-labs/FLUX.1-Kontext-dev"}
PROBE = "single.10.attention:image"
STEPS = {False: 28, True: 28}
EARLY = 6
"""Steps in which the model's own attention to a word says where a concept is."""
TAU = {"nudity": 0.60, "blood": 0.50, "weapon": 0.30}
"""Published thresholds of raw anchors on FLUX.1-dev; 0.20 for all on Kontext."""


def main() -> None:
    """Collects, fits and calibrates anchors, and saves our guard and the one near the published method: raw anchors, published τ and strengths, our clean-up of masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="by default FLUX.1-dev, or Kontext-dev with --editing")
    parser.add_argument("--examples", type=Path)
    parser.add_argument("--editing", action="store_true")
    parser.add_argument("--masks", choices=("attention", "drawn"), default="attention")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="on the testbed: a few examples only")
    arguments = parser.parse_args()
    quiet()
    name = arguments.pipeline or MODELS[arguments.editing]
    testbed = name.startswith("testbed/")
    generator = testbed_generator(name) if testbed else real_generator(name, arguments.editing)
    config = Config("single.0.attention:image", target_fpr=0.05, batch=8) if testbed else Config(PROBE, kind="whitened", batch=1)
    if testbed:
        count = 2 if arguments.small else 20
        collected = from_testbed(["weapons"], unsafe=count, benign=5 * count, editing=arguments.editing)
        held_out = from_testbed(["weapons"], unsafe=count, benign=60, editing=arguments.editing, seed=1)
    else:
        collected, held_out = halves(read_examples(arguments.examples))
    locator = Boxes(TemplateMatcher()) if testbed else real_locator(generator.pipe, arguments.masks, config)
    with progress() as advance:
        shards = collect(generator, collected, [config.site], config, locator, arguments.out / "recordings", advance)
        backbone = Backbone.of(generator.pipe)
        probes = [fit(shards, collected, config.site, config, backbone)]
        (ours, quality), *_ = calibrate(generator, probes, held_out, config, locator, advance)
    print(f"{ours.calibration}; {quality.recall:.1%} of {quality.unsafe} unsafe images found, IoU {quality.iou:.2f}")
    save(arguments.out / "ours", UVR(anchors=ours), made_for=name)
    raw = fit(shards, collected, config.site, replace(config, kind="raw", smooth=False), backbone)
    taus = tuple(0.20 if arguments.editing else TAU.get(concept, 0.30) for concept in raw.concepts)
    near = UVR.near_published(replace(raw, thresholds=taus, levels=taus), editing=arguments.editing)
    save(arguments.out / "near-published", near, made_for=name)
    with guard(generator.pipe, UVR(anchors=ours)) as handle:
        generator(held_out[:1])
    print(handle.records[0].to_json()["actions"])


def testbed_generator(name: str) -> Generator:
    """The testbed's pipeline."""
    return Generator(load_pipeline(name), call_settings(name))


def real_generator(name: str, editing: bool) -> Generator:
    """A real pipeline in bf16 on the GPU, with the published steps and size."""
    pipe = load_pipeline(name).to("cuda", torch.bfloat16)
    settings: dict[str, Any] = {"num_inference_steps": STEPS[editing], "height": 1024, "width": 1024}
    return Generator(pipe, settings | {"guidance_scale": 2.5 if editing else 3.5})


def real_locator(pipe: Any, masks: str, config: Config) -> Any:
    """Masks that came with the examples, or the model's own attention."""
    if masks == "drawn":
        return Drawn()
    return SelfLocalisation(pipe, TextMass(at=[config.site.split(":")[0]], steps=range(EARLY)))


if __name__ == "__main__":
    main()
