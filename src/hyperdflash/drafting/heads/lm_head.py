"""``lm_head``: the target's own frozen LM head, for all slots at once (DFlash); it has no parameters."""

from dataclasses import dataclass

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class LMHead:
    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        return LMDraftHead()


class LMDraftHead(DraftHead):
    reads_previous = False

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        return target_logits(slots.features, heads)
