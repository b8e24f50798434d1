"""Kill captures and trainings at random moments, start them again, and compare their end with an undisturbed one's.

    python -m benchmarks.kills                                 all of them
    python -m benchmarks.kills "training, 2 ranks" --kills 20

1. capture    one process, killed again and again until it gets through; then two on one cache, of which one is killed and the
              other takes over its work. SIGKILL, at a moment drawn uniformly over the time of an undisturbed capture
2. training   the shipped tiny target's, small (benchmarks/small_training.py), by the same command each time. Half of the kills
              are SIGKILL, half SIGTERM, to the launcher, one of the ranks, or all; each comes a random time after a step was
              logged, so most fall between two checkpoints, inside an epoch
"""

from __future__ import annotations

import json
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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.capture import make_documents
from benchmarks.result import environment, option_parser, write_result
from benchmarks.small_training import BATCH, STEPS, command_of, finish, last_step, run_of, start
from hyperdflash.contracts import Document
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.capture import capture
from hyperdflash.states.store import CacheKey, StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer
from hyperdflash.training.checkpoints import newest_checkpoint, step_of
from hyperdflash.training.run_differences import run_differences

PER_SHARD = 2
PARTS = {"capture": 0, "training, 1 rank": 1, "training, 2 ranks": 2}  # ranks


@dataclass(frozen=True)
class Kills:
    """What happened to captures: ``forwards`` of all of them against the ``needed`` ones of ``captures`` undisturbed ones;
    ``allowed`` are two more per kill, for the shard in the forward and the one that is written."""

    kills: int
    captures: int
    shards: int
    forwards: int
    needed: int
    allowed: int
    different_files: int


class Counted:
    """A producer that logs each forward in a file, which a kill cannot undo."""

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


def kill_captures(
    kills: int, key: CacheKey, producer: Callable[[], Producer], documents: Sequence[Document], scratch: Path, seed: int = 0
) -> Kills:
    """AssertionError where a capture failed by itself; the counts say what else went wrong."""
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
    forwards, needed = log.stat().st_size, shards * captures
    return Kills(done, captures, shards, forwards, needed, needed + 2 * done, different)


def measure_captures(options: Namespace) -> dict:
    torch.set_num_threads(1)  # before the first operation: a fork does not have the threads of a pool
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    sizes = {"num_paths": target.heads.num_paths, "hidden_size": target.heads.hidden_size}
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", dtype="bf16", **sizes)
    documents = make_documents(options.documents, 48, target.model.config.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        kills = kill_captures(options.kills or 100, key, lambda: InProcess(target), documents, Path(scratch), options.seed)
    return asdict(kills)


def measure_trainings(options: Namespace, ranks: int) -> dict:
    """Every kill (signal, whom, last step logged, checkpoint that the next start goes on from), and what differs at the end."""
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
    """Starts the run and kills it once it has come a little further than before: its share of the steps."""
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


def table(record: dict) -> list[str]:
    rows = []
    for name in (name for name in PARTS if name in record):
        part = record[name]
        if name == "capture":
            again, most = part["forwards"] - part["needed"], part["allowed"] - part["needed"]
            rows.append([name, part["kills"], f"{part['different_files']} files", f"{again} forwards, at most {most}"])
        else:
            again = sum(max(0, k["step"] + 1 - k["checkpoint"]) for k in part["kills"] if k["signal"] == "SIGKILL")
            differs = ", ".join(part["differences"]) or "0 tensors, states, metrics and files"
            rows.append([name, len(part["kills"]), differs, f"{again} steps"])
    header = ["what", "kills", "differs from an undisturbed one", "done again"]
    return markdown_table(header, [[str(cell) for cell in row] for row in rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("kills", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all where none is given")
    parser.add_argument("--kills", type=int, help="of each part; 100 of captures and 20 of trainings")
    parser.add_argument("--documents", type=int, default=64, help="of the captures")
    parser.add_argument("--target", default="assets/tiny", help="of the captures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where caches and runs go; the system's temporary directory")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    measured_in = environment("kills", arguments)
    path = options.out / "kills.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts or PARTS:
        ranks = PARTS[name]
        found = measure_trainings(options, ranks) if ranks else measure_captures(options)
        record[name] = {**found, "environment": measured_in}
    write_result(options.out, "kills", record, table(record), measured_in)
    if any(part.get("different_files") or part.get("differences") for part in record.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
