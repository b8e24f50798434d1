"""Documents with their target states, read from a store or computed on access. data[index] TargetStates of one document, the
same bits from every class place(index) (shard, row) of a document prefetch(order) announces the next shards in the order of
use, window by window release() withdraws the announcement at the end of a pass"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate

from torch.utils.data import Dataset, get_worker_info

from hyperdflash.contracts import Document, TargetStates
from hyperdflash.states.codecs import Codec, rounded
from hyperdflash.states.store import Shard, StateStore, states_of
from hyperdflash.targets.producer import Producer, finite_states


class ShardedStates(Dataset):
    """Maps a document's index through all ``shards`` to TargetStates of batch size 1; ``lengths[shard][row]`` counts tokens."""

    def __init__(self, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        self.shards = list(shards)
        self.layer_ids = tuple(layer_ids)
        self.lengths = [shard.lengths for shard in self.shards]
        self._ends = list(accumulate(map(len, self.lengths)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of a document and its row there; IndexError for an index out of range."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = bisect_right(self._ends, index)
        return self.shards[position], index - (self._ends[position - 1] if position else 0)

    def document(self, index: int) -> Document:
        """Returns a document without its states."""
        shard, row = self.place(index)
        return shard.documents[row]

    def prefetch(self, order: Sequence[int], window: int) -> None:
        """Announces the next reads: positions in ``shards``, soonest first, of which ``window`` at a time are read mixed."""

    def release(self) -> None:
        """Withdraws the announced shards: nobody needs to keep or capture them for this reader."""

    def __getitem__(self, index: int) -> TargetStates:
        raise NotImplementedError


class CachedStates(ShardedStates):
    """Reads documents of a store that holds all their states."""

    def __init__(self, store: StateStore, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        super().__init__(shards, layer_ids)
        self.store = store

    def __getitem__(self, index: int) -> TargetStates:
        return self.store.read(*self.place(index), self.layer_ids)


class LiveStates(ShardedStates):
    """Computes states without the disk: the first read of a document computes its whole shard, in the same forward as a capture
    and rounded as ``store`` rounds. The shards of a window stay in memory, so each is computed once per epoch."""

    def __init__(
        self, store: StateStore, shards: Sequence[Shard], producer: Callable[[], Producer], layer_ids: Sequence[int] = ()
    ):
        super().__init__(shards, layer_ids)
        self.store, self.producer, self.keep = store, producer, 2
        self._recent: OrderedDict[str, list[TargetStates]] = OrderedDict()

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.place(index)
        if shard.name not in self._recent:
            refuse_workers("cache=off")
            while len(self._recent) >= self.keep:
                self._recent.popitem(last=False)
            made_by = checked(self.producer(), self.store)
            self._recent[shard.name] = computed_states(made_by, shard, self.layer_ids, self.store.codec)
        self._recent.move_to_end(shard.name)
        return self._recent[shard.name][row]

    def prefetch(self, order: Sequence[int], window: int) -> None:
        self.keep = window + 2


def computed_states(producer: Producer, shard: Shard, layer_ids: Sequence[int], codec: Codec) -> list[TargetStates]:
    """Computes the states of each document of a shard, rounded as in a cache with ``codec``; touches no disk."""
    taps = finite_states(producer, shard.documents, layer_ids)
    split = [rounded(taps[tap], codec).split(shard.lengths) for tap in (None, *layer_ids)]
    rows = zip(shard.documents, *split, strict=True)
    return [states_of(document, residual, layers, layer_ids) for document, residual, *layers in rows]


def checked(producer: Producer, store: StateStore) -> Producer:
    """Returns ``producer``; ValueError when its weights are not those of the store."""
    if producer.fingerprint != store.key.target:
        raise ValueError(
            f"the target at {producer.where} has fingerprint {producer.fingerprint} and the cache {store.directory} wants "
            f"{store.key.target}: give the target.path that the cache was captured from, or another cache.directory"
        )
    return producer


def refuse_workers(what: str) -> None:
    """Raises ValueError in a worker process of a loader: only the training process holds the target."""
    if get_worker_info() is not None:
        raise ValueError(f"{what} computes states in the training process: set the number of loader workers to 0")
