"""Documents with their target states, read from a store or computed when they are asked for.

shards             what is captured and stored together             place(index)    (shard, row) of a document
data[index]        TargetStates of one document; the same bits whichever class gives it
prefetch(order)    announces the next shards in the order of use, window by window
release()          ends a pass over them
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hyperdflash.contracts import Document, TargetStates
from hyperdflash.states.store import Shard, StateStore, states_of

if TYPE_CHECKING:  # a training reads states without the target's modules
    from hyperdflash.targets.producer import Producer


class ShardedStates(Dataset):
    """Documents of ``shards``, shard after shard: index -> TargetStates of batch size 1.

    ``lengths``: per shard, the tokens of its documents.
    """

    def __init__(self, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        self.shards = list(shards)
        self.layer_ids = tuple(layer_ids)
        self.lengths = [shard.lengths for shard in self.shards]
        self._ends = list(accumulate(map(len, self.lengths)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[Shard, int]:
        """The shard of a document and its row there. IndexError: there is no such document."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = bisect_right(self._ends, index)
        return self.shards[position], index - (self._ends[position - 1] if position else 0)

    def document(self, index: int) -> Document:
        """Token ids and loss mask of a document, without its states."""
        shard, row = self.place(index)
        return shard.documents[row]

    def prefetch(self, order: Sequence[int], window: int) -> None:
        """Positions in ``shards`` of the next reads, soonest first; documents of ``window`` of them come mixed."""

    def release(self) -> None:
        """Ends a pass: the shards that this reader announced need not be kept or captured for it."""

    def __getitem__(self, index: int) -> TargetStates:
        raise NotImplementedError


class CachedStates(ShardedStates):
    """Documents of a filled store."""

    def __init__(self, store: StateStore, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        super().__init__(shards, layer_ids)
        self.store = store

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.place(index)
        return self.store.read(shard, row, self.layer_ids)


class LiveStates(ShardedStates):
    """Documents whose states never touch the disk.

    A shard is computed when one of its documents is read, in the forward that a capture would run, and rounded as ``store``
    rounds. The shards of a window stay in memory, so each is computed once per epoch.
    """

    def __init__(
        self, store: StateStore, shards: Sequence[Shard], producer: Callable[[], Producer], layer_ids: Sequence[int] = ()
    ):
        super().__init__(shards, layer_ids)
        self.store, self.producer, self.keep = store, producer, 2
        self._recent: OrderedDict[str, dict[int | None, tuple[Tensor, ...]]] = OrderedDict()

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.place(index)
        taps = self._recent.get(shard.name) or self._compute(shard)
        self._recent.move_to_end(shard.name)
        layers = [taps[layer_id][row] for layer_id in self.layer_ids]
        return states_of(shard.documents[row], taps[None][row], layers, self.layer_ids)

    def prefetch(self, order: Sequence[int], window: int) -> None:
        self.keep = window + 2

    def _compute(self, shard: Shard) -> dict[int | None, tuple[Tensor, ...]]:
        refuse_workers("cache=off")
        while len(self._recent) >= self.keep:
            self._recent.popitem(last=False)
        states = checked(self.producer(), self.store).states(shard.sequences, self.layer_ids)
        taps = {tap: self.store.round(value).split(shard.lengths) for tap, value in states.items()}
        self._recent[shard.name] = taps
        return taps


def checked(producer: Producer, store: StateStore) -> Producer:
    """ValueError when the weights of ``producer`` are not those of the store."""
    if producer.fingerprint != store.key.target:
        raise ValueError(
            f"the target at {producer.where} has fingerprint {producer.fingerprint} and the cache {store.directory} wants "
            f"{store.key.target}: give the target.path that the cache was made with, or another cache.directory"
        )
    return producer


def refuse_workers(what: str) -> None:
    """ValueError in a worker process of a loader: the target is in the process that trains."""
    if get_worker_info() is not None:
        raise ValueError(f"{what} makes states in the training process: set the number of loader workers to 0")
