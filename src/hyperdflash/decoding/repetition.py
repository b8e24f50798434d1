"""Detects answers that end in a loop. Looping text is easy to draft and inflates tau, so reports always state its share."""

from collections.abc import Sequence

import numpy as np


def ends_in_loop(
    answer_ids: Sequence[int],
    max_period: int = 16,
    min_repeats: int = 3,
    min_length: int = 24,
    end_token_id: int | None = None,
) -> bool:
    """Returns whether the tail of ``answer_ids`` [T], the answer's tokens, repeats with a period of 1..``max_period``.

    Definition: for some period d the last n tokens satisfy x[i] = x[i - d] for all but their first d, with
    n >= d * ``min_repeats`` and n >= ``min_length``. The second bound excludes ``)))`` and a line of dashes.
    A final ``end_token_id`` is not part of the tail. Text that changes with each repetition ("1. a 2. a 3. a") is not a loop
    by this definition.
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
