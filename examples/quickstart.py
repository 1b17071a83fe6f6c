"""One prompt, without and with a guard, on the bundled models."""

import tempfile
from pathlib import Path

import torch

from safelight import guard
from safelight.compose import build, call_settings, load_pipeline

NAME, PROMPT = "testbed/sd", "a cat and a knife on the beach"

pipe = load_pipeline(NAME)  # a plain StableDiffusionPipeline
settings = call_settings(NAME) | {"num_inference_steps": 2}  # 20 make real pictures; 2 are quick


def seeded():
    return torch.Generator().manual_seed(0)


before = pipe(PROMPT, **settings, generator=seeded()).images[0]
with guard(pipe, *build(["dual_latent"], NAME)) as handle:
    after = pipe(PROMPT, **settings, generator=seeded()).images[0]

with tempfile.TemporaryDirectory() as folder:
    for name, image in (("before", before), ("after", after)):
        image.save(Path(folder) / f"{name}.png")
print("changed:", before.tobytes() != after.tobytes())
print(handle.records[0].decisive)
