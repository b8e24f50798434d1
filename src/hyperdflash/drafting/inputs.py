"""Additional inputs of a block drafter: what its blocks and its context read beside the reduced states.

    anchor_state    every position of a block adds A c[a - 1], the newest context state before its anchor a
    next_token      context states are joined with the token after them, c[i] + N norm(embed(x[i + 1])), as MTP pairs H[i] with
                    x[i + 1]; in the loop the newest state waits for the anchor's token

Both projections start at 0, where the drafter is the one without these inputs.
"""

from dataclasses import dataclass

from hyperdflash.settings import boolean


@dataclass(frozen=True, kw_only=True)
class Inputs:
    anchor_state: bool = False
    next_token: bool = False

    def __post_init__(self):
        boolean("inputs.anchor_state", self.anchor_state)
        boolean("inputs.next_token", self.next_token)
