"""Bits per byte of held-out text: of the target, of xz and of a 5-gram, on the same documents.

Shapes: see contracts.py. The nats of all tokens but a document's first (control tokens included: they say where a
turn ends) over the raw UTF-8 bytes of all turns; xz codes the same turns with one line break after each.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.split import heldout_kind
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target
from hyperdflash.targets.taps import tap_residual
from tiny_target.corpus.embedded import text_bytes

GROUPS = ("math seen", "math unseen", "code", "chat")
XZ_PRESET = 9 | lzma.PRESET_EXTREME


def group_of(conversation_id: str, domain: str) -> str:
    """Domain, maths apart by whether training saw the template."""
    kind = heldout_kind(conversation_id)
    return f"{domain} {kind}" if kind else domain


def heldout_groups(conversations: Iterable[Conversation], max_bytes: int) -> dict[str, list[Conversation]]:
    """The first whole conversations of each group that fit into ``max_bytes`` of text; ValueError where none does."""
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
    """Sum of nats over bytes, in bits."""
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True)
class StateBatch:
    """One right-padded forward.

    ``input_ids`` [B, T] int64, ``real`` and ``loss_mask`` [B, T] bool, ``final`` [B, T, M, D].
    """

    input_ids: Tensor
    real: Tensor
    loss_mask: Tensor
    final: Tensor


@torch.inference_mode()
def state_batches(
    target: Target, documents: Sequence[Document], batch_tokens: int = 2048, progress: str | None = None
) -> Iterator[StateBatch]:
    """Documents by length, as many a forward as ``batch_tokens`` of padded width allow (at least one)."""
    window = target.model.config.sliding_window
    ordered = sorted(documents, key=lambda d: (-len(d.input_ids), d.id))
    with tqdm(total=sum(len(d.input_ids) for d in ordered), desc=progress, unit="tok", disable=progress is None) as bar:
        while ordered:
            width = -(-len(ordered[0].input_ids) // window) * window  # whole windows; right padding is exact for V4
            taken, ordered = ordered[: (rows := max(1, batch_tokens // width))], ordered[rows:]
            input_ids = torch.zeros(len(taken), width, dtype=torch.long)
            loss_mask = torch.zeros(len(taken), width, dtype=torch.bool)
            for row, document in enumerate(taken):
                input_ids[row, : len(document.input_ids)] = document.input_ids
                loss_mask[row, : len(document.input_ids)] = document.loss_mask
            lengths = torch.tensor([len(document.input_ids) for document in taken])
            with tap_residual(target.model) as taps:
                target.model.model(input_ids, use_cache=False)
            yield StateBatch(input_ids, torch.arange(width) < lengths[:, None], loss_mask, taps.final)
            bar.update(int(lengths.sum()))


def nats_sum(heads: TargetHeads, batch: StateBatch, rows: int = 4096) -> tuple[float, int]:
    """(sum of -log p(x[i+1]) read from H[i], number of such tokens): all real tokens but the first of each row."""
    predicted = batch.real[:, 1:]
    labels = batch.input_ids[:, 1:][predicted]  # [N]
    hidden = heads.collapse(batch.final)[:, :-1][predicted]  # [N, D]
    total = 0.0
    for states, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        total += float(F.cross_entropy(heads.logits(states), wanted, reduction="none").double().sum())
    return total, len(labels)


def raw_text(conversations: Iterable[Conversation]) -> bytes:
    """All turns, a line break after each."""
    return "".join(f"{turn.content}\n" for c in conversations for turn in c.turns).encode()


def priming_text(train: Sequence[Conversation], domain: str, max_bytes: int) -> bytes:
    """At most ``max_bytes`` of training text: the domain's own last (nearest to what follows), others before it."""
    own = raw_text(c for c in train if c.domain == domain)[:max_bytes]
    others = raw_text(c for c in train if c.domain != domain)[: max_bytes - len(own)]
    return others + own


def xz_bytes(
    train: Sequence[Conversation], groups: dict[str, list[Conversation]], max_bytes: int, workers: int
) -> dict[str, int]:
    """Group -> bytes that xz adds for its held-out text: compressed(training + held-out) - compressed(training)."""
    domains = {name: found[0].domain for name, found in groups.items()}
    primes = {domain: priming_text(train, domain, max_bytes) for domain in set(domains.values())}
    texts = {("train", domain): prime for domain, prime in primes.items()}
    texts |= {("both", name): primes[domains[name]] + raw_text(found) for name, found in groups.items()}
    with ThreadPoolExecutor(workers) as pool:  # lzma releases the interpreter's lock
        packed = pool.map(lambda text: len(lzma.compress(text, preset=XZ_PRESET)), texts.values())
        sizes = dict(zip(texts, tqdm(packed, total=len(texts), desc="xz", unit="text"), strict=True))
    return {name: sizes["both", name] - sizes["train", domain] for name, domain in domains.items()}
