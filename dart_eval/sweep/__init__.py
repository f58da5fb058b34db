"""A sweep: its options, its cells and their keys, and how they are run on this machine."""
