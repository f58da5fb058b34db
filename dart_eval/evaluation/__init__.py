"""Evaluation of lm-eval tasks on a model that may be pruned. It knows methods only through `Session`."""
