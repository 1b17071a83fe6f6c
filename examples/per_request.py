"""Different guards for each request, on one pipeline that stays loaded."""

import torch

from safelight import guard
from safelight.compose import build, call_settings, load_pipeline

NAME = "testbed/sd"
pipe = load_pipeline(NAME)
settings = call_settings(NAME) | {"num_inference_steps": 2}

POLICIES = {
    "school": build(["block"], NAME),
    "studio": build(["dual_latent"], NAME, ["dual_latent.until=0.5"]),
    "museum": build(["gate"], NAME, ["gate.method=negative_prompt"]),
}

for audience, methods in POLICIES.items():
    with guard(pipe, *methods) as handle:  # attached for this request only
        pipe("an axe on the snow", **settings, generator=torch.Generator().manual_seed(0))
    decisive = handle.records[0].decisive
    print(f"{audience}: {'nothing done' if decisive is None else decisive.action}")
