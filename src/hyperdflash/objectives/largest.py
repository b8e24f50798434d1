"""Finds whether a label has its row's largest logit, without a [rows, V] tensor: the acceptance of greedy replay.

R rows, F the width of all factors side by side; shapes otherwise as in contracts.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.numerics import fast_fp32_products
from hyperdflash.objectives.row_values import wide
from hyperdflash.objectives.sweep import SHAPE_MULTIPLE, product_dtype, rows_together, vocab_slices


@torch.no_grad()
def is_largest(features: Tensor, labels: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Returns whether the label has its row's largest logit, as the first of equals: [R, F], int64 [R], [V, F_t] -> bool [R].
    Products are computed as in ``sweep``."""
    num_rows, padding = len(features), -len(features) % SHAPE_MULTIPLE
    features, labels = F.pad(features.to(product_dtype(features)), (0, 0, 0, padding)), F.pad(labels, (0, padding))
    top = wide(features.new_full((len(features),), float("-inf")))
    hits = torch.zeros_like(labels, dtype=torch.bool)
    size = rows_together(features)
    first = first_largest_on_host if features.device.type == "cpu" else first_largest
    with torch.autocast(features.device.type, enabled=False), fast_fp32_products():
        for start, table_rows in vocab_slices(tables, features, min(size, len(features))):
            for states, of_rows, best, hit in zip(*(x.split(size) for x in (features, labels, top, hits)), strict=True):
                logits = wide(states @ table_rows.T)  # a maximum takes longer in bf16 than in fp32
                largest = logits.amax(dim=-1)
                first_here = first(logits, largest, of_rows - start)
                torch.where(largest > best, first_here, hit, out=hit)
                torch.maximum(best, largest, out=best)
    return hits[:num_rows]


def first_largest_on_host(logits: Tensor, largest: Tensor, column: Tensor) -> Tensor:
    """``first_largest`` with a second look at the few rows that need one, which an accelerator would be waited for."""
    here = ((column >= 0) & (column < logits.shape[1])).nonzero().squeeze(1)
    here = here[logits[here, column[here]] == largest[here]]
    first = torch.zeros_like(column, dtype=torch.bool)
    first[here] = logits[here].argmax(dim=-1) == column[here]
    return first


def first_largest(logits: Tensor, largest: Tensor, column: Tensor) -> Tensor:
    """Returns whether ``column`` [R], perhaps outside of [0, V), is the first one of ``logits`` [R, V] that equals ``largest``
    [R]."""
    inside, at = (column >= 0) & (column < logits.shape[1]), column.clamp(0, logits.shape[1] - 1)[:, None]
    equal = logits == largest[:, None]
    earlier = torch.arange(logits.shape[1], device=logits.device) < at
    return inside & equal.gather(1, at).squeeze(1) & ~(equal & earlier).any(dim=1)
