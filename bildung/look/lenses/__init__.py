"""Lenses: what the model would say if it stopped after a layer."""
