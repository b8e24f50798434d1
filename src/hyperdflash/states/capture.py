"""Fill a store with target states: every shard once, by however many processes work on it at the same time.

    1. documents            -> shards, the same in every process
    2. a shard not stored   -> claim it (states/leases.py); one that another process has is looked at again later
    3. one forward a shard  -> taps [N, M, D], written by a thread while the next forward runs
    4. stored               -> the claim goes

A killed capture repeats the shard in its forward and the one being written, nothing else; its claims pass on to who comes next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from hyperdflash.contracts import Document, TargetStates
from hyperdflash.states.codecs import Codec, rounded
from hyperdflash.states.datasets import checked
from hyperdflash.states.leases import Board
from hyperdflash.states.store import Shard, StateStore, collate, make_shards, states_of
from hyperdflash.states.writer import ShardWriter
from hyperdflash.targets.producer import Producer

POLL_S = 0.2
TELL_S = 20.0


def live_states(producer: Producer, shard: Shard, layer_ids: Sequence[int], codec: Codec) -> TargetStates:
    """A shard's states as a cache with ``codec`` would give them, without one: one right-padded batch."""
    taps = {tap: rounded(value, codec) for tap, value in producer.states(shard.sequences, layer_ids).items()}
    lengths = [len(document.input_ids) for document in shard.documents]
    final, *layers = (taps[tap].split(lengths) for tap in (None, *layer_ids))
    rows = zip(shard.documents, final, zip(*layers, strict=True) if layers else [()] * len(lengths), strict=True)
    return collate([states_of(document, *states, layer_ids) for document, *states in rows])


def claim_of(shard: Shard) -> str:
    """Name of a shard's claim on the cache's board."""
    return f"claims/{shard.name}"


def capture(
    documents: Sequence[Document],
    store: StateStore,
    producer: Callable[[], Producer],
    *,
    layer_ids: Sequence[int] = (),
    documents_per_shard: int = 16,
    progress: bool = True,
    stale_s: float = 60.0,
) -> list[Shard]:
    """Make sure that every document's taps are in ``store``; returns when they are, whoever made them. ``producer()`` is
    called only if a tap is missing; ``stale_s`` as in hyperdflash.states.leases.Board."""
    shards = make_shards(documents, documents_per_shard)
    missing = store.missing_of(shards, layer_ids)
    waiting = deque(shard for shard in shards if missing[shard.name])
    if not waiting:
        if progress:
            print(f"states: all {sum(s.num_tokens for s in shards):,} tokens are in {store.directory}", flush=True)
        return shards
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
        board.release(claim_of(shard))

    with bar, Board(store.directory, stale_s) as board:
        tidy(store, board)
        with ShardWriter(store, stored) as writer:
            passed, told = 0, time.monotonic()  # shards in a row that others have
            while waiting:
                shard = waiting.popleft()
                taps = store.missing(shard, layer_ids)
                if taps and not board.claim(claim_of(shard)):
                    waiting.append(shard)
                    passed += 1
                    if passed >= len(waiting):
                        passed = 0
                        if progress and time.monotonic() - told > TELL_S:
                            told = time.monotonic()
                            bar.write(f"waiting for {len(waiting)} shards; {board.owner(claim_of(shard))} has one of them")
                        time.sleep(POLL_S)
                    continue
                passed = 0
                if taps and (taps := store.missing(shard, layer_ids)):  # it may have been stored just before the claim
                    states = made_by.states(shard.sequences, [tap for tap in taps if tap is not None])
                    writer.put(shard, {tap: states[tap] for tap in taps})
                else:
                    board.release(claim_of(shard))
                bar.update(shard.num_tokens)
        tidy(store, board)
    return shards


def tidy(store: StateStore, board: Board) -> None:
    """Remove what killed captures left behind, claims and partial files; nothing of a living process is touched."""
    board.living("claims")
    remove_abandoned(store.directory.glob("??/*.partial*"), board)


def remove_abandoned(partials: Iterable[Path], board: Board) -> None:
    """Remove those of the partial files whose shard no living process claims."""
    for path in partials:
        name = f"claims/{path.name.partition('.')[0]}"
        if board.claim(name):
            path.unlink(missing_ok=True)
            board.release(name)
