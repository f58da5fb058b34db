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

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dart_eval.bench.dense_copy import by_kernel, own_bytes, stream_rate, twin
from dart_eval.kernels.mask_rows import swapped
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.session import Session, prune
from dart_eval.results.ratio import Ratio, paired
from dart_eval.util.errors import UserError
from dart_eval.util.machine import foreign_cpu, peak_memory, timed

CHANGED = 0.2  # share of the masks' neurons that the timed re-mask replaces


@dataclass(frozen=True)
class DecodeSpeed:
    """One method at one sparsity on one model; times as ratios to the dense model's.

    Attributes:
        speedup: dense step / pruned step. control: dense step / dense step.
        over_kernel: step of the dense model in our own product / pruned step; None where there is none.
        stream_rate: bytes a second that this product reads; None likewise.
        ceiling: from the bytes of this model, at the FFN weights that a token reads. ceiling_executed: at those that
            this execution multiplies (a token's choice inside its mask saves reads only where a kernel skips them).
        achieved_over_ceiling: over_kernel / ceiling, or speedup / ceiling where there is no kernel.
        first_token: prompt's time with scoring, masks and the first copies / dense prompt's time.
        remask_masks_dense_steps: the first half of a re-mask, in dense steps: new scores and masks are made from the
            inputs in the ring. None where the method keeps no ring.
        remask_moves_dense_steps: the second half, in dense steps: in every layer a fifth of the kept neurons gives way
            to others, whose weights are copied.
        begin_dense_steps: once for the first prompt of a `prune()`, in dense steps: copying the kept neurons' weights.
        overhead: what hooks, detector and ring buffer add to a pruned step, as a share of it.
        dense_tokens_per_second, tokens_per_second: for orientation; they hold for this machine at this moment.
        extra_weight_bytes: of the copies of the kept neurons' weights. state_bytes: of the method. twin_bytes: of the
            FFN weights that the dense side has once more; the benchmark's alone, in no other number. peak_bytes: of the
            GPU, or of the process, without them.
        foreign_cores: processors that other processes kept busy meanwhile, on average (None: not known here).
    """

    method: str
    sparsity: float
    weights_read: float
    weights_executed: float
    speedup: Ratio
    control: Ratio
    over_kernel: Ratio | None
    stream_rate: float | None
    ceiling: float
    ceiling_executed: float
    achieved_over_ceiling: float
    first_token: Ratio
    remask_masks_dense_steps: Ratio | None
    remask_moves_dense_steps: Ratio
    begin_dense_steps: Ratio
    overhead: Ratio
    dense_tokens_per_second: float
    tokens_per_second: float
    extra_weight_bytes: int
    state_bytes: int
    twin_bytes: int
    peak_bytes: int
    foreign_cores: float | None


def row(result: Any) -> dict[str, Any]:
    """Return plain numbers: of a ratio its median, with `NAME_quartiles` and `NAME_n`."""
    made: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        made[field.name] = value.median if isinstance(value, Ratio) else value
        if isinstance(value, Ratio):
            made |= {f"{field.name}_quartiles": [value.low, value.high], f"{field.name}_n": value.n}
    return made


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
    model: PreTrainedModel,
    method: Method,
    sparsity: float,
    *,
    tokenizer: Any = None,
    prompt_tokens: int = 128,
    steps: int = 30,
    rounds: int = 3,
) -> DecodeSpeed:
    """Time one method on one sequence of random tokens.

    Args:
        tokenizer: of the model, for methods that calibrate on a text.
        prompt_tokens: the length of each round's prompt.
        steps: the tokens decoded in each round.
        rounds: the number of timed rounds, after one that warms up.

    Raises:
        UserError: a method that does not prune or looks ahead, weights of which no rows can be copied, or no memory
            for the FFN weights of the dense side.
    """
    check_timeable(method)
    shape = shape_of(model, find_ffns(model))
    bench = Bench(model, twin(model))
    times = Times()
    with (
        peak_memory(bench.device.type) as peak,
        foreign_cpu() as foreign,
        prune(model, method, sparsity, tokenizer=tokenizer, execution="auto") as run,
    ):
        bench.rounds(run, times, prompt_tokens, steps, rounds)
        for _ in range(max(3, rounds)):
            bench.move(run, times.moves)
            if isinstance(run.method, Dart) and run.method.keeps_ring:  # to compute new masks from
                bench.remask(run, times.masks)
        read, executed = run.weights_read / (run.share or 1.0), _executed(run)
        for _ in range(max(3, rounds)):
            bench.begin(run, times.once)
        extra, state = run.fast.nbytes, run.state_bytes
    ceilings = [1 / (1 - shape.ffn_share * (1 - r)) for r in (read, executed)]
    speeds = _speeds(times)
    return DecodeSpeed(
        method=method.spec, sparsity=sparsity, weights_read=read, weights_executed=executed, **speeds,
        ceiling=ceilings[0], ceiling_executed=ceilings[1],
        achieved_over_ceiling=(speeds["over_kernel"] or speeds["speedup"]).median / ceilings[0],
        stream_rate=None if bench.full is None else stream_rate(bench.full),
        extra_weight_bytes=extra, state_bytes=state, twin_bytes=own_bytes(model),
        peak_bytes=max(0, peak() - own_bytes(model)), foreign_cores=foreign(),
    )  # fmt: skip


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


def _speeds(times: Times) -> dict[str, Any]:
    """Return the fields of `DecodeSpeed` that depend only on times."""
    steps, prompts, masks, moves, once = times.steps, times.prompts, times.masks, times.moves, times.once
    if not steps["pruned"]:
        raise UserError(
            "every timed step makes new masks or runs dense after an alarm, and none is left to time",
            "give more --steps",
        )
    return {
        "speedup": paired(steps["dense"], steps["pruned"]),
        "control": paired(steps["dense"], steps["again"]),
        "over_kernel": paired(steps["kernel"], steps["pruned"]) if steps["kernel"] else None,
        "first_token": paired(prompts["pruned"], prompts["dense"]),
        "remask_masks_dense_steps": paired(masks["remask"], masks["dense"]) if masks["dense"] else None,
        "remask_moves_dense_steps": paired(moves["remask"], moves["dense"]),
        "begin_dense_steps": paired(once["begin"], once["dense"]),
        "overhead": paired(steps["pruned"], steps["bare"], 1.0),
        "dense_tokens_per_second": 1 / statistics.median(steps["dense"]),
        "tokens_per_second": 1 / statistics.median(steps["pruned"]),
    }


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

    def rounds(self, run: Session | None, times: Times, prompt: int, steps: int, rounds: int) -> None:
        """Time prompts and their decoding, all variants in turn; the first round warms up and is discarded.

        Args:
            run: of the pruned model; None: the model as it is (`pruned`) is timed beside its twin.
            times: the times are added to its steps and prompts, without those of steps with a re-mask, or dense ones
                after an alarm.
            prompt: the length of each prompt. steps: the tokens decoded in each round. rounds: their number.

        Raises:
            UserError: rows of the model's weights cannot be copied.
        """
        for i in range(1 + rounds):
            self._round(run, times if i else Times(), prompt, steps)
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


def _executed(run: Session) -> float:
    """Return FFN weights that a forward on copies multiplies / all FFN weights."""
    assert run.fast.copies is not None
    total = sum(f.size * f.matrices for f in run.ffns)
    return sum(sum(kept.rows_read) for kept in run.fast.copies) / total
