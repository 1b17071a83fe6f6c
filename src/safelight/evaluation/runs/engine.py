"""Manifest -> images: what runs the first pass, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...registry import Registry
from .generate import Maker, generate_shard
from .manifest import Manifest, Round
from .sources import Sources
from .store import Shard, Store, opened

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What is to be made, and where it goes."""

    manifest: Manifest
    sources: Sources
    out: Path
    remake: bool = False
    """Whether images that are gone are made again, instead of refused."""
    progress: Progress = lambda *_: None


@dataclass(frozen=True)
class Engine:
    """Runs `generate_shard` over a manifest. Subclasses are dataclasses of settings, one per file in `engines/`."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU if there is one."""

    def __call__(self, job: Job) -> None:
        """Makes what is not there yet.

        Raises:
            ArtefactError: if the folder is in use or damaged, or something that the manifest names has changed.
        """
        raise NotImplementedError

    @property
    def leads(self) -> bool:
        """Whether this process is the one that reports."""
        return True


ENGINES: Registry[Engine] = Registry("safelight.evaluation.engines", Engine)


def make_here(job: Job, shard: Shard, device: str) -> None:
    """Makes a manifest's images, or a shard of them, in this process; the pipeline is loaded only if there is something to do."""
    rounds = job.manifest.rounds() if shard is None else job.manifest.shard(*shard)
    with opened(job.out, job.manifest, job.sources, shard, job.remake) as store:
        count = counter(job, rounds, store)
        unfinished = store.unfinished(batch for together in rounds for batch in together)
        if unfinished:
            for made in generate_shard(unfinished, Maker.load(job.manifest.header, device), store.sources):
                store.keep(made)
                count()


def counter(job: Job, rounds: Sequence[Round], store: Store) -> Callable[[], None]:
    """Reports how many of these rows are done, now and whenever it is called."""
    ids = {row.id for together in rounds for batch in together for row in batch}

    def count() -> None:
        job.progress("generating", len(ids & store.done.keys()), len(ids))

    count()
    return count
