"""Kernels that turn bytes saved into time saved."""
