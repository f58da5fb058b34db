"""Damage to GGUF files, and what a llama's file says, read without transformers."""

import torch
from gguf import GGUFReader
from gguf.quants import dequantize

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
        raw = _without(reader, raw, tensor)
    else:
        at, was, size = _place(tensor, how)
        others = [was + 1, max(0, was - 1), was + 32, was ^ 1 << random.randrange(8), 0, 8, was * 2]
        _put(raw, at, size, random.choice(others))
    path.write_bytes(raw)
    return f"{how} of {tensor.name}" if how in ("dropped", "offset", "shape", "type") else how


def _put(raw, at, size, number):
    raw[at : at + size] = number.to_bytes(size, "little")


def _place(tensor, what):
    """Where a number of a tensor's entry in the header stands, the number, and its bytes."""
    parts = dict(zip(("length", "name", "dimensions", "shape", "type", "offset"), tensor.field.parts, strict=True))
    before = [part.nbytes for part in tensor.field.parts]
    at = tensor.field.offset + sum(before[: [*parts].index(what)])
    return at, int(parts[what][0]), 4 if what == "type" else 8


def _without(reader, raw, tensor):
    """The file of a model that never had the tensor."""
    size = -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
    entries, gone = [t.field for t in reader.tensors], tensor.field
    end = entries[-1].offset + sum(part.nbytes for part in entries[-1].parts)
    _, mine, _ = _place(tensor, "offset")
    for other in reader.tensors:
        at, was, _ = _place(other, "offset")
        _put(raw, at, 8, was - size if was > mine else was)
    _put(raw, 8, 8, len(entries) - 1)
    header = raw[: gone.offset] + raw[gone.offset + sum(part.nbytes for part in gone.parts) : end]
    data = raw[reader.data_offset :]
    return header + bytes(-len(header) % reader.alignment) + data[:mine] + data[mine + size :]
