"""Cells on Ray."""
