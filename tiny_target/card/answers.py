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

    @property
    def parses(self) -> bool:
        """Tells whether the text is Python with at least one statement."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            try:
                return bool(ast.parse(self.text).body)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return False


def answer_figures(answers: Sequence[Answer]) -> dict:
    """Returns means over the answers of one group; ``parses*`` is for code, ``right`` for math; None where a mean does not
    apply or has no answers."""
    code = [a for a in answers if a.group == "code"]
    return {
        "prompts": len(answers),
        "ended": _mean([a.ended for a in answers]),
        "looped": _mean([a.looped for a in answers]),
        "mean_tokens": _mean([a.num_tokens for a in answers]),
        "parses": _mean([a.parses for a in code]),
        "parses_of_ended": _mean([a.parses for a in code if a.ended]),
        "right": _mean([final_number(a.text) == a.wanted for a in answers if a.wanted is not None]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
