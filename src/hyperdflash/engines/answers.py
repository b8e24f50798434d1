"""What every answer of an engine must be before a single number of it is used.

Shapes: see contracts.py. An answer that fails is asked for again, elsewhere if there is an elsewhere, and never cached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Root mean square of a token's residual. V4's first tokens are large; these bounds only catch what cannot be a residual.
RMS_RANGE = (1e-6, 1e6)


class BadAnswer(ValueError):
    """States that cannot be those of the sequence that was sent."""


def check_ids(echoed: Sequence[int], sequence: Tensor) -> None:
    """Token ids that the engine says it ran against the ones that were sent."""
    wanted = sequence.tolist()
    if len(echoed) != len(wanted):
        raise BadAnswer(f"it ran {len(echoed)} tokens where {len(wanted)} were sent")
    wrong = [i for i, (a, b) in enumerate(zip(echoed, wanted, strict=True)) if a != b]
    if wrong:
        i = wrong[0]
        raise BadAnswer(f"it ran other tokens than were sent, first at position {i}: {echoed[i]} where {wanted[i]} was sent")


def residual_of(states: Tensor, num_tokens: int, num_paths: int, hidden_size: int) -> Tensor:
    """states [T, M * D] or [T, M, D] as received -> [T, M, D], or BadAnswer in one sentence."""
    width = num_paths * hidden_size
    if len(states) != num_tokens:
        raise BadAnswer(
            f"it gave states of {len(states)} tokens where {num_tokens} were sent "
            "(prefix cache or chunked prefill drop rows: start the server without them)"
        )
    if states.shape[1:] not in ((width,), (num_paths, hidden_size)):
        raise BadAnswer(
            f"it gave states of shape {list(states.shape[1:])} a token, wanted {num_paths} paths x {hidden_size}: "
            f"the residual before hc_head, {width} numbers a token, not a normed, averaged or collapsed state"
        )
    if not bool(torch.isfinite(states).all()):
        row = int((~torch.isfinite(states).flatten(1).all(dim=1)).nonzero()[0])
        raise BadAnswer(f"it gave NaN or infinity, first at position {row}")
    rms = states.float().flatten(1).square().mean(dim=1).sqrt()
    low, high = RMS_RANGE
    strange = ((rms < low) | (rms > high)).nonzero()
    if len(strange):
        row = int(strange[0])
        raise BadAnswer(
            f"it gave a state of size {rms[row]:.1e} (root mean square) at position {row}, wanted {low:g} to {high:g}"
        )
    return states.reshape(num_tokens, num_paths, hidden_size)
