"""The training step beside that of the speculators library: time, memory, the machine's peak, growth.

    make bench-step
    python -m benchmarks.step --quick --out runs/bench-quick        # a tiny shape, this project alone, seconds

Writes step.md, step.json, step.png and step_growth.png. A busy machine makes the times meaningless: the load before the run is
part of the record.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.duel import ROOT, Terms, duel
from benchmarks.figures import growth_figure, thresholds_figure
from benchmarks.result import environment, option_parser, write_result
from benchmarks.shapes import DTYPES, GROWTH, GROWTH_BASE, OBJECTIVES, QUICK, SHAPES, Case, grown
from benchmarks.tables import OWN, PEER, Run, markdown, record

LEAST_S = 10.0  # a case: steps of 50 ms are taken often enough to see more than one mood of the machine


def own_command() -> list[str]:
    return [sys.executable, "-m", "benchmarks.own_step"]


def peer_command(python: Path) -> list[str]:
    return [str(python), str(Path(__file__).with_name("peer_step.py"))]


def run_bench(
    run: Run,
    sides: dict[str, Sequence[str]],
    cases: Sequence[Case],
    axes: dict[str, tuple[int, ...]],
    growth_terms: Terms,
) -> None:
    """Fills ``run``; ``axes`` the sizes of each axis along which to grow, one case each but the base only once."""
    grown_cases = {axis: [grown(GROWTH_BASE, axis, size) for size in sizes] for axis, sizes in axes.items()}
    shapes = list(dict.fromkeys(shape for along in grown_cases.values() for shape in along))
    steps = len(cases) * (run.terms.warm_up + run.terms.rounds) + len(shapes) * (growth_terms.warm_up + growth_terms.rounds)
    with tqdm(total=steps * len(sides), desc="bench step", unit="step", dynamic_ncols=True) as bar:
        for case in cases:
            bar.set_postfix_str(f"{case.shape.name}, {case.dtype}, {case.objective}")
            run.cases.append(duel(case, sides, run.terms, rates=case.objective == "own", progress=bar.update))
        for shape in shapes:
            bar.set_postfix_str(f"growth, {shape.name}")
            run.growth[shape] = duel(Case(shape, "fp32", "own"), sides, growth_terms, progress=bar.update)
    run.growth_axes = grown_cases


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    peer = ROOT / options.peer_python
    sides = {OWN: own_command()}
    if not (options.quick or options.alone):
        if not peer.exists():
            sys.exit(f"error: no {options.peer_python}: run make bench-step, which makes it (or --alone without the peer)")
        sides[PEER] = peer_command(peer)
    shapes = [QUICK] if options.quick else [s for s in SHAPES if not options.shapes or s.name in options.shapes]
    dtypes = ["fp32"] if options.quick else options.dtypes
    objectives = ["own"] if options.quick else options.losses
    cases = [Case(shape, dtype, objective) for shape in shapes for dtype in dtypes for objective in objectives]

    rounds = options.rounds or (3 if options.quick else 10)
    shared = {"threads": options.threads, "memory_bytes": int(options.memory_gib * 2**30)}
    shared["rate_s"] = 0.0 if options.quick else 0.1
    least_s = 0.0 if options.quick else LEAST_S
    measured_in = environment("step", arguments)
    run = Run(Terms(rounds=rounds, least_s=least_s, **shared), machine())
    axes = {} if options.quick or options.no_growth else GROWTH
    run_bench(run, sides, cases, axes, Terms(rounds=max(3, rounds // 2), least_s=least_s / 2, **shared))
    run.machine["load_after"] = os.getloadavg()[0]
    write(run, options.out, measured_in)


def write(run: Run, out: Path, measured_in: dict) -> None:
    """step.json, step.md, and both pictures."""
    write_result(out, "step", record(run), markdown(run), measured_in)
    thresholds_figure(run.thresholds(), out / "step.png")
    if run.growths():
        growth_figure(run.growths(), out / "step_growth.png")


def machine() -> dict:
    """Processor, cores this process may use, and how busy they were."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = option_parser("step", __doc__, threads=2)
    parser.add_argument("--rounds", type=int, help="measured steps per side and case, at least (10; in growth half of them)")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="what one process may allocate beyond its imports")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], help="all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--no-growth", action="store_true", help="shapes only")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, without the peer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
