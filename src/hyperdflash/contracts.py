"""What crosses a folder: frozen dataclasses, one shape a field.

Shape legend, used in every module of this project:

    B batch (documents)   T tokens          M hyper-connection paths   D hidden width
    A anchors             K block slots     V vocabulary               L layer taps
    P positions with a KL term              S draft slots = K - 1

Index conventions
    position i      index of token x[i] in a document, counted from 0
    anchor a        position of the last verified token; a block's slot 0
    slot k          1..S, sits at position a + k and predicts x[a + k] (the same position, not the next one)
    context of a    target states of positions strictly before a: H[0..a-1]
    teacher of k    the target's distribution read from H[a + k - 1]
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

DOMAINS = ("math", "code", "chat")
ENCODING_VERSION = 1  # counts up when the same conversation becomes other ids or another loss mask: caches are told apart by it


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """A document before tokenisation.

    ``id`` is a function of the content alone, so that caches and splits survive a reordering of the source.
    """

    id: str
    domain: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Document:
    """One encoded conversation.

    ``input_ids`` [T] int64; ``loss_mask`` [T] bool, True where the token was written by an assistant
    (its end token included); ``prompt_length`` number of tokens before the first supervised one.
    """

    id: str
    domain: str
    input_ids: Tensor
    loss_mask: Tensor

    @property
    def prompt_length(self) -> int:
        """Position of the first supervised token; T where there is none."""
        supervised = self.loss_mask.nonzero()
        return int(supervised[0]) if len(supervised) else len(self.loss_mask)


@dataclass(frozen=True)
class TargetStates:
    """Right-padded documents with the target's hidden states, in the cache's dtype.

    ``input_ids`` [B, T] int64, ``loss_mask`` [B, T] bool, ``lengths`` [B] int64 (tokens of each row that are real),
    ``final`` [B, T, M, D] the residual before the hyper-connection head collapses it,
    ``layers`` [B, T, L, M, D] the outputs of the layers in ``layer_ids`` (layer i is transformers' ``hidden_states[i + 1]``)
    or None, ``ids`` and ``domains`` one entry a row. ``next_id`` [B] int64 the token after the last position, None where the
    text ends there.
    """

    ids: tuple[str, ...]
    domains: tuple[str, ...]
    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    final: Tensor
    layers: Tensor | None = None
    layer_ids: tuple[int, ...] = ()
    next_id: Tensor | None = None

    @property
    def next_ids(self) -> Tensor:
        """[B, T] int64: x[i + 1] at position i; ``next_id`` at the last one, 0 where that is None."""
        last = self.input_ids.new_zeros(len(self.input_ids)) if self.next_id is None else self.next_id
        return torch.cat([self.input_ids[:, 1:], last[:, None]], dim=1)

    def rows(self, first: int, stop: int) -> TargetStates:
        """Documents ``first`` to ``stop - 1``, padding included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layer_ids"}
        cut = {name: value if value is None else value[first:stop] for name, value in own.items()}
        return TargetStates(**cut, layer_ids=self.layer_ids)


@dataclass(frozen=True)
class Blocks:
    """Draft blocks of a batch of documents.

    ``anchors`` [B, A] int64 positions, ``anchor_mask`` [B, A] bool (False: padding of the anchor axis),
    ``labels`` [B, A, S] int64 with ``labels[b, i, k - 1] = x[anchors[b, i] + k]``,
    ``label_mask`` [B, A, S] bool (False past the end of the anchor's own answer).
    """

    anchors: Tensor
    anchor_mask: Tensor
    labels: Tensor
    label_mask: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Which positions of a block see each other, and which token stands before each slot.

    ``size`` K. ``visible`` K rows of K: own-block position i attends to position j where ``visible[i][j]``; None where every
    position sees the whole block. ``parents`` [S]: slot k follows the token at own-block position ``parents[k - 1]`` (0 is the
    anchor), which is k - 1 in a chain.
    """

    size: int
    parents: tuple[int, ...]
    visible: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self):
        assert len(self.parents) == self.size - 1 and all(0 <= p <= k for k, p in enumerate(self.parents)), self.parents
        assert self.visible is None or [len(row) for row in self.visible] == [self.size] * self.size, self.visible

    @property
    def num_slots(self) -> int:
        """S."""
        return self.size - 1

    @classmethod
    def chain(cls, size: int, kind: Literal["full", "causal"] = "full") -> BlockLayout:
        """``full``: every position sees the whole block (DFlash). ``causal``: itself and earlier ones (JetSpec, 2606.18394)."""
        causal = tuple(tuple(j <= i for j in range(size)) for i in range(size))
        return cls(size, tuple(range(size - 1)), None if kind == "full" else causal)


@dataclass(frozen=True)
class Slots:
    """What a drafter returns for A blocks of each document; a draft head turns it into logits.

    ``features`` [B, A, S, F] states of slots 1..S, ``previous`` [B, A, S] int64 the token before each slot (the text's in
    training and replay, the block's own drafts in the loop), ``layout`` of every block.
    """

    features: Tensor
    previous: Tensor
    layout: BlockLayout


@dataclass(frozen=True)
class Proposal:
    """Draft tokens of one round, n of them.

    ``ids`` [n] int64; ``probs`` [n, V] fp32, the distribution each was drawn from, None where each was certain (q = 1);
    ``confidence`` [n] fp32, the head's estimate that each draft is accepted if the earlier ones are, None where it has none.
    """

    ids: Tensor
    probs: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Rounds:
    """Draft-verify rounds of one method over many documents; R rounds in all.

    ``document`` [R] int64 row of the document a round belongs to, ``anchor`` [R] int64 position it drafted from,
    ``accepted`` [R] int64 draft tokens kept (clipped at the end of the text), ``emitted`` [R] int64 tokens the round added
    (accepted + 1 bonus, clipped), ``available`` [R] int64 slots that lie before the end of the text, at most S.
    """

    document: Tensor
    anchor: Tensor
    accepted: Tensor
    emitted: Tensor
    available: Tensor
    num_slots: int
