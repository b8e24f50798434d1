"""The native MTP block in the draft-verify loop, with one chained step per slot. Shapes: see contracts.py with B = 1; n <= S
requested slots, P new states, C the width of the block's single key head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperdflash.contracts import Proposal, TargetStates
from hyperdflash.drafting.heads.head import BlockDraft
from hyperdflash.states.codecs import CODECS, Codec
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler

if TYPE_CHECKING:
    from hyperdflash.drafting.mtp_chain import MTPChain


class MTPProposer:
    """Drafts what ``MTPChain`` drafts in replay, and caches keys from round to round. An index needs the token after its own,
    so the newest state waits for the anchor. The first step of a round runs all waiting states at once; its last row is slot 1.
    The cache keeps keys of target states and drops those of chained steps."""

    layer_ids = ()
    stop = 0.0

    def __init__(self, chain: MTPChain, heads: TargetHeads, codec: Codec = CODECS["bf16"]):
        self.block, self.num_slots, self.heads, self.codec = chain.block, chain.num_slots, heads, codec
        self.head, self.layout = chain.head, chain.layout
        self._window = chain.block.sliding_window
        self._keys: Tensor | None = None  # of target states, for the last window - 1 indices: [1, 1, k, C]
        self._length = 0
        self._waiting: tuple[Tensor, Tensor] | None = None  # H [1, P, M, D] and x [1, P] of the last P positions

    def begin(self, states: TargetStates) -> None:
        self._keys = None
        self._length = states.input_ids.shape[1]
        self._waiting = states.residual[:, -self._window :], states.input_ids[:, -self._window :]  # no index sees earlier keys

    def update(self, states: TargetStates) -> None:
        assert self._waiting is None, "propose and update alternate"
        self._length += states.input_ids.shape[1]
        self._waiting = states.residual, states.input_ids

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        draft = BlockDraft(self.head, self.heads, self.layout, anchor_id, sampler, self.stop)
        self.extend(draft, num_slots)
        return draft.proposal()

    def extend(self, draft: BlockDraft, num_slots: int) -> list[Tensor]:
        """Drafts slots 1..``num_slots`` of ``draft`` until it ends; returns the block's state of each, [copies, 1, D]."""
        residual, token_ids = self._waiting
        self._waiting = None
        following = torch.cat([token_ids[:, 1:], draft.ids[0].expand(len(token_ids), 1)], dim=1)
        residual, keys = self._step(residual, following, self._length - residual.shape[1], self._keys)
        self._keys, states = keys, []
        for slot in range(1, num_slots + 1):
            if draft.ended:
                break
            if slot > 1:
                drafted = draft.ids[-1].expand(len(residual), 1)
                residual, keys = self._step(residual, drafted, self._length + slot - 2, keys)
            residual = residual[:, -1:]
            states.append(self.block.head(residual))
            draft.extend(states[-1][:1, None])
        return states

    def _step(self, residual: Tensor, next_ids: Tensor, first_index: int, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs indices i = first_index..: H[i] [1, P, M, D], x[i + 1] [1, P], earlier keys -> residual [1, P, M, D], keys."""
        num_new, num_before = residual.shape[1], 0 if keys is None else keys.shape[2]
        index = torch.arange(first_index, first_index + num_new, device=residual.device)
        embeds = self.heads.embed(next_ids)
        mask = None  # a single row sees every cached key
        if num_new > 1:
            key_index = torch.arange(first_index - num_before, first_index + num_new, device=residual.device)
            keep = (key_index <= index[:, None]) & (key_index > index[:, None] - self._window)
            mask = embeds.new_zeros(keep.shape).masked_fill(~keep, float("-inf"))[None, None]
        residual, new = self.block.run(residual, embeds, index[None], mask, keys)
        keys = new if keys is None else torch.cat([keys, new], dim=2)
        return residual, keys[:, :, max(0, keys.shape[2] - self._window + 1) :]
