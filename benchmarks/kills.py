"""Kills captures and trainings at random moments, restarts them, and compares their results with an undisturbed one's.

    python -m benchmarks.kills                                 all parts
    python -m benchmarks.kills "training, 2 ranks" --kills 20

1. capture    one process, killed until it finishes; then two on one cache, of which one is killed and the other takes over its
              work. SIGKILL, at a moment drawn uniformly from the time of an undisturbed capture
2. training   a small one on the tiny target (benchmarks/small_training.py), always by the same command. Half of the kills are
              SIGKILL, half SIGTERM, to the launcher, one rank, or all; each follows a logged step after a random time, so that
              most are between two checkpoints, inside an epoch
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.result import option_parser, run_parts
from benchmarks.small_training import BATCH, STEPS, command_of, finish, last_step, run_of, start
from hyperdflash.contracts import Document
from hyperdflash.report.tables import Block, Table
from hyperdflash.states.capture import capture
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer
from hyperdflash.training.checkpoints import newest_checkpoint, step_of
from tests.training.run_differences import run_differences

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
        capture(make_shards(documents, PER_SHARD), store, lambda: made_by, layer_ids=(0,), progress=False)

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
    with tqdm(total=kills, desc="kills of captures", mininterval=2) as bar:
        while done < kills:
            processes = [begin(cache) for _ in range(1 + captures % 2)]
            while True:
                victim = moments.choice(processes)
                victim.join(moments.uniform(0, duration))
                if done < kills and victim.is_alive():
                    victim.kill()
                    done += 1
                    bar.update()
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


def measure_captures(options: Namespace) -> dict:
    torch.set_num_threads(1)  # before the first operation: a fork does not inherit the threads of a pool
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    sizes = {"num_paths": target.heads.num_paths, "hidden_size": target.heads.hidden_size}
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", dtype="bf16", **sizes)
    documents = make_documents(options.documents, 48, target.model.config.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        return kill_captures(options.kills or 100, key, lambda: InProcess(target), documents, Path(scratch), options.seed)


def measure_trainings(options: Namespace, ranks: int) -> dict:
    """Returns every kill (signal, receiver, last logged step, checkpoint of the next start) and the final differences."""
    draw, total = random.Random(options.seed), options.kills or 20
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        whole, broken = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        command = command_of(Path(scratch) / "cache", batch_size=BATCH // ranks)
        command += ["trainer=ddp_cpu", f"trainer.devices={ranks}"] if ranks > 1 else []
        finish(command, whole)
        shutil.copytree(whole / "responses", broken / "responses")
        kills = []
        for done in tqdm(range(total), desc=f"kills of trainings, {ranks} rank(s)", mininterval=2):
            kills.append(_kill_training(command, broken, draw, ranks, done, total))
            if kills[-1]["step"] is None:
                sys.exit(f"error: the run ended before kill {len(kills)}: {Path(f'{broken}.log').read_text()[-2000:]}")
        finish(command, broken)
        differences = run_differences(run_of(whole), run_of(broken), STEPS)
    return {"ranks": ranks, "steps": STEPS, "kills": kills, "differences": differences}


def _kill_training(command: list[str], runs: Path, draw: random.Random, ranks: int, done: int, total: int) -> dict:
    """Starts the run and kills it once it has passed its share of the steps."""
    process = start(command, runs)
    goal = 1 + draw.randrange(int(done * (STEPS - 6) / total), int((done + 1) * (STEPS - 6) / total) + 1)
    last = None
    while process.poll() is None and (last is None or last < goal):
        time.sleep(0.01)
        last = last_step(runs)
    time.sleep(draw.random() * 0.2)
    name, to, targets = "SIGTERM" if done % 2 else "SIGKILL", "process", [process.pid]
    if ranks > 1:
        to, found = draw.choice(["launcher", "a rank", "all"]), _children(process.pid)
        targets = {"launcher": targets, "a rank": [draw.choice(found)] if found else targets, "all": [*found, *targets]}[to]
    ended = process.poll() is not None
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
    process.wait()
    time.sleep(0.3)  # ranks end a moment after their launcher
    found = newest_checkpoint(run_of(runs) / "checkpoints")
    step = None if ended else last_step(runs)
    return {"signal": name, "to": to, "step": step, "checkpoint": step_of(found) if found else 0}


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def capture_blocks(part: dict) -> list[Block]:
    again, most = part["forwards"] - part["needed"], part["allowed"] - part["needed"]
    name, differs = f"capture, {part['shards']} shards", f"{part['different_files']} files, byte for byte"
    return [_table([name, f"{part['kills']}", f"{part['captures']} captures", differs, f"{again} forwards", f"{most}"])]


def training_blocks(part: dict) -> list[Block]:
    kills, name = part["kills"], f"training, {part['ranks']} rank{'s' * (part['ranks'] > 1)}, {part['steps']} steps"
    again = sum(max(0, k["step"] + 1 - k["checkpoint"]) for k in kills if k["signal"] == "SIGKILL")
    differs = ", ".join(part["differences"]) or "0 tensors, states, metrics and files"
    return [_table([name, f"{len(kills)}", f"{len(kills) + 1}", differs, f"{again} steps", ""])]


def _table(row: list[str]) -> Table:
    return Table(["part", "kills", "starts", "differences from an undisturbed one", "repeated", "at most"], [row])


PARTS = {
    "capture": (measure_captures, capture_blocks),
    "training, 1 rank": (partial(measure_trainings, ranks=1), training_blocks),
    "training, 2 ranks": (partial(measure_trainings, ranks=2), training_blocks),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("kills", __doc__)
    parser.add_argument("--kills", type=int, help="per part; 100 of captures and 20 of trainings by default")
    parser.add_argument("--documents", type=int, default=64, help="of the captures")
    parser.add_argument("--target", default="assets/tiny", help="of the captures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for caches and runs; by default the system's temporary one")
    record = run_parts(parser, PARTS, arguments)
    if any(part.get("different_files") or part.get("differences") for part in record.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
