"""Codecs: the tensors that a tap is written as, and the dtype that training reads.

    bf16   states [N, M, D] bfloat16                               2 M D bytes per token
    fp32   states [N, M, D] float32                                4 M D
    fp8    states [N, M, D] float8_e4m3fn, scale [N, M] float32    M D + 4 M      one scale per token and path; read as bfloat16

N tokens, M paths, D hidden width. Every reader gets ``decode(encode(x))``; `rounded` gives the same for states that never touch
a disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest finite e4m3 value
CHUNK = 2**19  # values encoded at a time


@dataclass(frozen=True)
class Plain:
    """Rounds states to ``dtype``; decodes without a copy."""

    dtype: torch.dtype  # of decoded states

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """Converts states [N, M, D] of any float dtype to named tensors, each with N rows."""
        return {"states": states.to(self.dtype)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Converts the tensors of ``encode``, or the same n rows of each, to states [n, M, D]."""
        return tensors["states"]

    def bytes_per_token(self, num_paths: int, hidden_size: int) -> int:
        return self.dtype.itemsize * num_paths * hidden_size


@dataclass(frozen=True)
class Fp8:
    """e4m3 with one power-of-two scale per token and path: the smallest that brings the path's largest value to at most 448. A
    power of two makes decoding exact: every product is a bfloat16 number, so states are rounded once."""

    dtype: torch.dtype = torch.bfloat16

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        empty = partial(torch.empty, device=states.device)
        encoded = {"states": empty(states.shape, dtype=E4M3), "scale": empty(states.shape[:2])}
        rows = max(1, CHUNK // states[:1].numel())  # intermediate results stay in the processor's cache
        for values, *out in zip(states.split(rows), *(tensor.split(rows) for tensor in encoded.values()), strict=True):
            peak = values.abs().amax(dim=-1).float()
            if not torch.isfinite(peak).all():
                raise ValueError("states with inf or NaN cannot be stored as fp8: look at the target, or set cache.dtype=fp32")
            mantissa, exponent = torch.frexp(peak / E4M3_MAX)  # peak / 448 = mantissa * 2 ** exponent, mantissa in [0.5, 1)
            exponent = (exponent - (mantissa == 0.5).int()).clamp(min=-100)  # far above the smallest bfloat16 and e4m3 numbers
            scale = torch.ldexp(torch.ones_like(peak), exponent)
            out[0].copy_(values * (1 / scale)[..., None].to(values.dtype))
            out[1].copy_(scale)
        return encoded

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return e4m3_to_bf16(tensors["states"]).mul_(tensors["scale"][..., None].to(self.dtype))

    def bytes_per_token(self, num_paths: int, hidden_size: int) -> int:
        return num_paths * (hidden_size + 4)


def e4m3_to_bf16(values: Tensor) -> Tensor:
    """Converts finite e4m3 numbers to bfloat16 exactly, on a CPU several times faster than torch does: the bits s eeee mmm move
    to s 0000eeee mmm0000, which is the number, also a subnormal one, times 2^-120 (the exponents' biases are 7 and 127)."""
    bits = values.view(torch.int8).to(torch.int16)  # ssssssss seeeemmm
    bits.bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    return bits.view(torch.bfloat16).mul_(2.0**120)


Codec = Plain | Fp8


def rounded(states: Tensor, codec: Codec) -> Tensor:
    """Returns ``states`` [..., M, D] as a reader gets them after a write."""
    return codec.decode(codec.encode(states.flatten(0, -3))).view(states.shape)


CODECS: dict[str, Codec] = {"bf16": Plain(torch.bfloat16), "fp32": Plain(torch.float32), "fp8": Fp8()}
