"""Inputs, and bits of weights, that a token leaves out."""
