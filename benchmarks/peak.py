"""Measures this machine's rate of each matrix product of a step at its size and layout, the best of several."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.flops import Product
from hyperdflash.numerics import fast_fp32_products

MOST_LOGITS = 64_000_000  # outputs of a timed product with the vocabulary; they determine its rows


def product_rates(products: list[Product], dtype: torch.dtype, seconds: float = 0.1) -> list[dict]:
    """Returns the FLOP/s of every (product, part), the best of at least 3 repetitions and ``seconds``; in fp32 of torch's two
    libraries (MKL and oneDNN): dicts of name, part, sizes (batch, rows, inner, columns), flops_per_s."""
    rates, known = [], {}
    for product in products:
        for part in product.parts:
            sizes = _sizes(product, part)
            if (sizes, part) not in known:
                known[sizes, part] = product_rate(sizes, part, dtype, seconds)
            rates.append({"name": product.name, "part": part, "sizes": sizes, "flops_per_s": known[sizes, part]})
    return rates


def _sizes(product: Product, part: str) -> tuple[int, int, int, int]:
    """Returns batch, rows, inner and columns of a part's product."""
    rows, inner, columns = product.rows, product.inner, product.columns
    if rows * columns * product.batch > MOST_LOGITS and product.batch == 1:
        rows = max(1, MOST_LOGITS // columns)
    if part == "input gradient":
        inner, columns = columns, inner
    elif part == "weight gradient":
        rows, inner, columns = columns, rows, inner
    return product.batch, rows, inner, columns


def product_rate(sizes: tuple[int, int, int, int], part: str, dtype: torch.dtype, seconds: float) -> float:
    """Returns the FLOP/s of one product; see ``product_rates``."""
    batch, rows, inner, columns = sizes
    left = torch.randn(batch, *((inner, rows) if part == "weight gradient" else (rows, inner))).to(dtype)
    right = torch.randn(batch, *((columns, inner) if part == "forward" else (inner, columns))).to(dtype)
    left = left.mT if part == "weight gradient" else left  # dy^T x
    right = right.mT if part == "forward" else right  # x W^T
    output = torch.empty(batch, rows, columns, dtype=dtype)
    if batch == 1:
        left, right, output = left[0], right[0], output[0]
    routes = (nullcontext, fast_fp32_products) if dtype == torch.float32 else (nullcontext,)
    best = min(_best_time(route, left, right, output, seconds) for route in routes)
    return 2 * batch * rows * inner * columns / best


def _best_time(route, left: Tensor, right: Tensor, output: Tensor, seconds: float) -> float:
    times: list[float] = []
    with route():
        torch.matmul(left, right, out=output)
        while len(times) < 3 or sum(times) < seconds:
            started = time.perf_counter()
            torch.matmul(left, right, out=output)
            times.append(time.perf_counter() - started)
    return min(times)
