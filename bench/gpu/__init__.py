"""``python -m bench.gpu``: layers, steps and ops on a GPU, in CUDA graphs and eager, as a table, a CSV and a JSON."""
