"""Each token chooses its neurons: CATS, M-COUNTDOWN, and an oracle.

    cats          the k largest |act(gate x)|, after gate has been read whole (arXiv 2404.08763)
    m-countdown   the k largest |up x|, after up has been read whole (arXiv 2505.17701, its ideal form)
    oracle-token  the k largest |h|, as if h were known before anything is read: an upper bound

k follows from the sparsity, so that the bytes read are met exactly. Where the last bytes would read half a neuron, a
token writes one neuron less than it takes: the one with the smallest |h|.

CATS takes and writes those above a threshold (`choice.threshold=calibrated`): the quantile of |act(gate x)| over all
neurons and tokens of a text, layer by layer. Tokens then take different numbers of neurons, so the bytes read are
measured. Its code (CATS at 679959c) finds it in 1000 bins between -1 and 1 on RefinedWeb; here bins are .1 % wide and
have no end. There prompts run pruned too, and the model is then fine-tuned. M-COUNTDOWN's practical form takes those
above a threshold, which its code (COUNTDOWN at e1393ae) sets on the train splits of the tasks that are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.kernels.top import largest
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration import BELOW_ALL, Calibration, Quantile
from dart_eval.pruning.counts import NeuronCost, chosen_counts
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.rows import Rows
from dart_eval.util.bits import Stored

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.method import Hook
    from dart_eval.pruning.session import Session


class TokenChoice(Method):
    """Base of methods whose tokens choose among all neurons.

    Attributes:
        whole: matrices of a gated FFN that are read whole before the choice. A plain FFN then reads up, which gives h.
    """

    by_token = True
    whole = 1

    @property
    def fits_all(self) -> bool:
        return not self.whole  # a high sparsity may be out of reach

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        super().check(ffns, sparsity, bits)
        self._counts(ffns, sparsity)

    def _counts(self, ffns: Sequence[FFN], sparsity: float) -> tuple[list[int], list[int]]:
        sizes, matrices = [f.size for f in ffns], ffns[0].matrices
        return chosen_counts(sizes, sparsity, matrices, min(self.whole, matrices - 1), self.name)

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        self.cost = NeuronCost(ffns, sparsity, min(self.whole, ffns[0].matrices - 1))
        taken, written = self._counts(ffns, sparsity)
        self.counts = torch.stack([self.cost.counts[:, 0], torch.tensor(taken), torch.tensor(written)], 1)
        self._products: dict[str, Tensor] = {}  # of the current layer: act(gate x) and up x

    def begin(self, rows: Rows) -> None:
        rows.counts = self.counts.repeat(len(rows), 1, 1)

    def hooks(self, session: Session) -> list[Hook]:
        """Watch gate x and up x; a plain FFN chooses by h alone."""
        hooks: list[Hook] = []
        for f in session.ffns:
            if not f.gated:
                continue
            hooks.append((f.up, "register_forward_hook", self._on_product(session, f, *["gate"] * f.fused, "up")))
            if isinstance(f.act, nn.Module):
                hooks.append((f.act, "register_forward_hook", self._on_product(session, f, "act")))
            elif f.gate is not None:
                hooks.append((f.gate, "register_forward_hook", self._on_product(session, f, "gate")))
        return hooks

    def _on_product(self, session: Session, ffn: FFN, *given: str) -> Callable[..., None]:
        """Return the hook of a module that gives these in equal parts: `gate` x, `act`(gate x), `up` x."""

        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> None:
            if session.phase != "decode":
                return
            for name, part in zip(given, session.in_batch(output).chunk(len(given), dim=-1), strict=True):
                if name == "up":
                    self._products["up"] = ffn.lifted(part)
                elif name == "act":
                    self._products["gate"] = part
                elif not isinstance(ffn.act, nn.Module):  # a function has no hooks: it runs a second time
                    self._products["gate"] = ffn.act(part)

        return hook

    def importance(self, h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Return the importance of each neuron to each token: [B, T, F], not negative.

        Args:
            h: [B, T, F], the input of the down projection.
            gate: [B, T, F], act(gate x); h itself in a plain FFN.
            up: [B, T, F], up x; h itself in a plain FFN.
        """
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, ffn: FFN, h: Tensor, rows: Rows) -> Tensor:
        gate, up = self._products.pop("gate", h), self._products.pop("up", h)
        return h * self.choose(ffn, h, self.importance(h, gate, up), rows).view(torch.uint8)

    def choose(self, ffn: FFN, h: Tensor, importance: Tensor, rows: Rows) -> Tensor:
        """Return the neurons that each token computes to the end: [B, T, F] bool."""
        _, taken, written = rows.counts[:, ffn.layer].unbind(-1)
        chosen = largest(importance, taken)
        return largest(h.abs(), written, chosen) if bool((written < taken).any()) else chosen

    def expected_read(self, rows: Rows) -> Tensor:
        return self.cost.read(rows.counts)

    def computed(self, read: float) -> float:
        return self.cost.computed(self.counts, read)

    def fetched(self, read: float) -> float:
        return self.cost.fetched(self.counts, read)

    def why_no_kernel(self, ffns: Sequence[FFN]) -> str | None:
        return f"no kernel reads only the rows that {self.name} chooses"

    def step_flops(self, shape: ModelShape) -> float:
        return 3 * sum(shape.ffn_sizes)  # a score, its factor, and |h| of the taken neurons


