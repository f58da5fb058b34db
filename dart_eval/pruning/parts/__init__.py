"""The parts that pruning methods are made of: one file a kind, see `base.Part` for what they have in common.

No file here imports torch before something is computed: names and values of parts are checked without it, at once.
"""
