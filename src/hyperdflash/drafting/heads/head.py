"""The interface of every draft head, and the walk that drafts a block with it. A head turns a drafter's features of all slots
into logits. Training and replay give it the text's own token before each slot; the loop drafts from left to right and gives it
its own drafts."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hyperdflash.contracts import BlockLayout, Proposal, Slots
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.sampling import Sampler


class DraftHead(nn.Module):
    """Holds trainable parameters only. Tables of the vocabulary are ``nn.Embedding``, by which optimizers recognize them.

    ``has_confidence``: its logits carry a confidence, which a term of the objective trains. ``reads_previous``: the logits of a
    slot depend on the tokens before it; if False, the loop drafts a block at once. ``views`` of its logits that terms of the
    objective may read: with lm_head, the first factor is the LM head on the features as they are, so that one product with it
    serves all slots of a block. ``reads_block``: it needs the states of all slots at once, and no chain can give them.
    """

    has_confidence = False
    reads_previous = True
    reads_block = False
    views: tuple[str, ...] = ("head",)

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        """Returns the logits of every slot, [B, A, S]; slot k may read ``slots.previous`` of slots 1..k."""
        raise NotImplementedError

    def drafted(self, slots: Slots, heads: TargetHeads, of_states: Tensor | None = None) -> FactoredLogits:
        """Returns the logits from which blocks are drafted, [B, A, S]: by default ``logits``, which replay gives the text's
        tokens. ``of_states`` [S, V] is the LM head's product for the features of a single block, if it is known."""
        return self.logits(slots, heads)

    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        """Draws initial weights; ``std`` is the standard deviation of the drafter's new weights. Does nothing by default."""


def along_block(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], memory: Tensor, inputs: Tensor, parents: Sequence[int]
) -> Tensor:
    """Runs a recurrence over the slots of each block: ``step`` turns the memory of slot k's parent (``memory`` [..., G] before
    the first) and ``inputs`` [..., k, F] into the memory and output of slot k -> outputs [..., S, O]."""
    memories, outputs = [memory], []
    for slot in range(inputs.shape[-2]):
        memory, output = step(memories[parents[slot]], inputs[..., slot, :])
        memories.append(memory)
        outputs.append(output)
    return torch.stack(outputs, dim=-2)


class HeadConfig(Protocol):
    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead: ...


class BlockDraft:
    """Drafts a block from left to right, each slot after its parent's draft, as the features of its slots become known.

    With ``stop`` > 0 it ends before the first slot k with c_1 ... c_k < ``stop``. c_j is the head's confidence where it has
    one, else the largest probability of slot j (at temperature 0, of the softmax). Slot k's own draft has no part in this: a
    rule that reads it chooses which drafts are verified, and the text no longer has the target's distribution.
    """

    def __init__(
        self,
        head: DraftHead,
        heads: TargetHeads,
        layout: BlockLayout,
        anchor_id: Tensor,
        sampler: Sampler,
        stop: float = 0.0,
    ):
        self.head, self.heads, self.layout, self.sampler = head, heads, layout, sampler
        self.stop, self.ended = stop, False
        self._reached: float | Tensor = 1.0  # c_1 ... c_k of the newest slot
        self.ids = [anchor_id]  # [1] per own-block position
        self._features: list[Tensor] = []  # [1, 1, n, D] per call of extend
        self._probs: list[Tensor | None] = []  # [n, V] per choice
        self._confidence: list[Tensor | None] = []  # [n] per choice

    def extend(self, features: Tensor, num_slots: int | None = None) -> None:
        """Drafts the next n slots from their ``features`` [1, 1, n, D], at most up to slot ``num_slots``."""
        first, last = len(self.ids) - 1, len(self.ids) - 1 + features.shape[2]
        num_new = (num_slots or last) - first
        self._features.append(features)
        of_states = target_logits(features[0, 0], self.heads).dense() if "lm_head" in self.head.views else None  # [n, V]
        step = 1 if self.head.reads_previous else num_new
        for slot in range(0, num_new, step):
            if self.ended:
                return
            own = slice(first + slot, first + slot + step)
            known = self._slots(own.stop if self.head.reads_previous else last)
            logits = self.head.drafted(known, self.heads, of_states)[0, 0, own]
            self._choose(logits.dense(None if of_states is None else of_states[slot : slot + step]), logits.confidence)

    def _slots(self, num_slots: int) -> Slots:
        """Returns the first slots, with the drafts before them as far as they are known."""
        known = [self.ids[min(parent, len(self.ids) - 1)] for parent in self.layout.parents[:num_slots]]
        return Slots(torch.cat(self._features, dim=2)[:, :, :num_slots], torch.cat(known)[None, None], self.layout)

    def _choose(self, logits: Tensor, confidence: Tensor | None) -> None:
        certain = None if confidence is None else confidence.float().sigmoid()
        if self.stop:
            probs = self.sampler.probabilities(logits)
            top = (logits.float().softmax(-1) if probs is None else probs).amax(-1)
            reached = self._reached * (top if certain is None else certain).cumprod(0)
            num_kept = int((reached >= self.stop).sum())
            self.ended, self._reached = num_kept < len(logits), reached[-1]
            logits, certain = logits[:num_kept], None if certain is None else certain[:num_kept]
            if not num_kept:
                return
        ids, probs = self.sampler.choose(logits)
        self.ids += ids.split(1)
        self._probs.append(probs)
        self._confidence.append(certain)

    def proposal(self) -> Proposal:
        return Proposal(torch.cat([self.ids[0][:0], *self.ids[1:]]), _joined(self._probs), _joined(self._confidence))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Joins values of consecutive slots, of which all or none exist."""
    return torch.cat([part for part in parts if part is not None]) if parts and parts[0] is not None else None
