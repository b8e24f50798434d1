"""Measures bits per byte of the target, xz and a 5-gram on the same held-out documents.

Shapes: see contracts.py. Bits per byte are the nats of all tokens but a document's first (with control tokens, which mark the
ends of turns) over the UTF-8 bytes of all turns; xz codes the same turns with one line break after each.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hyperdflash.contracts import Conversation, Document
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target
from hyperdflash.targets.taps import tap_residual
from tiny_target.corpus.embedded import text_bytes
from tiny_target.corpus.split import heldout_kind

GROUPS = ("math seen", "math unseen", "code", "chat")
XZ_PRESET = 9 | lzma.PRESET_EXTREME


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


@dataclass(frozen=True)
class StateBatch:
    """The result of one right-padded forward.

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
    """Yields batches of documents by length, as many per forward as fit into ``batch_tokens`` with padding, at least one."""
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
    """Returns the sum of -log p(x[i+1]) from H[i] and the number of tokens: all real tokens but the first of each row."""
    predicted = batch.real[:, 1:]
    labels = batch.input_ids[:, 1:][predicted]  # [N]
    hidden = heads.collapse(batch.final)[:, :-1][predicted]  # [N, D]
    total = 0.0
    for states, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        total += float(F.cross_entropy(heads.logits(states), wanted, reduction="none").double().sum())
    return total, len(labels)


def raw_text(conversations: Iterable[Conversation]) -> bytes:
    """Returns all turns with a line break after each."""
    return "".join(f"{turn.content}\n" for c in conversations for turn in c.turns).encode()


def priming_text(train: Sequence[Conversation], domain: str, max_bytes: int) -> bytes:
    """Returns at most ``max_bytes`` of training text: other domains first, the domain's own next to the text that follows."""
    own = raw_text(c for c in train if c.domain == domain)[:max_bytes]
    others = raw_text(c for c in train if c.domain != domain)[: max_bytes - len(own)]
    return others + own


def xz_bytes(
    train: Sequence[Conversation], groups: dict[str, list[Conversation]], max_bytes: int, workers: int
) -> dict[str, int]:
    """Returns per group the bytes that xz adds for held-out text: compressed(training + held-out) - compressed(training)."""
    domains = {name: found[0].domain for name, found in groups.items()}
    primes = {domain: priming_text(train, domain, max_bytes) for domain in set(domains.values())}
    texts = {("train", domain): prime for domain, prime in primes.items()}
    texts |= {("both", name): primes[domains[name]] + raw_text(found) for name, found in groups.items()}
    with ThreadPoolExecutor(workers) as pool:  # lzma releases the interpreter's lock
        packed = pool.map(lambda text: len(lzma.compress(text, preset=XZ_PRESET)), texts.values())
        sizes = dict(zip(texts, tqdm(packed, total=len(texts), desc="xz", unit="text"), strict=True))
    return {name: sizes["both", name] - sizes["train", domain] for name, domain in domains.items()}


@dataclass(frozen=True)
class Order:
    """Grams of n tokens. ``keys`` [G] ascending, ``counts`` [G], ``discounts`` [4] by min(count, 3);
    ``totals`` and ``freed`` [grams of n - 1 tokens]: c(h) and freed(h)."""

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    totals: np.ndarray
    freed: np.ndarray


