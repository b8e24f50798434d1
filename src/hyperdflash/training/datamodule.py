"""The LightningDataModule: what one rank computes in one step, from cached target states.

    step -> global batch (training/epoch_plan.py) -> this rank's micro-batches: states and blocks
                                            -> counts of the whole global batch, from its masks alone

Every rank draws the blocks of every document of the global batch, each from the seed, the step and the document's id. So each
rank knows the counts that divide the sums before the first forward and without communication, and neither counts nor blocks
depend on the number of ranks and micro-batches.
"""

from __future__ import annotations

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
from torch.utils.data import DataLoader, Dataset, Sampler

from hyperdflash.contracts import Blocks, Document, TargetStates
from hyperdflash.objectives.objective import LossCounts
from hyperdflash.stable_hash import content_hash
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import collate
from hyperdflash.training.epoch_plan import TrainingOrder, part

VALIDATION_BATCH = 16
DrawBlocks = Callable[[Document, torch.Generator], Blocks]
Count = Callable[[Blocks], LossCounts]
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


class TrainingSteps(Dataset):
    """Maps a step to the StepBatch of one rank of ``world_size``, in ``accumulate`` micro-batches."""

    def __init__(
        self,
        states: ShardedStates,
        order: TrainingOrder,
        draw: DrawBlocks,
        count: Count,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        self.states, self.order, self.draw, self.count = states, order, draw, count
        self.seed, self.rank, self.world_size, self.accumulate = seed, rank, world_size, accumulate

    def __len__(self) -> int:
        return len(self.order)

    def ids(self, step: int) -> tuple[str, ...]:
        """Returns the ids of the documents in the global batch of ``step``."""
        return tuple(self.states.document(index).id for index in self.order.batch(step))

    def __getitem__(self, step: int) -> StepBatch:
        members = self.order.batch(step)
        blocks = {index: self._blocks(step, self.states.document(index)) for index in members}
        counts = reduce(add, (self.count(blocks[index]) for index in members))
        parts = [
            part(members, self.rank * self.accumulate + i, self.world_size * self.accumulate) for i in range(self.accumulate)
        ]
        micro = tuple(self._micro_batch(own, blocks) if own else self._empty(members[0], blocks) for own in parts)
        return StepBatch(micro, counts, self.ids(step))

    def _blocks(self, step: int, document: Document) -> Blocks:
        seed = int(content_hash(f"{self.seed}\x00{step}\x00{document.id}"), 16) >> 1
        return self.draw(document, torch.Generator().manual_seed(seed))

    def _micro_batch(self, members: list[int], blocks: dict[int, Blocks]) -> MicroBatch:
        return MicroBatch(collate([self.states[i] for i in members]), stack_blocks([blocks[i] for i in members]))

    def _empty(self, member: int, blocks: dict[int, Blocks]) -> MicroBatch:
        """Returns the batch of a rank without a document, which takes part in the step with every mask False."""
        drawn = blocks[member]
        nothing = {name: torch.zeros_like(getattr(drawn, name)) for name in ("anchor_mask", "label_mask")}
        return MicroBatch(unsupervised(self.states[member]), replace(drawn, **nothing))


class TargetStatesData(L.LightningDataModule):
    """Loaders of ``train`` and ``validation`` documents; training starts at step ``first_step``."""

    def __init__(
        self,
        train: ShardedStates,
        validation: ShardedStates,
        *,
        draw: DrawBlocks,
        count: Count,
        batch_size: int,
        accumulate: int,
        epochs: int,
        world_size: int,
        seed: int,
        first_step: int = 0,
    ):
        super().__init__()
        self.train_states, self.validation_states = train, validation
        self.order = TrainingOrder(train.lengths, batch_size=batch_size * world_size * accumulate, epochs=epochs, seed=seed)
        self.draw, self.count, self.accumulate, self.seed, self.first_step = draw, count, accumulate, seed, first_step
        self._reading = Lock()

    def steps(self, rank: int, world_size: int) -> TrainingSteps:
        shared = {"seed": self.seed, "rank": rank, "world_size": world_size, "accumulate": self.accumulate}
        return TrainingSteps(self.train_states, self.order, self.draw, self.count, **shared)

    def transfer_batch_to_device(self, batch: T, device: torch.device, dataloader_idx: int) -> T:
        return on_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))

    def train_dataloader(self) -> DataLoader:
        steps = self.steps(self.trainer.global_rank, self.trainer.world_size)
        sampler = FromStep(self.order, self.first_step, self.train_states.prefetch)
        return self._ahead(DataLoader(steps, sampler=sampler, batch_size=None, collate_fn=as_it_is))

    def val_dataloader(self) -> DataLoader:
        """Validates every document on one rank; a rank without one replays an unsupervised text, which has no rounds."""
        lengths = [length for shard in self.validation_states.lengths for length in shard]
        by_length = sorted(range(len(self.validation_states)), key=lengths.__getitem__)
        mine = by_length[self.trainer.global_rank :: self.trainer.world_size]
        batches = [mine[i : i + VALIDATION_BATCH] for i in range(0, len(mine), VALIDATION_BATCH)]
        if not mine:
            with self._reading:
                nothing = unsupervised(self.validation_states[by_length[0]])
            return DataLoader([nothing], batch_size=None, collate_fn=as_it_is)
        return self._ahead(DataLoader(self.validation_states, batch_sampler=batches, collate_fn=collate))

    def _ahead(self, batches: DataLoader) -> DataLoader | ReadAhead:
        """Reads ahead while a GPU computes; on the CPU, reading ahead would slow the computation down."""
        device = self.trainer.strategy.root_device
        return ReadAhead(batches, device, self._reading) if device.type == "cuda" else batches


class FromStep(Sampler[int]):
    """Yields steps ``first``, ``first`` + 1, ... of ``order``; its length is that of the whole run, which Lightning counts by.

    Calls ``prefetch`` at every window with the next shards and the number of shards per window.
    """

    def __init__(self, order: TrainingOrder, first: int, prefetch: Callable[[list[int], int], None]):
        self.order, self.first, self.prefetch = order, first, prefetch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first, len(self.order)):
            if step == self.first or self.order.opens_window(step):
                self.prefetch(self.order.shards_from(step), self.order.window)
            yield step


class ReadAhead(Sized, Iterable[T]):
    """Yields ``batches`` in order and reads the next one in a thread meanwhile; for a GPU, into pinned memory.

    Loaders that share ``lock`` read one after the other, because one thread at a time may use a store or a target. An error of
    the thread is raised where its batch is needed.
    """

    END = object()

    def __init__(self, batches: DataLoader, device: torch.device, lock: Lock):
        self.batches, self.device, self.lock = batches, device, lock

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        source = iter(self.batches)
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
    """Returns ``states`` with no position supervised."""
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


def as_it_is(batch: T) -> T:
    return batch
