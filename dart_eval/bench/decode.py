"""The decode speed of a pruned model, against the dense model and the hardware's limit.

Everything that is compared runs in turn, step by step, in one process: the dense model, the dense model once more (a
control, which should be as fast as itself), the dense model with its FFNs in our own product, where there is one (a
yardstick of the same care), the method, and the method's slices without its overhead. Dense is a second
model, which `prune()` never touches: it has the FFN weights once more, bit for bit, and shares all others
(`dense_copy`). Each has a KV cache of its own, of the same length. Ratios are medians over steps of times that lie next
to each other, so that what else the machine does hits both; weights that take turns drive each other out of the
processor's cache alike.

The ceiling: a decoded token reads every weight once, so a model whose FFNs are the share phi of the weights it reads
cannot decode faster than 1 / (1 - phi (1 - r)) times the dense one, r being the FFN weights read.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dart_eval.bench.dense_copy import by_kernel, own_bytes, twin
from dart_eval.bench.row import Row
from dart_eval.kernels.cpu.ffns import CodedFFN
from dart_eval.kernels.fast import WholeFFN, act_of, why_no_kernel
from dart_eval.kernels.mask_rows import swapped
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.shape import stored_share
from dart_eval.pruning import cost
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.session import Session, prune
from dart_eval.results.speeds import paired
from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.util.errors import UserError
from dart_eval.util.machine import timed
from dart_eval.weights.rounding import rounded, served_bits, served_share

CHANGED = 0.2  # share of the masks' neurons that the timed re-mask replaces
ALL_WEIGHTS = "packed products read all weights of a matrix"


@dataclass(frozen=True)
class Setting:
    """The settings of a timing.

    Attributes:
        prompt_tokens: the length of each round's prompt.
        steps: the tokens decoded in a round.
        rounds: the number of timed rounds, after one that warms up.
    """

    prompt_tokens: int = 128
    steps: int = 30
    rounds: int = 3


def check_timeable(method: Method) -> None:
    """Raise if a method cannot be timed.

    Raises:
        UserError: it does not prune, looks ahead, or prunes only the first tokens.
    """
    if method.releases:
        raise UserError(f"{method.spec} runs dense after its first tokens", "time it without remask.release")
    if not method.prunes or method.looks_ahead:
        raise UserError(f"{method.name} cannot be timed", "choose a method that prunes and does not look ahead")


def check_length(model: PreTrainedModel, tokens: int, what: str, remedy: str) -> None:
    """Raise if a prompt and the tokens after it do not fit into a model's positions.

    Args:
        tokens: of both. what: their name. remedy: of the error.

    Raises:
        UserError: with both numbers.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UserError(f"{what} have {tokens} tokens, the model takes {longest}", remedy)


@torch.no_grad()
def measure(
    model: PreTrainedModel, method: Method, sparsity: float, setting: Setting = Setting(), *, tokenizer: Any = None,
    rounding: Rounding | None = None,
) -> Row:  # fmt: skip
    """Time one method on one sequence of random tokens, or count its reads where no kernel turns them into time.

    Args:
        method: `dense` is timed on rounded weights, beside itself unrounded.
        tokenizer: of the model, for methods that calibrate on a text.
        rounding: of the FFN weights; None: none. Of `dense` it is applied here, of other methods it is in place.

    Raises:
        UserError: a method that looks ahead or does not prune, or no memory for the FFN weights of the dense side.
    """
    ffns = find_ffns(model)
    if rounding is None or method.prunes:
        check_timeable(method)
    if rounding is None:
        why = why_no_kernel(method, ffns)
    else:
        why = cost.why_not_packed(ffns, rounding) or (ALL_WEIGHTS if method.prunes else None)
    if method.prunes:
        execution: Any = "masked" if why else "auto"
        bench = Bench(model, model if why else twin(model))
        with prune(model, method, sparsity, tokenizer=tokenizer, execution=execution) as run:
            times = _by_masks(model, run, bench, setting) if why else _time(model, run, bench, setting)
            # Of the model's own bytes, which may have few bits already.
            read, state = run.weights_read / (served_share(ffns) if rounding is None else 1.0), run.state_bytes
            memory = cost.memory(run.method, ffns, run.fast.available, state, rounding)
    else:
        assert rounding is not None
        times = {} if why else _time_rounded(model, rounding, setting)
        read, state = served_bits(ffns, rounding) / OWN_BITS, 0
        memory = cost.memory(method, ffns, False, state, rounding)
    # As the weights lie in memory: a head that is not quantised weighs more beside FFNs that are.
    ceiling = 1 / (1 - stored_share(model, ffns) * (1 - read))
    best = times.get("over_kernel") or times.get("speedup")
    return Row(
        method.spec, sparsity if method.prunes else 0.0, rounding.text if rounding else None, read, ceiling, memory,
        state, why=why, achieved_over_ceiling=best.median / ceiling if best else None, **times,
    )  # fmt: skip


