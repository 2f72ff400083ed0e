"""Layers with emended gradients, and their way into a model and out of it."""
