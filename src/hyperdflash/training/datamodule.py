"""The LightningDataModule: what one rank computes in one step, from cached target states.

1. step            -> documents of the global batch (training/epoch_plan.py)
2. global batch    -> blocks of every document, and their counts, from masks alone
3. micro-batches   -> this rank's documents: states and blocks

Every rank draws the blocks of every document of the global batch, each from the seed, the step and the document's id. So each
rank knows the counts that divide the sums before the first forward and without communication, and neither counts nor blocks
depend on the number of ranks and micro-batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from operator import add
from threading import Lock, Thread
from typing import TypeVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.contracts import Blocks, Document, TargetStates
from hyperdflash.objectives.objective import LossCounts
from hyperdflash.stable_hash import content_hash
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import collate
from hyperdflash.training.epoch_plan import TrainingOrder, part

VALIDATION_BATCH = 16
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward and backward pass, with the blocks drawn in them."""

    states: TargetStates
    blocks: Blocks


@dataclass(frozen=True)
class StepBatch:
    """``micro`` batches of this rank; ``counts`` and ``ids`` of the global batch, the same on every rank."""

    micro: tuple[MicroBatch, ...]
    counts: LossCounts
    ids: tuple[str, ...]


class TargetStatesData(L.LightningDataModule):
    """Loaders of both splits. A step has ``accumulate`` micro-batches per rank; training starts at step ``first_step``."""

    def __init__(
        self,
        train: ShardedStates,
        validation: ShardedStates,
        order: TrainingOrder,
        draw: Callable[[Document, torch.Generator], Blocks],
        count: Callable[[Blocks], LossCounts],
        *,
        seed: int,
        accumulate: int,
        first_step: int = 0,
    ):
        super().__init__()
        self.train_states, self.validation_states, self.order, self.draw, self.count = train, validation, order, draw, count
        self.seed, self.accumulate, self.first_step = seed, accumulate, first_step
        self._reading = Lock()

    def ids(self, step: int) -> tuple[str, ...]:
        return tuple(self.train_states.document(index).id for index in self.order.batch(step))

    def batch(self, step: int, rank: int, world_size: int) -> StepBatch:
        members, num_parts = self.order.batch(step), world_size * self.accumulate
        blocks = {index: self._blocks(step, self.train_states.document(index)) for index in members}
        counts = reduce(add, map(self.count, blocks.values()))
        parts = [part(members, rank * self.accumulate + i, num_parts) for i in range(self.accumulate)]
        return StepBatch(tuple(self._micro_batch(own, blocks) for own in parts), counts, self.ids(step))

    def _blocks(self, step: int, document: Document) -> Blocks:
        seed = int(content_hash(f"{self.seed}\x00{step}\x00{document.id}"), 16) >> 1
        return self.draw(document, torch.Generator().manual_seed(seed))

    def _micro_batch(self, members: list[int], blocks: dict[int, Blocks]) -> MicroBatch:
        """Reads the states of ``members``; without one, takes another document with every mask False."""
        if members:
            return MicroBatch(collate([self.train_states[i] for i in members]), stack_blocks([blocks[i] for i in members]))
        index, drawn = next(iter(blocks.items()))
        masks = {name: torch.zeros_like(getattr(drawn, name)) for name in ("anchor_mask", "label_mask")}
        return MicroBatch(unsupervised(self.train_states[index]), replace(drawn, **masks))

    def transfer_batch_to_device(self, batch: T, device: torch.device, dataloader_idx: int) -> T:
        return on_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))

    def train_dataloader(self) -> Iterable[StepBatch]:
        """Loads the steps from ``first_step`` on; its length is that of the whole run, which Lightning counts by."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size

        def batches() -> Iterator[StepBatch]:
            for step in range(self.first_step, len(self.order)):
                if step == self.first_step or self.order.opens_window(step):
                    self.train_states.prefetch(self.order.shards_from(step), self.order.window)
                yield self.batch(step, rank, world_size)

        return self._loader(batches, len(self.order))

    def val_dataloader(self) -> Iterable[TargetStates]:
        """Loads every document on one rank; a rank without one replays an unsupervised text, which has no rounds."""
        states = self.validation_states
        lengths = [length for shard in states.lengths for length in shard]
        by_length = sorted(range(len(states)), key=lengths.__getitem__)
        mine = by_length[self.trainer.global_rank :: self.trainer.world_size]
        if not mine:
            return self._loader(lambda: (unsupervised(states[index]) for index in by_length[:1]), 1)
        parts = [mine[i : i + VALIDATION_BATCH] for i in range(0, len(mine), VALIDATION_BATCH)]
        return self._loader(lambda: (collate([states[index] for index in own]) for own in parts), len(parts))

    def _loader(self, batches: Callable[[], Iterator[T]], length: int) -> Iterable[T]:
        """Reads ahead while a GPU computes; on the CPU, reading ahead would slow the computation down."""
        device = self.trainer.strategy.root_device
        return ReadAhead(batches, length, device, self._reading) if device.type == "cuda" else Loader(batches, length)


@dataclass
class Loader(Sized, Iterable[T]):
    """Yields the ``length`` items of ``batches()``, anew for every pass."""

    batches: Callable[[], Iterator[T]]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[T]:
        return self.batches()


@dataclass
class ReadAhead(Loader[T]):
    """Reads the next batch in a thread meanwhile; for a GPU, into pinned memory. Loaders that share ``lock`` take turns: one
    thread at a time may use a store or a target. An error of the thread is raised where its batch is needed."""

    device: torch.device
    lock: Lock

    END = object()

    def __iter__(self) -> Iterator[T]:
        source = self.batches()
        pending = self._start(source)
        while (batch := pending.result()) is not self.END:
            pending = self._start(source)
            yield batch

    def _start(self, source: Iterator[T]) -> Future:
        future = Future()

        def read() -> None:
            try:
                with self.lock:
                    batch = next(source, self.END)
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a new thread uses device 0
                    batch = on_tensors(batch, Tensor.pin_memory)
                future.set_result(batch)
            except BaseException as error:
                future.set_exception(error)

        Thread(target=read, name="read ahead", daemon=True).start()
        return future


def stack_blocks(rows: list[Blocks]) -> Blocks:
    """Stacks blocks of one document each to [B, A, ...] with the largest A; padding is masked."""
    size = max(row.anchors.shape[1] for row in rows)

    def stacked(name: str) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.cat([F.pad(v, (0, 0) * (v.ndim - 2) + (0, size - v.shape[1])) for v in values])

    return Blocks(**{field.name: stacked(field.name) for field in fields(Blocks)})


def unsupervised(states: TargetStates) -> TargetStates:
    return replace(states, loss_mask=torch.zeros_like(states.loss_mask))


def on_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Applies ``function`` to the tensors in dataclasses and tuples; Lightning does not look into frozen dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(on_tensors(inner, function) for inner in value)
    if is_dataclass(value):
        return replace(value, **{f.name: on_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value
