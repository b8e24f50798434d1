"""A file is there whole or not at all, whoever writes it at the same time."""

from __future__ import annotations

import os
from pathlib import Path

from hyperdflash.files import write_text


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
