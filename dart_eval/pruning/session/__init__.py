"""Sessions: a method at work on a model while a block runs."""
