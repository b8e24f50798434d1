"""Fills a store with target states: every shard once, by any number of processes at the same time.

    1. shards                  the same in every process
    2. a shard not stored      -> a lease on it (hyperdflash/leases.py); while another process has it: the next shard
    3. one forward per shard   -> taps [N, M, D], written by a thread while the next forward runs
    4. stored                  -> the lease is released

A killed capture repeats the shard in its forward and the one being written, no more; another process takes its leases.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from hyperdflash.contracts import TargetStates
from hyperdflash.leases import Leases
from hyperdflash.states.codecs import Codec, rounded
from hyperdflash.states.readers import checked
from hyperdflash.states.store import Shard, StateStore, collate, states_of
from hyperdflash.states.writer import ShardWriter
from hyperdflash.targets.producer import Producer

POLL_S = 0.2
TELL_S = 20.0


def live_states(producer: Producer, shard: Shard, layer_ids: Sequence[int], codec: Codec) -> TargetStates:
    """States of a shard as a cache with ``codec`` gives them, as one right-padded batch; no cache is read or written."""
    taps = {tap: rounded(value, codec) for tap, value in producer.states(shard.sequences, layer_ids).items()}
    final, *layers = (taps[tap].split(shard.lengths) for tap in (None, *layer_ids))
    rows = zip(shard.documents, final, zip(*layers, strict=True) if layers else [()] * len(shard.documents), strict=True)
    return collate([states_of(document, *states, layer_ids) for document, *states in rows])


def lease_of(shard: Shard) -> str:
    """Name of the lease on a shard."""
    return f"leases/{shard.name}"


def capture(
    shards: Sequence[Shard],
    store: StateStore,
    producer: Callable[[], Producer],
    *,
    layer_ids: Sequence[int] = (),
    progress: bool = True,
    stale_s: float = 60.0,
) -> None:
    """Returns when ``store`` holds every tap of every shard, whoever captured it.

    Calls ``producer()`` only when a tap is missing; ``stale_s`` as in hyperdflash.leases.Leases.
    """
    missing = store.missing_of(shards, layer_ids)
    waiting = deque(shard for shard in shards if missing[shard.name])
    if not waiting:
        if progress:
            print(f"states: all {sum(s.num_tokens for s in shards):,} tokens are in {store.directory}", flush=True)
        return
    made_by = checked(producer(), store)
    bar = tqdm(
        total=sum(shard.num_tokens for shard in waiting),
        desc="capture states",
        unit="tok",
        unit_scale=True,
        disable=not progress,
        mininterval=2,
    )
    written = 0

    def stored(shard: Shard, size: int) -> None:
        nonlocal written
        written += size
        bar.set_postfix_str(f"{tqdm.format_sizeof(written, 'B')} written", refresh=False)
        leases.release(lease_of(shard))

    with bar, Leases(store.directory, stale_s) as leases:
        tidy(store, leases)
        with ShardWriter(store, stored) as writer:
            passed, reported = 0, time.monotonic()  # shards in a row that other processes have
            while waiting:
                shard = waiting.popleft()
                taps = store.missing(shard, layer_ids)
                if taps and not leases.acquire(lease_of(shard)):
                    waiting.append(shard)
                    passed += 1
                    if passed >= len(waiting):
                        passed = 0
                        if progress and time.monotonic() - reported > TELL_S:
                            reported = time.monotonic()
                            bar.write(f"waiting for {len(waiting)} shards; {leases.owner(lease_of(shard))} has one of them")
                        time.sleep(POLL_S)
                    continue
                passed = 0
                if taps and (taps := store.missing(shard, layer_ids)):  # another process may have stored it just before
                    states = made_by.states(shard.sequences, [tap for tap in taps if tap is not None])
                    writer.put(shard, {tap: states[tap] for tap in taps})
                else:
                    leases.release(lease_of(shard))
                bar.update(shard.num_tokens)
        tidy(store, leases)


def tidy(store: StateStore, leases: Leases) -> None:
    """Removes the leases and partial files of killed captures; touches nothing of a living process."""
    leases.living("leases")
    remove_abandoned(store.directory.glob("??/*.partial*"), leases)


def remove_abandoned(partials: Iterable[Path], leases: Leases) -> None:
    """Removes each partial file on whose shard no living process has a lease."""
    for path in partials:
        name = f"leases/{path.name.partition('.')[0]}"
        if leases.acquire(name):
            path.unlink(missing_ok=True)
            leases.release(name)
