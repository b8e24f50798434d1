"""Rows from elsewhere: every schema and file format read, every malformed row counted and named, none a crash."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperdflash.contracts import Turn
from hyperdflash.data.row_stats import RowStats
from hyperdflash.data.rows import MalformedRow, parse_row
from hyperdflash.data.sources import HUB_DATASETS, MAX_LINE_BYTES, read_source

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
    {"conversations": [{"from": "human", "value": "hé\u2028?"}, {"from": "gpt", "value": "oui"}]},
]
LAST = ["hello", "a", "def f(): pass", "first question", "oui"]
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
    "half a surrogate pair in turn": b'{"turns": ["a\\ud800b"]}',
    "no turns": b'{"turns": []}',
    "roles do not alternate": b'{"conversations": [{"role": "assistant", "content": "x"}]}',
    "turns is not a list": b'{"turns": "one"}',
    f"line above {MAX_LINE_BYTES:,} bytes": b'{"turns": ["' + b"x" * 3 * MAX_LINE_BYTES + b'"]}',
}


def stream(source, domain=None, *, stats=None):
    """Yields the conversations of a source without their places."""
    return read_source(source, domain, stats or RowStats(str(source)))


@pytest.fixture
def bad_lines():
    """Bad rows before, between and behind the good ones, an empty line among them."""
    good, bad = [json.dumps(row).encode() for row in GOOD], list(BAD.values())
    return b"\n".join([b"\xef\xbb\xbf" + bad[0], *good[:2], b"", *bad[1:], *good[2:]]) + b"\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.zst"])
def test_good_rows_are_read_and_bad_ones_counted_and_named(bad_lines, tmp_path, name):
    path = tmp_path / name
    if name.endswith("zst"):
        half = len(bad_lines) // 2  # two frames in one file, as parallel compressors write them
        codec = pa.Codec("zstd")
        path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in (bad_lines[:half], bad_lines[half:])))
    else:
        path.write_bytes(bad_lines)
    stats = RowStats(name)
    assert [c.turns[-1].content for c in stream(path, "chat", stats=stats)] == LAST
    assert stats.dropped == dict.fromkeys(BAD, 1) and stats.read == len(BAD) + len(GOOD)
    lines = [1, *range(5, 5 + len(BAD) - 1)]  # the empty line has a number
    assert stats.places == {reason: [f"{name}:{line}"] for reason, line in zip(BAD, lines, strict=True)}
    told = "\n".join(stats.lines())
    assert f"{name}: {len(BAD) + len(GOOD)} rows read" in told and f"1 invalid UTF-8: {name}:6" in told


def test_a_line_a_byte_too_long_is_dropped_and_one_that_fits_is_read(tmp_path):
    path, around = tmp_path / "rows.jsonl", len(b'{"turns": [""]}')
    fits = b'{"turns": ["' + b"y" * (MAX_LINE_BYTES - around) + b'"]}'
    path.write_bytes(b"\n".join([fits, fits[:13] + b"y" + fits[13:], b'{"turns": ["z"]}', fits]))  # no line break at the end
    stats = RowStats("rows")
    assert [len(c.turns[0].content) for c in stream(path, "chat", stats=stats)] == [
        *(MAX_LINE_BYTES - around, 1, MAX_LINE_BYTES - around)
    ]
    assert stats.places == {f"line above {MAX_LINE_BYTES:,} bytes": ["rows.jsonl:2"]}


def test_utf16_bytes_are_not_guessed(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD[2]) + "\n"
    path.write_bytes(line.encode("utf-16-be") + line.encode())
    stats = RowStats("rows")
    assert len(list(stream(path, "code", stats=stats))) == 1
    assert stats.places == {"invalid JSON": ["rows.jsonl:1"]}


def test_parquet_with_the_same_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"id": "x", "conversations": row["conversations"]} for row in GOOD[:2]]
    rows += [{"id": "y", "conversations": None}, {"id": "z", "conversations": [{"role": "user", "content": None}]}]
    pq.write_table(pa.Table.from_pylist(rows * 100), path)
    stats = RowStats("rows")
    assert [c.turns[-1].content for c in stream(path, "chat", stats=stats)] == ["hello", "a"] * 100
    assert stats.dropped == {"no known fields": 100, "content is not text": 100}
    assert stats.places["content is not text"][:2] == ["rows.parquet:4", "rows.parquet:8"]
    assert "rows.parquet:20 and 95 more" in "\n".join(stats.lines())

    pq.write_table(pa.table({"instruction": ["a", "b"], "output": ["c", None]}), path)
    assert [c.turns for c in stream(path, "code", stats=stats)] == [(Turn("user", "a"), Turn("assistant", "c"))]


def test_invalid_utf8_in_parquet_costs_only_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"ask 1", b"\xff\xfe", b"ask 3"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"instruction": texts, "output": ["1", "2", "3"]}), path)
    stats = RowStats("rows")
    assert [c.turns[0].content for c in stream(path, "code", stats=stats)] == ["ask 1", "ask 3"]
    assert stats.places == {"invalid UTF-8": ["rows.parquet:2"]}


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.parquet"])
def test_a_cut_file_is_one_sentence(tmp_path, name):
    path = tmp_path / name
    if name.endswith("zst"):
        rows = "".join(json.dumps({"turns": [f"{n} {n * 7919 % 1000}"]}) + "\n" for n in range(30_000)).encode()
        data = pa.Codec("zstd").compress(rows, asbytes=True)
    else:
        pq.write_table(pa.table({"turns": [["a"]] * 50}), path)
        data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=rf"{name} cannot be read behind (its start|{name}:\d+) .*fetch it again") as caught:
        list(stream(path, "chat"))
    assert "\n" not in str(caught.value)


def test_ids_come_from_content(tmp_path):
    for name, rows in (("one.jsonl", GOOD), ("two.jsonl", GOOD[::-1])):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    first, again = ([c.id for c in stream(tmp_path / name, "chat")] for name in ("one.jsonl", "two.jsonl"))
    assert first == again[::-1] and len(set(first)) == len(GOOD)


def test_hub_sets_are_streamed(monkeypatch):
    asked = {}

    def load_dataset(name, **options):
        asked.update(name=name, **options)
        return iter([*GOOD[2:3] * 3, {"instruction": None, "output": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    stats = RowStats("hub")
    found = list(stream("theblackcat102/evol-codealpaca-v1", stats=stats))
    assert asked == {"name": "theblackcat102/evol-codealpaca-v1", "split": "train", "streaming": True}
    assert [conversation.domain for conversation in found] == ["code"] * 3
    assert stats.places == {"instruction is not text": ["theblackcat102/evol-codealpaca-v1:4"]}


def test_rows_as_datasets_really_gives_them(tmp_path, monkeypatch):
    """Both ways in which a card can describe messages, and a column that only some rows have."""
    from datasets import Dataset, Features, Value
    from datasets import Sequence as SequenceOf

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    message = {"role": Value("string"), "content": Value("string")}
    by_field = [{key: [m[key] for m in row["conversations"]] for key in message} for row in GOOD[:2]]
    for name, column, kind in (
        ("plain", [row["conversations"] for row in GOOD[:2]], [message]),
        ("sequence", by_field, SequenceOf(message)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        made = Dataset.from_dict({"conversations": column}, features=Features({"conversations": kind}))
        made.to_parquet(folder / "train.parquet")
        monkeypatch.setitem(HUB_DATASETS, str(folder), "chat")
        assert [c.turns[-1].content for c in stream(folder)] == ["hello", "a"]


def test_a_download_that_breaks_off_is_one_sentence(monkeypatch):
    def load_dataset(name, **options):
        yield GOOD[0]
        raise ConnectionError("peer went away\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ValueError, match=r"cannot be read behind zhaode/EagleChat:1 \(ConnectionError: peer went away\): run the same"
    ):
        list(stream("zhaode/EagleChat"))


def test_wrong_sources_are_refused_before_reading(tmp_path):
    with pytest.raises(ValueError, match="got 'some/dataset'"):
        list(stream("some/dataset"))
    with pytest.raises(ValueError, match="no file at"):
        list(stream(tmp_path / "none.jsonl", "chat"))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="pass domain="):
        list(stream(tmp_path / "rows.jsonl"))


ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
U, A = Turn("user", "q"), Turn("assistant", "a")
FORMS = [
    ({"messages": [ASK, ANSWER]}, (U, A)),
    ({"messages": [ASK, ANSWER], "conversations": None, "instruction": "", "turns": [], "tools": None}, (U, A)),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}, (Turn("system", "s"), U)),
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, (U, A)),
    ({"instruction": "Translate.", "input": "oak", "output": "a"}, (Turn("user", "Translate.\noak"), A)),
    ({"instruction": "q", "input": " ", "output": "a", "id": 7, "category": "x"}, (U, A)),
    ({"instruction": "q", "output": "a", "system": "s"}, (Turn("system", "s"), U, A)),
    ({"system": "s", "conversations": [ASK, ANSWER]}, (Turn("system", "s"), U, A)),
    ({"system": " ", "messages": [ASK, ANSWER]}, (U, A)),
    ({"messages": [ASK, {**ANSWER, "reasoning_content": "so"}]}, (U, Turn("assistant", "<think>so</think>a"))),
    ({"instruction": "q", "reasoning": "so", "output": "a"}, (U, Turn("assistant", "<think>so</think>a"))),
    ({"messages": [ASK, {**ANSWER, "reasoning_content": None, "tool_calls": []}]}, (U, A)),
    (
        {"messages": [ASK, {"role": "assistant", "content": "\n <think>so</think>\na"}]},
        (U, Turn("assistant", "<think>so</think>\na")),
    ),
    ({"messages": [{"role": "user", "content": " <think> is a tag"}, ANSWER]}, (Turn("user", " <think> is a tag"), A)),
]
NAMED = {
    "conversations beside messages": {"messages": [ASK], "conversations": [ASK]},
    "instruction beside messages": {"messages": [ASK], "instruction": "x", "output": "y"},
    "input is not read": {"messages": [ASK], "input": "x"},
    "output is not read": {"conversations": [ASK], "output": "x"},
    "reasoning is not read": {"conversations": [ASK], "reasoning": "x"},
    "history is not read": {"instruction": "x", "output": "y", "history": [["a", "b"]]},
    "tools is not read": {"messages": [ASK, ANSWER], "tools": [{"name": "f"}]},
    "tool_calls is not read": {"messages": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]},
    "system beside a system message": {"system": "s", "messages": [{"role": "system", "content": "t"}, ASK]},
    "system is not text": {"system": ["s"], "messages": [ASK]},
    "input is not text": {"instruction": "x", "input": ["y"], "output": "z"},
    "messages is not a list of messages": {"messages": ["q", "a"]},
    "<think> is not closed": {"messages": [ASK, {"role": "assistant", "content": "\n<think>so a"}]},
    "reasoning_content of a user turn, or beside <think>": {"messages": [{**ASK, "reasoning_content": "so"}]},
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(("row", "turns"), FORMS)
def test_every_form_of_a_conversation(tmp_path, name, row, turns):
    write_row(tmp_path / name, row)
    stats = RowStats(name)
    assert [c.turns for c in stream(tmp_path / name, "chat", stats=stats)] == [turns], stats.dropped


@pytest.mark.parametrize(("reason", "row"), NAMED.items())
def test_a_field_that_is_not_read_drops_its_row_by_name(tmp_path, reason, row):
    for name in ("rows.jsonl", "rows.parquet"):
        if name.endswith("jsonl") or reason != "messages is not a list of messages":
            write_row(tmp_path / name, row)
            stats = RowStats(name)
            assert not list(stream(tmp_path / name, "chat", stats=stats)) and stats.places == {reason: [f"{name}:1"]}


def write_row(path, row):
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)


def test_parquet_columns_of_every_width(tmp_path):
    texts = {"instruction": ["q", "q"], "input": ["oak", "elm"], "output": ["a", "a"]}
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({name: pa.array(column).cast(kind) for name, column in texts.items()}), tmp_path / "a.parquet")
        assert [c.turns[0].content for c in stream(tmp_path / "a.parquet", "chat")] == ["q\noak", "q\nelm"]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    for kind in (pa.list_(message), pa.large_list(message), pa.list_(message, 2)):
        pq.write_table(pa.table({"messages": pa.array([[ASK, ANSWER]], kind)}), tmp_path / "b.parquet")
        assert [c.turns for c in stream(tmp_path / "b.parquet", "chat")] == [(U, A)]


def test_a_window_that_is_too_large_is_told_from_damage(tmp_path, monkeypatch):
    def too_large(path):
        yield "rows:1", GOOD[0]
        raise OSError("ZSTD decompress failed: Frame requires too much memory for decoding")

    monkeypatch.setattr("hyperdflash.data.sources._file_rows", too_large)
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"window above 128 MiB, compress it again"):
        list(stream(path, "chat"))


def test_the_example_in_the_document_is_read_as_it_says():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [json.loads(line) for line in re.search(r"```json\n(.*?)```", text, re.S)[1].splitlines()]
    assert len(rows) == 10 and [len(parse_row(row, "chat").turns) for row in rows[:7]] == [2, 3, 2, 2, 2, 2, 1]
    for row, reason in zip(rows[7:], ("no known fields", "missing or unknown role", "tools is not read"), strict=True):
        with pytest.raises(MalformedRow, match=reason):
            parse_row(row, "chat")
