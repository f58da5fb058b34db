"""What would be done again for every cell is done once a process, for tests alone: no number comes of it."""

import functools

from torch.utils import collect_env

# lm-eval asks after every cell, by `pip list` and others: half a second of processes. Nothing of ours looks at it.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
