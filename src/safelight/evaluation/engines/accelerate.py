"""The processes of `accelerate launch` or `torchrun`, one shard each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ...errors import ArtefactError
from ..runs.engine import Engine, Job, make_here
from ..runs.merge import merge

PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the others."""


@dataclass(frozen=True)
class Accelerate(Engine):
    """Each process makes its shard; the first one merges them in the end. Without a launcher there is one process."""

    def __call__(self, job: Job) -> None:
        """Makes what is not there yet; returns when all processes are done."""
        crew = self._crew()
        shard = (crew.process_index, crew.num_processes) if crew.num_processes > 1 else None
        make_here(job, shard, str(crew.device) if self.device == "auto" else self.device)
        crew.wait_for_everyone()
        if crew.is_main_process:
            merge(job.out)
        crew.wait_for_everyone()

    def _crew(self) -> Any:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ArtefactError("this engine needs accelerate; install it with `pip install 'safelight[scale]'`") from error
        return PartialState(cpu=self.device == "cpu", timeout=PATIENCE)

    @property
    def leads(self) -> bool:
        """Only the first process reports."""
        return os.environ.get("RANK", "0") == "0"
