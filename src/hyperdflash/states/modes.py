"""Cache modes: how a run gets its states. One class and one file of conf/cache per mode; the result does not depend on it.

Disk      captures missing states before the training starts, then reads them
Offline   reads only, and loads nothing of the target but its heads
Off       computes states during the training and writes none
Stream    keeps a byte budget on disk; the training, or capture processes beside it, capture shards when they are needed
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from hyperdflash.settings import boolean, natural_int, one_of, positive_int, positive_number
from hyperdflash.states.capture import capture
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import ENGINES, IN_PROCESS, CacheKey
from hyperdflash.states.manifest import NAME as MANIFEST
from hyperdflash.states.readers import CachedStates, LiveStates, ShardedStates
from hyperdflash.states.store import Shard, StateStore
from hyperdflash.states.stream import StreamedStates, supply
from hyperdflash.targets.producer import Producer


@dataclass(frozen=True, kw_only=True)
class CacheMode:
    """``directory`` has a folder per target, dtype, chat mode and engine; a shard's documents share a forward and files."""

    directory: str
    dtype: str
    documents_per_shard: int

    name: ClassVar[str]
    writes: ClassVar[bool] = False  # whether states go to the disk
    loads_target: ClassVar[bool] = True  # whether this process may load the whole target
    patience_s: ClassVar[float] = 0.0  # how long this process waits for states of other processes

    def __post_init__(self):
        one_of("cache.dtype", self.dtype, tuple(CODECS))
        positive_int("cache.documents_per_shard", self.documents_per_shard)

    def for_capture(self) -> Self:
        """Returns the mode of a capture process of this run; ValueError when the mode writes no states."""
        if not self.writes:
            raise ValueError(f"cache={self.name} writes no states: run `python -m src.capture` with cache=disk or cache=stream")
        return self

    def open(self, key: CacheKey) -> StateStore:
        """Opens the store of one target, dtype, chat mode and engine. When only another engine's states are there, prints that
        it leaves them alone; a mode that only reads raises ValueError."""
        name = f"{key.target}-{key.target_dtype}-{key.dtype}-{key.mode}"
        folders = {engine: Path(self.directory) / (name if engine == IN_PROCESS else f"{name}-{engine}") for engine in ENGINES}
        there = [engine for engine, folder in folders.items() if (folder / MANIFEST).exists()]
        if there and key.engine not in there:
            own, other = ("null" if engine == IN_PROCESS else engine for engine in (key.engine, there[0]))
            text = f"{folders[there[0]]} has states of target.engine={other}, which differ in rounding from target.engine={own}"
            if not self.loads_target and not self.writes:
                raise ValueError(f"{text}: to train on them give target.engine={other}, as they were captured")
            print(f"{text}: they are left alone, and target.engine={other} would read them", flush=True)
        return StateStore(folders[key.engine], key, create=self.writes)

    def states(
        self,
        shards: Sequence[Shard],
        store: StateStore,
        producer: Callable[[], Producer],
        layer_ids: Sequence[int] = (),
        *,
        command: str = "python -m src.capture",
        name: str = "data",
    ) -> ShardedStates:
        """Returns the documents of ``shards`` with their states; ``command`` is what an error tells the user to run for missing
        states, ``name`` tells the readers of a process apart."""
        self.fill(shards, store, producer, layer_ids)
        return CachedStates(store, shards, layer_ids)

    def fill(
        self,
        shards: Sequence[Shard],
        store: StateStore,
        producer: Callable[[], Producer],
        layer_ids: Sequence[int] = (),
        *,
        stay: bool = False,
    ) -> None:
        """Does the work of a capture process; with ``stay`` it serves readers until somebody ends it."""
        capture(shards, store, producer, layer_ids=layer_ids)


@dataclass(frozen=True, kw_only=True)
class Disk(CacheMode):
    name: ClassVar[str] = "disk"
    writes: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Offline(CacheMode):
    name: ClassVar[str] = "offline"
    loads_target: ClassVar[bool] = False

    def states(self, shards, store, producer, layer_ids=(), *, command="python -m src.capture", name="data") -> CachedStates:
        missing = sum(map(bool, store.missing_of(shards, layer_ids).values()))
        if missing:
            raise ValueError(
                f"cache=offline makes no states, and {missing} of {len(shards)} shards with the taps of this run are not in "
                f"{store.directory}: run `{command}`"
            )
        return CachedStates(store, shards, layer_ids)


@dataclass(frozen=True, kw_only=True)
class Off(CacheMode):
    name: ClassVar[str] = "off"

    def states(self, shards, store, producer, layer_ids=(), **_) -> LiveStates:
        return LiveStates(store, shards, producer, layer_ids)


@dataclass(frozen=True, kw_only=True)
class Stream(CacheMode):
    """Keeps at most ``budget_gb`` (1e9 bytes) on disk; a reader waits at most ``wait_s`` seconds for a shard. ``in_process``:
    the training captures shards while no capture process runs; ``captures``: processes that it starts instead."""

    budget_gb: float
    wait_s: float
    in_process: bool
    captures: int = 0

    name: ClassVar[str] = "stream"
    writes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        positive_number("cache.budget_gb", self.budget_gb)
        positive_number("cache.wait_s", self.wait_s)
        boolean("cache.in_process", self.in_process)
        natural_int("cache.captures", self.captures)

    @property
    def loads_target(self) -> bool:
        return self.in_process and not self.captures

    @property
    def patience_s(self) -> float:
        return self.wait_s

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gb * 1e9)

    def for_capture(self) -> Self:
        return replace(self, in_process=True, captures=0)  # these options concern the training alone

    def states(self, shards, store, producer, layer_ids=(), *, name="data", **_) -> StreamedStates:
        producer = producer if self.loads_target else None
        settings = {"budget_bytes": self.budget_bytes, "wait_s": self.wait_s, "name": name}
        return StreamedStates(store, shards, layer_ids, producer=producer, **settings)

    def fill(self, shards, store, producer, layer_ids=(), *, stay=False) -> None:
        patience = {"wait_s": math.inf, "linger_s": math.inf} if stay else {"wait_s": self.wait_s}
        supply(shards, store, producer, layer_ids, budget_bytes=self.budget_bytes, **patience)
