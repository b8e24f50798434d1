"""``lead=mtp``: the target's own MTP block drafts the first n slots of a block, and the block drafter the others.

    1. the MTP block runs n chained steps from the anchor                       -> states m_1..m_n [D], tokens x_1..x_n
    2. positions 1..n of the block read embed(x_k) + P norm(m_k) in place of the mask token
    3. slots 1..n have the MTP states as their features, slots n+1..S those of the block's one pass

In training and replay the tokens are the text's. A round costs n + 1 sequential passes. With n = S the MTP chain drafts every
slot in n passes, and the block drafter has no part.
"""

from dataclasses import dataclass

from hyperdflash.settings import boolean, positive_int


@dataclass(frozen=True, kw_only=True)
class MTPLead:
    """``steps`` n; ``trainable``: the block is fine-tuned with the rest, else it stays as the checkpoint has it."""

    steps: int = 1
    trainable: bool = True

    def __post_init__(self):
        positive_int("lead.steps", self.steps)
        boolean("lead.trainable", self.trainable)

    def check(self, num_slots: int) -> None:
        """Raises ValueError if the lead is longer than the block."""
        if self.steps > num_slots:
            raise ValueError(f"lead.steps must be in 1..{num_slots} (drafter.block_size - 1), got {self.steps}")
