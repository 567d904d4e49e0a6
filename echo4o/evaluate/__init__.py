"""Benchmarks: draw, judge, report."""
