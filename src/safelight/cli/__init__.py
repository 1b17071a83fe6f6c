"""The command line. `safelight --help` must be quick: heavy imports happen inside commands."""

from .app import main

__all__ = ["main"]
