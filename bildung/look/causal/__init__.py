"""Causal analysis: what changes when an activation is replaced."""
