"""Mutated artefacts and input files: none may hang, end in a traceback, take much memory, or be accepted and guard less.

python benchmarks/fuzz.py --cases 100000 --json fuzz.json

Each case takes a small valid file, mutates it once or twice, and reads it as its user would: artefacts with their class, bundles with
`bundle.load` and an attachment, lists and pairs with the one reader of tables. *Refused*: an `ArtefactError` or a `ValueError` whose message is longer
than 20 characters. *Same*: accepted, and it equals the original in what guards (every field and tensor). *Guards less*: accepted, and something
of that differs. Of tables, in which any text may stand, what counts is what stands in the wrong place: a harmless text of the original among the
unsafe ones, or a part of a line as a line of its own. As files carry a hash of their content, this says that damage is told; it is no defence
against somebody who writes the hash anew.
Workers have a limit of time for each case and report their highest memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""A case that takes longer hangs."""
MEGABYTES = 500
OUTCOMES = ("refused", "same", "guards less", "hang", "traceback", "memory")
HUGE: tuple[Any, ...] = (
    10**12,
    2**63,
    -1,
    0,
    1e308,
    True,
    False,
    None,
    "",
    "x" * 5000,
    [],
    {},
    [[]],
    "NaN",
    -0.0,
    0.999999,
    "../../etc/passwd",
    "/dev/zero",
)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a valid one is written, and how it is read."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    """What it amounts to, comparable with `==`."""


def kinds() -> list[Kind]:
    """All kinds, each with its smallest valid example."""
    from fuzz_files import artefacts, bundles, tables

    return [Kind(*one) for one in (*artefacts(), *bundles(), *tables())]


# Mutations.


def mutated(file: Path, chance: random.Random) -> None:
    """Changes a file, or what stands in its place."""
    for _ in range(chance.choice((1, 1, 1, 2))):
        chance.choice((flip, flip, cut, insert, repeat, header, header, header, words, special))(file, chance)
        if not file.is_file():
            return


def flip(file: Path, chance: random.Random) -> None:
    """Some bytes become others."""
    data = bytearray(file.read_bytes() or b"\0")
    for _ in range(chance.randint(1, 4)):
        data[_place(data, chance)] = chance.randrange(256)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    """The file ends early, or lacks a part."""
    data = file.read_bytes()
    start = chance.randrange(len(data) + 1)
    file.write_bytes(data[:start] + data[start + chance.choice((1, 8, 64, len(data))) :])


def insert(file: Path, chance: random.Random) -> None:
    """Bytes that are none of its business."""
    data = file.read_bytes()
    start = _place(data, chance) if data else 0
    odd = (
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        "\u2028".encode(),
        b"\x85",
        b"\x0c",
        b"\r",
        b'"',
        b",",
        b";",
        b"\n",
        b"[" * 200,
        b"{" * 200,
        b"9" * 400,
        b"\xed\xa0\x80",
    )
    file.write_bytes(data[:start] + chance.choice(odd) * chance.choice((1, 1, 1, 50)) + data[start:])


def repeat(file: Path, chance: random.Random) -> None:
    """A part stands twice."""
    data = file.read_bytes()
    start = _place(data, chance) if data else 0
    part = data[start : start + chance.choice((1, 16, 256))]
    file.write_bytes(data[:start] + part * chance.choice((2, 3, 20)) + data[start + len(part) :])


def words(file: Path, chance: random.Random) -> None:
    """One number, name or text is another."""
    data = file.read_bytes()
    pairs = ((b"F16", b"F8_E4M3"), (b"F32", b"BOOL"), (b"true", b"1"), (b"null", b"0"), (b"0.", b"9."), (b"shape", b"shapes"), (b"[", b"[["), (b",", b";"), (b"\n", b"\r"), (b'"', b"'"))  # fmt: skip
    old, new = chance.choice(pairs)
    file.write_bytes(data.replace(old, new, chance.choice((1, 1, -1))))


def header(file: Path, chance: random.Random) -> None:
    """One value anywhere in the JSON of the file, or of its header, becomes something else."""
    data = file.read_bytes()
    is_json = data[:1] in b"{["
    length = 0 if is_json else int.from_bytes(data[:8], "little")
    try:
        value = json.loads(data if is_json else data[8 : 8 + length])
    except (ValueError, RecursionError):
        flip(file, chance)
        return
    facts = value.get("__metadata__") if isinstance(value, dict) else None
    if facts and isinstance(facts, dict) and chance.random() < 0.6:
        name = chance.choice(sorted(facts))
        try:
            inner = json.loads(facts[name])
        except (ValueError, TypeError):
            inner = facts[name]
        facts[name] = json.dumps(changed(inner, chance)) if chance.random() < 0.9 else chance.choice(("", "{", "[]", "null"))
    else:
        value = changed(value, chance)
    text = json.dumps(value).encode()
    file.write_bytes(text if is_json else len(text).to_bytes(8, "little") + text + data[8 + length :])


def changed(value: Any, chance: random.Random) -> Any:
    """JSON with one part replaced, taken out, or wrapped."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        made = dict(value) if isinstance(value, dict) else list(value)
        key: Any = chance.choice(sorted(made)) if isinstance(made, dict) else chance.randrange(len(made))
        if chance.random() < 0.1:
            del made[key]
        else:
            made[key] = changed(made[key], chance)
        return made
    return chance.choice((*HUGE, [value], {"kind": value}, nested(chance.choice((10, 100, 900)))))


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def special(file: Path, chance: random.Random) -> None:
    """Something else than a file stands there."""
    file.unlink()
    what = chance.randrange(5)
    if what == 0:
        os.mkfifo(file)
    elif what == 1:
        file.symlink_to("/dev/zero")
    elif what == 2:
        file.symlink_to(file)
    elif what == 3:
        file.mkdir()


