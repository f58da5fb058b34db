"""The measurements of `dart-eval bench` as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.bench.bytes_only import BYTES_ONLY, BytesOnly
from dart_eval.bench.decode import DecodeSpeed
from dart_eval.bench.overhead import Overhead
from dart_eval.bench.packed import RoundedSpeed
from dart_eval.results.format import sparsity as percent
from dart_eval.results.ratio import Ratio
from dart_eval.results.writers import Table
from dart_eval.util.machine import huge_pages

PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")
HEADS = ("speed-up", "over kernel", "ceiling", "share", "control")
RATIOS = (
    "Speed-up: speed / the untouched model's, median [quartiles] of neighbouring steps. Over kernel: speed / dense in "
    "our own bfloat16 kernel, which reads memory as fast as it can. Ceiling: the largest speed-up that the bytes of "
    "this model allow; share: over kernel / ceiling, or speed-up / ceiling without a kernel. Control: the untouched "
    "model over itself."
)


def rounding(results: Sequence[RoundedSpeed | BytesOnly], where: str) -> Table:
    """Return the decode speeds on rounded FFN weights, for people: the dense model, and methods on top."""
    timed = [f for f in results if isinstance(f, RoundedSpeed)]
    body = [_row(f) for f in results]
    counted = [f for f in results if isinstance(f, BytesOnly) and f.method != "dense"]
    note = f"{where}; one sequence. "
    if counted:
        note += (
            f"Methods do not read {percent(counted[0].sparsity)} of the rounded weights; read is a share of the bytes "
            "of 16-bit weights. "
        )
    if timed:
        note += f"Times are those of our own kernel for few bits, {timed[0].speedup.n} steps a row. {RATIOS} "
    note += "Dense on rounded weights is the control that a pruner must beat at equal bytes."
    return Table("On rounded weights", ["method", "read", *HEADS], body, note + _reasons(results))


def _row(f: DecodeSpeed | RoundedSpeed | BytesOnly) -> list[str]:
    """Return the row of a method, or of dense on rounded weights."""
    ceiling = f"{f.ceiling:.2f}x"
    if isinstance(f, BytesOnly):
        return [f.title, f"{f.weights_read:.2f}", BYTES_ONLY, "-", ceiling, "-", "-"]
    if isinstance(f, RoundedSpeed):
        name, read = f"dense on {f.bits} bits", f"{f.read:.2f}"
    else:
        name, read = f.method, f"{f.weights_read:.2f}"
        read += f" ({f.weights_executed:.2f})" if f.weights_executed != f.weights_read else ""
    return [
        name, read, _ratio(f.speedup), _short(f.over_kernel), ceiling, f"{f.achieved_over_ceiling:.2f}",
        _ratio(f.control),
    ]  # fmt: skip


def _counted(where: str) -> str:
    return (
        " float32 weights count as 16 bits: ceilings of rows that read codes are too low." if "float32" in where else ""
    )


def _reasons(results: Sequence[object]) -> str:
    """Return the reason why rows have no times; empty if all have."""
    why = {f.why: None for f in results if isinstance(f, BytesOnly)}
    return f" {BYTES_ONLY.capitalize()}: no kernel turns the saved bytes into time ({'; '.join(why)})." if why else ""


def decoding(
    results: Sequence[DecodeSpeed | BytesOnly], rounded: Sequence[RoundedSpeed | BytesOnly], where: str
) -> list[Table]:
    """Return all tables of decode speeds and of rounded weights. where: the model and the hardware."""
    timed = [f for f in results if isinstance(f, DecodeSpeed)]
    beside = [rounding(rounded, where)] if rounded else []
    return [speeds(results, where), *beside, *([costs(timed)] if timed else [])]


def speeds(results: Sequence[DecodeSpeed | BytesOnly], where: str) -> Table:
    """Return the decode speeds of methods, for people, with untimed methods in their places."""
    timed = [f for f in results if isinstance(f, DecodeSpeed)]
    body = [_row(f) for f in results]
    note = f"{where}; sparsity {percent(results[0].sparsity)}, one sequence"
    note += f", {timed[0].speedup.n} steps a method. " if timed else ". No method here can be timed. "
    note += "Read: share of the FFN weights that a token reads"
    if timed:
        foreign = [f.foreign_cores for f in timed if f.foreign_cores is not None]
        note += (
            "; in brackets the share that is multiplied, where it is another. "
            f"{RATIOS} Untouched weights lie beside the pruned ones, so that the FFN weights are there twice "
            f"({timed[0].twin_bytes / 10**6:.0f} MB that no column counts)."
        )
        if (rate := timed[0].stream_rate) is not None:
            note += f" Our dense kernel reads {rate / 10**9:.1f} GB/s here ({huge_pages()})."
        note += f" Other processes kept {max(foreign):.2f} cores busy at most." if foreign else ""
    else:
        note += ". Ceiling: the most that the bytes of this model would allow at that read."
    return Table("Decoding", ["method", "read", *HEADS], body, note + _counted(where) + _reasons(results))


def costs(results: list[DecodeSpeed]) -> Table:
    """Return the costs of methods other than a decoded token's own work, for people."""
    columns = ["method", "tokens/s", "prompt", "masks", "changes", "copies", "overhead", "extra MB"]
    body = [
        [
            f.method,
            f"{f.tokens_per_second:.1f} ({f.dense_tokens_per_second:.1f})",
            f"{f.first_token.median:.2f}x",
            f"{f.remask_masks_dense_steps.median:.2f}" if f.remask_masks_dense_steps else "-",
            f"{f.remask_moves_dense_steps.median:.2f}",
            f"{f.begin_dense_steps.median:.1f}",
            f"{100 * f.overhead.median:.1f} %",
            f"{(f.extra_weight_bytes + f.state_bytes) / 10**6:.2f}",
        ]
        for f in results
    ]
    note = (
        "Tokens/s: for orientation, dense in brackets. Prompt: time with scores, masks and copies of the kept neurons' "
        "weights, over a dense prompt. The next three columns are in dense steps. Masks: new masks from recent tokens "
        "(- if the method stores none). Changes: copies of the changed weights, here of a fifth of the kept neurons. "
        "Copies: copies of all kept neurons' weights, once for the first prompt. Overhead: share that the method's "
        "hooks add to a pruned step. Extra: copies of weights, and the method's state."
    )
    return Table("Other costs of a method", columns, body, note)


