"""The files of a checkpoint, and checks that a loaded model has all of its weights."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

SHOWN = 3  # names in a message
SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "SCB")  # of quantised weights, in a file
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them


def weights_dtype(source: str, revision: str | None) -> str:
    """Return the dtype that transformers' `auto` takes without one in the configuration: the first float weight's.

    Raises:
        UserError: no safetensors file says one.
    """
    file = model_file(source, "model.safetensors", revision)
    try:
        if file is None and (index := model_file(source, "model.safetensors.index.json", revision)):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            file = model_file(source, min(shards), revision)
        with safe_open(file, framework="pt") as opened:
            kinds = [opened.get_slice(key).get_dtype() for key in opened.keys()]  # noqa: SIM118 - no mapping
        return next(DTYPES[kind] for kind in kinds if kind in DTYPES)
    except Exception:  # of safetensors, of the file system
        problem = "has no safetensors file that says one"
        raise UserError(f"model {Path(source).name} names no dtype, and {problem}", "give --dtype") from None


def no_tensors(name: str, error: pickle.UnpicklingError) -> UserError:
    """Return the error for weights that torch refuses to unpickle; torch's own text explains how to switch that off."""
    call = re.search(r"GLOBAL (\S+)", str(error))
    return UserError(
        f"the weights of model {name} are no plain tensors" + (f": their file calls {call[1]}" if call else ""),
        "such a file may run any code when it is loaded: take the weights as safetensors",
    )


def own_code(source: str, config: PretrainedConfig, revision: str | None) -> str | None:
    """Return the source of a model's own code, for messages; None if it brings none."""
    attention = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in attention:
        return f"the attention {attention} of the hub"
    if getattr(config, "auto_map", None):
        return "auto_map in config.json"
    if get_tokenizer_config(source, revision=revision).get("auto_map"):
        return "auto_map in tokenizer_config.json"
    return "custom_generate" if model_file(source, "custom_generate/generate.py", revision) is not None else None


def model_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model, fetched from the hub if needed; None if the model has no such file."""
    try:
        path = cached_file(source, name, revision=revision or "main")
    except OSError:
        return None
    return None if path is None else Path(path)


def load_whole(
    loader: type[_BaseAutoModelClass], name: str, source: str | Path, **kwargs: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model and check that it has all of its weights. Return it with notes for the user.

    Every loader goes through here, since transformers itself fills in missing weights with random numbers.

    Args:
        loader: a class with `from_pretrained`.
        name: of the model, for messages.
        source, kwargs: of `from_pretrained`.

    Raises:
        UserError: weights are missing, have another shape, or are quantised without a word in config.json.
    """
    # We merge an adapter in the folder ourselves: transformers would report only the adapter's weights.
    kwargs["adapter_kwargs"] = {"subfolder": "none"}
    model, info = loader.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    missing, unused, wrong = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    if wrong:
        key, theirs, ours = min(wrong)
        raise UserError(
            f"{len(wrong)} weights of model {name} have another shape than its config.json says: {key} is "
            f"{list(theirs)}, not {list(ours)}",
            "give the weights their own config.json",
        )
    if missing:
        instead = f", and has {len(unused)} that the model does not know ({_few(unused)})" if unused else ""
        raise UserError(
            f"model {name} lacks {len(missing)} weights ({_few(missing)}){instead}",
            "save the whole model itself, not a wrapper of it, with save_pretrained; config.json must fit it",
        )
    parts = ((key, *key.rpartition(".")[::2]) for key in unused)
    if scales := [key for key, module, part in parts if part in SCALES and f"{module}.weight" not in unused]:
        raise UserError(
            f"model {name} has quantised weights, and its config.json names no quantization_config that would read "
            f"their {len(scales)} scales ({_few(scales)})",
            "give it that of the checkpoint, or a checkpoint that transformers can read",
        )
    note = f"model {name}: {len(unused)} weights of the checkpoint are not used ({_few(unused)})"
    return model, [note] if unused else []


def _few(names: Collection[str]) -> str:
    return ", ".join([*sorted(names)[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that the model has no embeddings for, or that has neither a BOS nor an EOS token.

    Special tokens that no plain text has (of images, for example) may lie beyond the embeddings.

    Raises:
        UserError: with both sizes, or what is missing.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of model {name} has neither a BOS nor an EOS token",
            "name one in its tokenizer_config.json (bos_token, eos_token): answers without a context begin with it",
        )
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    largest = max(i for i in tokenizer.get_vocab().values() if i not in special)
    if largest >= rows:
        raise UserError(
            f"the tokenizer of model {name} has token ids up to {largest}, and the model {rows} embeddings",
            "give the model its own tokenizer, or save it after resize_token_embeddings",
        )
