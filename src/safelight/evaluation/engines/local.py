"""One process."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.engine import Engine, Job, make_here
from ..runs.store import Shard


@dataclass(frozen=True)
class Local(Engine):
    """Makes a manifest's images, or one shard of them, in this process."""

    shard: Shard = None

    def __call__(self, job: Job) -> None:
        """Makes what is not there yet."""
        make_here(job, self.shard, self.device)
