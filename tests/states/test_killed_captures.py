"""Captures that are killed at random moments leave the files of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyperdflash.contracts import Document
from hyperdflash.states.capture import capture
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer

PER_SHARD = 2


def make_documents(count: int, mean: int, vocab_size: int) -> list[Document]:
    """Returns documents of random tokens, each of a quarter to seven quarters of ``mean``."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean // 4, 7 * mean // 4 + 1, (count,), generator=generator).tolist()
    tokens = [torch.randint(8, vocab_size, (length,), generator=generator) for length in lengths]
    return [Document(f"document-{i}", "code", ids, torch.ones(len(ids), dtype=torch.bool)) for i, ids in enumerate(tokens)]


class Counted:
    """A producer that logs each forward in a file, which survives a kill."""

    def __init__(self, producer: Producer, log: Path):
        self.producer, self.log = producer, log
        self.fingerprint, self.where = producer.fingerprint, producer.where

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        with self.log.open("a") as file:
            file.write("x")
        return self.producer.states(sequences, layer_ids)


def content(directory: Path) -> dict[str, bytes]:
    """Reads every file of a cache."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def kill_captures(
    kills: int, key: CacheKey, producer: Callable[[], Producer], documents: Sequence[Document], scratch: Path, seed: int = 0
) -> dict:
    """Kills captures; AssertionError where a capture fails without a kill.

    Returns counts: all ``forwards``, and the ``needed`` ones of ``captures`` undisturbed captures; ``allowed`` adds two per
    kill, for the shard in the forward and the one in the writer.
    """
    fork = multiprocessing.get_context("fork")
    moments = random.Random(seed)
    log, cache = scratch / "log", scratch / "cache"

    def work(directory: Path) -> None:
        made_by = Counted(producer(), log)
        store = StateStore(directory, key)
        capture(make_shards(documents, PER_SHARD), store, lambda: made_by, layer_ids=(0,))

    def begin(directory: Path) -> multiprocessing.Process:
        process = fork.Process(target=work, args=(directory,))
        process.start()
        return process

    started = time.monotonic()
    undisturbed = begin(scratch / "undisturbed")
    undisturbed.join()
    duration = time.monotonic() - started
    assert undisturbed.exitcode == 0
    expected = content(scratch / "undisturbed")
    shards = len(make_shards(documents, PER_SHARD))
    log.write_text("")

    done = captures = different = 0
    while done < kills:
        processes = [begin(cache) for _ in range(1 + captures % 2)]
        while True:
            victim = moments.choice(processes)
            victim.join(moments.uniform(0, duration))
            if done < kills and victim.is_alive():
                victim.kill()
                done += 1
                if len(processes) == 1:
                    victim.join()
                    processes = [begin(cache)]
                    continue
            for process in processes:
                process.join()
                assert process.exitcode == 0 or process is victim, f"a capture ended with {process.exitcode}"
            break
        found = content(cache)
        different += sum(found.get(name) != expected.get(name) for name in {*found, *expected})
        shutil.rmtree(cache)
        captures += 1
    needed = shards * captures
    counts = {"forwards": log.stat().st_size, "needed": needed, "allowed": needed + 2 * done, "different_files": different}
    return {"kills": done, "captures": captures, "shards": shards, **counts}


def test_killed_captures_leave_the_files_of_an_undisturbed_one(tmp_path, mini_target):
    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    wanted = CacheKey(target=target.fingerprint, target_dtype="fp32", num_paths=4, hidden_size=32, dtype="bf16")
    found = kill_captures(5, wanted, lambda: InProcess(target), make_documents(16, 40, 320), tmp_path)
    assert found["kills"] == 5 and found["different_files"] == 0
    assert found["needed"] <= found["forwards"] <= found["allowed"]
