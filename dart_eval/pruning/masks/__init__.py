"""Masks of neurons: scores, re-masks, allocations, compensations."""
