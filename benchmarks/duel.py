"""Two worker processes that take the same step in turn: only one of them works at a time.

A worker answers JSON lines (benchmarks/own_step.py says which); the driver never loads torch. Every case gets fresh processes,
so a peak is that case's own, and what the machine does meanwhile falls on both sides alike.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import Case

ROOT = Path(__file__).resolve().parents[1]
SETTLE_S = 0.02  # between turns: the other side's idle threads stop spinning


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How every case is run: ``rounds`` measured steps a side after ``warm_up`` others, and more until ``least_s`` have gone
    by, all sides' turns together; ``memory_bytes`` a process may allocate beyond its imports; ``timeout_s`` the longest wait
    for one answer; ``rate_s`` how long each product is tried."""

    rounds: int
    least_s: float = 0.0
    warm_up: int = 3
    threads: int = 2
    memory_bytes: int = 12 << 30
    timeout_s: float = 900.0
    rate_s: float = 0.1


@dataclass
class Measured:
    """One side of a case. ``seconds`` one entry a measured step; ``stages`` the same by part of the step; ``anchors`` and
    ``slots`` as the side counted them in its own loss; bytes: ``imports_bytes`` resident after imports, ``built_bytes`` and
    ``peak_bytes`` the largest resident size with weights and inputs, and after all steps. ``rates`` FLOP/s by product;
    ``beside_peak`` further steps, seconds each, with FLOP/s of the fastest product right after. ``error`` says why it did not
    run, ``extras_error`` why rates or such steps are missing, which leaves the rest as it is."""

    side: str
    case: Case
    seconds: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    loss: float | None = None
    anchors: int = 0
    slots: int = 0
    imports_bytes: int = 0
    built_bytes: int = 0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    extras_error: str | None = None
    rates: list[dict] = field(default_factory=list)
    beside_peak: list[tuple[float, float]] = field(default_factory=list)


class WorkerFailed(Exception):
    """One sentence: what the worker said, or how it ended."""


class Worker:
    """A process that reads a JSON line and writes one."""

    def __init__(self, command: Sequence[str], terms: Terms):
        threads = str(terms.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self.timeout_s = terms.timeout_s
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        self.process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def ask(self, **request: Any) -> dict:
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
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}: {said[-1].strip()}" if said else how


def duel(
    case: Case,
    sides: dict[str, Sequence[str]],
    terms: Terms,
    *,
    rates: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Measured]:
    """``sides`` name -> command of its worker; they step in this order, one after the other, round after round. Every round
    has other anchors, the same ones on all sides.

    With ``rates`` the first side, once its memory has been read, measures its matrix products and steps as many rounds again,
    each beside the fastest product. ``progress`` is called after every step that sides take in turn, as
    often as ``terms.rounds`` promises.
    """
    results = {side: Measured(side, case) for side in sides}
    workers: dict[str, Worker] = {}
    try:
        for side, command in sides.items():
            workers[side] = Worker(command, terms)
            _attempt(results[side], _build, workers[side], terms)
        least, number, ends = terms.warm_up + terms.rounds, 0, math.inf
        while number < least or (time.monotonic() < ends and any(result.error is None for result in results.values())):
            if number == terms.warm_up:
                ends = time.monotonic() + terms.least_s
            for side, worker in workers.items():
                _attempt(results[side], _step, worker, case.shape.anchors(number), number >= terms.warm_up)
                if number < least:
                    progress()
                time.sleep(SETTLE_S)
            number += 1
        for side, worker in workers.items():
            _attempt(results[side], _note, worker, "memory")
        first = next(iter(sides))
        if rates:
            _attempt(results[first], _measure_rates, workers[first], terms)
    finally:
        for worker in workers.values():
            worker.close()
    return results


def _attempt(result: Measured, action: Callable[..., None], *arguments: Any) -> None:
    """A side that failed is asked no more; its error stands in its place."""
    if result.error is None:
        try:
            action(result, *arguments)
        except WorkerFailed as failed:
            result.error = str(failed)


def _build(result: Measured, worker: Worker, terms: Terms) -> None:
    case = result.case
    answer = worker.ask(
        do="build",
        shape=asdict(case.shape),
        dtype=case.dtype,
        objective=case.objective,
        threads=terms.threads,
        memory_bytes=terms.memory_bytes,
    )
    result.versions = answer["versions"]
    memory = worker.ask(do="memory")
    result.built_bytes, result.imports_bytes = memory["peak_bytes"], memory["imports_bytes"]


def _step(result: Measured, worker: Worker, anchors: list[int], keep: bool) -> None:
    answer, shape = worker.ask(do="step", anchors=anchors), result.case.shape
    result.anchors, result.slots, result.loss = answer["anchors"], answer["slots"], answer["loss"]
    if (result.anchors, result.slots) != (shape.num_anchors, shape.drafted):
        ran = f"{result.anchors} anchors with {result.slots} supervised slots"
        raise WorkerFailed(f"ran {ran}, wanted {shape.num_anchors} with {shape.drafted}")
    if keep:
        result.seconds.append(answer["seconds"])
        for name, seconds in answer["stages"].items():
            result.stages.setdefault(name, []).append(seconds)


def _measure_rates(result: Measured, worker: Worker, terms: Terms) -> None:
    """What fails here comes after all that the sides are compared by, so that stays."""
    try:
        _note(result, worker, "rates", {"seconds": terms.rate_s})
        _step_beside_peak(result, worker, terms.rate_s)
    except WorkerFailed as failed:
        result.extras_error = str(failed)


def _step_beside_peak(result: Measured, worker: Worker, rate_s: float) -> None:
    """A machine's speed drifts: a step and the fastest product within a second of each other see the same machine."""
    fastest = max(result.rates, key=lambda rate: rate["flops_per_s"])
    for number in range(len(result.seconds)):
        step = worker.ask(do="step", anchors=result.case.shape.anchors(number))
        peak = worker.ask(do="peak", part=fastest["part"], sizes=fastest["sizes"], seconds=rate_s)
        result.beside_peak.append((step["seconds"], peak["flops_per_s"]))


def _note(result: Measured, worker: Worker, what: str, options: dict | None = None) -> None:
    """Answers are named as the fields they fill."""
    vars(result).update(worker.ask(do=what, **(options or {})))
