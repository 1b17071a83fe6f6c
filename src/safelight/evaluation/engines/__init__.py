"""One way of running the first pass per file."""
