"""Writes and reads rows.jsonl, a line per prompt, so that a killed evaluation resumes after its last line.

A line is ``mode``, ``temperature``, ``benchmark``, ``id`` and ``methods``: name -> its turns (``turn_row``). At temperature 0 a
turn whose text is not AR's has ``differs``, and those after it, on another history, ``compared`` false.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from hyperdflash.decoding.loop import FirstToken, Generation, Round, Seconds


class Rows:
    """Appends to rows.jsonl below a header of what decides the rows; drops a line that a kill cut short."""

    def __init__(self, path: Path, identity: dict):
        self.path = path
        self.done: set[tuple[str, float, str]] = set()
        self.header = header = {"identity": json.loads(json.dumps(identity))}
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                print(f"{path}: the last line was cut short and is done again", flush=True)
                os.truncate(path, len(whole))
            lines = whole.splitlines()
            if lines and json.loads(lines[0]) != header:
                found = json.loads(lines[0]).get("identity", {})
                other = sorted(k for k in identity.keys() | found.keys() if found.get(k) != header["identity"].get(k))
                raise ValueError(f"{path} was measured with another {', '.join(other)}: give another out=, or remove the file")
            self.done = {(r["mode"], r["temperature"], r["id"]) for r in map(json.loads, lines[1:])}

    def start(self) -> None:
        """Writes the header of a new file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self.append(self.header)

    def append(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[dict]:
    """Yields the prompts' lines, without the header; none where there is no file."""
    if not path.exists():
        return
    with path.open() as lines:
        next(lines, None)
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def turn_row(prompt_ids: Sequence[int], generation: Generation) -> dict:
    """Returns JSON values. ``rounds``: [anchor, drafted ids, accepted, emitted, draft s, verify s, rest s] each."""
    return {
        "prompt_ids": list(prompt_ids),
        "ids": list(generation.token_ids),
        "ended_by": generation.ended_by,
        "first_s": list(asdict(generation.first.seconds).values()),
        "rounds": [
            [r.anchor, list(r.drafted), r.accepted, len(r.emitted), *(round(s, 7) for s in asdict(r.seconds).values())]
            for r in generation.rounds
        ],
    }


def as_generation(turn: dict) -> Generation:
    """Inverts ``turn_row``; times are exact to a tenth of a microsecond."""
    place, rounds = 1, []
    for anchor, drafted, accepted, emitted, *seconds in turn["rounds"]:
        text = tuple(turn["ids"][place : place + emitted])
        rounds.append(Round(anchor, tuple(drafted), accepted, text, Seconds(*seconds)))
        place += emitted
    first = FirstToken(turn["ids"][0], Seconds(*turn["first_s"]))
    return Generation(tuple(turn["ids"]), turn["ended_by"], first, tuple(rounds))
