"""One judge per file."""
