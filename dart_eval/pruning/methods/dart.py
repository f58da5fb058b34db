"""DART (arXiv 2601.22632): masks from the prompt, densities by depth, new masks where the text drifts.

    score_j  = sum over the prompt's tokens of h_tj^2                     (`observe`)
    density  = by how much each layer's FFN changes the stream            (`change`, `depth`)
    drift    = the last layer's attention output leaves the prompt's      (`drift`)
    re-mask  = blend * score per token of the prompt + (1 - blend) * mean score of the last FFN inputs (`ring`)

A mask keeps its number of neurons. The last inputs exist for pruned neurons, too. In place of the ring, `dense_tokens`
tokens may run dense after an alarm, and are scored. After `release` decoded tokens no token is pruned, until the next
prompt. The floor, the cool-down and the ring are this project's own.

`dart-code` has the settings of the public code (seeder-research/DART at 19c4a57). Its defects stay out: there a mask of
MASKING_STEP 0 was never made anew, and half of the layers of the forward with the alarm ran under the old one.
Densities stay the prompt's here; the code computed them anew.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import routing, under
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning import tables
from dart_eval.pruning.log import Log
from dart_eval.pruning.method import option
from dart_eval.pruning.methods.change import ChangeHooks, ChangeState
from dart_eval.pruning.methods.depth import depth_aware, normalise_sensitivity
from dart_eval.pruning.methods.drift import DriftDetector, DriftSettings
from dart_eval.pruning.methods.griffin import PromptMask, squares
from dart_eval.pruning.methods.ring import RingBuffer
from dart_eval.pruning.rows import PerSequence, Rows
from dart_eval.util.bits import Stored
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session


class Watch(PerSequence):
    """What re-masks need of B sequences.

    Attributes:
        drift: the detector; None without one.
        ring: FFN inputs per layer, followed by the experts that tokens had; None without one.
        alarms: [B] bool, raised by the last forward.
        ran: decoded tokens since the context; the same for all, since they decode together.
        dense_left: [B] long, tokens still to run dense after an alarm.
        fresh_tokens: [B], tokens that ran dense after it so far.
        fresh: per layer [B, pool] fp32, sums of their scores; empty without `dense_tokens`.
    """

    def __init__(self, method: Dart, batch: int, device: torch.device) -> None:
        ffns = method.ffns
        settings = DriftSettings(
            method.remask_window, method.remask_sigma, method.remask_floor, method.remask_patience,
            method.remask_cooldown, method.remask_min_windows,
            max(1, (method.remask_dense_tokens or method.remask_ring) // method.remask_window),
        )  # fmt: skip
        self.drift = DriftDetector(settings, batch, ffns[-1].width, device) if method.watches else None
        routed = any(f.routed for f in ffns)
        self.ring = RingBuffer(method.remask_ring, len(ffns) * (1 + routed)) if method.keeps_ring else None
        self.alarms = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ran = 0
        self.dense_left = torch.zeros(batch, dtype=torch.long, device=device)
        self.fresh_tokens = torch.zeros(batch, device=device)
        self.fresh = [torch.zeros(batch, f.pool, device=device_of(f)) for f in ffns] if method.gathers else []

    @property
    def dense(self) -> Tensor:
        """[B] bool, the sequences that run dense to gather scores after an alarm."""
        return self.dense_left > 0

    def finish(self, valid: Tensor) -> None:
        """Close a context forward whose real tokens were `valid` ([B, T] bool)."""
        if self.ring is not None:
            self.ring.advance(valid)
        if self.drift is not None:
            self.drift.set_reference()
        self.ran = 0
        self.dense_left = torch.zeros_like(self.dense_left)

    def count_dense(self, alarms: Tensor, valid: Tensor, most: int, shared: bool) -> Tensor:
        """Count dense tokens, and let them begin after an alarm.

        Args:
            alarms: [B] bool.
            valid: [B, T] bool.
            most: dense tokens after an alarm.
            shared: sequences are re-masked together, ended or not.

        Returns:
            [B] bool, the sequences whose dense tokens have just ended.
        """
        dense, ended = self.dense, torch.zeros_like(alarms)
        if bool(dense.any()):
            self.fresh_tokens = self.fresh_tokens + torch.where(dense, valid.sum(1), 0)
            rest = (self.dense_left - (valid.shape[1] if shared else valid.sum(1))).clamp_min(0)
            self.dense_left = torch.where(dense, rest, self.dense_left)
            ended = dense & (rest == 0)
        if bool(alarms.any()):
            self.dense_left = self.dense_left.masked_fill(alarms, most)
            self.fresh_tokens = self.fresh_tokens.masked_fill(alarms, 0.0)
            self.fresh = [f.masked_fill(alarms.to(f.device)[:, None], 0.0) for f in self.fresh]
        return ended

    def fresh_mean(self, layer: int, index: Tensor) -> Tensor:
        """Return [b, pool] scores per dense token. index: [b] of the sequences."""
        fresh = self.fresh[layer]
        at = index.to(fresh.device)
        return fresh[at] / self.fresh_tokens[index].clamp_min(1)[:, None].to(at.device)


class Dart(PromptMask):
    """Masks from the prompt, more neurons in sensitive layers, and new masks on drift."""

    name = "dart"
    summary = "keeps the neurons most active in the prompt, more in sensitive layers, and re-masks on drift"
    paper = "2601.22632"
    recorded: ClassVar = {"mask": "prompt", "score": "activation", "score.norm": "none", "draw": "best"}
    remask: Literal["drift", "never"] = option(
        "drift", "make a new mask when a detector raises an alarm for drift, or keep the prompt's"
    )
    remask_release: int = option(0, "run dense after this many decoded tokens (0: never)", least=0)
    remask_window: int = option(10, "tokens per window of the detector", least=1, when="drift")
    remask_sigma: float = option(
        0.5, "margin of the detector, in standard deviations of the prompt's windows", when="drift"
    )
    remask_floor: float = option(0.1, "the least margin of the detector, in cosine", when="drift")
    remask_patience: int = option(
        2, "raise an alarm when flagged windows outnumber the others by this number", least=1, when="drift"
    )
    remask_cooldown: int = option(2, "windows after an alarm in which nothing is flagged", least=0, when="drift")
    remask_min_windows: int = option(
        4, "use `floor` as the margin if the prompt has fewer windows", least=0, when="drift"
    )
    remask_skip_first: bool = option(
        True, "leave the prompt's first token out of the detector's reference", when="drift"
    )
    remask_act: bool = option(True, "make a new mask after an alarm (off: the detector only watches)", when="drift")
    remask_ring: int = option(
        24, "number of recent FFN inputs per layer, from which a new mask is made", least=1, when="drift"
    )
    remask_dense_tokens: int = option(
        0, "run this many tokens dense after an alarm, and score them instead of the ring (0: the ring)", least=0,
        when="drift",
    )  # fmt: skip
    remask_blend: float = option(
        0.25, "weight of the old scores in a new mask after an alarm", least=0, most=1, when="drift"
    )
    allocation: Literal["depth", "uniform", "table"] = option(
        "depth", "keep more in layers that change the stream more, the same in all, or what a table says (table:FILE)"
    )
    allocation_sensitivity: Literal["ffn", "residual"] = option(
        "ffn", "compare the stream before the FFN with the FFN's output, or with the stream after it", when="depth"
    )
    allocation_protect: bool = option(True, "protect early and late layers (off: the paper's ablation)", when="depth")
    allocation_magnitude: bool = option(
        True, "multiply 1 - cosine by the relative size of the change (off: the paper's ablation)", when="depth"
    )
    allocation_file: str = option("", "name of a file or of a shipped table, such as llama-3.1-8b-70", when="table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "table":
            _ = self.table  # so that a bad file fails early

    @functools.cached_property
    def table(self) -> tuple[list[float], list[int] | None]:
        """Densities of the layers, [L], and the neurons of the model's layers if known: read once for all masks."""
        return tables.find(self.allocation_file)

    @functools.cached_property
    def watches(self) -> bool:
        """Whether a drift detector watches."""
        return self.remask == "drift"

    @functools.cached_property
    def keeps_ring(self) -> bool:
        """Whether it keeps the recent FFN inputs."""
        return self.watches and self.remask_act and not self.remask_dense_tokens

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether tokens run dense after an alarm, and are scored."""
        return self.watches and self.remask_act and self.remask_dense_tokens > 0

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return not self.watches and self.allocation == "uniform"

    @property
    def fits_all(self) -> bool:
        return self.allocation != "table"

    def contents(self) -> list[bytes]:
        return [tables.content(self.allocation_file)] if self.allocation == "table" else []

    def check_sparsity(self, sparsity: float) -> None:
        if self.allocation == "table":
            tables.check(self.allocation_file, sparsity)

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        super().check(ffns, sparsity, bits)
        if self.allocation == "table":
            tables.check(self.allocation_file, sparsity, [f.size for f in ffns])
        if self.allocation == "depth" and (unknown := [f.number for f in ffns if not f.adds]):
            raise UserError(
                f"allocation=depth does not fit this model: layer {unknown[0]} does more than add its FFN's output to "
                "the stream that enters it",
                "use allocation=uniform",
            )

    # -- the prompt ------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        residual, depth = self.allocation_sensitivity == "residual", self.allocation == "depth"
        rows.change = ChangeState(len(rows), self.ffns, residual) if depth else None
        rows.watch = Watch(self, len(rows), rows.seen.device) if self.watches or self.remask_release else None

    def observe(self, ffn: FFN, h: Tensor, weight: Tensor) -> Tensor:
        return squares(h, weight)

    def densities(self, rows: Rows, index: Tensor) -> list[float]:
        if self.allocation == "uniform":
            return super().densities(rows, index)
        if self.allocation == "table":
            return self.table[0]
        sizes: dict[int, int] = {}  # of decoder layers, whose FFNs change the stream together
        for f in self.ffns:
            sizes[f.number] = sizes.get(f.number, 0) + f.size
        sensitivity = rows.change.sensitivity(index, self.allocation_magnitude)
        densities = depth_aware(
            normalise_sensitivity([*sensitivity.values()]), self.sparsity, self.allocation_protect, [*sizes.values()]
        )
        by_number = dict(zip(sensitivity, densities, strict=True))
        return [by_number[f.number] for f in self.ffns]

    def finish(self, rows: Rows, valid: Tensor) -> None:
        if rows.change is not None:
            rows.change.finish(valid)
        if rows.watch is not None:
            rows.watch.finish(valid)
        super().finish(rows, valid)

    # -- decoded tokens --------------------------------------------------------------------------------------------

    def hooks(self, session: Session) -> list[Hook]:
        self.session: Session = weakref.proxy(session)  # which has this method: a circle would keep the model
        self.attention: Tensor | None = None  # of the last layer, in the current decoding forward
        hooks = ChangeHooks(session).all() if self.allocation == "depth" else []
        if self.keeps_ring:
            hooks += [(f.block, "register_forward_pre_hook", self._on_input(f)) for f in self.ffns]
        if self.watches:
            hooks.append((self.ffns[-1].attention, "register_forward_hook", self._on_attention))
        return hooks

    def _on_input(self, ffn: FFN) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            session = self.session
            if session.phase != "off" and not session.frozen and session.rows is not None:
                x = args[0] if args[0].dim() == 3 else session.in_batch(args[0])
                session.rows.watch.ring.write(ffn.layer, x, session.going)
                if ffn.routed is not None:
                    experts = routing(ffn.routed, len(x))
                    session.rows.watch.ring.write(len(self.ffns) + ffn.layer, experts, session.going)

        return hook

    def _on_attention(self, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        session, a = self.session, output[0] if isinstance(output, tuple) else output
        if session.phase == "decode":
            self.attention = a
        elif session.phase == "context" and session.rows is not None:
            valid, rows = session.valid, session.rows
            if self.remask_skip_first:
                valid = valid & (valid.long().cumsum(1) + rows.seen[:, None] > 1)
            rows.watch.drift.observe(a.to(rows.seen.device), valid)

    @property
    def releases(self) -> bool:
        return self.remask_release > 0

    def released(self, rows: Rows) -> bool:
        """Whether all further tokens run dense, up to the next prompt."""
        return rows.watch is not None and 0 < self.remask_release <= rows.watch.ran

    def masks(self, rows: Rows) -> list[Tensor]:
        return [] if self.remask_release and self.released(rows) else rows.mask

    def decode(self, ffn: FFN, h: Tensor, rows: Rows) -> Tensor:
        pruned = super().decode(ffn, h, rows)
        if not self.gathers or not bool(rows.watch.dense.any()) or pruned is h:
            return pruned
        dense, fresh = rows.watch.dense, rows.watch.fresh
        fresh[ffn.layer] = self.add(fresh[ffn.layer], ffn, h, (self.session.going & dense[:, None]).float())
        return torch.where(dense.to(h.device)[:, None, None], h, pruned)

    def dense_now(self, rows: Rows) -> Tensor | None:
        if self.released(rows):
            return torch.ones_like(rows.seen, dtype=torch.bool)
        return rows.watch.dense if self.gathers else None

    def room(self, rows: Rows) -> int | None:
        if rows.watch is None or not self.masks(rows):
            return None
        watch, limits = rows.watch, []
        if watch.drift is not None:
            limits.append(watch.drift.room())
        if self.remask_release:
            limits.append(self.remask_release - watch.ran)
        if bool(watch.dense.any()):
            limits.append(int(watch.dense_left[watch.dense].min()))
        return min(limits, default=None)

    def after(self, rows: Rows, valid: Tensor, log: Log) -> bool:
        watch, attention, self.attention = rows.watch, self.attention, None
        if watch is None or not rows.mask:
            return False
        if watch.ring is not None:
            watch.ring.advance(valid)
        released = self.released(rows)
        watch.ran += valid.shape[1]
        if self.released(rows):
            return not released
        if watch.drift is None or attention is None:
            return False
        watch.alarms = watch.drift.update(attention.to(watch.alarms.device), valid, watch.dense)
        if rows.shared:
            watch.alarms = watch.alarms.any().expand_as(watch.alarms)
        if watch.drift.position == 0:
            log.signals.append(watch.drift.signal.cpu())
        log.alarms += [{"token": log.decoded, "sequence": row} for row in watch.alarms.nonzero().flatten().tolist()]
        due = watch.alarms & self.remask_act
        if self.gathers:
            due = watch.count_dense(due, valid, self.remask_dense_tokens, rows.shared)
        if bool(due.any()):
            log.remasked(due, self.make_masks(rows, due))
        return self.gathers or bool(due.any())

    @torch.no_grad()
    def make_masks(self, rows: Rows, due: Tensor) -> list[list[float]]:
        """Make new masks for the sequences `due` ([B] bool), with as many neurons as before.

        Returns:
            Per layer |old and new| / |old| of each of these sequences.
        """
        watch, index, masks, overlaps = rows.watch, due.nonzero().squeeze(1), [], []
        for f, mask, sums in zip(self.ffns, rows.mask, rows.sums, strict=True):
            assert sums is not None
            at = index.to(mask.device)
            before = sums[at] / rows.tokens(mask)[at]
            recent = watch.fresh_mean(f.layer, index) if self.gathers else self.recent(watch.ring, f, index)
            if f.routed is not None:  # experts that no recent token had keep their old scores
                each = recent.view(len(recent), -1, f.routed.inner)
                unseen = (each == 0).all(-1, keepdim=True)
                recent = torch.where(unseen, before.view_as(each), each).view_as(recent)
            new = self.best(rows, f, self.remask_blend * before + (1 - self.remask_blend) * recent, index)
            old = mask[at]
            overlaps.append(((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist())
            masks.append(mask.index_copy(0, at, new))  # new tensors: forks may share the old ones
        rows.mask = masks
        watch.drift.rebase(due)
        rows.remasks[index.cpu()] += 1
        return overlaps

    def recent(self, ring: RingBuffer, ffn: FFN, index: Tensor) -> Tensor:
        """Return the mean score over the recent inputs of an FFN: [b, pool]. index: [b] of the sequences."""
        x, valid = ring[ffn.layer], ring.valid
        assert valid is not None
        at = index.to(x.device)
        weight = valid[index].to(x.device).float()
        experts = nullcontext() if ffn.routed is None else under(ffn.routed, ring[len(self.ffns) + ffn.layer][at])
        with experts:
            sums = self.add(None, ffn, ffn.intermediate(x[at]), weight)
        return sums / weight.sum(1, keepdim=True).clamp_min(1)

    def trace(self, rows: Rows, log: Log, row: int, tokens: int | None) -> Json | None:
        return None if rows.watch is None or rows.watch.drift is None else log.trace(rows.watch.drift, row, tokens)

    # -- costs -----------------------------------------------------------------------------------------------------

    def prompt_flops(self, shape: ModelShape) -> float:
        stream = shape.layers * 8 * shape.width  # two norms, a difference, its norm, a dot product
        return stream * (self.allocation == "depth") + 2 * shape.width * self.watches

    def step_flops(self, shape: ModelShape) -> float:
        # A sum per token, a cosine per window.
        return (shape.width + (2 + 6 * shape.width) / self.remask_window) * self.watches

    def remask_cost(self, shape: ModelShape, observing: int, weights_read: float) -> tuple[int, float]:
        neurons, flops, read = sum(shape.ffn_sizes), 0, 0.0
        if self.keeps_ring:
            read = (shape.ffn_matrices - 1) / shape.ffn_matrices
            flops = self.remask_ring * (round(2 * shape.ffn_weights * read) + observing)
            pools = zip(shape.ffn_pools or shape.ffn_sizes, shape.ffn_sizes, strict=True)
            read *= sum(min(n, self.remask_ring * size) for n, size in pools) / neurons
        elif self.gathers:
            read = self.remask_dense_tokens * (1 - weights_read)
            flops = self.remask_dense_tokens * observing + round(2 * shape.ffn_weights * read)
        return flops + 3 * neurons * bool(flops), read  # old and recent scores are blended


class DartCode(Dart):
    """DART with the settings of its public code."""

    name = "dart-code"
    summary = "runs dart with the settings of its public code: eager detector, re-masks from 30 dense tokens"
    remask_window: int = 5
    remask_sigma: float = 0.1
    remask_patience: int = 1
    remask_cooldown: int = 0
    remask_min_windows: int = 2
    remask_skip_first: bool = False
    remask_dense_tokens: int = 30
    remask_blend: float = 0.0
