"""Many machines: Ray Data, with one loaded pipeline per worker."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from annotated_types import Ge

from ...errors import ArtefactError
from ..case import Outcome
from ..runs.engine import Engine, Job, counter
from ..runs.generate import Maker, built, generate_shard
from ..runs.manifest import Batch, Header, Row
from ..runs.sources import as_png, from_png
from ..runs.store import Made, opened

SETTLED: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_LOG_LEVEL": "CRITICAL", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}  # fmt: skip
"""Nothing is reported to anybody, and nothing is logged that users can't act upon."""
ATTEMPTS = 3
STUCK = 4 * 3600
"""Seconds without a finished round after which a run is given up: workers that die over the same work are started again until then."""


@dataclass(frozen=True)
class Ray(Engine):
    """Workers make rounds of batches and send the images here, where they are written: one writer, so no row comes twice.

    Joins the cluster of `RAY_ADDRESS`, or starts Ray on this machine. Only this machine needs the run's folder; the others need the package,
    and bundles and banks at the same paths. A worker that dies loses nothing: what it was at is done again by another one.
    """

    workers: Annotated[int, Ge(1)] = 2
    """How many pipelines are loaded."""

    def __call__(self, job: Job) -> None:
        """Makes what is not there yet."""
        built(job.manifest.header)  # says here, and at once, what is missing or has changed
        rounds = job.manifest.rounds()
        with opened(job.out, job.manifest, job.sources, remake=job.remake) as store:
            count = counter(job, rounds, store)
            todo = [left for together in rounds if (left := store.unfinished(together))]
            if not todo:
                return
            work = [pack(together, store.sources) for together in todo]
            with cluster(self.workers):
                for made in self._made(job.manifest.header, work):
                    store.keep(made)
                    count()

    def _made(self, header: Header, work: Sequence[str]) -> Iterator[list[Made]]:
        import ray

        gpus = 1 if self.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) >= self.workers else 0
        device = self.device if gpus or self.device != "auto" else "cpu"
        items = ray.data.from_items([{"work": one} for one in work], override_num_blocks=len(work))
        pictures = items.map_batches(  # Ray Data starts dead workers again, and gives their work to others
            Worker, batch_size=1, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(work))), num_cpus=1,
            num_gpus=gpus or None, fn_constructor_args=(json.dumps(header.to_json()), device, os.getcwd()),
        )  # fmt: skip
        try:
            for table in pictures.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [received(row) for row in table.to_pylist()]
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise RuntimeError(f"Ray gave up ({last[0]}); what is finished is kept, run the same command again to go on") from error


def received(row: Mapping[str, Any]) -> Made:
    """What a worker sent.

    Raises:
        RuntimeError: if it sent an error.
    """
    if row["error"]:
        raise RuntimeError(f"a worker failed: {row['error']}; what is finished is kept, run the same command again to go on")
    return Made(Outcome(**json.loads(row["outcome"])), row["png"])


class Worker:
    """What runs on each worker: loads the pipeline once, from its description. Errors travel as text, so that they arrive as they were told."""

    def __init__(self, header: str, device: str, folder: str) -> None:
        self.header, self.device, self.folder = Header.from_json(json.loads(header)), device, folder

    @cached_property
    def make(self) -> Maker:
        """The loaded pipeline."""
        with suppress(OSError):  # bundles are named by paths from where the command was given
            os.chdir(self.folder)
        return Maker.load(self.header, self.device)

    def __call__(self, table: Any) -> Any:
        """Images of some rounds: a table with the columns `outcome` (JSON), `png` and `error`."""
        import pyarrow

        try:
            made = [one for work in table["work"].to_pylist() for batch in self._round(work) for one in batch]
            rows = [(json.dumps(one.outcome.to_json()), one.png, "") for one in made]
        except Exception as error:  # a worker that dies by anything worse is started again by Ray
            rows = [("", b"", f"{type(error).__name__}: {error}")]
        outcomes, pictures, errors = zip(*rows, strict=True)
        return pyarrow.table({"outcome": list(outcomes), "png": pyarrow.array(pictures, pyarrow.large_binary()), "error": list(errors)})

    def _round(self, work: str) -> Iterator[list[Made]]:
        batches, sources = unpack(work)
        return generate_shard(batches, self.make, sources)


def pack(together: Sequence[Batch], sources: Mapping[str, Any]) -> str:
    """Batches, and their source images, as text."""
    names = {row.image for batch in together for row in batch if row.image is not None}
    images = {name: base64.b64encode(as_png(sources[name])).decode() for name in names}
    return json.dumps({"batches": [[vars(row) for row in batch] for batch in together], "sources": images})


def unpack(work: str) -> tuple[list[list[Row]], dict[str, Any]]:
    """The batches and source images again."""
    given = json.loads(work)
    sources = {name: from_png(base64.b64decode(image)) for name, image in given["sources"].items()}
    return [[Row(**row) for row in batch] for batch in given["batches"]], sources


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """A connection to Ray: the one that there is, the cluster of `RAY_ADDRESS`, or a Ray of our own on this machine, without its dashboard.

    Raises:
        ArtefactError: if Ray is missing, or there is no cluster at that address.
    """
    os.environ.update({name: value for name, value in SETTLED.items() if name not in os.environ})
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ArtefactError("this engine needs Ray; install it with `pip install 'safelight[ray]'`") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.execution_no_progress_timeout_s = False, STUCK
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    start(ray, {"address": address} if address else {"address": "local", "num_cpus": workers + 1, "include_dashboard": False})
    try:
        yield
    finally:
        ray.shutdown()


def start(ray: Any, where: Mapping[str, Any]) -> None:
    """Connects; a Ray of our own is given several chances, as it gives up after a few seconds on a busy machine.

    Raises:
        ArtefactError: if there is no cluster at that address.
        RuntimeError: if Ray does not start.
    """
    for left in reversed(range(ATTEMPTS if where["address"] == "local" else 1)):
        try:
            ray.init(**where, log_to_driver=False, logging_level="ERROR", configure_logging=True)
            return
        except ConnectionError as error:
            raise ArtefactError(
                f"no Ray cluster at {where['address']} answers; start one with `ray start --head`, set RAY_AUTH_MODE=token if it asks for a "
                "token, or unset RAY_ADDRESS to use this machine"
            ) from error
        except (Exception, SystemExit) as error:  # Ray raises nothing narrower when its processes don't come up in time
            ray.shutdown()
            if not left:
                raise RuntimeError(f"Ray does not start ({error}); if the machine is busy, try again later") from error
