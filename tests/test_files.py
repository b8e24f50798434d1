"""A file is there whole or not at all, whoever writes it at the same time."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hyperdflash.cli import sentence_of
from hyperdflash.files import read_json, write_text
from hyperdflash.launch.child import save_job
from hyperdflash.training.checkpoints import AtomicCheckpoints


def test_processes_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "new" / "corpus.json", Path.replace, []

    def overtaken(partial: Path, target: Path) -> Path:
        """Another process writes the same file when this one has written and not yet renamed."""
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        write_text(path, "theirs")
        seen.append(path.read_text())
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    write_text(path, "ours")
    assert seen == ["theirs"] and path.read_text() == "ours"
    assert list(path.parent.iterdir()) == [path]


def test_a_new_start_of_ranks_leaves_what_ranks_did_not_write(tmp_path):
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for name in ("0.json", "3.log", "hydra.yaml", "notes.txt", "1 (copy).log"):
        (ranks / name).write_text("x")
    (ranks / "mine").mkdir()
    save_job(OmegaConf.create({"a": 1}), tmp_path)
    assert {path.name for path in ranks.iterdir()} == {"config.yaml", "notes.txt", "1 (copy).log", "mine"}


def test_a_full_disk_is_told_as_such_and_names_the_file(tmp_path, monkeypatch):
    """torch.save hides the fault of a write behind an error about positions."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, content) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hyperdflash.files.open", lambda path, mode: io.BufferedWriter(Full(), 100), raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "step1.ckpt")
    assert sentence_of(caught.value).startswith(f"{tmp_path / 'step1.ckpt'}: No space left on device: free some space")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing: make it again"),
        (b"", "is empty: make it again"),
        (b'{"cut": ', "is damaged (Expecting value"),
        (b"\xff", "is damaged ('utf-8' codec"),
        (b"[]", "wanted an object with name"),
        (b'{"other": 1}', "wanted an object with name"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS (`git lfs pull` fetches the file): make it again",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_json(path, "make it again", "name")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
