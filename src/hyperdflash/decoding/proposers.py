"""Drafters of the draft-verify loop, one text at a time: begin, propose, update.

Shapes: see contracts.py with B = 1; n <= S slots are asked for, P states are new.

    begin(states)       the prompt: x[0..a-1] with H[0..a-1], rounded by ``codec``
    propose(x[a], n)    drafts of x[a+1..a+n]; the anchor's own state does not exist yet
    update(states)      what was accepted: x[a..] with H[a..], ending before the next anchor

Where the loop decodes copies of the text in lockstep, states have that many rows; the first row's drafts count.
Each keeps keys and values of its own context: new states are projected once and appended in place, so a round costs what
its new states and its attention cost, whatever the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hyperdflash.contracts import TargetStates
from hyperdflash.drafting.attention import KeyValue
from hyperdflash.drafting.drafter import Drafter
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.states.codecs import CODECS, Codec
from hyperdflash.targets.adapter import NativeMTP
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler


@dataclass(frozen=True)
class Draft:
    """``ids`` [n] int64; ``probs`` [n, V] fp32, what each was drawn from; None where each was certain (q = 1)."""

    ids: Tensor
    probs: Tensor | None = None


class LoopDrafter(Protocol):
    """What the loop needs of a drafter. One text at a time; ``begin`` starts the next one.

    ``num_slots`` S, the most tokens a round; ``layer_ids`` the target layers it reads; ``codec`` what its states are
    rounded by (the cache's it was trained on).
    """

    num_slots: int
    layer_ids: tuple[int, ...]
    codec: Codec

    def begin(self, states: TargetStates) -> None: ...

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Draft:
        """``anchor_id`` [1] int64 -> 1..``num_slots`` drafts."""

    def update(self, states: TargetStates) -> None: ...


class Autoregressive:
    """No drafts: every round is one plain step of the target."""

    num_slots = 0
    layer_ids = ()
    codec = CODECS["bf16"]

    def begin(self, states: TargetStates) -> None:
        pass

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Draft:
        return Draft(anchor_id[:0])

    def update(self, states: TargetStates) -> None:
        pass


class BlockDrafter:
    """DFlash and HyperDFlash: all slots in one pass over [x_a, mask, ...] and the context's keys and values."""

    def __init__(self, drafter: Drafter, heads: TargetHeads, codec: Codec = CODECS["bf16"]):
        self.drafter, self.heads, self.codec = drafter, heads, codec
        self.num_slots = drafter.num_slots
        self.layer_ids = tuple(drafter.conditioning.layer_ids)
        self._window: int | None = drafter.config.context_window
        self._length = 0  # states taken in: the anchor's position
        self._rows = 0  # of them in the buffers: the last ones
        self._buffers: list[KeyValue] = []  # a layer: [1, capacity, N, E] twice

    def begin(self, states: TargetStates) -> None:
        self._length = self._rows = 0
        if self._buffers and self._buffers[0][0].shape[0] != len(states.input_ids):
            self._buffers = []
        self.update(states)

    def update(self, states: TargetStates) -> None:
        num_new = states.input_ids.shape[1]
        positions = torch.arange(self._length, self._length + num_new, device=states.final.device)
        new = self.drafter.project_context(self.drafter.context(states, self.heads), positions)
        self._make_room(new, num_new)
        for buffer, rows in zip(self._buffers, new, strict=True):
            for kept, added in zip(buffer, rows, strict=True):
                kept[:, self._rows : self._rows + num_new] = added
        self._length += num_new
        self._rows += num_new

    def _make_room(self, like: list[KeyValue], num_new: int) -> None:
        """Buffers twice as large as needed where they are full, so that copying costs a constant a state."""
        if self._buffers and self._rows + num_new <= self._buffers[0][0].shape[1]:
            return
        seen = self._seen()
        kept = seen.stop - seen.start
        grown = [tuple(x.new_empty(x.shape[0], max(256, 2 * (kept + num_new)), *x.shape[2:]) for x in pair) for pair in like]
        for old, new in zip(self._buffers, grown, strict=False):
            for source, copy in zip(old, new, strict=True):
                copy[:, :kept] = source[:, seen]
        self._buffers, self._rows = grown, kept

    def _seen(self) -> slice:
        """The rows that the next block attends to: all, or the window's."""
        return slice(0 if self._window is None else max(0, self._rows - self._window), self._rows)

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Draft:
        seen = self._seen()
        context = [(keys[:, seen], values[:, seen]) for keys, values in self._buffers]
        copies = context[0][0].shape[0]
        anchors = torch.full((copies, 1), self._length, device=anchor_id.device)
        visible = torch.ones(copies, 1, seen.stop - seen.start, dtype=torch.bool, device=anchor_id.device)
        draft = self.drafter.draft(anchor_id.expand(copies, 1), anchors, context, visible, self.heads)
        return Draft(*sampler.choose(self.heads.logits(draft.hidden[:, 0, :num_slots])[0]))


class MTPDrafter:
    """The native MTP block chained: drafts what ``MTPChain`` scores, with keys kept from round to round.

    An index needs the token after its own, so the newest state waits for the anchor; the first step of a round runs all
    waiting states at once, its last row being slot 1. Keys of target states stay, those of chained steps are dropped.
    """

    layer_ids = ()

    def __init__(self, block: NativeMTP, num_slots: int, heads: TargetHeads, codec: Codec = CODECS["bf16"]):
        self.block, self.num_slots, self.heads, self.codec = block, num_slots, heads, codec
        self._window = block.sliding_window
        self._keys: Tensor | None = None  # target-made, of the last window - 1 indices: [1, 1, k, C]
        self._length = 0
        self._waiting: tuple[Tensor, Tensor] | None = None  # H [1, P, M, D] and x [1, P] of the last P positions

    def begin(self, states: TargetStates) -> None:
        self._keys = None
        self._length = states.input_ids.shape[1]
        self._waiting = states.final[:, -self._window :], states.input_ids[:, -self._window :]  # earlier keys are out of sight

    def update(self, states: TargetStates) -> None:
        assert self._waiting is None, "propose and update alternate"
        self._length += states.input_ids.shape[1]
        self._waiting = states.final, states.input_ids

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Draft:
        final, token_ids = self._waiting
        self._waiting = None
        following = torch.cat([token_ids[:, 1:], anchor_id.expand(len(token_ids), 1)], dim=1)
        residual, keys = self._step(final, following, self._length - final.shape[1], self._keys)
        self._keys = keys
        chosen = []
        for slot in range(1, num_slots + 1):
            if slot > 1:
                drafted = chosen[-1][0].expand(len(residual), 1)
                residual, keys = self._step(residual, drafted, self._length + slot - 2, keys)
            residual = residual[:, -1:]
            chosen.append(sampler.choose(self.heads.logits(self.block.head(residual))[0]))
        ids, probs = zip(*chosen, strict=True)
        return Draft(torch.cat(ids), None if probs[0] is None else torch.cat(probs))

    def _step(self, final: Tensor, next_ids: Tensor, first_index: int, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices i = first_index.. : H[i] [1, P, M, D], x[i + 1] [1, P], the keys before -> residual [1, P, M, D], keys."""
        num_new, num_before = final.shape[1], 0 if keys is None else keys.shape[2]
        index = torch.arange(first_index, first_index + num_new, device=final.device)
        embeds = self.heads.embed(next_ids)
        mask = None  # a single row sees all that is kept
        if num_new > 1:
            key_index = torch.arange(first_index - num_before, first_index + num_new, device=final.device)
            keep = (key_index <= index[:, None]) & (key_index > index[:, None] - self._window)
            mask = embeds.new_zeros(keep.shape).masked_fill(~keep, float("-inf"))[None, None]
        residual, new = self.block.run(final, embeds, index[None], mask, keys)
        keys = new if keys is None else torch.cat([keys, new], dim=2)
        return residual, keys[:, :, max(0, keys.shape[2] - self._window + 1) :]


def loop_drafter(module: Drafter | MTPChain, heads: TargetHeads, codec: Codec = CODECS["bf16"]) -> LoopDrafter:
    """The loop's form of what training and replay use; weights are shared."""
    if isinstance(module, MTPChain):
        return MTPDrafter(module.block, module.num_slots, heads, codec)
    return BlockDrafter(module, heads, codec)
