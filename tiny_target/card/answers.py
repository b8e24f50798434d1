"""Measures greedy answers: shares that end, loop, parse, and have the right number."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tiny_target.corpus.eval_prompts import final_number


@dataclass(frozen=True)
class Answer:
    """A prompt's last answer. ``wanted`` is the right final number of a math prompt, None elsewhere."""

    id: str
    group: str
    question: str
    text: str
    num_tokens: int
    ended: bool
    looped: bool
    wanted: int | None = None


def parses(text: str) -> bool:
    """Tells whether ``text`` is Python with at least one statement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def answer_figures(answers: Sequence[Answer]) -> dict:
    """Returns shares over the answers of one group; ``parse*`` is for code, ``right`` for math; None where a share does not
    apply or has no answers."""
    code = answers and answers[0].group == "code"
    math_answers = [a for a in answers if a.wanted is not None]
    ended = [a for a in answers if a.ended]
    return {
        "prompts": len(answers),
        "ended": share(answers, lambda a: a.ended),
        "looped": share(answers, lambda a: a.looped),
        "mean_tokens": sum(a.num_tokens for a in answers) / len(answers) if answers else None,
        "parses": share(answers, lambda a: parses(a.text)) if code else None,
        "parses_of_ended": share(ended, lambda a: parses(a.text)) if code else None,
        "right": share(math_answers, lambda a: final_number(a.text) == a.wanted),
    }


def share(items: Sequence, holds) -> float | None:
    """Returns the share of ``items`` for which ``holds`` is true; None without items."""
    return sum(map(bool, map(holds, items))) / len(items) if items else None
