"""Benchmarks, one data set per file."""
