"""Two process-wide settings that speed up a step on CPUs and change its results by rounding at most."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_fp32_products() -> Iterator[None]:
    """Sends fp32 matrix products to oneDNN within the context, if oneDNN computes them in fp32 on this processor.

    By default torch multiplies fp32 matrices with MKL, which does not use AVX-512 on AMD processors and takes twice as long
    there. torch uses oneDNN instead if the setting allows bf16 arithmetic. Only processors with AMX have such a bf16 kernel;
    on all others oneDNN computes in fp32. With AMX, and for other dtypes and devices, this context changes nothing.
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
    """Makes glibc keep freed memory for the next step instead of returning it to the system and faulting it in again. glibc
    keeps up to twice the size of the largest block under 32 MiB that was ever freed (mallopt(3), M_MMAP_THRESHOLD), so this
    function allocates and frees one of 31 MiB, which is never written and costs no memory. Other C libraries ignore it."""
    torch.empty(31 << 20, dtype=torch.uint8)
