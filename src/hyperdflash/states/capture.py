"""Fills a store with target states: any number of processes at the same time capture every shard once.

    1. shards                  the same list in every process
    2. missing shard           -> this process leases it (hyperdflash/leases.py), or tries the next when another process has it
    3. one forward per shard   -> taps [N, M, D], which a thread writes while the next forward runs
    4. stored shard            -> its lease is released

After a kill, at most two shards are captured again: the one in its forward and the one being written. Another process takes
over their leases.
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
    """Computes the states of a shard as one right-padded batch, rounded as in a cache with ``codec``; touches no disk."""
    taps = {tap: rounded(value, codec) for tap, value in producer.states(shard.sequences, layer_ids).items()}
    final, *layers = (taps[tap].split(shard.lengths) for tap in (None, *layer_ids))
    rows = zip(shard.documents, final, zip(*layers, strict=True) if layers else [()] * len(shard.documents), strict=True)
    return collate([states_of(document, *states, layer_ids) for document, *states in rows])


def lease_of(shard: Shard) -> str:
    """Returns the name of the lease on a shard."""
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
    """Captures missing taps and returns when ``store`` holds every tap of every shard, from this process or from others.

    Calls ``producer()`` only when a tap is missing. ``stale_s`` is that of hyperdflash.leases.Leases, in seconds.
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
            passed, reported = 0, time.monotonic()  # consecutive shards that other processes have leased
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
    """Removes the leases and partial files of killed captures; leaves those of living processes."""
    leases.living("leases")
    remove_abandoned(store.directory.glob("??/*.partial*"), leases)


def remove_abandoned(partials: Iterable[Path], leases: Leases) -> None:
    """Removes each partial file whose shard no living process has leased."""
    for path in partials:
        name = f"leases/{path.name.partition('.')[0]}"
        if leases.acquire(name):
            path.unlink(missing_ok=True)
            leases.release(name)
