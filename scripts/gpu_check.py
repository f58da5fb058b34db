"""What a first GPU shows: is pruning right there, is it fast, and with a model one column of a table.

    python scripts/gpu_check.py                      # on a CUDA GPU, some five minutes; writes results/gpu/CARD.json
    python scripts/gpu_check.py --dry                # the same checks on a CPU, on tiny shapes; times mean nothing
    python scripts/gpu_check.py --minutes 60 --model DIR --data-dir DIR

It needs no network, and nothing but torch and transformers: a check that needs more is skipped and says why. Each check
runs in a process of its own: one that fails, or runs over its time, is noted and the others go on. Models have random
weights of known shapes. What is compared runs on the same weights and the same given tokens.
Exit status: 0, 1 (a check failed), 2 (no GPU, or wrong arguments).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "--dry" in sys.argv:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tiny shapes have it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # it touches the GPU, and no fork may have

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dart_eval.bench import decode, shapes
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.families import cache_argument
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import Session, prune
from dart_eval.util.errors import UserError
from dart_eval.util.machine import timed

# check -> the most seconds that it may take, in the order in which they run
LIMITS = {
    "parity": 60, "executions": 60, "rate": 20, "scoring": 60, "column": 240, "decoding": 90,
}  # fmt: skip
SPARSITY = 0.7
# A detector that sees drift in every window, so that masks do change.
RESTLESS = {
    "remask.window": 3, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 5,
}  # fmt: skip
PROMPT, STEPS = 48, 12


class Skip(Exception):
    """Why a check is not run here."""


# -- models and their logits ---------------------------------------------------------------------------------------


def small(dry: bool) -> PreTrainedModel:
    """Return a model in float32 whose FFNs matter: layers as wide as Llama 3.2 1B's, or tiny ones."""
    torch.manual_seed(0)
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    tiny = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes: Any = {**(tiny if dry else wide), "num_hidden_layers": 2 if dry else 4}
    config = LlamaConfig(vocab_size=320 if dry else 8192, max_position_embeddings=1024, **sizes)
    with torch.device("cpu" if dry else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # as large as a trained model's: variance 1 / inputs, and an embedding of ones
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


def large(dry: bool) -> PreTrainedModel:
    """Return a model of Llama 3.1 8B's shape in bfloat16, with as many layers as the card's memory holds twice."""
    if dry:
        return small(dry).to(torch.bfloat16)  # type: ignore[arg-type]
    shape = shapes.config("llama-3.1-8b")
    ffn = 3 * shape.hidden_size * shape.intermediate_size * 2
    attention = (2 + 2 * shape.num_key_value_heads / shape.num_attention_heads) * shape.hidden_size**2 * 2
    fixed = 2 * shape.vocab_size * shape.hidden_size * 2 + 4e9  # embeddings, head, and what forwards need
    free = torch.cuda.mem_get_info(0)[0]
    layers = min(shape.num_hidden_layers, int((0.95 * free - fixed) // (2 * ffn + attention)))
    if layers < 1:
        raise Skip(f"{free / 1e9:.0f} GB of free memory do not hold one layer of llama-3.1-8b twice")
    return shapes.with_random_weights("llama-3.1-8b", layers, torch.bfloat16, "cuda")


def tokens_for(model: PreTrainedModel, count: int) -> Tensor:
    """Return [1, count] random tokens."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, count), generator=draw).to(model.device)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Return [STEPS + 1, V] fp32: after a prompt, and after each of the given tokens."""
    ids, name = tokens_for(model, PROMPT + STEPS), cache_argument(model)
    out = model(input_ids=ids[:, :PROMPT], use_cache=True)
    logits = [out.logits[0, -1].float()]
    for i in range(PROMPT, PROMPT + STEPS):
        out = model(input_ids=ids[:, i : i + 1], use_cache=True, **{name: getattr(out, name)})
        logits.append(out.logits[0, -1].float())
    return torch.stack(logits)


def pruned(model: PreTrainedModel, method: str, execution: Any = "auto", **params: Any) -> tuple[Tensor, Any]:
    """Return the logits under a method, and its session (left)."""
    with prune(model, make(method, params), SPARSITY, execution=execution) as session:
        return logits_of(model), session


def apart(a: Tensor, b: Tensor, most: float, what: str) -> float:
    """Return the norm of the difference over that of b.

    Raises:
        AssertionError: it is more than `most`.
    """
    distance = float((a - b).norm() / b.norm())
    if not distance <= most:
        raise AssertionError(f"{what}: {distance:.2g} apart, at most {most:.2g} is rounding")
    return distance


def tolerance(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return how far apart logits may be: a layer rounds the stream some 8 times by eps/2; errors add in squares."""
    return 2 * (torch.finfo(dtype).eps / 2) * math.sqrt(8 * model.config.num_hidden_layers)


# -- is it right: each check gets `dry` and returns its numbers, `said` being those for people -----------------------


def parity(dry: bool) -> dict[str, Any]:
    """In float16 and bfloat16, dense and under one mask, as in float32 with the same weights; every bit comes back."""
    model = small(dry)
    numbers: dict[str, Any] = {}
    for dtype in (torch.float16, torch.bfloat16):
        low = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
        high = copy.deepcopy(low).to(torch.float32)
        before = {name: p.clone() for name, p in low.named_parameters()}
        most, name = tolerance(low, dtype), str(dtype).removeprefix("torch.")
        dense, exact = logits_of(high), pruned(high, "magnitude")[0]
        numbers[f"{name} dense"] = apart(logits_of(low), dense, most, f"dense, {name} and float32")
        numbers[name] = apart(pruned(low, "magnitude")[0], exact, most, f"pruned, {name} and float32")
        numbers[f"{name} pruning moves"] = apart(exact, dense, math.inf, name)
        if numbers[f"{name} pruning moves"] < 3 * most:
            raise AssertionError("pruning moves the logits too little to be seen")
        if not all(torch.equal(before[n], p) for n, p in low.named_parameters()):
            raise AssertionError(f"{name}: prune() did not put the weights back")
    numbers["said"] = f"fp16 {numbers['float16']:.1g}, bf16 {numbers['bfloat16']:.1g} from float32"
    return numbers


def executions(dry: bool) -> dict[str, Any]:
    """On copied rows as by masks, to the digits of float32 and bfloat16; the same re-masks, the same text."""
    numbers: dict[str, Any] = {}
    model = small(dry)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, tolerance(model, torch.bfloat16))):
        low = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
        for method, params in (("griffin", {}), ("dart", RESTLESS)):
            (ours, session), (theirs, reference) = (pruned(low, method, e, **params) for e in ("auto", "masked"))
            name = f"{method} {str(dtype).removeprefix('torch.')}"
            numbers[name] = apart(ours, theirs, most, f"{name}, copied and masked")
            if [e["token"] for e in session.events] != [e["token"] for e in reference.events]:
                raise AssertionError(f"{name}: re-masks came at other tokens")
            if params and not session.events:
                raise AssertionError(f"{name}: no mask changed")
    generator: Any = model
    texts = []
    ways: tuple[Literal["masked", "auto"], ...] = ("masked", "auto")
    for execution in ways:
        with prune(model, make("dart", RESTLESS), SPARSITY, execution=execution):
            texts.append(generator.generate(tokens_for(model, PROMPT), max_new_tokens=STEPS, do_sample=False))
    if not torch.equal(texts[0], texts[1]):
        raise AssertionError("generate says something else on copies than by masks")
    return {**numbers, "said": f"dart {numbers['dart float32']:.1g} apart in float32"}


def column(
    dry: bool, model: str | None = None, data_dir: str | None = None, task: str = "arc_easy", limit: int = 100,
    folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One column of a table through `dart_eval.evaluate`, at 70 %; without a model a shipped task with random weights.

    Args:
        model: a folder, or a name that the cache of the hub knows. data_dir: local data; None: the cache of the hub.
        task, limit: which documents. folder: where finished cells are kept.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise Skip("lm_eval is not installed (pip install -e .)")
    import dart_eval

    with tempfile.TemporaryDirectory() as place:
        if model is None:
            from random_model import tokenizer

            task, limit, made = "smoke_questions", 2 if dry else 20, f"{place}/model"
            texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("tasks/smoke/*.jsonl"))
            tokenizer(texts, 320 if dry else 8192).save_pretrained(made)
            small(dry).to(torch.bfloat16).save_pretrained(made)  # type: ignore[arg-type]
        try:
            rows = dart_eval.evaluate(
                model=model or made, tasks=task, method="dense,griffin,dart,grinqh", sparsity=SPARSITY, limit=limit,
                data_dir=data_dir, device="cpu" if dry else "cuda", output=f"{folder or place}/out",
            )  # fmt: skip
        except UserError as error:  # no such model, or no data
            raise Skip(str(error)) from None
    if not rows or not all(math.isfinite(r["value"]) for r in rows):
        raise AssertionError("a value is not finite")
    main = [r for r in rows if r["metric"] == rows[0]["metric"]]
    values = (f"{r['method']} {r['value']:.3f} ±{r['stderr'] or 0:.3f}" for r in main)
    return {"rows": rows, "said": f"{task} x {main[0]['n']}, {rows[0]['metric']}: {', '.join(values)}"}


# -- is it fast ------------------------------------------------------------------------------------------------------


def rate(dry: bool) -> dict[str, Any]:
    """Bytes a second that the card reads (a sum), the best of some rounds."""
    size, turns = (2**16, 1) if dry else (2**30, 20)
    numbers = torch.ones(size // 4, device="cpu" if dry else "cuda")
    reads = (
        size * turns / min(timed(lambda: [numbers.sum() for _ in range(turns)], numbers.device)[0] for _ in range(5))
    )
    return {"reads": reads, "said": f"reads {reads / 1e9:.0f} GB/s"}


def scoring(dry: bool) -> dict[str, Any]:
    """Answers scored a second, dense and pruned, four to a context; dense ones as a plain forward gives them."""
    model = large(dry)
    head, draw = output_head(model), torch.Generator().manual_seed(2)

    def text(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(model.config.vocab_size, (length,), generator=draw).tolist())

    contexts = [text(16, 32) if dry else text(96, 256) for _ in range(3 if dry else 96)]
    requests = [Request(context, text(2, 12)) for context in contexts for _ in range(4)]
    length, numbers = sum(map(len, contexts)) + sum(len(r.continuation) for r in requests), {}
    for name in ("dense", "griffin", "dart"):
        with prune(model, name, SPARSITY) as session, torch.no_grad():
            score = scorer(model, head, session if session.prunes else Session(), "auto").score
            score(requests[:4])
            seconds, answers = timed(lambda: score(requests), model.device)  # noqa: B023 - called at once
        numbers[f"{name} tokens/s"] = round(length / seconds, 1)
        if not all(math.isfinite(a.logprob) for a in answers):
            raise AssertionError(f"{name}: a log-likelihood is not finite")
        for answer, request in zip(answers[:8], requests[:8], strict=True):
            ids = torch.tensor([request.context + request.continuation], device=model.device)
            logs = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
            start = len(request.context)
            plain = float(logs[start - 1 :].gather(1, ids[0, start:, None]).sum())
            # In bfloat16 a log-probability of about log V is known to some rounding steps: 16 eps a token.
            if name == "dense" and not abs(answer.logprob - plain) < 0.125 * len(request.continuation):
                raise AssertionError(f"dense: {answer.logprob:.3f} in place of a plain forward's {plain:.3f}")
    said = ", ".join(f"{k} {v:.0f}" for k, v in numbers.items())
    return {"layers": model.config.num_hidden_layers, **numbers, "said": said}


def decoding(dry: bool) -> dict[str, Any]:
    """`bench decode` at 70 %."""
    model = large(dry)
    size: Any = (
        {"prompt_tokens": 8, "steps": 1, "rounds": 1} if dry else {"prompt_tokens": 128, "steps": 30, "rounds": 2}
    )
    rows = [
        decode.measure(model, make(name), SPARSITY, decode.Setting(**size)).to_json() for name in ("griffin", "dart")
    ]
    said = ", ".join(f"{r['method']} {r['speedup']:.2f}x of {r['ceiling']:.2f}x" for r in rows)
    said += f"; dense {rows[0]['control']:.2f}x itself, {rows[0]['dense_tokens_per_second']:.0f} tokens/s"
    return {"layers": model.config.num_hidden_layers, "rows": rows, "said": said}


# -- each in a process of its own --------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print a line of each, write the file; the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, on tiny shapes: no time means anything")
    parser.add_argument("--only", default=",".join(LIMITS), help="checks, comma-separated (default: all)")
    parser.add_argument("--minutes", type=float, default=4, help="the most that `column` may take (default: 4)")
    parser.add_argument("--model", help="for `column`: a folder, or a name that the hub's cache has")
    parser.add_argument("--data-dir", help="for `column`: local data (docs/data.md; default: the hub's cache)")
    parser.add_argument("--task", default="arc_easy", help="for `column` (default: arc_easy)")
    parser.add_argument("--limit", type=int, default=100, help="for `column`: documents (default: 100)")
    parser.add_argument("--output", type=Path, help="folder (default: results/gpu; --dry: build/gpu)")
    given = parser.parse_args(arguments)
    folder = given.output or ROOT / ("build" if given.dry else "results") / "gpu"
    names = given.only.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        print(f"error: no check {', '.join(unknown)}; there are {', '.join(LIMITS)}", file=sys.stderr)
        return 2
    card = "CPU (dry)" if given.dry else isolated(torch.cuda.get_device_name, (0,), 60)["numbers"]
    if not card:
        print("error: no CUDA GPU is at hand; --dry runs the same checks on a CPU, tiny shapes", file=sys.stderr)
        return 2
    asked = given.model, given.data_dir, given.task, given.limit, folder / "column"
    checks = []
    for name in names:
        limit = 60 * given.minutes if name == "column" else LIMITS[name]
        check = {"check": name, **isolated(globals()[name], (given.dry, *(asked if name == "column" else ())), limit)}
        checks.append(check)
        head = f"  {name:<10} {check['status']:<7} {check['seconds']:5.1f} s  "
        said = check.get("why") or check["numbers"].get("said", "")
        print(textwrap.fill(said, 80, initial_indent=head, subsequent_indent=" " * len(head)) or head, flush=True)
    counts = [f"{n} {s}" for s in ("passed", "failed", "skipped") if (n := sum(c["status"] == s for c in checks))]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"
    about = {"card": card, "dry": given.dry, "torch": torch.__version__, "cuda": torch.version.cuda, "checks": checks}
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{card}: {', '.join(counts)}; written: {file}")
    return int(any(c["status"] == "failed" for c in checks))


def isolated(check: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> dict[str, Any]:
    """Run a check in a process of its own: `status`, `seconds`, its `numbers`, and why it was skipped or failed.

    The process is a fork, which has the imports and no GPU yet: this one never touches the GPU.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, arguments, theirs))
    begun = time.monotonic()
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(limit) else {"status": "failed", "why": f"it ran over its {limit:.0f} s"}
    except EOFError:
        process.join()
        answer = {"status": "failed", "why": f"its process ended with status {process.exitcode}"}
    process.join(5)
    for number in (signal.SIGTERM, signal.SIGKILL):  # also of what it started
        try:
            os.killpg(process.pid or 0, number)
        except (ProcessLookupError, PermissionError):
            break
        process.join(5)
    return {"numbers": {}, **answer, "seconds": round(time.monotonic() - begun, 1)}


def _child(check: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection) -> None:
    """Run a check and send what it found."""
    os.setsid()  # so that what it starts (a compiler's workers) ends with it
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' chatter; a failure is told whole in the file
        os.dup2(nowhere, stream)
    try:
        answer.send({"status": "passed", "numbers": check(*arguments)})
    except Skip as reason:
        answer.send({"status": "skipped", "why": str(reason)})
    except BaseException as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        answer.send({"status": "failed", "why": why, "traceback": traceback.format_exc()[-4000:]})


if __name__ == "__main__":
    sys.exit(main())
