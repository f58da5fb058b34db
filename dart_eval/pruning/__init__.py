"""Pruning: methods, their registry, and `prune()`, which attaches one to a model. Knows no tasks."""
