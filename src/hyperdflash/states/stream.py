"""States within a byte budget: shards are captured before use, removed after use and captured again for the next use.

    demand/<reader>     the shards that a reader needs next, soonest first; removed at the end of a pass (`release`)
    producers/<pid>     a capture process is there
    leases/<shard>      a process captures it; its record holds the bytes that it will take

The shard that is needed soonest is captured first, by a capture process (`supply`) or, when there is none, by the training
process itself. Before that, `make_room` removes the least recently used shards that nobody needs, then those needed last, and
never one that is needed sooner than the new one: when nothing may go, producers wait. Readers and producers share nothing but
the directory of the cache, so they start, stop and are killed in any order.
"""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from hyperdflash.contracts import TargetStates
from hyperdflash.leases import Leases
from hyperdflash.states.capture import POLL_S, TELL_S, lease_of, remove_abandoned, tidy
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.readers import ShardedStates, checked, refuse_workers
from hyperdflash.states.store import MissingShard, Shard, StateStore
from hyperdflash.states.writer import ShardWriter, write_taps
from hyperdflash.targets.producer import Producer

HORIZON = 1024  # shards of one reader's demand
READ_AHEAD = 4  # shards in the order of the data set where nobody called expect
TOUCH_S = 5.0


def shard_size(store: StateStore, shard: Shard, layer_ids: Sequence[int]) -> int:
    """Bytes that a shard will take at most: states of every tap, ids, mask and what the file adds."""
    token = CODECS[store.key.dtype].bytes_per_token(store.key.num_paths, store.key.hidden_size)
    return shard.num_tokens * (token * (1 + len(layer_ids)) + 9) + 4096 * (1 + len(layer_ids))


class Stored(NamedTuple):
    """A shard on disk: bytes of all its files, time of last use, and which of the files are being written."""

    size: int = 0
    used: float = 0.0
    partials: tuple[Path, ...] = ()


