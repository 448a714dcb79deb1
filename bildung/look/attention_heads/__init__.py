"""Attention heads, by their weights and by what they do."""
