"""Benchmarks: workloads of this package and of its peers, timed in turn."""
