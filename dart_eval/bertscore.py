"""BERTScore (Zhang et al., ICLR 2020, arXiv 1904.09675) of summaries, where its model is at hand.

Ours rather than the package `bert-score`, whose last release (0.3.13, February 2023) breaks under transformers 5: an
empty text raises, a tokenizer without a length raises, and the space that RoBERTa's first word needs is dropped.
Otherwise its choices are kept: F1 without baseline and without IDF; the embeddings are those after a given number of
layers; a text's beginning and end tokens may be matched but are not counted; an empty text scores 0.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_eval.errors import UserError

# Layer whose embeddings agree best with people, where bert-score's authors measured it: (family, depth) -> layer
BEST_LAYER = {("roberta", 24): 17}  # roberta-large
RENAMED = {"roberta-large": "FacebookAI/roberta-large"}  # older name on the hub -> today's; a cache may hold either
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def find(model: str) -> str | None:
    """Folder of a model that is on this machine: the folder itself, or the one in the Hugging Face cache.

    None where it is neither (or there without weights). Nothing is downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folders = [model]
    for name in dict.fromkeys((model, RENAMED.get(model, model))):
        try:
            folders.append(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            continue
    for folder in map(Path, folders):
        if (folder / "config.json").is_file() and any(any(folder.glob(w)) for w in WEIGHTS):
            return str(folder)
    return None


def scores(
    model: str | Path,
    candidates: list[str],
    references: list[str],
    layer: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
) -> list[float]:
    """BERTScore F1 of each candidate against its reference, in [-1, 1]; 0 where either text is empty.

    Precision is the mean over the candidate's tokens of the largest cosine with any token of the reference, recall
    the same with the two swapped; F1 is their harmonic mean. Texts are cut at the model's length.

    Args:
        model: what `find` accepts: a folder, or a name that is in the Hugging Face cache.
        layer: layers that are run, at least 1; None is `BEST_LAYER`'s, or all of them.
        batch_size: pairs per forward. Moves last digits only.

    Raises:
        UserError: the model is not at hand, or has no such layer.
        ValueError: candidates and references differ in number.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, but {len(references)} references")
    folder = find(str(model))
    if folder is None:
        raise UserError(f"BERTScore's model {model} is not on this machine", f"hf download {model}, or give a folder")
    encode = _encoder(folder, layer, device)
    found = [0.0] * len(candidates)
    todo = [i for i, pair in enumerate(zip(candidates, references, strict=True)) if all(t.strip() for t in pair)]
    todo.sort(key=lambda i: len(candidates[i]) + len(references[i]))  # little padding
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        # Candidates and references apart: summaries may be much shorter than what they are compared with.
        one, other = (encode([texts[i] for i in batch]) for texts in (candidates, references))
        for i, value in zip(batch, _f1(*one, *other).tolist(), strict=True):
            found[i] = value
    return found


def _f1(x: Tensor, x_real: Tensor, x_counts: Tensor, y: Tensor, y_real: Tensor, y_counts: Tensor) -> Tensor:
    """[B] from unit embeddings [B, T, D], and which tokens are no padding and which count ([B, T] bool each)."""
    cosine = x @ y.transpose(1, 2)
    nearest_y = cosine.masked_fill(~y_real[:, None, :], -torch.inf).amax(2)
    nearest_x = cosine.masked_fill(~x_real[:, :, None], -torch.inf).amax(1)
    precision = (nearest_y * x_counts).sum(1) / x_counts.sum(1)
    recall = (nearest_x * y_counts).sum(1) / y_counts.sum(1)
    return (2 * precision * recall / (precision + recall)).nan_to_num(0.0)


@lru_cache(maxsize=1)
def _encoder(folder: str, layer: int | None, device: str) -> Any:
    """A function from texts to what `_f1` takes of them; the model stays loaded for the next call."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    depth = config.num_hidden_layers
    layer = BEST_LAYER.get((config.model_type, depth), depth) if layer is None else layer
    if not 1 <= layer <= depth:
        raise UserError(f"BERTScore's model {folder} has no layer {layer}", f"it has 1 to {depth}")
    config.num_hidden_layers = layer  # the layers above are not needed, so they are not even loaded
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # or it reports the weights of the layers and heads left out
    logging.disable_progress_bar()
    try:
        model: Any = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, trust_remote_code=False)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    model = (model.get_encoder() if config.is_encoder_decoder else model).to(device).eval()
    length = _max_length(tokenizer.model_max_length, model)
    # For these a word is one token after a space and another at the beginning, where running text has it after one.
    prefix = " " if isinstance(tokenizer, (GPT2Tokenizer, RobertaTokenizer)) else ""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = torch.tensor([t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None], device=device)

    @torch.inference_mode()
    def encode(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = tokenizer(
            [prefix + text.strip() for text in texts], padding=True, padding_side="right", truncation=True,
            max_length=length, return_tensors="pt",
        ).to(device)  # fmt: skip
        hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        real = tokens["attention_mask"].bool()
        return torch.nn.functional.normalize(hidden, dim=-1), real, real & ~torch.isin(tokens["input_ids"], ends)

    return encode


def _max_length(stated: int, model: Any) -> int:
    """Tokens that the model takes: what its tokenizer states, if it does, but no more than it has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or stated
    embeddings = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)  # RoBERTa counts positions from the one after the padding's
    return min(stated, positions - (0 if padding is None else padding + 1), 2**31 - 1)
