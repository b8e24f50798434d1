"""Cross-entropy of draft slots against the text, weighted by position or by the drafter's own confidence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import SlotBatch, SlotWeighted
from hyperdflash.settings import number_between


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
