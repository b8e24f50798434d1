"""How a run meets its cache: one class a mode, one file each in conf/cache. A run's result does not depend on the mode.

Disk      write on a miss, read on a hit; all is captured before training starts
Offline   read only: no target is loaded, only its heads
Off       states live, nothing written
Stream    a byte budget: shards come and go, made here or by capture processes beside the training
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hyperdflash.contracts import Document
from hyperdflash.settings import boolean, natural_int, one_of, positive_int, positive_number
from hyperdflash.states.capture import capture
from hyperdflash.states.datasets import CachedStates, LiveStates, ShardedStates
from hyperdflash.states.manifest import ENGINES, IN_PROCESS
from hyperdflash.states.manifest import NAME as MANIFEST
from hyperdflash.states.store import DTYPES, CacheKey, StateStore, make_shards
from hyperdflash.states.stream import StreamedStates, supply
from hyperdflash.targets.producer import Producer


@dataclass(frozen=True, kw_only=True)
class CacheMode:
    """``directory`` holds a folder a target, dtype, chat mode and engine; ``documents_per_shard`` run in one forward and are
    stored together."""

    directory: str
    dtype: str
    documents_per_shard: int

    name: ClassVar[str]

    def __post_init__(self):
        one_of("cache.dtype", self.dtype, tuple(DTYPES))
        positive_int("cache.documents_per_shard", self.documents_per_shard)

    @property
    def loads_target(self) -> bool:
        """Whether this process may load the whole target."""
        return True

    @property
    def patience_s(self) -> float:
        """How long to wait for what other processes make."""
        return 0.0

    def open(self, key: CacheKey) -> StateStore:
        """The store of one target, dtype, chat mode and engine. ValueError where it may not be made and there are states by
        another engine; said where it will be made beside those."""
        name = f"{key.target}-{key.target_dtype}-{key.dtype}-{key.mode}"
        folders = {engine: Path(self.directory) / (name if engine == IN_PROCESS else f"{name}-{engine}") for engine in ENGINES}
        there = [engine for engine, folder in folders.items() if (folder / MANIFEST).exists()]
        if there and key.engine not in there:
            own, other = ("null" if engine == IN_PROCESS else engine for engine in (key.engine, there[0]))
            text = f"{folders[there[0]]} has states of target.engine={other}, which differ in rounding from target.engine={own}"
            if self.name == "offline":
                raise ValueError(f"{text}: to train on them give target.engine={other}, as they were captured")
            print(f"{text}: they are left alone, and target.engine={other} would read them", flush=True)
        return StateStore(folders[key.engine], key, create=self.name in ("disk", "stream"))

    def states(
        self,
        documents: Sequence[Document],
        store: StateStore,
        producer: Callable[[], Producer],
        layer_ids: Sequence[int] = (),
        *,
        command: str = "python -m src.capture",
        name: str = "data",
    ) -> ShardedStates:
        """The documents with their states. ``command`` fills a cache that lacks some; ``name`` tells data sets apart."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Disk(CacheMode):
    name: ClassVar[str] = "disk"

    def states(self, documents, store, producer, layer_ids=(), *, command="", name="data") -> CachedStates:
        shards = capture(documents, store, producer, layer_ids=layer_ids, documents_per_shard=self.documents_per_shard)
        return CachedStates(store, shards, layer_ids)


@dataclass(frozen=True, kw_only=True)
class Offline(CacheMode):
    name: ClassVar[str] = "offline"

    @property
    def loads_target(self) -> bool:
        return False

    def states(self, documents, store, producer, layer_ids=(), *, command="python -m src.capture", name="data") -> CachedStates:
        shards = make_shards(documents, self.documents_per_shard)
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

    def states(self, documents, store, producer, layer_ids=(), *, command="", name="data") -> LiveStates:
        shards = make_shards(documents, self.documents_per_shard)
        return LiveStates(store, shards, producer, layer_ids)


@dataclass(frozen=True, kw_only=True)
class Stream(CacheMode):
    """``budget_gb`` decimal gigabytes on disk; ``wait_s`` how long a reader waits for a shard; ``in_process`` whether the
    training process makes shards itself while no capture process is there; ``captures`` that it starts beside itself, and then
    makes none (launch/captures.py); ``capture_gpus`` theirs, which the training's ranks then do not see."""

    budget_gb: float
    wait_s: float
    in_process: bool
    captures: int = 0
    capture_gpus: Sequence[int | str] | None = None

    name: ClassVar[str] = "stream"

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

    def states(self, documents, store, producer, layer_ids=(), *, command="", name="data") -> StreamedStates:
        return StreamedStates(
            store,
            make_shards(documents, self.documents_per_shard),
            layer_ids,
            producer=producer if self.loads_target else None,
            budget_bytes=self.budget_bytes,
            wait_s=self.wait_s,
            name=name,
        )

    def supply(self, documents: Sequence[Sequence[Document]], store, producer, layer_ids=(), *, stay: bool = False) -> int:
        """Make shards of several data sets as readers need them; returns how many were made when the last reader is gone.
        ``stay``: never."""
        shards = [shard for group in documents for shard in make_shards(group, self.documents_per_shard)]
        patience = {"wait_s": math.inf, "linger_s": math.inf} if stay else {"wait_s": self.wait_s}
        return supply(shards, store, producer, layer_ids, budget_bytes=self.budget_bytes, **patience)
