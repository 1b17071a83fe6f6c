"""The same images, row by row, whoever makes them; and nothing is lost when a worker dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safelight.errors import ArtefactError
from safelight.evaluation.benchmarks.testbed import find
from safelight.evaluation.engines.local import Local
from safelight.evaluation.engines.ray import Ray, Worker, cluster, pack, received, start, unpack
from safelight.evaluation.runs.arms import Arm
from safelight.evaluation.runs.engine import ENGINES, Job
from safelight.evaluation.runs.manifest import NAME, Manifest, plan, save, sources_of
from safelight.evaluation.runs.merge import merge
from safelight.evaluation.runs.store import read_outcomes

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'safelight[ray]'")
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed; pip install 'safelight[scale]'"
)


def planned(out: Path, pipeline: str = "testbed/sd", benchmark: str = "testbed/weapons", count: int = 4, batch: int = 2) -> Manifest:
    from safelight.compose import call_settings

    arms = {"base": Arm(), "guard": Arm.plan(["dual_latent"], pipeline, ["dual_latent.until=0.5"])}
    settings = call_settings(pipeline) | {"num_inference_steps": 2}
    manifest, images = plan(find(benchmark).cases(count), arms, pipeline=pipeline, settings=settings, batch=batch)
    save(manifest, images, out / NAME)
    return manifest


def job(out: Path, **options: Any) -> Job:
    return Job(Manifest.read(out / NAME), sources_of(out / NAME), out, **options)


def rows(out: Path) -> dict[str, tuple[str, Any]]:
    """What must be equal: hashes of the images as floats, and records."""
    return {outcome.id: (outcome.sha256, outcome.record) for outcome in read_outcomes(out)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    planned(out)
    Local()(job(out))
    return out


def test_engines_are_found_by_name() -> None:
    assert ENGINES.names() == ["accelerate", "local", "ray"]
    assert ENGINES["local"] is Local


def test_local_shards_are_equal_to_the_whole(local: Path, tmp_path: Path) -> None:
    planned(tmp_path)
    for index in range(2):
        Local(shard=(index, 2))(job(tmp_path))
    assert not merge(tmp_path).missing
    assert rows(tmp_path) == rows(local)
    assert any(record for _, record in rows(local).values())


def test_what_has_changed_since_planning_is_refused(tmp_path: Path) -> None:
    manifest = planned(tmp_path)
    header = manifest.header
    other = replace(header, arms={**header.arms, "guard": replace(header.arms["guard"], settings=("dual_latent.until=0.4",))})
    with pytest.raises(ArtefactError, match="no longer what it was when the manifest was planned"):
        Local()(replace(job(tmp_path), manifest=replace(manifest, header=other)))
    weights = replace(header, artefacts={**header.artefacts, "unet.safetensors": "0" * 24})
    with pytest.raises(ArtefactError, match=r"unet.safetensors differs"):
        Local()(replace(job(tmp_path), manifest=replace(manifest, header=weights)))
    nameless = replace(header, arms={"base": Arm(), "guard": replace(header.arms["guard"], guards=())})
    with pytest.raises(ArtefactError, match="planned in Python"):
        Local()(replace(job(tmp_path), manifest=replace(manifest, header=nameless)))


def test_work_travels_as_text(tmp_path: Path) -> None:
    manifest = planned(tmp_path, "testbed/kontext", "testbed/edits-unsafe", 2)
    (together,) = manifest.rounds()
    batches, sources = unpack(pack(together, sources_of(tmp_path / NAME)))
    assert batches == together
    assert set(sources) == set(manifest.images)
    case = find("testbed/edits-unsafe").cases(1)[0]
    assert (batches[0][0].to_case(sources).image == case.image).all()  # type: ignore[attr-defined, union-attr]


@needs_ray
def test_a_workers_error_arrives_as_it_was_told(tmp_path: Path) -> None:
    import pyarrow

    manifest = planned(tmp_path)
    broken = replace(manifest.header, pipeline="testbed/sdxl", artefacts={})
    worker = Worker(json.dumps(broken.to_json()), "cpu", os.getcwd())
    table = worker(pyarrow.table({"work": [pack(manifest.rounds()[0], {})]}))
    (row,) = table.to_pylist()
    assert row["error"].startswith("ArtefactError: testbed/sdxl is not what it was when the manifest was planned")
    with pytest.raises(RuntimeError, match="a worker failed: ArtefactError: testbed/sdxl is not what it was"):
        received(row)


class Busy:
    """Stands in for Ray on a machine on which it does not start at once."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures, self.asked = list(failures), 0

    def init(self, **options: Any) -> None:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)

    def shutdown(self) -> None: ...


def test_ray_is_given_several_chances_to_start() -> None:
    slow = Exception("The current node timed out during startup")
    patient = Busy(slow, SystemExit(1))
    start(patient, {"address": "local"})
    assert patient.asked == 3
    with pytest.raises(RuntimeError, match=r"Ray does not start .*timed out.* busy"):
        start(Busy(*[slow] * 9), {"address": "local"})
    away = Busy(ConnectionError("no"))
    with pytest.raises(ArtefactError, match=r"no Ray cluster at 10.0.0.7:6379 answers; .* unset RAY_ADDRESS"):
        start(away, {"address": "10.0.0.7:6379"})
    assert away.asked == 1


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray on this machine for all tests, with two workers."""
    with cluster(2):
        import ray

        yield ray


@pytest.mark.slow
@needs_ray
def test_ray_makes_the_same_rows(local: Path, tmp_path: Path, ray: Any) -> None:
    planned(tmp_path)
    seen: list[tuple[int, int]] = []
    Ray(workers=2)(job(tmp_path, progress=lambda what, done, total: seen.append((done, total))))
    assert rows(tmp_path) == rows(local)
    assert (seen[0], seen[-1]) == ((0, 8), (8, 8))
    assert len((tmp_path / "outcomes.jsonl").read_text().splitlines()) == 8
    Ray(workers=2)(job(tmp_path))  # nothing to do


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_loses_nothing(tmp_path: Path, ray: Any) -> None:
    planned(tmp_path / "ray", "testbed/kontext", "testbed/edits-unsafe", 6, 1)
    planned(tmp_path / "local", "testbed/kontext", "testbed/edits-unsafe", 6, 1)
    killed: list[int] = []

    def kill_one(what: str, done: int, total: int) -> None:
        if done >= 2 and not killed:
            pid = next(actor["Pid"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE")
            os.kill(pid, signal.SIGKILL)
            killed.append(done)

    Ray(workers=2)(job(tmp_path / "ray", progress=kill_one))
    assert killed
    assert killed[0] < 12, "it was killed before the end"
    Local()(job(tmp_path / "local"))
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    lines = [json.loads(line)["id"] for line in (tmp_path / "ray" / "outcomes.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 12
    assert merge(tmp_path / "ray").rows == 12


@pytest.mark.slow
@needs_accelerate
def test_processes_of_a_launcher_share_the_work(local: Path, tmp_path: Path) -> None:
    planned(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "safelight.cli",
        "run",
        str(tmp_path),
        "--engine",
        "accelerate",
        "--device",
        "cpu",
        "--json",
    ]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert json.loads(told[0][0])["images"] == 8
    assert told[1][0] == "", "one process reports"
    assert rows(tmp_path) == rows(local)
    assert [file.name for file in tmp_path.glob("outcomes*")] == ["outcomes.jsonl"]
