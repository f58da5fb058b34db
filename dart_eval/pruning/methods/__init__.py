"""Methods: one file a method or a family."""
