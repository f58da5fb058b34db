"""Models: found, loaded, checked, told apart."""
