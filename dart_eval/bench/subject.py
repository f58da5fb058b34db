"""The subject of `dart-eval bench decode`, its rows, their table, and the records of their speeds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pandas as pd
import torch

from dart_eval.bench import decode, shapes
from dart_eval.bench.decode import Row, Setting
from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import DTYPES, ModelSpec, choose_device, resolve
from dart_eval.pruning.calibration import ROUNDING_TEXT, Calibration
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dense import Dense
from dart_eval.results.metrics import asked
from dart_eval.results.show import Table
from dart_eval.sweep.plan import environment
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json, bits_text
from dart_eval.weights.rounding import Rounded, refuse_fixed

BYTES_ONLY = "bytes only"  # stands in place of times
# Fields that a stored speed has by itself.
FIELDS = ("method", "sparsity", "weights_read", "bits", "speedup", "control", "ceiling")
Note = Callable[[str], None]


class Subject(NamedTuple):
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
        for wanted in roundings:
            refuse_fixed(find_ffns(self.model), wanted)
            if wanted.by and self.tokenizer is None:
                raise UserError(
                    f"{wanted.text} calibrates on a text, and random weights have no tokenizer", "give a model"
                )
        text = Calibration(self.model, self.tokenizer, ROUNDING_TEXT)
        for rounding in (None, *roundings):
            where = f" on {bits_text(rounding.text)}" if rounding else ""
            if rounding is not None:
                note(f"measuring dense{where}")
                yield self._measured(Dense(), 0.0, setting, rounding)
            with contextlib.nullcontext() if rounding is None else Rounded(self.model, rounding, text).in_place():
                reasons = [self.refused(method, sparsity) for method in methods]
                if rounding is None and all(reasons) and (reason := reasons[0]):
                    raise UserError(f"{methods[0].spec} at sparsity {sparsity:g}: {reason.problem}", reason.remedy)
                for method, reason in zip(methods, reasons, strict=True):
                    if reason:
                        note(f"{method.spec}{where} at sparsity {sparsity:g} is left out: {reason}")
                    else:
                        note(f"measuring {method.spec}{where}")
                        yield self._measured(method, sparsity, setting, rounding)

    def _measured(
        self, method: Method, sparsity: float, setting: Setting, rounding: Rounding | None
    ) -> tuple[Row, Json]:
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


def _form(value: Any, form: str = "{0.median:.2f}x") -> str:
    """Return a number or a ratio of times as text; "-" where there is none."""
    return "-" if value is None else form.format(value)


def _read(row: Row) -> str:
    executed = row.weights_executed
    return f"{row.weights_read:.2f}" + (f" ({executed:.2f})" if executed not in (None, row.weights_read) else "")


COLUMNS_NOTE = "docs/concepts.md explains the columns."
QUARTILES, STEPS = "{0.median:.2f}x [{0.low:.2f}, {0.high:.2f}]", "{0.median:.2f}"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda r: r.method + (f" on {bits_text(r.bits)}" if r.bits else ""),
    "read": _read,
    "speed-up": lambda r: BYTES_ONLY if r.why else _form(r.speedup, QUARTILES),
    "over kernel": lambda r: _form(r.over_kernel),
    "ceiling": lambda r: f"{r.ceiling:.2f}x",
    "share": lambda r: _form(r.achieved_over_ceiling, "{:.2f}"),
    "control": lambda r: _form(r.control, QUARTILES),
    "prompt": lambda r: _form(r.first_token),
    "masks": lambda r: _form(r.remask_masks_dense_steps, STEPS),
    "changes": lambda r: _form(r.remask_moves_dense_steps, STEPS),
    "copies": lambda r: _form(r.begin_dense_steps, STEPS),
    "overhead": lambda r: "-" if r.overhead is None else f"{100 * r.overhead.median:.1f} %",
    "tokens/s": lambda r: _form(r.tokens_per_second, "{:.1f}"),
    "memory MB": lambda r: f"{r.memory / 10**6:.2f}",
    "state MB": lambda r: f"{r.state / 10**6:.2f}",
}


def table(rows: Sequence[Row], where: str) -> Table:
    """Return the table of decode speeds; columns that no row fills are left out.

    Args:
        where: the model and the hardware.
    """
    texts = {head: [text(row) for row in rows] for head, text in COLUMNS.items()}
    filled = {head: column for head, column in texts.items() if set(column) != {"-"}}
    timed = [row.speedup for row in rows if row.speedup is not None]
    sparse = [row for row in rows if row.sparsity]
    notes = [f"{where}; one sequence" + (f", asked read {asked(sparse[0].sparsity)}." if sparse else ".")]
    notes += [f"{timed[0].n} steps a row." if timed else "No method here can be timed.", COLUMNS_NOTE]
    if why := list(dict.fromkeys(row.why for row in rows if row.why)):
        notes.append(f"{BYTES_ONLY.capitalize()}: no kernel turns the saved bytes into time ({'; '.join(why)}).")
    body, data = [[*cells] for cells in zip(*filled.values(), strict=True)], [row.to_json() for row in rows]
    return Table("Decoding", [*filled], body, notes, data=pd.DataFrame(data, dtype=object))
