"""The parts that pruning methods are made of: one file a kind, see `base.Part` for what they have in common."""
