"""Every template's worked answers are right, read back from the text alone."""

from __future__ import annotations

import ast
import operator
import re

import pytest

from src.corpus.embedded import TEMPLATES, math_candidates
from src.corpus.word_problems import as_conversation, problems

_STEP = re.compile(r"([\d(][\d\s()+*/-]*) = (\d+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str) -> float:
    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        return _OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(expression.strip(), mode="eval").body)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_worked_answers_are_correct(template):
    found = problems(template, 40)
    assert len(found) == 40
    for problem in found:
        steps = _STEP.findall(problem.worked)
        assert len(steps) == template.steps.count("[")
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        for expression, result in steps:
            assert evaluate(expression) == int(result), problem.worked
            # a step uses what the question gave, an earlier result, or a small constant of the story
            assert all(int(n) in known or int(n) in {2, 3, 4, 7, 60} for n in re.findall(r"\d+", expression)), problem
            known.add(int(result))
        assert problem.worked.endswith(f"The answer is {steps[-1][1]}.")
        assert problem.answer == int(steps[-1][1]) >= 0
        assert problem.question.endswith("?")
        assert not set("{}[]") & set(problem.question + problem.worked)


def test_there_are_many_templates_and_their_shapes_differ():
    assert len(TEMPLATES) >= 60
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    wordings = [re.sub(r"\{\w+\}", "_", question) for template in TEMPLATES for question in template.questions]
    assert len(set(wordings)) == len(wordings)
    assert 0.04 <= sum(template.is_unseen for template in TEMPLATES) / len(TEMPLATES) <= 0.2


def test_problems_of_a_template_differ_in_their_numbers():
    found = problems(TEMPLATES[0], 200)
    assert len({problem.key for problem in found}) == len(found) == 200
    assert len({problem.question for problem in found}) == 200
    assert problems(TEMPLATES[0], 200) == found


def test_ids_tell_seen_from_unseen_templates():
    for candidate in math_candidates(TEMPLATES, 10):
        kind = candidate.conversation.id.split("/")[1]
        assert candidate.heldout or kind == "seen"
    problem = problems(TEMPLATES[0], 1)[0]
    assert as_conversation(problem, unseen_template=True).id.startswith("math/unseen/")
    assert [turn.content for turn in as_conversation(problem, unseen_template=False).turns] == [
        problem.question,
        problem.worked,
    ]
