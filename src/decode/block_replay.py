"""The block drafter behind replay's ReplayDrafter interface: its training forward is already one pass over all anchors.

Shapes: see src/contracts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.contracts import TargetStates
from src.drafter.model import Drafter
from src.target.heads import TargetHeads


class BlockReplay:
    """``drafter`` as it stands: put it in eval mode first."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    @property
    def num_slots(self) -> int:
        return self.drafter.config.num_slots

    @torch.no_grad()
    def score(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Tensor:
        """anchors [B, A] int64 -> hidden [B, A, S, D]."""
        return self.drafter(states, heads, anchors, anchor_mask).hidden
