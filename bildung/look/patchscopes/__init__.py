"""Patchscopes: a vector of one run read by another run."""
