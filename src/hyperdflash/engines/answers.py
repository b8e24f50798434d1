"""Checks the answers of engines.

Shapes: see contracts.py. The pool requests a failed answer again, from another server if there is one, and never caches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Root mean square of a token's residual. V4's first tokens are large; the bounds only catch states that are no residual.
RMS_RANGE = (1e-6, 1e6)


class BadAnswer(ValueError):
    """An answer that cannot belong to the request."""


def check_ids(echoed: Sequence[int], sequence: Tensor) -> None:
    """Compares the token ids that an engine reports with the request's; BadAnswer where they differ."""
    wanted = sequence.tolist()
    if len(echoed) != len(wanted):
        raise BadAnswer(f"it ran {len(echoed)} tokens where {len(wanted)} were sent")
    wrong = [i for i, (a, b) in enumerate(zip(echoed, wanted, strict=True)) if a != b]
    if wrong:
        i = wrong[0]
        raise BadAnswer(f"it ran other tokens than were sent, first at position {i}: {echoed[i]} where {wanted[i]} was sent")


def residual_of(states: Tensor, num_tokens: int, num_paths: int, hidden_size: int) -> Tensor:
    """Returns received states [T, M * D] or [T, M, D] as [T, M, D]; BadAnswer where they cannot be the residual."""
    width = num_paths * hidden_size
    if len(states) != num_tokens:
        raise BadAnswer(
            f"it returned states of {len(states)} tokens where {num_tokens} were sent "
            "(prefix cache or chunked prefill drop rows: start the server without them)"
        )
    if states.shape[1:] not in ((width,), (num_paths, hidden_size)):
        raise BadAnswer(
            f"it returned states of shape {list(states.shape[1:])} per token, wanted {num_paths} paths x {hidden_size}: "
            f"the residual before hc_head, {width} numbers per token, not a normed, averaged or collapsed state"
        )
    if not bool(torch.isfinite(states).all()):
        row = int((~torch.isfinite(states).flatten(1).all(dim=1)).nonzero()[0])
        raise BadAnswer(f"it returned NaN or infinity, first at position {row}")
    rms = states.float().flatten(1).square().mean(dim=1).sqrt()
    low, high = RMS_RANGE
    strange = ((rms < low) | (rms > high)).nonzero()
    if len(strange):
        row = int(strange[0])
        raise BadAnswer(
            f"it returned a state of size {rms[row]:.1e} (root mean square) at position {row}, wanted {low:g} to {high:g}"
        )
    return states.reshape(num_tokens, num_paths, hidden_size)
