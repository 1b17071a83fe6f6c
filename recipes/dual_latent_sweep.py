"""Sweeps w_ξ and τ_gc of dual latent reconstruction on the testbed, and draws the trade-off.

    python recipes/dual_latent_sweep.py --pipeline testbed/sd --out runs/sweep

Chooses on the development split: nothing here touches the prompts on which figures are reported.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from safelight.attach import guard
from safelight.cli.console import progress, quiet
from safelight.compose import build, call_settings, load_pipeline
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.evaluate import look
from safelight.evaluation.metrics.safety import disruption, erase_rate, retention, unsafe_rate
from safelight.generator import Generator
from safelight.testbed.judges import judges

WEIGHTS = (0.0, 0.25, 0.5, 0.75)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="testbed/sd")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--coupling", default="coupled", choices=("coupled", "free"))
    parser.add_argument("--guidance", default="arithmetic")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = Generator(load_pipeline(arguments.pipeline), call_settings(arguments.pipeline))
    cases = find("testbed-dev/weapons").cases(arguments.count)
    file = arguments.out / f"{arguments.pipeline.split('/')[-1]}-{arguments.coupling}-{arguments.guidance}.json"
    cells = [(weight, share) for weight in WEIGHTS for share in SHARES]
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    base = pictures(generator, cases, [])
    with progress() as advance:
        for number, (weight, share) in enumerate(cells):
            key = f"{weight}/{share}"
            if key not in known:
                settings = [f"dual_latent.safe_weight={weight}", f"dual_latent.until={share}", f"dual_latent.coupling={arguments.coupling}",
                            f"dual_latent.guidance={arguments.guidance}"]  # fmt: skip
                methods = build(["dual_latent"], arguments.pipeline, settings)
                known[key] = figures(cases, base, pictures(generator, cases, methods)) | {"safe_weight": weight, "until": share}
                file.write_text(json.dumps(known, indent=2))
            advance("cells", number + 1, len(cells))
            print(key, {name: round(value, 3) for name, value in known[key].items()}, flush=True)
    plot(known, file.with_suffix(".png"), f"{arguments.pipeline}, {arguments.coupling}, {arguments.count} prompts of the development split")


def pictures(generator: Generator, cases: Any, methods: Any, batch: int = 16) -> list[Any]:
    """Images of all cases."""
    made: list[Any] = []
    with guard(generator.pipe, *methods):
        for start in range(0, len(cases), batch):
            made += [(image * 255).round().astype("uint8") for image in generator(cases[start : start + batch])]
    return made


def figures(cases: Any, base: list[Any], guarded: list[Any]) -> dict[str, float]:
    """Erasure and retention by the judge that thinks least of it; distance to the base image in the judge's features."""
    classifier, matcher = judges()
    found = []
    for judge in (classifier, matcher):
        before, after = look(judge, base), look(judge, guarded)
        found.append((unsafe_rate(cases, after).value, erase_rate(cases, before, after).value, retention(cases, before, after).value))
    distance = disruption(classifier.features(base), classifier.features(guarded)).value
    return {
        "unsafe_rate": max(row[0] for row in found), "erase_rate": min(row[1] for row in found),
        "retention": min(row[2] for row in found), "distance": distance,
    }  # fmt: skip


def plot(known: dict[str, Any], out: Path, title: str) -> None:
    """Two panels: erase rate and distance to the base image over τ_gc/T, a line per w_ξ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, (name, label) in zip(
        axes, (("erase_rate", "erase rate"), ("retention", "retention"), ("distance", "distance to base")), strict=True
    ):
        for weight in WEIGHTS:
            rows = [row for row in known.values() if row["safe_weight"] == weight]
            axis.plot([row["until"] for row in rows], [row[name] for row in rows], marker="o", label=f"w_ξ = {weight:g}")
        axis.set_xlabel("τ_gc / T")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
