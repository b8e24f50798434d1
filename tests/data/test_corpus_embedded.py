"""Scanning, uniform style, near-duplicates, the split and the cache."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import fold_text
from tiny_target.corpus import embedded
from tiny_target.corpus.definitions import FunctionDefinition, scan
from tiny_target.corpus.embedded import Candidate, chat_candidates, code_candidates, load_embedded, math_candidates, select
from tiny_target.corpus.explanations import explain_topic
from tiny_target.corpus.near_duplicates import first_of_each, fold_code
from tiny_target.corpus.packages import corpus_files, python_files
from tiny_target.corpus.split import heldout_kind, is_heldout_module, is_heldout_text
from tiny_target.corpus.word_problems import templates

ROOT = Path(__file__).resolve().parents[2]


def functions(package: Path) -> dict[str, FunctionDefinition]:
    return {item.name: item for item in scan(python_files(package, "tools")) if isinstance(item, FunctionDefinition)}


def test_tests_generated_and_broken_files_are_left_out(package):
    assert [file.module for file in python_files(package, "tools")] == ["tools.broken", "tools.made", "tools.numbers"]
    assert {item.module for item in scan(python_files(package, "tools"))} == {"tools.numbers"}


def test_functions_are_rewritten_in_one_style(package):
    found = functions(package)
    assert set(found) == {"total", "summe", "biggest", "wait"}  # neither stubs nor undocumented ones
    assert found["total"].source == (
        "def total(values, start=0):\n    result = start\n    for value in values:\n        result += value\n    return result"
    )
    assert found["total"].sentences == ("Return the sum of all values.",)
    assert found["wait"].signature == "wait(self, seconds=1.5, *, quietly=False)"
    assert found["wait"].arguments == ("seconds=1.5", "quietly=False")
    assert found["wait"].source.startswith("async def wait(self, seconds=1.5, *, quietly=False):")
    assert "property" not in found["biggest"].source


def test_a_code_task_is_one_instruction_and_code_that_parses(package):
    tasks = [candidate.conversation for candidate in code_candidates(scan(python_files(package, "tools")))]
    assert len(tasks) == 4
    for task in tasks:
        user, assistant = task.turns
        definition = ast.parse(assistant.content).body[0]
        assert (user.role, assistant.role) == ("user", "assistant")
        assert f"`{definition.name}({ast.unparse(definition.args)})`" in user.content
    total = next(task for task in tasks if "`total(" in task.turns[0].content)
    assert "sum of all values" in total.turns[0].content


def test_explanations_answer_from_the_definition(package):
    found = [candidate.conversation for candidate in chat_candidates(scan(python_files(package, "tools")))]
    opening = {turn.content for conversation in found for turn in conversation.turns[1:2]}
    assert "Small tools for lists of numbers. They keep no state." in opening
    assert "Counts things by name. The counts never fall." in opening
    for conversation in found:
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * (len(conversation.turns) // 2)
        assert 1 <= len(conversation.turns) // 2 <= 3
        assert "tools.numbers" in conversation.turns[0].content


def test_topics_give_one_explanation_a_paragraph():
    text = 'Heading\n*******\n\nThe "pass" statement does nothing. It is a null operation.\n\nno full sentence here "x"\n'
    (conversation,) = explain_topic("pass", text)
    assert "`pass`" in conversation.turns[0].content
    assert conversation.turns[1].content == "The `pass` statement does nothing. It is a null operation."


def test_renamed_and_renumbered_code_folds_to_the_same(package):
    found = functions(package)
    assert fold_code(found["total"].source) == fold_code(found["summe"].source)
    assert fold_code("def f(a):\n    return a.sum()") != fold_code("def f(a):\n    return a.mean()")
    train, heldout = select(code_candidates(scan(python_files(package, "tools"))), None)
    assert len(train) + len(heldout) == 3


def test_near_duplicates_are_found_and_different_texts_kept():
    base = [f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)]
    edited = [*base[:30], "other", *base[31:]]
    shuffled = random.Random(0).sample(base, len(base))
    texts = [" ".join(words) for words in (base, edited, shuffled, base)]
    assert first_of_each(texts) == [True, False, True, False]


def test_the_split_reads_normalized_content_only():
    texts = [f"The {word} of value number {n}." for n in range(300) for word in ("name",)]
    assert len({is_heldout_text(text) for text in texts}) == 1  # digits do not move a text
    assert is_heldout_text("Return  the X.") == is_heldout_text("return the x.")
    words = [f"{a}{b} of things" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    assert 0.01 < sum(map(is_heldout_text, words)) / len(words) < 0.06
    modules = [f"pack{n}.sub.part" for n in range(1000)]
    assert 0.02 < sum(map(is_heldout_module, modules)) / 1000 < 0.06
    assert all(is_heldout_module(m) == is_heldout_module(f"{m}.deeper.still") for m in modules)
    assert [heldout_kind(name) for name in ("math/seen/1", "math/unseen/1", "code/1")] == ["seen", "unseen", None]


def test_splits_share_no_normalized_content_and_keep_modules_whole():
    files = sorted(corpus_files(), key=lambda file: file.module)
    files = [
        file for file in files if file.module.split(".")[0] in ("json", "email", "logging", "asyncio", "statistics", "heapq")
    ]
    definitions = scan(files)
    for candidates, shingles in (
        (code_candidates(definitions), True),
        (chat_candidates(definitions), True),
        (math_candidates(templates(), 60), False),
    ):
        folded = {item.conversation.id: item.folded for item in candidates}
        train, heldout = select(candidates, None, by_shingles=shingles)
        assert train and heldout
        assert not {folded[c.id] for c in train} & {folded[c.id] for c in heldout}
        assert (
            not {fold_text(c.turns[1].content) for c in train} & {fold_text(c.turns[1].content) for c in heldout}
            or not shingles
        )
        assert len({c.id for c in train + heldout}) == len(train) + len(heldout)
        assert not any("/unseen/" in c.id for c in train)
        held_modules = {item.conversation.id for item in candidates if item.heldout}
        assert {c.id for c in heldout} <= held_modules and not {c.id for c in train} & held_modules


def test_selection_does_not_depend_on_the_order_of_files(package):
    candidates = code_candidates(scan(python_files(package, "tools"))) + math_candidates(templates(), 5)
    shuffled = random.Random(1).sample(candidates, len(candidates))
    assert select(candidates, 9_000) == select(shuffled, 9_000)


def test_the_cap_counts_bytes_of_training_text():
    items = [Candidate(Conversation(f"chat/{n}", "chat", (Turn("user", "é" * 50),)), str(n), n % 5 == 0) for n in range(100)]
    train, heldout = select(items, 1_000, by_shingles=False)
    assert (len(train), len(heldout)) == (10, 20)


def test_the_corpus_does_not_depend_on_the_hash_seed(package):
    command = (
        "import sys; from tiny_target.corpus.embedded import *; from tiny_target.corpus.definitions import scan;"
        "from tiny_target.corpus.packages import python_files;"
        "d = scan(python_files(Path(sys.argv[1]), 'tools'));"
        "c = code_candidates(d) + chat_candidates(d) + math_candidates(templates()[:9], 20);"
        "print(content_hash(repr(select(c, 50_000))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", command, str(package)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {""}


CORPUS = {
    "train": [Conversation("code/1", "code", (Turn("user", "ü?"), Turn("assistant", "1\n2")))],
    "heldout": [Conversation("chat/2", "chat", (Turn("user", "a"), Turn("assistant", "b")))],
}


def test_the_cache_is_written_once_and_read_back_equal(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(embedded, "build", lambda: calls.append(1) or CORPUS)
    assert load_embedded("train", cache_dir=tmp_path) == CORPUS["train"]
    assert load_embedded("heldout", cache_dir=tmp_path) == CORPUS["heldout"]
    assert len(calls) == 1 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(embedded, "installed_versions", lambda: {"torch": "other"})
    load_embedded("train", cache_dir=tmp_path)
    assert len(calls) == 2


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        embedded.write_rows(tmp_path / "corpus.jsonl", {"train": [*CORPUS["train"], None]})
    assert list(tmp_path.iterdir()) == []


def test_the_runs_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(embedded, "build", lambda: CORPUS)
    assert load_embedded("train") == CORPUS["train"]
    assert len(list((tmp_path / "elsewhere" / "corpus").iterdir())) == 1


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 'test'"):
        load_embedded("test", cache_dir=tmp_path)
