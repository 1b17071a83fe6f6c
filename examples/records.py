"""What was done to each image of a batch, as JSON."""

import json

import torch

from safelight import guard
from safelight.compose import build, call_settings, load_pipeline

NAME = "testbed/sd"
PROMPTS = ["a cat and a knife on the beach", "a cat and a spoon on the beach"]

pipe = load_pipeline(NAME)
settings = call_settings(NAME) | {"num_inference_steps": 2}
generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]

with guard(pipe, *build(["dual_latent"], NAME)) as handle:
    output = pipe(PROMPTS, **settings, generator=generators)

for record in output.records:  # one for each image, in their order
    print(json.dumps(record.to_json(), indent=1))
print("events:", handle.run.events)