def stored_shards(store: StateStore) -> dict[str, Stored]:
    """Every shard on disk by name, of other runs too."""
    found: dict[str, Stored] = {}
    for path in store.directory.glob("??/*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        name = path.name.partition(".")[0]
        size, used, partials = found.get(name, Stored())
        writing = (path,) if ".partial" in path.name else ()
        found[name] = Stored(size + stat.st_size, max(used, stat.st_mtime), partials + writing)
    return found


def demanded(leases: Leases) -> list[str]:
    """Names of the shards that living readers need, soonest first."""
    orders = [record["shards"] for record in leases.living("demand").values()]
    return list(dict.fromkeys(name for names in zip_longest(*orders) for name in names if name is not None))


def make_room(store: StateStore, leases: Leases, shard: Shard, budget_bytes: int) -> bool:
    """Removes shards until ``shard``, leased by this process, fits in; False when those left are needed sooner."""
    held = leases.living("leases")  # before the files: a shard in neither list is not there yet
    stored = stored_shards(store)
    if left := [path for name, found in stored.items() if name not in held for path in found.partials]:
        remove_abandoned(left, leases)
        stored = stored_shards(store)
    order = {name: position for position, name in enumerate(demanded(leases))}
    # what is being written counts as what it will be, once
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
    """Documents of a store that holds some of their shards at a time.

    ``producer`` None: wait for capture processes; else it fills in where none is there. A shard that does not come within
    ``wait_s`` is a ValueError. ``name`` tells this data set's demand from that of others of the process.
    """

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
        self.store, self.producer, self.budget_bytes, self.wait_s = store, producer, budget_bytes, wait_s
        self.name = name
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
        self._publish(self._order)

    def release(self) -> None:
        """Withdraws this reader's demand, until it reads again."""
        self._order = []
        self.leases.release(self._demand)

    def __getitem__(self, index: int) -> TargetStates:
        shard, row = self.place(index)
        while True:
            try:
                states = self.store.read(shard, row, self.layer_ids)
            except MissingShard:
                self._wait_for(shard)
            else:
                self._touch(shard)
                return states

    @property
    def leases(self) -> Leases:
        """This process's: a loader's worker is another process than the one that made the data set."""
        if os.getpid() not in self._leases_of:
            leases = Leases(self.store.directory)
            weakref.finalize(self, leases.close)
            self._leases_of[os.getpid()] = leases
        return self._leases_of[os.getpid()]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_leases_of": {}}

    @property
    def _demand(self) -> str:
        return f"demand/{os.uname().nodename}-{os.getpid()}-{self.name}"

    def _publish(self, names: Sequence[str]) -> None:
        self.leases.post(self._demand, shards=list(names))

    def _touch(self, shard: Shard) -> None:
        """Recency of use, for all to see."""
        now = time.monotonic()
        if now - self._touched.get(shard.name, -TOUCH_S) >= TOUCH_S:
            self._touched[shard.name] = now
            with suppress(FileNotFoundError):
                os.utime(self.store.path(shard))

    def _wait_for(self, shard: Shard) -> None:
        position = self._position[shard.name]
        following = self._order or [s.name for s in self.shards[position : position + READ_AHEAD]]
        self._publish([shard.name, *(name for name in following if name != shard.name)])
        started = reported = time.monotonic()
        while self.store.missing(shard, self.layer_ids):
            producers = self.leases.living("producers")
            if self.producer is not None and not producers and self._make(shard):
                return
            now = time.monotonic()
            if now - started > self.wait_s:
                raise ValueError(
                    f"shard {shard.name} did not come in cache.wait_s={self.wait_s:g} s ({len(producers)} capture processes on "
                    f"{self.store.directory}): run `python -m src.capture cache=stream` with these options beside it"
                )
            if now - reported > TELL_S:
                reported = now
                print(f"waiting for shard {shard.name}: {now - started:.0f} s, {len(producers)} capture processes", flush=True)
            time.sleep(POLL_S / 4)

    def _make(self, shard: Shard) -> bool:
        """Capture a shard in this process; False where another has it or nothing can go for it now."""
        refuse_workers("cache=stream without a capture process")
        if not self.leases.acquire(lease_of(shard), bytes=shard_size(self.store, shard, self.layer_ids)):
            return False
        try:
            taps = self.store.missing(shard, self.layer_ids)
            if taps and not make_room(self.store, self.leases, shard, self.budget_bytes):
                return False
            if taps:
                made_by = checked(self.producer(), self.store)
                states = made_by.states(shard.sequences, [tap for tap in taps if tap is not None])
                write_taps(self.store, shard, {tap: states[tap] for tap in taps})
            return True
        finally:
            self.leases.release(lease_of(shard))


def supply(
    shards: Sequence[Shard],
    store: StateStore,
    producer: Callable[[], Producer],
    layer_ids: Sequence[int] = (),
    *,
    budget_bytes: int,
    wait_s: float,
    linger_s: float = 30.0,
    progress: bool = True,
) -> int:
    """Make what readers have in demand until they are gone: ``linger_s`` after the last one, or ``wait_s`` where none comes.
    Returns the number of shards made."""
    known = {shard.name: shard for shard in shards}
    made = written = 0

    def stored(shard: Shard, size: int) -> None:
        nonlocal written
        written += size
        bar.set_postfix_str(f"{tqdm.format_sizeof(written, 'B')} written", refresh=False)
        leases.release(lease_of(shard))

    bar = tqdm(desc="supply states", unit="tok", unit_scale=True, disable=not progress, mininterval=2)
    with bar, Leases(store.directory) as leases, ShardWriter(store, stored) as writer:
        leases.post(f"producers/{os.uname().nodename}-{os.getpid()}")
        tidy(store, leases)
        made_by = checked(producer(), store)
        needed = time.monotonic()
        while True:
            demand = demanded(leases)
            if any(name in known for name in demand):
                needed = time.monotonic()
            elif time.monotonic() - needed > (linger_s if made else wait_s):
                break
            shard = _next(known, demand, store, leases, layer_ids, budget_bytes)
            if shard is None:
                time.sleep(POLL_S * random.uniform(0.5, 1))
                continue
            taps = store.missing(shard, layer_ids)
            states = made_by.states(shard.sequences, [tap for tap in taps if tap is not None])
            writer.put(shard, {tap: states[tap] for tap in taps})
            made += 1
            bar.update(shard.num_tokens)
    if progress:
        print(f"no reader is left: {made} shards made, {tqdm.format_sizeof(written, 'B')}", flush=True)
    return made


def _next(
    known: dict[str, Shard],
    demand: Sequence[str],
    store: StateStore,
    leases: Leases,
    layer_ids: Sequence[int],
    budget_bytes: int,
) -> Shard | None:
    """The missing shard that is needed soonest, leased by this process, with room for it; None: nothing to do."""
    for shard in (known[name] for name in demand if name in known):
        if not store.missing(shard, layer_ids):
            continue
        if not leases.acquire(lease_of(shard), bytes=shard_size(store, shard, layer_ids)):
            continue
        if store.missing(shard, layer_ids) and make_room(store, leases, shard, budget_bytes):
            return shard
        full = bool(store.missing(shard, layer_ids))
        leases.release(lease_of(shard))
        if full:
            return None
    return None
