"""Tiny random GGUF files, damage to them, and what a llama's file says, read without transformers."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize

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


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


def held(path):
    """What a llama's file says: name in transformers -> weight, read by the library gguf alone."""
    reader, found = GGUFReader(path), {}
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    for tensor in reader.tensors:
        name, values = tensor.name.removesuffix(".weight"), torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        block, _, side = name.removeprefix("blk.").partition(".")
        if side in heads:  # rows of a head: one of the first half, one of the second, and so on
            values = values.unflatten(0, (heads[side], -1, 2)).transpose(1, 2).flatten(0, 2)
        found[f"model.layers.{block}.{NAMES[side]}.weight" if side in NAMES else f"{OUTER.get(name, name)}.weight"] = (
            values
        )
    found.setdefault("lm_head.weight", found.get("model.embed_tokens.weight"))  # a file without one has it tied
    return found


def differing(model, path):
    """The weights of a loaded model that are not the file's, and those of the file that it does not have."""
    ours, theirs = model.state_dict(), held(path)
    same = {n for n in ours.keys() & theirs.keys() if torch.equal(ours[n].nan_to_num(7.0), theirs[n].nan_to_num(7.0))}
    return sorted((ours.keys() | theirs.keys()) - same)


NUMBERS = (0, 1, 3, 64, 10**9, 2**31, 2**32 - 1)


def damaged(random, path):
    """Damage a file in one way; says which.

    Args:
        random: a `random.Random`, or Hypothesis's.
    """
    reader, raw = GGUFReader(path), bytearray(path.read_bytes())
    how = random.choice(["values", "cut", "dropped", "offset", "shape", "type"])
    tensor = random.choice(reader.tensors)
    if how == "values":  # of widths, heads
        field = random.choice(
            [f for n, f in reader.fields.items() if n.startswith("llama.") and n != "llama.block_count"]
        )
        _put(raw, field.offset + sum(part.nbytes for part in field.parts[:-1]), 4, random.choice(NUMBERS))
        return f"{how} of {field.name}"
    elif how == "cut":
        del raw[random.randrange(len(raw)) :]
    elif how == "dropped":
        raw = write(path, without=tensor.name).read_bytes()
    else:
        # Where the number stands in the tensor's entry in the header.
        parts = dict(zip(("length", "name", "dimensions", "shape", "type", "offset"), tensor.field.parts, strict=True))
        at = tensor.field.offset + sum(p.nbytes for p in tensor.field.parts[: [*parts].index(how)])
        was, size = int(parts[how][0]), 4 if how == "type" else 8
        others = [was + 1, max(0, was - 1), was + 32, was ^ 1 << random.randrange(8), 0, 8, was * 2]
        _put(raw, at, size, random.choice(others))
    path.write_bytes(raw)
    return f"{how} of {tensor.name}" if how in ("dropped", "offset", "shape", "type") else how


def _put(raw, at, size, number):
    raw[at : at + size] = number.to_bytes(size, "little")
