"""Detectors, one per file. The folder is the registry."""
