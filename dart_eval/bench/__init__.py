"""What `dart-eval bench` measures on a loaded model."""
