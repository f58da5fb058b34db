"""What attaches a method to a model while a block runs."""
