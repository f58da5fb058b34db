"""Tiny quantised checkpoints, packed by hand as their formats say, with what their weights stand for."""

import functools
import json

import torch
from safetensors.torch import load_file, save_file

WIDTH, SIZE, GROUP, BLOCK = 64, 128, 32, 32  # the kernels of bitsandbytes for CPUs take no narrower rows
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # E2M1: magnitudes of the eight codes; the fourth bit is the sign


def fp8(folder):
    """fp8 with a scale for each block, as DeepSeek's: weight [out, in] E4M3, weight_scale_inv [out / B, in / B]."""

    def one(name, weight):
        rows, columns = weight.shape
        blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        code = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        values = (code.float() * scale[:, None, :, None]).view(rows, columns)
        return {name: code.view(rows, columns), name + "_scale_inv": scale}, values

    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    return _rewritten(folder, how, one)


def fp8_rows(folder):
    """compressed-tensors' float-quantized: weight [out, in] E4M3, weight_scale [out, 1] bfloat16."""
    return _rows(folder, "float", 448, lambda x: x.to(torch.float8_e4m3fn))


def int8_rows(folder):
    """compressed-tensors' int-quantized: weight [out, in] int8, weight_scale [out, 1] bfloat16."""
    return _rows(folder, "int", 127, lambda x: x.round().clamp(-128, 127).to(torch.int8))


def _rows(folder, kind, most, encode):
    def one(name, weight):
        scale = (weight.abs().amax(1, keepdim=True) / most).bfloat16()
        code = encode(weight / scale.float())
        return {name: code, name + "_scale": scale}, code.float() * scale.float()

    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    return _rewritten(folder, _compressed(f"{kind}-quantized", weights, inputs), one)


def int4_groups(folder):
    """compressed-tensors' pack-quantized: eight codes in an int32 along a row, weight_scale [out, in / group]."""

    def one(name, weight):
        groups = weight.view(len(weight), -1, GROUP)
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        code = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        parts = {name + "_packed": packed(code.view(weight.shape) + 8, 1), name + "_scale": scale}
        parts[name + "_shape"] = torch.tensor(weight.shape)
        return parts, (code * scale.float()[..., None]).view(weight.shape)

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    weights |= {"symmetric": True, "dynamic": False}
    return _rewritten(folder, _compressed("pack-quantized", weights, None), one)


def gptq(folder):
    """GPTQ, see `gptq_parts`."""
    how = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    return _rewritten(folder, how, functools.partial(_parts, gptq_parts))


def gptq_parts(code, scale, zero):
    """qweight [in / 8, out] int32, qzeros [in / group, out / 8] of zero points less one, scales, g_idx [in]."""
    parts = {"qweight": packed(code.T, 0), "qzeros": packed(zero.T - 1, 1), "scales": scale.T.half().contiguous()}
    return parts | {"g_idx": torch.arange(code.shape[1], dtype=torch.int32) // GROUP}


def awq(folder):
    """AWQ, see `awq_parts`."""
    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _rewritten(folder, how, functools.partial(_parts, awq_parts))


def awq_parts(code, scale, zero):
    """qweight [in, out / 8] int32 in the order 0 2 4 6 1 3 5 7, qzeros [in / group, out / 8], scales."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": packed(code.T, 1, order), "qzeros": packed(zero.T, 1, order)}
    return parts | {"scales": scale.T.half().contiguous()}


def _parts(make, name, weight):
    code, scale, zero, values = grid(weight)
    return {name.removesuffix("weight") + key: value for key, value in make(code, scale, zero).items()}, values


def mxfp4(folder):
    """gpt-oss: of each expert's matrix [out, in] two E2M1 codes in a byte, and a power of two for 32 of them."""

    def one(name, weight):  # [E, in, out]
        groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
        power = groups.abs().amax(-1).log2().floor() - 2
        scaled = groups / 2 ** power[..., None]
        code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
        values = FP4[code] * scaled.sign() * 2 ** power[..., None]
        code = code + 8 * (scaled < 0)
        parts = {name + "_blocks": (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)}
        return parts | {name + "_scales": (power + 127).to(torch.uint8)}, values.flatten(2).transpose(1, 2)

    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return _rewritten(folder, how, one, of="experts.")


def _rewritten(folder, how, one, of="_proj.weight"):
    """Replace the weights of a folder by what `one` makes of each; returns name -> values they stand for."""
    stored, values = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if of in name and not name.endswith("bias"):
            parts, values[name] = one(name, weight.float())
            stored |= parts
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return values


def _compressed(form, weights, inputs):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


def grid(weight):
    """Codes of 4 bits, scales, zero points and values on an asymmetric grid for each group of a row."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    code = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return code.view(weight.shape), scale, zero, ((code - zero[..., None]) * scale[..., None]).view(weight.shape)


def packed(codes, dim, order=range(8)):
    """Eight codes of 4 bits along a dimension in an int32, the first in the lowest bits."""
    codes = codes.movedim(dim, -1).long().unflatten(-1, (-1, 8))
    words = sum((codes[..., place] & 15) << 4 * i for i, place in enumerate(order))
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).movedim(-1, dim).contiguous()
