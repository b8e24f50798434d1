"""States within a byte budget: shards are captured before use, removed after use and captured again for the next use.

    demand/<reader>     the shards that a reader needs next, soonest first; `release` removes it at the end of a pass
    producers/<pid>     one file per living capture process
    leases/<shard>      one file per shard that a process captures; it records the bytes that the shard will take

Capture processes (`supply`) or, when none runs, the training process capture the shard that is needed soonest. `make_room`
first removes the least recently used shards that nobody needs, then those needed last, but none that is needed sooner than the
new shard: when nothing can be removed, producers wait. Readers and producers share only the directory of the cache, so they
start, stop and are killed in any order.
"""

import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from hyperdflash.contracts import TargetStates
from hyperdflash.leases import Leases
from hyperdflash.states.capture import POLL_S, TELL_S, capturing, lease_of, missing_taps, remove_abandoned, write_taps
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.readers import ShardedStates, checked, refuse_workers
from hyperdflash.states.shard_file import MissingShard
from hyperdflash.states.store import Shard, StateStore
from hyperdflash.targets.producer import Producer

HORIZON = 1024  # most shards in one reader's demand
READ_AHEAD = 4  # shards demanded at a read, in their order, when nobody called prefetch
TOUCH_S = 5.0


def shard_size(store: StateStore, shard: Shard, layer_ids: Sequence[int]) -> int:
    """Returns the most bytes that a shard takes: states of every tap, ids, mask, headers and checksums."""
    token = CODECS[store.key.dtype].bytes_per_token(store.key.num_paths, store.key.hidden_size)
    return shard.num_tokens * (token * (1 + len(layer_ids)) + 9) + 4096 * (1 + len(layer_ids))


class Stored(NamedTuple):
    """A shard on disk: bytes of all its files, time of last use (s since the epoch), and its partial files."""

    size: int = 0
    used: float = 0.0
    partials: tuple[Path, ...] = ()


def stored_shards(store: StateStore) -> dict[str, Stored]:
    """Returns every shard on disk by name, those of other runs included."""
    found: dict[str, Stored] = {}
    for path, name, is_partial in store.files():
        with suppress(FileNotFoundError):
            stat = path.stat()
            size, used, partials = found.get(name, Stored())
            writing = (path,) if is_partial else ()
            found[name] = Stored(size + stat.st_size, max(used, stat.st_mtime), partials + writing)
    return found


def demanded(leases: Leases) -> list[str]:
    """Returns the names of the shards that living readers need, soonest first."""
    orders = [record["shards"] for record in leases.living("demand").values()]
    return list(dict.fromkeys(name for names in zip_longest(*orders) for name in names if name is not None))


def make_room(store: StateStore, leases: Leases, shard: Shard, budget_bytes: int) -> bool:
    """Removes shards until ``shard``, which this process has leased, fits in; False when all others are needed sooner."""
    held = leases.living("leases")  # listed before the files, so that every shard is in one of the lists
    stored = stored_shards(store)
    if left := [path for name, found in stored.items() if name not in held for path in found.partials]:
        remove_abandoned(left, leases)
        stored = stored_shards(store)
    order = {name: position for position, name in enumerate(demanded(leases))}
    # a shard that is being written counts with its final size
    pending = sum(max(0, record.get("bytes", 0) - stored.get(name, Stored()).size) for name, record in held.items())
    excess = sum(found.size for found in stored.values()) + pending - budget_bytes
    own = order.get(shard.name, len(order))
    idle = sorted((name for name in stored if name not in order and name not in held), key=lambda name: stored[name].used)
    later = sorted((name for name in stored if order.get(name, -1) > own and name not in held), key=lambda name: -order[name])
    chosen = []
    for name in (*idle, *later):
        if excess <= 0:
            break
        chosen.append(name)
        excess -= stored[name].size
    if excess > 0:
        return False
    for name in chosen:
        store.remove(Shard(name, ()))
    return True


