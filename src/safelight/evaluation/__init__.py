"""Generate, judge, report: evaluation that others can reproduce."""
