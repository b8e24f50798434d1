"""Answers on disk: reading never writes, damage costs its own conversation, and only the writer removes a half line."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.contracts import Document


def document(name: str, length: int = 4) -> Document:
    return Document(name, "chat", torch.arange(length), torch.arange(length) > 1)


def names(path) -> list[str]:
    return list(AnswerFile(path).documents)


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "kept" / "a.jsonl"
    for n in range(5):
        AnswerFile(made).append([document(f"chat/{n}")])
    return made


@pytest.mark.parametrize("damage", [b"\xff", b'"', b"\n"])
def test_a_damaged_line_costs_its_conversation_and_perhaps_the_next(path, damage, caplog):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + damage + lines[1][10:] + b"".join(lines[2:]))
    before = path.read_bytes()
    assert names(path) == ["chat/0", "chat/3", "chat/4"]
    assert path.read_bytes() == before and f"line 2 of {path} is damaged: its conversation" in caplog.text


@pytest.mark.parametrize(
    "line", [b"[]\n", b"\n", b'{"id": "chat/9"}\n', b'{"id": "x", "domain": "chat", "input_ids": [1], "loss_mask": []}\n']
)
def test_json_that_is_no_answer_is_damage_too(path, line, caplog):
    with path.open("ab") as file:
        file.write(line)
    assert names(path) == [f"chat/{n}" for n in range(5)] and "line 6 of" in caplog.text


@pytest.mark.parametrize("damaged", [5, 6, 7])
def test_no_conversation_is_read_without_one_of_its_documents(path, damaged):
    AnswerFile(path).append([document("b#1"), document("b#2"), document("b")])
    AnswerFile(path).append([document("c")])
    AnswerFile(path).append([document("d")])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[damaged] = lines[damaged].replace(b'"id"', b'"i\xc3"')
    path.write_bytes(b"".join(lines))
    old = [f"chat/{n}" for n in range(5)]
    assert names(path) == [*old, *(["c"] if damaged < 7 else []), "d"]  # b's own end cannot be told from a part of c
    AnswerFile(path).append([document("b#1"), document("b")])  # made again
    assert names(path)[-2:] == ["b#1", "b"]


def test_a_line_that_is_being_written_is_passed_over_and_stays(path):
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[0])  # all of an answer but its end
    assert names(path) == [f"chat/{n}" for n in range(5)]
    assert path.read_bytes() == whole + whole.splitlines()[0]
    with path.open("ab") as file:  # the writer goes on
        file.write(b"\n")
    assert len(names(path)) == 5 and path.read_bytes().count(b"\n") == 6


def test_the_writer_removes_the_half_line(path):
    whole = path.read_bytes()
    AnswerFile(path).append([document("new")])
    new = path.read_bytes().removeprefix(whole)
    for half in (b"", b"{", b'{"id": "chat/5", "domain": "chat", "input_ids": [1, 2'):
        path.write_bytes(whole + half)
        AnswerFile(path).append([document("new")])
        assert path.read_bytes() == whole + new
    path.write_bytes(whole[:40])  # its first line
    writer = AnswerFile(path)
    writer.append([document("new")])
    writer.append([document("new")])
    assert path.read_bytes() == new + new
    assert not AnswerFile(path.with_name("none.jsonl")).documents
    assert not path.with_name("none.jsonl").exists()
