"""UVR's regulated attention of an edit against plain attention and against the released code's way of doing it, on FLUX's width.

python benchmarks/uvr_attention.py --side 32 --repeats 9 --json uvr_attention.json

plain       one fused attention, unregulated
regulate    ours: one fused attention per group of queries, with scaled values; no attention matrix
literal     as the released code does it: softmax probabilities [heads, queries, keys], scaled column by column and row by row in Python, times V
vectorised  the same with one indexed multiplication per factor: what is left of the gain if the loops are written well
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from safelight.flow import Heads
from safelight.masks import dilate
from safelight.regulation import Group, regulate

HEADS, WIDTH, TEXT = 24, 128, 512
CORE, RING, BOOST = 0.2, 0.4, 1.05
"""UVR's published factors of the reference's masked columns, in the mask and around it, and of text and image keys for image queries."""
TARGET = 3.0
"""How many times faster than the literal way ours is to be."""


class Case:
    """Random queries, keys and values [1, heads, text + image + reference, width], and a round mask on the reference."""

    def __init__(self, side: int, share: float, device: str) -> None:
        image, self.dtype = side * side, torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.text, self.image, self.reference = slice(0, TEXT), slice(TEXT, TEXT + image), slice(TEXT + image, TEXT + 2 * image)
        chance = torch.Generator(device).manual_seed(0)
        shape = (1, HEADS, TEXT + 2 * image, WIDTH)
        query, key, value = (torch.randn(shape, generator=chance, device=device, dtype=self.dtype) for _ in range(3))
        spans = {"text": self.text, "image": self.image, "reference": self.reference}
        self.heads = Heads(query, key, value, spans, spans)  # type: ignore[arg-type]
        core = disc(side, share).to(device)
        ring = dilate(core[None])[0] & ~core
        self.core, self.ring = ((mask.flatten().nonzero()[:, 0] + self.reference.start).tolist() for mask in (core, ring))

    def groups(self) -> list[Group]:
        """λ for each group of queries, as in `UVR.near_published(..., editing=True)`."""
        ones = torch.ones(1, self.reference.stop, device=self.heads.key.device)
        faded = ones.clone()
        faded[:, self.core], faded[:, self.ring] = CORE, RING
        lifted = faded.clone()
        lifted[:, : self.reference.start] *= BOOST
        return [Group(self.text, faded), Group(self.image, lifted), Group(self.reference, ones)]

    def probabilities(self) -> Tensor:
        """The attention matrix, [heads, queries, keys]."""
        logits = self.heads.query[0] @ self.heads.key[0].transpose(-1, -2)
        return logits.mul_(WIDTH**-0.5).softmax(-1)


def disc(side: int, share: float) -> Tensor:
    """A round mask off the centre that covers a share of a grid, [side, side]."""
    place = torch.arange(side).float()
    distance = (place[:, None] - 0.45 * side).square() + (place[None] - 0.55 * side).square()
    return distance <= distance.flatten().sort().values[max(0, round(share * side * side) - 1)]


def fused(heads: Heads) -> Tensor:
    """PyTorch's own attention."""
    return scaled_dot_product_attention(heads.query, heads.key, heads.value, attn_mask=heads.bias)


def plain(case: Case) -> Tensor:
    """(a) Unregulated."""
    return fused(case.heads)


def ours(case: Case) -> Tensor:
    """(b) One fused call per group of queries; making the groups is part of it."""
    return regulate(case.heads, case.groups(), fused, lambda: fused(case.heads), renormalise=False)


def literal(case: Case) -> Tensor:
    """(c) The whole matrix, one masked token at a time."""
    weights = case.probabilities()
    seen, drawing = slice(0, case.reference.start), range(case.image.start, case.image.stop)
    for columns, factor in ((case.core, CORE), (case.ring, RING)):
        for column in columns:
            weights[:, seen, column] *= factor
    for row in drawing:
        weights[:, row, seen] *= BOOST
    return (weights @ case.heads.value[0])[None]


def vectorised(case: Case) -> Tensor:
    """(d) The whole matrix, all masked tokens at a time."""
    weights = case.probabilities()
    seen = slice(0, case.reference.start)
    for columns, factor in ((case.core, CORE), (case.ring, RING)):
        weights[:, seen, columns] *= factor
    weights[:, case.image, seen] *= BOOST
    return (weights @ case.heads.value[0])[None]


