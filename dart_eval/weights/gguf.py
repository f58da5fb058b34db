"""GGUF files: converted once into a Hugging Face folder in the cache, under a lock, and loaded from there in seconds.

The weights are expanded to plain numbers. How many bits an FFN weight has in the file is kept beside them, so that
reads count the bytes that the file's own kernels would read, and of which kind it is, so that its codes can be found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dart_eval.util.errors import UserError, summary
from dart_eval.util.files import feed
from dart_eval.weights import gguf_codes
from dart_eval.weights.checkpoint import load_whole

if TYPE_CHECKING:
    from dart_eval.weights.codes import Packed

SUFFIX = ".gguf"
KINDS = "ffn_kinds.json"  # in a converted folder: layer -> side -> bits of a weight in the file, and its type there
CONVERSION = 4  # raise when the conversion changes, so that old folders are not used
NOTES = "notes.json"  # in a converted folder: what is to be told of the file, where there is anything
CODES = "ffn_codes.safetensors"  # in a converted folder: `layer.side` -> [out, in] int8, the file's own codes
WHOLE = "download or convert it again; a file that was split must be merged first (llama-gguf-split --merge)"
EXPERTS, SHARED = "_exps", "_shexp"  # ends of sides: experts, and the FFN beside them that every token has
BLOCK = re.compile(r"blk\.(\d+)\.")
FFN_TENSOR = re.compile(r"blk\.(\d+)\.ffn_((?:gate|up|down)(?:_exps|_shexp)?)\.weight")


def cache_dir() -> Path:
    """`$DART_EVAL_CACHE`, else `$XDG_CACHE_HOME/dart-eval`, else `~/.cache/dart-eval`."""
    if own := os.environ.get("DART_EVAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dart-eval"


def folder(file: Path) -> Path:
    """The folder that a GGUF file is converted into, made on first use.

    Raises:
        UserError: the package gguf is missing, or transformers cannot read the file.
    """
    if find_spec("gguf") is None:
        raise UserError(f"{file} needs the package gguf", "run pip install gguf")
    target = cache_dir() / f"{file.stem}-{_sha256(file)[:8]}-gguf{CONVERSION}"
    return made(target, lambda work: convert(file, work, bits=True))


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """A converted folder, made where it is not there yet: whole, or not at all.

    Args:
        target: where it will be. make: writes it into an empty folder.
    """
    if (target / "model.safetensors").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "model.safetensors").exists():  # another process may have made it meanwhile
            work = target.with_name(target.name + ".partial")
            shutil.rmtree(work, ignore_errors=True)
            try:
                (work / "model").mkdir(parents=True)
                make(work / "model")
                os.replace(work / "model", target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def convert(file: Path, target: Path, bits: bool) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder.

    Args:
        bits: also write how many bits the FFN weights have in the file.

    Raises:
        UserError: the file is damaged or lacks weights, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        reader = gguf_codes.reader(file)
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
        gguf_codes.write(reader.tensors, target / CODES, FFN_TENSOR)
        (target / KINDS).write_text(json.dumps(_kinds(reader.tensors), indent=1), encoding="utf-8")


def _check(file: Path, reader: Any) -> None:
    """Refuse a file whose header contradicts its tensors, before a model is built by the header.

    Raises:
        UserError: it names another number of layers than it holds, or tensors lie elsewhere than one behind the other.
    """
    place = 0
    for tensor in reader.tensors:
        if (offset := int(tensor.field.parts[-1][0])) != place:
            raise UserError(f"{file} is damaged: its tensor {tensor.name} lies at {offset}, not at {place}")
        place += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    said = int(reader.fields[f"{architecture}.block_count"].parts[-1][0])
    held = 1 + max((int(found[1]) for t in reader.tensors if (found := BLOCK.match(t.name))), default=-1)
    if said != held:
        raise UserError(f"{file} names {said} layers ({architecture}.block_count), and holds weights of {held}")


def _unused(name: str, tensors: Sequence[Any], model: Any) -> list[str]:
    """What is to be told of tensors that are in no weight of the model: transformers passes over some.

    Their numbers show it: every other tensor is whole in a weight, whatever its name there.

    Raises:
        UserError: a weight is made of fewer tensors than it needs: transformers fills up with zeros (gates of experts).
    """
    held, needed = sum(int(t.n_elements) for t in tensors), sum(p.numel() for p in model.parameters())  # tied ones once
    if held < needed:
        raise UserError(f"model {name} lacks tensors: {needed - held} numbers of its weights stand in none")
    state = model.state_dict()
    if (left := held - needed - sum(b.numel() for key, b in model.named_buffers() if key in state)) <= 0:
        return []
    fitting = [t.name for t in tensors if int(t.n_elements) == left]
    which = f" ({fitting[0]})" if len(fitting) == 1 else ""
    return [f"model {name}: {left} numbers of the file are in no weight of the model{which}"]


def _kinds(tensors: Sequence[Any]) -> dict[str, dict[str, tuple[float, str]]]:
    """Layer -> gate, up, down -> bits of a weight, its part of scales included, and the type's name."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for tensor in tensors:
        if match := FFN_TENSOR.fullmatch(tensor.name):
            layer, side = match.groups()
            bits = 8 * int(tensor.n_bytes) / int(tensor.n_elements)
            found.setdefault(layer, {})[side] = bits, tensor.tensor_type.name
    return found


