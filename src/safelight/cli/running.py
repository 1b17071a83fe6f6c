"""`plan`, `run` and `merge`: the first pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .console import emit, progress, quiet
from .generating import BankFile, Guards, Json, Pipeline, Settings, Steps

INCOMPLETE = 3
"""The exit code of a command that did its work, though rows failed or are missing."""


@app.command()
def plan(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder; its manifest.jsonl is written.")],
    pipeline: Pipeline = "testbed/sd",
    benchmark: Annotated[str | None, typer.Option("--benchmark", "-b", help="testbed/weapons, testbed/benign, …")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Instead: a text file with one prompt a line.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Instead: a published protocol (see `safelight protocols`), with its list as --source.")] = None,
    source: Annotated[str | None, typer.Option(help="Your copy of the protocol's list: a file, or hub:owner/name/file.")] = None,
    custom: Annotated[str | None, typer.Option(help="Take another list with the protocol's settings, under this name.")] = None,
    benign: Annotated[bool, typer.Option("--benign", help="The file's prompts ask for nothing unsafe.")] = False,
    category: Annotated[str, typer.Option(help="The category of the file's prompts.")] = "",
    count: Annotated[int | None, typer.Option(min=1, help="Only so many prompts (a benchmark: 200).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt and arm.")] = 1,
    guard: Guards = [], settings: Settings = [], bank: BankFile = None,
    arm: Annotated[list[str], typer.Option("--arm", help="A further arm: \"NAME=GUARD[+GUARD…] [guard.field=value …]\".")] = [],
    forced: Annotated[bool, typer.Option("--forced", help="Add an arm in which the guard's detectors flag everything.")] = False,
    base: Annotated[bool, typer.Option(help="The unguarded arm.")] = True,
    steps: Steps = None,
    call: Annotated[list[str], typer.Option("--call", help="A call argument of the pipeline as name=JSON, e.g. guidance_scale=7.5.")] = [],
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Writes a manifest: one line per image to be made. Nothing is generated."""
    from ..compose import call_settings
    from ..evaluation.runs.manifest import NAME, save
    from ..evaluation.runs.manifest import plan as planned
    from ..evaluation.runs.prompt_lines import repeated
    from ..evaluation.runs.store import check_outcomes

    arms = _arms(pipeline, guard, settings, bank, arm, forced, base)
    asked = _asked(benchmark, prompts, protocol, source, custom, pipeline, not benign, category, count)
    chosen = call_settings(pipeline) | ({"num_inference_steps": steps} if steps else {}) | _arguments(call)
    manifest, images = planned(
        repeated(asked.cases, seeds), arms, pipeline=pipeline, settings=chosen, protocol=asked.protocol, version=asked.version, batch=batch,
        own_settings=asked.settings,
    )  # fmt: skip
    check_outcomes(out, manifest)
    save(manifest, images, out / NAME)
    result = {
        "manifest": str(out / NAME),
        "rows": len(manifest.rows),
        "arms": list(arms),
        "protocol": asked.protocol,
        "list": asked.dropped,
    }
    told = f"{out / NAME}: {len(manifest.rows):,} images in {len(arms)} arms ({', '.join(arms)})"
    emit(result, as_json, told + (f"; {asked.dropped}" if asked.dropped else ""))


