"""Fills a store with target states: any number of processes at the same time capture every shard once.

    1. shards                  the same list in every process
    2. missing shard           -> this process leases it (hyperdflash/leases.py), or tries the next when another process has it
    3. one forward per shard   -> taps [N, M, D], which a thread writes while the next forward runs
    4. stored shard            -> its lease is released

After a kill, at most two shards are captured again: the one in its forward and the one being written. Another process takes
over their leases.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from torch import Tensor
from tqdm import tqdm

from hyperdflash.leases import Leases
from hyperdflash.states.readers import checked
from hyperdflash.states.store import Shard, StateStore
from hyperdflash.targets.producer import Producer, finite_states

POLL_S = 0.2
TELL_S = 20.0

Taps = Mapping[int | None, Tensor]


def missing_taps(producer: Producer, store: StateStore, shard: Shard, layer_ids: Sequence[int]) -> Taps:
    """Computes the taps [N, M, D] of a shard that ``store`` lacks; an empty mapping when it lacks none."""
    missing = store.missing(shard, layer_ids)
    states = finite_states(producer, shard.documents, [tap for tap in missing if tap is not None]) if missing else {}
    return {tap: states[tap] for tap in missing}


def write_taps(store: StateStore, shard: Shard, taps: Taps) -> int:
    """Stores taps of a shard, the residual last: a shard that has it is complete. Returns the number of bytes."""
    return sum(store.write(shard, taps[tap], tap) for tap in sorted(taps, key=lambda tap: tap is None))


class ShardWriter:
    """Writes shards in a thread, so that the next forward does not wait, and calls ``after(shard, num_bytes)`` there. The
    next `put`, or the end of the block, raises an error of the thread."""

    def __init__(self, store: StateStore, after: Callable[[Shard, int], None] = lambda *_: None):
        self.store, self.after = store, after
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: Future | None = None

    def put(self, shard: Shard, taps: Taps) -> None:
        """Waits until the shard before is stored, then hands this one to the thread."""
        if self._written is not None:
            self._written.result()
        self._written = self._thread.submit(lambda: self.after(shard, write_taps(self.store, shard, taps)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        """Stores the last shard, also when the block ends with an error."""
        self._thread.shutdown()
        if kind is None and self._written is not None:
            self._written.result()


def lease_of(shard: Shard) -> str:
    return f"leases/{shard.name}"


@contextmanager
def capturing(
    store: StateStore,
    producer: Callable[[], Producer],
    layer_ids: Sequence[int],
    leases: Leases,
    **bar_options,
) -> Iterator[Callable[[Shard], None]]:
    """Yields a function that captures what a leased shard lacks and releases the lease when the shard is stored. Before and
    after the block, removes the leases and partial files of killed captures."""
    written = 0

    def stored(shard: Shard, size: int) -> None:
        nonlocal written
        written += size
        bar.set_postfix_str(f"{tqdm.format_sizeof(written, 'B')} written", refresh=False)
        leases.release(lease_of(shard))

    def capture_leased(shard: Shard) -> None:
        if taps := missing_taps(made_by, store, shard, layer_ids):  # another process may have stored it just before
            writer.put(shard, taps)
        else:
            leases.release(lease_of(shard))
        bar.update(shard.num_tokens)

    tidy(store, leases)
    made_by = checked(producer(), store)
    bar = tqdm(unit="tok", unit_scale=True, **bar_options)
    with bar, ShardWriter(store, stored) as writer:
        yield capture_leased
    tidy(store, leases)


def capture(
    shards: Sequence[Shard], store: StateStore, producer: Callable[[], Producer], *, layer_ids: Sequence[int] = ()
) -> None:
    """Captures missing taps; returns when ``store`` holds all. Calls ``producer()`` only when a tap is missing."""
    missing = store.missing_of(shards, layer_ids)
    waiting = deque(shard for shard in shards if missing[shard.name])
    if not waiting:
        print(f"states: all {sum(s.num_tokens for s in shards):,} tokens are in {store.directory}", flush=True)
        return
    bar = {"desc": "capture states", "total": sum(shard.num_tokens for shard in waiting)}
    with Leases(store.directory) as leases, capturing(store, producer, layer_ids, leases, **bar) as capture_leased:
        passed, reported = 0, time.monotonic()  # consecutive shards that other processes have leased
        while waiting:
            shard = waiting.popleft()
            if leases.acquire(lease_of(shard)) or not store.missing(shard, layer_ids):
                capture_leased(shard)
                passed = 0
                continue
            waiting.append(shard)
            passed += 1
            if passed >= len(waiting):
                passed = 0
                if time.monotonic() - reported > TELL_S:
                    reported = time.monotonic()
                    tqdm.write(f"waiting for {len(waiting)} shards; {leases.owner(lease_of(shard))} has one of them")
                time.sleep(POLL_S)


def tidy(store: StateStore, leases: Leases) -> None:
    """Removes the leases and partial files of killed captures; leaves those of living processes."""
    leases.living("leases")
    remove_abandoned((path for path, _, is_partial in store.files() if is_partial), leases)


def remove_abandoned(partials: Iterable[Path], leases: Leases) -> None:
    """Removes each partial file whose shard no living process has leased."""
    for path in partials:
        name = f"leases/{path.name.partition('.')[0]}"
        if leases.acquire(name):
            path.unlink(missing_ok=True)
            leases.release(name)
