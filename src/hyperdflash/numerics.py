"""Two process-wide settings that make a step on CPUs faster and change none of its results beyond rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_fp32_products() -> Iterator[None]:
    """fp32 matrix products in here go to oneDNN where it computes them in fp32; other dtypes and devices as ever.

    torch multiplies fp32 matrices with MKL, which leaves AVX-512 unused on AMD processors and takes twice as long there.
    It hands them to oneDNN, also part of torch, where told that bf16 arithmetic would do; only processors with AMX have
    such a kernel, so on all others oneDNN computes them in fp32. With AMX nothing is changed.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if not torch.cpu.get_capabilities().get("amx_bf16", False):
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one instead of returning it to the system and faulting it in again.

    It does so below twice the size of the largest block under 32 MiB that was ever freed (mallopt(3), M_MMAP_THRESHOLD).
    This block is never written, so it costs no memory; elsewhere than in glibc it does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
