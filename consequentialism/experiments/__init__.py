"""Data, networks and training loops that the demo and the benchmarks share."""
