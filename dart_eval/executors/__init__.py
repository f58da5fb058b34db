"""Executors: run the cells of a plan. `local` is one process on this machine."""
