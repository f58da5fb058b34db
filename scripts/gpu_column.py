"""The checks of whole sweeps in `gpu_check.py`: three cells with random weights, and one column of a paper's table."""

from __future__ import annotations

import importlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_models import SPARSITY, Skip, small

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["dense", "griffin", "dart", "grinqh"]


def sweep(dry: bool) -> dict[str, Any]:
    """Two methods and dense on one of the shipped tasks through `dart_eval.evaluate`, with a random model."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(_made(folder, dry), dry, folder, tasks="smoke_questions", method=METHODS[:3], sparsity=0.5,
                     limit=2 if dry else 20)  # fmt: skip
    numbers = {f"{r['method']} {r['task']} {r['metric']}": r["value"] for r in rows}
    return {**numbers, "said": f"{len({(r['method'], r['task']) for r in rows})} cells"}


def column(
    dry: bool, model: str | None = None, data_dir: str | None = None, task: str = "arc_easy", limit: int = 100,
    folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One column of a paper's table: one task at 70 %, for dense and three methods. Dry: with a random model.

    Args:
        model: a folder, or a name that the cache of the hub knows; None: there is no column.
        data_dir: local data, as for `dart-eval run`; None: the cache of the hub.
        task, limit: which documents. folder: where finished cells are kept.
    """
    if model is None and not dry:
        raise Skip('no model: give ARGS="--model FOLDER", and --data-dir where the hub\'s cache has no data')
    from dart_eval.util.errors import UserError

    with tempfile.TemporaryDirectory() as made:
        source = _made(made, dry) if model is None else model
        task, limit = ("smoke_questions", 2) if model is None else (task, limit)
        try:
            rows = _rows(source, dry, str(folder or made), tasks=task, method=METHODS, sparsity=SPARSITY, limit=limit,
                         data_dir=data_dir)  # fmt: skip
        except UserError as error:  # no such model, or no data
            raise Skip(str(error)) from None
    main = [r for r in rows if r["metric"] == rows[0]["metric"]]
    about = {"model": model or "random weights", "task": task, "metric": rows[0]["metric"], "limit": limit}
    said = f"{task}: " + ", ".join(f"{r['method']} {r['value']:.2f}" for r in main)
    return {**about, "column": [_cell(r) for r in main], "rows": rows, "said": said}


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    read = 1.0 if row["method"] == "dense" else row["weights_read"]
    return {"method": row["method"], "read": read, **{k: row.get(k) for k in ("value", "stderr", "recovery", "n")}}


def _made(folder: str, dry: bool) -> str:
    """A folder with a model of random weights and its tokenizer."""
    _need_harness()
    from random_model import tokenizer

    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("tasks/smoke/*.jsonl"))
    made, model = tokenizer(texts, 320 if dry else 8192), small(dry)
    made.save_pretrained(f"{folder}/model")
    model.to(torch.bfloat16).save_pretrained(f"{folder}/model")
    return f"{folder}/model"


def _rows(model: str, dry: bool, folder: str, **asked: Any) -> list[dict[str, Any]]:
    """Of `dart_eval.evaluate`; every value is a number."""
    _need_harness()
    import dart_eval

    rows = dart_eval.evaluate(model=model, device="cpu" if dry else "cuda", output=f"{folder}/out", **asked)
    if not rows or not all(math.isfinite(r["value"]) for r in rows):
        raise AssertionError("a value is not finite")
    return rows


def _need_harness() -> None:
    for needed in ("lm_eval", "datasets", "typer"):
        try:
            importlib.import_module(needed)
        except ImportError:
            raise Skip(f"{needed} is not installed (pip install -e .)") from None
