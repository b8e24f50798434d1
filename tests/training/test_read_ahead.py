"""What a GPU's training reads in a thread is what the CPU's reads as it goes, and its errors arrive."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator

import pytest
import torch

from hyperdflash.identity import train_run_dir
from hyperdflash.states.readers import CachedStates
from hyperdflash.training.datamodule import ReadAhead, TargetStatesData
from hyperdflash.training.job import train

CPU = torch.device("cpu")


class Numbers:
    """0, 1, ... 5 with an error at ``bad``; ``read`` and ``threads`` record what was read and where."""

    def __init__(self, bad: int | None = None):
        self.bad, self.read, self.threads = bad, [], set()

    def batches(self) -> Iterator[int]:
        for number in range(6):
            self.threads.add(threading.current_thread())
            if number == self.bad:
                raise ValueError("row 3 is damaged")
            self.read.append(number)
            yield number


def test_one_batch_is_read_ahead_in_another_thread():
    numbers, lock = Numbers(), threading.Lock()
    ahead = ReadAhead(numbers.batches, 6, CPU, lock)
    assert len(ahead) == 6
    for _ in range(2):
        seen = []
        for number in ahead:
            seen.append(number)
            with lock:  # nothing is being read
                assert len(numbers.read) - number in (1, 2)
        assert seen == list(range(6))
        numbers.read.clear()
    assert threading.main_thread() not in numbers.threads


def test_a_reading_error_is_raised_where_its_batch_is_needed():
    seen = []
    with pytest.raises(ValueError, match="row 3 is damaged"):
        for number in ReadAhead(Numbers(bad=3).batches, 6, CPU, threading.Lock()):
            seen.append(number)
    assert seen == [0, 1, 2]


def test_loaders_with_one_lock_take_turns():
    lock = threading.Lock()
    with lock:
        numbers = Numbers()
        batches = iter(ReadAhead(numbers.batches, 6, CPU, lock))
        taken = []
        waiting = threading.Thread(target=lambda: taken.append(next(batches)))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive() and not numbers.read
    waiting.join(10)
    assert taken == [0]


def test_a_training_that_reads_ahead_is_the_same(runs_here, prepared_overrides, compose_config, tmp_path, monkeypatch):
    def curve() -> list[tuple[str, ...]]:
        with (train_run_dir(config) / "metrics.csv").open() as file:
            return [tuple(v for k, v in row.items() if "per_s" not in k and "time" not in k) for row in csv.DictReader(file)]

    config = compose_config("train", prepared_overrides)
    runs_here(tmp_path / "as it goes")
    train(config)
    found = curve()
    runs_here(tmp_path / "ahead")
    readers = set()
    get = CachedStates.__getitem__
    monkeypatch.setattr(
        CachedStates, "__getitem__", lambda data, i: readers.add(threading.current_thread().name) or get(data, i)
    )
    ahead = lambda data, batches, length: ReadAhead(batches, length, CPU, data._reading)  # noqa: E731
    monkeypatch.setattr(TargetStatesData, "_loader", ahead)
    train(config)
    assert curve() == found and len(found) > 18
    assert readers == {"read ahead"}
