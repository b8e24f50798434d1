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
OPEN = [{"messages": [ask, {**answer, "content": f"\n<think>look at {i}"}]} for i, (ask, answer) in enumerate(CHATS)]
TOOLS = [{"messages": chat, "tools": "[{}]"} for chat in CHATS]
ALIKE = [{"instruction": f"How many is {i}?", "output": "1"} for i in range(40)]
UNKNOWN = [{"text": "x", "label": 3} for _ in range(5)]
LONG = "corpus.max_length=400"


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
    Case("a field that is not read", "capture $mini source:t.jsonl", 1, ["40 tools is not read"], make=[rows("t.jsonl", *TOOLS)], absent=["runs/datasets/*/dataset.json"]),
    Case("rows that differ by numbers alone", "train $mini corpus.heldout=0.5 source:n.jsonl", 1, ["held-out"], make=[rows("n.jsonl", *ALIKE)], absent=["runs/datasets/*/dataset.json"]),
    Case("unknown columns", "train $mini source:u.jsonl", 1, ["label", "messages"], make=[rows("u.jsonl", *UNKNOWN)], absent=["runs/datasets/*/dataset.json"]),
]
