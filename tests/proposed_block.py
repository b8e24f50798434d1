"""One block as the loop drafts it with a head, from features that are all known."""

from __future__ import annotations

from torch import Tensor

from hyperdflash.contracts import Proposal, Slots
from hyperdflash.drafting.heads.head import BlockDraft, DraftHead
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler


def propose(
    head: DraftHead, slots: Slots, heads: TargetHeads, anchor_id: Tensor, sampler: Sampler, stop: float = 0.0
) -> Proposal:
    """Drafts from ``slots`` [1, 1, n], whose ``previous`` is not read, and ``anchor_id`` [1] int64."""
    draft = BlockDraft(head, heads, slots.layout, anchor_id, sampler, stop)
    draft.extend(slots.features)
    return draft.proposal()
