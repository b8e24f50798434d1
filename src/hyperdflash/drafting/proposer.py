"""Proposers: drafters in their form for the draft-verify loop, one text at a time.

Shapes: see contracts.py with B = 1; n <= S is the number of requested slots, P that of new states.

    begin(states)       the prompt: x[0..a-1] with H[0..a-1], rounded by ``codec``
    propose(x[a], n)    drafts of x[a+1..a+n]; the anchor's own state does not exist yet
    update(states)      the accepted tokens x[a..] with H[a..], up to the next anchor and without it

If the loop decodes several copies of the text in lockstep, states have one row per copy; the first row's drafts count. A
proposer caches keys and values of its context: it projects new states once and appends them in place, so that a round costs
its new states and its attention.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hyperdflash.contracts import Proposal, TargetStates
from hyperdflash.drafting.attention import KeyValue
from hyperdflash.drafting.heads.head import BlockDraft
from hyperdflash.states.codecs import CODECS, Codec
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler

if TYPE_CHECKING:
    from hyperdflash.drafting.drafter import Drafter


class Proposer(Protocol):
    """The loop's interface to a drafter, for one text at a time; ``begin`` starts the next text. ``num_slots`` S, the most
    drafts per round; ``layer_ids``, the layers it reads; ``codec`` rounds as its training's cache; ``stop`` ends a draft early
    (`BlockDraft`)."""

    num_slots: int
    layer_ids: tuple[int, ...]
    codec: Codec
    stop: float

    def begin(self, states: TargetStates) -> None: ...

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        """Drafts up to ``num_slots`` tokens after ``anchor_id`` [1] int64."""

    def update(self, states: TargetStates) -> None: ...


class Autoregressive:
    """Drafts nothing: every round is one plain step of the target."""

    num_slots = 0
    layer_ids = ()
    codec = CODECS["bf16"]
    stop = 0.0

    def begin(self, states: TargetStates) -> None:
        pass

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        return Proposal(anchor_id[:0])

    def update(self, states: TargetStates) -> None:
        pass


class BlockProposer:
    """Drafts all slots in one pass over [x_a, mask, ...] and the context's cached keys and values (DFlash, HyperDFlash). If the
    context joins a state with its next token, the newest state waits for the anchor. A lead drafts the first slots."""

    stop = 0.0

    def __init__(self, drafter: Drafter, heads: TargetHeads, codec: Codec = CODECS["bf16"]):
        self.drafter, self.heads, self.codec = drafter, heads, codec
        self.num_slots, self.layer_ids = drafter.num_slots, drafter.layer_ids
        self._window = drafter.context_window
        self._lead = None if drafter.lead is None else drafter.lead.proposer(heads, codec)
        self._waits = drafter.reads_next_token
        self._waiting: TargetStates | None = None  # the newest state, until the token after it is known
        self._length = 0  # states so far, without the waiting one
        self._rows = 0  # how many of them, the newest, the buffers hold
        self._buffers: list[KeyValue] = []  # per layer: [1, capacity, N, E] twice
        self._newest: Tensor | None = None  # [1, 1, D'], the last context state

    def begin(self, states: TargetStates) -> None:
        if self._lead is not None:
            self._lead.begin(states)
        self._length = self._rows = 0
        self._waiting = None
        if self._buffers and self._buffers[0][0].shape[0] != len(states.input_ids):
            self._buffers = []
        self._read(states)

    def update(self, states: TargetStates) -> None:
        if self._lead is not None:
            self._lead.update(states)
        self._read(states)

    def _read(self, states: TargetStates) -> None:
        if self._waits:
            assert self._waiting is None, "propose and update alternate"
            num_known = states.input_ids.shape[1] - 1
            known, self._waiting = positions_of(states, slice(0, num_known)), positions_of(states, slice(num_known, None))
            if num_known:
                self._append(replace(known, next_id=states.input_ids[:, -1]))
        else:
            self._append(states)

    def _append(self, states: TargetStates) -> None:
        num_new = states.input_ids.shape[1]
        positions = torch.arange(self._length, self._length + num_new, device=states.residual.device)
        context = self.drafter.context(states, self.heads)
        self._newest = context[:, -1:]
        new = self.drafter.project_context(context, positions)
        if not self._buffers or self._rows + num_new > self._buffers[0][0].shape[1]:
            self._grow(new, num_new)
        for buffer, rows in zip(self._buffers, new, strict=True):
            for kept, added in zip(buffer, rows, strict=True):
                kept[:, self._rows : self._rows + num_new] = added
        self._length += num_new
        self._rows += num_new

    def _grow(self, like: list[KeyValue], num_new: int) -> None:
        """Doubles full buffers, so that copying costs a constant per state."""
        seen = self._seen()
        kept = seen.stop - seen.start
        grown = [tuple(x.new_empty(x.shape[0], max(256, 2 * (kept + num_new)), *x.shape[2:]) for x in pair) for pair in like]
        for old, new in zip(self._buffers, grown, strict=False):
            for source, copy in zip(old, new, strict=True):
                copy[:, :kept] = source[:, seen]
        self._buffers, self._rows = grown, kept

    def _seen(self) -> slice:
        """Returns the rows that the next block attends to: all, or those of the window."""
        return slice(0 if self._window is None else max(0, self._rows - self._window), self._rows)

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._append(replace(waiting, next_id=anchor_id.expand(len(waiting.input_ids))))
        draft = BlockDraft(self.drafter.head, self.heads, self.drafter.layout, anchor_id, sampler, self.stop)
        num_lead = min(self.drafter.num_lead_slots, num_slots)
        lead = self._lead.extend(draft, num_lead) if num_lead else []
        if num_lead < num_slots and not draft.ended:
            draft.extend(self._features(draft.ids, lead)[:1, :, num_lead:], num_slots)
        return draft.proposal()

    def _features(self, known_ids: list[Tensor], lead: list[Tensor]) -> Tensor:
        """Returns the states of all slots, [copies, 1, S, D], from the tokens ``known_ids`` [1] each of the anchor and n lead
        slots, and the states of these slots, [copies, 1, D] each."""
        seen = self._seen()
        context = [(keys[:, seen], values[:, seen]) for keys, values in self._buffers]
        copies, device = context[0][0].shape[0], known_ids[0].device
        anchors = torch.full((copies, 1), self._length, device=device)
        visible = torch.ones(copies, 1, seen.stop - seen.start, dtype=torch.bool, device=device)
        ids = torch.cat(known_ids).expand(copies, 1, -1)
        states = torch.stack(lead, dim=2) if lead else None  # [copies, 1, n, D]
        return self.drafter.draft(ids, anchors, context, visible, self.heads, self._newest, states)


def positions_of(states: TargetStates, which: slice) -> TargetStates:
    along_text = ("input_ids", "loss_mask", "residual", "layers")
    values = {f.name: getattr(states, f.name) for f in fields(states) if f.name in along_text}
    return replace(states, **{name: value if value is None else value[:, which] for name, value in values.items()})
