"""GGUF files: converted once into a Hugging Face folder in the cache, under a lock, and loaded from there in seconds.

The weights are expanded to plain numbers. The bits of an FFN weight in the file are stored beside them, so that reads
count the bytes of the file's own kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import DTypeLike

from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError, out_of_memory, summary
from dart_eval.util.files import cache_dir, feed, reason
from dart_eval.weights.checkpoint import load_whole

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
BITS = "ffn_bits.json"  # in a converted folder: layer -> side -> bits of a weight in the file
CONVERSION = 5  # raise when the conversion changes, so that old folders are not used
NOTES = "notes.json"  # in a converted folder: notes on the file for the user, if any
WHOLE = "download or convert it again; a file that was split must be merged first (llama-gguf-split --merge)"
EXPERTS, SHARED = "_exps", "_shexp"  # ends of sides: routed experts, and the shared FFN beside them
BLOCK = re.compile(r"blk\.(\d+)\.")
FFN_TENSOR = re.compile(r"blk\.(\d+)\.ffn_((?:gate|up|down)(?:_exps|_shexp)?)\.weight")


def folder(file: Path) -> Path:
    """Return the folder that a GGUF file is converted into, made on first use.

    Raises:
        UserError: the package gguf is missing, or transformers cannot read the file.
    """
    if find_spec("gguf") is None:
        raise UserError(f"{file} needs the package gguf", "run pip install gguf")
    digest = hashlib.sha256()
    feed(digest, file)
    target = cache_dir() / f"{file.stem}-{digest.hexdigest()[:8]}-gguf{CONVERSION}"
    return converted(target, lambda work: convert(file, work, bits=True))


def converted(target: Path, make: Callable[[Path], None]) -> Path:
    """Return a converted folder, made completely or not at all if it is missing.

    Args:
        target: its path.
        make: writes it into an empty folder.
    """
    if (target / "model.safetensors").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "model.safetensors").exists():  # another process may have made it meanwhile
                work = target.with_name(target.name + ".partial")
                shutil.rmtree(work, ignore_errors=True)
                try:
                    (work / "model").mkdir(parents=True)
                    make(work / "model")
                    shutil.rmtree(target, ignore_errors=True)  # of which the weights were deleted
                    os.replace(work / "model", target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"no converted model can be written to {target.parent} ({reason(error)})",
            "make room, or set DART_EVAL_CACHE to another folder",
        ) from None
    return target


def convert(file: Path, target: Path, bits: bool) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder.

    Args:
        bits: also write the bits of the FFN weights in the file.

    Raises:
        UserError: the file is damaged or lacks weights, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        reader = _reader(file)
        _check(file, reader)
        read, notes = load_whole(
            AutoModelForCausalLM, file.name, file.parent, gguf_file=file.name, trust_remote_code=False
        )
        notes = notes or _unused(file.name, reader.tensors, read)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except UserError as error:
        raise UserError(error.problem, WHOLE) from None
    except Exception as error:  # of transformers, of gguf, of the file system
        raise UserError(
            f"transformers cannot read {file} ({summary(error)})", "convert it to a Hugging Face folder first"
        ) from error
    # A model read from GGUF refuses save_pretrained: its state goes into a model made from its config.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target, max_shard_size="1TB")
    tokenizer.save_pretrained(target)
    if notes:
        (target / NOTES).write_text(json.dumps(notes), encoding="utf-8")
    if bits:
        (target / BITS).write_text(json.dumps(_bits(reader.tensors), indent=1), encoding="utf-8")


def _reader(file: Path) -> GGUFReader:
    """Return the gguf package's reader of a file, with an error for more entries than the file has room for."""
    from gguf import GGUFReader

    class Whole(GGUFReader):
        def _get(self, offset: int, dtype: DTypeLike, count: int = 1, *args: Any, **kwargs: Any) -> np.ndarray:
            entries = super()._get(offset, dtype, count, *args, **kwargs)
            if len(entries) < int(count):
                raise ValueError(f"it ends before byte {offset + int(count) * entries.itemsize}")
            return entries

    return Whole(file)


