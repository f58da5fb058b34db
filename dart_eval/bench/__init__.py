"""What `dart-eval bench` measures: time, beside a control; state and FLOPs, counted."""
