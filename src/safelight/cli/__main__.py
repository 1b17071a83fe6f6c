"""`python -m safelight.cli`, for launchers of processes."""

from . import main

main()
