"""Writes shards in a thread of its own, so that the next forward does not wait for the disk.

put(shard, states)  -> queues a shard; waits while ``depth`` queued shards are not yet stored
the thread          -> writes one tap after the other, the final residual last: a shard that has it is complete
an error there      -> is raised by the next put, or at the end of the block, in the calling thread
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
    """Calls ``after(shard, num_bytes)`` in the thread when a shard is stored."""

    def __init__(self, store: StateStore, after: Callable[[Shard, int], None] = lambda *_: None, depth: int = 1):
        self.store, self.after = store, after
        self._waiting: queue.Queue[tuple[Shard, Taps] | None] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard writer", daemon=True)
        self._thread.start()

    def put(self, shard: Shard, states: Taps) -> None:
        """Queues a shard; waits for room, and raises the error of an earlier shard."""
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._waiting.put((shard, states))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        """Stores every queued shard, also when the block ends with an error."""
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
