"""The subject of `dart-eval bench decode`, its rows, and the records of their speeds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from dart_eval.bench import decode, shapes
from dart_eval.bench.decode import Setting
from dart_eval.bench.row import BYTES_ONLY, Row
from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import DTYPES, ModelSpec, choose_device, resolve
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dense import Dense
from dart_eval.sweep.plan import environment
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json
from dart_eval.weights.rounding import Rounded, refuse_fixed

# Fields that a stored speed has by itself.
FIELDS = ("method", "sparsity", "weights_read", "bits", "speedup", "control", "ceiling")
Note = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model to time.

    Attributes:
        model: loaded.
        tokenizer: its tokenizer; None if the weights are random.
        identity: the fields that identify the model, as in the inputs of a cell.
        dtype: of its weights.
    """

    model: Any
    tokenizer: Any
    identity: dict[str, Any]
    dtype: str

    @property
    def hardware(self) -> str:
        """The GPU's name, or the number of threads."""
        cuda = self.model.device.type == "cuda"
        threads = torch.get_num_threads()
        return torch.cuda.get_device_name(self.model.device) if cuda else f"{threads} thread{'s' * (threads > 1)}"

    @property
    def title(self) -> str:
        """The model and the hardware, for people."""
        return f"{self.identity['name']}, {self.dtype}, {self.hardware}"

    def refused(self, method: Method, sparsity: float) -> UserError | None:
        """Return why a method cannot run here at this sparsity, or None if it can."""
        if method.calibrates and self.tokenizer is None:
            return UserError("it calibrates on a text, and random weights have no tokenizer", "give a model")
        try:
            method.check(find_ffns(self.model), sparsity)
        except UserError as error:
            return error
        return None

    def rows(
        self, methods: Sequence[Method], sparsity: float, setting: Setting, roundings: Sequence[Rounding], note: Note
    ) -> Iterator[tuple[Row, Json]]:
        """Measure methods on the model's own weights, then dense and methods on rounded ones, one after the other.

        Args:
            note: receives what is measured next, and the methods that cannot run.

        Raises:
            UserError: no method can run, or the weights cannot be rounded.
        """
        if roundings:
            refuse_fixed(find_ffns(self.model))
        for rounding in (None, *roundings):
            where = f" on {rounding.text} bits" if rounding else ""
            if rounding is not None:
                yield self._measured(Dense(), 0.0, setting, rounding, note)
            with contextlib.nullcontext() if rounding is None else Rounded(self.model, rounding).in_place():
                reasons = {method.spec: self.refused(method, sparsity) for method in methods}
                if rounding is None and all(reasons.values()):
                    spec, reason = next(iter(reasons.items()))
                    assert reason is not None
                    raise UserError(f"{spec} at sparsity {sparsity:g}: {reason.problem}", reason.remedy)
                for method in methods:
                    if reason := reasons[method.spec]:
                        note(f"{method.spec}{where} at sparsity {sparsity:g} is left out: {reason}")
                    else:
                        yield self._measured(method, sparsity, setting, rounding, note)

    def _measured(
        self, method: Method, sparsity: float, setting: Setting, rounding: Rounding | None, note: Note
    ) -> tuple[Row, Json]:
        note(f"measuring {method.spec}{f' on {rounding.text} bits' if rounding else ''}")
        row = decode.measure(self.model, method, sparsity, setting, tokenizer=self.tokenizer, rounding=rounding)
        measured = dataclasses.asdict(row)
        more = {name: value for name, value in measured.items() if name not in FIELDS}
        return row, {
            "method": method.spec, "params": method.params(), "sparsity": row.sparsity if method.sized else 0.0,
            "model": self.identity, "dtype": self.dtype, "device": self.model.device.type, "hardware": self.hardware,
            "compiled": None, "prompt_tokens": setting.prompt_tokens, "read": row.weights_read, "ffn_bits": row.bits,
            **{name: measured[name] for name in ("speedup", "control", "ceiling")},
            "times": BYTES_ONLY if row.why else "measured", "environment": environment(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "more": {"steps": setting.steps, "rounds": setting.rounds, **more},
        }  # fmt: skip


def subject(spec: ModelSpec, shape: str | None, layers: int | None, note: Callable[[str], None]) -> Subject:
    """Return the model to time, loaded or with random weights.

    Args:
        spec: the model; of a shape its dtype and device.
        shape: the name of a shape, in place of a model.
        layers: the number of the shape's layers to use; None: all.
        note: receives warnings about the checkpoint.

    Raises:
        UserError: there is none, or a name or number is wrong.
    """
    if shape is not None and spec.model is not None:
        raise UserError("--shape and --model are both given", "leave one of them out")
    if shape is None:
        if layers is not None:
            raise UserError("--layers is for a shape", "give --shape, or leave it out")
        resolved = resolve(spec)
        note(f"loading {resolved.identity.name}")
        return Subject(*resolved.load(note), resolved.identity.to_json(), resolved.dtype)
    kind: Any = torch.bfloat16 if spec.dtype == "auto" else DTYPES[spec.dtype]
    made = shapes.with_random_weights(shape, layers, kind, choose_device(spec.device))
    name = f"{shape}, {made.config.get_text_config().num_hidden_layers} layers, random weights"
    identity = {"name": name, "revision": None, "weights": None}
    return Subject(made, None, identity, str(kind).removeprefix("torch."))
