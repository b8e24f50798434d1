"""Data types that cross folders: frozen dataclasses with one documented shape per field.

Glossary
    target        the frozen model; generation must have its output distribution
    drafter       the small trained model that proposes tokens for the target to verify
    anchor        the newest verified token of a text, or its position
    block         an anchor and the slots after it, which the drafter fills together
    slot          one draft position of a block
    context       the target states at positions before an anchor
    tap           the output of one target layer, cached for the drafter
    residual      the target's hyper-connection paths after its last layer, before hc_head collapses them (field ``residual``)
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

from dataclasses import dataclass, fields
from typing import Literal, Self

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
    """A document before tokenization."""

    id: str  # depends on the content alone, so that caches and splits survive a reordering of the source
    domain: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Document:
    """One encoded conversation."""

    id: str
    domain: str
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool, True where an assistant wrote the token, its end token included

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first supervised one; T if there is none."""
        supervised = self.loss_mask.nonzero()
        return int(supervised[0]) if len(supervised) else len(self.loss_mask)


@dataclass(frozen=True)
class TargetStates:
    """Right-padded documents with the target's hidden states, in the cache's dtype."""

    ids: tuple[str, ...]  # B
    domains: tuple[str, ...]  # B
    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool
    lengths: Tensor  # [B] int64, tokens per row without padding
    residual: Tensor  # [B, T, M, D], the residual before the hyper-connection head collapses it
    layers: Tensor | None = None  # [B, T, L, M, D], outputs of the layers in layer_ids
    layer_ids: tuple[int, ...] = ()  # layer i is transformers' hidden_states[i + 1]
    next_id: Tensor | None = None  # [B] int64, the token after the last position; None: the text ends there

    @property
    def next_ids(self) -> Tensor:
        """[B, T] int64: x[i + 1] at position i; ``next_id`` at the last one, 0 if that is None."""
        last = self.input_ids.new_zeros(len(self.input_ids)) if self.next_id is None else self.next_id
        return torch.cat([self.input_ids[:, 1:], last[:, None]], dim=1)

    def rows(self, first: int, stop: int) -> Self:
        """Returns documents ``first`` to ``stop - 1``, padding included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layer_ids"}
        cut = {name: value if value is None else value[first:stop] for name, value in own.items()}
        return TargetStates(**cut, layer_ids=self.layer_ids)


@dataclass(frozen=True)
class Blocks:
    """Draft blocks of a batch of documents."""

    anchors: Tensor  # [B, A] int64 positions
    anchor_mask: Tensor  # [B, A] bool, False: padding of the anchor axis
    labels: Tensor  # [B, A, S] int64, labels[b, i, k - 1] = x[anchors[b, i] + k]
    label_mask: Tensor  # [B, A, S] bool, False past the end of the anchor's own answer


@dataclass(frozen=True)
class BlockLayout:
    """The layout of a draft block: which positions see each other, and which token precedes each slot."""

    size: int  # K
    parents: tuple[int, ...]  # [S], own-block position before each slot: k - 1 for slot k of a chain; 0 is the anchor
    visible: tuple[tuple[bool, ...], ...] | None = None  # [K][K], position i attends to j; None: to the whole block

    def __post_init__(self):
        assert len(self.parents) == self.size - 1 and all(0 <= p <= k for k, p in enumerate(self.parents)), self.parents
        assert self.visible is None or [len(row) for row in self.visible] == [self.size] * self.size, self.visible

    @property
    def num_slots(self) -> int:
        """S."""
        return self.size - 1

    @classmethod
    def chain(cls, size: int, kind: Literal["full", "causal"] = "full") -> Self:
        """Returns a chain of slots. ``full``: every position sees the whole block (DFlash). ``causal``: every position sees
        itself and earlier ones (JetSpec, arXiv 2606.18394)."""
        causal = tuple(tuple(j <= i for j in range(size)) for i in range(size))
        return cls(size, tuple(range(size - 1)), None if kind == "full" else causal)


@dataclass(frozen=True)
class Slots:
    """A drafter's output for A blocks per document; a draft head turns it into logits."""

    features: Tensor  # [B, A, S, F], states of slots 1..S
    previous: Tensor  # [B, A, S] int64, the token before each slot: of the text, or in the loop of the block's own drafts
    layout: BlockLayout  # the same for every block


@dataclass(frozen=True)
class Proposal:
    """The n draft tokens of one round."""

    ids: Tensor  # [n] int64
    probs: Tensor | None = None  # [n, V] fp32, the distribution of each draw; None: every draft was certain (q = 1)
    confidence: Tensor | None = None  # [n] fp32, estimated probability that a draft is accepted if all earlier ones are


@dataclass(frozen=True)
class Rounds:
    """The R draft-verify rounds of one method over many documents; the end of a text clips ``accepted`` and ``emitted``."""

    document: Tensor  # [R] int64, row of the round's document
    anchor: Tensor  # [R] int64, position of its anchor
    accepted: Tensor  # [R] int64, draft tokens that the round keeps
    emitted: Tensor  # [R] int64, tokens that it adds to the text, accepted + 1
    available: Tensor  # [R] int64, slots before the end of the text, at most S
    num_slots: int
