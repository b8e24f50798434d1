"""Reads templates of arithmetic word problems from problem_templates.toml, which explains its fields.

1. a table or family with ``with`` -> one per row, with the row's value for <key>
2. [templates.NAME] -> ``Template``
3. [[chains]]       -> one ``Template`` per start and chain of events in the family's table, in all wordings of its parts, so
                       that chains share parts
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from hyperdflash.stable_hash import unit_interval

UNSEEN_TEMPLATES = 0.10  # share of templates without training text
LARGEST_RESULT = 200  # of a chain

_COMPUTED = re.compile(r"\[(\w+) =")
_PLACE_HOLDERS = re.compile(r"\{\w+\}|\[[^\]]+\]")
_EVENT_NAME = re.compile(r"\b[kmuvw]\b")


@dataclass(frozen=True)
class Template:
    """``numbers`` maps a name to its inclusive range, ``derived`` a name to an expression of earlier names; ``condition`` is an
    expression of all names that must hold; ``family`` is None outside a chain."""

    name: str
    questions: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    derived: dict[str, str]
    condition: str = "True"
    family: str | None = None

    @property
    def is_unseen(self) -> bool:
        """Tells whether the whole template is held out."""
        return unit_interval(self.name, salt="maths template") < UNSEEN_TEMPLATES


@dataclass(frozen=True)
class Part:
    """A start or an event of a chain; the fields are those of ``Template``."""

    wordings: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    derived: dict[str, str]


@cache
def templates() -> tuple[Template, ...]:
    """Returns all templates in the file's order, single ones first, then chains."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    single = [
        Template(name, tuple(row["questions"]), row["steps"], _ranges(row), row.get("let", {}), row.get("when", "True"))
        for key, table in tables["templates"].items()
        for name, row in _expanded({"name": key, "row": table}, table.get("with"))
    ]
    chained = [
        made
        for table in tables["chains"]
        for _, family in _expanded({"name": table["family"], "row": table}, table.get("with"))
        for made in _chains(family)
    ]
    return (*single, *chained)


def _expanded(named: dict, rows: Sequence[dict[str, str]] | None) -> Iterator[tuple[str, dict]]:
    """Yields (name, table) per row of ``with`` with <key> replaced; the table itself without ``with``."""
    for row in rows or [{}]:
        text = json.dumps(named)
        for key, value in row.items():
            text = text.replace(f"<{key}>", value)
        made = json.loads(text)
        yield made["name"], made["row"]


def _ranges(table: dict) -> dict[str, tuple[int, int]]:
    return {name: (low, high) for name, (low, high) in table.get("numbers", {}).items()}


def _part(table: dict) -> Part:
    return Part(tuple(table["wordings"]), table.get("steps", ""), _ranges(table), table.get("let", {}))


def _chains(family: dict) -> Iterator[Template]:
    starts, events = ({key: _part(part) for key, part in family[kind].items()} for kind in ("starts", "events"))
    for line in family["table"].strip().splitlines():
        start, *rows = line.split()
        for row in rows:
            name = f"{family['family']}_{start}_{row}"
            yield chain(name, starts[start], *(events[key] for key in row.split("+")), family=family["family"])


def chain(name: str, start: Part, *events: Part, family: str | None = None) -> Template:
    """Builds one template: the steps in order, every combination of wordings, all results in 2 .. LARGEST_RESULT."""
    steps, numbers, wordings, quantity = [start.steps], dict(start.numbers), [start.wordings], "a"
    for position, event in enumerate((start, *events)):
        if position:
            is_last = position == len(events)
            halves = [[half.strip() for half in text.split("|")] for text in event.wordings]
            texts = (" ".join(filter(None, both)) if is_last else both[0] for both in halves)
            wordings.append(tuple(_numbered(text, quantity, position) for text in texts))
            steps.append(_numbered(event.steps, quantity, position))
            numbers |= {f"{key}{position}": span for key, span in event.numbers.items()}
        quantity = (_COMPUTED.findall(steps[-1]) or [quantity])[-1]
    worked = " ".join(filter(None, steps))
    bounds = " and ".join(f"1 < {result} <= {LARGEST_RESULT}" for result in _COMPUTED.findall(worked))
    questions = tuple(map(" ".join, product(*wordings)))
    return Template(name, questions, worked, numbers, start.derived, bounds, family)


def _numbered(text: str, quantity: str, position: int) -> str:
    """Replaces ``u`` by the current quantity in an event's text, and numbers its other names by the event's position."""

    def rename(name: re.Match) -> str:
        return quantity if name.group() == "u" else f"{name.group()}{position}"

    return _PLACE_HOLDERS.sub(lambda holder: _EVENT_NAME.sub(rename, holder.group()), text)
