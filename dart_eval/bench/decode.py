"""The decode speed of a pruned model, against the dense model and the hardware's limit.

Everything that is compared runs in turn, step by step, in one process: the dense model, the dense model once more (a
control, which should be as fast as itself), the dense model with its FFNs in our own product, where there is one (a
yardstick of the same care), the method, and the method's slices without its overhead. Dense is a second
model, which `prune()` never touches: it has the FFN weights once more, bit for bit, and shares all others
(`twin`). Each has a KV cache of its own, of the same length. Ratios are medians over steps of times that lie next
to each other, so that what else the machine does hits both; weights that take turns drive each other out of the
processor's cache alike.

The ceiling: a decoded token reads every weight once, so a model whose FFNs are the share phi of the weights it reads
cannot decode faster than 1 / (1 - phi (1 - r)) times the dense one, r being the FFN weights read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dart_eval.kernels.cpu.ffns import CodedFFN
from dart_eval.kernels.fast import WholeFFN, act_of, why_no_kernel
from dart_eval.kernels.mask_rows import RowCopies, swapped
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.shape import stored_share
from dart_eval.pruning import cost
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.session import Session, prune
from dart_eval.results.speeds import Ratio, paired
from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.util.machine import timed
from dart_eval.weights.rounding import rounded, served_bits, served_share

CHANGED = 0.2  # share of the masks' neurons that the timed re-mask replaces
M = TypeVar("M", bound=nn.Module)
ALL_WEIGHTS = "packed products read all weights of a matrix"


class Setting(NamedTuple):
    """The settings of a timing.

    Attributes:
        prompt_tokens: the length of each round's prompt.
        steps: the tokens decoded in a round.
        rounds: the number of timed rounds, after one that warms up.
    """

    prompt_tokens: int = 128
    steps: int = 30
    rounds: int = 3


@dataclass(frozen=True)
class Row:
    """What was measured of one method. Times are ratios to the dense model's; None where `why` gives the reason.

    Attributes:
        bits: the rounding of the FFN weights, as a user types it; None: none.
        weights_read: FFN bytes that a decoded token reads / the model's own; on rounded weights / those of 16 bits.
        ceiling: the largest speed-up that the bytes of this model allow at that read.
        memory: bytes beside the dense model while one sequence decodes. state: those that each sequence adds.
        why: the reason why no kernel turns these bytes into time; None: the row is timed.
        weights_executed: FFN weights that this execution multiplies / all (a token's choice inside its mask saves reads
            only where a kernel skips them).
        speedup: dense step / the method's step. control: dense step / dense step.
        over_kernel: step of the dense model in our own product / the method's step; None where there is none.
        achieved_over_ceiling: over_kernel / ceiling, or speedup / ceiling where there is no kernel.
        first_token: prompt's time with scoring, masks and the first copies / dense prompt's time.
        remask_masks_dense_steps: the first half of a re-mask, in dense steps: new scores and masks are made from the
            inputs in the ring. None where the method keeps no ring.
        remask_moves_dense_steps: the second half, in dense steps: in every layer a fifth of the kept neurons gives way
            to others, whose weights are copied.
        begin_dense_steps: once for the first prompt of a `prune()`, in dense steps: copying the kept neurons' weights.
        overhead: what hooks, detector and ring buffer add to a pruned step, as a share of it.
        dense_tokens_per_second, tokens_per_second: for orientation; they hold for this machine at this moment.
        twin_bytes: of the FFN weights that the dense side has once more; the benchmark's alone, in no other number.
    """

    method: str
    sparsity: float
    bits: str | None
    weights_read: float
    ceiling: float
    memory: int
    state: int
    why: str | None = None
    weights_executed: float | None = None
    speedup: Ratio | None = None
    control: Ratio | None = None
    over_kernel: Ratio | None = None
    achieved_over_ceiling: float | None = None
    first_token: Ratio | None = None
    remask_masks_dense_steps: Ratio | None = None
    remask_moves_dense_steps: Ratio | None = None
    begin_dense_steps: Ratio | None = None
    overhead: Ratio | None = None
    dense_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    twin_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers: of a ratio its median, with `NAME_quartiles` and `NAME_n`."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            plain[field.name] = value.median if isinstance(value, Ratio) else value
            if isinstance(value, Ratio):
                plain |= {f"{field.name}_quartiles": [value.low, value.high], f"{field.name}_n": value.n}
        return plain


def check_timeable(method: Method) -> None:
    """Raise if a method cannot be timed.

    Raises:
        UserError: it does not prune, looks ahead, writes texts its own way, or prunes only the first tokens.
    """
    if method.releases:
        raise UserError(f"{method.spec} runs dense after its first tokens", "time it without remask.release")
    if not method.prunes or method.looks_ahead or method.inner is not method:
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
    times: dict[str, Any] = {}
    if method.prunes:
        execution: Any = "masked" if why else "auto"
        bench = Bench(model, model if why else twin(model))
        with prune(model, method, sparsity, tokenizer=tokenizer, execution=execution) as run:
            if why:  # it reads by masks, for as many tokens as its reads vary by
                cache = bench.cache()
                for count in (setting.prompt_tokens, *[1] * (1 if run.method.exact else setting.steps)):
                    bench.step(model, bench.tokens(count), cache)
            else:
                times = _time(run, bench, setting)
            # Of the model's own bytes, which may have few bits already.
            read, state = run.weights_read / (served_share(ffns) if rounding is None else 1.0), run.state_bytes
            memory = cost.memory(run.method, ffns, run.fast.available, state, rounding)
    else:
        assert rounding is not None
        if not why:
            bench = Bench(model, twin(model))
            with packed_ffns(model, rounding):
                times = bench.rounds(None, setting).of_tokens()
        read, state = served_bits(ffns, rounding) / OWN_BITS, 0
        memory = cost.memory(method, ffns, False, state, rounding)
    if times:
        times["twin_bytes"] = sum(t.numel() * t.element_size() for t in own_tensors(model).values())
    # As the weights lie in memory: a head that is not quantised weighs more beside FFNs that are.
    ceiling = 1 / (1 - stored_share(model, ffns) * (1 - read))
    best = times.get("over_kernel") or times.get("speedup")
    return Row(
        method.spec, sparsity if method.prunes else 0.0, rounding.text if rounding else None, read, ceiling, memory,
        state, why=why, achieved_over_ceiling=best.median / ceiling if best else None, **times,
    )  # fmt: skip


def twin(model: M) -> M:
    """Return a second model whose FFN projections have copies of their own; every other parameter and buffer is shared.

    Under `prune()` the neurons stand in another order and down in another layout, which has products of its own: a
    forward there without hooks is dense, and yet not the model that a user runs without `prune()`. The twin is, bit for
    bit, for as long as the other one is changed.

    Raises:
        UserError: the memory does not hold the copies.
    """
    own = own_tensors(model)
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in own}
    try:
        return copy.deepcopy(model, shared)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "the memory does not hold a second copy of the FFN weights, which the dense side is timed on",
            "give a smaller model, or --shape with fewer --layers",
        ) from None


def own_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Return the tensors of a model's FFN projections, by id: those that its twin has once more."""
    modules = [module for f in find_ffns(model) for module in f.projections]
    return {id(t): t for module in modules for t in [*module.parameters(), *module.buffers()]}


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
    """Seconds of tokens and prompts by side; entries at one place of the lists were measured in turn."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {name: [] for name in ("dense", "again", "kernel", "pruned", "bare")}
        self.prompts: dict[str, list[float]] = {"dense": [], "pruned": []}

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


def _time(run: Session, bench: Bench, setting: Setting) -> dict[str, Any]:
    """Return the fields of the row of a pruned model that are times, and what it multiplies."""
    times = bench.rounds(run, setting)
    copies = run.fast.copies
    assert copies is not None

    def in_dense_steps(work: Callable[[], float], repeats: int = max(3, setting.rounds)) -> Ratio:
        pairs = [(bench.dense_step(), work()) for _ in range(repeats)]
        return paired([seconds for _, seconds in pairs], [dense for dense, _ in pairs])

    ring = isinstance(run.method, Dart) and run.method.keeps_ring  # to compute new masks from
    return {
        **times.of_tokens(),
        "weights_executed": sum(sum(kept.rows_read) for kept in copies) / sum(f.size * f.matrices for f in run.ffns),
        "first_token": paired(times.prompts["pruned"], times.prompts["dense"]),
        "remask_masks_dense_steps": in_dense_steps(lambda: bench.remask(run)) if ring else None,
        "remask_moves_dense_steps": in_dense_steps(lambda: bench.move(run)),
        "begin_dense_steps": in_dense_steps(lambda: bench.begin(run)),
        "overhead": paired(times.steps["pruned"], times.steps["bare"], 1.0),
    }


class Bench:
    """The variants of a step: those of the pruned model, and its dense twin's."""

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel) -> None:
        self.model, self.dense = model, dense
        rows = [] if dense is model else [RowCopies(ffn) for ffn in find_ffns(dense)]
        self.full = rows if all(one.linked for one in rows) else []  # dense in our own product, where there is one
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

    def rounds(self, run: Session | None, setting: Setting) -> Times:
        """Time prompts and their decoding, all variants in turn; the first round warms up and is discarded.

        Args:
            run: of the pruned model; None: the model as it is (`pruned`) is timed beside its twin.

        Returns:
            The times, without those of steps with a re-mask, or dense ones after an alarm.

        Raises:
            UserError: rows of the model's weights cannot be copied.
        """
        times = Times()
        for i in range(1 + setting.rounds):
            self._round(run, times if i else Times(), setting.prompt_tokens, setting.steps)
            if run is not None and run.fast.copies is None:
                raise UserError("rows of this model's weights cannot be copied: no time to save", "load it unquantised")
        return times

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
        with swapped(self.full if name == "kernel" else ()):
            return self.step(self.dense, token, cache)[0]

    def dense_step(self) -> float:
        """Time a dense forward of one token."""
        return timed(lambda: self.dense(input_ids=self.tokens(1), logits_to_keep=1), self.device)[0]

    def move(self, run: Session) -> float:
        """Time the second half of a re-mask: a fifth of every mask's neurons is replaced."""
        copies, masks = run.fast.copies or [], run.masks(0)
        changed = [mask.clone() for mask in masks]
        for mask in changed:
            inside, outside = mask.nonzero().flatten(), (~mask).nonzero().flatten()
            moved = min(round(CHANGED * len(inside)), len(outside))
            mask[inside[torch.randperm(len(inside), generator=self.generator)[:moved]]] = False
            mask[outside[torch.randperm(len(outside), generator=self.generator)[:moved]]] = True
        seconds, _ = timed(lambda: [kept.select(m) for kept, m in zip(copies, changed, strict=True)], self.device)
        for kept, mask in zip(copies, masks, strict=True):
            kept.select(mask)
        return seconds

    def remask(self, run: Session) -> float:
        """Time the first half of a re-mask: new scores and masks from the ring; no weights are copied."""
        assert run.rows is not None and isinstance(run.method, Dart)
        method, rows = run.method, run.rows.select(torch.arange(len(run.rows)))
        everyone = torch.ones(len(rows), dtype=torch.bool, device=rows.seen.device)
        return timed(lambda: method.make_masks(rows, everyone), self.device)[0]

    def begin(self, run: Session) -> float:
        """Time a new copy of the weights of the masks' neurons."""
        assert run.rows is not None
        masks = run.method.masks(run.rows)
        run.fast.drop()

        def copy_all() -> None:
            run.fast.choose(1, by_hand=True)
            run.fast.copy_rows(masks)

        return timed(copy_all, self.device)[0]

    def cache(self) -> DynamicCache:
        """Return an empty cache."""
        return DynamicCache(config=self.model.config)
