"""Options, environment and result files of every benchmark."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from hyperdflash.files import write_text
from hyperdflash.record import environment_record, script_command, write_json

RESULTS = Path(__file__).with_name("results")


def option_parser(name: str, doc: str, *, rounds: int | None = None, threads: int | None = None) -> ArgumentParser:
    """Returns a parser with ``--out``, and with ``--rounds`` and ``--threads`` where a default is given; ``doc`` is the
    benchmark's docstring."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
    return parser


def environment(name: str, arguments: Sequence[str] | None) -> dict:
    """Returns command, revision, versions and the load of the last minute; call it before the work."""
    return {**environment_record(script_command(f"benchmarks.{name}", arguments)), "load_before": os.getloadavg()[0]}


def write_result(out: Path, name: str, record: dict, lines: Sequence[str], measured_in: dict) -> None:
    """Writes NAME.json and NAME.md, which ends with the command, and prints the latter."""
    write_json(out / f"{name}.json", {**record, "environment": measured_in})
    revision = (measured_in["git_revision"] or "unknown")[:12]
    text = "\n".join(
        [*lines, "", f"`{measured_in['command']}`, revision {revision}, load before it {measured_in['load_before']:.1f}"]
    )
    write_text(out / f"{name}.md", text + "\n")
    print(text)