def note_bits(source: str, model: Any) -> list[str]:
    """Note of a model that was loaded from a converted folder how many bits its FFN weights have in the file.

    Of plain projections also how their codes are found.

    Returns:
        What is to be told: of the file, and whether some were not found.
    """
    kept, told = Path(source) / KINDS, Path(source) / NOTES
    notes: list[str] = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else []
    if not kept.is_file():
        return notes
    from dart_eval.layers import quantised
    from dart_eval.layers.find import describe
    from dart_eval.weights import codes

    found, unknown = json.loads(kept.read_text(encoding="utf-8")), 0
    for ffn in describe(model):
        sides = found.get(str(ffn.number), {})
        end = EXPERTS if ffn.routed else SHARED if f"down{SHARED}" in sides else ""
        into = [side for side in (f"gate{end}", f"up{end}") if side in sides]
        parts = [(ffn.down, [f"down{end}"])]
        parts += [(ffn.up, into)] if ffn.gate is None else [(ffn.gate, [f"gate{end}"]), (ffn.up, [f"up{end}"])]
        for module, names in parts:
            if not names or not sides.keys() >= set(names):
                unknown += 1
                continue
            quantised.note(module, sum(sides[name][0] for name in names) / len(names))
            kinds = {sides[name][1] for name in names}
            if len(kinds) == 1 and kinds <= gguf_codes.GRIDS.keys() and not ffn.routed:
                keys = [f"{ffn.number}.{name}" for name in names]
                codes.note(module, functools.partial(_codes, file=Path(source) / CODES, keys=keys, kind=kinds.pop()))
    if not unknown:
        return notes
    return [*notes, f"the file does not say how many bits {unknown} FFN projections have: their reads count 16"]


def _codes(module: Any, file: Path, keys: Sequence[str], kind: str) -> Packed | None:
    """The codes of a projection, of which a file may keep the halves apart."""
    import torch
    from safetensors import safe_open

    from dart_eval.layers.projection import weight_matrix
    from dart_eval.util.bits import Rounding
    from dart_eval.weights import codes

    with safe_open(file, framework="pt") as opened:
        held = torch.cat([opened.get_tensor(key) for key in keys])
    bits, group, unsigned = gguf_codes.GRIDS[kind]
    return codes.fitted(held, weight_matrix(module), Rounding(bits, group), unsigned)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    feed(digest, file)
    return digest.hexdigest()
