"""Data types that cross folders: frozen dataclasses with one documented shape per field.

Glossary
    target        the frozen model; generation must have its output distribution
    drafter       the small trained model that proposes tokens for the target to verify
    anchor        the newest verified token of a text, or its position
    block         an anchor and the slots after it, which the drafter fills together
    slot          one draft position of a block
    context       the target states at positions before an anchor
    tap           the output of one target layer, cached for the drafter
    residual      the target's hyper-connection paths after its last layer, before hc_head collapses them (field ``final``)
    path          one of the residual's parallel streams of width D
    head          a module that gives logits: the target's frozen LM head, or the draft head that reads a drafter's slots
    proposal      the draft tokens of one block, with the probabilities that they were drawn from
    round         one draft-verify round, and nothing else
    tau           emitted tokens per round, the target's own token included
    accepted      the number of leading draft tokens that a round keeps
    survival      per slot k, the share of all rounds that accept at least k drafts
    conditional   per slot k, the share of rounds that accept slot k among those that accept all earlier slots
    replay        the rounds of a decoding loop, computed from a finished text and its target states without the loop
    dataset       the directory that training opens: index, states, row statistics, fingerprints
    shard         one file of states, with several documents
    method        a named choice of conditioning, reducer, drafter, head and objective (conf/method)

Shape legend, used in every module of this project

    B batch (documents)   T tokens          M hyper-connection paths   D hidden width
    A anchors             K block slots     V vocabulary               L layer taps
    P positions with a KL term              S draft slots = K - 1

Index conventions
    position i      index of token x[i] in a document, counted from 0
    anchor a        position of the last verified token; a block's slot 0
    slot k          1..S, stands at position a + k and predicts x[a + k] (the same position, not the next one)
    context of a    target states at positions strictly before a: H[0..a-1]
    teacher of k    the target's distribution read from H[a + k - 1]
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

DOMAINS = ("math", "code", "chat")
ENGINES = ("sglang", "vllm")  # servers that give states and answers
ENCODING_VERSION = 1  # part of a cache's identity: raise it when a conversation gets other token ids or another loss mask


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """A document before tokenization.

    ``id`` depends on the content alone, so that caches and splits survive a reordering of the source.
    """

    id: str
    domain: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Document:
    """One encoded conversation.

    ``input_ids`` [T] int64; ``loss_mask`` [T] bool, True where an assistant wrote the token (its end token included).
    """

    id: str
    domain: str
    input_ids: Tensor
    loss_mask: Tensor

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first supervised one; T if there is none."""
        supervised = self.loss_mask.nonzero()
        return int(supervised[0]) if len(supervised) else len(self.loss_mask)


@dataclass(frozen=True)
class TargetStates:
    """Right-padded documents with the target's hidden states, in the cache's dtype.

    ``input_ids`` [B, T] int64; ``loss_mask`` [B, T] bool; ``lengths`` [B] int64, tokens per row without padding.
    ``final`` [B, T, M, D] is the residual before the hyper-connection head collapses it. ``layers`` [B, T, L, M, D] holds
    the outputs of the layers in ``layer_ids`` (layer i is transformers' ``hidden_states[i + 1]``), or is None. ``ids`` and
    ``domains`` have one entry per row. ``next_id`` [B] int64 is the token after the last position, None if the text ends there.
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
        """[B, T] int64: x[i + 1] at position i; ``next_id`` at the last one, 0 if that is None."""
        last = self.input_ids.new_zeros(len(self.input_ids)) if self.next_id is None else self.next_id
        return torch.cat([self.input_ids[:, 1:], last[:, None]], dim=1)

    def rows(self, first: int, stop: int) -> TargetStates:
        """Returns documents ``first`` to ``stop - 1``, padding included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layer_ids"}
        cut = {name: value if value is None else value[first:stop] for name, value in own.items()}
        return TargetStates(**cut, layer_ids=self.layer_ids)


@dataclass(frozen=True)
class Blocks:
    """Draft blocks of a batch of documents.

    ``anchors`` [B, A] int64 positions; ``anchor_mask`` [B, A] bool (False: padding of the anchor axis);
    ``labels`` [B, A, S] int64 with ``labels[b, i, k - 1] = x[anchors[b, i] + k]``;
    ``label_mask`` [B, A, S] bool (False past the end of the anchor's own answer).
    """

    anchors: Tensor
    anchor_mask: Tensor
    labels: Tensor
    label_mask: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """The layout of a draft block: which positions see each other, and which token precedes each slot.

    ``size`` is K. ``visible`` has K rows of K: own-block position i attends to position j if ``visible[i][j]``; None means that
    every position sees the whole block. ``parents`` [S]: slot k follows the token at own-block position ``parents[k - 1]``
    (0 is the anchor), which is k - 1 in a chain.
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
        """Returns a chain of slots. ``full``: every position sees the whole block (DFlash). ``causal``: every position sees
        itself and earlier ones (JetSpec, arXiv 2606.18394)."""
        causal = tuple(tuple(j <= i for j in range(size)) for i in range(size))
        return cls(size, tuple(range(size - 1)), None if kind == "full" else causal)


@dataclass(frozen=True)
class Slots:
    """A drafter's output for A blocks per document; a draft head turns it into logits.

    ``features`` [B, A, S, F], states of slots 1..S; ``previous`` [B, A, S] int64, the token before each slot (from the text in
    training and replay, from the block's own drafts in the loop); ``layout``, the same for every block.
    """

    features: Tensor
    previous: Tensor
    layout: BlockLayout


@dataclass(frozen=True)
class Proposal:
    """The n draft tokens of one round.

    ``ids`` [n] int64; ``probs`` [n, V] fp32, the distribution of each draw, None if every draft was certain (q = 1);
    ``confidence`` [n] fp32, the head's estimate that a draft is accepted if all earlier ones are, None without an estimate.
    """

    ids: Tensor
    probs: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Rounds:
    """The R draft-verify rounds of one method over many documents; every tensor is int64.

    ``document`` [R] row of the round's document; ``anchor`` [R] position of its anchor; ``accepted`` [R] draft tokens that the
    round keeps; ``emitted`` [R] tokens that it adds to the text, accepted + 1; ``available`` [R] slots before the end of the
    text, at most S. The end of the text clips ``accepted`` and ``emitted``.
    """

    document: Tensor
    anchor: Tensor
    accepted: Tensor
    emitted: Tensor
    available: Tensor
    num_slots: int
