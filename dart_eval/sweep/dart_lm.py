"""`lm_eval --model dart`: a model under a method in lm-eval's own command line, with the numbers of `dart-eval run`.

lm-eval finds it through the entry point `lm_eval.models`. Releases that do not read entry points (0.4.13 and before)
have it from `dart-eval lm-eval`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from lm_eval.api.instance import Instance

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.task_names import config_of as task_config
from dart_eval.evaluation.task_names import own
from dart_eval.evaluation.tasks import weigh_scored_text
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.calibration import ROUNDING_TEXT, Calibration
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session import Session, prune
from dart_eval.sweep.options import config_of
from dart_eval.util.bits import parse as bits
from dart_eval.util.errors import UserError, nearest
from dart_eval.weights.rounding import Rounded

OF_LM = ("chunk", "enable_thinking", "think_end_token", "add_bos_token")  # `PrunedLM` takes these
KNOWN = {
    *(field.name for field in dataclasses.fields(ModelSpec)), *OF_LM,
    "method", "sparsity", "scope", "ffn_bits", "calibration", "batch_size", "max_length",
}  # fmt: skip


class DartLM(PrunedLM):
    """A model that is pruned as long as this object lives.

        lm_eval --model dart --model_args pretrained=./llama,method=griffin,sparsity=0.5 --tasks arc_easy

    Args:
        pretrained: a hub id, a folder or a GGUF file; None: the demo model.
        method: one method, with its options; `dense` for none.
        sparsity: share of the FFN weights that a decoded token does not read, in [0, 1).
        device: None: auto, and so is CUDA where there is none, as lm-eval has it.
        batch_size: contexts per forward, or `auto`; also `auto:4`, as lm-eval has it.
        max_batch_size: taken from lm-eval and not used: `auto` computes its own.
        others: options of `dart-eval run` (docs/options.md): `ffn_bits`, `scope`, and how the model is loaded.

    Raises:
        UserError: the input is wrong.
    """

    def __init__(
        self, pretrained: str | None = None, method: str = "dart", sparsity: float = 0.7, device: str | None = None,
        batch_size: int | str = 8, max_batch_size: int | None = None, **others: Any,
    ) -> None:  # fmt: skip
        if odd := sorted(others.keys() - KNOWN):
            raise UserError(f"--model dart has no argument {odd[0]!r}", nearest(odd[0], KNOWN))
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        asked = config_of({
            "model": pretrained, "method": [method], "sparsity": [sparsity], "device": device,
            "batch_size": str(batch_size).partition(":")[0], **others,
        })  # fmt: skip
        pruner, (rounding, *_) = make(*parse(asked.method[0])), map(bits, asked.ffn_bits)
        if pruner.looks_ahead and asked.scope != "scored":
            raise UserError(f"method {pruner.name} needs scored tokens for its mask, and scope={asked.scope} has none",
                            "use scope=scored")  # fmt: skip
        model, tokenizer = resolve(asked).load()
        more = {name: getattr(asked, name) for name in OF_LM}
        super().__init__(model, tokenizer, asked.batch_size, asked.max_length, **more)
        weigh_scored_text()
        self._stack = contextlib.ExitStack()  # open as long as the object: the model is nobody else's
        if rounding is not None:
            text = Calibration(model, tokenizer, asked.calibration or ROUNDING_TEXT)
            self._stack.enter_context(Rounded(model, rounding, text).in_place())
        session: Session = Session()
        if pruner.prunes:
            session = self._stack.enter_context(
                prune(model, pruner, asked.sparsity[0], tokenizer=tokenizer, calibration=asked.calibration,
                      execution="masked")
            )  # fmt: skip
        self.begin(session, {}, scope=asked.scope)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        names = {str(r.task_name) for r in requests} & own().keys()
        whole = {name for name in names if (task_config(name).get("metadata") or {}).get("whole_tokens")}
        answers: dict[int, tuple[float, bool]] = {}
        for flag in (False, True):
            self.whole_tokens = flag  # as in a run of the task alone
            group = [i for i, r in enumerate(requests) if (r.task_name in whole) == flag]
            if group:
                said = super().loglikelihood([requests[i] for i in group], disable_tqdm)
                answers |= dict(zip(group, said, strict=True))
        return [answers[i] for i in range(len(requests))]

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
        raise UserError("lm-eval's response cache knows neither the model nor the method", "leave --use_cache out")
