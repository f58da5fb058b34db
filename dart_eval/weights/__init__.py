"""What makes other weights of a model's own: rounding, integer codes, formats of checkpoints."""
