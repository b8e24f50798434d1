"""How a run gets its states: one class per mode, one file each in conf/cache. The result of a run does not depend on the mode.

Disk      captures what is missing before the training starts, and reads it
Offline   reads only: loads no target but its heads
Off       computes states while it trains and writes none
Stream    keeps a byte budget on disk: shards come and go, captured here or by capture processes beside the training
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from hyperdflash.settings import boolean, natural_int, one_of, positive_int, positive_number
from hyperdflash.states.capture import capture
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import ENGINES, IN_PROCESS, CacheKey
from hyperdflash.states.manifest import NAME as MANIFEST
from hyperdflash.states.readers import CachedStates, LiveStates, ShardedStates
from hyperdflash.states.store import Shard, StateStore
from hyperdflash.states.stream import StreamedStates, supply

if TYPE_CHECKING:
    from hyperdflash.targets.producer import Producer


@dataclass(frozen=True, kw_only=True)
class CacheMode:
    """``directory`` holds a folder per target, dtype, chat mode and engine; ``documents_per_shard`` documents run in one
    forward and are stored together."""

    directory: str
    dtype: str
    documents_per_shard: int

    name: ClassVar[str]
    writes: ClassVar[bool] = False  # to the disk
    loads_target: ClassVar[bool] = True  # whether this process may load the whole target
    patience_s: ClassVar[float] = 0.0  # how long to wait for the work of other processes

    def __post_init__(self):
        one_of("cache.dtype", self.dtype, tuple(CODECS))
        positive_int("cache.documents_per_shard", self.documents_per_shard)

    def for_capture(self) -> Self:
        """The mode of a capture process of this run; ValueError when the mode writes nothing."""
        if not self.writes:
            raise ValueError(f"cache={self.name} writes nothing: run `python -m src.capture` with cache=disk or cache=stream")
        return self

    def open(self, key: CacheKey) -> StateStore:
        """The store of one target, dtype, chat mode and engine.

        ValueError: the mode does not write and only another engine's states are there. A mode that writes prints that it leaves
        those alone.
        """
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
        """The documents of ``shards`` with their states. ``command`` captures missing ones; ``name`` tells readers apart."""
        raise NotImplementedError

    def fill(
        self,
        shards: Sequence[Shard],
        store: StateStore,
        producer: Callable[[], Producer],
        layer_ids: Sequence[int] = (),
        *,
        stay: bool = False,
    ) -> None:
        """The work of a capture process. ``stay``: it serves readers until somebody ends it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Disk(CacheMode):
    name: ClassVar[str] = "disk"
    writes: ClassVar[bool] = True

    def states(self, shards, store, producer, layer_ids=(), *, command="", name="data") -> CachedStates:
        capture(shards, store, producer, layer_ids=layer_ids)
        return CachedStates(store, shards, layer_ids)

    def fill(self, shards, store, producer, layer_ids=(), *, stay=False) -> None:
        capture(shards, store, producer, layer_ids=layer_ids)


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

    def states(self, shards, store, producer, layer_ids=(), *, command="", name="data") -> LiveStates:
        return LiveStates(store, shards, producer, layer_ids)


@dataclass(frozen=True, kw_only=True)
class Stream(CacheMode):
    """``budget_gb`` decimal gigabytes on disk; a reader waits ``wait_s`` seconds for a shard.

    ``in_process``: the training process captures shards itself while there is no capture process. ``captures``: number of
    capture processes that the training starts; it then captures none itself (launch/captures.py). ``capture_gpus``: their GPUs,
    which the ranks of the training then do not see.
    """

    budget_gb: float
    wait_s: float
    in_process: bool
    captures: int = 0
    capture_gpus: Sequence[int | str] | None = None

    name: ClassVar[str] = "stream"
    writes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        positive_number("cache.budget_gb", self.budget_gb)
        positive_number("cache.wait_s", self.wait_s)
        boolean("cache.in_process", self.in_process)
        natural_int("cache.captures", self.captures)
        gpus = self.capture_gpus
        if gpus is not None and (isinstance(gpus, str) or not isinstance(gpus, Sequence) or not self.captures):
            raise ValueError(
                f"cache.capture_gpus must be a list of GPUs for cache.captures of at least 1, got {gpus} for "
                f"cache.captures={self.captures}"
            )

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
        return replace(self, in_process=True, captures=0, capture_gpus=None)  # whatever the training says

    def states(self, shards, store, producer, layer_ids=(), *, command="", name="data") -> StreamedStates:
        producer = producer if self.loads_target else None
        settings = {"budget_bytes": self.budget_bytes, "wait_s": self.wait_s, "name": name}
        return StreamedStates(store, shards, layer_ids, producer=producer, **settings)

    def fill(self, shards, store, producer, layer_ids=(), *, stay=False) -> None:
        patience = {"wait_s": math.inf, "linger_s": math.inf} if stay else {"wait_s": self.wait_s}
        supply(shards, store, producer, layer_ids, budget_bytes=self.budget_bytes, **patience)
