"""`dart_eval.evaluate`, the Python form of `dart-eval run`. It imports torch only when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dart_eval.models.loaded import Loaded
    from dart_eval.sweep.config import RunConfig

DEFAULT_METHODS = ("dense", "griffin", "dart", "dart-plus")  # of `RunConfig`, which needs pydantic: a test compares
OF_LOADING = ("revision", "dtype", "device", "device_map", "peft", "trust_remote_code")  # only for unloaded models


def evaluate(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tasks: str | Sequence[str],
    method: str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any] = DEFAULT_METHODS,
    sparsity: float | str | Sequence[float] = (0.5,),
    ffn_bits: int | str | Sequence[int | str] = ("16",),
    scope: str = "scored",
    allocation: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | Sequence[str | Path] = (),
    output: str | Path = "out",
    force: bool = False,
    batch_size: int | str = 8,
    share_prefix: bool = True, kl: bool = True,
    seed: int = 0,
    max_length: int | None = None,
    chunk: int = 2048,
    chat_template: bool = False,
    system_instruction: str | None = None, fewshot_as_multiturn: bool | None = None,
    enable_thinking: bool | None = None, think_end_token: str | None = None,
    gen_kwargs: str | Mapping[str, Any] | None = None,
    cue: str | None = None,
    data_dir: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None, calibration_seed: int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    peft: str | None = None,
    trust_remote_code: bool = False,
    confirm_run_unsafe_code: bool = False,
    workers: int = 1, executor: str = "local",
    ray_address: str | None = None,
    gpus_per_cell: float | None = None, cpus_per_cell: float | None = None,
    shards: int | None = None,
    log: str | None = None,
    log_project: str = "dart-eval",
) -> list[dict[str, Any]]:  # fmt: skip
    """Run methods at sparsities on tasks, as `dart-eval run` does; finished cells are read, not run again.

        dart_eval.evaluate(tasks="smoke_questions", method=["dense", "dart"], sparsity=0.5, limit=20)

    Args:
        model: a name or folder, or a loaded model; None is the demo model.
        tokenizer: of a loaded model.
        tasks: names, as a list or as text with commas; so are `method` and `sparsity`.

    Every other parameter is the option of `dart-eval run` of that name.

    Returns:
        One row for each metric of each cell, as of `dart-eval tables --format json`.

    Raises:
        UserError: the input is wrong.
        RuntimeError: cells failed, or files of finished ones were deleted meanwhile; all others are in `output`.
    """
    return _run({name: value for name, value in locals().items() if value is not None})


def _run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Run with the arguments of `evaluate`."""
    from dart_eval.cluster import run
    from dart_eval.results.rows import rows
    from dart_eval.sweep.config import config_from
    from dart_eval.sweep.jobs import Silent
    from dart_eval.sweep.tracking import tracked
    from dart_eval.util.quiet import without_remarks

    model, tokenizer = options.pop("model", None), options.pop("tokenizer", None)
    if model is None or isinstance(model, (str, Path, bytes)):
        if tokenizer is not None:
            raise UserError("a tokenizer goes with a loaded model", "leave it out: a model by its name brings its own")
        config, ready = config_from(None, {**options, "model": model}), None
    else:
        config = config_from(None, options)
        _check(config)
        ready = _ready(model, tokenizer)
    with without_remarks(), tracked(Silent(), config.log, config.log_project, config) as view:
        if ready is None:
            result = run.run_all([config], view)
        else:
            with ready.lent():
                result = run.run_all([config], view, model=ready)
    if result.failed:
        raise RuntimeError(f"cells failed: {', '.join(cell.name for cell in result.failed)}")
    if result.lost:
        raise RuntimeError(f"files of finished cells have been deleted: {result.lost[0][1][0]}")
    return rows(result.records)


def _ready(model: Any, tokenizer: Any) -> Loaded:
    """Return the loaded model in the form that an executor takes."""
    from dart_eval.models.loaded import loaded

    return loaded(model, tokenizer)


def _check(config: RunConfig) -> None:
    """Refuse parameters that no longer apply to a loaded model.

    Raises:
        UserError: such a parameter is given.
    """
    for name in OF_LOADING:
        if getattr(config, name) != getattr(type(config)(), name):
            raise UserError(f"{name} is for a model that is to be loaded", "leave it out, or give the model's name")
    if config.workers > 1:
        raise UserError(f"{config.workers} workers cannot share a loaded model", "save it, and give its folder")
    if config.executor != "local":
        raise UserError(f"executor {config.executor} cannot take a loaded model", "save it, and give its folder")
