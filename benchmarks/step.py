"""Measures the training step beside that of the speculators library: time, and the process's largest memory.

    make bench-step
    python -m benchmarks.step --quick --out runs/bench-quick        # a tiny shape, this project alone, seconds

A step is forward, loss and backward, no optimizer. The sides step in turn, a process each. A busy machine makes the times
meaningless: the load before the run is part of the record.
"""

from __future__ import annotations

import os
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.duel import ROOT, Terms, duel
from benchmarks.result import option_parser, run
from benchmarks.shapes import DTYPES, OBJECTIVES, QUICK, SHAPES, Case
from hyperdflash.report.tables import GAP, Block, Table

OWN, PEER = "this project", "speculators"
LEAST_S = 10.0  # per case: steps of 50 ms are taken often enough to see more than one state of the machine
LEAST_SPEED = {"fp32": 2.0, "bf16": 3.0}  # slots/s, times the peer's, at least
MOST_MEMORY = 1 / 3  # peak over imports, times the peer's, at most


def own_command() -> list[str]:
    return [sys.executable, "-m", "benchmarks.own_step"]


def measure(options: Namespace) -> dict:
    sides, peer = {OWN: own_command()}, ROOT / options.peer_python
    if not (options.quick or options.alone):
        if not peer.exists():
            sys.exit(f"error: no {options.peer_python}: run make bench-step, which makes it (or --alone without the peer)")
        sides[PEER] = [str(peer), str(Path(__file__).with_name("peer_step.py"))]
    shapes = [QUICK] if options.quick else [s for s in SHAPES if not options.shapes or s.name in options.shapes]
    dtypes, objectives = (["fp32"], ["own"]) if options.quick else (options.dtypes, options.losses)
    cases = [Case(shape, dtype, objective) for shape in shapes for dtype in dtypes for objective in objectives]
    rounds, least_s = options.rounds or (3 if options.quick else 10), 0.0 if options.quick else LEAST_S
    memory = int(options.memory_gib * 2**30)
    return compare(sides, cases, Terms(rounds=rounds, least_s=least_s, threads=options.threads, memory_bytes=memory))


def compare(sides: dict[str, Sequence[str]], cases: Sequence[Case], terms: Terms) -> dict:
    """Returns the machine, the terms, and each side's measurements per case."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    found = [duel(case, sides, terms) for case in tqdm(cases, desc="bench step", unit="case", mininterval=2)]
    machine = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0]}
    plain = [{side: asdict(measured) for side, measured in results.items()} for results in found]
    return {"machine": machine, "terms": asdict(terms), "cases": plain}


def slots_per_second(side: dict | None) -> float | None:
    return side["slots"] / statistics.median(side["seconds"]) if side and side["error"] is None else None


def added_bytes(side: dict | None) -> int | None:
    """Returns the peak over the size after imports."""
    return side["peak_bytes"] - side["imports_bytes"] if side and side["error"] is None else None


def blocks(record: dict) -> list[Block]:
    return [
        "# The training step's speed and memory",
        _machine(record),
        "Both sides take the same step as nearly as the libraries allow: [what is measured](../README.md#the-training-step).",
        *_comparison(record["cases"]),
    ]


def _machine(record: dict) -> str:
    machine, terms, cases = record["machine"], record["terms"], record["cases"]
    lines = [f"- {machine['cpu']}, {machine['cores']} cores, {terms['threads']} threads per process"]
    for side in cases[0]:
        versions = next((case[side]["versions"] for case in cases if case[side]["versions"]), {})
        lines.append(f"- {side}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    more = f", more where they take less than {terms['least_s']:g} s together" if terms["least_s"] else ""
    lines += [
        f"- {terms['rounds']} measured steps per side and case after {terms['warm_up']} others{more}; a process may allocate "
        f"{terms['memory_bytes'] / 2**30:g} GiB; load average at the end {machine['load_after']:.2f}"
    ]
    return "\n".join(lines)


def _comparison(cases: Sequence[dict]) -> list[Block]:
    sides, failures, held = ("ours", "speculators"), [], []
    rows = []
    for case in cases:
        own, peer, where = case[OWN], case.get(PEER), case[OWN]["case"]
        cells = [where["shape"]["name"], where["dtype"], where["objective"], f"{len(own['seconds'])}", _time(own), _time(peer)]
        for measure_of, scale, bound in (
            (slots_per_second, 1.0, LEAST_SPEED[where["dtype"]]),
            (added_bytes, 1e-6, MOST_MEMORY),
        ):
            both = measure_of(own), measure_of(peer)
            cells += [GAP if value is None else f"{value * scale:,.0f}" for value in both]
            ratio = GAP if None in both else f"{both[0] / both[1]:.2f}"
            if None not in both and where["objective"] == "own":
                held.append(both[0] >= bound * both[1] if measure_of is slots_per_second else both[0] <= bound * both[1])
                ratio += "" if held[-1] else " **not met**"
            cells.append(ratio)
        rows.append(cells)
        failures += [f"- {side}, {', '.join(cells[:3])}: {found['error']}" for side, found in case.items() if found["error"]]
    header = ["shape", "dtype", "loss", "steps", *(f"{side}, ms" for side in sides), *(f"{side}, slots/s" for side in sides)]
    header += ["speed ratio", *(f"{side}, MB" for side in sides), "memory ratio"]
    bounds = " and ".join(f"{bound:g} times ({dtype})" for dtype, bound in LEAST_SPEED.items())
    note = (
        "Times are medians, with the middle half of the steps in brackets. Thresholds for loss `own`: at least "
        f"{bounds} the slots/s, at most {MOST_MEMORY:.2f} of the memory: {sum(held)} of {len(held)} hold."
    )
    return [Table(header, rows), note, *(["Did not run:", "\n".join(failures)] if failures else [])]


def _time(side: dict | None) -> str:
    if side is None or side["error"]:
        return GAP if side is None else "did not run"
    times = [1e3 * s for s in side["seconds"]]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("step", __doc__, threads=2)
    parser.add_argument("--rounds", type=int, help="measured steps per side and case, at least (10)")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="what one process may allocate beyond its imports")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], help="all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, without the peer")
    run(parser, measure, blocks, arguments)


if __name__ == "__main__":
    main()
