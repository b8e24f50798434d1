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
    or None, ``ids`` and ``domains`` one entry a row.
    """

    ids: tuple[str, ...]
    domains: tuple[str, ...]
    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    final: Tensor
    layers: Tensor | None = None
    layer_ids: tuple[int, ...] = ()

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
class DraftOutput:
    """``hidden`` [B, A, S, D]: the drafter's final normed states at slots 1..S; the frozen LM head reads them."""

    hidden: Tensor


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