class StreamedStates(ShardedStates):
    """Reads documents of a store that holds some of their shards at a time; ``name`` tells the demands of one process apart.
    Captures a missing shard with ``producer`` when no capture process runs; with ``producer`` None it only waits. ValueError
    when a shard does not appear within ``wait_s`` seconds."""

    def __init__(
        self,
        store: StateStore,
        shards: Sequence[Shard],
        layer_ids: Sequence[int] = (),
        *,
        producer: Callable[[], Producer] | None,
        budget_bytes: int,
        wait_s: float,
        name: str = "data",
    ):
        super().__init__(shards, layer_ids)
        self.store, self.producer, self.budget_bytes, self.wait_s, self.name = store, producer, budget_bytes, wait_s, name
        self._position = {shard.name: position for position, shard in enumerate(self.shards)}
        self._order: list[str] = []
        self._touched: dict[str, float] = {}
        self._leases_of: dict[int, Leases] = {}

    def prefetch(self, order: Sequence[int], window: int) -> None:
        sizes = sorted((shard_size(self.store, shard, self.layer_ids) for shard in self.shards), reverse=True)
        needed = sum(sizes[: window + 1])
        if needed > self.budget_bytes:
            raise ValueError(
                f"cache.budget_gb={self.budget_bytes / 1e9:g} is too small: training mixes {window} shards, with the next one "
                f"up to {needed / 1e9:.3g} GB; raise it, or lower cache.documents_per_shard"
            )
        self._order = [self.shards[position].name for position in order[:HORIZON]]
        self.leases.post(self._demand, shards=self._order)

    def release(self) -> None:
        """Withdraws this reader's demand until the next read."""
        self._order = []
        self.leases.release(self._demand)

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.place(index)
        while True:
            try:
                states = self.store.read(shard, row, self.layer_ids)
                self._touch(shard)
                return states
            except MissingShard:
                self._wait_for(shard)

    @property
    def leases(self) -> Leases:
        """The leases of this process; a loader's worker is another process than the one that opened the dataset."""
        if os.getpid() not in self._leases_of:
            leases = self._leases_of[os.getpid()] = Leases(self.store.directory)
            weakref.finalize(self, leases.close)
        return self._leases_of[os.getpid()]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_leases_of": {}}

    @property
    def _demand(self) -> str:
        return f"demand/{os.uname().nodename}-{os.getpid()}-{self.name}"

    def _touch(self, shard: Shard) -> None:
        """Records the time of use as the file's modification time, at most every TOUCH_S seconds."""
        now = time.monotonic()
        if now - self._touched.get(shard.name, -TOUCH_S) >= TOUCH_S:
            self._touched[shard.name] = now
            with suppress(FileNotFoundError):
                os.utime(self.store.path(shard))

    def _wait_for(self, shard: Shard) -> None:
        position = self._position[shard.name]
        following = self._order or [s.name for s in self.shards[position : position + READ_AHEAD]]
        self.leases.post(self._demand, shards=[shard.name, *(name for name in following if name != shard.name)])
        started = reported = time.monotonic()
        while self.store.missing(shard, self.layer_ids):
            producers = self.leases.living("producers")
            if self.producer is not None and not producers and self._make(shard):
                return
            now = time.monotonic()
            if now - started > self.wait_s:
                raise ValueError(
                    f"shard {shard.name} did not appear within cache.wait_s={self.wait_s:g} s ({len(producers)} capture "
                    f"processes on {self.store.directory}): run `python -m src.capture cache=stream` with these options"
                )
            if now - reported > TELL_S:
                reported = now
                print(f"waiting for shard {shard.name}: {now - started:.0f} s, {len(producers)} capture processes", flush=True)
            time.sleep(POLL_S / 4)

    def _make(self, shard: Shard) -> bool:
        """Captures a shard in this process; False when another process has it, or when nothing can be removed for it."""
        refuse_workers("cache=stream without a capture process")
        if not lease(self.store, self.leases, shard, self.layer_ids):
            return False
        try:
            if self.store.missing(shard, self.layer_ids):
                if not make_room(self.store, self.leases, shard, self.budget_bytes):
                    return False
                made_by = checked(self.producer(), self.store)
                write_taps(self.store, shard, missing_taps(made_by, self.store, shard, self.layer_ids))
            return True
        finally:
            self.leases.release(lease_of(shard))


def lease(store: StateStore, leases: Leases, shard: Shard, layer_ids: Sequence[int]) -> bool:
    """Leases ``shard`` and records the bytes that it will take; False when another process has it."""
    return leases.acquire(lease_of(shard), bytes=shard_size(store, shard, layer_ids))


def supply(
    shards: Sequence[Shard],
    store: StateStore,
    producer: Callable[[], Producer],
    layer_ids: Sequence[int] = (),
    *,
    budget_bytes: int,
    wait_s: float,
    linger_s: float = 30.0,
) -> int:
    """Captures demanded shards until ``linger_s`` after the last demand, or ``wait_s`` without any; returns their number."""
    known = {shard.name: shard for shard in shards}
    made = 0
    with Leases(store.directory) as leases:
        leases.post(f"producers/{os.uname().nodename}-{os.getpid()}")  # before the target loads: readers wait for this process
        with capturing(store, producer, layer_ids, leases, desc="supply states") as capture_leased:
            needed = time.monotonic()
            while True:
                wanted = [known[name] for name in demanded(leases) if name in known]
                if wanted:
                    needed = time.monotonic()
                elif time.monotonic() - needed > (linger_s if made else wait_s):
                    break
                leased = (s for s in wanted if store.missing(s, layer_ids) and lease(store, leases, s, layer_ids))
                shard = next(leased, None)  # the one that is needed soonest
                if shard is not None and make_room(store, leases, shard, budget_bytes):
                    capture_leased(shard)
                    made += 1
                    continue
                if shard is not None:
                    leases.release(lease_of(shard))
                time.sleep(POLL_S * random.uniform(0.5, 1))
    print(f"no reader is left: {made} shards captured", flush=True)
    return made