ARMS: dict[str, Callable[[Case], Tensor]] = {"plain": plain, "regulate": ours, "literal": literal, "vectorised": vectorised}


def agreement(case: Case) -> float:
    """The largest difference between (b) and (c); in single precision, where rounding doesn't hide a mistake."""
    heads = case.heads
    case.heads = Heads(heads.query.float(), heads.key.float(), heads.value.float(), heads.queries, heads.keys)
    difference = float((ours(case) - literal(case)).abs().max())
    case.heads = heads
    return difference


def durations(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm; they take turns, forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for repeat in range(repeats + 1):
        for name in list(ARMS)[:: -1 if repeat % 2 else 1]:
            taken = timed(lambda name=name: ARMS[name](case), case.heads.key.device)  # type: ignore[misc]
            if repeat:  # the first is for warming up
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of some work, up to its end on the device."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Waits for what a device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Forgets the peak of memory so far, if possible, and returns what is in use now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return peak(device)


def peak(device: torch.device) -> int:
    """The highest use of memory of this process since the last `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, VmHWM is not inherited from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rise(case: Case, arm: str) -> int:
    """By how many bytes an arm raises the use of memory."""
    device = case.heads.key.device
    fused(Heads(*(tensor[:, :1, :64] for tensor in (case.heads.query, case.heads.key, case.heads.value)), {}, {}))
    before = reset_peak(device)
    ARMS[arm](case)
    synchronise(device)
    return peak(device) - before


def rise_apart(arguments: argparse.Namespace, arm: str) -> int:
    """The same in a process of its own: a heap that has already grown hides what comes later."""
    command = [sys.executable, __file__, "--measure-memory", arm, "--side", str(arguments.side), "--share", str(arguments.share)]
    return int(subprocess.run([*command, "--device", arguments.device], check=True, capture_output=True, text=True).stdout)


def facts(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def table(seconds: dict[str, list[float]], memory: dict[str, int]) -> list[dict[str, Any]]:
    """One row per arm."""
    return [
        {
            "arm": name,
            "seconds": statistics.median(seconds[name]),
            "low": min(seconds[name]),
            "high": max(seconds[name]),
            "memory_mib": memory[name] / 2**20,
        }
        for name in ARMS
    ]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="rows of the token grid: 32 for 512 x 512 pixels, 64 for 1024 x 1024")
    parser.add_argument("--share", type=float, default=0.15, help="share of the image that is masked")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-memory", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = Case(arguments.side, arguments.share, arguments.device)
    if arguments.measure_memory:
        print(rise(case, arguments.measure_memory))
        return
    difference = agreement(case)
    assert difference < 1e-4, f"ours differs from the literal way by {difference:.2g}"
    on_cpu = case.heads.key.device.type == "cpu"
    memory = {name: rise_apart(arguments, name) if on_cpu else rise(case, name) for name in ARMS}
    report(arguments, case, difference, table(durations(case, arguments.repeats), memory))


def report(arguments: argparse.Namespace, case: Case, difference: float, rows: list[dict[str, Any]]) -> None:
    """Prints the rows, and writes them if asked to."""
    by_name = {row["arm"]: row for row in rows}
    reference, own = by_name["literal"], by_name["regulate"]
    print(f"{case.heads.key.shape[2]} tokens, {len(case.core)} masked and {len(case.ring)} around them, {case.dtype}")
    print(f"{'':<12}{'ms':>10}{'[low, high]':>22}{'faster':>9}{'peak MiB':>10}{'memory':>9}")
    for row in rows:
        spread = f"[{row['low'] * 1e3:.1f}, {row['high'] * 1e3:.1f}]"
        faster, share = reference["seconds"] / row["seconds"], row["memory_mib"] / reference["memory_mib"]
        print(f"{row['arm']:<12}{row['seconds'] * 1e3:>10.1f}{spread:>22}{faster:>8.2f}x{row['memory_mib']:>10.0f}{share:>8.3f}x")
    speedup = reference["seconds"] / own["seconds"]
    print(f"ours against the literal way: {speedup:.2f}x faster (target {TARGET:g}x), largest difference {difference:.1g}")
    if arguments.json:
        summary = {
            "side": arguments.side, "share": arguments.share, "dtype": str(case.dtype), "speedup": speedup, "target": TARGET,
            "memory_ratio": own["memory_mib"] / reference["memory_mib"], "difference": difference, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts(case.heads.key.device) | summary, indent=2) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