def _short(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}x"


def _ratio(ratio: Ratio) -> str:
    """Return a median with its quartiles."""
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def state(results: list[Overhead]) -> Table:
    """Return the state of methods, for people."""
    lengths = list(results[0].state_bytes)
    columns = ["method", *(f"{n} tokens" for n in lengths), *PARTS]
    body = [
        [
            f.method,
            *(f"{size / 10**6:.2f}" for size in f.state_bytes.values()),
            *(f"{f.parts.get(part, 0) / 10**6:.2f}" for part in PARTS),
        ]
        for f in results
    ]
    note = (
        f"Shape {results[0].shape}, sparsity {percent(results[0].sparsity)}. Megabytes (10^6 bytes) per sequence, "
        "after prompts of these lengths, and by purpose after the longest prompt. FFN inputs are bfloat16."
    )
    return Table("State", columns, body, note)


def work(results: list[Overhead]) -> Table:
    """Return the computations of methods, for people."""
    columns = ["method", "decoded token", "prompt token", "re-mask", "re-mask reads"]
    body = []
    for f in results:
        body.append([
            f.method, f"{100 * f.decode_share:.4f} %", f"{100 * f.scoring_share:.4f} %",
            f"{f.remask_tokens:.2f}" if f.remask_tokens else "-", f"{f.remask_read:.2f}" if f.remask_read else "-",
        ])  # fmt: skip
    note = (
        "FLOPs that the method adds to a decoded token and to a prompt token, over the FLOPs of a dense decoded token "
        "at 1024 tokens of context. Re-mask: FLOPs of one re-mask over all layers, in dense tokens. Re-mask reads: FFN "
        "weights that one re-mask reads / those that a dense token reads. They come as often as the text drifts."
    )
    return Table("Work", columns, body, note)
