"""Tiny random GGUF files."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

WIDTH, SIZE, LAYERS = 64, 128, 2
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.?"]
KINDS = {"ffn_gate": "Q4_0", "ffn_up": "Q4_0", "ffn_down": "Q8_0"}  # 4.5 and 8.5 bits of a weight
EXPERTS, INNER, INNER_SHARED = 2, 1408, 5632  # the inner sizes stand in no file: transformers takes its own


def write(path, seed=0, experts=False, blocks=LAYERS, without=None, more=None):
    """A llama of two layers, whose FFN weights have 4.5, 4.5 and 8.5 bits.

    Args:
        experts: a Qwen2 MoE, whose experts have these bits and whose shared ones have 8.5, 8.5 and 4.5.
        blocks: how many layers the file names. without: a tensor that it lacks. more: one that no model knows.
    """
    random = np.random.default_rng(seed)
    out = GGUFWriter(path, "qwen2moe" if experts else "llama")
    if experts:
        out.add_expert_count(EXPERTS)
        out.add_expert_used_count(1)
    out.add_context_length(512)
    out.add_embedding_length(WIDTH)
    out.add_block_count(blocks)
    out.add_feed_forward_length(SIZE)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(WORDS))
    out.add_tokenizer_model("llama")
    out.add_token_list(WORDS)
    out.add_token_scores([-float(i) for i in range(len(WORDS))])
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    out.add_token_types([*kinds, *[TokenType.NORMAL] * (len(WORDS) - len(kinds))])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)

    def add(name, *shape, kind="F32", around=0.0):
        if name == without:
            return
        values = (around + 0.1 * random.standard_normal(shape)).astype(np.float32)
        raw = GGMLQuantizationType[kind]
        out.add_tensor(name, values if kind == "F32" else quantize(values, raw), raw_dtype=raw)

    if more:
        add(more, 7)
    add("token_embd.weight", len(WORDS), WIDTH)
    add("output.weight", len(WORDS), WIDTH)
    add("output_norm.weight", WIDTH, around=1.0)
    for i in range(LAYERS):
        for name, rows in {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}.items():
            add(f"blk.{i}.{name}.weight", rows, WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", WIDTH, around=1.0)
        if experts:
            for name, rows in {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2}.items():
                add(f"blk.{i}.{name}.bias", rows)
            add(f"blk.{i}.ffn_gate_inp.weight", EXPERTS, WIDTH)
            add(f"blk.{i}.ffn_gate_inp_shexp.weight", WIDTH)
        for name, kind in KINDS.items():
            turn = -1 if name == "ffn_down" else 1
            if not experts:
                add(f"blk.{i}.{name}.weight", *(SIZE, WIDTH)[::turn], kind=kind)
                continue
            add(f"blk.{i}.{name}_exps.weight", EXPERTS, *(INNER, WIDTH)[::turn], kind=kind)
            other = "Q4_0" if kind == "Q8_0" else "Q8_0"
            add(f"blk.{i}.{name}_shexp.weight", *(INNER_SHARED, WIDTH)[::turn], kind=other)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
