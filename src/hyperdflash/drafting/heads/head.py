"""The interface of every draft head: settings that check themselves, and a module built once the target is known.

A head turns a drafter's features of all slots into logits. Training and replay give it the text's own token before each slot;
the loop drafts from left to right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from hyperdflash.contracts import Proposal, Slots
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.targets.sampling import Sampler

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads


class DraftHead(nn.Module):
    """Holds trainable parameters only. Tables of the vocabulary are ``nn.Embedding``, by which optimizers recognize them.

    ``has_confidence``: its logits carry a confidence, which a term of the objective trains.
    """

    has_confidence = False

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        """Returns the logits of every slot, [B, A, S]."""
        raise NotImplementedError

    def propose(self, slots: Slots, heads: TargetHeads, anchor_id: Tensor, sampler: Sampler) -> Proposal:
        """Drafts one block from ``slots`` [1, 1, n], whose ``previous`` is not yet known, and ``anchor_id`` [1] int64.

        Drafts slot by slot, each after its parent's draft. A head that does not read ``previous`` may choose all at once.
        """
        tokens, chosen = [anchor_id], []
        for slot, parent in enumerate(slots.layout.parents[: slots.features.shape[2]]):
            one = Slots(slots.features[:, :, slot : slot + 1], tokens[parent].view(1, 1, 1), slots.layout)
            logits = self.logits(one, heads)
            chosen.append((*sampler.choose(logits.dense()[0, 0]), logits.confidence))
            tokens.append(chosen[-1][0])
        return joined_proposal(chosen)

    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        """Draws initial weights; ``std`` is the standard deviation of the drafter's new weights. Does nothing by default."""


class HeadConfig(Protocol):
    def build(self, heads: TargetHeads) -> DraftHead: ...


def joined_proposal(chosen: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> Proposal:
    """Joins the slots' (ids [1], probs [1, V] or None, confidence logit of one element or None) into the block's proposal."""
    ids, probs, confidence = zip(*chosen, strict=True)
    return Proposal(
        torch.cat(ids),
        None if probs[0] is None else torch.cat(probs),
        None if confidence[0] is None else torch.cat([c.flatten() for c in confidence]).float().sigmoid(),
    )
