"""Every template's worked answers are right, read back from the text alone."""

from __future__ import annotations

import ast
import operator
import re

import pytest

from tiny_target.corpus.embedded import math_candidates
from tiny_target.corpus.word_problems import Part, Template, as_conversation, chain, problems, templates

TEMPLATES = templates()

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
    found = problems(template, 60)
    assert len(found) == 60
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
        assert all(0 < int(result) < 1000 for _, result in steps), problem.worked
        assert problem.answer == int(steps[-1][1])
        assert problem.question.endswith("?")
        assert not set("{}[]|") & set(problem.question + problem.worked)
        assert "  " not in problem.question + problem.worked


def test_there_are_many_templates_and_their_shapes_differ():
    assert len(TEMPLATES) >= 300
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


def test_draws_that_do_not_divide_or_fall_below_one_are_skipped():
    source = Template("t", ("{a} {b}?",), "[c = a / 2]. [d = c - b].", {"a": (1, 12), "b": (1, 6)}, {})
    assert {problem.question for problem in problems(source, 99)} == {
        f"{a} {b}?" for a in range(2, 13, 2) for b in range(1, a // 2)
    }


def test_a_chain_joins_its_parts():
    wordings = ("{a} {box} of {b} m.", "{b} m in {a} {box}.")
    start = Part(wordings, "There are [c = a * b] m.", {"a": (4, 4), "b": (5, 5)}, {})
    sell = Part(("{k} m are sold. | How many m are left?",), "There are [v = u - k] m left.", {"k": (2, 2)}, {})
    parts = Part(("| How many parts of {k} m are there?",), "There are [v = u / k] parts.", {"k": (3, 3)}, {})
    made = chain("t", start, sell, parts)
    assert made.questions == (
        "{a} {box} of {b} m. {k1} m are sold. How many parts of {k2} m are there?",
        "{b} m in {a} {box}. {k1} m are sold. How many parts of {k2} m are there?",
    )
    (problem,) = problems(made, 9)
    assert (
        problem.worked == "There are 4 * 5 = 20 m. There are 20 - 2 = 18 m left. There are 18 / 3 = 6 parts. The answer is 6."
    )


def test_unseen_chains_are_made_of_sentences_that_training_sees():
    def sentences(chosen):
        return {
            sentence
            for template in chosen
            for text in (template.steps, *template.questions)
            for sentence in re.split(r"(?<=[.?]) ", re.sub(r"\[.*?\]|\{[a-z]\w*\}", "_", text))
        }

    unseen = [template for template in TEMPLATES if template.family and template.is_unseen]
    assert len(unseen) >= 15
    assert len({template.name.split("_")[0] for template in unseen}) >= 8
    assert not sentences(unseen) - sentences(template for template in TEMPLATES if not template.is_unseen)
