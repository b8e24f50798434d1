"""What every benchmark shares: options, rounds in turn, its environment, and its result as one record and one rendered text.

A benchmark has ``measure(options) -> record`` and ``blocks(record) -> paragraphs and tables``. ``run`` writes the record to
results/NAME.json and renders NAME.md from it; ``--render`` renders again without measuring.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from hyperdflash.record import environment_record

if TYPE_CHECKING:
    from hyperdflash.report.tables import Block

RESULTS = Path(__file__).with_name("results")
ALONE = ""  # the part of a benchmark that has only one: its record is NAME.json itself
T = TypeVar("T")


def option_parser(name: str, doc: str, *, rounds: int | None = None, threads: int | None = None) -> ArgumentParser:
    """Returns a parser with ``--out`` and ``--render``, and with ``--rounds`` and ``--threads`` where a default is given;
    ``doc`` is the benchmark's docstring."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--render", action="store_true", help="render the result in --out again and measure nothing")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
    return parser


def run(
    parser: ArgumentParser,
    measure: Callable[[Namespace], dict],
    blocks: Callable[[dict], list[Block]],
    arguments: Sequence[str] | None = None,
) -> dict:
    """Measures, or reads the record with ``--render``; writes NAME.json and NAME.md, prints the latter, returns the record."""
    return run_parts(parser, {ALONE: (measure, blocks)}, arguments)


def run_parts(
    parser: ArgumentParser,
    parts: dict[str, tuple[Callable[[Namespace], dict], Callable[[dict], list[Block]]]],
    arguments: Sequence[str] | None = None,
) -> dict:
    """Does as ``run`` for a benchmark of several parts, of which a command may name some: the others keep their records."""
    if ALONE not in parts:
        parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all where none is given")
    options, name = parser.parse_args(arguments), parser.prog.rsplit(".", 1)[-1]
    chosen, path = getattr(options, "parts", None) or list(parts), options.out / f"{name}.json"
    if unknown := [part for part in chosen if part not in parts]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(parts)}")
    if options.render and not path.exists():
        parser.error(f"no {path} to render: run the benchmark without --render")
    record = json.loads(path.read_text()) if path.exists() else {}
    records = {ALONE: record} if ALONE in parts else record
    for part in () if options.render else chosen:
        measured_in = environment(name, arguments)
        records[part] = {**parts[part][0](options), "environment": measured_in}
    record = records.get(ALONE, records)
    from hyperdflash.report.results import write_report  # not in a worker, whose memory is measured
    from hyperdflash.report.tables import markdown

    found = [(blocks, records[part]) for part, (_, blocks) in parts.items() if part in records]
    text = markdown([block for blocks, own in found for block in (*blocks(own), made_by(own["environment"]))])
    write_report(options.out, {f"{name}.json": record, f"{name}.md": text})
    print(text)
    return record


def environment(name: str, arguments: Sequence[str] | None) -> dict:
    """Returns command, revision, versions and the load of the last minute; call it before the work."""
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if arguments is None else arguments)])
    return {**environment_record(command), "load_before": os.getloadavg()[0]}


def made_by(measured_in: dict) -> str:
    revision, load = (measured_in.get("git_revision") or "unknown")[:12], measured_in.get("load_before")
    return f"`{measured_in['command']}`, revision {revision}" + ("" if load is None else f", load before it {load:.1f}")


def in_turn(sides: dict[str, Callable[[int], T]], rounds: int, desc: str, warm_up: int = 1) -> dict[str, list[T]]:
    """Calls every side once per round with the round's number, so that a slow moment of the machine falls on all sides.

    Returns each side's results, without those of the first ``warm_up`` rounds.
    """
    found: dict[str, list[T]] = {name: [] for name in sides}
    with tqdm(total=(warm_up + rounds) * len(sides), desc=desc, mininterval=2) as bar:
        for number in range(warm_up + rounds):
            for name, side in sides.items():
                result = side(number)
                if number >= warm_up:
                    found[name].append(result)
                bar.update()
    return found


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


def memory_bytes(field: str) -> int:
    """Returns VmHWM (peak resident), VmRSS (resident) or VmSize of this process; ``ru_maxrss`` would count its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"
