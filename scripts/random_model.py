"""A folder with a model of a known shape and random weights: of the right size and speed, and of no use.

    python scripts/random_model.py SHAPE FOLDER [LAYERS]

For `dart-eval run --model FOLDER`, to see how long a sweep takes, how much memory and on which cards, where the weights
themselves cannot be had. In bfloat16 eight billion weights take 16 GB. Its tokenizer is a small one, made from the
shipped texts: other texts come out longer than under the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dart_eval.bench.shapes import config, with_random_weights
from dart_eval.util.errors import UserError

TOKENS = 8192


def tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def main() -> None:
    """Write the folder."""
    if len(sys.argv) not in (3, 4) or not all(a.isdigit() for a in sys.argv[3:]):
        sys.exit("usage: python scripts/random_model.py SHAPE FOLDER [LAYERS]")
    shape, folder = sys.argv[1:3]
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else None
    if Path(folder).exists():
        sys.exit(f"{folder} is there already; choose another folder")
    try:
        vocabulary = config(shape, layers).vocab_size
        model = with_random_weights(shape, layers)
    except UserError as error:
        sys.exit(str(error))
    texts = [
        *(path for path in files("dart_eval").joinpath("data").iterdir() if path.name.endswith(".txt")),
        *Path(__file__).parents[1].glob("tasks/smoke/*.jsonl"),
    ]
    made = tokenizer((path.read_text(encoding="utf-8") for path in texts), min(TOKENS, vocabulary))
    model.config.bos_token_id, model.config.eos_token_id = made.bos_token_id, None  # it must not stop by chance
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    print(f"{folder}: {shape}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion random weights")


if __name__ == "__main__":
    main()
