"""A model in memory, as `dart_eval.evaluate` takes it, known by the name that the caller gives and by its weights."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dart_eval.layers.find import refuse_second
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.util.errors import UserError
from dart_eval.weights.checkpoint import check_tokenizer


@dataclass(frozen=True)
class Loaded(Resolved):
    """A model in memory and its tokenizer, in place of one that must be loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def named(cls, name: str | None, model: Any, tokenizer: object) -> Loaded:
        """Return a causal language model of transformers with its tokenizer.

        Raises:
            UserError: no name, another kind of model, one under `prune()` or without weights, or an unfit tokenizer.
        """
        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"the model is of type {type(model).__name__}, not a model of transformers",
                "give its name as text, or a PreTrainedModel (of a PEFT model what merge_and_unload() returns)",
            )
        refuse_second(model)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError("the model comes without a tokenizer", "give evaluate(model, tokenizer, ...)")
        if not (isinstance(name, str) and name):
            raise UserError("a model in memory needs a name, by which its cells are found again", "give name='mine'")
        if any(p.is_meta for p in model.parameters()):
            raise UserError(f"weights of model {name} are not in memory", "load it onto a device")
        check_tokenizer(name, model, tokenizer)
        identity = Identity(name, None, hash_parameters(model), loaded=True)
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(ModelSpec(name), name, identity, dtype, model, tokenizer, config=model.config)

    def load(self, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model itself in eval mode, and a copy of its tokenizer, which lm-eval changes."""
        return self.model.eval(), self.load_tokenizer()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer."""
        return copy.deepcopy(self.tokenizer)

    def outline(self) -> PreTrainedModel:
        """Return the model."""
        return self.model


def hash_parameters(model: PreTrainedModel) -> str:
    """Return the sha256 of a model's parameters, as torch saves them: torchao's are no plain tensors."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        content = io.BytesIO()
        torch.save(parameter.detach().cpu().clone(), content)  # of a view torch saves the whole
        digest.update(name.encode() + content.getbuffer())
    return digest.hexdigest()
