"""Slimming a trained network as a run: its parts, what is refused beforehand, its stages and what they write."""
