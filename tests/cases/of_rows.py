"""Rows of training files: each field is used, or its row is dropped under a reason that names it."""

from tests.cases.harness import Case, rows
from tests.conftest import text_rows

MESSAGES = [{"messages": row["conversations"]} for row in text_rows(40)]
UNKNOWN = [{"text": "x", "label": 3} for _ in range(5)]

CASES = [
    Case("messages are read", "capture $mini source:m.jsonl", 0, ["m.jsonl: 40 rows read"], make=[rows("m.jsonl", *MESSAGES)]),
    Case("unknown columns", "train $mini source:u.jsonl", 1, ["label", "messages"], make=[rows("u.jsonl", *UNKNOWN)], absent=["runs/datasets/*/dataset.json"]),
]
