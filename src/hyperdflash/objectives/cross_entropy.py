"""Cross-entropy of draft slots against the text, weighted by position or by the drafter's own confidence."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import SlotBatch, SlotWeighted
from hyperdflash.settings import number_between, one_of


@dataclass(frozen=True, kw_only=True)
class PositionWeighted(SlotWeighted):
    """sum w_k CE / sum w_k over supervised slots (DFlash)."""

    name = "cross_entropy"
    option = "loss"

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        return batch.values.cross_entropy


@dataclass(frozen=True, kw_only=True)
class DPace(SlotWeighted):
    """D-PACE, as speculators 0.9.0 has it: the weight of a slot is the number of drafts that hang on it.

    With the detached probability q_k = exp(-CE_k) of the text's token and s_k = (1 - ``smoothing``) q_k + ``smoothing``,

        w_k = sum_{j >= k} prod_{i <= j} s_i        over the block's supervised slots
        loss = sum w_k CE_k / number of supervised slots

    With ``smoothing`` 1 the weight of slot k is the number of supervised slots from k on.
    """

    smoothing: float = 0.5

    name = "dpace"

    def __post_init__(self):
        super().__post_init__()
        number_between("objective.terms.dpace.smoothing", self.smoothing, 0.0, 1.0)

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        ce, num_slots = batch.values.cross_entropy, len(batch.slot_count)
        smooth = (1 - self.smoothing) * (-ce.detach()).exp() + self.smoothing
        # one place per slot of every block, and a last one for rows that do not count
        last = batch.num_blocks * num_slots
        place = (batch.block * num_slots + batch.slot).masked_fill(~batch.counted, last)
        factors = smooth.new_ones(last + 1).scatter(0, place, smooth)[:-1].view(-1, num_slots)
        exists = smooth.new_zeros(last + 1).scatter(0, place, torch.ones_like(smooth))[:-1].view(-1, num_slots)
        expected = factors.cumprod(dim=1) * exists  # of each slot: the probability that the block is right up to it
        weights = expected.flip(1).cumsum(dim=1).flip(1).flatten()
        return weights[place.clamp(max=last - 1)] * ce


@dataclass(frozen=True, kw_only=True)
class Candidates(SlotWeighted):
    """Cross-entropy over the candidates of a slot alone (DFlash 2). A label that is none of them takes the last one's place
    (``missing`` last, as in speculators), or its slot adds nothing (drop, as in NeMo); the divisor counts it either way, since
    it must be known before any forward pass."""

    missing: str = "last"
    view: str = "lm_head"

    name = metric = "candidates"
    needs = ("candidates",)

    def __post_init__(self):
        super().__post_init__()
        one_of("objective.terms.candidates.missing", self.missing, ("last", "drop"))

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        def loss(rows: FactoredLogits, part: slice) -> Tensor:
            labels, first = batch.labels[part, None], rows.view("lm_head")[0].dense()
            assert rows.top_k is not None, "the head has candidates"
            ids = first.topk(rows.top_k, dim=-1).indices
            found = (ids == labels).any(dim=-1)
            ids[:, -1:] = torch.where(found[:, None], ids[:, -1:], labels)
            scores = replace(rows, top_k=None).dense(first).gather(1, ids)
            ce = scores.logsumexp(dim=-1) - scores.masked_fill(ids != labels, 0.0).sum(dim=-1)
            return ce if self.missing == "last" else ce.masked_fill(~found, 0.0)

        return logits.by_rows(loss)
