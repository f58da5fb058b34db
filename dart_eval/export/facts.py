"""The facts about a finished cell that every format states, read from its record in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from dart_eval.results.format import sparsity as percent
from dart_eval.results.inputs import ASKED, DENSE, HOW, PRUNING, names
from dart_eval.results.labels import specs
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.util.bits import bits_text
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

# Settings of a cell other than its model, task and method, exported under their own names.
TRAVELLING = [n for n in (*names(ASKED), *names(HOW)) if n not in ("model", "task", *PRUNING)]
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """A cell as other projects see it.

    Attributes:
        store: its folder.
        record: its record.
        model: the model's name, as the user gave it or as `--model-id` replaces it.
        pruner: the method as a user types it.
    """

    store: Store
    record: Record
    model: str
    pruner: str

    @property
    def inputs(self) -> Json:
        """All settings that can change a number."""
        return self.record.inputs

    @property
    def task(self) -> str:
        """The task as requested: an lm-eval task, group or tag."""
        return str(self.inputs["task"])

    @property
    def sparsity(self) -> float:
        """The requested share of FFN weights that a token does not read."""
        return float(self.inputs["sparsity"])

    @property
    def prunes(self) -> bool:
        """Whether the model is not the dense one."""
        return self.record.weights_read < 1 or self.inputs["method"] != DENSE

    @property
    def title(self) -> str:
        """The pruner with its sparsity and its rounding of weights, in words for a person."""
        name = f"{self.pruner}{self.bits}"
        return f"{name} at {percent(self.sparsity)}" if self.sparsity else name

    @property
    def bits(self) -> str:
        """The rounding of the weights, in words: ` on 4 bits`; empty without one."""
        bits = self.inputs.get("ffn_bits")
        return f" on {bits_text(bits)}" if bits else ""

    def named(self, between: str) -> str:
        """The same for the name of a file or a model."""
        name = self.pruner + self.bits.replace(" ", "-")
        return f"{name}{between}{self.sparsity:g}" if self.sparsity else name

    @property
    def moment(self) -> datetime | None:
        """The time when the cell finished, in UTC; None if the record has it in an unknown form."""
        try:
            found = datetime.fromisoformat(self.record.created)
        except ValueError:
            return None
        return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)

    def leaves(self) -> list[str]:
        """The lm-eval tasks of the documents: the task itself, or the members of a group or tag."""
        return list(self.record.by_task) or [self.task]

    def details(self) -> Json:
        """Return facts without a field in other projects, by the names that docs/export.md explains."""
        record = self.record
        return {
            "pruner": self.pruner, "parameters": self.inputs["params"], "sparsity": self.sparsity,
            "ffn_bits": self.inputs.get("ffn_bits"),
            "read": record.weights_read, "effective_sparsity": record.effective_sparsity,
            "mask_sparsity": record.mask_sparsity, "extra_memory": record.memory.get("state"),
            **{name: record.settings[name] for name in ("upper_bound", "granularity") if record.settings.get(name)},
            **{name: self.inputs.get(name) for name in TRAVELLING},
            "tokens": record.tokens, "remasks": record.remasks, "cut": record.cut, "key": record.key,
        }  # fmt: skip


def facts(store: Store, records: Sequence[Record], model: str | None = None) -> list[Facts]:
    """Return the cells of a folder.

    Args:
        store: the folder.
        records: the exported records.
        model: a name that replaces the model's; None keeps each record's.
    """
    typed = specs(records)
    return [Facts(store, r, model or str(r.inputs["model"]["name"]), typed[r.key]) for r in records]


def check_model(name: str, records: Sequence[Record]) -> None:
    """Raise on a model name that the hub does not allow, or that several models would share.

    Raises:
        UserError: with the reason.
    """
    if not HUB_MODEL.fullmatch(name):
        raise UserError(f"--model-id {name!r} is no name on the hub", "give OWNER/NAME, as in google/gemma-3-270m")
    models = {json.dumps(r.inputs["model"], sort_keys=True) for r in records}
    if len(models) > 1:
        called = ", ".join(sorted({str(r.inputs["model"]["name"]) for r in records}))
        raise UserError(
            f"--model-id names one model, and the results are of {len(models)} ({called})",
            "keep each model's results in a folder of its own",
        )
