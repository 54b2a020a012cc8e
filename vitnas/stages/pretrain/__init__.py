"""Pretraining on images without labels, as a run with a table of stages of its own."""
