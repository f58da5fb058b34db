"""The measurements of `dart-eval bench`: times beside a control, and counts of state and FLOPs."""
