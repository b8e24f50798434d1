"""Fill a store with target states (write on a miss), and read it as a data set (read on a hit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from src.cache.store import Shard, StateStore, collate, make_shards, states_of
from src.contracts import Document, TargetStates
from src.target.producer import Producer


def live_states(producer: Producer, shard: Shard, layer_ids: Sequence[int], dtype: torch.dtype) -> TargetStates:
    """A shard's states as a cache of ``dtype`` would give them, without one: one right-padded batch."""
    taps = {tap: value.to(dtype) for tap, value in producer.states(shard.sequences, layer_ids).items()}
    lengths = [len(document.input_ids) for document in shard.documents]
    final, *layers = (taps[tap].split(lengths) for tap in (None, *layer_ids))
    rows = zip(shard.documents, final, zip(*layers, strict=True) if layers else [()] * len(lengths), strict=True)
    return collate([states_of(document, *states, layer_ids) for document, *states in rows])


def capture(
    documents: Sequence[Document],
    store: StateStore,
    producer: Callable[[], Producer],
    *,
    layer_ids: Sequence[int] = (),
    documents_per_shard: int = 16,
    progress: bool = True,
) -> list[Shard]:
    """Make sure that every document's taps are in ``store``; ``producer()`` is called only if one is
    missing."""
    shards = make_shards(documents, documents_per_shard)
    missing = {shard.name: store.missing(shard, layer_ids) for shard in shards}
    work = [shard for shard in shards if missing[shard.name]]
    if not work:
        if progress:
            print(f"states: all {sum(s.num_tokens for s in shards):,} tokens are in {store.directory}", flush=True)
        return shards
    made_by = producer()
    if made_by.fingerprint != store.key.target:
        raise ValueError(
            f"the target at {made_by.where} has fingerprint {made_by.fingerprint} and the cache {store.directory} wants "
            f"{store.key.target}: give the target.path that the cache was made with, or another cache.directory"
        )
    written = 0
    total = sum(shard.num_tokens for shard in work)
    with tqdm(total=total, desc="capture states", unit="tok", unit_scale=True, disable=not progress, mininterval=2) as bar:
        for shard in work:
            taps = missing[shard.name]
            states = made_by.states(shard.sequences, [tap for tap in taps if tap is not None])
            # the final residual goes last: a shard that has it has its tokens
            for tap in sorted(taps, key=lambda t: t is None):
                written += store.write(shard, states[tap], tap)
            bar.set_postfix(MB=f"{written / 1e6:.0f}", refresh=False)
            bar.update(shard.num_tokens)
    return shards


class CachedStates(Dataset):
    """Documents of a filled store, one a row: index -> TargetStates of batch size 1."""

    def __init__(self, store: StateStore, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        self.store = store
        self.layer_ids = tuple(layer_ids)
        self.places = [(shard, row) for shard in shards for row in range(len(shard.documents))]

    def __len__(self) -> int:
        return len(self.places)

    def length(self, index: int) -> int:
        """Tokens of one document, without touching the disk."""
        shard, row = self.places[index]
        return len(shard.documents[row].input_ids)

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.places[index]
        return self.store.read(shard, row, self.layer_ids)
