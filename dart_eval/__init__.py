"""dart-eval: an honest harness for dynamic FFN pruning of language models.

Python surface: `prune` (use a method while generating), `methods` (what there is), `evaluate` (run cells).
"""

from dart_eval.errors import UserError
from dart_eval.pruning.registry import methods
from dart_eval.pruning.session import prune

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "methods", "prune"]