class KneserNey:
    """Interpolated modified Kneser-Ney n-gram (Chen and Goodman 1998, section 4.1.6): three discounts per order, estimated from
    counts of counts. Trained on ``documents``, each a sequence of ids in 0..vocab_size - 1.

        p_n(w | h) = (c(hw) - D(c(hw))) / c(h) + freed(h) / c(h) * p_{n-1}(w | h'),      p_0(w) = 1 / V
        c           occurrences at the highest order, number of different left neighbors below it
        freed(h)    sum of the discounts of h's continuations; p_n(. | h) = p_{n-1}(. | h') for an unseen h

    A gram of n tokens is the rank of (rank of its first n - 1 tokens) * V + last token among all such keys. A document's first
    token is given, not predicted, and repeated to the left, so that every other one has a full context.
    """

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, order: int = 5):
        check_order(order)
        if not len(documents):
            raise ValueError("an n-gram baseline needs training documents, got none: check the corpus's train split")
        self.vocab_size, self.order = vocab_size, order
        stream, events = self._stream(documents)
        grams = [np.zeros(len(stream), dtype=np.int64)]  # the empty gram
        keys, counts, places = [], [], []
        for _ in range(order):
            found, ids = np.unique(_shift(grams[-1]) * vocab_size + stream, return_inverse=True)
            place = np.zeros(len(found), dtype=np.int64)
            place[ids[events]] = events  # one predicted occurrence of each gram
            grams.append(ids)
            keys.append(found)
            counts.append(np.bincount(ids[events], minlength=len(found)))
            places.append(place)
        for n in range(order - 1, 0, -1):  # below the highest order: different left neighbors
            suffixes = grams[n][places[n][counts[n] > 0]]
            counts[n - 1] = np.bincount(suffixes, minlength=len(keys[n - 1]))
        sizes = [1, *map(len, keys)]
        self.orders = [_order(keys[n], counts[n], vocab_size, sizes[n]) for n in range(order)]

    def nats(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns -log p of every token but each document's first, in order: fp64 [tokens - documents]."""
        stream, events = self._stream(documents)
        grams = np.zeros(len(stream), dtype=np.int64)
        p = np.full(len(stream), 1 / self.vocab_size)
        for order in self.orders:
            context = _shift(grams)
            key = np.where(context >= 0, context * self.vocab_size + stream, -1)
            rank = np.searchsorted(order.keys, key).clip(max=len(order.keys) - 1)
            grams = np.where(order.keys[rank] == key, rank, -1)
            count = np.where(grams >= 0, order.counts[rank], 0)
            total = np.where(context >= 0, order.totals[context], 0)
            kept = count - order.discounts[count.clip(max=3)]
            p = np.where(total > 0, (kept + order.freed[context] * p) / np.maximum(total, 1), p)
        return -np.log(p[events])

    def _stream(self, documents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the concatenated documents with padding, int64 [N], and the positions of predicted tokens, int64 [E]."""
        padding = self.order - 2
        parts = [np.asarray(ids, dtype=np.int64) for ids in documents]
        stream = np.concatenate([np.concatenate([np.repeat(ids[:1], padding), ids]) for ids in parts])
        predicted = np.concatenate([np.arange(len(ids) + padding) > padding for ids in parts])
        return stream, predicted.nonzero()[0]


def check_order(order: object) -> int:
    """Raises ValueError unless ``order`` is that of an n-gram with a context."""
    if positive_int("ngram_order", order) < 2:
        raise ValueError(f"ngram_order must be at least 2, got {order}: give 5")
    return order


def _shift(grams: np.ndarray) -> np.ndarray:
    """Returns the rank of the gram that ends one token earlier; any value is right at the first position, which is padding."""
    return np.concatenate([grams[:1] * 0, grams[:-1]])


def _order(keys: np.ndarray, counts: np.ndarray, vocab_size: int, num_contexts: int) -> Order:
    discounts = _discounts(counts)
    context = keys // vocab_size
    freed = np.bincount(context, weights=discounts[counts.clip(max=3)], minlength=num_contexts)
    return Order(keys, counts, discounts, np.bincount(context, weights=counts, minlength=num_contexts), freed)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns D for counts 0, 1, 2 and >= 3, within (0, count], so that unseen tokens always have some mass."""
    n = np.bincount(counts.clip(max=5), minlength=6).astype(float)
    share = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    raw = [i - (i + 1) * share * n[i + 1] / n[i] if n[i] else 0.5 for i in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), i) for i, d in enumerate(raw, start=1))])
