"""A tiny random model of every type of language model that transformers offers."""

import inspect
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Not language models by themselves: encoders with a head, translators, speech, images, drafts for another model.
_OTHERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra emu3
ernie fuyu gemma4_assistant gemma4_unified_assistant git got_ocr2 marian mbart megatron-bert moshi
moss_transcribe_diarize musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert roberta
roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
OTHERS = set(_OTHERS.split())
# Not made tiny: what these are made of beside text would have to be, too. Their text models have rows of their own.
NOT_MADE = {
    "blt": "bytes in patches",
    "dots3_note": "images beside text; dots3_note_text has a row",
    "gemma3n": "needs timm; gemma3n_text has a row",
    "mllama": "images beside text",
    "phi4_multimodal": "images and speech beside text",
    "qwen4_exp": "images beside text; qwen4_exp_text has a row",
}
TYPES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - OTHERS - set(NOT_MADE))

WORDS, VOCABULARY, WIDTH = 96, 104, 32  # embeddings have more rows than there are words, as checkpoints do
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# Values by the name of a parameter, in whatever configuration has it.
USUAL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "unpadded_vocab_size": WORDS,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "conv_dim", "block_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dff"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16),
    # Beyond the lengths of the checks: where it cuts, stock models differ between cached and whole texts.
    **dict.fromkeys(("index_topk",), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("zero_expert_num", "mamba_expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "rotary_dim", "adapter_rank"), 4),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_window_size", "window_size"), 16),
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True, "use_cache": True,
}  # fmt: skip
# What the usual values do not fit.
LATENT = {"num_key_value_heads": 4}  # attention through a latent: every head has keys of its own
WINDOWS, RECURRENT = ["sliding_attention", "full_attention"], ["linear_attention", "full_attention"]
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4}
_LATENT = """
axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash
minicpm3 sarvam_mla youtu
"""
# Two layers are not one of each kind, or layers share something.
_DEEP = """
afmoe bailing_hybrid beam deepseek_v4 dory dots3_note_text exaone_moe flint gemma3n_text gemma4 gemma4_text
gemma4_unified gemma4_unified_text hy_v4 inkling2_loop_text kimi_linear lara_mini lfm2_moe lfm3 llama4 llama4_text
modernbert-decoder qwen4_exp_text recurrent_gemma smollm3 zamba zamba2
"""
DEEP = set(_DEEP.split())
UNUSUAL = {
    **dict.fromkeys(_LATENT.split(), LATENT),
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    **{name: {"layer_types": WINDOWS} for name in ("cohere2", "cohere2_moe", "exaone4", "olmo3")},
    **{name: {"layer_types": RECURRENT} for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": WINDOWS, "rope_parameters": dict.fromkeys(WINDOWS, ROTARY)},
    "dots3_note_text": {**LATENT, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3": {"vision_config": IMAGES},
    # Low enough to be reached.
    "hy_v4": {"swiglu_limit": 0.5},
    "inkling2_loop_text": {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1},
    "deepseek_v4": {
        "swiglu_limit": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6},
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "minimax_m3_vl_text": {"swiglu_limit": 0.5},
    "mamba2": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, "layer_types": RECURRENT * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mlp_multipliers": [0.7, 1.3]},
    "gemma3n_text": {
        "num_kv_shared_layers": 1, "layer_types": WINDOWS * 2, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 97, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 2, "hc_lowrank": 8,
        "hc_count": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ple_embed_dim": 16, "ple_layer_ids": [1],
    },
    "zamba": {**HYBRID, "attention_head_dim": 16},
    "zamba2": {**HYBRID, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Layouts that a type has beside its usual one: name -> (type, further values).
VARIANTS = {
    "gemma4_text with experts": ("gemma4_text", {"enable_moe_block": True, "num_experts": 4}),  # Gemma 4 26B-A4B
    "granitemoehybrid without experts": ("granitemoehybrid", {"num_local_experts": 0}),  # Granite 4.0 350M, 1B
}


def tiny(name, dtype=torch.float32, depth=2):
    """A random model of a type, or of a variant, with norms, factors and biases that all do something."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(_config(name, depth)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.2))
    model.generation_config.eos_token_id = None  # random models must not stop by chance
    return model.to(dtype)


def _config(name, depth):
    name, further = VARIANTS.get(name, (name, {}))
    cls, depth = CONFIG_MAPPING[name], 4 if name in DEEP else depth
    values = {**usual(cls, depth), **UNUSUAL.get(name, {}), **further}
    text = (cls.sub_configs or {}).get("text_config")
    if text is not None:
        values["text_config"] = {**usual(text, depth), **UNUSUAL.get(f"{name}_text", {})}
    return cls(**values)


def usual(cls, depth=2):
    values = {**USUAL, **dict.fromkeys(DEPTH, depth)}
    return {name: values[name] for name in inspect.signature(cls.__init__).parameters if name in values}
