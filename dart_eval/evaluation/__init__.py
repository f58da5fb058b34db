"""Evaluation: lm-eval tasks on a (perhaps pruned) model. Knows methods only through `Session`."""
