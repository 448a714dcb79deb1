"""Probes: what can be read off an activation, and what a probe would have learned anyway."""
