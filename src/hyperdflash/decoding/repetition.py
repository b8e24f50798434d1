"""Does an answer end in a loop? Looping text is easy to draft and inflates tau, so its share is always reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ends_in_loop(
    answer_ids: Sequence[int],
    max_period: int = 16,
    min_repeats: int = 3,
    min_length: int = 24,
    end_token_id: int | None = None,
) -> bool:
    """Whether the tail of ``answer_ids`` (tokens of the answer alone, [T]) repeats with a period of 1..``max_period``.

    Definition: for some period d the last n tokens satisfy x[i] = x[i - d] for all but their first d, with
    n >= d * ``min_repeats`` and n >= ``min_length``. The second bound keeps ``)))`` and a rule of dashes from counting.
    A final ``end_token_id`` is not part of the tail. Text that repeats with a change each time ("1. a 2. a 3. a") is
    not a loop by this definition.
    """
    ids = np.asarray(answer_ids)
    if end_token_id is not None and len(ids) and ids[-1] == end_token_id:
        ids = ids[:-1]
    for period in range(1, min(max_period, len(ids) - 1) + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        tail = len(ids) - (differs[-1] + 1 if len(differs) else 0)  # ids[differs[-1] + 1 :] is periodic
        if tail >= max(period * min_repeats, min_length):
            return True
    return False
