"""`lm_eval --model dart`: a model under a method in lm-eval's own command line, with the numbers of `dart-eval run`.

lm-eval finds it through the entry point `lm_eval.models`. Releases that do not read entry points (0.4.13 and before)
find it after `register`, which `dart-eval lm-eval` calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry, register_model

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.task_names import config_of, own
from dart_eval.evaluation.tasks import weigh_scored_text
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session import Session, prune
from dart_eval.sweep.options import Scope
from dart_eval.util.bits import parse as bits
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json
from dart_eval.weights.rounding import Rounded

NAME = "dart"  # of `--model`
LOADING = {f.name for f in dataclasses.fields(ModelSpec)} - {"model", "device"}
OF_LM = {"chunk", "enable_thinking", "think_end_token", "add_bos_token"}  # `PrunedLM` takes these
NO_CACHE = "lm-eval's response cache knows neither the model nor the method", "leave --use_cache out"


class DartLM(PrunedLM):
    """A model that is pruned as long as this object lives.

        lm_eval --model dart --model_args pretrained=./llama,method=griffin,sparsity=0.5 --tasks arc_easy

    Args:
        pretrained: a hub id, a folder or a GGUF file; None: the demo model.
        method: as on the command line, `griffin` or `dart:remask.window=8`; `dense` for none.
        sparsity: share of the FFN weights that a decoded token does not read, in [0, 1).
        scope: which tokens run pruned when answers are scored (docs/concepts.md).
        ffn_bits: rounding of the FFN weights, `4` or `6:128`; None: none.
        calibration: a text file for methods that calibrate; None: the project's own text.
        batch_size: contexts per forward, or `auto`.
        max_length: tokens, context and continuation together; None: the model's.
        device: as of `dart-eval run`; None: auto, and so is CUDA where there is none, as lm-eval has it.
        max_batch_size: taken from lm-eval and not used: `auto` computes its own.
        others: how to load the model (`dtype`, `revision`, `peft`, ...), and options of `PrunedLM`.

    Raises:
        UserError: the input is wrong.
    """

    def __init__(
        self, pretrained: str | None = None, method: str = "dart", sparsity: float = 0.7,
        scope: str = "scored", ffn_bits: str | int | None = None, calibration: str | None = None,
        batch_size: int | str = 8, max_length: int | None = None, device: str | None = None,
        max_batch_size: int | None = None, **others: Any,
    ) -> None:  # fmt: skip
        if odd := sorted(others.keys() - LOADING - OF_LM):
            raise UserError(f"--model dart has no argument {odd[0]!r}", nearest(odd[0], sorted(LOADING | OF_LM)))
        if scope not in get_args(Scope):
            raise UserError(f"unknown scope {scope!r}", nearest(scope, get_args(Scope)))
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        loading = {name: value for name, value in others.items() if name in LOADING}
        model, tokenizer = resolve(ModelSpec(pretrained, device=device, **loading)).load()
        size = int(batch_size) if str(batch_size).isdigit() else str(batch_size).partition(":")[0]  # auto:4
        if size != "auto" and not isinstance(size, int):
            raise UserError(f"batch_size {batch_size!r} is no number of contexts", "give a number or auto")
        more = {name: value for name, value in others.items() if name in OF_LM}
        super().__init__(model, tokenizer, size, max_length, **more)
        weigh_scored_text()
        self._stack = contextlib.ExitStack()  # open as long as the object: the model is nobody else's
        if ffn_bits is not None and (rounding := bits(str(ffn_bits))) is not None:
            self._stack.enter_context(Rounded(model, rounding).in_place())
        session: Session = Session()
        if (pruner := make(*parse(method))).looks_ahead and scope != "scored":
            raise UserError(f"method {pruner.name} needs scored tokens for its mask, and scope={scope} has none",
                            "use scope=scored")  # fmt: skip
        if pruner.prunes:
            session = self._stack.enter_context(
                prune(model, pruner, sparsity, tokenizer=tokenizer, calibration=calibration, execution="masked")
            )
        self.begin(session, {}, scope=scope)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        names = {str(r.task_name) for r in requests} & own().keys()
        whole = {name for name in names if _metadata(name).get("whole_tokens")}
        found: dict[int, tuple[float, bool]] = {}
        for flag in (False, True):
            self.whole_tokens = flag  # as in a run of the task alone
            some = [i for i, r in enumerate(requests) if (r.task_name in whole) == flag]
            answers = super().loglikelihood([requests[i] for i in some], disable_tqdm) if some else []
            found |= dict(zip(some, answers, strict=True))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self._check_scope("perplexities")
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._check_scope("generated texts")
        self.journal.clear()  # of an earlier call, which may have drawn with another seed
        return super().generate_until(requests, disable_tqdm)

    def _check_scope(self, what: str) -> None:
        if self.scope != "scored":
            raise UserError(f"scope={self.scope} is for scored answers, not for {what}", "use scope=scored")

    def set_cache_hook(self, cache_hook: object) -> None:
        """Refuse lm-eval's response cache."""
        raise UserError(*NO_CACHE)


def _metadata(task: str) -> Json:
    found = config_of(task).get("metadata")
    return found if isinstance(found, dict) else {}


def register() -> None:
    """Make `--model dart` known to lm-eval."""
    if NAME not in model_registry:
        register_model(NAME)(DartLM)
