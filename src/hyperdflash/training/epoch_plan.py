"""Which documents a training step takes. They follow from the seed and the step alone, so a run can start at any step.

1. epoch      a seeded permutation of the dataset's shards, in windows of WINDOW shards (more where a batch needs it)
2. window     its documents shuffled, then sorted by length and cut into as few global batches as hold them, equally large
3. batches    shuffled within the window
4. part       an equal slice of the global batch per rank and micro-batch

A global batch has at most ``batch_size`` documents, and every document is in one batch per epoch. Shards are read window by
window, so a reader that captures states during the training knows the order in advance.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

WINDOW = 16


class TrainingOrder:
    """The global batches of all epochs. Documents are numbered through all shards; ``lengths[shard][row]`` counts tokens.
    ``max_steps`` ends the order before the last epoch does; ValueError where it lies behind it."""

    def __init__(
        self, lengths: Sequence[Sequence[int]], *, batch_size: int, epochs: int, seed: int, max_steps: int | None = None
    ):
        self.lengths = [length for shard in lengths for length in shard]
        ends = list(accumulate(len(shard) for shard in lengths))
        self.shards = [range(end - len(shard), end) for shard, end in zip(lengths, ends, strict=True)]
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed
        self.window = max(WINDOW, -(-4 * batch_size // len(self.shards[0])))
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._batches = lru_cache(maxsize=2)(self._make_batches)
        self.steps_per_epoch = sum(map(self._num_batches, self._windows(0)))
        self.max_steps = epochs * self.steps_per_epoch if max_steps is None else max_steps
        if self.max_steps > epochs * self.steps_per_epoch:
            raise ValueError(
                f"trainer.max_steps={max_steps} lies behind the {epochs * self.steps_per_epoch} steps of trainer.max_epochs="
                f"{epochs}: leave it out, or raise trainer.max_epochs"
            )

    def __len__(self) -> int:
        return self.max_steps

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Returns the documents of the global batch of ``step``, sorted by length."""
        return self._batches(self.epoch_of(step))[step % self.steps_per_epoch]

    def opens_window(self, step: int) -> bool:
        return self._window_of(step)[1] == 0

    def shards_from(self, step: int) -> list[int]:
        """Returns the shards in the order of use, from the window of ``step`` to the end of the next epoch."""
        epoch = self.epoch_of(step)
        following = self._windows(epoch)[self._window_of(step)[0] :]
        following += self._windows(epoch + 1) if (epoch + 1) * self.steps_per_epoch < self.max_steps else []
        return [shard for window in following for shard in window]

    def _window_of(self, step: int) -> tuple[int, int]:
        """Returns (number of the window within its epoch, number of its batches before ``step``)."""
        before = step % self.steps_per_epoch
        for number, window in enumerate(self._windows(self.epoch_of(step))):
            if before < self._num_batches(window):
                return number, before
            before -= self._num_batches(window)
        raise IndexError(step)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def _make_windows(self, epoch: int) -> list[list[int]]:
        """Returns each window's shards. The last, perhaps short, keeps its place, so that epochs have equally many steps."""
        order = torch.randperm(len(self.shards) - 1, generator=self._generator(epoch)).tolist()
        order.insert(self.seed % len(self.shards), len(self.shards) - 1)
        return [order[start : start + self.window] for start in range(0, len(order), self.window)]

    def _num_batches(self, window: Sequence[int]) -> int:
        return -(-sum(len(self.shards[shard]) for shard in window) // self.batch_size)

    def _make_batches(self, epoch: int) -> list[list[int]]:
        generator = self._generator(-1 - epoch)
        batches = []
        for window in self._windows(epoch):
            documents = [document for shard in window for document in self.shards[shard]]
            documents = [documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()]
            documents.sort(key=self.lengths.__getitem__)
            count = self._num_batches(window)
            batches += [part(documents, i, count) for i in torch.randperm(count, generator=generator).tolist()]
        return batches


def part(items: list[int], index: int, count: int) -> list[int]:
    """Returns slice ``index`` of ``count`` slices whose sizes differ by at most one."""
    return items[index * len(items) // count : (index + 1) * len(items) // count]
