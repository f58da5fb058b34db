"""The files of a checkpoint, and checks that a loaded model has all of its weights."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

SHOWN = 3  # names in a message
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # as configurations call their number
MOST_LAYERS = 4096  # more than any model has; building a model of 10^8 would not end
SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "SCB")  # of quantised weights, in a file
SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weights_dtype(source: str, revision: str | None) -> str:
    """Return the dtype that transformers' `auto` takes without one in the configuration: the first float weight's.

    Raises:
        UserError: no file of weights can be read.
    """
    problem = "has no weights"
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = Path(f"{name}.index.json")  # what is read first, if there are shards
        try:
            if not (files := weight_files(source, name, revision)):
                continue
            file = files[0]
            if file.suffix == ".bin":
                weights = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
                dtypes = [str(w.dtype).removeprefix("torch.") for w in weights.values()]
            else:
                with safe_open(file, framework="pt") as opened:
                    kinds = [opened.get_slice(key).get_dtype() for key in opened.keys()]  # noqa: SIM118 - no mapping
                dtypes = [SAFETENSORS.get(kind, "") for kind in kinds]
            return next(dtype for dtype in dtypes if dtype in SAFETENSORS.values())
        except StopIteration:
            problem = f"has no floating-point weights in {file.name}"
        except pickle.UnpicklingError as error:
            raise no_tensors(Path(source).name, error) from None
        except Exception as error:  # of safetensors, of the file system
            problem = f"has weights that cannot be read ({file.name}: {' '.join(str(error).split())[:200]})"
    raise UserError(f"model {Path(source).name} names no dtype, and {problem}", "give --dtype, or complete weights")


def no_tensors(name: str, error: pickle.UnpicklingError) -> UserError:
    """Return the error for weights that torch refuses to unpickle; torch's own text explains how to switch that off."""
    call = re.search(r"GLOBAL (\S+)", str(error))
    return UserError(
        f"the weights of model {name} are no plain tensors" + (f": their file calls {call[1]}" if call else ""),
        "such a file may run any code when it is loaded: take the weights as safetensors",
    )


def check_layers(name: str, settings: Mapping[str, object]) -> None:
    """Refuse a number of layers that no model can have. settings: of config.json.

    Raises:
        UserError: with the key and the number.
    """
    for key, value in _entries(settings):
        if key.rpartition(".")[2] not in LAYERS or not isinstance(value, int):
            continue
        of_text = "." not in key.removeprefix("text_config.")  # other parts may have none
        if value > MOST_LAYERS or (of_text and value < 1):
            raise UserError(
                f"config.json of model {name} says {key} {value}", f"a model has 1 to {MOST_LAYERS} layers: correct it"
            )


def _entries(settings: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """Yield the keys and values of a configuration, nested ones as `text_config.hidden_act`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


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


def weight_files(source: str, name: str, revision: str | None) -> list[Path]:
    """Return the files of a checkpoint's weights, sorted by name: one file, its shards, or none.

    Args:
        name: of the single file, `model.safetensors`.
    """
    single = model_file(source, name, revision)
    index = None if single else model_file(source, f"{name}.index.json", revision)
    if index is None:
        return [] if single is None else [single]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for shard in shards if (file := model_file(source, shard, revision)) is not None]


def model_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model, fetched from the hub if needed; None if the model has no such file."""
    try:
        path = cached_file(source, name, revision=revision or "main")
    except OSError:
        return None
    return None if path is None else Path(path)


def load_whole(
    loader: type[_BaseAutoModelClass], name: str, source: str | Path, **kwargs: object
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
    return model, _check_weights(name, info)


def _check_weights(name: str, info: Json) -> list[str]:
    """Check the weights, see `load_whole`. info: without tied weights and the like."""
    missing, unused = info["missing_keys"], info["unexpected_keys"]
    if wrong := info["mismatched_keys"]:
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
    if unused:
        return [f"model {name}: {len(unused)} weights of the checkpoint are not used ({_few(unused)})"]
    return []


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
