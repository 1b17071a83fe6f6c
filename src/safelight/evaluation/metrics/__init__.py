"""Metrics, each with a 95 % interval; empty input raises."""
