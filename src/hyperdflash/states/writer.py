"""Writes shards in a thread of its own, so that the next forward does not wait for the disk.

put(shard, states)  -> hands a shard over; waits while ``depth`` shards are handed over and not yet stored
the thread          -> store.write(shard, tap by tap), the final residual last: a shard that has it is complete
an error there      -> raised by the next put, or at the end of the block, in the calling thread
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from hyperdflash.states.store import Shard, StateStore

Taps = Mapping[int | None, Tensor]


def write_taps(store: StateStore, shard: Shard, states: Taps) -> int:
    """Stores taps [N, M, D] of one shard; returns the number of bytes."""
    return sum(store.write(shard, states[tap], tap) for tap in sorted(states, key=lambda tap: tap is None))


class ShardWriter:
    """Calls ``after(shard, written)`` in the thread once a shard is stored, ``written`` in bytes."""

    def __init__(self, store: StateStore, after: Callable[[Shard, int], None] = lambda *_: None, depth: int = 1):
        self.store, self.after = store, after
        self._waiting: queue.Queue[tuple[Shard, Taps] | None] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard writer", daemon=True)
        self._thread.start()

    def put(self, shard: Shard, states: Taps) -> None:
        """Hands a shard over; waits for room, and raises the error of an earlier shard."""
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._waiting.put((shard, states))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        """Stores every shard that was handed over, whatever ended the block."""
        self._waiting.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                if self._error is None:
                    self.after(item[0], write_taps(self.store, *item))
            except BaseException as error:
                self._error = error
            finally:
                self._room.release()
