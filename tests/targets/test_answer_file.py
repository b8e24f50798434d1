"""Kept answers: reading never writes, damage is named, and only the writer takes off what a crash left half written."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from hyperdflash.answers import answer_file
from hyperdflash.answers.answer_file import append_answers, cut_half_line, read_answers
from hyperdflash.contracts import Document


def document(name: str, length: int = 4) -> Document:
    return Document(name, "chat", torch.arange(length), torch.arange(length) > 1)


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "kept" / "a.jsonl"
    for n in range(5):
        append_answers(made, [document(f"chat/{n}")])
    return made


@pytest.mark.parametrize("damage", [b"\xff", b'"', b"\n"])
def test_a_damaged_line_is_named_and_nothing_is_lost(path, damage):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + damage + lines[1][10:] + b"".join(lines[2:]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^line 2 of .*a\.jsonl is damaged: remove it and .*, and run the same") as caught:
        read_answers(path)
    assert path.read_bytes() == before and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", [b"[]\n", b"\n", b'{"id": "chat/9"}\n', b'{"id": "x", "domain": "chat", "input_ids": [1], "loss_mask": []}\n']
)
def test_json_that_is_no_answer_is_damage_too(path, line):
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"line 6 of .* is damaged: .*sed -i 6,6d"):
        read_answers(path)


def test_the_advice_leaves_no_conversation_without_one_of_its_documents(path):
    append_answers(path, [document("b#1"), document("b#2"), document("b")])
    append_answers(path, [document("c")])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"id"', b'"i\xc3"')
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError) as caught:
        read_answers(path)
    subprocess.run(re.search("`(.*)`", str(caught.value))[1], shell=True, check=True)
    assert list(read_answers(path)) == [*(f"chat/{n}" for n in range(5)), "c"]


def test_a_line_that_is_being_written_is_passed_over_and_stays(path):
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[0])  # all of an answer but its end
    assert list(read_answers(path)) == [f"chat/{n}" for n in range(5)]
    assert path.read_bytes() == whole + whole.splitlines()[0]
    with path.open("ab") as file:  # the writer goes on
        file.write(b"\n")
    assert len(read_answers(path)) == 5 and path.read_bytes().count(b"\n") == 6


def test_the_writer_takes_the_half_line_off(path, monkeypatch):
    monkeypatch.setattr(answer_file, "_BLOCK", 16)
    whole = path.read_bytes()
    for half in (b"", b"{", b'{"id": "chat/5", "domain": "chat", "input_ids": [1, 2'):
        path.write_bytes(whole + half)
        cut_half_line(path)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:40])  # its first line
    cut_half_line(path)
    assert path.read_bytes() == b""
    cut_half_line(path.with_name("none.jsonl"))
    assert not path.with_name("none.jsonl").exists()