class Cats(TokenChoice):
    """The largest |act(gate x)|."""

    name = "cats"
    summary = "reads all of gate, and lets each token choose the neurons with the largest |act(gate x)|"
    paper = "2404.08763"
    recorded: ClassVar = {"mask": "everything", "choice": "gate", "allocation": "uniform"}
    choice_threshold: Literal["none", "calibrated"] = option(
        "none",
        "choose all above a threshold per layer, from a calibration text, in place of exactly k (the read varies)",
    )

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.choice_threshold == "none"

    @property
    def fits_repeats(self) -> bool:  # type: ignore[override]
        return self.exact

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return not self.exact

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        if self.exact:
            return
        assert calibration is not None
        taken = self.counts[:, 1].tolist()
        if taken == [f.size for f in ffns]:
            self.thresholds = [BELOW_ALL] * len(ffns)
            return
        name = f"thresholds of |act(gate x)|, {taken} taken"
        self.thresholds = calibration.once(name, lambda: [self._measured(taken, calibration)])[0].tolist()

    def _measured(self, taken: Sequence[int], calibration: Calibration) -> Tensor:
        """Return [L] fp64, the thresholds, from a pass over the text."""
        quantiles = [Quantile() for _ in self.ffns]

        @torch.no_grad()
        def see(layer: int, x: Tensor, _h: Tensor) -> None:
            gate, _ = self.ffns[layer].parts(x[None])
            quantiles[layer].add(gate.abs()[0], taken[layer])

        calibration.visit(see)
        return torch.tensor([quantile.threshold for quantile in quantiles], dtype=torch.float64)

    def importance(self, h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return gate.abs()

    def choose(self, ffn: FFN, h: Tensor, importance: Tensor, rows: Rows) -> Tensor:
        if self.exact:
            return super().choose(ffn, h, importance, rows)
        chosen = importance.float() > self.thresholds[ffn.layer]  # it is finer than bfloat16
        self.count(self.cost.read_of(ffn.layer, chosen.sum(-1, dtype=torch.float64).cpu()))
        return chosen


class MCountdown(TokenChoice):
    """The largest |up x|."""

    name = "m-countdown"
    summary = "reads all of up, and lets each token choose the neurons with the largest |up x|"
    paper = "2505.17701"
    recorded: ClassVar = {"mask": "everything", "choice": "up", "allocation": "uniform"}

    def importance(self, h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return up.abs()


class OracleToken(TokenChoice):
    """The largest |h|, known in advance."""

    name = "oracle-token"
    summary = "lets each token choose the largest |h|, known in advance (upper bound)"
    recorded: ClassVar = {"mask": "everything", "choice": "hidden", "allocation": "uniform"}
    upper_bound = True
    whole = 0

    def importance(self, h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return h.abs()
