"""Benchmarks: each prints a table with ours beside its peers, measured in one run."""
