"""Dequantizes DeepSeek-V4's two low-precision formats, and lists the tensors that are always fp32.

    FP8   weight float8_e4m3fn [R, C]              scale float8_e8m0fnu [ceil(R / 128), ceil(C / 128)]
    FP4   weight int8 [R, C / 2], two e2m1 per byte  scale float8_e8m0fnu [R, C / 32]; an even column is in the low four bits

A value is weight * scale. A scale is a power of two, so bf16 and fp32 hold weight, scale and product exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
FP4_GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0-7; 8-15 are their negatives
FP32_NAMES = ("hc", "norm", "sinks", "position_bias", "e_score_correction_bias")  # as in transformers' own loading


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the tensor ``name`` (transformers' name) in a model of ``dtype``."""
    return torch.float32 if any(word in name for word in FP32_NAMES) else dtype


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns one matrix [R, C] in ``dtype``; ValueError where the scale's shape does not match the weight's format."""
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"a quantized weight is float8_e4m3fn or packed int8, got {weight.dtype} with a scale beside it")
    packed = weight.dtype == torch.int8
    rows, columns = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    height, width = (1, FP4_GROUP) if packed else (FP8_BLOCK, FP8_BLOCK)
    wanted = (math.ceil(rows / height), math.ceil(columns / width))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"a {weight.dtype} weight of {rows} x {columns} wants a scale {list(wanted)}, got {list(scale.shape)}")
    values = unpack_fp4(weight, dtype) if packed else weight.to(dtype)
    by_row = scale.to(dtype).repeat_interleave(height, dim=0)[:rows]  # [R, C / width]
    groups = F.pad(values, (0, -columns % width)).unflatten(1, (-1, width))  # [R, C / width, width]
    return (groups * by_row[..., None]).flatten(1)[:, :columns]


def unpack_fp4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpacks int8 [R, C / 2] into [R, C] by a table of the two values per byte."""
    codes = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype)
    pairs = torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=1)  # [256, 2], the low four bits first
    return F.embedding(packed.view(torch.uint8).int(), pairs).flatten(1)
