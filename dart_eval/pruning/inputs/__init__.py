"""Inputs and single weights that a token leaves out."""
