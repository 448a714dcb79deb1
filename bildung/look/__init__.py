"""Insight: what happens inside a model, and what an operation changed there."""
