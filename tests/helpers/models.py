"""Tiny random models of every family, a tokenizer and random tokens."""

import copy
import functools

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

VOCAB = 96


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    # a window shorter than the tests' contexts, so that sliding layers do slide
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    # hands its FFNs [batch * tokens, width]
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, n_inner=40,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip


FAMILIES = sorted(CONFIGS)


@functools.cache
def _made(config, scale, dtype=torch.float64, seed=0, attention="sdpa"):
    torch.manual_seed(seed)
    config = config()
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.generation_config.eos_token_id = None  # random models must not stop by chance
    return model


def made(config, scale=6, **options):
    """A copy of the random model that a function's configuration makes: made once, and every copy is the caller's own.

    Its weights are large enough that pruning changes what it says.
    """
    model = copy.deepcopy(_made(config, scale, **options))
    torch.manual_seed(options.get("seed", 0))  # what a test draws next does not depend on who made the model first
    return model


def tiny(family, dtype=torch.float64, **options):
    """A random model of a family; float64, so that the order of sums in a batch cannot blur a comparison."""
    return made(CONFIGS[family], dtype=dtype, **options)


def phi3():
    return transformers.Phi3Config(**SMALL)


def biased(family):
    """A tiny model with biases that are not zero."""
    model = tiny(family) if family != "phi3" else made(phi3, scale=1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.dim() == 1):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)), dtype=p.dtype)
    return model


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


GEMMA4 = {
    **SMALL, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16, "vocab_size_per_layer_input": 96,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip


NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}


STREAMS = {
    "opt with the norm after the FFN": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "minicpm3": lambda: transformers.MiniCPM3Config(
        **{**SMALL, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4
    ),
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**SMALL, residual_multiplier=0.3),
    "gemma4": lambda: transformers.Gemma4TextConfig(**GEMMA4, hidden_size_per_layer_input=0),
    "gemma4 with embeddings of every layer": lambda: transformers.Gemma4TextConfig(
        **GEMMA4, hidden_size_per_layer_input=8
    ),
    "falcon, side by side": lambda: transformers.FalconConfig(**SIZES),
    "falcon, one after the other": lambda: transformers.FalconConfig(**SIZES, parallel_attn=False, alibi=True),
    "neox, side by side": lambda: transformers.GPTNeoXConfig(**NEOX),
    "neox, one after the other": lambda: transformers.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "stablelm, side by side": lambda: transformers.StableLmConfig(**SMALL, use_parallel_residual=True),
}


def random_model(config, dtype=torch.float64):
    """A random model in which every norm, factor and bias does something."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    scalars = [b for name, b in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for p in [*model.parameters(), *scalars]:
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.3))
    return model.to(dtype)


def hooked(model):
    """The modules that have hooks, by name. torch tells it by private names alone."""
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


class Adapted(torch.nn.Module):
    """A projection with another one beside it, as adapters are injected."""

    def __init__(self, linear):
        super().__init__()
        self.base, self.low = linear, torch.nn.Linear(linear.in_features, linear.out_features, bias=False).double()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return self.base(x) + self.low(x)


def word_tokenizer():
    """One word, one token: w4 ... w95, after four special ones."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny(path, tokenizer, family="llama"):
    """A folder with a tiny model in float32 and its tokenizer; returns its name."""
    model = tiny(family).float()
    model.config.max_position_embeddings = 1024
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def odd_llama():
    """A Llama in bfloat16 of which no size is round."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=130, intermediate_size=301, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5,
        head_dim=26, vocab_size=VOCAB,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def random_tokens(count, seed=0):
    return tuple(torch.randint(4, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())
