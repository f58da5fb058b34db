"""What a run imports, imported once: processes that are to start at once are forked from one that has it.

Not Ray: what it keeps of gRPC does not outlive a fork. It takes a tenth of a second on top of the rest.
"""

import atexit
import contextlib
import gc
import importlib
import signal

from tests.helpers import quick  # noqa: F401 - before anything runs

for name in (
    "dart_eval.cli", "dart_eval.sweep.run", "dart_eval.sweep.worker", "dart_eval.cluster.run",
    "dart_eval.bench.decode", "dart_eval.bench.overhead", "dart_eval.results.report",
    "dart_eval.results.check", "dart_eval.results.compare", "dart_eval.results.paper", "dart_eval.bench.tracing",
    "lm_eval.models.huggingface", "lm_eval.api.metrics", "transformers.models.llama.modeling_llama", "datasets",
    "transformers.generation.utils", "rouge_score.rouge_scorer", "sacrebleu.metrics", "matplotlib.figure",
    "tests.helpers.commands",
):  # fmt: skip
    with contextlib.suppress(ImportError):  # an extra that is not installed
        importlib.import_module(name)

gc.collect()
atexit.register(gc.unfreeze)  # libraries look at the end for what was not freed
gc.freeze()  # children do not look through it at every cell, which copies its pages, too
# The server restores this in its children: one that is stopped before `cli.main` has its handlers ends without a word.
signal.signal(signal.SIGINT, signal.SIG_DFL)
