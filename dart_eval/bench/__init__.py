"""What methods cost: time, measured; state and FLOPs, counted."""
