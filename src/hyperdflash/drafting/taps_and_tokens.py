"""``taps_and_tokens``: outputs of several target layers beside the next token's embedding, as MTP pairs H[i] with x[i+1].
Position i has the streams of its taps and one more, embed(x[i + 1]). A block with anchor a sees positions up to a - 1, so the
newest pair includes the anchor's own token: in the loop the newest state waits until that token is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.contracts import TargetStates
from hyperdflash.drafting.conditioning import Layers
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class TapsAndTokens(Layers):
    """The streams of ``conditioning=layers`` and the next token's embedding times ``token_scale``; 0 removes the token."""

    token_scale: float = 1.0

    name = "taps_and_tokens"
    reads_next_token = True

    def num_streams(self, heads: TargetHeads) -> int:
        return super().num_streams(heads) + 1

    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        taps = super().gather(states, heads)  # [B, T, N - 1, D]
        tokens = self.token_scale * heads.embed(states.next_ids)[:, :, None]
        return torch.cat([taps, tokens.to(taps.dtype)], dim=2)
