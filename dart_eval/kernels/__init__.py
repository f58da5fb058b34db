"""What makes bytes into time."""
