"""Seconds for the bookkeeping of a large run: planning and writing a manifest, the resume check, and merging its shards.

python benchmarks/manifest.py --rows 10000

Nothing is generated: images are one tiny file each, so that what is measured is the handling of rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelight.evaluation.case import Case, Outcome, image_of
from safelight.evaluation.runs.arms import Arm
from safelight.evaluation.runs.manifest import NAME, Manifest, plan
from safelight.evaluation.runs.merge import merge
from safelight.evaluation.runs.store import line_of, opened, outcomes_name

SHARDS = 4
TARGET = 5.0
"""Seconds that 10,000 rows may take."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), given.rows)
    total = sum(seconds.values())
    if given.json:
        print(json.dumps({"rows": given.rows, "total": total, **seconds}))
    else:
        print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
        print(f"{given.rows:,} rows: {total:.2f} s in all (target: 10,000 rows in {TARGET:g} s)")


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Seconds of each part."""
    cases = [Case(f"{i:06d}", f"a prompt of about the usual length, number {i}", i % 2 == 0, "category", seed=i) for i in range(rows // 2)]
    arms = {"base": Arm(), "guard": Arm.plan(["dual_latent"], "testbed/sd")}
    settings = {"num_inference_steps": 50, "guidance_scale": 7.5, "height": 512, "width": 512}
    manifest, planning = timed(lambda: plan(cases, arms, pipeline="testbed/sd", settings=settings)[0])
    _, writing = timed(lambda: manifest.write(folder / NAME))
    finish(folder, manifest)

    def resume() -> None:
        with opened(folder, Manifest.read(folder / NAME)) as store:
            assert len(store.done) == rows

    _, resuming = timed(resume)
    merged, merging = timed(lambda: merge(folder))
    assert (merged.rows, len(merged.missing)) == (rows, 0)
    return {"planning": planning + writing, "resume_check": resuming, "merge": merging}


def finish(folder: Path, manifest: Manifest) -> None:
    """Pretends that all shards are done."""
    for shard in range(SHARDS):
        chosen = [row for together in manifest.shard(shard, SHARDS) for batch in together for row in batch]
        outcomes = [
            Outcome(row.case, row.arm, image_of(row.arm, row.case), row.id, 1.0, record(row.prompt), row.id, row.id) for row in chosen
        ]
        for outcome in outcomes:
            path = folder / outcome.image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"image")
        (folder / outcomes_name((shard, SHARDS))).write_text("".join(map(line_of, outcomes)))


def record(prompt: str) -> dict[str, Any]:
    """A record of the usual size."""
    action = {"method": "dual_latent", "flagged": True, "concept": "weapons", "score": 0.75, "threshold": 0.5, "action": "blended"}
    return {"prompt": prompt, "flagged": True, "actions": [action | {"steps": [0, 12], "strength": 0.9, "mask": None, "note": None}]}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
