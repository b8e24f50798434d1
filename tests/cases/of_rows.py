"""Rows of training files: each field is used, or its row is dropped under a reason that names it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.cases.harness import Case, Change, rows
from tests.conftest import text_rows

CHATS = [row["conversations"] for row in text_rows(40)]
MESSAGES = [{"messages": chat} for chat in CHATS]
ALPACA = [{"instruction": "Say it in French.", "input": ask["content"], "output": answer["content"]} for ask, answer in CHATS]
SYSTEM = [{"system": "Answer in German.", "conversations": chat} for chat in CHATS]
REASONING = [{"messages": [ask, {**answer, "reasoning_content": f"look at {i}"}]} for i, (ask, answer) in enumerate(CHATS)]
THINKING = [{"messages": [ask, {**answer, "thinking": f"look at {i}"}]} for i, (ask, answer) in enumerate(CHATS)]
DEVELOPER = [{"messages": [{"role": "developer", "content": "Answer in German.", "name": "x"}, *chat], "persona": "y"} for chat in CHATS]
OPEN = [{"messages": [ask, {**answer, "content": f"\n<think>look at {i}"}]} for i, (ask, answer) in enumerate(CHATS)]
TOOLS = [{"messages": chat, "tools": "[{}]"} for chat in CHATS]
ALIKE = [{"instruction": f"How many is {i}?", "output": "1"} for i in range(40)]
UNKNOWN = [{"text": "x", "label": 3} for _ in range(5)]
LONG = "corpus.max_length=400"
CHANGED = {  # reason -> what a row has beside its messages, or in its answer
    "weight=0 is not read": ({}, {"weight": 0}),
    "train=False is not read": ({}, {"train": False}),
    "documents is not read": ({"documents": ["The sky is green."]}, {}),
    "rationale is not read": ({"rationale": "Since so."}, {}),
    "label=False is not read": ({"label": False}, {}),
    "developer is not read": ({"developer": "Be short."}, {}),
    "audio is not read": ({}, {"audio": "x.wav"}),
    "value beside content": ({}, {"value": "Something else."}),
    "content is not text": ({}, {"content": [{"type": "text", "text": "parts"}]}),
    "unknown role": ({}, {"role": "tool"}),
    "inside an answer": ({}, {"content": "Well. <think>look</think>Yes."}),
    "or no answer behind it": ({}, {"content": "<think>look</think>"}),
    "</think>": ({}, {"content": "look</think>Yes."}),
}


def changed(row: dict, answer: dict) -> list[dict]:
    return [{"messages": [ask, {**was, **answer}], **row} for ask, was in CHATS[:2]]


def parquet(name: str, found: list[dict]) -> Change:
    return lambda here: pq.write_table(pa.Table.from_pylist(found), here / name)


def trained_on(*texts: str) -> Change:
    """Asserts that the documents of the one dataset hold ``texts`` between them."""

    def check(here: Path) -> None:
        from hyperdflash.data.tokenizer import load_tokenizer
        from hyperdflash.states.dataset import open_dataset

        (found,) = here.glob("runs/datasets/*/dataset.json")
        documents = [document for shard in open_dataset(found.parent).shards["train"] for document in shard.documents]
        text = "\n".join(load_tokenizer(here / "target").batch_decode([document.input_ids for document in documents]))
        assert len(documents) == 20 and [part for part in texts if part not in text] == [], text

    return check


CASES = [
    Case("messages", "capture $mini source:m.jsonl", 0, ["m.jsonl: 40 rows read"], make=[rows("m.jsonl", *MESSAGES)], check=trained_on("Write a function")),
    Case("messages in Parquet", "capture $mini source:m.parquet", 0, ["m.parquet: 40 rows read"], make=[parquet("m.parquet", MESSAGES)], check=trained_on("Write a function")),
    Case("the input of an instruction", f"capture $mini {LONG} source:a.jsonl", 0, ["a.jsonl: 40 rows read"], make=[rows("a.jsonl", *ALPACA)], check=trained_on("Say it in French.\nWrite a function")),
    Case("a system field", f"capture $mini {LONG} source:s.jsonl", 0, ["s.jsonl: 40 rows read"], make=[rows("s.jsonl", *SYSTEM)], check=trained_on("Answer in German.")),
    Case("reasoning beside its answer", f"capture $mini {LONG} mode=think_high source:r.jsonl", 0, ["r.jsonl: 40 rows read"], make=[rows("r.jsonl", *REASONING)], check=trained_on("<think>look at ")),
    Case("reasoning that does not end", "capture $mini source:o.jsonl", 1, ["40 <think> is not closed"], make=[rows("o.jsonl", *OPEN)], absent=["runs/datasets/*/dataset.json"]),
    *[Case(f"a row with: {reason}", "capture $mini source:c.jsonl", 1, [reason], make=[rows("c.jsonl", *changed(*of))], absent=["runs/datasets/*/dataset.json"]) for reason, of in CHANGED.items()],
    Case("thinking beside its answer", f"capture $mini {LONG} mode=think_high source:r.jsonl", 0, ["r.jsonl: 40 rows read"], make=[rows("r.jsonl", *THINKING)], check=trained_on("<think>look at ")),
    Case("a developer's message, and fields that say nothing", f"capture $mini {LONG} source:d.parquet", 0, ["not read: name of messages, persona"], make=[parquet("d.parquet", DEVELOPER)], check=trained_on("Answer in German.")),
    Case("a system prompt's field", f"capture $mini {LONG} source:s.jsonl", 0, ["s.jsonl: 40 rows read"], make=[rows("s.jsonl", *({"system_prompt": "Answer in German.", "messages": chat} for chat in CHATS))], check=trained_on("Answer in German.")),
    Case("documents beyond the context", "capture $mini corpus.max_length=2049", 1, ["exceeds the target's context of 2,048"], absent=["runs/corpus", "runs/datasets"]),
    Case("a field that is not read", "capture $mini source:t.jsonl", 1, ["40 tools is not read"], make=[rows("t.jsonl", *TOOLS)], absent=["runs/datasets/*/dataset.json"]),
    Case("rows that differ by numbers alone", "train $mini corpus.heldout=0.5 source:n.jsonl", 1, ["held-out"], make=[rows("n.jsonl", *ALIKE)], absent=["runs/datasets/*/dataset.json"]),
    Case("unknown columns", "train $mini source:u.jsonl", 1, ["label", "messages"], make=[rows("u.jsonl", *UNKNOWN)], absent=["runs/datasets/*/dataset.json"]),
]
