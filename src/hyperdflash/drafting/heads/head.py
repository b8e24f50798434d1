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
    serves all slots of a block.
    """

    has_confidence = False
    reads_previous = True
    views: tuple[str, ...] = ("head",)

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        """Returns the logits of every slot, [B, A, S]; slot k may read ``slots.previous`` of slots 1..k."""
        raise NotImplementedError

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
    def build(self, heads: TargetHeads) -> DraftHead: ...


class BlockDraft:
    """Drafts a block from left to right, each slot after its parent's draft, as the features of its slots become known."""

    def __init__(self, head: DraftHead, heads: TargetHeads, layout: BlockLayout, anchor_id: Tensor, sampler: Sampler):
        self.head, self.heads, self.layout, self.sampler = head, heads, layout, sampler
        self.ids = [anchor_id]  # [1] per own-block position
        self._features: list[Tensor] = []  # [1, 1, n, D] per call of extend
        self._probs: list[Tensor | None] = []
        self._confidence: list[Tensor | None] = []

    def extend(self, features: Tensor) -> None:
        """Drafts the next n slots from their ``features`` [1, 1, n, D]."""
        first, num_new = len(self.ids) - 1, features.shape[2]
        self._features.append(features)
        if not self.head.reads_previous:
            logits = self.head.logits(self._slots(first + num_new), self.heads)[0, 0, first:]
            self._choose(logits.dense(), logits.confidence)
            return
        of_states = target_logits(features[0, 0], self.heads).dense() if "lm_head" in self.head.views else None  # [n, V]
        for slot in range(num_new):
            logits = self.head.logits(self._slots(first + slot + 1), self.heads)[0, 0, first + slot :]
            first_product = None if of_states is None else of_states[slot : slot + 1]
            self._choose(logits.dense(first_product), logits.confidence)

    def _slots(self, num_slots: int) -> Slots:
        """Returns the first slots, with the drafts before them as far as they are known."""
        known = [self.ids[min(parent, len(self.ids) - 1)] for parent in self.layout.parents[:num_slots]]
        return Slots(torch.cat(self._features, dim=2)[:, :, :num_slots], torch.cat(known)[None, None], self.layout)

    def _choose(self, logits: Tensor, confidence: Tensor | None) -> None:
        ids, probs = self.sampler.choose(logits)
        self.ids += ids.split(1)
        self._probs.append(probs)
        self._confidence.append(confidence)

    def proposal(self) -> Proposal:
        probs, confidence = _joined(self._probs), _joined(self._confidence)
        return Proposal(torch.cat(self.ids[1:]), probs, None if confidence is None else confidence.float().sigmoid())


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Joins values of consecutive slots, of which all or none exist."""
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