def _by_masks(model: PreTrainedModel, run: Session, bench: Bench, setting: Setting) -> dict[str, Any]:
    """Let a method read by masks, as many tokens as what it reads varies by; there is nothing to time."""
    cache = bench.cache()
    bench.step(model, bench.tokens(setting.prompt_tokens), cache)
    for _ in range(1 if run.method.exact else setting.steps):
        bench.step(model, bench.tokens(1), cache)
    return {}


@contextlib.contextmanager
def packed_ffns(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Run a model's FFNs on rounded weights inside the block: single tokens, while prompts run on the model's own.

    Raises:
        UserError: no kernel runs them (`cost.why_not_packed`), or the weights are quantised.
    """
    if reason := cost.why_not_packed(find_ffns(model), rounding):
        raise UserError(reason, "take a dense model, and use 4:128, 5:128, 6:128 or 8:128")
    kernels = []
    for ffn in find_ffns(model):
        gate, up, down = (rounded(plain_matrix(m), rounding) for m in ffn.projections)
        kernels.append(WholeFFN(ffn, CodedFFN(gate, up, down, act_of(ffn) or "")))
    with swapped(kernels):
        yield


class Times:
    """Seconds of each side; entries at one place of the lists of a kind were measured in turn.

    Attributes:
        steps: of a decoded token.
        prompts: of a prompt.
        masks: of new scores and masks; empty if the method has no ring to compute them from.
        moves: of copying the changed rows.
        once: of copying all rows of the masks.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {name: [] for name in ("dense", "again", "kernel", "pruned", "bare")}
        self.prompts: dict[str, list[float]] = {"dense": [], "pruned": []}
        self.masks: dict[str, list[float]] = {"dense": [], "remask": []}
        self.moves: dict[str, list[float]] = {"dense": [], "remask": []}
        self.once: dict[str, list[float]] = {"dense": [], "begin": []}

    def of_tokens(self) -> dict[str, Any]:
        """Return the fields of a row that any timed row has."""
        steps = self.steps
        if not steps["pruned"]:
            problem = "every timed step makes new masks or runs dense after an alarm, and none is left to time"
            raise UserError(problem, "give more --steps")
        return {
            "speedup": paired(steps["dense"], steps["pruned"]),
            "control": paired(steps["dense"], steps["again"]),
            "over_kernel": paired(steps["kernel"], steps["pruned"]) if steps["kernel"] else None,
            "dense_tokens_per_second": 1 / statistics.median(steps["dense"]),
            "tokens_per_second": 1 / statistics.median(steps["pruned"]),
        }

    def of_masks(self) -> dict[str, Any]:
        """Return the fields of a row that rows with masks have beside."""
        masks = self.masks if self.masks["dense"] else None
        return {
            "first_token": paired(self.prompts["pruned"], self.prompts["dense"]),
            "remask_masks_dense_steps": paired(masks["remask"], masks["dense"]) if masks else None,
            "remask_moves_dense_steps": paired(self.moves["remask"], self.moves["dense"]),
            "begin_dense_steps": paired(self.once["begin"], self.once["dense"]),
            "overhead": paired(self.steps["pruned"], self.steps["bare"], 1.0),
        }


def _time(model: PreTrainedModel, run: Session, bench: Bench, setting: Setting) -> dict[str, Any]:
    """Return the fields of the row of a pruned model that are times, and what it multiplies."""
    times = Times()
    bench.rounds(run, times, setting)
    for _ in range(max(3, setting.rounds)):
        bench.move(run, times.moves)
        if isinstance(run.method, Dart) and run.method.keeps_ring:  # to compute new masks from
            bench.remask(run, times.masks)
    for _ in range(max(3, setting.rounds)):
        bench.begin(run, times.once)
    copies, everything = run.fast.copies, sum(f.size * f.matrices for f in run.ffns)
    assert copies is not None
    executed = sum(sum(kept.rows_read) for kept in copies) / everything
    return {"weights_executed": executed, "twin_bytes": own_bytes(model), **times.of_tokens(), **times.of_masks()}


def _time_rounded(model: PreTrainedModel, rounding: Rounding, setting: Setting) -> dict[str, Any]:
    """Return the fields of the row of the dense model on rounded weights that are times."""
    times, bench = Times(), Bench(model, twin(model))
    with packed_ffns(model, rounding):
        bench.rounds(None, times, setting)
    return {"twin_bytes": own_bytes(model), **times.of_tokens()}


class Bench:
    """The variants of a step: those of the pruned model, and its dense twin's."""

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel) -> None:
        self.model, self.dense = model, dense
        self.full = None if dense is model else by_kernel(dense)
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.vocabulary = model.config.get_text_config().vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.cache_name = cache_argument(model)

    def tokens(self, count: int) -> Tensor:
        """Return [1, count] random token ids."""
        return torch.randint(self.vocabulary, (1, count), generator=self.generator).to(self.device)

    def step(self, model: PreTrainedModel, tokens: Tensor, cache: Any) -> tuple[float, Any]:
        """Run one forward of the pruned model or its twin, with logits at the last position."""
        kwargs = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        return timed(lambda: model(input_ids=tokens, **kwargs), self.device)

    def rounds(self, run: Session | None, times: Times, setting: Setting) -> None:
        """Time prompts and their decoding, all variants in turn; the first round warms up and is discarded.

        Args:
            run: of the pruned model; None: the model as it is (`pruned`) is timed beside its twin.
            times: the times are added to its steps and prompts, without those of steps with a re-mask, or dense ones
                after an alarm.

        Raises:
            UserError: rows of the model's weights cannot be copied.
        """
        for i in range(1 + setting.rounds):
            self._round(run, times if i else Times(), setting.prompt_tokens, setting.steps)
            if run is not None and run.fast.copies is None:
                raise UserError("rows of this model's weights cannot be copied: no time to save", "load it unquantised")

    def _round(self, run: Session | None, times: Times, prompt: int, steps: int) -> None:
        ids, lacking = self.tokens(prompt), {"kernel": not self.full, "bare": run is None}
        order = [name for name in times.steps if not lacking.get(name)]
        caches = {name: self.cache() for name in order}
        times.prompts["pruned"].append(self.step(self.model, ids, caches["pruned"])[0])
        times.prompts["dense"].append(self.step(self.dense, ids, caches["dense"])[0])
        for name in caches.keys() - times.prompts.keys():
            self.step(self.dense, ids, caches[name])
        for _ in range(steps):
            token, seen = self.tokens(1), 0 if run is None else len(run.events)
            dense = None if run is None or run.rows is None else run.method.dense_now(run.rows)
            whole = dense is not None and bool(dense.any())
            found = {name: self._one(run, name, token, caches[name]) for name in order}
            order.append(order.pop(0))  # each variant comes first as often
            for name, seconds in found.items():
                if run is None or (len(run.events) == seen and not whole):
                    times.steps[name].append(seconds)

    def _one(self, run: Session | None, name: str, token: Tensor, cache: Any) -> float:
        if name == "pruned":
            return self.step(self.model, token, cache)[0]
        if name == "bare" and run is not None:
            with run.paused(), swapped(run.fast.copies or ()):
                return self.step(self.model, token, cache)[0]
        with swapped(self.full if name == "kernel" and self.full else ()):
            return self.step(self.dense, token, cache)[0]

    def _dense(self) -> float:
        return timed(lambda: self.dense(input_ids=self.tokens(1), logits_to_keep=1), self.device)[0]

    def move(self, run: Session, times: dict[str, list[float]]) -> None:
        """Time the second half of a re-mask: a fifth of every mask's neurons is replaced."""
        copies, changed = run.fast.copies, []
        assert copies is not None
        for mask in (own.clone() for own in run.masks(0)):
            inside, outside = mask.nonzero().flatten(), (~mask).nonzero().flatten()
            moved = min(round(CHANGED * len(inside)), len(outside))
            mask[inside[torch.randperm(len(inside), generator=self.generator)[:moved]]] = False
            mask[outside[torch.randperm(len(outside), generator=self.generator)[:moved]]] = True
            changed.append(mask)
        times["dense"].append(self._dense())
        copied = timed(lambda: [copy.select(mask) for copy, mask in zip(copies, changed, strict=True)], self.device)
        times["remask"].append(copied[0])
        for copy, mask in zip(copies, run.masks(0), strict=True):
            copy.select(mask)

    def remask(self, run: Session, times: dict[str, list[float]]) -> None:
        """Time the first half of a re-mask: new scores and masks from the ring; no weights are copied."""
        assert run.rows is not None and isinstance(run.method, Dart)
        method, rows = run.method, run.rows.select(torch.arange(len(run.rows)))
        everyone = torch.ones(len(rows), dtype=torch.bool, device=rows.seen.device)
        times["dense"].append(self._dense())
        times["remask"].append(timed(lambda: method.make_masks(rows, everyone), self.device)[0])

    def begin(self, run: Session, times: dict[str, list[float]]) -> None:
        """Time a new copy of the weights of the masks' neurons."""
        assert run.rows is not None
        masks = run.method.masks(run.rows)
        times["dense"].append(self._dense())
        run.fast.drop()

        def copy() -> None:
            run.fast.choose(1, by_hand=True)
            run.fast.copy_rows(masks)

        times["begin"].append(timed(copy, self.device)[0])

    def cache(self) -> DynamicCache:
        """Return an empty cache."""
        return DynamicCache(config=self.model.config)
