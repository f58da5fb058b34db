"""Kernels in C for one token on a CPU."""