def _check(file: Path, reader: GGUFReader) -> None:
    """Refuse a file whose header contradicts its tensors, before a model is built from the header.

    Raises:
        UserError: it names another number of layers than it holds, or tensors do not follow one another.
    """
    place = 0
    for tensor in reader.tensors:
        if (offset := int(tensor.field.parts[-1][0])) != place:
            raise UserError(f"{file} is damaged: its tensor {tensor.name} lies at {offset}, not at {place}")
        place += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    layers = int(reader.fields[f"{architecture}.block_count"].parts[-1][0])
    held = 1 + max((int(match[1]) for t in reader.tensors if (match := BLOCK.match(t.name))), default=-1)
    if layers != held:
        raise UserError(f"{file} names {layers} layers ({architecture}.block_count), and holds weights of {held}")


def _unused(name: str, tensors: Sequence[ReaderTensor], model: PreTrainedModel) -> list[str]:
    """Return notes on tensors that are in no weight of the model, since transformers skips some.

    Counts of numbers show it: every other tensor is in a weight as a whole, whatever its name there.

    Raises:
        UserError: a weight lacks tensors, which transformers fills with zeros (gates of experts).
    """
    held, needed = sum(int(t.n_elements) for t in tensors), sum(p.numel() for p in model.parameters())  # tied ones once
    if held < needed:
        raise UserError(f"model {name} lacks tensors: {needed - held} numbers of its weights stand in none")
    state = model.state_dict()
    if (unused := held - needed - sum(b.numel() for key, b in model.named_buffers() if key in state)) <= 0:
        return []
    fitting = [t.name for t in tensors if int(t.n_elements) == unused]
    which = f" ({fitting[0]})" if len(fitting) == 1 else ""
    return [f"model {name}: {unused} numbers of the file are in no weight of the model{which}"]


def _bits(tensors: Sequence[ReaderTensor]) -> dict[str, dict[str, float]]:
    """Return layer -> gate, up, down -> bits of a weight, scales included."""
    found: dict[str, dict[str, float]] = {}
    for tensor in tensors:
        if match := FFN_TENSOR.fullmatch(tensor.name):
            layer, side = match.groups()
            found.setdefault(layer, {})[side] = 8 * int(tensor.n_bytes) / int(tensor.n_elements)
    return found


def note_bits(source: str, model: PreTrainedModel) -> list[str]:
    """Note the bits of a converted model's FFN weights in the file.

    Returns:
        Notes for the user: on the file, and on projections without bits.
    """
    bits_file, notes_file = Path(source) / BITS, Path(source) / NOTES
    notes: list[str] = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.is_file() else []
    if not bits_file.is_file():
        return notes
    from dart_eval.layers import quantised
    from dart_eval.layers.find import describe

    layers, unknown = json.loads(bits_file.read_text(encoding="utf-8")), 0
    for ffn in describe(model):
        sides = layers.get(str(ffn.number), {})
        end = EXPERTS if ffn.routed else SHARED if f"down{SHARED}" in sides else ""
        into = [side for side in (f"gate{end}", f"up{end}") if side in sides]
        parts = [(ffn.down, [f"down{end}"])]
        parts += [(ffn.up, into)] if ffn.gate is None else [(ffn.gate, [f"gate{end}"]), (ffn.up, [f"up{end}"])]
        for module, names in parts:
            if not names or not sides.keys() >= set(names):
                unknown += 1
                continue
            # 32 bits count as 16: a bfloat16 model holds the same weights (`OWN_BITS`).
            quantised.note(module, sum(min(sides[name], OWN_BITS) for name in names) / len(names))
    if not unknown:
        return notes
    return [*notes, f"the file does not say how many bits {unknown} FFN projections have: their reads count 16"]
