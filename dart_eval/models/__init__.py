"""Models: found, loaded, checked, identified."""
