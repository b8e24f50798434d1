"""Runs held-out documents through the target and measures their bits per byte.

Shapes: see contracts.py. Bits per byte are the nats of all tokens but a document's first (with control tokens, which mark the
ends of turns) over the UTF-8 bytes of all turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hyperdflash.contracts import Conversation, Document
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess, forward_batches
from tiny_target.corpus.embedded import text_bytes
from tiny_target.corpus.split import heldout_kind

GROUPS = ("math seen", "math unseen", "code", "chat")


def group_of(conversation_id: str, domain: str) -> str:
    """Returns the domain; math has two groups by whether training sees the template."""
    kind = heldout_kind(conversation_id)
    return f"{domain} {kind}" if kind else domain


def heldout_groups(conversations: Iterable[Conversation], max_bytes: int) -> dict[str, list[Conversation]]:
    """Returns per group the first conversations that fit into ``max_bytes`` of text; ValueError where none does."""
    groups: dict[str, list[Conversation]] = {name: [] for name in GROUPS}
    sizes = dict.fromkeys(GROUPS, 0)
    for conversation in conversations:
        name, size = group_of(conversation.id, conversation.domain), text_bytes(conversation)
        if sizes[name] + size <= max_bytes:
            groups[name].append(conversation)
            sizes[name] += size
    if empty := [name for name, found in groups.items() if not found]:
        raise ValueError(f"no held-out text of {empty[0]} fits into text_bytes={max_bytes}: give text_bytes=200000")
    return groups


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Converts a sum of nats to bits per byte."""
    return nats / math.log(2) / num_bytes


def residuals(
    target: Target, documents: Sequence[Document], batch_tokens: int = 2048, progress: str | None = None
) -> Iterator[tuple[list[Document], Tensor]]:
    """Yields documents by length and their residuals [N, M, D], N tokens one document after the other.

    One forward takes as many documents as fit into ``batch_tokens`` with padding, at least one.
    """
    ordered = sorted(documents, key=lambda d: (-len(d.input_ids), d.id))
    window = target.model.config.sliding_window
    batches = list(forward_batches([d.input_ids for d in ordered], window, batch_tokens))
    left, producer = iter(ordered), InProcess(target)
    for sequences in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        yield list(islice(left, len(sequences))), producer.states(sequences)[None]


@torch.inference_mode()
def nats_sum(heads: TargetHeads, documents: Sequence[Document], residual: Tensor, rows: int = 4096) -> tuple[float, int]:
    """Returns the sum of -log p(x[i+1]) from H[i] and the number of tokens: all but the first of each document."""
    ends = torch.tensor([len(d.input_ids) for d in documents]).cumsum(0)
    predicts = torch.ones(len(residual), dtype=torch.bool).index_fill_(0, ends - 1, False)
    labels = torch.cat([d.input_ids[1:] for d in documents])
    hidden = heads.collapse(residual[None])[0, predicts]  # [labels, D]
    total = 0.0
    for states, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        total += float(F.cross_entropy(heads.logits(states), wanted, reduction="none").double().sum())
    return total, len(labels)
