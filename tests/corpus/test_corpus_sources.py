"""Rows from elsewhere: three schemas read, every malformed row counted."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter

import pytest

from src.contracts import Turn
from src.corpus.sources import stream

GOOD = [
    {"id": "1", "conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {
        "conversations": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {"instruction": "write f", "output": "def f(): pass"},
    {"turns": ["first question", "second question"]},
]
BAD = {
    "row is not an object": b"[1, 2]",
    "invalid JSON": b'{"turns": ["cut',
    "invalid UTF-8": b'{"turns": ["\xff\xfe"]}',
    "no known fields": b'{"text": "x"}',
    "conversations is not a list of messages": b'{"conversations": "x"}',
    "missing or unknown role": b'{"conversations": [{"content": "x"}]}',
    "content is not text": b'{"conversations": [{"role": "user", "content": 3}]}',
    "empty output": b'{"instruction": "x", "output": "  "}',
    "instruction is not text": b'{"output": "x"}',
    "NUL byte in turn": b'{"turns": ["a\\u0000b"]}',
    "no turns": b'{"turns": []}',
    "roles do not alternate": b'{"conversations": [{"role": "assistant", "content": "x"}]}',
    "turns is not a list": b'{"turns": "one"}',
}


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in GOOD]
    bad = list(BAD.values())
    path.write_bytes(
        b"\n".join([bad[0], *good[:2], b"", *bad[1:], *good[2:], b'{"turns": ["' + b"x" * 1_000_000 + b'"]}']) + b"\n"
    )
    return path


def test_good_rows_are_read_and_bad_ones_counted_by_reason(rows_file, caplog):
    drops = Counter()
    found = list(stream(rows_file, "chat", drops=drops))
    assert [conversation.turns[-1] for conversation in found[:4]] == [
        Turn("assistant", "hello"),
        Turn("assistant", "a"),
        Turn("assistant", "def f(): pass"),
        Turn("user", "first question"),
    ]
    assert len(found) == 5 and len(found[4].turns[0].content) == 1_000_000
    assert drops == dict.fromkeys(BAD, 1)
    assert "13 rows dropped" in caplog.text and "invalid UTF-8" in caplog.text


def test_ids_come_from_content(rows_file, tmp_path):
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(json.dumps(row) for row in reversed(GOOD)))
    first = {conversation.id for conversation in stream(rows_file, "chat")}
    assert {conversation.id for conversation in stream(again, "chat")} < first
    assert len(first) == 5


def test_the_limit_counts_conversations(rows_file):
    assert len(list(stream(rows_file, "chat", limit=2))) == 2


def test_hub_sets_are_streamed(monkeypatch):
    asked = {}

    def load_dataset(name, **options):
        asked.update(name=name, **options)
        return iter(GOOD[2:3] * 3 + [{"instruction": None, "output": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    drops = Counter()
    found = list(stream("theblackcat102/evol-codealpaca-v1", drops=drops))
    assert asked == {"name": "theblackcat102/evol-codealpaca-v1", "split": "train", "streaming": True}
    assert [conversation.domain for conversation in found] == ["code"] * 3
    assert drops == {"instruction is not text": 1}


def test_wrong_sources_are_refused_before_reading(tmp_path, rows_file):
    with pytest.raises(ValueError, match="got 'some/dataset'"):
        stream("some/dataset")
    with pytest.raises(ValueError, match="no file at"):
        stream(tmp_path / "none.jsonl", "chat")
    with pytest.raises(ValueError, match="pass domain="):
        stream(rows_file)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        stream(rows_file, "chat", limit=0)
