"""GGUF files: converted once into a Hugging Face folder in the cache, under a lock, and loaded from there in seconds.

The weights are expanded to plain numbers. The bits of an FFN weight in the file are stored beside them, so that reads
count the bytes of the file's own kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dart_eval.layers.find import describe
from dart_eval.layers.quantised import RECORDS, Record
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError, summary
from dart_eval.util.files import cache_dir, feed, reason
from dart_eval.weights.checkpoint import load_whole

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
FACTS = "gguf.json"  # in a converted folder: notes for the user; FFN tensor -> bits of a weight in the file
CONVERSION = 6  # raise when the conversion changes, so that old folders are not used
REMEDY = "download or convert it again; a file that was split must be merged first (llama-gguf-split --merge)"
EXPERTS, SHARED = "_exps.weight", "_shexp.weight"  # ends of tensors: routed experts, and the shared FFN beside them


def folder(file: Path) -> Path:
    """Return the folder that a GGUF file is converted into, made on first use."""
    digest = hashlib.sha256()
    feed(digest, file)
    target = cache_dir() / f"{file.stem}-{digest.hexdigest()[:8]}-gguf{CONVERSION}"
    return converted(target, lambda work: convert(file, work))


def converted(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder `target`, made completely or not at all if it is missing. make: writes an empty folder."""
    if (target / "model.safetensors").exists():
        return target
    work = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            shutil.rmtree(work, ignore_errors=True)
            try:
                if not (target / "model.safetensors").exists():  # another process may have made it meanwhile
                    (work / "model").mkdir(parents=True)
                    make(work / "model")
                    shutil.rmtree(target, ignore_errors=True)  # of which the weights were deleted
                    os.replace(work / "model", target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"no converted model can be written to {target.parent} ({reason(error)})",
            "make room, or set DART_EVAL_CACHE to another folder",
        ) from None
    return target


def convert(file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file, and `FACTS`, as a Hugging Face folder.

    Raises:
        UserError: the file lacks weights, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        from gguf import GGUFReader

        reader, options = GGUFReader(file), {"gguf_file": file.name, "trust_remote_code": False}
        read, notes = load_whole(AutoModelForCausalLM, file.name, file.parent, **options)
        notes += _check(file.name, reader, read)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except UserError as error:
        raise UserError(error.problem, REMEDY) from None
    except Exception as error:  # of transformers, of gguf, of the file system
        raise UserError(
            f"transformers cannot read {file} ({summary(error)})",
            "pip install gguf, or convert the file to a Hugging Face folder first",
        ) from error
    # A model read from GGUF refuses save_pretrained: its state goes into a model made from its config.
    read.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target, max_shard_size="1TB")
    tokenizer.save_pretrained(target)
    tensors = (t for t in reader.tensors if ".ffn_" in t.name)  # 32 bits count as 16, as served
    bits = {t.name: min(8 * int(t.n_bytes) / int(t.n_elements), OWN_BITS) for t in tensors}
    (target / FACTS).write_text(json.dumps({"notes": notes, "bits": bits}, indent=1), encoding="utf-8")


def _check(name: str, reader: GGUFReader, model: PreTrainedModel) -> list[str]:
    """Compare a file's layers and numbers with the model's: transformers drops layers, and fills experts with zeros.

    Returns:
        A note on tensors that are in no weight, if there are any.

    Raises:
        UserError: the file has other layers than it says, or lacks tensors.
    """
    layers = model.config.get_text_config().num_hidden_layers
    blocks = len({t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")})
    if layers != blocks:
        raise UserError(f"model {name} names {layers} layers, and holds weights of {blocks}")
    numbers, needed = sum(int(t.n_elements) for t in reader.tensors), sum(p.numel() for p in model.parameters())
    if numbers < needed:
        raise UserError(f"model {name} lacks tensors: {needed - numbers} numbers of its weights stand in none")
    state = model.state_dict()
    unused = numbers - needed - sum(b.numel() for key, b in model.named_buffers() if key in state)
    return [f"model {name}: {unused} numbers of the file are in no weight of the model"] if unused > 0 else []


def record_bits(source: str, model: PreTrainedModel) -> list[str]:
    """Record the bits of a converted model's FFN weights in the file. Return its notes for the user."""
    file = Path(source) / FACTS
    if not file.is_file():
        return []
    facts = json.loads(file.read_text(encoding="utf-8"))
    for ffn in describe(model):
        begin = f"blk.{ffn.number}.ffn_"
        end = EXPERTS if ffn.routed else SHARED if f"{begin}down{SHARED}" in facts["bits"] else ".weight"
        gate, up, down = (facts["bits"].get(f"{begin}{side}{end}") for side in ("gate", "up", "down"))
        if ffn.gate is None and gate and up:  # one projection has both
            up = (gate + up) / 2
        for module, bits in ((ffn.gate, gate), (ffn.up, up), (ffn.down, down)):
            if module is not None:
                RECORDS[module] = Record(Stored.of(bits) if bits else Stored(OWN_BITS, about=True))
    return list(facts["notes"])
