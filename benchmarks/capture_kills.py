"""Kill captures at random moments, resume them, and compare what they leave with an undisturbed capture, byte for byte.

    python -m benchmarks.capture_kills --kills 100 --out runs/capture-kills

Rounds alternate: one process, killed again and again until it gets through; then two on one cache, of which one is killed and
the other takes over its work. Killed is with SIGKILL, at a moment drawn uniformly over the time of an undisturbed capture.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.capture import make_documents
from hyperdflash.cli import runs_dir
from hyperdflash.contracts import Document
from hyperdflash.record import environment_record, script_command, write_json
from hyperdflash.states.capture import capture
from hyperdflash.states.store import CacheKey, StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer

PER_SHARD = 2


@dataclass(frozen=True)
class Kills:
    """What happened: ``forwards`` of all captures against the ``needed`` ones of ``captures`` undisturbed ones; ``allowed``
    forwards more than those: two a kill, the shard in the forward and the one being written."""

    kills: int
    captures: int
    shards: int
    forwards: int
    needed: int
    allowed: int
    different_files: int


class Counted:
    """A producer that says in a file that it runs, which a kill cannot undo."""

    def __init__(self, producer: Producer, log: Path):
        self.producer, self.log = producer, log
        self.fingerprint, self.where = producer.fingerprint, producer.where

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        with self.log.open("a") as file:
            file.write("x")
        return self.producer.states(sequences, layer_ids)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a cache."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run_kills(
    kills: int, key: CacheKey, producer: Callable[[], Producer], documents: Sequence[Document], scratch: Path, seed: int = 0
) -> Kills:
    """AssertionError where a capture failed by itself; what else went wrong is in the counts."""
    fork = multiprocessing.get_context("fork")
    moments = random.Random(seed)
    log, cache = scratch / "log", scratch / "cache"

    def work(directory: Path) -> None:
        made_by = Counted(producer(), log)
        store = StateStore(directory, key)
        capture(documents, store, lambda: made_by, layer_ids=(0,), documents_per_shard=PER_SHARD, progress=False)

    def start(directory: Path) -> multiprocessing.Process:
        process = fork.Process(target=work, args=(directory,))
        process.start()
        return process

    started = time.monotonic()
    undisturbed = start(scratch / "undisturbed")
    undisturbed.join()
    duration = time.monotonic() - started
    assert undisturbed.exitcode == 0
    expected = content(scratch / "undisturbed")
    shards = len(make_shards(documents, PER_SHARD))
    log.write_text("")

    done = captures = different = 0
    with tqdm(total=kills, desc="kills", mininterval=2) as bar:
        while done < kills:
            processes = [start(cache) for _ in range(1 + captures % 2)]
            while True:
                victim = moments.choice(processes)
                victim.join(moments.uniform(0, duration))
                if done < kills and victim.is_alive():
                    victim.kill()
                    done += 1
                    bar.update()
                    if len(processes) == 1:
                        victim.join()
                        processes = [start(cache)]
                        continue
                for process in processes:
                    process.join()
                    assert process.exitcode == 0 or process is victim, f"a capture ended with {process.exitcode}"
                break
            found = content(cache)
            different += sum(found.get(name) != expected.get(name) for name in {*found, *expected})
            shutil.rmtree(cache)
            captures += 1
    forwards, needed = log.stat().st_size, shards * captures
    return Kills(done, captures, shards, forwards, needed, needed + 2 * done, different)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture_kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--target", default="assets/tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=runs_dir() / "capture-kills")
    parser.add_argument("--scratch", type=Path, help="where the caches go; the system's temporary directory")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before the first operation: a fork does not have the threads of a pool
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    key = CacheKey(
        target=target.fingerprint,
        target_dtype="fp32",
        num_paths=target.heads.num_paths,
        hidden_size=target.heads.hidden_size,
        dtype="bf16",
    )
    documents = make_documents(options.documents, 48, target.model.config.vocab_size)
    with nullcontext(options.scratch) if options.scratch else tempfile.TemporaryDirectory() as scratch:
        found = run_kills(options.kills, key, lambda: InProcess(target), documents, Path(scratch), options.seed)
    command = script_command("benchmarks.capture_kills", arguments)
    write_json(options.out / "capture_kills.json", {**asdict(found), "environment": environment_record(command)})
    print(
        f"{found.kills} kills in {found.captures} captures of {found.shards} shards: {found.different_files} files differ from "
        f"an undisturbed capture; {found.forwards - found.needed} forwards repeated, {found.allowed - found.needed} allowed"
    )
    if found.different_files or found.forwards > found.allowed:
        sys.exit(1)


if __name__ == "__main__":
    main()
