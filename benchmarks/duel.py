"""Runs worker processes that take the same step in turn: only one of them works at a time.

A worker answers JSON lines (benchmarks/own_step.py lists them); this process never loads torch. Every case gets new processes,
so a peak of memory is that case's own, and a slow moment of the machine falls on both sides.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import Case

ROOT = Path(__file__).resolve().parents[1]
SETTLE_S = 0.02  # between turns: the other side's idle threads stop spinning


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms of every case: ``rounds`` measured steps per side after ``warm_up`` others, and more until ``least_s`` have passed
    for all sides together; ``memory_bytes`` a process may allocate beyond its imports; ``timeout_s`` the longest wait for an
    answer."""

    rounds: int
    least_s: float = 0.0
    warm_up: int = 3
    threads: int = 2
    memory_bytes: int = 12 << 30
    timeout_s: float = 900.0


@dataclass
class Measured:
    """One side of a case: ``seconds`` per measured step; ``anchors`` and ``slots`` as the side counts them in its own loss;
    resident bytes after imports, the largest with weights and inputs (``built_bytes``), and the largest after all steps.
    ``error`` gives the reason where the side did not run."""

    side: str
    case: Case
    seconds: list[float] = field(default_factory=list)
    loss: float | None = None
    anchors: int = 0
    slots: int = 0
    imports_bytes: int = 0
    built_bytes: int = 0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class WorkerFailed(Exception):
    """One sentence: the worker's error, or how it ended."""


class Worker:
    """A process that reads a JSON line and writes one."""

    def __init__(self, command: Sequence[str], terms: Terms):
        threads = str(terms.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self.timeout_s, pipe = terms.timeout_s, subprocess.PIPE
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        self.process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=self.errors
        )

    def ask(self, **request: Any) -> dict:
        """Returns the worker's answer; WorkerFailed where it is an error, or none comes."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._ending()) from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not ready:
            raise WorkerFailed(f"no answer within {self.timeout_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(self._ending())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _ending(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}: {lines[-1].strip()}" if lines else how


def duel(case: Case, sides: dict[str, Sequence[str]], terms: Terms) -> dict[str, Measured]:
    """Runs ``case`` on ``sides``, name -> command of its worker, in this order, round after round; a side that failed is asked
    no more. Every round has other anchors, the same ones on all sides."""
    results = {side: Measured(side, case) for side in sides}
    workers: dict[str, Worker] = {}
    try:
        for side, command in sides.items():
            workers[side] = Worker(command, terms)
            with _failing(results[side]):
                _build(results[side], workers[side], terms)
        least, number, ends = terms.warm_up + terms.rounds, 0, math.inf
        while number < least or (time.monotonic() < ends and any(result.error is None for result in results.values())):
            if number == terms.warm_up:
                ends = time.monotonic() + terms.least_s
            for side in (side for side in sides if results[side].error is None):
                with _failing(results[side]):
                    _step(results[side], workers[side], case.shape.anchors(number), number >= terms.warm_up)
                time.sleep(SETTLE_S)
            number += 1
        for side in (side for side in sides if results[side].error is None):
            with _failing(results[side]):
                results[side].peak_bytes = workers[side].ask(do="memory")["peak_bytes"]
    finally:
        for worker in workers.values():
            worker.close()
    return results


@contextlib.contextmanager
def _failing(result: Measured):
    try:
        yield
    except WorkerFailed as failed:
        result.error = str(failed)


def _build(result: Measured, worker: Worker, terms: Terms) -> None:
    limits = {"threads": terms.threads, "memory_bytes": terms.memory_bytes}
    result.versions = worker.ask(do="build", **asdict(result.case), **limits)["versions"]
    memory = worker.ask(do="memory")
    result.built_bytes, result.imports_bytes = memory["peak_bytes"], memory["imports_bytes"]


def _step(result: Measured, worker: Worker, anchors: list[int], keep: bool) -> None:
    answer, shape = worker.ask(do="step", anchors=anchors), result.case.shape
    result.anchors, result.slots, result.loss = answer["anchors"], answer["slots"], answer["loss"]
    if (result.anchors, result.slots) != (shape.num_anchors, shape.drafted):
        found = f"{result.anchors} anchors with {result.slots} supervised slots"
        raise WorkerFailed(f"ran {found}, wanted {shape.num_anchors} with {shape.drafted}")
    if keep:
        result.seconds.append(answer["seconds"])