@app.command()
def run(
    manifest: Annotated[Path, typer.Argument(help="A manifest, or the folder it is in.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where images go; else the manifest's folder.")] = None,
    engine: Annotated[str, typer.Option(help="local, accelerate (under `accelerate launch` or torchrun), or ray.")] = "local",
    shard: Annotated[str | None, typer.Option(help="Only a part, e.g. 0/4 to 3/4; local engine only.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many pipelines Ray loads.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU if there is one.")] = "auto",
    remake: Annotated[bool, typer.Option("--remake", help="Make images again that are gone, instead of refusing.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Makes a manifest's images; the same command goes on where it stopped."""
    from ..evaluation.runs.engine import Job
    from ..evaluation.runs.manifest import Manifest, sources_of
    from ..evaluation.runs.store import read_outcomes

    file = _file(manifest)
    planned, folder = Manifest.read(file), out or file.parent
    chosen = _engine(engine, device, shard, workers)
    quiet()
    _warn_of_drift(planned.header.versions)
    before = len(read_outcomes(folder))
    with progress(as_json or not chosen.leads) as advance:
        chosen(Job(planned, sources_of(file), folder, remake, advance))
    done = len(read_outcomes(folder))
    result = {"out": str(folder), "engine": engine, "shard": shard, "rows": len(planned.rows), "images": done, "new": done - before}
    if chosen.leads:
        emit(result, as_json, f"{folder}: {done:,} of {len(planned.rows):,} images, {done - before:,} of them new")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The run's folder: its shards become one.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders of the same manifest from other machines.")] = [],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Joins shards, and folders from several machines, to one run without duplicates. Exit code 3: rows are missing."""
    from ..evaluation.runs.merge import merge as merged

    found = merged(out, folders)
    missing = [f"{row.arm}/{row.case}" for row in found.missing]
    told = f"{out}: {found.rows:,} images" + (f"; {len(missing):,} are missing: {some(missing)}" if missing else ", none missing")
    emit({"out": str(out), "images": found.rows, "missing": missing}, as_json, told)
    if missing:
        raise typer.Exit(INCOMPLETE)


def some(names: list[str], most: int = 5) -> str:
    """The first few of many."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _arms(
    pipeline: str, guards: list[str], settings: list[str], bank: Path | None, further: list[str], forced: bool, base: bool
) -> dict[str, Any]:  # fmt: skip
    from ..evaluation.runs.arms import Arm

    arms = {"base": Arm()} if base else {}
    if guards:
        arms["guard"] = Arm.plan(guards, pipeline, settings, bank)
    elif settings or forced:
        raise ValueError("--set and --forced are about the guards of --guard; name one, or write settings into --arm")
    if forced:
        arms["forced"] = Arm.plan(guards, pipeline, settings, bank, forced=True)
    for text in further:
        name, equals, rest = text.partition("=")
        words = rest.split()
        if not equals or not words or "=" in words[0] or not name.strip():
            raise ValueError(f'--arm {text!r} is not of the form "NAME=GUARD[+GUARD…] [guard.field=value …]"')
        if name in arms:
            raise ValueError(f"there are two arms of the name {name!r}; give each one of its own")
        arms[name] = Arm.plan(words[0].split("+"), pipeline, words[1:], bank)
    return arms


def _asked(
    benchmark: str | None, prompts: Path | None, protocol: str | None, source: str | None, custom: str | None, pipeline: str, unsafe: bool,
    category: str, count: int | None,
) -> Any:  # fmt: skip
    from ..evaluation.runs.asked import from_benchmark, from_lines, from_protocol

    if sum(one is not None for one in (benchmark, prompts, protocol)) != 1:
        raise ValueError("say what to generate: one of --benchmark NAME, --prompts FILE and --protocol NAME")
    if protocol is None and (source or custom):
        raise ValueError("--source and --custom belong to a protocol; name it with --protocol")
    if protocol is not None:
        return from_protocol(protocol, source, pipeline, custom=custom, count=count)
    if prompts is not None:
        return from_lines(prompts, unsafe=unsafe, category=category, count=count)
    return from_benchmark(str(benchmark), count)


def _arguments(call: list[str]) -> dict[str, Any]:
    found = {}
    for text in call:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            raise ValueError(
                f"--call {text!r} is not of the form name=JSON, e.g. guidance_scale=7.5 or negative_prompt='\"blurry\"'"
            ) from None
        if not equals or not name.strip():
            raise ValueError(f"--call {text!r} has no name; write name=JSON, e.g. guidance_scale=7.5")
    return found


def _file(manifest: Path) -> Path:
    from ..evaluation.runs.manifest import NAME

    return manifest / NAME if manifest.is_dir() else manifest


def _engine(name: str, device: str, shard: str | None, workers: int | None) -> Any:
    from ..evaluation.runs.engine import ENGINES

    cls: Any = ENGINES[name]
    given: dict[str, Any] = {"device": device}
    for option, value, owner in (("shard", None if shard is None else _shard(shard), "local"), ("workers", workers, "ray")):
        if value is not None and name != owner:
            raise ValueError(f"--{option} is for --engine {owner}; the engine {name} divides the work by itself")
        if value is not None:
            given[option] = value
    return cls(**given)


def _shard(text: str) -> tuple[int, int]:
    index, slash, of = text.partition("/")
    if not slash or not index.isdigit() or not of.isdigit() or not int(index) < int(of):
        raise ValueError(f"--shard {text!r} is not of the form 0/4: which shard, counted from 0, of how many")
    return int(index), int(of)


def _warn_of_drift(planned: Mapping[str, str]) -> None:
    from ..evaluation.runs.fingerprint import versions

    here = versions()
    if changed := [f"{name} {planned[name]} -> {here.get(name)}" for name in planned if here.get(name) != planned[name]]:
        typer.echo(f"note: planned with other versions ({some(changed)}); images may differ in their last bits", err=True)
