"""The LightningDataModule: cached target states, in length-bucketed batches of a seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from src.cache.capture import CachedStates
from src.cache.store import collate
from src.contracts import TargetStates


class BucketedBatches(Sampler[list[int]]):
    """Batches of documents of similar length in a random order, a function of ``seed`` and the epoch alone.

    ``step()`` is the number of batches this rank has trained on, from which the epoch follows. It is
    asked for with the first batch: Lightning makes the iterator of a resumed run before it restores the run's progress.

    A bucket is 16 batches of the shuffled order, sorted by length; the batches are then shuffled again. Rank ``rank`` of
    ``world_size`` takes every ``world_size``-th batch; all ranks get the same number (the last ones are dropped).
    """

    def __init__(
        self,
        dataset: CachedStates,
        batch_size: int,
        seed: int,
        step: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.seed, self.step, self.rank, self.world_size = seed, step, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.step() // max(1, len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        bucket = 16 * self.batch_size
        batches = []
        for start in range(0, len(order), bucket):
            members = sorted(order[start : start + bucket], key=self.dataset.length)
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for index in shuffled[self.rank :: self.world_size][: len(self)]:
            yield batches[index]


class TargetStatesData(L.LightningDataModule):
    """``train`` and ``validation`` documents."""

    def __init__(self, train: CachedStates, validation: CachedStates, *, batch_size: int, seed: int):
        super().__init__()
        self.train_states, self.validation_states = train, validation
        self.batch_size, self.seed = batch_size, seed

    def transfer_batch_to_device(self, batch: TargetStates, device: torch.device, dataloader_idx: int) -> TargetStates:
        """Frozen dataclasses are not something Lightning moves by itself."""
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return TargetStates(
            **{
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        )

    def train_dataloader(self) -> DataLoader:
        batches = BucketedBatches(
            self.train_states,
            self.batch_size,
            self.seed,
            lambda: self.trainer.global_step,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(self.train_states, batch_sampler=batches, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        by_length = sorted(range(len(self.validation_states)), key=self.validation_states.length)
        mine = by_length[self.trainer.global_rank :: self.trainer.world_size]
        batches = [mine[i : i + 16] for i in range(0, len(mine), 16)]
        return DataLoader(self.validation_states, batch_sampler=batches, collate_fn=collate)
