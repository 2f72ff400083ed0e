"""Seeing what a step does to a network: `diagnose`, `find_damping` and `Monitor`."""
