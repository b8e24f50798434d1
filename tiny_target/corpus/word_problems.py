"""Generates arithmetic word problems with worked answers from templates (problem_templates).

1. draw the numbers of a template; skip draws that break its condition, do not divide evenly or repeat an earlier one
2. draw names and things, write question and steps: ``[c = a + b]`` becomes ``3 + 4 = 7``, and the last result is the answer
3. add "The answer is n."

The generator's seed is the template's name, so that the problems of a template do not depend on other templates.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash
from tiny_target.corpus.problem_templates import Template
from tiny_target.corpus.words import words

_WORDS = words("problems")

_NAME = re.compile(r"[a-z]\w*")
_STEP = re.compile(r"\[(\w+) = ([^\]]+)\]")


@dataclass(frozen=True)
class Problem:
    """Problems that differ only in names, things and wording have equal ``key``."""

    template: str
    key: str
    question: str
    worked: str
    answer: int


def _value(expression: str, numbers: dict[str, int]) -> int:
    """Evaluates an expression of the template files (our own constants, never input)."""
    value = eval(expression, {"__builtins__": {}}, numbers)
    assert value == int(value), f"{expression} is not whole with {numbers}"
    return int(value)


def _work(steps: str, numbers: dict[str, int]) -> tuple[str, dict[str, int]] | None:
    """Writes out the computations of ``steps``; returns the text and all names with values, the last computed one last.

    None where a division has a remainder or a result is not positive.
    """
    bound = dict(numbers)
    for name, expression in _STEP.findall(steps):
        if "/" in expression and _value(expression.replace("/", "%"), bound):
            return None
        bound[name] = _value(expression, bound)
        if bound[name] < 1:
            return None

    def write(match: re.Match) -> str:
        name, expression = match.groups()
        return f"{_NAME.sub(lambda found: str(bound[found.group()]), expression)} = {bound[name]}"

    return _STEP.sub(write, steps), bound


def problems(source: Template, count: int) -> list[Problem]:
    """Returns up to ``count`` problems with different numbers; fewer where the ranges have fewer."""
    rng = random.Random(f"maths {source.name}")
    found: dict[str, Problem] = {}
    for _ in range(count * 12):
        if len(found) == count:
            break
        numbers = {key: rng.randint(*span) for key, span in source.numbers.items()}
        for key, expression in source.derived.items():
            numbers[key] = _value(expression, numbers)
        first, second = rng.sample(_WORDS["names"], 2)
        thing, other = rng.sample(_WORDS["things"], 2)
        box, place = rng.choice(_WORDS["containers"]), rng.choice(_WORDS["places"])
        chosen = {"N": first, "M": second, "x": thing, "y": other, "box": box, "place": place}
        question = rng.choice(source.questions)
        key = f"{source.name} {sorted(numbers.items())}"
        work = _work(source.steps, numbers)
        if key in found or box in (thing, other) or work is None or not _holds(source.condition, work[1]):
            continue
        worked, bound = work
        answer = list(bound.values())[-1]
        text = worked.format(**chosen, **numbers)
        found[key] = Problem(source.name, key, question.format(**chosen, **numbers), f"{text} The answer is {answer}.", answer)
    return list(found.values())


def _holds(condition: str, numbers: dict[str, int]) -> bool:
    return bool(eval(condition, {"__builtins__": {}}, numbers))


def as_conversation(problem: Problem, *, unseen_template: bool) -> Conversation:
    """Returns one user turn and its worked answer; the id tells whether training sees the template."""
    kind = "unseen" if unseen_template else "seen"
    turns = (Turn("user", problem.question), Turn("assistant", problem.worked))
    return Conversation(f"math/{kind}/{content_hash(turns[0].content + turns[1].content)}", "math", turns)
