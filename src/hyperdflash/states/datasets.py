"""Documents with their target states as data sets of shards: read from a store, or made as they are asked for.

shards          what is made and stored together            places   index -> (shard, row)
data[index]     TargetStates of one row; the same bits whichever data set gives it
expect(order)   the reader's next shards in the order it will need them, told window by window
done()          the end of a pass over them
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hyperdflash.contracts import TargetStates
from hyperdflash.states.store import Shard, StateStore, states_of
from hyperdflash.targets.producer import Producer


class ShardedStates(Dataset):
    """Documents of ``shards``, shard after shard: index -> TargetStates of batch size 1."""

    def __init__(self, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        self.shards = list(shards)
        self.layer_ids = tuple(layer_ids)
        self.places = [(shard, row) for shard in self.shards for row in range(len(shard.documents))]

    def __len__(self) -> int:
        return len(self.places)

    def length(self, index: int) -> int:
        """Tokens of one document, without touching the disk."""
        shard, row = self.places[index]
        return len(shard.documents[row].input_ids)

    def expect(self, order: Sequence[int], window: int) -> None:
        """Positions in ``shards`` of what will be read next, soonest first; documents of ``window`` of them come mixed."""

    def done(self) -> None:
        """Nothing will be read for a while: what this reader has asked for need not be kept or made for it."""

    def __getitem__(self, index: int) -> TargetStates:
        raise NotImplementedError


class CachedStates(ShardedStates):
    """Documents of a filled store."""

    def __init__(self, store: StateStore, shards: Sequence[Shard], layer_ids: Sequence[int] = ()):
        super().__init__(shards, layer_ids)
        self.store = store

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.places[index]
        return self.store.read(shard, row, self.layer_ids)


class LiveStates(ShardedStates):
    """Nothing on disk: a shard is made when one of its documents is asked for, in the forward that a capture would run, and
    rounded as ``store`` rounds. The shards of a window stay in memory, so each is made once an epoch."""

    def __init__(
        self,
        store: StateStore,
        shards: Sequence[Shard],
        producer: Callable[[], Producer],
        layer_ids: Sequence[int] = (),
    ):
        super().__init__(shards, layer_ids)
        self.store, self.producer, self.keep = store, producer, 2
        self._recent: OrderedDict[str, dict[int | None, tuple[Tensor, ...]]] = OrderedDict()

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.places[index]
        taps = self._recent.get(shard.name) or self._make(shard)
        self._recent.move_to_end(shard.name)
        layers = [taps[layer_id][row] for layer_id in self.layer_ids]
        return states_of(shard.documents[row], taps[None][row], layers, self.layer_ids)

    def expect(self, order: Sequence[int], window: int) -> None:
        self.keep = window + 2

    def _make(self, shard: Shard) -> dict[int | None, tuple[Tensor, ...]]:
        refuse_workers("cache=off")
        while len(self._recent) >= self.keep:
            self._recent.popitem(last=False)
        states = checked(self.producer(), self.store).states(shard.sequences, self.layer_ids)
        lengths = [len(document.input_ids) for document in shard.documents]
        taps = {tap: self.store.round(value).split(lengths) for tap, value in states.items()}
        self._recent[shard.name] = taps
        return taps


def checked(producer: Producer, store: StateStore) -> Producer:
    """ValueError where the producer's weights are not those that the store belongs to."""
    if producer.fingerprint != store.key.target:
        raise ValueError(
            f"the target at {producer.where} has fingerprint {producer.fingerprint} and the cache {store.directory} wants "
            f"{store.key.target}: give the target.path that the cache was made with, or another cache.directory"
        )
    return producer


def refuse_workers(what: str) -> None:
    """ValueError in a loader's worker process: the target is in the process that trains."""
    if get_worker_info() is not None:
        raise ValueError(f"{what} makes states in the training process: set the number of loader workers to 0")
