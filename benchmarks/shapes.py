"""Cases of the training step: sizes of a drafter and of one document, dtypes, losses. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass

DTYPES = ("fp32", "bf16")
OBJECTIVES = ("own", "kl")
"""own: cross-entropy and KL on the first two slots here, cross-entropy there; kl: KL on all slots on both sides."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One document of T tokens, A anchors in it, and a Qwen3-shaped drafter conditioned on M streams of width D through one
    dense projection; as many key-value heads as heads, E = D / heads."""

    name: str
    num_tokens: int
    num_anchors: int
    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 1024
    block_size: int = 7
    num_streams: int = 4

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size must be a multiple of {2 * self.num_heads}, got {self.hidden_size}")
        if not 0 < self.num_anchors <= self.num_tokens - self.block_size - 1:
            raise ValueError(
                f"a document of {self.num_tokens} tokens has {self.num_tokens - self.block_size - 1} anchors whose block of "
                f"{self.block_size} lies inside it, got num_anchors={self.num_anchors}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_slots(self) -> int:
        """Supervised slots of a block."""
        return self.block_size - 1

    @property
    def drafted(self) -> int:
        """Supervised slots of a step."""
        return self.num_anchors * self.num_slots

    def anchors(self, seed: int) -> list[int]:
        """Draws A distinct sorted positions, each with a whole block inside the document, for both sides."""
        return sorted(random.Random(seed).sample(range(1, self.num_tokens - self.block_size), self.num_anchors))

    @property
    def num_seen(self) -> int:
        """The number of context states that an anchor sees, T': the expected largest of A such positions."""
        return round((self.num_tokens - self.block_size) * self.num_anchors / (self.num_anchors + 1))

    @property
    def anchor_sum(self) -> int:
        """The expected number of pairs of an anchor and a state that it sees."""
        return self.num_anchors * (self.num_tokens - self.block_size) // 2


@dataclass(frozen=True)
class Case:
    """One comparison: the same shape, dtype and kind of loss on both sides."""

    shape: StepShape
    dtype: str
    objective: str

    @property
    def num_taught(self) -> int:
        """P: slots with a KL term on this project's side."""
        return self.shape.num_slots if self.objective == "kl" else 2


SHAPES = (
    StepShape(name="T512 A32 V32k", num_tokens=512, num_anchors=32, vocab_size=32_000),
    StepShape(name="T512 A32 V129k", num_tokens=512, num_anchors=32, vocab_size=129_280),
    StepShape(name="T2048 A256 V32k", num_tokens=2048, num_anchors=256, vocab_size=32_000),
    StepShape(name="T4096 A512 V129k", num_tokens=4096, num_anchors=512, vocab_size=129_280),
    # speculators' own recipe has T 8,192, A 3,072, V 32,000 and 5 layers: T and A by 4, width as in the other shapes
    StepShape(name="speculators' recipe / 4", num_tokens=2048, num_anchors=768, vocab_size=32_000, num_layers=5),
)

QUICK = StepShape(name="quick", num_tokens=64, num_anchors=8, vocab_size=512, hidden_size=32, num_heads=2, intermediate_size=64)
