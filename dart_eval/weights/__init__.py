"""Weights in few bits: rounding, integer codes, formats of checkpoints."""
