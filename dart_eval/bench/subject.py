"""The subject of `dart-eval bench decode`, and the records of its speeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from dart_eval.bench import bytes_only, decode, packed, shapes
from dart_eval.bench.bytes_only import BytesOnly
from dart_eval.bench.decode import DecodeSpeed
from dart_eval.bench.packed import RoundedSpeed
from dart_eval.kernels.fast import why_no_kernel
from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import DTYPES, ModelSpec, choose_device, resolve
from dart_eval.pruning.method import Method
from dart_eval.results.speeds import Speed
from dart_eval.sweep.plan import environment
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError

# Fields that a stored speed has by itself.
FIELDS = ("method", "sparsity", "weights_read", "read", "bits", "speedup", "control", "ceiling")


@dataclass(frozen=True)
class Setting:
    """The settings of a timing.

    Attributes:
        prompt_tokens: the length of each round's prompt.
        steps: the tokens decoded in a round.
        rounds: the number of timed rounds.
    """

    prompt_tokens: int
    steps: int
    rounds: int


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
    def title(self) -> str:
        """The model, for people."""
        return f"{self.identity['name']}, {self.dtype}"

    @property
    def hardware(self) -> str:
        """The GPU's name, or the number of threads."""
        cuda = self.model.device.type == "cuda"
        threads = torch.get_num_threads()
        return torch.cuda.get_device_name(self.model.device) if cuda else f"{threads} thread{'s' * (threads > 1)}"

    def refused(self, method: Method, sparsity: float) -> UserError | None:
        """Return why a method cannot run here at this sparsity, or None if it can."""
        return bytes_only.refused(self.model, method, sparsity, self.tokenizer)

    def measure(self, method: Method, sparsity: float, setting: Setting) -> DecodeSpeed | BytesOnly:
        """Time one method (`decode.measure`), or count its reads if there is nothing to time."""
        if why_no_kernel(method, find_ffns(self.model)):  # no kernel turns its bytes into time
            return self.count(method, sparsity, setting)
        return decode.measure(self.model, method, sparsity, tokenizer=self.tokenizer, **dataclasses.asdict(setting))

    def count(self, method: Method, sparsity: float, setting: Setting, rounding: Rounding | None = None) -> BytesOnly:
        """Count the weights that one method reads, see `bytes_only.measure`."""
        return bytes_only.measure(
            self.model, method, sparsity, tokenizer=self.tokenizer, prompt_tokens=setting.prompt_tokens,
            steps=setting.steps, rounding=rounding,
        )  # fmt: skip

    def measure_rounded(self, rounding: Rounding, setting: Setting) -> RoundedSpeed | BytesOnly:
        """Time the dense model on rounded FFN weights (`packed.measure`), or count its reads."""
        if why := packed.why_no_kernel(self.model, rounding):
            return bytes_only.alone(self.model, rounding, why)
        return packed.measure(
            self.model, rounding, prompt_tokens=setting.prompt_tokens, steps=setting.steps, rounds=setting.rounds
        )

    def speed(self, result: DecodeSpeed | RoundedSpeed | BytesOnly, method: Method, setting: Setting) -> Speed:
        """Return the stored part of a measurement. method: its method; `dense` for rounding alone."""
        more = {name: value for name, value in dataclasses.asdict(result).items() if name not in FIELDS}
        row = bytes_only.as_row(result)
        times: dict[str, Any] = {"speedup": None, "control": None, "times": bytes_only.BYTES_ONLY}
        if not isinstance(result, BytesOnly):
            times = {"speedup": result.speedup, "control": result.control}
        return Speed(
            method=method.spec, params=method.params(), sparsity=row["sparsity"] if method.sized else 0.0,
            model=self.identity, dtype=self.dtype, device=self.model.device.type, hardware=self.hardware,
            compiled=None, prompt_tokens=setting.prompt_tokens,
            read=row["weights_read"], ceiling=result.ceiling, **times,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            more={"steps": setting.steps, "rounds": setting.rounds, **more}, environment=environment(),
            ffn_bits=row.get("bits"),
        )  # fmt: skip


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
        return Subject(*resolved.load(note), resolved.identity.to_json(), resolved.dtype)
    kind: Any = torch.bfloat16 if spec.dtype == "auto" else DTYPES[spec.dtype]
    made = shapes.with_random_weights(shape, layers, kind, choose_device(spec.device))
    name = f"{shape}, {made.config.get_text_config().num_hidden_layers} layers, random weights"
    identity = {"name": name, "revision": None, "weights": None}
    return Subject(made, None, identity, str(kind).removeprefix("torch."))
