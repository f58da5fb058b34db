"""What would be done again for every cell and process is left out, for tests alone: no number comes of it."""

from torch.utils import collect_env

# lm-eval asks after every cell, by `pip list` and others: half a second of processes. Nothing of ours looks at it.
collect_env.get_pretty_env_info = lambda: "not asked"
