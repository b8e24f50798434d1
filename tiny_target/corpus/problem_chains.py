"""Word problem templates put together from parts: a start, then one or two events, the last of which asks.

    start  "{N} has {a} {box} with {b} {x} each."                                  "There are [c = a * b] {x}."
    event  "Then {N} sells {k} {x}. | How many {x} does {N} have left?"            "{N} has [v = u - k] {x} left."

A start's numbers are ``a b d p``; what it computes last (or ``a``, if nothing) is the quantity of the story. An event's
numbers are ``k m``; it reads the quantity so far as ``u`` and computes ``v`` (and ``w``), numbered in the chain. In a
wording of an event "|" separates what happens from what is asked. A template is one chain in all wordings of its parts,
so that parts recur in other chains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from tiny_target.corpus.word_problems import Template, template

LARGEST_RESULT = 200

_COMPUTED = re.compile(r"\[(\w+) =")
_PLACE_HOLDERS = re.compile(r"\{\w+\}|\[[^\]]+\]")
_EVENT_NAME = re.compile(r"\b[kmuvw]\b")


@dataclass(frozen=True)
class Part:
    """A start or an event; ``numbers`` maps a name to its inclusive range, ``let`` names to expressions of them."""

    wordings: tuple[str, ...]
    steps: str
    numbers: dict[str, tuple[int, int]]
    let: dict[str, str] | None


def part(*wordings: str, steps: str = "", let: dict[str, str] | None = None, **numbers: tuple[int, int]) -> Part:
    """Shorthand of the tables: ``k=(2, 40)`` are ranges."""
    return Part(wordings, steps, numbers, let)


def _numbered(text: str, quantity: str, position: int) -> str:
    """An event's text with ``u`` replaced by the quantity so far and its other names numbered by the event's position."""

    def rename(name: re.Match) -> str:
        return quantity if name.group() == "u" else f"{name.group()}{position}"

    return _PLACE_HOLDERS.sub(lambda holder: _EVENT_NAME.sub(rename, holder.group()), text)


def chain(name: str, start: Part, *events: Part) -> Template:
    """One template: the steps in order, every combination of wordings, all results in 2 .. LARGEST_RESULT."""
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
    return template(name, *map(" ".join, product(*wordings)), steps=worked, when=bounds, let=start.let, **numbers)


def chains(family: str, starts: dict[str, Part], events: dict[str, Part], table: str) -> tuple[Template, ...]:
    """The templates of a table: each line is a start and its chains, ``lose+share`` is two events in a row."""
    found = []
    for line in table.strip().splitlines():
        start, *rows = line.split()
        for row in rows:
            found.append(chain(f"{family}_{start}_{row}", starts[start], *(events[key] for key in row.split("+"))))
    return tuple(found)
