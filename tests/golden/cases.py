"""What is measured: five families of tiny models, every preset, and settings of theirs.

Weights and tokens come from `RandomState`, whose numbers numpy keeps the same in all its versions.
"""

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

HERE = Path(__file__).parent
TABLE = HERE / "allocation.json"  # for three layers at sparsity 0.5
CALIBRATION = HERE / "calibration.txt"  # words of `tests.helpers.models.word_tokenizer`

VOCABULARY, FIRST_WORD = 16, 4  # tokens below the first word are special
ENDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**ENDS, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 160}
GATED = {**SIZES, "intermediate_size": 44, "num_key_value_heads": 1}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GATED),
    "qwen2": lambda: Qwen2Config(**GATED),
    "gemma3": lambda: Gemma3TextConfig(  # its window is shorter than the prompts
        **GATED, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": lambda: GPT2Config(**ENDS, n_embd=24, n_layer=3, n_head=3, n_positions=160, n_inner=44),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=44, word_embed_proj_dim=24),
}


@functools.cache
def model(family):
    """The family's model in float64. Its biases and norms do something, and pruning changes what it says."""
    config = CONFIGS[family]()
    config.tie_word_embeddings = False  # random models whose head is their embedding repeat one token
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            drawn = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, tuple(parameter.shape))
            if parameter.dim() == 1:
                parameter.add_(torch.from_numpy(0.3 * drawn))
            else:
                parameter.copy_(torch.from_numpy(0.6 * drawn))
    made.generation_config.eos_token_id = None  # random models must not stop by chance
    return made


def tokens(count, seed):
    """Random tokens, none of them special."""
    return tuple(np.random.RandomState(seed).randint(FIRST_WORD, VOCABULARY, count).tolist())


# Two prompts of a batch: one of five windows of the detector, one that is padded.
PROMPTS = [tokens(52, seed=1), tokens(37, seed=2)]
NEW_TOKENS = 40

# (context, answer): candidates of one context, answers of one token and of several windows, hardly any context
QUESTIONS = [
    *((tokens(41, seed=3), tokens(n, seed=10 + n)) for n in (1, 3, 14)),
    *((tokens(18, seed=4), tokens(n, seed=20 + n)) for n in (1, 13)),
    (tokens(1, seed=5), tokens(4, seed=6)),
]


@dataclass(frozen=True)
class Setting:
    """A method as a user types it, and how it is run.

    decodes: False for what can only score answers. scores: False for what can only write texts. families: a gated and
    a plain one where the models add nothing new.
    """

    method: str
    sparsity: float = 0.5
    shared_mask: bool = False
    decodes: bool = True
    scores: bool = True
    families: tuple[str, ...] = tuple(CONFIGS)


TWO = ("llama", "gpt2")

# A detector that sees drift in every window; without the first two it sees it in some.
RESTLESS = (
    "remask.sigma=-1000:remask.floor=-3:remask.window=3:remask.patience=1:remask.cooldown=0:remask.min_windows=1"
    ":remask.ring=5"
)

SETTINGS = {
    "dense": Setting("dense"),
    "random": Setting("random", 0.62),
    "magnitude": Setting("magnitude"),
    "wanda-sp": Setting("wanda-sp", 0.37),
    "griffin": Setting("griffin", 0.55),
    "dart": Setting("dart", 0.37),
    "dart-code": Setting("dart-code"),
    "oracle": Setting("oracle", decodes=False),
    "random seed": Setting("random:score.seed=3"),
    "every window an alarm": Setting(f"dart:{RESTLESS}", 0.3),
    "some windows an alarm": Setting(
        "dart:remask.window=2:remask.sigma=0.5:remask.floor=0:remask.patience=3:remask.cooldown=1:allocation=uniform:remask.blend=0"
    ),
    "detector only": Setting(
        "dart:remask.window=3:remask.patience=1:remask.floor=0.02:remask.act=off:remask.skip_first=off", 0.7
    ),
    "dense tokens": Setting(f"dart-code:{RESTLESS}:remask.dense_tokens=2:remask.blend=0.3", 0.37),
    "saved table": Setting(f"dart:allocation=table:allocation.file={TABLE}:remask=never"),
    "shared mask": Setting(f"dart:{RESTLESS}", 0.37, shared_mask=True),
    "residual sensitivity": Setting("dart:allocation.sensitivity=residual:allocation.protect=off:remask=never", 0.3),
    "direction alone": Setting("dart:allocation.magnitude=off:remask=never", 0.3),
    "noise": Setting("noise", 0.0, families=TWO),
    "sirius": Setting("sirius:every=4", decodes=False, scores=False, families=TWO),
    "greedy budgets": Setting("teal:allocation=greedy", 0.5, decodes=False, families=TWO),
    "larosa": Setting("larosa", 0.4, decodes=False, families=TWO),
    "rsparse": Setting("rsparse:budget.columns=0.5", 0.45, decodes=False, families=TWO),
    "cats": Setting("cats", 0.45, families=TWO),
    "m-countdown": Setting("m-countdown", 0.37, families=TWO),
    "oracle-token": Setting("oracle-token", 0.62, families=TWO),
    "teal": Setting("teal", 0.45, decodes=False, families=TWO),
    "wina": Setting("wina", 0.45, decodes=False, families=TWO),
    "grinqh": Setting("grinqh", 0.7, decodes=False, families=TWO),
    "decdec": Setting("decdec", 0.75, decodes=False, families=TWO),
    "graded-both": Setting("graded-both", 0.7, decodes=False, families=TWO),
}

# Those that run as lm-eval's model too: texts up to a stop sequence, and perplexities.
TEXTS = ("griffin", "every window an alarm", "sirius")