def _place(data: bytes | bytearray, chance: random.Random) -> int:
    """A place in a file, mostly in its first part, where there is structure."""
    return chance.randrange(min(len(data), 2048) if chance.random() < 0.7 else len(data))


# Running.


def outcome(kind: Kind, folder: Path, whole: Any, seed: str) -> tuple[str, str]:
    """What becomes of one mutated file, and a word about it."""
    chance = random.Random(seed)
    for old in sorted(folder.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    kind.write(folder)
    mutated(chance.choice(sorted(path for path in folder.iterdir())), chance)
    try:
        found = kind.read(folder)
    except TimeoutError:
        return "hang", ""
    except ValueError as error:  # ArtefactErrors are ValueErrors too
        return ("refused", "") if len(str(error)) > 20 else ("traceback", repr(error))
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]}"
    return ("same", "") if found == whole else ("guards less", str(found)[:200])


def work(task: tuple[int, int, int]) -> tuple[list[tuple[str, str, str]], Counter[tuple[str, str]], int]:
    """A batch of cases: the remarkable ones, the counts, and the highest memory above what the libraries take."""
    _, start, stop = task
    warnings.simplefilter("ignore")
    own = kinds()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        whole = []
        for kind in own:
            (folder / kind.name).mkdir()
            kind.write(folder / kind.name)
            whole.append(kind.read(folder / kind.name))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts: Counter[tuple[str, str]] = Counter()
        odd = []
        signal.signal(signal.SIGALRM, _late)
        for index in range(start, stop):
            place = index % len(own)
            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            what, told = outcome(own[place], folder / own[place].name, whole[place], f"case {index}")
            signal.setitimer(signal.ITIMER_REAL, 0)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest > MEGABYTES << 10:
                what = "memory"
            counts[own[place].name, what] += 1
            if what not in ("refused", "same"):
                odd.append((own[place].name, f"case {index}: {what}", told))
    return odd, counts, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


def _late(*_: Any) -> None:
    raise TimeoutError


def batches(cases: int, size: int = 2000) -> Iterator[tuple[int, int, int]]:
    """Ranges of cases."""
    for number, start in enumerate(range(0, cases, size)):
        yield number, start, min(start + size, cases)


def main() -> None:
    """Runs the cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started, counts, odd, memory = time.monotonic(), Counter[tuple[str, str]](), [], 0
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=4) as pool:
        for strange, found, megabytes in pool.imap_unordered(work, batches(arguments.cases)):
            counts += found
            odd += strange
            memory = max(memory, megabytes)
            print(f"\r{sum(counts.values()):,} of {arguments.cases:,}", end="", flush=True)
    names = sorted({name for name, _ in counts})
    print(f"\n| {'kind':<14} | {'cases':>7} | " + " | ".join(f"{what:>11}" for what in OUTCOMES) + " |")
    print("|---|" + "---|" * (len(OUTCOMES) + 1))
    for name in (*names, "all"):
        own = [sum(count for (kind, result), count in counts.items() if result == what and name in (kind, "all")) for what in OUTCOMES]
        print(f"| {name:<14} | {sum(own):>7} | " + " | ".join(f"{count:>11}" for count in own) + " |")
    print(f"highest memory above the libraries' own: {memory} MB; {time.monotonic() - started:.0f} s, {arguments.jobs} workers")
    for line in odd[:40]:
        print(*line)
    if arguments.json:
        rows = {f"{kind}: {what}": count for (kind, what), count in sorted(counts.items())}
        arguments.json.write_text(json.dumps({"cases": arguments.cases, "counts": rows, "memory_mb": memory, "odd": odd}, indent=2) + "\n")


if __name__ == "__main__":
    main()
