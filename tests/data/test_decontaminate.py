"""Training text that holds a benchmark's prompt is found and counted, and other text is kept."""

from __future__ import annotations

import json
import logging

import pytest

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.decontaminate import decontaminate
from hyperdflash.data.streamed import StreamedCorpus

QUESTION = "Ann has 3 red apples, buys 14 more at the market and gives Ben half of them."  # 16 words
STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
MBPP = "Write a python function to find smallest number in a list."  # 11 words
PROMPTS = {
    "gsm8k": [[QUESTION + STEP]],
    "math500": [["Find $x$." + STEP]],  # 2 words
    "aime25": [["Some sums " * 9 + STEP]],
    "humaneval": [["Write a solution to the following problem and make sure that it passes the tests:\n```python\npass\n```"]],
    "mbpp": [[MBPP]],
    "livecodebench": [["You are an expert Python programmer."]],
    "mt-bench": [["Compose a post about a trip to the islands in the warm south sea.", "Now tell the same story as a poem."]],
}  # fmt: skip


def said(*contents: str, name: str = "x") -> Conversation:
    return Conversation(name, "chat", tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)))


def prompts() -> list[Conversation]:
    return [
        Conversation(f"{name}/{n}", name, tuple(Turn("user", turn) for turn in turns))
        for name, rows in PROMPTS.items()
        for n, turns in enumerate(rows)
    ]


WORDS = QUESTION.split()
CASES = [
    (said("Solve: " + QUESTION.upper().replace(",", " ;"), "17"), "gsm8k"),  # case and punctuation do not matter
    (said("Hi", f"I recall: {' '.join(WORDS[2:15])} ..."), "gsm8k"),  # 13 words, in an answer
    (said(" ".join(WORDS[2:14]), "x"), None),  # 12 words
    (said(" ".join(WORDS[:8]), " ".join(WORDS[8:])), None),  # the n-gram would reach over a turn's end
    (said(" ".join([*WORDS[:8], "very", *WORDS[8:]]), "x"), None),  # no 13 words in a row
    (said("Tell me. " + MBPP + " Thanks!", "x"), "mbpp"),  # a short prompt as a whole
    (said(MBPP.replace("smallest", "largest"), "x"), None),
    (said("find X", "1"), "math500"),  # a very short prompt only as a whole turn
    (said("find X" + STEP, "1"), "math500"),  # with its wording
    (said("Please find x here", "1"), None),
    (said("Go on.", "x", "now tell the same story as a poem", "y"), "mt-bench"),  # the second turn counts too
    (said("What is it? " + STEP, "x"), None),  # wording around a question is nobody's prompt
    (said("Write a solution to the following problem and make sure that it passes the tests:", "x"), None),
]


@pytest.mark.parametrize(("conversation", "benchmark"), CASES)
def test_by_hand(conversation, benchmark, caplog):
    caplog.set_level(logging.INFO)
    kept = decontaminate([conversation], prompts())
    assert kept == ([] if benchmark else [conversation])
    assert (f"1 {benchmark}" if benchmark else "0 of 1 training conversations") in caplog.text


def test_what_is_left_out_is_counted_by_benchmark(caplog):
    caplog.set_level(logging.INFO)
    conversations = [conversation for conversation, _ in CASES] * 2
    assert len(decontaminate(conversations, prompts())) == 14
    assert caplog.messages == [
        "decontamination: 12 of 26 training conversations left out for sharing 13 words in a row, or a whole shorter prompt, "
        "with a benchmark: 4 gsm8k, 4 math500, 2 mbpp, 2 mt-bench"
    ]


@pytest.fixture
def folder(tmp_path):
    for name, rows in PROMPTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in rows))
    return tmp_path


def corpus(folder, **changed) -> StreamedCorpus:
    rows = [f"a question about {thing}" for thing in ("oak", "elm", "fir", "ash", "yew", "box", "bay", "fig", "gum", "nut")]
    rows[1:1] = [MBPP, QUESTION, "Solve this: " + QUESTION]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": text, "output": "x"}) + "\n" for text in rows))
    entries = [{"source": str(file), "domain": "chat", "count": 50}]
    fields = dict(stage=1, stage1=entries, stage2=[], validation=50, responses="original", temperature=0.0, top_p=1.0)
    fields |= dict(max_new_tokens=8, max_length=64, decontaminate=True, benchmarks_path=folder)
    fields |= dict(seed=0, heldout=0.4, directory=folder / "kept")
    return StreamedCorpus(**(fields | changed))


def test_the_streamed_corpus_leaves_them_out(folder, caplog):
    caplog.set_level(logging.INFO)

    def asked(conversations):
        return {conversation.turns[0].content for conversation in conversations}

    dirty = corpus(folder, decontaminate=False, benchmarks_path=None)
    bad = {MBPP, QUESTION, "Solve this: " + QUESTION}
    train, validation = asked(dirty.train()), asked(dirty.validation_conversations())
    assert len(train) + len(validation) == 13 and bad < train | validation and bad & train and bad & validation
    made = corpus(folder)
    assert asked(made.train()) == train - bad
    assert asked(made.validation_conversations()) == validation - bad
    assert f"{len(bad & train)} of {len(train)} training" in caplog.text
    assert f"{len(bad & validation)} of {len(validation)} validation" in caplog.text
    assert made.row_stats[0].dropped["holds a benchmark's prompt"] == len(bad & train)
    with pytest.raises(ValueError, match=r"corpus\.decontaminate must be true or false"):
        corpus(folder, decontaminate="yes")


def test_without_prompts_training_stops_with_what_to_do(folder):
    (folder / "mbpp.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no mbpp\.jsonl.*train without the check: corpus\.decontaminate=false"):
        corpus(folder).train()


def test_local_files_train_without_a_network_and_the_terminal_names_what_was_not_compared(folder, monkeypatch, caplog):
    import datasets

    def load_dataset(path, **_):
        if path == "openai/gsm8k":
            return datasets.Dataset.from_list([{"question": QUESTION}])
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    offline, plain = corpus(folder, benchmarks_path=None), corpus(folder, decontaminate=False)
    kept = {c.turns[0].content for c in [*offline.train(), *offline.validation_conversations()]}
    every = {c.turns[0].content for c in [*plain.train(), *plain.validation_conversations()]}
    assert every - kept == {QUESTION, "Solve this: " + QUESTION}
    absent = "math500, aime25, humaneval, mbpp, livecodebench, mt-bench"
    assert offline.row_stats[0].lines()[-1].strip() == f"not compared with the benchmarks: {absent}"
    assert "benchmarks" not in plain.row_stats[0].lines()[-1]
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("decontamination: no row")]
    assert len(warned) == 1 and absent in warned[0] and "HYPERDFLASH_BENCHMARKS" in warned[0]
    with pytest.raises(ValueError, match=r"MATH-500 from the hub .*corpus\.decontaminate=false"):
        hub = [*offline.stage1, {"source": "zhaode/EagleChat", "count": 1}]
        corpus(folder, benchmarks_path=None, stage1=hub)._benchmarks  # noqa: B018


def test_where_the_prompts_lie_does_not_rename_a_run(compose_config, mini_overrides):
    from hyperdflash.identity import run_name

    def name(*more):
        return run_name(compose_config("train", [*mini_overrides, *more]))

    assert name("corpus.benchmarks_path=a") == name("corpus.benchmarks_path=b") != name("corpus.decontaminate=true")
