"""The commands' names; each lives in a file of its own."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .console import early_quiet, fail

app = typer.Typer(
    name="safelight", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Diffusion image generators and editors made safe at inference time.",
)  # fmt: skip


INTERRUPTED = 130
UsageProblem: Any = typer.BadParameter.__mro__[2]  # click's base class of errors, which newer versions of typer vendor


def main() -> None:
    """Runs a command; errors that name a cause and a remedy are shown without a traceback."""
    from . import (  # noqa: F401  (each registers its commands)
        analysing,
        artefacts,
        attacking,
        dictionaries,
        evaluating,
        generating,
        judging,
        protocols,
        reporting,
        running,
        showing,
        testbed,
        training,
    )  # fmt: skip

    with early_quiet():
        try:
            code = app(standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except UsageProblem as error:
            error.show()
            sys.exit(error.exit_code)
        except (ValueError, TypeError, RuntimeError, FileNotFoundError) as error:
            sys.exit(_code(str(error)))
        except OSError as error:
            reason = "the disk is full; free some space and run the same command again" if error.errno == 28 else str(error)
            sys.exit(_code(reason))
    if code == INTERRUPTED:  # typer may have caught it first
        fail("interrupted; finished work is kept, run the same command again to go on", code)
    sys.exit(code)


def _code(message: str, code: int = 1) -> int:
    return int(fail(message, code).exit_code)
