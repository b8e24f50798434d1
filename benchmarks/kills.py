"""Kills captures and trainings at random moments, restarts them, and compares their results with an undisturbed one's.

    python -m benchmarks.kills                                 all parts
    python -m benchmarks.kills "training, 2 ranks" --kills 20
    python -m benchmarks.kills --render                        kills.md from kills.json

1. capture    one process, killed until it finishes; then two on one cache, of which one is killed and the other takes over its
              work. SIGKILL, at a moment drawn uniformly from the time of an undisturbed capture
2. training   a small one on the tiny target (benchmarks/small_training.py), always by the same command. Half of the kills are
              SIGKILL, half SIGTERM, to the launcher, one rank, or all; each follows a logged step after a random time, so that
              most are between two checkpoints, inside an epoch
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
from benchmarks.result import environment, option_parser
from benchmarks.small_training import BATCH, STEPS, command_of, finish, last_step, run_of, start
from hyperdflash.contracts import Document
from hyperdflash.files import write_text
from hyperdflash.record import write_json
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.capture import capture
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer
from hyperdflash.training.checkpoints import newest_checkpoint, step_of
from tests.training.run_differences import run_differences

PER_SHARD = 2
PARTS = {"capture": 0, "training, 1 rank": 1, "training, 2 ranks": 2}  # ranks


@dataclass(frozen=True)
class Kills:
    """Counts of captures: all ``forwards``, and the ``needed`` ones of ``captures`` undisturbed captures; ``allowed`` adds two
    per kill, for the shard in the forward and the one in the writer."""

    kills: int
    captures: int
    shards: int
    forwards: int
    needed: int
    allowed: int
    different_files: int


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
) -> Kills:
    """Kills captures; AssertionError where a capture fails without a kill."""
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
    torch.set_num_threads(1)  # before the first operation: a fork does not inherit the threads of a pool
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    sizes = {"num_paths": target.heads.num_paths, "hidden_size": target.heads.hidden_size}
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", dtype="bf16", **sizes)
    documents = make_documents(options.documents, 48, target.model.config.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        kills = kill_captures(options.kills or 100, key, lambda: InProcess(target), documents, Path(scratch), options.seed)
    return asdict(kills)


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


def table(record: dict) -> list[str]:
    """Returns one row per part."""
    rows = []
    for name in (name for name in PARTS if name in record):
        part = record[name]
        if name == "capture":
            what, differs = f"capture, {part['shards']} shards", f"{part['different_files']} files, byte for byte"
            again, most = f"{part['forwards'] - part['needed']} forwards", f"{part['allowed'] - part['needed']}"
            rows.append([what, f"{part['kills']}", f"{part['captures']} captures", differs, again, most])
        else:
            again = sum(max(0, k["step"] + 1 - k["checkpoint"]) for k in part["kills"] if k["signal"] == "SIGKILL")
            differs, kills = ", ".join(part["differences"]) or "0 tensors, states, metrics and files", len(part["kills"])
            rows.append([f"{name}, {part['steps']} steps", f"{kills}", f"{kills + 1}", differs, f"{again} steps", ""])
    header = ["part", "kills", "starts", "differences from an undisturbed one", "repeated", "at most"]
    return markdown_table(header, rows)


def render(record: dict, out: Path) -> None:
    """Writes kills.md: the table, and the command and revision that gave each part."""
    lines = table(record)
    for name in (name for name in PARTS if name in record):
        measured_in = record[name]["environment"]
        lines += ["", f"{name}: `{measured_in['command']}`, revision {(measured_in['git_revision'] or 'unknown')[:12]}"]
    write_text(out / "kills.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("kills", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all where none is given")
    parser.add_argument("--render", action="store_true", help="write kills.md from kills.json and measure nothing")
    parser.add_argument("--kills", type=int, help="per part; 100 of captures and 20 of trainings by default")
    parser.add_argument("--documents", type=int, default=64, help="of the captures")
    parser.add_argument("--target", default="assets/tiny", help="of the captures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for caches and runs; by default the system's temporary one")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    measured_in = environment("kills", arguments)
    path = options.out / "kills.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for name in () if options.render else options.parts or PARTS:
        ranks = PARTS[name]
        found = measure_trainings(options, ranks) if ranks else measure_captures(options)
        record[name] = {**found, "environment": measured_in}
        write_json(path, record)
    render(record, options.out)
    if any(part.get("different_files") or part.get("differences") for part in record.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
