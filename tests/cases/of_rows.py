"""Rows of training files: each field is used, or its row is dropped under a reason that names it."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.cases.harness import Case, Change, rows, write
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
    "retrieved is not read": ({"retrieved": ["The sky is green."]}, {}),
    "loss=False is not read": ({}, {"loss": False}),
    "prefill is not read": ({"prefill": "Sure"}, {}),
    "audio is not read": ({}, {"audio": "x.wav"}),
    "value beside content": ({}, {"value": "Something else."}),
    "content is not text": ({}, {"content": [{"type": "text", "text": "parts"}]}),
    "unknown role": ({}, {"role": "tool"}),
    "inside an answer": ({}, {"content": "Well. <think>look</think>Yes."}),
    "or no answer behind it": ({}, {"content": "<think>look</think>"}),
    "</think>": ({}, {"content": "look</think>Yes."}),
}


def zstd(found: list[dict]) -> bytes:
    return pa.compress(lines(found), "zstd", asbytes=True)


def lines(found: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


SKIPPED = bytes.fromhex("502a4d18") + b"\4\0\0\0mine"  # a zstd frame that readers skip
FORMATS = [  # what, file, word of the sentence, content
    ("gzip", "g.jsonl", "invalid UTF-8", gzip.compress(lines(MESSAGES))),
    ("gzip by name", "g.jsonl.gz", ".jsonl.zst", gzip.compress(lines(MESSAGES))),
    ("one JSON list", "a.jsonl", "row is not an object", json.dumps(MESSAGES).encode()),
    ("JSON on many lines", "p.jsonl", "invalid JSON", json.dumps(MESSAGES, indent=1).encode()),
    ("UTF-16", "u.jsonl", "invalid UTF-8", lines(MESSAGES).decode().encode("utf-16")),
    ("an empty frame file", "e.jsonl.zst", "it is empty", b""),
    ("a cut frame", "k.jsonl.zst", "cut or damaged", zstd(MESSAGES)[:-9]),
    ("a cut Parquet file", "k.parquet", "cut or damaged", b"PAR1" * 40),
]


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
    *[Case(f"rows that are {what}", f"capture $mini source:{name}", 1, [name, word], make=[write(name, content)], absent=["runs/datasets/*/dataset.json"]) for what, name, word, content in FORMATS],
    Case("two zstd frames with a foreign one between", "capture $mini source:m.jsonl.zst", 0, ["40 rows read"], make=[lambda here: (here / "m.jsonl.zst").write_bytes(zstd(MESSAGES[:9]) + SKIPPED + zstd(MESSAGES[9:]))]),
    Case("a line of many MB", "capture $mini source:m.jsonl", 0, ["41 rows read", "1 line above"], make=[rows("m.jsonl", {"text": "x" * 5_000_000}, *MESSAGES)]),
    Case("a row of 20,000 messages", "capture $mini source:m.parquet", 0, ["41 rows read"], make=[parquet("m.parquet", [{"messages": CHATS[0] * 10_000}, *MESSAGES])]),
    *[Case(f"texts of {length} tokens", f"capture $mini corpus.max_length={length}", 1, ["corpus.max_length must be a positive integer"], absent=["runs/corpus"]) for length in (0, "null")],
    Case("a number of rows beyond 64 bits", "capture $mini 'corpus.stage1=[{source: rows.jsonl, domain: code, count: 99999999999999999999}]'", 1, ["must be at most"], absent=["runs/corpus"]),
    Case("unknown columns", "train $mini source:u.jsonl", 1, ["label", "messages"], make=[rows("u.jsonl", *UNKNOWN)], absent=["runs/datasets/*/dataset.json"]),
]
